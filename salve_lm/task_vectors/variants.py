"""What of a task vector is added: all of it, a projection, or a control."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salve_lm.errors import ShapeMismatch
from salve_lm.language.residual import ResidualRole
from salve_lm.task_vectors.delta import Delta, ProjectedDelta, RandomDirectionDelta, RawDelta
from salve_lm.task_vectors.sources import TaskVectorSource
from salve_lm.task_vectors.subspaces import Subspace, subspace_from_dict
from salve_lm.task_vectors.weights import Weights

if TYPE_CHECKING:
    from salve_lm.edits.context import EditContext


class Variant(ABC):
    """One way to make the change of a tensor from its task vector."""

    @abstractmethod
    def delta(self, source: TaskVectorSource, name: str, alpha: float, base: Weights) -> Delta:
        """The change of the tensor `name`.

        Args:
            source: with its base.
            name: of the tensor, in memory.
            alpha: lambda.
            base: the unedited weights of the model, for the gains of its norms.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """As plain data, what it was made from by reference."""


@dataclass(frozen=True)
class Raw(Variant):
    """tau itself."""

    def delta(self, source: TaskVectorSource, name: str, alpha: float, base: Weights) -> Delta:
        """See `Variant.delta`."""
        return RawDelta(source, name, alpha)

    def to_dict(self) -> dict[str, Any]:
        """See `Variant.to_dict`."""
        return {"kind": "raw"}


@dataclass(frozen=True, eq=False)
class Projected(Variant):
    """tau projected on a subspace of the residual stream, at its own norm or at that of tau.

    Attributes:
        role: how the tensor touches the stream.
        subspace: of the tensor's layer.
        rescale: whether the change gets the norm of tau.
    """

    role: ResidualRole
    subspace: Subspace
    rescale: bool = False

    def delta(
        self, source: TaskVectorSource, name: str, alpha: float, base: Weights
    ) -> ProjectedDelta:
        """See `Variant.delta`.

        Raises:
            ShapeMismatch: the subspace is of another width than the residual stream.
        """
        width = source.shape(name)[self.role.axis]
        if len(self.subspace.basis) != width:
            raise ShapeMismatch(
                f"The subspace has width {len(self.subspace.basis)}, the residual stream at "
                f"{name!r} has {width}. Give the SAE of this model's layer."
            )
        return ProjectedDelta(
            source, name, alpha, self.role, gain_of(self.role, base, width),
            self.subspace.basis, self.rescale,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """See `Variant.to_dict`."""
        return {
            "kind": "projected",
            "role": self.role._asdict(),
            "subspace": self.subspace.origin,
            "rescale": self.rescale,
        }


@dataclass(frozen=True)
class RandomDirection(Variant):
    """Noise with the norm of tau.

    Attributes:
        seed: of the noise; every tensor has its own.
    """

    seed: int

    def delta(self, source: TaskVectorSource, name: str, alpha: float, base: Weights) -> Delta:
        """See `Variant.delta`."""
        return RandomDirectionDelta(source, name, alpha, self.seed)

    def to_dict(self) -> dict[str, Any]:
        """See `Variant.to_dict`."""
        return {"kind": "random_direction", "seed": self.seed}


def gain_of(role: ResidualRole, base: Weights, width: int) -> Tensor:
    """The gain between a tensor and the residual stream, float64 [width]; ones without a norm."""
    if role.norm is None:
        return torch.ones(width, dtype=torch.float64)
    return role.gain(base.read(role.norm))


def variant_from_dict(data: Mapping[str, Any], context: EditContext) -> Variant:
    """Rebuild what `to_dict` wrote; `context` holds the SAEs it refers to.

    Raises:
        KeyError, TypeError: the data are damaged.
        StaleStore: see `subspace_from_dict`.
    """
    kind = data["kind"]
    if kind == "raw":
        return Raw()
    if kind == "random_direction":
        return RandomDirection(data["seed"])
    if kind == "projected":
        subspace = subspace_from_dict(data["subspace"], context)
        return Projected(ResidualRole(**data["role"]), subspace, data["rescale"])
    raise KeyError(kind)
