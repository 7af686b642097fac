"""The Lightning Trainer with this project's own subcommands.

Each method is what `python -m salve_lm NAME` runs; its arguments are the command's options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from salve_lm.commands.injection_variants import Control
from salve_lm.data.corpus import Corpus
from salve_lm.edits.spec import EditSpec
from salve_lm.specificity.bootstrap import Bootstrap
from salve_lm.specificity.scores import LayerScore
from salve_lm.specificity.selection import LayerChoice

if TYPE_CHECKING:
    from salve_lm.features import FeatureTable
    from salve_lm.specificity.selection_file import LayerSelection


class SalveTrainer(Trainer):
    """Lightning's Trainer plus this project's own commands."""

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

    def robustness(
        self,
        datamodule: LightningDataModule,
        edits: list[EditSpec],
        out: str,
        model: LightningModule | None = None,
        saes: str | None = None,
        classes: list[str] | None = None,
        alphas: list[float] | None = None,
        target_at_most: float = 0.0,
        others_drop: float = 0.01,
        margin: float = 1.5,
        controls: list[Literal["random_latent", "permuted"]] | None = None,
        draws: int = 3,
        removed_at_most: float = 0.05,
        seed: int = 0,
        ckpt_path: str | None = None,
    ) -> None:
        """Train many SAEs on one pass of activations, and see whether an edit does the same in all.

        SAEs that differ in their seeds alone form a setting. All of a setting edit with one
        strength, chosen on training data from the mean of their curves; what the edits do is
        measured held out, and given as mean, standard deviation and range over the seeds, beside
        controls at the same strength. With several widths or sparsities the table of settings
        compares those.

        Args:
            datamodule: The activations, a `salve_lm.activations.ActivationData` with the classifier
                as its `model` and the images as its `source`.
            edits: Edits to measure, each without a class: it is repeated for every class, and a
                bare `dominant` or `selective` feature is then that class's own in each SAE.
            out: Folder to write tables, plot and words to; must not exist.
            model: A SAEGroupTraining whose sweep is trained first.
            saes: In place of a model, the folder of the SAEs of a finished sweep.
            classes: Classes to edit, by name; all of them when absent.
            alphas: Strengths to try for the multiplicative edits; each kind of edit has a default
                grid of its own.
            target_at_most: Target accuracy on the training split that counts as suppressed.
            others_drop: How far the accuracy of the other classes may fall on the training split.
            margin: How far beyond the smallest sufficient strength to go, as a factor.
            controls: What to measure beside a DecoderGuided edit; both when absent.
            draws: Random latents for each SAE and class.
            removed_at_most: Held-out target accuracy at which a class counts as removed.
            seed: Of the random latents and the shuffling.
            ckpt_path: Checkpoint to go on training from, or `last`.
        """
        from salve_lm.commands.robustness import robustness
        from salve_lm.commands.robustness_effects import Rules

        chosen = ("random_latent", "permuted") if controls is None else tuple(controls)
        rules = Rules(alphas, target_at_most, others_drop, margin, chosen, draws, seed)
        robustness(
            self, datamodule, edits, out, model, saes, classes, rules, removed_at_most, ckpt_path
        )

    def edit(
        self,
        edits: list[EditSpec],
        out: str,
        model: LightningModule | None = None,
        source: str | None = None,
        sae: str | None = None,
        features: str | None = None,
        datamodule: LightningDataModule | None = None,
        dtype: Literal["base", "float32"] = "base",
        check_live: bool = False,
        file_digests: bool = False,
    ) -> None:
        """Write the permanently edited model and its `edit.json` to a new folder.

        A Hugging Face folder (`--source`, or a LanguageModel whose `source` is a folder or a public
        name) becomes a new one. Task vectors are streamed from file to file, so that memory does
        not grow with the size of the model; layers with other edits are held one at a time.

        Args:
            edits: Edits, applied in order.
            out: Folder to write; must not exist.
            model: The model to edit; it is left as it is.
            source: In place of a model, the Hugging Face folder of a language model, which is not
                loaded. For edits that need no values of the weights to say what they do.
            sae: SAE folder for the edits that name none.
            features: Feature-table folder for the edits that name none.
            datamodule: Data whose outputs under the written file are compared, bit for bit, with
                those under the live edit; without it the tensors alone are.
            dtype: Of the changed tensors of a streamed model: that of the base, or `float32`, which
                keeps edits that bfloat16 would round away.
            check_live: Load a streamed model again and compare it, bit for bit, with the live edit.
                Takes memory for two models.
            file_digests: Record the plain SHA-256 of every file of a streamed model too, as hubs
                publish it. Reads everything once more.
        """
        from salve_lm.commands.edit import edit

        edit(
            self, model, edits, out, source, sae, features, datamodule, dtype, check_live,
            file_digests,
        )  # fmt: skip

    def inject(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        edit: EditSpec,
        out: str,
        alphas: list[float] | None = None,
        controls: list[Control] | None = None,
        judge: list[str] | None = None,
        window: int = 2,
        at_most: int = 50,
        seeds: int = 1,
        seed: int = 0,
        resamples: int = 10_000,
    ) -> None:
        """Measure a task vector at several strengths and beside its controls, problem by problem.

        Validates the unedited model and every variant on the data's tasks, compares each variant
        with the unedited model (paired), and says whether the chosen layers beat other layers. A
        run that was stopped goes on where it was when the same command is given again.

        Args:
            model: The base LanguageModel.
            datamodule: LanguageData with the tasks to measure.
            edit: A TaskVectorInjection: the chosen layers at the chosen strength.
            out: Folder to write.
            alphas: Other strengths to try in the chosen layers.
            controls: What to compare with: the fine-tuned model itself, all layers, the least
                specific ones, other subsets of the same size, single layers, all but one, windows,
                the projected vector as it is and rescaled, a random subspace of its rank, a random
                direction of its norm.
            judge: Metrics by which the choice is compared with random layers, such as
                `arithmetic/exact_match`; of losses less is better.
            window: Adjacent layers in a window.
            at_most: Random layer sets at most; where there are no more other subsets of that size,
                all of them are tried.
            seeds: Draws of each random vector.
            seed: Of the draws and of the bootstrap.
            resamples: Of the bootstrap.
        """
        from salve_lm.commands.inject import inject

        inject(
            self, model, datamodule, edit, out, alphas, controls, judge, window, at_most, seeds,
            seed, resamples,
        )  # fmt: skip

    def measure(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        edits: list[EditSpec],
        out: str,
        alphas: dict[str, list[float]] | list[float] | None = None,
        resamples: int = 10_000,
        seed: int = 0,
    ) -> None:
        """Measure edits of a language model: what each changes in one task, and in the others.

        Validates the unedited model and every edit by itself, at every strength, on the data's
        tasks: one of what the edit is about, one of general text, say. Writes `edits.csv` (every
        metric and its change), `compare/` (paired tests against the unedited model), the results
        of every problem, and `measured.json`. A run that was stopped goes on where it was when the
        same command is given again.

        Args:
            model: A LanguageModel.
            datamodule: LanguageData with the tasks to measure.
            edits: Edits, each measured by itself: of any kind, and Steering at a site such as
                `module: resid_post.3`, which shifts the stream as the model runs.
            out: Folder to write.
            alphas: Strengths for all edits, or name of an edit -> strengths; an edit's own where
                none are given.
            resamples: Of the bootstrap.
            seed: Of the bootstrap.
        """
        from salve_lm.commands.measure import measure

        measure(self, model, datamodule, edits, out, alphas, resamples, seed)

    def select_layers(
        self,
        model: LightningModule,
        task: Corpus | list[Corpus],
        reference: Corpus | list[Corpus],
        saes: str,
        out: str,
        layers: list[int] | None = None,
        scores: list[LayerScore] | None = None,
        select: LayerChoice | None = None,
        bootstrap: Bootstrap | None = None,
        finetuned: str | None = None,
        context: int = 256,
        batch_size: int = 8,
        top_latents: int = 32,
        windows: int = 5,
        allow_other_model: bool = False,
    ) -> LayerSelection | None:
        """Score every layer's specificity to a task, choose layers, and write why.

        The model runs once over both corpora, whatever the number of layers.

        Args:
            model: The base LanguageModel.
            task: Documents of the task.
            reference: Documents to compare with; best of the same surface (numbers without the
                task).
            saes: Where the SAEs are: a folder that holds one SAE folder a layer, or a path or
                SAELens `RELEASE:ID` with `{layer}` in it.
            out: Folder to write; must not exist.
            layers: Layers to compare; all that have an SAE when absent.
            scores: Scores to compute; the first one chooses. `MassShare` when absent.
            select: How to choose; layers above the mean layer when absent.
            bootstrap: How to make intervals; 0.95 from 1000 resamples of the documents when absent.
            finetuned: Folder of the fine-tuned model or of its LoRA adapter, for `LatentShift`.
            context: Tokens in a row.
            batch_size: Rows in a global batch, summed over all processes.
            top_latents: Latents listed for each layer.
            windows: Text windows listed for each of them.
            allow_other_model: Accept SAEs that were made from other weights or a model of another
                name.

        Returns:
            The selection, on rank zero; None on the others, and where the rule chose no layer.
        """
        from salve_lm.commands.select_layers import select_layers

        return select_layers(
            self, model, task, reference, saes, out, layers, scores, select, bootstrap, finetuned,
            context, batch_size, top_latents, windows, allow_other_model,
        )  # fmt: skip

    def compare(
        self,
        base: str,
        others: list[str],
        out: str,
        tasks: list[str] | None = None,
        confidence: float = 0.95,
        resamples: int = 10_000,
        seed: int = 0,
    ) -> None:
        """Compare results of the same problems: paired and unpaired tests, intervals, Holm.

        Args:
            base: Folder of results that the others are compared with.
            others: Folders of results to compare with it.
            out: New folder for table, plot and words.
            tasks: Only these tasks; all that every run has by default.
            confidence: Of the intervals; one less this is the level of the tests in the words.
            resamples: Of the bootstrap.
            seed: Of the bootstrap.
        """
        from salve_lm.commands.compare import compare

        compare(base, others, out, tasks, confidence, resamples, seed)

    def report(self, run: str) -> None:
        """Collect a finished run folder into one table and `summary.json`.

        Args:
            run: The run folder.
        """
        from salve_lm.report.summary import report

        report(run)
