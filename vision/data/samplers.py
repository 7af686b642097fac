"""Orders of samples: shuffled as a pure function of (seed, epoch), or each sample exactly once."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, DistributedSampler, default_collate


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

    Attributes:
        skip: samples of this rank to leave out at the beginning of a pass.
    """

    def __init__(self, dataset: Sized, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(cast(Any, dataset), world, rank, shuffle=True, seed=seed, drop_last=True)
        self._n = len(dataset)
        self.skip = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self._n, generator=generator)
        draws = torch.randint(2**62, (self._n,), generator=generator)
        mine = slice(self.rank, len(self) * self.num_replicas, self.num_replicas)
        drawn = zip(order[mine].tolist(), draws[mine].tolist(), strict=True)
        return islice(drawn, self.skip, None)

    def __len__(self) -> int:
        return self._n // self.num_replicas


class ShuffledLoader(DataLoader):
    """A DataLoader of `ShuffledDraws` that goes on within an epoch: checkpoints hold its place."""

    def __init__(self, dataset: Any, **options: Any) -> None:
        super().__init__(dataset, **options)
        self._epoch = self._position = self._first = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # when the first batch is asked for: only then has Lightning announced the epoch
        draws = cast(ShuffledDraws, self.sampler)
        first = self._first if self._epoch == draws.epoch else 0
        self._epoch, self._first = draws.epoch, 0
        draws.skip = first * cast(int, self.batch_size)
        for number, batch in enumerate(super().__iter__(), start=first + 1):
            self._position = number
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches handed out in it."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on with the next batch."""
        self._epoch, self._first = state["epoch"], state["position"]


class EachOnce(DistributedSampler):
    """The samples in order, shared out over ranks without the duplicates that pad the base class.

    Ranks may get one sample more or fewer than each other, which is harmless where nothing is
    exchanged between ranks within an epoch (validation, test, prediction). Use `EachOnceLoader`.
    """

    def __init__(self, dataset: Sized, rank: int = 0, world: int = 1) -> None:
        super().__init__(cast(Any, dataset), world, rank, shuffle=False)
        self._n = len(dataset)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self._n, self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, self._n, self.num_replicas))


class EachOnceLoader(DataLoader):
    """A DataLoader of `EachOnce` shares; one without samples has a batch without samples.

    Lightning skips a stage for which it has no batch, and the other ranks would wait for this one
    where metrics are put together.
    """

    def __len__(self) -> int:
        return max(super().__len__(), 1)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if super().__len__():
            yield from super().__iter__()
        else:
            yield [part[:0] for part in default_collate([self.dataset[0]])]
