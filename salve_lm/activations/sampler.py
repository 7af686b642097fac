"""The order in which samples are drawn: equal on any number of ranks, exact after a resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TypedDict

import torch
from torch import Tensor

from salve_lm.errors import BadConfig


class Position(TypedDict):
    """State of a `GlobalBatches`: how far it got, and what its order was made from."""

    epoch: int
    position: int
    n: int
    batch_size: int
    seed: int
    shuffle: bool


class GlobalBatches:
    """Batches of indices, cut for the whole world and shared out among its ranks.

    The order is a pure function of (seed, epoch). Every rank sees the same number of batches; rank
    r gets a contiguous share of each, the last one included, whose shares differ by one at most and
    may be empty. So no index is drawn twice or dropped, whatever `n`, `batch_size` and `world`, and
    one process and many walk through the same global batches.

    Iterating starts a new pass, except right after `load_state_dict`, where it goes on. An epoch is
    fixed only when its first batch is drawn: Lightning makes its iterator before it announces the
    epoch with `set_epoch`.

    Args:
        n: number of samples.
        batch_size: size of a *global* batch, summed over ranks.
        seed: of the order.
        rank: this process.
        world: number of processes.
        shuffle: draw in a new random order each epoch, or always from 0 to n - 1.

    Raises:
        BadConfig: sizes below 1, or a rank outside of the world.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1,
        shuffle: bool = True,
    ) -> None:  # fmt: skip
        if n < 1 or batch_size < 1 or not 0 <= rank < world:
            raise BadConfig(
                f"Cannot draw batches of {batch_size} from {n} samples on rank {rank} of {world}: "
                "n and batch_size must be at least 1, and rank below world."
            )
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world, self.shuffle = rank, world, shuffle
        self.epoch = 0
        self.position = 0
        self._announced = False
        self._resumed = False
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        """This rank's indices of each batch that is left, int64."""
        self.begin()
        for batch in range(self.position, len(self)):
            rows = self.rows(batch)
            self.drawn(batch)
            yield rows

    def global_size(self, batch: int) -> int:
        """Samples in `batch`, summed over ranks."""
        return min(self.batch_size, self.n - batch * self.batch_size)

    def rows(self, batch: int) -> Tensor:
        """This rank's share of `batch` of the present epoch: indices, int64, possibly none."""
        size = self.global_size(batch)
        start, stop = size * self.rank // self.world, size * (self.rank + 1) // self.world
        return self.global_rows(batch)[start:stop]

    def global_rows(self, batch: int) -> Tensor:
        """All ranks' indices of `batch` of the present epoch, int64."""
        start = batch * self.batch_size
        stop = start + self.global_size(batch)
        if not self.shuffle:
            return torch.arange(start, stop)
        if self._order is None or self._order[0] != self.epoch:
            self._order = (self.epoch, _permutation(self.n, self.seed, self.epoch))
        return self._order[1][start:stop]

    def begin(self) -> None:
        """Start a pass at its first batch, or where `load_state_dict` left it."""
        ended = self.position >= len(self) or (self.position > 0 and not self._resumed)
        if ended and not self._announced:
            self.epoch, self.position = self.epoch + 1, 0
        self._announced = False

    def drawn(self, batch: int) -> None:
        """Note that `batch` was handed out (not merely prefetched)."""
        self.position = batch + 1
        self._resumed = False

    def set_epoch(self, epoch: int) -> None:
        """Hear from Lightning which epoch begins; right after a resume, the one under way goes on.

        With `max_steps`, a plain Lightning resume can announce epochs from which it draws nothing:
        train with `salve_lm.fault_tolerance.exact_resume.ExactResume`.
        """
        if not self._resumed or epoch != self.epoch:
            self.epoch, self.position = epoch, 0
        self._announced = True

    def state_dict(self) -> Position:
        """What `load_state_dict` needs to go on with the next batch; equal on all ranks."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "n": self.n,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state: Position) -> None:
        """Go on where `state` was taken, on any number of ranks.

        Raises:
            BadConfig: `state` belongs to an order made from other data or options.
        """
        own = self.state_dict()
        differing = [
            f"{name} (was {state[name]}, is {own[name]})"
            for name in ("n", "batch_size", "seed", "shuffle")
            if state[name] != own[name]
        ]
        if differing:
            raise BadConfig(
                f"The checkpoint cannot be resumed exactly: {', '.join(differing)}. "
                "Restore these options, or start a new run without --ckpt_path."
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._announced, self._resumed = False, True


def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    # hashed: seed 0 at epoch 1 must not be the order of seed 1 at epoch 0
    digest = hashlib.sha256(f"{seed}|{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(n, generator=generator)
