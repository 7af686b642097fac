"""Loaders over global batches: of stored activations, and of inputs for on-the-fly activations.

Not subclasses of `torch.utils.data.DataLoader`: Lightning leaves them alone, where it would replace
a DataLoader's sampler under a distributed strategy (padding with duplicates), and it stores their
`state_dict` in checkpoints. Their iterators do nothing before the first batch is asked for, because
Lightning makes them before it announces the epoch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from salve_lm.activations.batch import ActivationBatch
from salve_lm.activations.sampler import GlobalBatches, Position
from salve_lm.activations.store import ActivationStore

Batch = TypeVar("Batch")


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
    """What the two loaders share: length, order, position.

    Attributes:
        sampler: the order; its name is what Lightning looks for to announce epochs.
        batch_sampler: the same; Lightning expects it of everything that has a sampler.
    """

    def __init__(self, sampler: GlobalBatches) -> None:
        self.sampler = self.batch_sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        self.sampler.begin()
        first = self.sampler.position
        for number, batch in enumerate(self._load(range(first, len(self.sampler))), start=first):
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
    """Batches gathered from the memory map of a store."""

    def __init__(self, store: ActivationStore, split: str, sampler: GlobalBatches) -> None:
        super().__init__(sampler)
        self._store, self._split = store, split

    def _load(self, numbers: range) -> Iterator[ActivationBatch]:
        for number in numbers:
            rows = self._store.gather(self._split, self.sampler.rows(number))
            yield ActivationBatch(*rows, n_global=self.sampler.global_size(number))


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
