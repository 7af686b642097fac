"""Ends a training run that is asked to stop, after writing a checkpoint that goes on exactly.

Schedulers send SIGTERM before they take a machine away. Lightning (seen in 2.6.6) then raises an
exception at the end of a batch, but writes no checkpoint by itself; its handler of the signal
exchanges tensors between ranks from wherever each rank happens to be, which can leave them waiting
for each other; and its answer to SLURM's own signal saves in the midst of a step.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

EXIT_STATUS = 128 + signal.SIGTERM
"""With which rank zero ends, so that a job script knows that there is more to do."""

_log = logging.getLogger(__name__)


class StopOnSignal(Checkpoint):
    """Writes a checkpoint and ends the run after SIGTERM, or SLURM's signal to requeue a job.

    The signal is only noted when it arrives, on any rank. At the end of the step under way all
    ranks agree on it, the checkpoint is written where `--ckpt_path last` finds it (the folder of
    the first `ModelCheckpoint`, preferably one with `save_last`), and Lightning ends the run. If a
    validation is under way or due, it is finished first, so that no point of its curve is missing;
    the checkpoint is there before it begins, and is written again behind it.

    It is a `Checkpoint` for its place in the order of callbacks: behind all that count batches.

    Attributes:
        best_model_path: empty; Lightning asks every `Checkpoint`.
    """

    best_model_path = ""

    def __init__(self) -> None:
        self._asked = False
        self._stopping = False
        self._step = 0
        self._before: Any = None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from here on."""
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from here on, where there was no sanity check."""
        self._listen(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the step, to know at the end whether gradients are still being accumulated."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop, if this batch completed a step and any rank was asked to."""
        if trainer.global_step != self._step:
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a validation run to its end."""
        if self._stopping:
            _tell_lightning(trainer, stop=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop, if any rank was asked to."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the process a status of its own."""
        # other ranks end with 0: a launcher takes a child that fails for one that crashed
        if isinstance(exception, SIGTERMException) and trainer.is_global_zero:
            exception.code = EXIT_STATUS

    def _listen(self, trainer: Trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        # in place of Lightning's handlers; it restores the original ones when the run is over
        self._before = trainer._signal_connector._original_handlers.get(signal.SIGTERM)
        signal.signal(signal.SIGTERM, self._note)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.requeue_signal is not None:
            signal.signal(environment.requeue_signal, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True
        if callable(self._before):
            self._before(signum, frame)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        # Lightning heard it, if it came between its own set-up and ours
        asked = self._asked or trainer.received_sigterm
        if not trainer.strategy.reduce_boolean_decision(asked, all=False):
            return
        self._stopping = True
        path = save_last(trainer)
        if path is None:
            _log.warning("Asked to stop, without a ModelCheckpoint to say where to save.")
        elif trainer.is_global_zero:
            _log.warning(
                "Asked to stop: step %d is saved to %s. The same command with --ckpt_path last "
                "goes on from there.",
                trainer.global_step,
                path,
            )
        _tell_lightning(trainer, stop=True)


def save_last(trainer: Trainer) -> str | None:
    """Write a whole checkpoint where `--ckpt_path last` finds it; collective.

    Returns:
        Its path, or None where no `ModelCheckpoint` names a folder.
    """
    found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    folders = [c for c in found if c.dirpath and not c.save_weights_only]
    if not folders or getattr(trainer, "fast_dev_run", False):
        return None
    chosen = next((c for c in folders if c.save_last), folders[0])
    name = f"{chosen.CHECKPOINT_NAME_LAST}{chosen.FILE_EXTENSION}"
    path = chosen.last_model_path or os.path.join(str(chosen.dirpath), name)
    chosen.last_model_path = path
    trainer.save_checkpoint(path)
    return path


def _tell_lightning(trainer: Trainer, stop: bool) -> None:
    # its loops look at this at the end of every batch, validation batch and epoch
    trainer._signal_connector.received_sigterm = stop
