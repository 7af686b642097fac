"""The life cycle shared by callbacks that look at the final layer during an evaluation."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Generic, Protocol, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer

Gathered = TypeVar("Gathered")
GatheredOut = TypeVar("GatheredOut", covariant=True)


class Capture(Protocol[GatheredOut]):
    """Collects something from the batches of an evaluation; see `HeadCapture`."""

    def take(self, batch: Any, dataloader_idx: int = 0) -> None:
        """Take in a batch whose pass has just ended."""

    def gather(self, loaders: Any) -> GatheredOut:
        """What was collected, the same on every rank."""

    def close(self) -> None:
        """Stop collecting."""


class HeadCallback(Callback, Generic[Gathered]):
    """Collects what `capture` makes of validation and test batches, then calls `report`."""

    def __init__(self) -> None:
        self._capture: Capture[Gathered] | None = None

    @abstractmethod
    def capture(self, trainer: Trainer, pl_module: LightningModule) -> Capture[Gathered]:
        """Begin an evaluation."""

    @abstractmethod
    def report(self, trainer: Trainer, pl_module: LightningModule, samples: Gathered) -> None:
        """Use what a whole evaluation gave; called on every rank with the same."""

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
        self._capture = self.capture(trainer, pl_module)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, loaders: Any) -> None:
        if self._capture is None:
            return
        capture, self._capture = self._capture, None
        self.report(trainer, pl_module, capture.gather(loaders))

    def _close(self) -> None:
        if self._capture is not None:
            self._capture.close()
            self._capture = None
