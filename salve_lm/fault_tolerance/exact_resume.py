"""Mends the progress that Lightning stores, where resuming from it would not be exact.

Lightning (seen in 2.6.6) resumes exactly from the midst of an epoch, but not from its end:

- Saved in `on_train_batch_end` of an epoch's last batch (`ModelCheckpoint(every_n_train_steps)`),
  the next epoch is trained without being counted as begun. A checkpoint taken in *that* epoch looks
  finished, and a second resume starts the epoch again: batches are trained twice.
- Saved in `on_train_epoch_end`, with `max_steps` set, an epoch without batches is counted; without
  validation data, one batch is even trained in it and the rest of its epoch is lost.
- Saved in the midst of a step (`save_on_exception`), the batch of that step is trained again, but
  the loader has handed it out and would go on with the next.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from salve_lm.fault_tolerance.preemption import StopOnSignal


def exact_resume() -> list[Callback]:
    """What a module returns from `configure_callbacks` to be stopped and resumed exactly."""
    return [ExactResume(), StopOnSignal()]


class ExactResume(Callback):
    """Makes `Trainer.fit(ckpt_path=...)` go on with the batch after the last one of the checkpoint.

    The loader must do its part: store its position in the checkpoint, as `ActivationData`'s does.
    """

    def __init__(self) -> None:
        self._resumed = False

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Settle the progress before Lightning's loops read it."""
        if trainer.state.fn == TrainerFn.FITTING and "fit_loop" in checkpoint.get("loops", {}):
            settle_progress(checkpoint["loops"]["fit_loop"])
            self._resumed = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the step under which loggers log: some ways of resuming count it one too far."""
        if self._resumed and pl_module.automatic_optimization:
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        self._resumed = False


def settle_progress(fit_loop: dict[str, Any]) -> None:
    """Rewrite, in place, progress that would not be resumed exactly.

    What was saved at the end of an epoch becomes progress between two epochs; a batch handed out
    and not trained on is given back to the loader. Progress from elsewhere in an epoch stays as it
    is, and so does that from the validation behind its last batch: Lightning resumes both exactly.

    Args:
        fit_loop: `checkpoint["loops"]["fit_loop"]`.
    """
    epoch, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    in_hand = batches["current"]["ready"] - batches["current"]["processed"]
    if in_hand:
        for loader in fit_loop["state_dict"].get("combined_loader", []):
            if "position" in loader:
                loader["position"] -= in_hand
        for count in (batches["total"], batches["current"]):
            count.update(dict.fromkeys(count, count["processed"]))
        batches["is_last_batch"] = False
        return
    last_batch_ends = batches["current"]["completed"] < batches["current"]["processed"]
    epoch_ends = epoch["current"]["processed"] == epoch["current"]["started"]
    if not batches["is_last_batch"] or not (last_batch_ends or epoch_ends):
        return
    for count in (epoch["total"], epoch["current"], batches["total"]):
        count.update(dict.fromkeys(count, count["ready"]))
    for name, progress in fit_loop.items():
        if name.startswith("epoch_loop.") and name.endswith("_progress"):
            _reset_current(progress)
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]["total"]
    validation.update(dict.fromkeys(validation, 0))
    batches["is_last_batch"] = False


def _reset_current(progress: dict[str, Any]) -> None:
    for name, value in progress.items():
        if name == "current":
            value.update(dict.fromkeys(value, 0))
        elif isinstance(value, dict):
            _reset_current(value)
