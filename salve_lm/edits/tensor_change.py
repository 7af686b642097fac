"""How far a tensor moved: as asked for, and as its storage dtype keeps it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from salve_lm.errors import NotFinite


@dataclass(frozen=True)
class TensorChange:
    """How far one tensor moved.

    Attributes:
        norm_before: Frobenius norm of the original.
        norm_after: of the replacement.
        requested: squared norm of the change as computed in float32.
        applied: squared norm of the change that the storage dtype keeps.
        dot: inner product of the two.
    """

    norm_before: float
    norm_after: float
    requested: float
    applied: float
    dot: float

    @property
    def relative(self) -> float:
        """Norm of the applied change over the norm of the original; inf from zero."""
        if self.norm_before == 0:
            return float("inf") if self.applied else 0.0
        return self.applied**0.5 / self.norm_before

    @property
    def applied_energy(self) -> float:
        """Applied over requested squared norm: 1 unless the storage dtype rounds the edit away."""
        return self.applied / self.requested if self.requested else 1.0

    @property
    def cosine(self) -> float:
        """Cosine between the applied and the requested change; 0 where either is nil."""
        scale = (self.applied * self.requested) ** 0.5
        return self.dot / scale if scale else 0.0


class ChangeSums:
    """The sums behind a `TensorChange`, in float64, block by block.

    Args:
        stored: dtype of the replacement. In float32 it is as computed, which saves two sums.
        block: elements of the largest block.
        device: where the blocks lie.
    """

    def __init__(self, stored: torch.dtype, block: int, device: torch.device) -> None:
        self._lossless = stored == torch.float32
        # so few on a CPU that three float64 copies stay in the cache of a core
        at_most = max(1, min(block, 1 << 16) if device.type == "cpu" else block)
        self._total = torch.zeros(5, dtype=torch.float64, device=device)
        self._memory = torch.empty(3, at_most, dtype=torch.float64, device=device)

    def add_original(self, old: Tensor) -> None:
        """Add a block of a tensor that is only read; any shape."""
        flat = old.reshape(-1)
        for begin in range(0, len(flat), self._memory.shape[1]):
            part = flat[begin : begin + self._memory.shape[1]]
            was = self._memory[0, : len(part)].copy_(part)
            self._total[0] += torch.dot(was, was)

    def add(self, old: Tensor, computed: Tensor, stored: Tensor) -> None:
        """Add a block: the original, the float32 result, and what is stored of it; one shape."""
        total, dot, at_most = self._total, torch.dot, self._memory.shape[1]
        flat = [t.reshape(-1) for t in (old, computed, stored)]
        for begin in range(0, len(flat[0]), at_most):
            before, asked, after = (t[begin : begin + at_most] for t in flat)
            was, applied, requested = self._memory[:, : len(before)]
            was.copy_(before)
            applied.copy_(after)
            total[0] += dot(was, was)
            total[1] += dot(applied, applied)
            applied.sub_(was)
            total[2] += dot(applied, applied)
            if not self._lossless:
                requested.copy_(asked).sub_(was)
                total[3] += dot(requested, requested)
                total[4] += dot(requested, applied)

    def change(self, name: str) -> TensorChange:
        """What was added.

        Raises:
            NotFinite: NaN or infinity in the original or in the result.
        """
        before, after, applied, requested, dot = self._total.tolist()
        # squares of float32 do not overflow in float64: a sum is finite if every value is
        if not math.isfinite(before):
            raise NotFinite(name, "before the edit", "The model itself is damaged.")
        if not math.isfinite(after):
            cure = "Lower alpha, or check the fine-tuned weights."
            raise NotFinite(name, "after the edit", cure)
        if self._lossless:
            requested = dot = applied
        return TensorChange(before**0.5, after**0.5, requested, applied, dot)
