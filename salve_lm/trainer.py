"""The Lightning Trainer with this project's own subcommands.

Each method is what `python -m salve_lm NAME` runs; its arguments are the command's options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from salve_lm.edits.spec import EditSpec

if TYPE_CHECKING:
    from salve_lm.features import FeatureTable


class SalveTrainer(Trainer):
    """Lightning's Trainer plus `discover`, `edit`, `sweep` and `report`."""

    def discover(
        self,
        datamodule: LightningDataModule,
        sae: str,
        out: str,
        split: Literal["train", "val", "test"] = "train",
        top_samples: int = 16,
    ) -> FeatureTable | None:
        """Find the features of each class and write them as tables.

        Args:
            datamodule: The activations, a `salve_lm.activations.ActivationData`.
            sae: Folder of the trained SAE.
            out: Folder to write the tables to; must not exist.
            split: Split whose samples are used; choose features on training data.
            top_samples: Samples listed for each latent, the most strongly activating ones.

        Returns:
            The table, on rank zero; None on the others.
        """
        from salve_lm.commands.discover import discover

        return discover(self, datamodule, sae, out, split, top_samples)

    def sweep(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        edits: list[EditSpec],
        out: str,
        sae: str | None = None,
        features: str | None = None,
        classes: list[str] | None = None,
        alphas: list[float] | None = None,
        target_at_most: float = 0.0,
        others_drop: float = 0.01,
        margin: float = 1.5,
        headline: list[str] | None = None,
    ) -> None:
        """Sweep the strength of edits, choose it on training data, measure it held out.

        Args:
            model: The classifier.
            datamodule: Its images.
            edits: Edits to compare. One without `target_class` is repeated for every class, and a
                bare `dominant` or `selective` feature is then that class's own. Edits that share a
                `name` are variants, of which the training data choose one.
            out: Folder to write the curves and the chosen edits to; must not exist.
            sae: SAE folder for the edits that name none.
            features: Feature-table folder for the edits that name none.
            classes: Classes to edit, by name; all of them when absent.
            alphas: Strengths to try for the multiplicative edits; each kind of edit has a default
                grid of its own.
            target_at_most: Target accuracy on the training split that counts as suppressed.
            others_drop: How far the accuracy of the other classes may fall on the training split.
            margin: How far beyond the smallest sufficient strength to go, as a factor, where the
                others allow it; not for edits that take away a share (ablation, erasure), which
                overshoot beyond the whole.
            headline: Names of the edits shown in the closing table and written as ready configs;
                all others are controls. The first edit when absent.
        """
        from salve_lm.commands.sweep import sweep

        sweep(
            self, model, datamodule, edits, out, sae, features, classes, alphas, target_at_most,
            others_drop, margin, headline,
        )  # fmt: skip

    def edit(
        self,
        model: LightningModule,
        edits: list[EditSpec],
        out: str,
        sae: str | None = None,
        features: str | None = None,
        datamodule: LightningDataModule | None = None,
    ) -> None:
        """Write the permanently edited model and its `edit.json` to a new folder.

        Args:
            model: The model to edit; it is left as it is.
            edits: Edits, applied in order.
            out: Folder to write; must not exist.
            sae: SAE folder for the edits that name none.
            features: Feature-table folder for the edits that name none.
            datamodule: Images whose outputs under the written file are compared, bit for bit, with
                those under the live edit; without it the tensors alone are.
        """
        from salve_lm.commands.edit import edit

        edit(self, model, edits, out, sae, features, datamodule)

    def report(self, run: str) -> None:
        """Collect a finished run folder into one table and `summary.json`.

        Args:
            run: The run folder.
        """
        from salve_lm.report.summary import report

        report(run)
