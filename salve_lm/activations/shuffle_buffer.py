"""A loader that draws batches from buffers of activations of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from salve_lm.activations.ahead import Stopped, ahead
from salve_lm.activations.loaders import GlobalBatchLoader, taken
from salve_lm.activations.rows import RowBuffer, RowSource
from salve_lm.activations.shuffle import ShuffledRows

Batch = TypeVar("Batch")
_IDS_BYTES = 8


class BufferedLoader(GlobalBatchLoader[Batch]):
    """Fills a buffer with one chunk of rows after the other and draws batches from it.

    With `prefetch`, a thread fills a second buffer while batches are drawn from the first. The
    state in a checkpoint is the sampler's position: a resumed run reads the units of the chunk
    under way once more, and goes on with the very rows that were left in the buffer, whatever the
    thread had made ready.

    Args:
        source: makes or reads the rows of a unit.
        sampler: the order.
        make: (site -> rows [n, d_in] float32, name -> numbers [n], rows in the global batch) -> a
            batch.
        device: where batches are used.
        buffer_device: where the buffers lie: that of the batches, or the CPU, from which batches
            then travel ahead of their use.
        dtype: of the rows in the buffers; batches are float32 always.
        prefetch: whether to fill a second buffer in the background.
    """

    sampler: ShuffledRows

    def __init__(
        self,
        source: RowSource,
        sampler: ShuffledRows,
        make: Callable[[dict[str, Tensor], dict[str, Tensor], int], Batch],
        device: torch.device,
        buffer_device: torch.device,
        dtype: torch.dtype = torch.float32,
        prefetch: bool = True,
    ) -> None:
        super().__init__(sampler, prefetch and device != buffer_device, device)
        self._source, self._make = source, make
        self._buffer_device, self._dtype, self._fill_ahead = buffer_device, dtype, prefetch

    @property
    def buffer_bytes(self) -> int:
        """Memory of this rank's buffers; a batch and a forward pass come on top."""
        row = sum(self._source.widths.values()) * self._dtype.itemsize
        return self._buffers() * self._rows() * (row + _IDS_BYTES * len(self._source.ids))

    def _load(self, numbers: range) -> Iterator[Batch]:
        chunks = list(dict.fromkeys(self.sampler.chunk_of(number) for number in numbers))
        rooms = [self._allocate() for _ in range(min(self._buffers(), len(chunks)))]
        fill = partial(self._filled, chunks, rooms)
        with closing(ahead(fill, len(rooms) - 1, self._buffer_device)) as buffers:
            held, buffer = -1, None
            for number in numbers:
                chunk = self.sampler.chunk_of(number)
                if chunk != held:
                    held, buffer = chunk, next(buffers)
                if buffer is not None:
                    yield self._batch(buffer, number)

    def _batch(self, buffer: RowBuffer, number: int) -> Batch:
        places = self.sampler.rows(number)
        there = places.to(self._buffer_device)
        return self._make(
            {site: taken(x, there, self._device) for site, x in buffer.x.items()},
            {name: numbers[places] for name, numbers in buffer.ids.items()},
            self.sampler.global_size(number),
        )

    def _filled(
        self, chunks: Sequence[int], rooms: Sequence[RowBuffer], stopped: Stopped
    ) -> Generator[RowBuffer, None, None]:
        for i, number in enumerate(chunks):
            units, skip, rows = self.sampler.chunk(number)
            buffer = rooms[i % len(rooms)].part(0, rows)
            self._source.fill(buffer, units, skip, stopped)
            yield buffer

    def _buffers(self) -> int:
        return 1 + self._fill_ahead

    def _rows(self) -> int:
        sampler = self.sampler
        return -(-min(sampler.buffer_rows, sampler.n) // sampler.world)

    # validation allocates in inference mode, in which no other thread may write what it allocates
    @torch.inference_mode(False)
    def _allocate(self) -> RowBuffer:
        rows, device = self._rows(), self._buffer_device
        widths = self._source.widths
        rank_zero_info(
            "Shuffle buffer: %d rows of %d sites in %s on %s, %.4g MB; %d of them.",
            rows, len(widths), str(self._dtype).removeprefix("torch."), device,
            self.buffer_bytes / self._buffers() / 1e6, self._buffers(),
        )  # fmt: skip
        return RowBuffer(
            {s: torch.empty(rows, d, dtype=self._dtype, device=device) for s, d in widths.items()},
            {name: torch.empty(rows, dtype=torch.int64) for name in self._source.ids},
        )
