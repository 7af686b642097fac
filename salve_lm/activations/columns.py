"""Columns of stores, read from disk by ranges of rows, straight into memory that is there."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from salve_lm.ranges import read_range, will_need


class Piece(NamedTuple):
    """Consecutive rows in one file.

    Attributes:
        file: the file.
        offset: of the first row's first byte.
        rows: number of rows.
    """

    file: Path
    offset: int
    rows: int


class Column:
    """A tensor of one row a sample, in pieces on disk.

    Args:
        pieces: where its rows are, in order.
        shape: of a row; () for a number.
        dtype: as stored.

    Attributes:
        starts: row at which each piece begins, and at the end the number of rows.
    """

    def __init__(self, pieces: Sequence[Piece], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.pieces, self.shape, self.dtype = tuple(pieces), shape, dtype
        self.starts = [0, *accumulate(piece.rows for piece in self.pieces)]
        self._row_bytes = torch.Size(shape).numel() * dtype.itemsize

    def __len__(self) -> int:
        """Number of rows."""
        return self.starts[-1]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` in memory of their own; raises what `read_into` raises."""
        if start > stop:
            raise IndexError(f"Rows {start} to {stop} are none.")
        out = torch.empty(stop - start, *self.shape, dtype=self.dtype)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: Tensor) -> None:
        """Fill `out` [n, *shape], contiguous on the CPU, with the rows from `start` on.

        Where `out` has another dtype or lies on another device, the rows go through memory of their
        own first.

        Raises:
            IndexError: rows that the column does not have.
            CorruptFile: a file became shorter since the store was opened.
        """
        if not 0 <= start <= start + len(out) <= len(self):
            raise IndexError(f"Rows run from 0 to {len(self) - 1}.")
        if out.dtype != self.dtype or out.device.type != "cpu":
            out.copy_(self.read(start, start + len(out)))
            return
        if not out.numel():
            return
        # `reshape` of what is contiguous is a view
        target = out.view(torch.uint8).reshape(-1).numpy().data
        for piece, first, rows in self._covering(start, start + len(out)):
            size = rows * self._row_bytes
            read_range(piece.file, piece.offset + first * self._row_bytes, target[:size])
            target = target[size:]

    def will_need(self, start: int, stop: int) -> None:
        """Ask the kernel to begin reading these rows, where it can be asked."""
        for piece, first, rows in self._covering(start, stop):
            offset = piece.offset + first * self._row_bytes
            will_need(piece.file, offset, rows * self._row_bytes)

    def _covering(self, start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
        """(piece, its first row, number of rows) that together are rows `start` to `stop`."""
        at = bisect.bisect_right(self.starts, start) - 1
        while start < stop:
            end = min(stop, self.starts[at + 1])
            if end > start:
                yield self.pieces[at], start - self.starts[at], end - start
            start, at = end, at + 1
