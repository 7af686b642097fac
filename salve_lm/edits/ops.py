"""Elementary, serialisable changes to the weight and bias of one linear or convolutional layer.

An op is written for blocks of float32 rows: `apply_` changes, in place, a weight block
[rows, d_in, *kernel] (outputs first, whatever the layer's own order of axes) and a bias block
[rows]. Every op is local to output rows, so a layer of any size is edited in constant memory.
Small vectors are prepared in float64 on the CPU and rounded once; with elementwise products this
gives the same bits on every device and for every block size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from salve_lm.task_vectors.one_thread import one_thread

WEIGHT, BIAS = "weight", "bias"


@dataclass(frozen=True, eq=False, kw_only=True)
class Op(ABC):
    """One change to one layer.

    Attributes:
        module: full name of the layer; its tensors are MODULE.weight and MODULE.bias.
        output_dim: dimension of the weight that runs over outputs (1 for GPT-2's Conv1D, else 0).
        alpha: strength; `dataclasses.replace(op, alpha=...)` re-scales without a new resolution.
    """

    module: str
    output_dim: int
    alpha: float

    @property
    @abstractmethod
    def touches(self) -> tuple[str, ...]:
        """Which of `weight` and `bias` it changes."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Which of `weight` and `bias` it needs to see."""
        return self.touches

    def bound(self, originals: Mapping[str, Tensor], before: Sequence[Op] = ()) -> Op:
        """The op as it applies to a model with the unedited tensors `originals`, by full name.

        For ops that need more of the model than the rows they change; others return themselves.

        Args:
            originals: read, where needed, one by one.
            before: the ops, already bound, that change the same layer first.
        """
        return self

    @abstractmethod
    def apply_(self, block: Mapping[str, Tensor], start: int, stop: int) -> None:
        """Change the float32 `block` of output rows `start` to `stop` in place."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ScaleChannels(Op):
    """Multiply by f = prod over features of max(0, 1 + sign * alpha * c).

    Along the input axis f [d_in] scales the columns of the chosen rows; along the output axis
    f [d_out] scales whole rows and the bias. The gain of a norm is a weight with an output axis
    only; where the norm multiplies by offset + weight (Gemma: 1 + w), the whole multiplier is
    scaled: 1 + w' = (1 + w) f.

    Attributes:
        c: non-negative guides, one row a feature, float64 [n_features, n].
        sign: -1 suppresses, +1 enhances.
        axis: `input` or `output`.
        rows: output rows to change; all where None.
        has_bias: whether the layer has a bias (read along the output axis only).
        offset: constant that a norm adds to its weight (output axis only).
    """

    c: Tensor
    sign: int
    axis: Literal["input", "output"] = "input"
    rows: tuple[int, ...] | None = None
    has_bias: bool = False
    offset: float = 0.0

    @property
    def touches(self) -> tuple[str, ...]:
        """The weight, and the bias where whole outputs are scaled."""
        return (WEIGHT, BIAS) if self.axis == "output" and self.has_bias else (WEIGHT,)

    @cached_property
    def factors(self) -> Tensor:
        """The multipliers, float32 [n]."""
        return self._exact.float()

    @cached_property
    def _exact(self) -> Tensor:
        return (1 + self.sign * self.alpha * self.c.double()).clamp(min=0).prod(dim=0)

    def apply_(self, block: Mapping[str, Tensor], start: int, stop: int) -> None:
        """See `Op.apply_`."""
        weight = block[WEIGHT]
        f = self.factors.to(weight.device)
        if self.axis == "output":
            for key in self.touches:
                block[key].mul_(_along(f[start:stop], block[key], 0))
            if self.offset:
                # offset f - offset in place of rounding offset + w: where f is 1, w keeps its bits
                shift = (self.offset * (self._exact[start:stop] - 1)).float()
                weight.add_(shift.to(weight.device))
        elif self.rows is None:
            weight.mul_(_along(f, weight, 1))
        else:
            for row in self.rows:
                if start <= row < stop:
                    weight[row - start].mul_(_along(f, weight[row - start], 0))


@dataclass(frozen=True, eq=False, kw_only=True)
class FoldInput(Op):
    """Fold the input map T(x) = x - alpha (q . x + offset) v into the layer.

    W' = W - alpha (W v) q^T and b' = b - alpha offset (W v), so that W' x + b' = W T(x) + b. It
    reads W when it is applied, so folds compose. For convolutions T acts at every position.

    Attributes:
        v: the direction that is moved, float64 [d_in].
        q: the linear read-out, float64 [d_in]; None where T only shifts.
        offset: its constant.
    """

    v: Tensor
    q: Tensor | None = None
    offset: float = 0.0

    @property
    def touches(self) -> tuple[str, ...]:
        """The weight where there is a read-out, the bias where there is an offset."""
        return (WEIGHT,) * (self.q is not None) + (BIAS,) * (self.offset != 0)

    @property
    def reads(self) -> tuple[str, ...]:
        """The bias moves by W v, so the weight is read in any case."""
        return (WEIGHT,) + (BIAS,) * (self.offset != 0)

    def transform(self, x: Tensor) -> Tensor:
        """T(x) for `x` [..., d_in]: what the fold amounts to."""
        v = self.v.to(x.device, x.dtype)
        s = x.new_tensor(self.offset)
        if self.q is not None:
            s = x @ self.q.to(x.device, x.dtype) + s
        return x - self.alpha * s[..., None] * v

    def apply_(self, block: Mapping[str, Tensor], start: int, stop: int) -> None:
        """See `Op.apply_`."""
        weight = block[WEIGHT]
        v = self.v.to(weight.device, torch.float64)
        with one_thread():  # several would round otherwise
            moved = self.alpha * torch.tensordot(weight.double(), v, dims=([1], [0]))
        if self.offset != 0:
            block[BIAS].sub_((self.offset * moved.reshape(len(moved), -1).sum(1)).float())
        if self.q is not None:
            q = _along(self.q.to(weight.device, torch.float32), weight, 1)
            # two roundings on purpose: a fused multiply-add would differ between devices
            weight.sub_(moved.float().unsqueeze(1) * q)


@dataclass(frozen=True, eq=False, kw_only=True)
class RankOneUpdate(Op):
    """W' = W - alpha left right^T (at every kernel position).

    Attributes:
        left: float64 [d_out].
        right: float64 [d_in].
    """

    left: Tensor
    right: Tensor

    @property
    def touches(self) -> tuple[str, ...]:
        """The weight."""
        return (WEIGHT,)

    def apply_(self, block: Mapping[str, Tensor], start: int, stop: int) -> None:
        """See `Op.apply_`."""
        weight = block[WEIGHT]
        left = (self.alpha * self.left[start:stop].double()).to(weight.device, torch.float32)
        right = self.right.to(weight.device, torch.float32)
        weight.sub_(_along(left, weight, 0) * _along(right, weight, 1))


@dataclass(frozen=True, eq=False, kw_only=True)
class ShiftBias(Op):
    """b' = b + alpha delta.

    Attributes:
        delta: float64 [d_out].
    """

    delta: Tensor

    @property
    def touches(self) -> tuple[str, ...]:
        """The bias."""
        return (BIAS,)

    def apply_(self, block: Mapping[str, Tensor], start: int, stop: int) -> None:
        """See `Op.apply_`."""
        shift = self.alpha * self.delta[start:stop].double()
        block[BIAS].add_(shift.to(block[BIAS].device, torch.float32))


def _along(vector: Tensor, like: Tensor, dim: int) -> Tensor:
    """`vector` shaped to broadcast along dimension `dim` of `like`."""
    return vector.reshape([-1 if d == dim else 1 for d in range(like.ndim)])
