"""Rows that come in units, and where they come from: what a shuffle buffer is filled with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from salve_lm.activations.ahead import Stopped
from salve_lm.activations.columns import Column
from salve_lm.activations.store import ActivationStore
from salve_lm.ranges import runs

BLOCK_BYTES = 1 << 20
"""Of a block of a store: read at once, and so large that finding it on the disk costs little."""
_ASKED_AHEAD = 8
"""Stretches that the kernel is asked for before they are read: one alone leaves a disk waiting."""


class RowBuffer(NamedTuple):
    """Room for rows.

    Attributes:
        x: site -> activations [n, d_in of the site].
        ids: name -> a number for each row, int64 [n], on the CPU.
    """

    x: dict[str, Tensor]
    ids: dict[str, Tensor]

    @property
    def rows(self) -> int:
        """How many rows there is room for."""
        return len(next(iter(self.ids.values())))

    def part(self, start: int, stop: int) -> RowBuffer:
        """The room of rows `start` to `stop`, not a copy."""
        x, ids = ({k: v[start:stop] for k, v in columns.items()} for columns in self)
        return RowBuffer(x, ids)


class RowSource(Protocol):
    """Where the rows of units come from: a model, or a store.

    Attributes:
        counts: rows that each unit yields, int64 [units].
        widths: site -> width of its activations.
        ids: names of the numbers that each row has.
    """

    counts: Tensor
    widths: dict[str, int]
    ids: tuple[str, ...]

    def fill(self, out: RowBuffer, units: Tensor, skip: int, stopped: Stopped) -> None:
        """Fill `out` with the rows of `units`, in order, leaving out the first `skip`.

        Once `stopped`, what is in `out` does not matter.
        """


class StoredRows:
    """Rows of a store; units are stretches of it.

    Args:
        counts: rows of each unit, int64 [units]; together all rows of the columns.
        x: site -> its activations.
        ids: name -> numbers of the rows.
    """

    def __init__(self, counts: Tensor, x: Mapping[str, Column], ids: Mapping[str, Column]) -> None:
        self.counts, self.ids = counts, tuple(ids)
        self.widths = {site: column.shape[0] for site, column in x.items()}
        self._x, self._ids = dict(x), dict(ids)
        self._ends = counts.cumsum(0)

    def fill(self, out: RowBuffer, units: Tensor, skip: int, stopped: Stopped) -> None:
        """Fill `out` with the rows of `units`, in order, leaving out the first `skip`."""
        filled, stretches = 0, list(runs(units.numpy()))
        for i, (first, last) in enumerate(stretches):
            if stopped():
                return
            for asked in stretches[i + _ASKED_AHEAD if i else 0 : i + _ASKED_AHEAD + 1]:
                self._will_need(*asked)
            start = self._start(first) + skip
            rows = min(int(self._ends[last]) - start, out.rows - filled)
            room, skip = out.part(filled, filled + rows), 0
            for site, x in room.x.items():
                self._x[site].read_into(start, x)
            for name, numbers in room.ids.items():
                self._ids[name].read_into(start, numbers)
            filled += rows
        if filled != out.rows:
            raise RuntimeError(f"The units of a chunk gave {filled} rows, not {out.rows}.")

    def _start(self, unit: int) -> int:
        return int(self._ends[unit] - self.counts[unit])

    def _will_need(self, first: int, last: int) -> None:
        for column in self._x.values():
            column.will_need(self._start(first), int(self._ends[last]))


def blocks_of(store: ActivationStore, split: str) -> StoredRows:
    """The rows of a store in blocks of about `BLOCK_BYTES`, none of which lies in two files."""
    x = store.column(split, "x")
    rows = max(1, BLOCK_BYTES // (store.d_in * store.dtype.itemsize))
    counts = [
        min(rows, piece.rows - first) for piece in x.pieces for first in range(0, piece.rows, rows)
    ]
    ids = {name: store.column(split, name) for name in ("label", "sample")}
    return StoredRows(torch.tensor(counts, dtype=torch.int64), {"x": x}, ids)
