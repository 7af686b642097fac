"""The life cycle shared by callbacks that look at the final layer during an evaluation."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from salve_lm.callbacks.head_samples import HeadCapture, HeadSamples


class HeadCallback(Callback):
    """Collects what the final layer reads in validation and test, then calls `report`."""

    def __init__(self) -> None:
        self._capture: HeadCapture | None = None

    @abstractmethod
    def report(self, trainer: Trainer, pl_module: LightningModule, samples: HeadSamples) -> None:
        """Use the samples of a whole evaluation; called on every rank with the same ones."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start collecting, unless this is the sanity check."""
        if not trainer.sanity_checking:
            self._start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch."""
        if self._capture is not None:
            self._capture.take(batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report."""
        self._finish(trainer, pl_module, trainer.val_dataloaders)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start collecting."""
        self._start(trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch."""
        if self._capture is not None:
            self._capture.take(batch, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report."""
        self._finish(trainer, pl_module, trainer.test_dataloaders)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the hooks."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks."""
        self._close()

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
        self._capture = HeadCapture(trainer, pl_module, type(self).__name__)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, loaders: Any) -> None:
        if self._capture is None:
            return
        capture, self._capture = self._capture, None
        self.report(trainer, pl_module, capture.gather(loaders))

    def _close(self) -> None:
        if self._capture is not None:
            self._capture.close()
            self._capture = None
