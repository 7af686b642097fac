"""Training of many autoencoders at once, on activations that are made in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from salve_lm.errors import BadConfig, UnsupportedStrategy
from salve_lm.fault_tolerance.exact_resume import exact_resume
from salve_lm.modules.sae import SAETraining
from salve_lm.modules.sae_group_module import Batch, SAEGroup, at_site
from salve_lm.modules.sae_member import SAEMember, SiteData, build_member
from salve_lm.modules.sae_memory import check_memory
from salve_lm.modules.sae_optimizer import configure_adam
from salve_lm.modules.sae_sweep import members_of

if TYPE_CHECKING:
    # SAELens takes seconds to import: everything of salve_lm.sae is imported where it is used
    from salve_lm.sae.normalize import InputNormalizer


class SAEGroupTraining(SAEGroup):
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
        """Build the members, once the sites are known; refuse what would fail later."""
        self._build()
        for member in self._each():
            member.trainer = self.trainer
            member.setup(stage)
        if stage != "fit":
            return
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise UnsupportedStrategy(
                "SAEGroupTraining under ModelParallelStrategy, which is for an autoencoder that "
                "fills several devices: train such ones one by one with SAETraining, or the group "
                "with strategy 'ddp'."
            )
        demands = [member.demand() for member in self._each()]
        check_memory(self.trainer, demands, getattr(self._datamodule(), "batch_size", None))

    def configure_callbacks(self) -> list[Callback]:
        """Stop at SIGTERM with a checkpoint, and resume exactly from any."""
        return exact_resume()

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
        """One Adam, with a group of parameters and a schedule for each member."""
        return configure_adam(self.trainer, [member.trained() for member in self._each()])

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

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step and free the gradients, which Lightning would keep until the next ones."""
        super().optimizer_step(*args, **kwargs)
        self.zero_grad()

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
                    moments.add(at_site(batch, site).x)
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
            member.on_train_batch_start(at_site(batch, member.member.site), batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of all losses, each weighted as `SAETraining` does."""
        from salve_lm.sae.early_backward import differentiated

        losses = []
        for member in self._each():
            loss = member.training_step(at_site(batch, member.member.site), batch_idx)
            losses.append(differentiated(loss, member.sae.parameters()))
        return torch.stack(losses).sum()


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
