"""What `SAETraining` does beside learning: evaluation, checkpoints, and the saved folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from salve_lm import __version__
from salve_lm.activations.batch import ActivationBatch
from salve_lm.errors import BadConfig, NotFinite, OutputExists
from salve_lm.hashing import hash_plain
from salve_lm.modules.sae_built import BuiltSAE

if TYPE_CHECKING:
    # SAELens takes seconds to import: everything of salve_lm.sae is imported where it is used
    from sae_lens import SAE

    from salve_lm.sae.evaluate import Evaluation

_log = logging.getLogger(__name__)
_STATE = "sae_training"


class SAEModule(BuiltSAE):
    """An autoencoder that can be validated, checkpointed and saved in SAELens' format."""

    def __init__(self) -> None:
        super().__init__()
        self._samples_seen = 0
        self._resampled_at = 0
        self._evaluation: Evaluation | None = None
        self._measured: tuple[int, dict[str, float]] | None = None
        self._bad: Tensor | None = None
        self._resumed = self._saved = False

    @property
    def _dry(self) -> bool:
        return bool(getattr(self.trainer, "fast_dev_run", False))

    def inference_sae(self) -> SAE[Any]:
        """A copy of the autoencoder as it would be saved now: it takes raw activations."""
        from salve_lm.sae import to_inference

        fold = self._hp.fold_decoder_norm
        return to_inference(self.sae, self.normalizer, fold_decoder_norm=fold)

    def _sae_to_save(self) -> SAE[Any] | None:
        from salve_lm.sae import to_inference_on_first

        fold = self._hp.fold_decoder_norm
        return to_inference_on_first(self.sae, self.normalizer, fold_decoder_norm=fold)

    def _new_evaluation(self) -> Evaluation:
        from salve_lm.sae.evaluate import Evaluation

        return Evaluation(self.inference_sae(), self.plan.fire_threshold)

    def on_validation_epoch_start(self) -> None:
        """Validate what would be saved, not the form that is trained."""
        self._evaluation = self._new_evaluation()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: ActivationBatch, batch_idx: int) -> None:
        """Add a batch to the metrics; they pool all ranks at the end."""
        if self._evaluation is not None:
            self._evaluation.update(batch.x)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log explained variance, L0 and dead fraction of the validation split."""
        values = self._log_evaluation("val")
        if not self.trainer.sanity_checking:
            self._measured = self.global_step, values

    def on_test_epoch_end(self) -> None:
        """Log explained variance, L0 and dead fraction of the test split."""
        self._log_evaluation("test")

    def _log_evaluation(self, split: str) -> dict[str, float]:
        values = self._end_evaluation()
        for name, value in values.items():
            # equal on all ranks already; without sync_dist Lightning warns that it may not be
            self.log(f"{split}/{name}", value, prog_bar=name != "dead_fraction", sync_dist=True)
        return values

    def _end_evaluation(self) -> dict[str, float]:
        evaluation, self._evaluation = self._evaluation, None
        if evaluation is None:
            return {}
        values = evaluation.compute()
        _free(evaluation.sae)
        return values

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters that are no tensors; refuse to store a state with NaN in it."""
        self._raise_if_bad()
        checkpoint[_STATE] = {
            "samples_seen": self._samples_seen,
            "resampled_at": self._resampled_at,
            "identity": self._identity(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters back.

        Raises:
            BadConfig: the checkpoint is of another autoencoder.
        """
        state = checkpoint.get(_STATE)
        if state is None:
            raise BadConfig(
                "This checkpoint is not of SAETraining. Name one that its training wrote."
            )
        # checkpoints of before there was a choice say nothing of it
        theirs, ours = {"dtype": "float32", **state["identity"]}, self._identity()
        differing = [f"{k} (was {theirs.get(k)!r}, is {v!r})" for k, v in ours.items()
                     if theirs.get(k) != v]  # fmt: skip
        if differing:
            raise BadConfig(
                f"The checkpoint is of another autoencoder: {', '.join(differing)}. Restore these "
                "settings, or start a new run without a checkpoint."
            )
        self._samples_seen, self._resampled_at = state["samples_seen"], state["resampled_at"]
        self._resumed = True

    def _raise_if_bad(self) -> None:
        if self._bad is None or not bool(self._bad.any()):
            return
        where = f"training step {self.global_step}"
        if bool(self._bad[0]):
            raise NotFinite(
                "x",
                f"activations, {where}",
                "Harvest them again; half precision overflows on some sites: use float32.",
            )
        raise NotFinite(
            "loss",
            where,
            "Lower lr, set the trainer's gradient_clip_val to 1.0, or scale the activations with "
            "normalize_input: expected_average_only_in.",
        )

    def _identity(self) -> dict[str, Any]:
        names = ("architecture", "d_in", "d_sae", "normalize_input", "seed", "dtype")
        return {name: self.hparams[name] for name in names}

    def _check_out(self) -> None:
        from salve_lm.atomic import check_writable_target
        from salve_lm.sae import read_metadata

        if self._hp.out is None or self._dry:
            return
        out = Path(self._hp.out)
        if not (self._resumed and out.exists()):
            check_writable_target(out)
        elif read_metadata(out).get("salve_lm_run") != self._run_hash():
            # a resumed run may replace what it wrote itself before, and nothing else
            raise OutputExists(out)

    def _run_hash(self) -> str:
        return hash_plain([self._identity(), self._provenance()])

    def _provenance(self) -> dict[str, Any]:
        describe = getattr(self._datamodule(), "provenance", None)
        return dict(describe("train")) if describe is not None else {}

    def _metadata(self) -> dict[str, Any]:
        """Where the autoencoder belongs, in SAELens' words, where the data module knows it."""
        describe = getattr(self._datamodule(), "metadata", None)
        return dict(describe()) if describe is not None else {}

    def on_train_end(self) -> None:
        """Save the autoencoder."""
        self._save()

    def on_fit_end(self) -> None:
        """Save it here where `on_train_end` never came: a run resumed after its last step."""
        self._save()

    def _save(self) -> None:
        if self._hp.out is None or self._dry or self._saved:
            return
        from salve_lm.sae import save_sae
        from salve_lm.sae.evaluate import plain

        self._raise_if_bad()
        values = plain(self._final_metrics())
        # on all ranks: each has a part of a sharded autoencoder
        sae = self._sae_to_save()
        if sae is not None:
            provenance = self._provenance()
            measured = values | {"fire_threshold": self.plan.fire_threshold}
            metadata = {
                **measured,
                "hook_name": provenance.get("site"),
                "activations": provenance,
                "training_steps": self.global_step,
                "training_samples": self._samples_seen,
                "input_scaling": self._hp.normalize_input,
                "seed": self._hp.seed,
                "salve_lm_version": __version__,
                "salve_lm_run": self._run_hash(),
                **self._metadata(),
            }
            save_sae(
                sae,
                self._hp.out,
                metadata=metadata,
                metrics=measured | {"split": "val" if values else None},
                replace=self._resumed,
            )
            _free(sae)
            _log.info("Autoencoder saved to %s.", self._hp.out)
        self._saved = True
        self.trainer.strategy.barrier("the autoencoder is saved")

    def _final_metrics(self) -> dict[str, float]:
        """Those of the last validation, if no step came after it; else measured now."""
        if self._measured is not None and self._measured[0] == self.global_step:
            return self._measured[1]
        datamodule = self._datamodule()
        # Lightning's own `val_dataloader` raises
        given = datamodule is not None and is_overridden("val_dataloader", datamodule)
        loader = datamodule.val_dataloader() if given else None
        if loader is None or (isinstance(loader, list) and not loader):
            _log.warning("No validation data: the autoencoder is saved without its metrics.")
            return {}
        self._evaluation = self._new_evaluation()
        for batch in loader:
            self._evaluation.update(self.trainer.strategy.batch_to_device(batch, self.device).x)
        return self._end_evaluation()


def _free(sae: SAE[Any]) -> None:
    # SAELens' modules refer to themselves: their weights would wait for the garbage collector
    sae.to_empty(device="meta")
