"""The op that adds a task vector, read from disk as it is applied, to one tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from salve_lm.edits.ops import Op
from salve_lm.errors import StaleStore, UnsupportedEdit
from salve_lm.task_vectors.delta import Delta
from salve_lm.task_vectors.sources import TaskVectorSource
from salve_lm.task_vectors.variants import Variant, variant_from_dict
from salve_lm.task_vectors.weights import GivenWeights, StoredTensors, Weights

if TYPE_CHECKING:
    from salve_lm.edits.context import EditContext


@dataclass(frozen=True, eq=False, kw_only=True)
class AddTaskVector(Op):
    """theta' = theta + alpha * variant(tau) for the tensor MODULE.key.

    Nothing is held but open files: rows of tau are read, block by block, when the op is applied.

    Attributes:
        key: the tensor's name in its module.
        source: the task vector.
        variant: what of it is added.
        delta: the change itself, once `bound` to the unedited weights.
    """

    key: str
    source: TaskVectorSource
    variant: Variant
    delta: Delta | None = None

    @property
    def name(self) -> str:
        """Full name of the tensor."""
        return f"{self.module}.{self.key}"

    @property
    def touches(self) -> tuple[str, ...]:
        """The one tensor."""
        return (self.key,)

    def bound(self, originals: Mapping[str, Tensor], before: Sequence[Op] = ()) -> AddTaskVector:
        """See `Op.bound`. `originals` are the base where the source has none of its own."""
        if isinstance(originals, StoredTensors):
            return self.bound_to(originals.weights)
        return self.bound_to(GivenWeights(originals))

    def bound_to(self, base: Weights) -> AddTaskVector:
        """The same, with the unedited weights in memory or on disk; `delta` is then set."""
        source = self.source.with_base(base)
        delta = self.variant.delta(source, self.name, self.alpha, base)
        return dataclasses.replace(self, source=source, delta=delta)

    def apply_(self, block: Mapping[str, Tensor], start: int, stop: int) -> None:
        """See `Op.apply_`."""
        if self.delta is None:
            raise UnsupportedEdit(f"The task vector of {self.name!r} is not bound to any weights.")
        target = block[self.key]
        by_columns = target.ndim == 2 and self.output_dim == 1
        rows = (self.delta.columns if by_columns else self.delta.rows)(start, stop)
        target.add_(rows.to(target.device))

    def to_dict(self) -> dict[str, Any]:
        """As plain data: paths and hashes in place of values."""
        return {
            "module": self.module,
            "output_dim": self.output_dim,
            "alpha": self.alpha,
            "key": self.key,
            "source": self.source.to_dict(),
            "sha256": self.source.sha256(self.name),
            "variant": self.variant.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], context: EditContext) -> AddTaskVector:
        """Open again what `to_dict` refers to.

        Raises:
            StaleStore: the fine-tuned (or base) tensor has other values than it had.
            SalveError: its files are missing or damaged.
        """
        values = dict(data)
        recorded = values.pop("sha256")
        values["source"] = context.task_vector(**values["source"])
        values["variant"] = variant_from_dict(values["variant"], context)
        op = cls(**values)
        for kind, sha256 in op.source.sha256(op.name).items():
            if recorded.get(kind) != sha256:
                raise StaleStore(
                    f"{op.name!r} of the {kind} weights of {op.source.finetuned} is not what this "
                    "edit was made from. Give the files it was made from, or make the edit again."
                )
        return op
