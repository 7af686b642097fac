"""Training of many autoencoders at once, on activations that are made in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from salve_lm.activations.batch import ActivationBatch, SitesBatch
from salve_lm.errors import BadConfig
from salve_lm.exact_resume import ExactResume
from salve_lm.modules.sae import SAETraining
from salve_lm.modules.sae_member import SAEMember, SiteData, build_member
from salve_lm.modules.sae_sweep import members_of

if TYPE_CHECKING:
    # SAELens takes seconds to import: everything of salve_lm.sae is imported where it is used
    from salve_lm.sae.normalize import InputNormalizer

_STATE = "sae_group"
Batch = ActivationBatch | SitesBatch


class SAEGroupTraining(LightningModule):
    """Trains autoencoders of several sites, or a sweep at one, and saves each in SAELens' format.

    The data module makes the activations once for all members: `TokenActivationData` has many
    sites, `ActivationData` one. Each member ends as if it had been trained alone with
    `SAETraining` on the same batches; gradients are clipped for each one apart. Only one member's
    latents are in memory at a time.

    Args:
        sites: sites of the data to train on; all of them where not given.
        sweep: argument of SAETraining or option of the architecture -> values to try; one member
            for each combination and site: `{seed: [0, 1, 2], l1_coefficient: [0.5, 1.0]}`.
        members: in place of a sweep, name -> the arguments in which the member differs from those
            that all share, and its `site` where the data have several.
        out: folder that holds a folder for each member when training ends.
        loss_recovered_windows: windows of held-out text on which each member of a language model is
            spliced into it, to see how much of the loss its reconstruction keeps; 0 for none.
        d_in: site -> width of the activations; taken from the data module where not given.
        kwargs: arguments of SAETraining that all members share, but `out` and `d_in`.
    """

    members: nn.ModuleList

    def __init__(
        self,
        sites: list[str] | None = None,
        sweep: dict[str, list[Any]] | None = None,
        members: dict[str, dict[str, Any]] | None = None,
        out: str | None = None,
        loss_recovered_windows: int = 0,
        d_in: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._shared = kwargs
        # a wrong argument is told now, and not when the activations are there
        SAETraining(**kwargs)
        for name in members or {}:
            members_of(["any"], kwargs, None, {name: {**(members or {})[name], "site": "any"}})
        if loss_recovered_windows < 0:
            raise BadConfig("loss_recovered_windows must not be negative.")
        self.members = nn.ModuleList()

    # ---------------------------------------------------------------- set-up

    def setup(self, stage: str) -> None:
        """Build the members, once the sites are known; refuse what would fail after training."""
        self._build()
        for member in self._each():
            member.trainer = self.trainer
            member.setup(stage)

    def configure_callbacks(self) -> list[Callback]:
        """Resume exactly from any checkpoint, also one of the last batch of an epoch."""
        return [ExactResume()]

    def configure_model(self) -> None:
        """Build the autoencoders."""
        self._build()
        for member in self._each():
            member.configure_model()

    def _build(self) -> None:
        if len(self.members):
            return
        hp, data = self._hp, self._datamodule()
        if data is not None:
            known = list(data.sites) if hasattr(data, "sites") else [str(data.site)]
            sites = hp.sites or known
            for site in sites:
                if site not in known:
                    raise BadConfig(
                        f"The data have no site {site!r}, but {', '.join(known)}. Add it to the "
                        "data's sites, or remove it here."
                    )
            hp.sites = list(sites)
        elif not hp.sites or not hp.d_in:
            raise BadConfig("The sites are not known: train with a data module, or give sites.")
        widths = dict(hp.d_in or {})
        for member in members_of(hp.sites, self._shared, hp.sweep, hp.members):
            out = None if hp.out is None else str(Path(hp.out) / member.name)
            built = build_member(member, out, widths.get(member.site), self)
            if data is not None:
                built.data = _site_of(data, member.site)
                widths[member.site] = built.data.d_in
            self.members.append(built)
        # in the hyper-parameters, so that `load_from_checkpoint` needs no data module
        hp.d_in = widths

    def configure_optimizers(self) -> Any:
        """One fused Adam, with a group of parameters and a schedule for each member."""
        trainer, each = self.trainer, self._each()
        mixed = "mixed" in str(trainer.precision)
        optimizer = torch.optim.Adam(
            [
                {
                    "params": list(m.sae.parameters()),
                    "lr": m.settings.lr,
                    "betas": tuple(m.settings.betas),
                }
                for m in each
            ],
            fused=not (mixed and trainer.gradient_clip_val),
        )
        if not any(m.settings.lr_warm_up_steps or m.settings.lr_decay_steps for m in each):
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [m.lr_factor for m in each])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each member by its own gradient norm, not by that of all together."""
        if gradient_clip_val is None or (gradient_clip_algorithm or "norm") != "norm":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for member in self._each():
            nn.utils.clip_grad_norm_(member.sae.parameters(), gradient_clip_val)

    def on_fit_start(self) -> None:
        """Check the output folders; measure input scalings in one pass over the training data."""
        for member in self._each():
            member.prepare_fit()
        self._measure_scalings()

    def _measure_scalings(self) -> None:
        waiting: dict[tuple[Any, ...], list[SAEMember]] = {}
        for member in self._each():
            if member.normalizer is not None and not bool(member.normalizer.ready):
                hp = member.settings
                key = (member.member.site, hp.normalize_input, hp.normalize_batches)
                waiting.setdefault(key, []).append(member)
        if not waiting:
            return
        sums = {key: _normalizer(same[0]).moments() for key, same in waiting.items()}
        most = max(n_batches for _, _, n_batches in waiting)
        for i, batch in enumerate(self._moved(self._datamodule().train_dataloader())):
            if i == most:
                break
            for (site, _, n_batches), moments in sums.items():
                if i < n_batches:
                    moments.add(_at(batch, site).x)
        for key, (first, *others) in waiting.items():
            _normalizer(first).settle(sums[key])
            for other in others:
                _normalizer(other).load_state_dict(_normalizer(first).state_dict())

    # -------------------------------------------------------------- training

    def on_train_start(self) -> None:
        """Refuse schedules that do not fit, now that the number of steps is known."""
        for member in self._each():
            member.on_train_start()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Resample dead latents when due."""
        for member in self._each():
            member.on_train_batch_start(_at(batch, member.member.site), batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of all losses, each weighted as `SAETraining` does."""
        from salve_lm.sae.early_backward import differentiated

        losses = []
        for member in self._each():
            loss = member.training_step(_at(batch, member.member.site), batch_idx)
            losses.append(differentiated(loss, member.sae.parameters()))
        return torch.stack(losses).sum()

    # ------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self) -> None:
        """Validate what would be saved, not the form that is trained."""
        for member in self._each():
            member.on_validation_epoch_start()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics; they pool all ranks at the end."""
        for member in self._each():
            member.validation_step(_at(batch, member.member.site), batch_idx)

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
                member.validation_step(_at(batch, member.member.site), 0)
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


def _at(batch: Batch, site: str) -> ActivationBatch:
    return batch.at(site) if isinstance(batch, SitesBatch) else batch


def _normalizer(member: SAEMember) -> InputNormalizer:
    if member.normalizer is None:
        raise RuntimeError(f"Member {member.member.name!r} scales nothing.")
    return member.normalizer


def _site_of(data: Any, site: str) -> SiteData:
    if hasattr(data, "d_in_of"):
        return SiteData(
            data.d_in_of(site),
            lambda split: data.provenance_of(site, split),
            lambda: data.metadata_of(site),
        )

    def provenance(split: str) -> Mapping[str, str]:
        describe = getattr(data, "provenance", None)
        return {} if describe is None else dict(describe(split))

    return SiteData(data.d_in, provenance, dict)
