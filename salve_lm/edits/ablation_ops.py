"""Ops that take directions of the residual stream out of the matrices that read or write it.

With D [k, d] orthonormal and G the gain of the norm between a matrix and the stream (ones where
there is none), a reading matrix acts on the stream as W G, a writing one as G W. Ablation makes
them W G (I - alpha D^T D) and (I - alpha D^T D) G W, so

    reading: W' = W - alpha (W G D^T)(D G^-1),    writing: W' = W - alpha (G^-1 D^T)(D G W).

Arditi et al. 2024 (arXiv 2406.11717) orthogonalise writing matrices so, without norms. Gains are
named, not held: they are read from the unedited weights when the op is applied.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from salve_lm.edits.layout import outputs_first
from salve_lm.edits.ops import BIAS, WEIGHT, Op
from salve_lm.errors import UnsupportedEdit
from salve_lm.task_vectors.blocks import row_blocks
from salve_lm.task_vectors.one_thread import one_thread
from salve_lm.task_vectors.projection import centred_basis, inverse


@dataclass(frozen=True, eq=False, kw_only=True)
class AblateStream(Op):
    """What reading and writing have in common.

    Attributes:
        basis: D, orthonormal rows, float64 [k, d].
        norm: full name of the norm between the matrix and the stream; None where there is none.
        offset: the norm multiplies by offset + weight.
        has_bias: whether the matrix has a bias that has to move too.
    """

    basis: Tensor
    norm: str | None = None
    offset: float = 0.0
    has_bias: bool = False

    @property
    def touches(self) -> tuple[str, ...]:
        """The weight, and the bias where it has to move too."""
        return (WEIGHT, BIAS) if self.has_bias else (WEIGHT,)

    def gain(self, originals: Mapping[str, Tensor]) -> Tensor:
        """G, float64 [d] on the CPU."""
        if self.norm is None:
            return torch.ones(self.basis.shape[1], dtype=torch.float64)
        return originals[f"{self.norm}.{WEIGHT}"].detach().cpu().double() + self.offset

    @abstractmethod
    def factors(
        self, originals: Mapping[str, Tensor], before: Sequence[Op]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `_Bound`."""

    def bound(self, originals: Mapping[str, Tensor], before: Sequence[Op] = ()) -> Op:
        """See `Op.bound`."""
        v, q, shift = self.factors(originals, before)
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(Op)}
        return _Bound(
            **plain, keys=self.touches, writes=isinstance(self, AblateWrite), v=v, q=q, shift=shift
        )

    def apply_(self, block: Mapping[str, Tensor], start: int, stop: int) -> None:
        """See `Op.apply_`."""
        raise UnsupportedEdit(f"The ablation of {self.module!r} is not bound to any weights.")


@dataclass(frozen=True, eq=False, kw_only=True)
class AblateRead(AblateStream):
    """Ablation in a matrix that reads the stream.

    A LayerNorm shows the matrix the stream without its mean: D is then centred (and made
    orthonormal again), and what the norm's own bias has along D is put into the matrix's bias, so
    that it still arrives.

    Attributes:
        centred: whether the norm takes away the mean.
    """

    centred: bool = False

    def factors(
        self, originals: Mapping[str, Tensor], before: Sequence[Op]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `_Bound`."""
        gain = self.gain(originals)
        basis = centred_basis(self.basis.T).T if self.centred else self.basis
        v, q = gain * basis, inverse(gain) * basis
        shift = torch.zeros(len(basis), dtype=torch.float64)
        if self.has_bias:
            shift = -(q @ originals[f"{self.norm}.{BIAS}"].detach().cpu().double())
        return v, q, shift


@dataclass(frozen=True, eq=False, kw_only=True)
class AblateWrite(AblateStream):
    """Ablation in a matrix that writes to the stream; its bias is ablated with it.

    Behind a norm what arrives has nothing left along D; the norm's scalar 1 / rms, over what is
    left, is another one than before.
    """

    def factors(
        self, originals: Mapping[str, Tensor], before: Sequence[Op]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `_Bound`. Reads the matrix once, as the ops before leave it."""
        gain = self.gain(originals)
        keys = {key for op in (self, *before) for key in (*op.reads, *op.touches)}
        layer = {
            key: outputs_first(originals[f"{self.module}.{key}"].detach(), self.output_dim)
            for key in keys
        }
        rows = self.basis * gain
        weight = layer[WEIGHT]
        found = torch.zeros(len(rows), *weight.shape[1:], dtype=torch.float64)
        shift = torch.zeros(len(rows), dtype=torch.float64)
        with one_thread():
            for start, stop in row_blocks(weight.shape):
                block = {
                    k: t[start:stop].to("cpu", torch.float32, copy=True) for k, t in layer.items()
                }
                for op in before:
                    op.apply_(block, start, stop)
                found += rows[:, start:stop] @ block[WEIGHT].double()
                if self.has_bias:
                    shift += rows[:, start:stop] @ block[BIAS].double()
        return inverse(gain) * self.basis, found, shift


@dataclass(frozen=True, eq=False, kw_only=True)
class _Bound(Op):
    """An ablation with its gains, and with what it needs of the whole matrix.

    Attributes:
        keys: what it touches.
        writes: whether the matrix writes the stream.
        v: G D^T, or G^-1 D^T where it writes; as rows, float64 [k, d].
        q: D G^-1 [k, d], or D G W [k, d_in] where it writes.
        shift: reading: what the bias loses is (W v) shift, [k]; writing: D G b.
    """

    keys: tuple[str, ...]
    writes: bool
    v: Tensor
    q: Tensor
    shift: Tensor

    @property
    def touches(self) -> tuple[str, ...]:
        """See `AblateStream.touches`."""
        return self.keys

    def apply_(self, block: Mapping[str, Tensor], start: int, stop: int) -> None:
        """See `Op.apply_`."""
        weight = block[WEIGHT]
        with one_thread():  # several would round otherwise
            if self.writes:
                moved = self.alpha * self.v[:, start:stop].T.to(weight.device)
            else:
                moved = self.alpha * (weight.double() @ self.v.T.to(weight.device))
            if BIAS in self.keys:
                block[BIAS].sub_((moved @ self.shift.to(weight.device)).float())
        q = self.q.to(weight.device, torch.float32)
        # products of two float32 vectors, one by one: the same bits on every device
        for column, row in zip(moved.float().T, q, strict=True):
            weight.sub_(column[:, None] * row)
