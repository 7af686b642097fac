"""Cards that show what a class's feature means: top images, Grad-FAM, a maximised image, scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from salve_lm.activations.sites import parse_site
from salve_lm.atomic import atomic_folder, check_writable_target
from salve_lm.errors import BadConfig, MissingFile
from salve_lm.features import FeatureTable
from salve_lm.features.table import Ranking
from salve_lm.modules.studied import StudiedModel
from vision.activation_maximisation import maximise_activation
from vision.data.images import ImageData
from vision.data.planted import PlantedShortcut
from vision.faithfulness import deletion_curve, insertion_curve, latent_score
from vision.grad_fam import Heatmaps, grad_fam
from vision.receptive_area import Box, receptive_area

if TYPE_CHECKING:
    from sae_lens import SAE

FORMAT, VERSION = "salve_lm.cards", 1
# dark blue, purple, orange, yellow: ordered by lightness, so that it also reads in grey
_HEAT = torch.tensor([[0.05, 0.03, 0.3], [0.55, 0.1, 0.55], [0.95, 0.45, 0.2], [1.0, 0.95, 0.4]])


class FeatureCards(Callback):
    """Writes one card a class and feature after validation, for the report.

    A card holds the samples that activate the latent most (as `discover` found them), each with its
    Grad-FAM heatmap and the crop that the heatmap's maximum sees (`vision.receptive_area`); an
    image that maximises the latent; and how faithful the heatmaps are: the relative areas under
    their deletion curve (lower is better) and insertion curve (higher is better), beside those of
    random heatmaps.

    Args:
        sae: Folder of the SAE.
        features: Folder of the feature table; its top samples are shown.
        out: Folder to write; must not exist.
        site: Where the SAE reads.
        ranking: Which features: each class's `dominant` or `selective` ones.
        per_class: Features a class, best first.
        top: Images a card.
        layer: Module whose output the heatmaps are drawn on; the last one with spatial positions
            when absent. A small image may have only one position left there: name an earlier one.
        maximise_steps: Steps of activation maximisation; 0 leaves the maximised image out.
        seed: Of the maximised images and the random heatmaps.
    """

    def __init__(
        self,
        sae: str,
        features: str,
        out: str,
        site: str = "pooled",
        ranking: Ranking = "dominant",
        per_class: int = 1,
        top: int = 4,
        layer: str | None = None,
        maximise_steps: int = 128,
        seed: int = 0,
    ) -> None:
        if per_class < 1 or top < 1 or maximise_steps < 0:
            raise BadConfig("per_class and top are at least 1, maximise_steps at least 0.")
        self.sae, self.features, self.out, self.site = sae, features, out, site
        self.ranking, self.per_class, self.top = ranking, per_class, top
        self.layer, self.maximise_steps, self.seed = layer, maximise_steps, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse now what would fail after the validation."""
        if trainer.is_global_zero:
            check_writable_target(self.out)
        if not isinstance(pl_module, StudiedModel):
            raise BadConfig("FeatureCards needs a StudiedModel such as vision.Classifier.")
        from salve_lm.sae import load_sae

        # here, because tensors made in the validation's inference mode take part in no gradient
        self._table, self._sae = FeatureTable.load(self.features), load_sae(self.sae)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and write the cards, on rank zero."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        from rich.progress import track

        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, ImageData | PlantedShortcut) or not isinstance(
            pl_module, StudiedModel
        ):
            raise BadConfig("FeatureCards needs the images: give an image data module as --data.")
        table = self._table
        maker = _CardMaker(self, pl_module, self._sae.to(pl_module.device), table, data)
        jobs = [(k, r) for k in range(table.n_classes) for r in range(self.per_class)]
        with atomic_folder(self.out) as folder:
            cards = [maker.card(folder, k, r) for k, r in track(jobs, "Drawing feature cards")]
            index = {"format": FORMAT, "version": VERSION, "latents": cards}
            (folder / "cards.json").write_text(json.dumps(index, indent=1) + "\n")


class _CardMaker:
    """Everything that the cards of one run share."""

    def __init__(
        self,
        options: FeatureCards,
        studied: StudiedModel,
        sae: SAE[Any],
        table: FeatureTable,
        data: ImageData | PlantedShortcut,
    ) -> None:
        import pandas as pd

        self._options, self._table, self._sae, self._data = options, table, sae, data
        self._model = studied.model
        self._site = parse_site(options.site, studied)
        self._layer = None if options.layer is None else parse_site(options.layer, studied)
        self._device = studied.device
        top = Path(options.features) / "top_samples.parquet"
        if not top.is_file():
            raise MissingFile(f"No top samples at {top}. Make the table with `salve-lm discover`.")
        self._top = pd.read_parquet(top)
        self._split = table.provenance["split"]
        self._images: Dataset = data.eval_dataset(self._split)

    def card(self, folder: Path, label: int, rank: int) -> dict[str, Any]:
        """Draw the card of a class's feature into `folder`."""
        options, table = self._options, self._table
        latent = int(table.ranked(label, options.ranking)[rank])
        sign = table.sign(label, latent)
        name = f"c{label}_r{rank}_l{latent}"
        card: dict[str, Any] = {
            "latent": latent, "class": table.class_names[label], "sign": sign, "rank": rank,
            "ranking": options.ranking, "top": [], "maximised": None,
        }  # fmt: skip
        rows = self._top[
            (self._top["latent"] == latent) & (self._top["direction"] == ("+" if sign > 0 else "-"))
        ].sort_values("rank")[: options.top]
        if len(rows):
            images = torch.stack([self._images[int(i)][0] for i in rows["sample"]])
            maps = self._maps(images, latent, sign)
            heat = maps.resized()[:, 0].cpu()
            crops = self._crops(images, maps)
            for j, row in enumerate(rows.to_dict("records")):
                shown = self._shown(images[j])
                files = {"image": f"{name}_top{j}.png", "overlay": f"{name}_fam{j}.png"}
                save_png(folder / files["image"], shown)
                if j in crops:
                    top, left, bottom, right = crops[j]
                    files["crop"] = f"{name}_crop{j}.png"
                    save_png(folder / files["crop"], shown[:, top:bottom, left:right])
                save_png(folder / files["overlay"], overlay(shown, heat[j]))
                described = {k: row[k] for k in ("sample", "source", "activation", "class")}
                card["top"].append({**files, **described})
            card |= self._faithfulness(images, heat, latent, sign)
        if options.maximise_steps:
            mean, std = self._data.normalisation
            height, width = self._images[0][0].shape[1:]
            found = maximise_activation(
                self._model, self._sae, self._site, latent, size=(height, width), sign=sign,
                 steps=options.maximise_steps, seed=options.seed, mean=mean, std=std,
            )  # fmt: skip
            card["maximised"] = f"{name}_max.png"
            card["maximised_activation"] = found.latent * sign
            save_png(folder / card["maximised"], found.image)
        return card

    def _maps(self, images: Tensor, latent: int, sign: int) -> Heatmaps:
        return grad_fam(
            self._model, self._sae, self._site, images.to(self._device), [latent],
            signs=[sign], layer=self._layer,
        )  # fmt: skip

    def _crops(self, images: Tensor, maps: Heatmaps) -> dict[int, Box]:
        """Image -> what the maximum of its map sees; none for a map of zeros."""
        flat = maps.maps[:, 0].flatten(1)
        at = flat.argmax(dim=1)
        width = maps.maps.shape[-1]
        peaks = torch.stack([at // width, at % width], dim=1)
        boxes = receptive_area(self._model, maps.layer, images.to(self._device), peaks)
        return {i: box for i, box in enumerate(boxes) if bool(flat[i].any())}

    def _faithfulness(self, images: Tensor, heat: Tensor, latent: int, sign: int) -> dict[str, Any]:
        score = latent_score(self._model, self._sae, self._site, latent, sign)
        images, heat = images.to(self._device), heat.to(self._device)
        draw = torch.Generator().manual_seed(self._options.seed)
        chance = torch.rand(heat.shape, generator=draw).to(self._device)
        found = {}
        for name, curve in (("deletion", deletion_curve), ("insertion", insertion_curve)):
            for prefix, maps in (("", heat), ("random_", chance)):
                area = curve(score, images, maps, seed=self._options.seed).relative_auc
                finite = area[area.isfinite()]
                found[f"{prefix}{name}_auc"] = float(finite.mean()) if len(finite) else None
        return found

    def _shown(self, image: Tensor) -> Tensor:
        mean, std = (torch.tensor(v)[:, None, None] for v in self._data.normalisation)
        return (image * std + mean).clamp(0, 1)


def overlay(image: Tensor, heat: Tensor, strength: float = 0.65) -> Tensor:
    """`image` [3, h, w] in [0, 1] in grey, with `heat` [h, w] over it in colours.

    The heat is scaled to its own maximum: colours compare places, not images.
    """
    share = heat / heat.max() if float(heat.max()) > 0 else heat
    place = share * (len(_HEAT) - 1)
    low = place.floor().long().clamp(max=len(_HEAT) - 2)
    colour = torch.lerp(_HEAT[low], _HEAT[low + 1], (place - low)[..., None]).permute(2, 0, 1)
    grey = image.mean(0, keepdim=True).expand(3, -1, -1)
    weight = strength * share
    return grey * (1 - weight) + colour * weight


def save_png(path: Path, image: Tensor) -> None:
    """Write `image` [3, h, w] in [0, 1]."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(pixels.cpu().contiguous().numpy()).save(path, optimize=True)
