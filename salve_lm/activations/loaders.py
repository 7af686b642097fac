"""Loaders over global batches: of stored activations, and of inputs for on-the-fly activations.

Not subclasses of `torch.utils.data.DataLoader`: Lightning leaves them alone, where it would replace
a DataLoader's sampler under a distributed strategy (padding with duplicates), and it stores their
`state_dict` in checkpoints. Their iterators do nothing before the first batch is asked for, because
Lightning makes them before it announces the epoch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from salve_lm.activations.ahead import Stopped, ahead
from salve_lm.activations.batch import ActivationBatch
from salve_lm.activations.sampler import GlobalBatches, Position
from salve_lm.activations.shard import Rows
from salve_lm.activations.store import ActivationStore

Batch = TypeVar("Batch")
_AHEAD = 2
"""Batches that are made ready while one is in use."""
_CPU = torch.device("cpu")


class InputBatch(NamedTuple):
    """One rank's share of a global batch of network inputs.

    Attributes:
        inputs: [n, ...].
        label: int64 [n].
        sample: index of each sample in its split, int64 [n].
        n_global: samples in the global batch, summed over all ranks.
    """

    inputs: Tensor
    label: Tensor
    sample: Tensor
    n_global: int


class GlobalBatchLoader(ABC, Generic[Batch]):
    """What the loaders share: length, order, position.

    Args:
        sampler: the order.
        prefetch: whether a thread makes batches ready ahead of their use. The position stays that
            of the batches that were handed out.
        device: where batches are used.

    Attributes:
        sampler: the order; its name is what Lightning looks for to announce epochs.
        batch_sampler: the same; Lightning expects it of everything that has a sampler.
    """

    def __init__(
        self, sampler: GlobalBatches, prefetch: bool = False, device: torch.device = _CPU
    ) -> None:
        self.sampler = self.batch_sampler = sampler
        self._depth, self._device = _AHEAD * prefetch, device

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        self.sampler.begin()
        first = self.sampler.position
        numbers = range(first, len(self.sampler))

        def load(stopped: Stopped) -> Generator[Batch, None, None]:
            yield from self._load(numbers)

        with closing(ahead(load, self._depth, self._device)) as batches:
            for number, batch in enumerate(batches, start=first):
                self.sampler.drawn(number)
                yield batch

    def state_dict(self) -> Position:
        """The position of the train loader, as stored in checkpoints."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Position) -> None:
        """Go on where `state` was taken; see `GlobalBatches.load_state_dict`."""
        self.sampler.load_state_dict(state)

    @abstractmethod
    def _load(self, numbers: range) -> Iterator[Batch]:
        """The batches of these numbers, in order."""


class StoreLoader(GlobalBatchLoader[ActivationBatch]):
    """Batches of a store: rows in order, or any rows of a split that fits into memory.

    In order, every batch is one read from disk. Otherwise rows are gathered from the memory map,
    once the kernel was asked to read the split from beginning to end.

    Args:
        store: where from.
        split: which of its splits.
        sampler: the order.
        prefetch: whether a thread reads batches ahead of their use.
        device: where batches are used.
    """

    def __init__(
        self,
        store: ActivationStore,
        split: str,
        sampler: GlobalBatches,
        prefetch: bool = True,
        device: torch.device = _CPU,
    ) -> None:
        super().__init__(sampler, prefetch, device)
        self._store, self._split = store, split

    def _load(self, numbers: range) -> Iterator[ActivationBatch]:
        read = self._gathered if self.sampler.shuffle else self._in_order
        if self.sampler.shuffle:
            self._store.column(self._split, "x").will_need(0, self._store.rows(self._split))
        for number in numbers:
            x, label, sample = read(self.sampler.rows(number))
            size = self.sampler.global_size(number)
            yield ActivationBatch(sent(x, self._device).float(), label, sample, size)

    def _gathered(self, rows: Tensor) -> Rows:
        return self._store.gather(self._split, rows)

    def _in_order(self, rows: Tensor) -> Rows:
        first, stop = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
        columns = (self._store.column(self._split, name) for name in Rows._fields)
        return Rows(*(column.read(first, stop) for column in columns))


class InputLoader(GlobalBatchLoader[InputBatch]):
    """Batches of a map-style dataset of `(input, label)`, read by worker processes if wanted.

    Args:
        dataset: the samples.
        sampler: the order.
        num_workers: worker processes; 0 reads in this one.
    """

    def __init__(self, dataset: Dataset, sampler: GlobalBatches, num_workers: int = 0) -> None:
        super().__init__(sampler)
        self._dataset, self._num_workers = _Numbered(dataset), num_workers
        self._empty: Tensor | None = None

    def _load(self, numbers: range) -> Iterator[InputBatch]:
        if self._empty is None:
            # the shape of a share without samples, which a last batch may have on some ranks
            self._empty = default_collate([self._dataset[0][0]])[:0]
        sampler = self.sampler
        loader = DataLoader(
            self._dataset,
            batch_sampler=(sampler.rows(number).tolist() for number in numbers),
            num_workers=self._num_workers,
            collate_fn=partial(_collate, empty=self._empty),
            # its own: otherwise every pass draws a seed from the global random state
            generator=torch.Generator().manual_seed(sampler.seed + sampler.epoch),
        )
        for number, (inputs, label, sample) in zip(numbers, loader, strict=True):
            yield InputBatch(inputs, label, sample, sampler.global_size(number))


def taken(x: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Rows `rows` of `x`, float32 on `device`, in the dtype of `x` until they are there."""
    if x.device == device:
        return x.index_select(0, rows).float()
    pinned = torch.empty(len(rows), *x.shape[1:], dtype=x.dtype, pin_memory=True)
    return sent(torch.index_select(x, 0, rows, out=pinned), device).float()


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`, without waiting for the copy; `x` itself where it is there already."""
    if x.device == device:
        return x
    return (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)


class _Numbered(Dataset[tuple[Any, int, int]]):
    """`(input, label)` -> `(input, label, index)`."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        value, label = self._dataset[index]
        return value, int(label), index


def _collate(items: list[tuple[Any, int, int]], empty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not items:
        return empty, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    values, labels, samples = zip(*items, strict=True)
    return default_collate(list(values)), torch.tensor(labels), torch.tensor(samples)
