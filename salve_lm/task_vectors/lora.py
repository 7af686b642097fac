"""LoRA adapters as task vectors: tau = s B A, row by row, without a merged copy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from salve_lm.errors import BadConfig, ShapeMismatch
from salve_lm.task_vectors.sources import TaskVectorSource
from salve_lm.task_vectors.weights import Weights


@dataclass(frozen=True)
class LowRank:
    """One pair of matrices.

    Attributes:
        a: [r, d_in].
        b: [d_out, r].
        scale: s.
        transposed: the model stores the weight inputs first, or as one row a token (embeddings).
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight as it is stored."""
        d_out, d_in = self.b.shape[0], self.a.shape[1]
        return (d_in, d_out) if self.transposed else (d_out, d_in)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of s B A as the weight is stored, float32."""
        if self.transposed:
            return (self.a[:, start:stop].T @ self.b.T).mul_(self.scale)
        return (self.b[start:stop] @ self.a).mul_(self.scale)


@dataclass(frozen=True, eq=False, kw_only=True)
class LoraAdapter(TaskVectorSource):
    """The change that a LoRA adapter stands for: s B A, plus tensors that it replaces.

    Attributes:
        pairs: name of the weight in memory -> its matrices.
        biases: name of the bias in memory -> what is added to it (`lora_bias`).
        replaced: name in memory -> trained values (`modules_to_save`, trained biases), whose tau
            is their difference from the base.
        model_type: of the model whose names these are.
        base_name: what the adapter says its base is.
        other_base: accept another one.
    """

    pairs: Mapping[str, LowRank]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    model_type: str | None = None
    base_name: str | None = None
    other_base: bool = False

    @property
    def names(self) -> Collection[str]:
        """See `TaskVectorSource.names`."""
        return [*self.pairs, *self.biases, *self.replaced]

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TaskVectorSource.shape`."""
        if name in self.pairs:
            return self.pairs[name].shape
        return tuple(self._vector(name).shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `TaskVectorSource.rows`."""
        if name in self.pairs:
            return self.pairs[name].rows(start, stop)
        rows = self._vector(name)[start:stop].float()
        if name in self.biases:
            return rows.clone()
        return rows - self._base_rows(name, start, stop)

    def check(self, base: Weights) -> None:
        """See `TaskVectorSource.check`: names, shapes, and the name of the base."""
        absent = [n for n in self.names if n not in base]
        if absent:
            raise BadConfig(
                f"The adapter {self.finetuned} changes {len(absent)} tensors that {base.where} "
                f"does not have ({', '.join(absent[:3])}): it belongs to another base"
                f"{f', {self.base_name}' if self.base_name else ''}. Give an adapter for this one."
            )
        wrong = [n for n in self.names if self.shape(n) != base.shape(n)]
        if wrong:
            some = "; ".join(
                f"{n} {list(self.shape(n))} against {list(base.shape(n))}" for n in wrong[:4]
            )
            raise ShapeMismatch(
                f"The adapter {self.finetuned} does not fit {base.where}: {some}. It was trained "
                f"on {self.base_name or 'another base'}; give an adapter for this one."
            )
        theirs, ours = self.base_name, getattr(base.config, "_name_or_path", "")
        if theirs and ours and _last(theirs) != _last(ours) and not self.other_base:
            raise BadConfig(
                f"The adapter {self.finetuned} was trained on {theirs!r}, the model to edit is "
                f"{ours!r}. Names and shapes fit: set `other_base: true` if they are the same, or "
                "if another base is meant."
            )

    def sha256(self, name: str) -> dict[str, str]:
        """See `TaskVectorSource.sha256`."""
        from salve_lm.hashing import hash_plain, hash_tensors

        if name not in self.pairs:
            return {"finetuned": hash_tensors({name: self._vector(name)})}
        pair = self.pairs[name]
        scale = {"scale": pair.scale, "transposed": pair.transposed}
        return {"finetuned": hash_plain([hash_tensors({"a": pair.a, "b": pair.b}), scale])}

    def to_dict(self) -> dict[str, Any]:
        """See `TaskVectorSource.to_dict`."""
        return {**super().to_dict(), "model_type": self.model_type}

    def _vector(self, name: str) -> Tensor:
        found = self.replaced.get(name, self.biases.get(name))
        if found is None:
            raise BadConfig(f"The adapter {self.finetuned} does not change {name!r}.")
        return found


def _last(name: str) -> str:
    """The last part of a path or public name."""
    return name.rstrip("/").rpartition("/")[2].lower()
