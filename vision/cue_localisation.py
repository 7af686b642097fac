"""Does Grad-FAM point at a planted cue? In numbers, because its place is known (METHODS 3d, 5)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from salve_lm.activations.sites import Site
from salve_lm.features import FeatureTable
from vision.data.patch import Stamped
from vision.faithfulness import intersection_over_union, pointing_game
from vision.grad_fam import SilentLatent, grad_fam

if TYPE_CHECKING:
    from sae_lens import SAE

logger = logging.getLogger(__name__)

BATCH = 64
CAM_THRESHOLD = 0.2  # share of a map's maximum that bounds its region (CAM, CVPR 2016)


def localise_cue(
    model: nn.Module,
    sae: SAE[Any],
    site: Site,
    images: Stamped,
    latents: dict[str, tuple[int, int]],
    limit: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Scores of the heatmaps of some latents against the place of the patch.

    Args:
        model: the network.
        sae: reads `site`.
        site: where.
        images: stamped images; an even choice of at most `limit` of them is used.
        latents: name -> (latent, sign).
        limit: at most so many images.
        device: of the model.

    Returns:
        One row a latent, and one of random maps. `pointing`: share of maps whose maximum lies on
        the patch. `iou`: mean overlap of the patch with as many of the highest pixels. `iou_cam`:
        with the pixels above 20 % of the maximum. `patch_share`: share of the image that
        the patch covers, which is also the pointing game of chance.
    """
    step = max(1, -(-len(images) // limit))
    chosen = range(0, len(images), step)
    scores: dict[str, list[Tensor]] = {name: [] for name in (*latents, "random map")}
    covered: list[float] = []
    draw = torch.Generator().manual_seed(0)
    for start in range(0, len(chosen), BATCH):
        rows = chosen[start : start + BATCH]
        batch = torch.stack([images[i][0] for i in rows]).to(device)
        masks = torch.stack([images.mask(i) for i in rows])
        covered += masks.double().mean(dim=(1, 2)).tolist()
        maps = {"random map": torch.rand(masks.shape, generator=draw)}
        for name, (latent, sign) in latents.items():
            maps[name] = _map(model, sae, site, batch, latent, sign)
        for name, each in maps.items():
            scores[name].append(
                torch.stack(
                    [
                        pointing_game(each, masks),
                        intersection_over_union(each, masks),
                        intersection_over_union(each, masks, CAM_THRESHOLD),
                    ],
                    dim=1,
                )
            )
    found = []
    for name, parts in scores.items():
        pointing, iou, iou_cam = torch.cat(parts).mean(dim=0).tolist()
        found.append(
            {
                "map": name,
                "latent": latents[name][0] if name in latents else None,
                "images": len(chosen),
                "pointing": pointing,
                "iou": iou,
                "iou_cam": iou_cam,
                "patch_share": sum(covered) / len(covered),
            }
        )
    return found


def cue_latents(table: FeatureTable, cue: str, ranks: int) -> dict[str, tuple[int, int]]:
    """The first `ranks` latents of the ranking that `cue` (`selective:with cue`) names, with signs.

    Beside them, for comparison, the one in the middle of the ranking, which knows little of it.
    """
    name = table.parse(cue)
    ranked = table.ranked(name.label, name.ranking)
    places = {f"{cue}/{r}" if r else cue: int(ranked[r]) for r in range(min(ranks, len(ranked)))}
    places["a latent in the middle of the ranking"] = int(ranked[len(ranked) // 2])
    return {text: (latent, table.sign(name.label, latent)) for text, latent in places.items()}


def _map(
    model: nn.Module, sae: SAE[Any], site: Site, images: Tensor, latent: int, sign: int
) -> Tensor:
    try:
        maps = grad_fam(model, sae, site, images, [latent], signs=[sign])
    except SilentLatent as e:
        # a map of zeros scores what chance scores
        logger.warning("%s Its maps count as empty.", e)
        return torch.zeros(len(images), *images.shape[2:])
    return maps.resized()[:, 0].cpu()
