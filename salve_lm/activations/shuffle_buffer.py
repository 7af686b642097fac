"""A loader that draws batches from a buffer of activations of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from lightning.pytorch.utilities import rank_zero_info

from salve_lm.activations.batch import SitesBatch
from salve_lm.activations.loaders import GlobalBatchLoader
from salve_lm.activations.shuffle import ShuffledRows
from salve_lm.activations.tokens import RowSource, SiteRows


class BufferedLoader(GlobalBatchLoader[SitesBatch]):
    """Fills a buffer with one chunk of rows after the other and draws batches from it.

    The state in a checkpoint is the sampler's position: a resumed run reads the units of the chunk
    under way once more, and goes on with the very rows that were left in the buffer.

    Args:
        source: makes or reads the rows of a unit.
        sampler: the order.
        device: where the buffer lies and the rows are made.
        dtype: of the rows in the buffer; batches are float32 always.
    """

    sampler: ShuffledRows

    def __init__(
        self,
        source: RowSource,
        sampler: ShuffledRows,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(sampler)
        self._source, self._device, self._dtype = source, device, dtype
        self._buffer: SiteRows | None = None

    @property
    def buffer_bytes(self) -> int:
        """Memory of this rank's buffer; a batch and a forward pass come on top."""
        rows = -(-min(self.sampler.buffer_rows, self.sampler.n) // self.sampler.world)
        return rows * (sum(self._source.widths.values()) * self._dtype.itemsize + 16)

    def _load(self, numbers: range) -> Iterator[SitesBatch]:
        held = -1
        for number in numbers:
            chunk = self.sampler.chunk_of(number)
            if chunk != held:
                self._fill(chunk)
                held = chunk
            yield self._batch(number)
        # an epoch's last chunk is of no use any more, and validation needs memory too
        self._buffer = None

    def _batch(self, number: int) -> SitesBatch:
        places = self.sampler.rows(number)
        if self._buffer is None:
            raise RuntimeError("A batch was asked for before the buffer was filled.")
        there = places.to(self._device)
        return SitesBatch(
            {site: x[there].float() for site, x in self._buffer.x.items()},
            self._buffer.sample[places],
            self._buffer.position[places],
            self.sampler.global_size(number),
        )

    def _fill(self, number: int) -> None:
        units, skip, rows = self.sampler.chunk(number)
        if self._buffer is None:
            self._buffer = self._allocate()
        filled = 0
        for part in self._source.read(units, self._device):
            # the first and the last unit may lie across the border of the chunk
            first, skip = min(skip, len(part.sample)), max(0, skip - len(part.sample))
            n = min(len(part.sample) - first, rows - filled)
            own, theirs = slice(filled, filled + n), slice(first, first + n)
            for site, x in part.x.items():
                self._buffer.x[site][own] = x[theirs].to(self._dtype)
            self._buffer.sample[own] = part.sample[theirs]
            self._buffer.position[own] = part.position[theirs]
            filled += n
        if filled != rows:
            raise RuntimeError(f"The units of a chunk gave {filled} rows, not {rows}.")

    def _allocate(self) -> SiteRows:
        sampler = self.sampler
        rows = -(-min(sampler.buffer_rows, sampler.n) // sampler.world)
        widths = self._source.widths
        rank_zero_info(
            "Shuffle buffer: %d rows of %d sites in %s take %.4g MB on %s.",
            rows, len(widths), str(self._dtype).removeprefix("torch."), self.buffer_bytes / 1e6,
            self._device,
        )  # fmt: skip
        return SiteRows(
            {s: torch.empty(rows, d, dtype=self._dtype, device=self._device) for s, d in
             widths.items()},
            torch.empty(rows, dtype=torch.int64),
            torch.empty(rows, dtype=torch.int64),
        )  # fmt: skip
