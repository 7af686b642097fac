"""Applying edits: original tensors in, replacements out, nothing else touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from salve_lm.edits.layout import outputs_first
from salve_lm.edits.ops import FoldInput, Op, RankOneUpdate, ScaleChannels, ShiftBias
from salve_lm.edits.tensor_change import ChangeSums, TensorChange
from salve_lm.errors import NoEffect, UnsupportedEdit

__all__ = [
    "Applied",
    "FoldInput",
    "NamedOps",
    "Op",
    "RankOneUpdate",
    "ScaleChannels",
    "ShiftBias",
    "TensorChange",
    "apply",
    "apply_named",
]

# Most elements of a working block: few enough to stay in cache, enough for threads to pay off.
BLOCK = 1 << 18
# Least number of blocks to a layer, so that all working memory is less than a copy of the layer.
BLOCKS = 12


class NamedOps(NamedTuple):
    """The ops of one edit under the name its messages use."""

    name: str
    ops: Sequence[Op]


class Applied(NamedTuple):
    """Replacement tensors by name, and how far each moved."""

    tensors: dict[str, Tensor]
    changes: dict[str, TensorChange]


def apply(tensors: Mapping[str, Tensor], plan: Sequence[Op]) -> dict[str, Tensor]:
    """New values of the tensors that the ops of one edit change; see `apply_named`."""
    return apply_named(tensors, [NamedOps("edit", plan)]).tensors


def apply_named(tensors: Mapping[str, Tensor], edits: Sequence[NamedOps]) -> Applied:
    """Apply edits in order, purely.

    Computed in float32 block by block and cast back to each tensor's dtype once, at the end. Beside
    the replacements only a few MiB are allocated.

    Args:
        tensors: the unedited originals by full name (a state dict will do); only those named, and
            for task vectors the norms around them, are read.
        edits: ops per edit. Later edits see what earlier ones left.

    Returns:
        New tensors for the names that change, of the originals' dtype, device and memory format.

    Raises:
        NotFinite: NaN or infinity in an original or in a result; names the tensor.
        NoEffect: an edit that changes no value in the dtype the tensors are stored in.
        UnsupportedEdit: an edit needs a bias that the layer does not have.
        SalveError: a task vector's files cannot be read.
    """
    effects = [Effect() for _ in edits]
    replaced: dict[str, Tensor] = {}
    changes: dict[str, TensorChange] = {}
    for module in dict.fromkeys(op.module for edit in edits for op in edit.ops):
        applied = apply_to_layer(module, tensors, edits, effects)
        replaced.update(applied.tensors)
        changes.update(applied.changes)
    for edit, effect in zip(edits, effects, strict=True):
        if not effect.stored:
            raise NoEffect(_no_effect(edit.name, effect.computed))
    return Applied(replaced, changes)


@dataclass
class Effect:
    """Whether an edit changed anything: as computed in float32, and as stored."""

    computed: bool = False
    stored: bool = False


def apply_to_layer(
    module: str,
    tensors: Mapping[str, Tensor],
    edits: Sequence[NamedOps],
    effects: Sequence[Effect],
) -> Applied:
    """The part of `apply_named` that falls on one layer.

    Args:
        module: full name of the layer; ops on others are passed over.
        tensors: see `apply_named`.
        edits: see `apply_named`.
        effects: one an edit, in which it is noted whether the edit changed anything here.

    Raises:
        SalveError: see `apply_named`; never `NoEffect`.
    """
    with torch.no_grad():
        mine: list[list[Op]] = []
        before: list[Op] = []
        for edit in edits:
            mine.append([])
            for op in edit.ops:
                if op.module == module:
                    mine[-1].append(op.bound(tensors, before))
                    before.append(mine[-1][-1])
        layer = _Layer(module, tensors, mine, effects)
        changes = layer.run()
        return Applied(layer.replaced, changes)


class _Layer:
    """One layer's weight and bias, edited block by block."""

    def __init__(
        self,
        module: str,
        tensors: Mapping[str, Tensor],
        edits: Sequence[Sequence[Op]],
        effects: Sequence[Effect],
    ) -> None:
        self._edits = [(ops, effect) for ops, effect in zip(edits, effects, strict=True) if ops]
        ops = [op for edit in edits for op in edit]
        keys = dict.fromkeys(("weight", "bias", *(k for o in ops for k in o.touches)))
        self._touched = [k for k in keys if any(k in o.touches for o in ops)]
        read = [k for k in keys if any(k in (*o.reads, *o.touches) for o in ops)]
        missing = next((k for k in read if f"{module}.{k}" not in tensors), None)
        if missing is not None:
            raise UnsupportedEdit(
                f"This edit changes {module}.{missing}, which the layer does not have. Use an edit "
                "without an offset, such as DirectionalAblation, or a layer that has one."
            )
        self._names = {k: f"{module}.{k}" for k in read}
        originals = {k: tensors[n].detach() for k, n in self._names.items()}
        empty = next((k for k, t in originals.items() if t.is_meta), None)
        if empty is not None:
            raise UnsupportedEdit(
                f"{self._names[empty]!r} has no values yet (meta device). Load the weights first."
            )
        self._new = {k: torch.empty_like(originals[k]) for k in self._touched}
        self._old = {k: outputs_first(t, ops[0].output_dim) for k, t in originals.items()}
        self._views = {k: outputs_first(t, ops[0].output_dim) for k, t in self._new.items()}
        widest = max(v[0].numel() for v in self._old.values())
        d_out = next(iter(self._old.values())).shape[0]
        self._rows = max(1, min(BLOCK // max(1, widest), d_out // BLOCKS))
        self._sums = {
            k: ChangeSums(t.dtype, self._rows * t[0].numel(), t.device)
            for k, t in self._old.items()
        }

    def run(self) -> dict[str, TensorChange]:
        """Fill the replacements, note which edits had an effect, and measure the changes."""
        d_out = next(iter(self._old.values())).shape[0]
        for start in range(0, d_out, self._rows):
            self._run_block(start, min(start + self._rows, d_out))
        changes = {k: sums.change(self._names[k]) for k, sums in self._sums.items()}
        return {self._names[k]: changes[k] for k in changes if k in self._touched}

    @property
    def replaced(self) -> dict[str, Tensor]:
        """The replacements by full name."""
        return {self._names[k]: t for k, t in self._new.items()}

    def _run_block(self, start: int, stop: int) -> None:
        old = {k: v[start:stop] for k, v in self._old.items()}
        block = {k: t.to(torch.float32, copy=True) for k, t in old.items()}
        for ops, effect in self._edits:
            before = {} if effect.stored else {k: block[k].clone() for k in self._touched}
            for op in ops:
                op.apply_(block, start, stop)
            for k, t in before.items():
                if not torch.equal(block[k], t):
                    effect.computed = True
                    effect.stored |= not torch.equal(block[k].to(old[k].dtype), t.to(old[k].dtype))
        for k, sums in self._sums.items():
            if k in self._touched:
                new = self._views[k][start:stop]
                new.copy_(block[k])
                sums.add(old[k], block[k], new)
            else:
                sums.add_original(old[k])


def _no_effect(name: str, lost: bool) -> str:
    if lost:
        return (
            f"Edit {name!r} changes nothing: its change is below the resolution of the dtype the "
            "weights are stored in. Raise alpha, or convert the model to float32."
        )
    return (
        f"Edit {name!r} changes nothing: every value stays as it was. Raise alpha from zero, or "
        "choose another feature, guide or rows."
    )
