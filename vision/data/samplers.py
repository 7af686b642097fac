"""Orders of samples: shuffled as a pure function of (seed, epoch), or each sample exactly once."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, cast

import torch
from torch.utils.data import DistributedSampler


class ShuffledDraws(DistributedSampler):
    """Shuffled indices, each with a number that seeds the sample's augmentation.

    Order and numbers depend on seed and epoch alone: not on worker processes, not on the global
    random state. All ranks get equally many; the few samples left over by the division wait for
    another epoch. (A DistributedSampler, because Lightning replaces any other under DDP.)

    Args:
        dataset: its length is what counts.
        seed: of the order.
        rank: of this process.
        world: number of processes.
    """

    def __init__(self, dataset: Sized, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(cast(Any, dataset), world, rank, shuffle=True, seed=seed, drop_last=True)
        self._n = len(dataset)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self._n, generator=generator)
        draws = torch.randint(2**62, (self._n,), generator=generator)
        mine = slice(self.rank, len(self) * self.num_replicas, self.num_replicas)
        return iter(zip(order[mine].tolist(), draws[mine].tolist(), strict=True))

    def __len__(self) -> int:
        return self._n // self.num_replicas


class EachOnce(DistributedSampler):
    """The samples in order, shared out over ranks without the duplicates that pad the base class.

    Ranks may get one sample more or fewer than each other, which is harmless where nothing is
    exchanged between ranks within an epoch (validation, test, prediction).
    """

    def __init__(self, dataset: Sized, rank: int = 0, world: int = 1) -> None:
        super().__init__(cast(Any, dataset), world, rank, shuffle=False)
        self._n = len(dataset)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self._n, self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, self._n, self.num_replicas))
