"""Is a heatmap right? Deletion and insertion curves, pointing game, intersection over union.

The curves need no truth: the pixels that a map ranks first should matter most (RISE, Petsiuk et
al., BMVC 2018). The other two compare with a mask of where the concept is known to be. All read
only the order or the shape of a map, so Grad-FAM and other methods compare. Beside any figure
stands that of a random map (`torch.rand`): a score is only as good as its distance from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salve_lm.activations.sites import Site
from salve_lm.errors import BadConfig, NotFinite, ShapeMismatch
from salve_lm.features import check_latent
from vision.grad_fam import encode
from vision.site_forward import forward_to

if TYPE_CHECKING:
    from sae_lens import SAE

Baseline = Literal["mean", "blur"]
Score = Callable[[Tensor], Tensor]
# RISE blurs 224-pixel images with a Gaussian of 5 pixels; less than 2 would leave digits readable
_BLUR_SHARE, _LEAST_BLUR = 5 / 224, 2.0


class Curve(NamedTuple):
    """A deletion or insertion curve of each image.

    Attributes:
        share: [steps + 1], share of the pixels that were changed, from 0 to 1.
        score: [n, steps + 1] float64.
        auc: [n], area under `score` by the trapezoid rule, in the score's unit.
        relative_auc: [n], the same after mapping the score of the untouched image to 1 and that of
            the bare baseline to 0, so that latents of any scale compare; NaN where the two are
            equal (to rounding). Deletion: small is good; insertion: large is good.
    """

    share: Tensor
    score: Tensor
    auc: Tensor
    relative_auc: Tensor


def latent_score(model: nn.Module, sae: SAE[Any], site: Site, latent: int, sign: int = 1) -> Score:
    """The function images [n, ...] -> s * z_latent [n], for the curves."""
    check_latent(latent, sae.W_dec.shape[0])

    @torch.no_grad()
    def score(images: Tensor) -> Tensor:
        z = encode(sae, forward_to(model, site, images).x)[:, latent]
        return sign * z.reshape(len(images), -1).mean(dim=1)

    return score


def deletion_curve(
    score: Score,
    images: Tensor,
    heatmaps: Tensor,
    *,
    steps: int = 20,
    baseline: Baseline | Tensor = "mean",
    batch_size: int = 64,
    seed: int = 0,
) -> Curve:
    """Replace the pixels of `images` by the baseline, the most important first.

    Args:
        score: images [m, channels, height, width] -> [m].
        images: [n, channels, height, width].
        heatmaps: [n, height, width]; ties (a ReLU leaves many zeros) are broken at random.
        steps: number of equal portions of pixels.
        baseline: "mean" (the image's mean colour), "blur" (a Gaussian of 5/224 of the longer side,
            at least 2 pixels) or images of one's own, broadcastable to `images`.
        batch_size: images per call of `score`.
        seed: of the order among ties.

    Raises:
        ShapeMismatch: heatmaps or baseline of another size, or a score that is not one number an
            image.
        NotFinite: NaN or infinity in the heatmaps or scores.
        BadConfig: no steps, or more than there are pixels.
    """
    replaced = baseline_images(images, baseline)
    return _curve(score, images, replaced, heatmaps, steps, batch_size, seed, deletion=True)


def insertion_curve(
    score: Score,
    images: Tensor,
    heatmaps: Tensor,
    *,
    steps: int = 20,
    baseline: Baseline | Tensor = "blur",
    batch_size: int = 64,
    seed: int = 0,
) -> Curve:
    """Uncover the pixels of `images` on the baseline; arguments as for `deletion_curve`."""
    covered = baseline_images(images, baseline)
    return _curve(score, covered, images, heatmaps, steps, batch_size, seed, deletion=False)


def baseline_images(images: Tensor, baseline: Baseline | Tensor) -> Tensor:
    """What pixels are replaced by, in the shape of `images` [n, channels, height, width]."""
    if isinstance(baseline, Tensor):
        try:
            return baseline.to(images).expand_as(images)
        except RuntimeError as e:
            raise ShapeMismatch(
                f"The baseline {list(baseline.shape)} does not fit images {list(images.shape)}."
            ) from e
    if baseline == "mean":
        return images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    if baseline != "blur":
        raise BadConfig(f"baseline is {baseline!r}; choose mean, blur or a tensor of images.")
    sigma = max(max(images.shape[2:]) * _BLUR_SHARE, _LEAST_BLUR)
    for axis in (2, 3):
        # mirroring can reach no further than the image does
        radius = min(math.ceil(3 * sigma), images.shape[axis] - 1)
        at = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
        kernel = torch.exp(-0.5 * (at / sigma) ** 2)
        kernel = kernel / kernel.sum()
        pad = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
        padded = F.pad(images, pad, mode="reflect").flatten(0, 1).unsqueeze(1)
        images = F.conv2d(padded, kernel.reshape(shape)).reshape(images.shape)
    return images


def pixel_order(heatmaps: Tensor, seed: int = 0) -> Tensor:
    """Pixels of each map [n, height, width] by falling value, ties at random: int64 [n, pixels]."""
    flat = _checked(heatmaps).flatten(1)
    shuffled = torch.rand(flat.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    ranks = flat.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    return shuffled.gather(1, ranks)


def pointing_game(heatmaps: Tensor, masks: Tensor, tolerance: float = 0.0) -> Tensor:
    """Whether each map's maximum lies in its mask, [n] from 0 to 1 (Zhang et al., ECCV 2016).

    A map with several maxima scores the share of them that hit: a constant map gets the chance
    level, the mask's share of the image. The score of many images is the mean.

    Args:
        heatmaps: [n, height, width].
        masks: bool [n, height, width], true where the concept is.
        tolerance: pixels by which the mask is widened (15 in the original).

    Raises:
        ShapeMismatch, NotFinite: maps or masks that cannot be compared.
        BadConfig: an empty mask, or a negative tolerance.
    """
    maps, inside = _comparable(heatmaps, masks)
    if tolerance < 0:
        raise BadConfig("tolerance is a number of pixels, not negative.")
    hits = torch.empty(len(maps), dtype=torch.float64)
    for i, (values, mask) in enumerate(zip(maps, inside, strict=True)):
        peaks = (values == values.max()).nonzero().double()
        distance = torch.cdist(peaks, mask.nonzero().double()).amin(dim=1)
        hits[i] = (distance <= tolerance).double().mean()
    return hits


def intersection_over_union(
    heatmaps: Tensor, masks: Tensor, threshold: float | None = None, seed: int = 0
) -> Tensor:
    """Overlap of each map's important region with its mask, float64 [n].

    Args:
        heatmaps: [n, height, width].
        masks: bool [n, height, width].
        threshold: the region is where the map exceeds this share of its maximum (CAM, CVPR 2016:
            0.2). None: as many of the highest pixels as the mask has, which needs no choice.
        seed: of the order among ties, for None.

    Raises:
        ShapeMismatch, NotFinite: maps or masks that cannot be compared.
        BadConfig: an empty mask, or a threshold outside [0, 1).
    """
    order = pixel_order(heatmaps, seed)
    maps, inside = _comparable(heatmaps, masks)
    if threshold is not None and not 0 <= threshold < 1:
        raise BadConfig("threshold is a share of the map's maximum, from 0 to below 1.")
    flat, truth = maps.flatten(1), inside.flatten(1)
    if threshold is None:
        place = torch.empty_like(order)
        place.scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
        region = place < truth.sum(dim=1, keepdim=True)
    else:
        region = flat > threshold * flat.amax(dim=1, keepdim=True)
    common = (region & truth).sum(dim=1).double()
    return common / (region | truth).sum(dim=1)


def _checked(heatmaps: Tensor) -> Tensor:
    if heatmaps.ndim != 3 or not heatmaps.numel():
        raise ShapeMismatch(
            f"Heatmaps must be [n, height, width], not {list(heatmaps.shape)}: one map per image. "
            "Take one latent of `Heatmaps.resized()`."
        )
    if not bool(heatmaps.isfinite().all()):
        raise NotFinite("heatmaps", "the maps to be judged")
    return heatmaps.detach().cpu()


def _comparable(heatmaps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    maps = _checked(heatmaps)
    if masks.dtype != torch.bool or masks.shape != heatmaps.shape:
        raise ShapeMismatch(
            f"Masks must be bool {list(heatmaps.shape)} like the heatmaps, not {masks.dtype} "
            f"{list(masks.shape)}."
        )
    empty = (~masks.flatten(1).any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise BadConfig(
            f"The mask of image {empty[0]} is empty ({len(empty)} in all). Leave out images "
            "without the concept."
        )
    return maps, masks.cpu()


@torch.no_grad()
def _curve(
    score: Score,
    before: Tensor,
    after: Tensor,
    heatmaps: Tensor,
    steps: int,
    batch_size: int,
    seed: int,
    deletion: bool,
) -> Curve:
    n, _, height, width = before.shape
    pixels = height * width
    order = pixel_order(heatmaps, seed)
    if heatmaps.shape != (n, height, width):
        raise ShapeMismatch(
            f"Heatmaps {list(heatmaps.shape)} do not fit {n} images of {height} x {width}. Use "
            "`Heatmaps.resized()`."
        )
    if not 1 <= steps <= pixels or batch_size < 1:
        raise BadConfig(f"steps must lie between 1 and {pixels} pixels; batch_size at least 1.")
    place = torch.empty_like(order)
    place.scatter_(1, order, torch.arange(pixels).expand_as(order))
    place = place.reshape(n, 1, height, width).to(before.device)
    counts = torch.arange(steps + 1) * pixels // steps
    scores = torch.empty(n, steps + 1, dtype=torch.float64)
    for start in range(0, n, batch_size):
        rows = slice(start, start + batch_size)
        for i, count in enumerate(counts.tolist()):
            value = score(torch.where(place[rows] < count, after[rows], before[rows]))
            if value.shape != (len(before[rows]),):
                raise ShapeMismatch(
                    f"score gave {list(value.shape)} for {len(before[rows])} images; it must give "
                    "one number an image."
                )
            scores[rows, i] = value.double().cpu()
    if not bool(scores.isfinite().all()):
        raise NotFinite("score", "the changed images")
    share = counts.double() / pixels
    ends = (scores[:, 0], scores[:, -1]) if deletion else (scores[:, -1], scores[:, 0])
    auc = torch.trapezoid(scores, share, dim=1)
    span = ends[0] - ends[1]
    # where only rounding differs there is no scale
    none = span.abs() <= 1e-6 * scores.abs().amax(dim=1)
    relative = torch.where(none, torch.nan, (auc - ends[1]) / span)
    return Curve(share, scores, auc, relative)
