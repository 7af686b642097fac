"""One autoencoder of a group: `SAETraining`, with what it shares borrowed from the group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from salve_lm.modules.sae import SAETraining
from salve_lm.modules.sae_optimizer import Trained
from salve_lm.modules.sae_sweep import Member


class SiteData(NamedTuple):
    """What a member sees of the data module: one site of it.

    Attributes:
        d_in: width of the activations.
        provenance: split -> what they are made from.
        metadata: of the saved autoencoder.
    """

    d_in: int
    provenance: Callable[[str], Mapping[str, str]]
    metadata: Callable[[], Mapping[str, Any]]


class SAEMember(SAETraining):
    """Trains as `SAETraining` does, on its own part of a shared batch.

    Attributes:
        member: its name, site and arguments.
        group: the module that Lightning trains; in a tuple, so that it is no child of its child.
        data: its site of the data module, or None where there is none.
    """

    member: Member
    group: tuple[Any]
    data: SiteData | None = None

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log under the member's own name, through the module that Lightning knows."""
        kwargs["prog_bar"] = False
        self.group[0].log(f"{self.member.name}/{name}", value, *args, **kwargs)

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The group's optimiser; it holds this member's parameters among others."""
        return self.group[0].optimizers(use_pl_optimizer)

    @property
    def settings(self) -> Any:
        """Its hyper-parameters."""
        return self._hp

    def setup(self, stage: str) -> None:
        """What `SAETraining` checks here, the group checks for all members together."""
        if stage == "fit":
            self._resumed = self._saved = False

    def prepare_fit(self) -> None:
        """`on_fit_start` without measuring the input scaling, which the group does for all."""
        self._prepare_fit()

    def trained(self) -> Trained:
        """What the group's optimiser must know of it."""
        return self._trained()

    def take_evaluation(self) -> None:
        """End the evaluation under way without logging it; it was of the present weights."""
        if self._evaluation is not None:
            self._measured = self.global_step, self._end_evaluation()

    def has_metrics(self) -> bool:
        """Whether the last evaluation was of the present weights."""
        return self._measured is not None and self._measured[0] == self.global_step

    def add_metrics(self, values: Mapping[str, float]) -> None:
        """Save these beside the last evaluation's."""
        if self._measured is not None:
            self._measured = self._measured[0], {**self._measured[1], **values}

    def needs_saving(self) -> bool:
        """Whether the folder is still to be written."""
        return self._hp.out is not None and not self._dry and not self._saved

    def _datamodule(self) -> Any:
        return self.data


def build_member(member: Member, out: str | None, d_in: int | None, group: Any) -> SAEMember:
    """A member of `group`.

    A function of its own: made in a method of another module, it would take that module's
    arguments for hyper-parameters of its own.
    """
    built = SAEMember(**member.arguments, out=out, d_in=d_in)
    built.member, built.group = member, (group,)
    return built
