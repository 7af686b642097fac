"""The order of rows that come in units: shuffled in a buffer of bounded size, exact after a resume.

A unit is what is read at once and yields several rows: a window of tokens run through a model, a
block of a store. Rows are put in a random order of units, cut into chunks that fill the buffer, and
drawn in a random order within their chunk. All of it is a pure function of (seed, epoch), so the
state of the buffer is a position: resuming fills it again with the chunk under way, and a
checkpoint holds no activations.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, TypedDict, cast

import torch
from torch import Tensor

from salve_lm.activations.sampler import GlobalBatches, Position
from salve_lm.errors import BadConfig


class BufferPosition(TypedDict):
    """State of a `ShuffledRows`: that of `GlobalBatches`, and what its chunks are cut from."""

    epoch: int
    position: int
    n: int
    batch_size: int
    seed: int
    shuffle: bool
    units: int
    buffer_rows: int


class Chunk(NamedTuple):
    """This rank's part of one filling of the buffer.

    Attributes:
        units: the units to read, in order, int64 [m].
        skip: rows at the start of the first unit that belong to the chunk or the rank before.
        rows: rows to keep from there on.
    """

    units: Tensor
    skip: int
    rows: int


class ShuffledRows(GlobalBatches):
    """Batches of rows, drawn from a buffer that holds one chunk at a time.

    Every chunk but the last has the same number of rows, a multiple of the batch size, so no batch
    needs two of them. Each rank reads and holds a contiguous share of a chunk's rows, and of a
    batch it gets the rows that it holds: shares of a batch differ by chance and may be empty. A
    unit that lies across the border of two shares is read for both. Rows of a batch are in the
    order of their units, so the ranks' shares, one after the other, are the batch of one process.

    Args:
        counts: rows that each unit yields, int64 [units]; may hold zeros.
        batch_size: rows in a *global* batch, summed over ranks.
        buffer_rows: rows that the buffers of all ranks hold together; rounded down to whole
            batches.
        seed: of the order.
        rank: this process.
        world: number of processes.
        shuffle: draw in a new random order each epoch, or in the order of the units.

    Raises:
        BadConfig: no rows, a buffer smaller than a batch, sizes below 1.
    """

    def __init__(
        self, counts: Tensor, batch_size: int, buffer_rows: int, seed: int = 0, rank: int = 0,
        world: int = 1, shuffle: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(int(counts.sum()), batch_size, seed, rank, world, shuffle)
        if buffer_rows < batch_size:
            raise BadConfig(
                f"A buffer of {buffer_rows} rows cannot hold a batch of {batch_size}. Raise "
                "buffer_rows (some 16 batches shuffle well), or lower batch_size."
            )
        self.counts = counts
        self.buffer_rows = buffer_rows // batch_size * batch_size
        self._units: tuple[int, Tensor, Tensor] | None = None
        self._drawn: tuple[tuple[int, int], Tensor] | None = None

    def chunk_of(self, batch: int) -> int:
        """The chunk that `batch` is drawn from."""
        return batch * self.batch_size // self.buffer_rows

    def chunk(self, number: int) -> Chunk:
        """What this rank reads to fill its buffer with chunk `number` of the present epoch."""
        order, starts = self._unit_order()
        start, stop = self._share(number)
        if start == stop:
            return Chunk(order[:0], 0, 0)
        first = int(torch.searchsorted(starts, start, right=True)) - 1
        last = int(torch.searchsorted(starts, stop - 1, right=True)) - 1
        return Chunk(order[first : last + 1], start - int(starts[first]), stop - start)

    def rows(self, batch: int) -> Tensor:
        """This rank's share of `batch`: places in its buffer, int64, possibly none."""
        number = self.chunk_of(batch)
        first = batch * self.batch_size - number * self.buffer_rows
        places = self._permutation(number)[first : first + self.global_size(batch)]
        start, stop = (edge - number * self.buffer_rows for edge in self._share(number))
        own = places[(places >= start) & (places < stop)]
        return own.sort().values - start

    def state_dict(self) -> Position:
        """What `load_state_dict` needs to go on with the next batch; equal on all ranks."""
        sizes = {"units": len(self.counts), "buffer_rows": self.buffer_rows}
        return cast(Position, {**super().state_dict(), **sizes})

    def load_state_dict(self, state: Position) -> None:
        """Go on where `state` was taken, on any number of ranks.

        Raises:
            BadConfig: `state` belongs to an order made from other data or options.
        """
        own, given = cast(BufferPosition, self.state_dict()), cast(BufferPosition, state)
        differing = [
            f"{name} (was {given.get(name)}, is {value})"
            for name, value in own.items()
            if name not in ("epoch", "position") and given.get(name) != value
        ]
        if differing:
            raise BadConfig(
                f"The checkpoint cannot be resumed exactly: {', '.join(differing)}. "
                "Restore these options, or start a new run without --ckpt_path."
            )
        super().load_state_dict(state)

    def _share(self, number: int) -> tuple[int, int]:
        """First and last row, in the order of the epoch, of this rank's part of a chunk."""
        first = number * self.buffer_rows
        size = min(self.buffer_rows, self.n - first)
        start = first + size * self.rank // self.world
        return start, first + size * (self.rank + 1) // self.world

    def _unit_order(self) -> tuple[Tensor, Tensor]:
        """Units that yield rows in the epoch's order, and the row each begins at."""
        if self._units is None or self._units[0] != self.epoch:
            units = self.counts.nonzero().flatten()
            if self.shuffle:
                units = units[_permutation(len(units), self.seed, self.epoch, "units")]
            ends = self.counts[units].cumsum(0)
            self._units = self.epoch, units, ends - self.counts[units]
        return self._units[1:]

    def _permutation(self, number: int) -> Tensor:
        size = min(self.buffer_rows, self.n - number * self.buffer_rows)
        if not self.shuffle:
            return torch.arange(size)
        if self._drawn is None or self._drawn[0] != (self.epoch, number):
            drawn = _permutation(size, self.seed, self.epoch, number)
            self._drawn = (self.epoch, number), drawn
        return self._drawn[1]


def _permutation(n: int, *key: object) -> Tensor:
    # hashed: neighbouring seeds, epochs and chunks must not share their orders
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(n, generator=generator)
