"""What `SAEGroupTraining` does beside learning: evaluation, checkpoints, and the saved folders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from salve_lm.activations.batch import ActivationBatch, SitesBatch
from salve_lm.errors import BadConfig
from salve_lm.modules.sae_member import SAEMember

_STATE = "sae_group"
Batch = ActivationBatch | SitesBatch


class SAEGroup(LightningModule, ABC):
    """Autoencoders that are validated, checkpointed and saved together."""

    members: nn.ModuleList

    # ------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self) -> None:
        """Validate what would be saved, not the form that is trained."""
        for member in self._each():
            member.on_validation_epoch_start()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics; they pool all ranks at the end."""
        for member in self._each():
            member.validation_step(at_site(batch, member.member.site), batch_idx)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log NAME/val/explained_variance, l0 and dead_fraction."""
        for member in self._each():
            member.on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        """Log NAME/test/explained_variance, l0 and dead_fraction."""
        for member in self._each():
            member.on_test_epoch_end()

    # ------------------------------------------------- checkpoints, and saving

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters of every member; refuse to store a state with NaN in it."""
        states: dict[str, dict[str, Any]] = {}
        for member in self._each():
            states[member.member.name] = {}
            member.on_save_checkpoint(states[member.member.name])
        checkpoint[_STATE] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters back.

        Raises:
            BadConfig: the checkpoint is of other autoencoders.
        """
        states = checkpoint.get(_STATE)
        if states is None:
            raise BadConfig(
                "This checkpoint is not of SAEGroupTraining. Name one that its training wrote."
            )
        self._build()
        names = [member.member.name for member in self._each()]
        if list(states) != names:
            raise BadConfig(
                f"The checkpoint is of the members {', '.join(states)}, and now they are "
                f"{', '.join(names)}. Restore these settings, or start a new run without a "
                "checkpoint."
            )
        for member in self._each():
            member.on_load_checkpoint(states[member.member.name])

    def on_train_end(self) -> None:
        """Save the autoencoders."""
        self._save()

    def on_fit_end(self) -> None:
        """Save them here where `on_train_end` never came: a run resumed after its last step."""
        self._save()

    def _save(self) -> None:
        unsaved = [member for member in self._each() if member.needs_saving()]
        if not unsaved:
            return
        self._measure([member for member in unsaved if not member.has_metrics()])
        if self._hp.loss_recovered_windows:
            self._measure_losses(unsaved)
        for member in unsaved:
            member.on_train_end()

    def _measure(self, members: list[SAEMember]) -> None:
        """Metrics of `members` on the validation split, in one pass."""
        data = self._datamodule()
        given = data is not None and is_overridden("val_dataloader", data)
        loader = data.val_dataloader() if given else []
        if not members or isinstance(loader, list):
            return
        for member in members:
            member.on_validation_epoch_start()
        for batch in self._moved(loader):
            for member in members:
                member.validation_step(at_site(batch, member.member.site), 0)
        for member in members:
            member.take_evaluation()

    def _measure_losses(self, members: list[SAEMember]) -> None:
        from salve_lm.modules.loss_recovered import loss_recovered

        saes = {m.member.name: (m.member.site, m.inference_sae()) for m in members}
        data, windows = self._datamodule(), self._hp.loss_recovered_windows
        losses = loss_recovered(data, saes, "val", windows, self.device)
        logged: dict[str, float] = {}
        for member in members:
            values = losses[member.member.name]
            member.add_metrics(values)
            logged |= {f"{member.member.name}/val/{name}": v for name, v in values.items()}
        for logger in self.trainer.loggers:
            # training has ended, where Lightning takes no more values by `log`
            logger.log_metrics(logged, self.global_step)

    # ------------------------------------------------------------------ parts

    @property
    def _hp(self) -> Any:
        return self.hparams

    def _each(self) -> list[SAEMember]:
        return [m for m in self.members if isinstance(m, SAEMember)]

    def _moved(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        for batch in loader:
            yield self.trainer.strategy.batch_to_device(batch, self.device)

    def _datamodule(self) -> Any:
        return getattr(self._trainer, "datamodule", None)

    @abstractmethod
    def _build(self) -> None:
        """Make the members, once the sites are known."""


def at_site(batch: Batch, site: str) -> ActivationBatch:
    """The part of `batch` of one site."""
    return batch.at(site) if isinstance(batch, SitesBatch) else batch
