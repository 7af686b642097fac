"""Whether an edit removes a planted shortcut: measured on clean and on stamped images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from salve_lm.activations.sites import parse_site
from salve_lm.callbacks.tables import write_table
from salve_lm.edits import EditContext, EditSpec, LowerClassBias, apply, plan_edit
from salve_lm.errors import BadConfig, NoEffect
from salve_lm.evaluation import HeadInputs, linear_head
from salve_lm.features import FeatureTable
from salve_lm.modules.studied import StudiedModel
from vision.cue_localisation import cue_latents, localise_cue
from vision.data.planted import PlantedShortcut, ShortcutFigures, shortcut_figures


class ShortcutCheck(Callback):
    """After validation on a `PlantedShortcut`: edits of the head, measured as METHODS 3d asks.

    For every edit, at the strength chosen on *training* images (of all strengths that cost at most
    `accuracy_drop` of clean accuracy and `recall_drop` of the class's clean recall, the one that
    leaves the fewest stamped images of other classes called the class): stamped images of other
    classes called so, clean accuracy and clean recall of the class on held-out images, with
    Clopper-Pearson bounds. The unedited head stands first, and a lowered class bias is always
    among the edits.

    Args:
        edits: Edits of the head; those without a `target_class` take the planted one.
        sae: Folder of the SAE, for edits that name none.
        features: Folder of the feature table, for edits that name none; one of `CueContrast` names
            the cue's latent `selective:with cue`.
        accuracy_drop: Largest loss of clean training accuracy.
        recall_drop: Largest loss of the class's clean training recall.
        cue: Feature whose heatmaps (Grad-FAM) are compared with the place of the patch, such as
            `selective:with cue`; needs `sae` and `features`. Left out where absent.
        cue_ranks: How many latents of that ranking, from the first on.
        cue_images: At most so many held-out stamped images for it.
        site: Where the SAE reads.
        out: Folder for `shortcut.csv` and `.json`, and `localisation.csv` and `.json` with `cue`;
            those of an earlier run are replaced.
    """

    def __init__(
        self,
        edits: list[EditSpec],
        sae: str | None = None,
        features: str | None = None,
        accuracy_drop: float = 0.01,
        recall_drop: float = 0.05,
        cue: str | None = None,
        cue_ranks: int = 3,
        cue_images: int = 300,
        site: str = "pooled",
        out: str | None = None,
    ) -> None:
        if not edits:
            raise BadConfig("ShortcutCheck without edits: give at least one under `edits`.")
        if cue is not None and (sae is None or features is None):
            raise BadConfig("`cue` draws heatmaps of latents: give `sae` and `features` too.")
        if cue_ranks < 1 or cue_images < 1:
            raise BadConfig("cue_ranks and cue_images are at least 1.")
        self.edits, self.out, self.cue, self.site = edits, out, cue, site
        self.cue_ranks, self.cue_images = cue_ranks, cue_images
        self._sae, self._features = sae, features
        self.accuracy_drop, self.recall_drop = accuracy_drop, recall_drop
        self._context = EditContext(sae, features)
        self.rows: list[dict[str, Any]] = []
        self.localisation: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read what the heatmaps need, and find out now whether there is such a feature."""
        if self.cue is None:
            return
        from salve_lm.sae import load_sae

        self._cue_latents = cue_latents(
            FeatureTable.load(str(self._features)), self.cue, self.cue_ranks
        )
        # here, because tensors made in the validation's inference mode take part in no gradient
        self._cue_sae = load_sae(str(self._sae))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, print and write, on rank zero."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, StudiedModel) or not isinstance(data, PlantedShortcut):
            raise BadConfig("ShortcutCheck needs a StudiedModel and vision.data.PlantedShortcut.")
        bench = _Bench(pl_module, data)
        self.rows = [bench.row("unedited", None, {})]
        named = [*self.edits, LowerClassBias(name="class bias lowered")]
        for spec in named:
            self.rows.append(self._best(bench, spec, pl_module, data))
        _print(self.rows, data.class_names[data.target])
        if self.out is not None:
            write_table(self.out, "shortcut", self.rows)
        if self.cue is not None:
            self.localisation = localise_cue(
                pl_module.model,
                self._cue_sae.to(pl_module.device),
                parse_site(self.site, pl_module),
                data.stamped_dataset("val"),
                self._cue_latents,
                self.cue_images,
                pl_module.device,
            )
            _print_localisation(self.localisation)
            if self.out is not None:
                write_table(self.out, "localisation", self.localisation)

    def _best(
        self, bench: _Bench, spec: EditSpec, studied: StudiedModel, data: PlantedShortcut
    ) -> dict[str, Any]:
        if spec.target_class is None:
            spec = dataclasses.replace(spec, target_class=data.class_names[data.target])
        plan = plan_edit(spec, studied, self._context, data.class_names)
        base = bench.figures("train", {})
        best: tuple[float, float, Mapping[str, Tensor]] = (base.stamped_called.share, 0.0, {})
        for alpha in spec.default_alphas:
            try:
                replaced = apply(bench.head, plan.with_alpha(alpha).ops)
            except NoEffect:
                continue
            found = bench.figures("train", replaced)
            allowed = (
                found.clean_accuracy.share >= base.clean_accuracy.share - self.accuracy_drop
                and found.clean_recall.share >= base.clean_recall.share - self.recall_drop
            )
            if allowed and found.stamped_called.share < best[0]:
                best = (found.stamped_called.share, alpha, replaced)
        latents = " ".join(map(str, plan.features))
        return bench.row(spec.name or type(spec).__name__, best[1], best[2], latents)


class _Bench:
    """Head inputs of clean and stamped images of both splits."""

    def __init__(self, studied: StudiedModel, data: PlantedShortcut) -> None:
        head = linear_head(studied)
        if head is None:
            raise BadConfig("ShortcutCheck needs a model whose final layer is a torch.nn.Linear.")
        self._name, self._target = str(studied.head_name), data.target
        self.head = {f"{self._name}.{n}": t.detach().cpu() for n, t in head.named_parameters()}
        self._inputs: dict[tuple[str, str], HeadInputs] = {}
        for split in ("train", "val"):
            sets = {"clean": data.source_dataset(split), "stamped": data.stamped_dataset(split)}
            for kind, images in sets.items():
                self._inputs[split, kind] = _inputs(studied, images, data)

    def figures(self, split: str, replaced: Mapping[str, Tensor]) -> ShortcutFigures:
        """The figures of one head on one split."""
        tensors = {**self.head, **replaced}
        weight, bias = (tensors.get(f"{self._name}.{n}") for n in ("weight", "bias"))
        clean, stamped = (self._inputs[split, kind] for kind in ("clean", "stamped"))
        logits = [torch.nn.functional.linear(h.x, weight, bias) for h in (clean, stamped)]  # type: ignore[arg-type]
        return shortcut_figures(logits[0], clean.label, logits[1], stamped.label, self._target)

    def row(
        self, name: str, alpha: float | None, replaced: Mapping[str, Tensor], latents: str = ""
    ) -> dict[str, Any]:
        """One line of the table, held out."""
        row: dict[str, Any] = {"edit": name, "alpha": alpha, "latents": latents}
        for key, value in vars(self.figures("val", replaced)).items():
            row |= {key: value.share, f"{key}_low": value.low, f"{key}_high": value.high}
        return row


def _inputs(studied: StudiedModel, images: Any, data: PlantedShortcut) -> HeadInputs:
    from torch.utils.data import DataLoader

    from salve_lm.activations.hooks import run_to
    from salve_lm.activations.sites import Site

    site = {"head": Site(str(studied.head_name), "input", None)}
    xs, labels = [], []
    for x, label in DataLoader(images, batch_size=data.batch_size, num_workers=data.num_workers):
        xs.append(run_to(studied.model, site, x.to(studied.device))["head"].cpu())
        labels.append(label)
    return HeadInputs(torch.cat(xs), torch.cat(labels))


def _print(rows: list[dict[str, Any]], target: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Planted shortcut to {target!r}, held out, in %", title_justify="left")
    columns = ("stamped_called", "clean_called", "clean_accuracy", "clean_recall")
    for column in ("edit", "alpha", *columns):
        table.add_column(column.replace("_", " "), justify="left" if column == "edit" else "right")
    for row in rows:
        alpha = "" if row["alpha"] is None else f"{row['alpha']:g}"
        table.add_row(row["edit"], alpha, *(f"{100 * row[c]:.1f}" for c in columns))
    Console().print(table)


def _print_localisation(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Grad-FAM against the patch ({100 * rows[0]['patch_share']:.1f} % of the image), "
        f"{rows[0]['images']} held-out stamped images, in %",
        title_justify="left",
    )
    for column in ("map", "latent", "pointing game", "IoU", "IoU above 20 %"):
        table.add_column(column, justify="left" if column == "map" else "right")
    for row in rows:
        latent = "" if row["latent"] is None else str(row["latent"])
        shown = (f"{100 * row[c]:.1f}" for c in ("pointing", "iou", "iou_cam"))
        table.add_row(row["map"], latent, *shown)
    Console().print(table)
