"""The change of one tensor, lambda included, by rows: the live edit and the writer share it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from functools import cached_property

import torch
from torch import Tensor

from salve_lm.language.residual import ResidualRole
from salve_lm.task_vectors.blocks import row_blocks
from salve_lm.task_vectors.one_thread import one_thread
from salve_lm.task_vectors.projection import centred_basis, inverse, seed_of
from salve_lm.task_vectors.sources import TaskVectorSource


class Delta(ABC):
    """The change of one tensor, float32 on the CPU.

    Values are computed for the blocks of `row_blocks` only, whatever rows are asked for, and the
    last block is kept: so matrix products see the same shapes, and give the same bits, in every
    use. On one thread of the CPU, since another device, or more threads, would round otherwise.

    Attributes:
        alpha: lambda, the strength.
        shape: of the tensor, as it is stored.
    """

    def __init__(self, alpha: float, shape: tuple[int, ...]) -> None:
        self.alpha, self.shape = alpha, shape
        self._starts = [start for start, _ in row_blocks(shape)]
        self._kept: tuple[int, Tensor] | None = None
        self._columns: Tensor | None = None

    @abstractmethod
    def direction(self, start: int, stop: int) -> Tensor:
        """The change at lambda = 1 for the rows of one block of `row_blocks`, float32."""

    def rows(self, start: int, stop: int) -> Tensor:
        """lambda times the change of rows `start` to `stop`, float32 [stop - start, ...]."""
        parts = []
        i = bisect_right(self._starts, start) - 1
        while start < stop:
            block = self._block(i)
            first = self._starts[i]
            last = min(stop, first + len(block))
            parts.append(block[start - first : last - first])
            start, i = last, i + 1
        if stop == self.shape[0]:
            self._kept = None  # a writer holds a delta for every tensor of a model until its end
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0, *self.shape[1:])

    def columns(self, start: int, stop: int) -> Tensor:
        """The same for columns `start` to `stop` of a matrix, as [stop - start, n_rows].

        For layers that store their weight inputs first (GPT-2's Conv1D), whose live edit goes by
        columns. Holds the whole change.
        """
        if self._columns is None:
            self._columns = self.rows(0, self.shape[0])
        return self._columns[:, start:stop].T

    def _block(self, i: int) -> Tensor:
        if self._kept is None or self._kept[0] != i:
            start = self._starts[i]
            stop = self._starts[i + 1] if i + 1 < len(self._starts) else self.shape[0]
            with one_thread():
                self._kept = i, self.direction(start, stop).mul(self.alpha)
        return self._kept[1]


class RawDelta(Delta):
    """lambda tau."""

    def __init__(self, source: TaskVectorSource, name: str, alpha: float) -> None:
        super().__init__(alpha, source.shape(name))
        self._source, self._name = source, name

    def direction(self, start: int, stop: int) -> Tensor:
        """See `Delta.direction`."""
        return self._source.rows(self._name, start, stop)


class ProjectedDelta(Delta):
    """lambda times tau projected on a subspace of the residual stream; see `projection`.

    Args:
        source: with its base.
        name: of the tensor, in memory.
        alpha: lambda.
        role: how the tensor touches the stream.
        gain: of the norm in between, [d].
        basis: orthonormal, [d, k].
        rescale: give the change the norm of tau. Measured, as the projection is made, in
            gain-folded coordinates: as the stream sees it.
    """

    def __init__(
        self,
        source: TaskVectorSource,
        name: str,
        alpha: float,
        role: ResidualRole,
        gain: Tensor,
        basis: Tensor,
        rescale: bool,
    ) -> None:
        super().__init__(alpha, source.shape(name))
        self._source, self._name, self._role, self._rescale = source, name, role, rescale
        self._gain, self._inverse = gain.double(), inverse(gain.double())
        self._q = centred_basis(basis) if role.centred else basis.double()

    @property
    def rank(self) -> int:
        """Dimension of the subspace."""
        return self._q.shape[1]

    @property
    def width(self) -> int:
        """Dimension of the stream, as far as the tensor can touch it."""
        return self._q.shape[0] - self._role.centred

    @cached_property
    @one_thread()
    def energies(self) -> tuple[float, float]:
        """Squared norms of tau and of its projection, as the stream sees them."""
        raw = kept = 0.0
        row_sums = torch.zeros(self.shape[1] if len(self.shape) > 1 else 1, dtype=torch.float64)
        for start, stop in row_blocks(self.shape):
            a = self._folded(start, stop)
            raw += float(a.square().sum())
            if self._role.axis == 1:
                kept += float((a @ self._q).square().sum())
                if self._role.centred:
                    raw -= float(a.sum(1).square().sum()) / len(self._q)
            else:
                row_sums += a.sum(0)
        if self._role.axis == 0:
            kept = float(self._coordinates.square().sum())
            if self._role.centred:
                raw -= float(row_sums.square().sum()) / len(self._q)
        return max(raw, 0.0), kept

    def direction(self, start: int, stop: int) -> Tensor:
        """See `Delta.direction`."""
        if self._role.axis == 1:
            kept = self._folded(start, stop) @ self._q @ self._q.T * self._inverse
        else:
            kept = self._q[start:stop] @ self._coordinates * self._inverse[start:stop, None]
        return kept.mul_(self._factor).float().reshape(stop - start, *self.shape[1:])

    @cached_property
    def _factor(self) -> float:
        raw, kept = self.energies if self._rescale else (1.0, 1.0)
        return (raw / kept) ** 0.5 if kept else 0.0

    @cached_property
    def _coordinates(self) -> Tensor:
        """Q^T A [k, n] for a residual axis that runs over rows: the one thing that is held."""
        found = torch.zeros(self.rank, *self.shape[1:2] or (1,), dtype=torch.float64)
        for start, stop in row_blocks(self.shape):
            found += self._q[start:stop].T @ self._folded(start, stop)
        return found

    def _folded(self, start: int, stop: int) -> Tensor:
        """Rows of A, float64; the mean that a LayerNorm takes away is still in it."""
        tau = self._source.rows(self._name, start, stop).double().reshape(stop - start, -1)
        if self._role.axis == 1:
            return tau.mul_(self._gain)
        return tau.mul_(self._gain[start:stop, None])


class RandomDirectionDelta(Delta):
    """lambda times Gaussian noise with the Frobenius norm of tau, as both are stored."""

    def __init__(self, source: TaskVectorSource, name: str, alpha: float, seed: int) -> None:
        super().__init__(alpha, source.shape(name))
        self._source, self._name, self._seed = source, name, seed

    def direction(self, start: int, stop: int) -> Tensor:
        """See `Delta.direction`."""
        return self._noise(start, stop).mul_(self._factor)

    @cached_property
    def _factor(self) -> float:
        tau = noise = 0.0
        for start, stop in row_blocks(self.shape):
            tau += float(self._source.rows(self._name, start, stop).double().square().sum())
            noise += float(self._noise(start, stop).double().square().sum())
        return (tau / noise) ** 0.5

    def _noise(self, start: int, stop: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(self._seed, self._name, start))
        return torch.randn(stop - start, *self.shape[1:], generator=generator)
