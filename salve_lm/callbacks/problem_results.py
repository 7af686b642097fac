"""Results of every problem on disk, after each validation or test of a language model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from salve_lm.atomic import check_writable_target
from salve_lm.callbacks.steering import ActivationSteering
from salve_lm.callbacks.weight_editing import WeightEditing, as_studied
from salve_lm.edits.plan import TensorChange
from salve_lm.edits.spec import spec_to_dict
from salve_lm.errors import BadConfig
from salve_lm.hashing import hash_tensors
from salve_lm.tasks.results import write_results

logger = logging.getLogger(__name__)


class ProblemResults(Callback):
    """Writes one row a problem, so that any two runs can be compared later (`compare`).

    `validate` and `test` write the folder `out`; an evaluation during `fit` writes
    `OUT/step-STEP`. Each holds one parquet file a task, and `results.json` with the model's source
    and hash, the edits (and steering) that were on, the tasks' options, summaries and versions.
    Nothing is overwritten.

    Args:
        out: New folder for the results.
        hash_weights: Record a SHA-256 of the model's unedited weights. It reads them all once, and
            so takes some seconds for billions of them.
    """

    def __init__(self, out: str, hash_weights: bool = True) -> None:
        super().__init__()
        self.out, self.hash_weights = out, hash_weights

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a folder that exists, before hours are spent."""
        if not isinstance(getattr(pl_module, "results", None), dict):
            raise BadConfig(
                "ProblemResults needs a model that keeps the rows of tasks in `results`: use "
                f"salve_lm.modules.LanguageModel, not {type(pl_module).__name__}."
            )
        if trainer.is_global_zero and stage in ("validate", "test"):
            check_writable_target(self.out)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        if not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning calls this on every rank; the rows of all ranks are gathered on each
        if not trainer.is_global_zero:
            return
        results: Any = pl_module.results
        tasks = [t for t in trainer.datamodule.tasks if t.name in results]  # type: ignore[attr-defined]
        if not tasks:
            raise BadConfig("ProblemResults has nothing to write: LanguageData has no `tasks`.")
        editing = next(
            (c for c in trainer.callbacks if isinstance(c, WeightEditing)),  # type: ignore[attr-defined]
            None,
        )
        edits = [] if editing is None else [spec_to_dict(plan.spec) for plan in editing.plans]
        steering = [c for c in trainer.callbacks if isinstance(c, ActivationSteering)]  # type: ignore[attr-defined]
        edits += [spec_to_dict(c.spec) for c in steering]
        folder = Path(self.out)
        if trainer.state.fn == TrainerFn.FITTING:
            folder = folder / f"step-{trainer.global_step}"
        write_results(
            folder, tasks, results, model=self._describe(pl_module, editing), edits=edits,
            changes={} if editing is None else {n: _plain(c) for n, c in editing.changes.items()},
        )  # fmt: skip
        logger.info("Results of %s in %s", ", ".join(t.name for t in tasks), folder)

    def _describe(
        self, pl_module: LightningModule, editing: WeightEditing | None
    ) -> Mapping[str, Any]:
        """What identifies the model, whatever edits are on at this moment."""
        model = as_studied(pl_module, type(self).__name__).model
        parameter = next(model.parameters())
        describe = getattr(pl_module, "describe", dict)
        described: dict[str, Any] = {
            **describe(),
            "class": type(model).__name__,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in model.parameters()),
            "device": parameter.device.type,
        }
        if self.hash_weights:
            # the order of callbacks decides whether the edits are still on
            with contextlib.nullcontext() if editing is None else editing.suspended():
                described["weights_sha256"] = hash_tensors(model.state_dict())
        return described


def _plain(change: TensorChange) -> dict[str, float | None]:
    """Energies are squared norms; `relative_change` is None for a tensor that was zero."""
    return {
        "requested": change.requested,
        "applied": change.applied,
        "cosine": change.cosine,
        "relative_change": change.relative if change.norm_before else None,
    }
