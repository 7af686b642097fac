"""Thresholds of an evaluation, sample by sample, while its batches pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from salve_lm.alpha_crit import ClassFlip
from salve_lm.alpha_crit.flip import summarised
from salve_lm.callbacks.head_samples import HeadReader, first_of_each, linear_head

PENDING_BYTES = 1 << 27
"""Of inputs that wait to be worked on together: one batch has too few samples of each class."""


class Thresholds(NamedTuple):
    """Thresholds of the samples of one class, [n] each; see `salve_lm.alpha_crit`."""

    by_definition: dict[str, Tensor]
    flip: ClassFlip


class Compute(NamedTuple):
    """One edit: the class whose samples it is about, and the thresholds of inputs [n, d_in]."""

    target: int
    thresholds: Callable[[Tensor], Thresholds]


class _Found(NamedTuple):
    """Of some samples of one class: their places in this rank's order, and what was found."""

    place: Tensor
    alpha: Tensor  # [n, definitions]
    returns: Tensor


class ThresholdCapture(HeadReader):
    """Keeps the thresholds of every sample, and not its inputs.

    Memory: `PENDING_BYTES` of inputs, and for each sample and edit about its class 8 bytes a
    definition and 9 more; so nothing that grows with samples times the width of the layer.

    Args:
        trainer: the one that evaluates.
        pl_module: a `StudiedModel` with a linear final layer.
        who: the callback, for messages.
        prepare: gives the edits, when the first samples are there.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        who: str,
        prepare: Callable[[], Sequence[Compute]],
    ) -> None:
        super().__init__(trainer, pl_module, who)
        self._prepare = prepare
        self._edits: Sequence[Compute] | None = None
        width = linear_head(self._studied, who).in_features
        # untouched memory costs nothing: small evaluations use little of it
        self._x = torch.empty(max(1, PENDING_BYTES // (4 * width)), width)
        self._label = torch.empty(len(self._x), dtype=torch.int64)
        self._waiting = self._done = 0
        self._finite = True
        self._found: list[list[_Found]] = []
        self._definitions: dict[int, tuple[str, ...]] = {}

    def take(self, batch: Any, dataloader_idx: int = 0) -> None:
        """Take in what the pass over `batch`, which has just ended, read."""
        samples = self.read(batch, dataloader_idx)
        if samples is None:
            return
        self._finite &= bool(torch.isfinite(samples.x).all())
        first = 0
        while first < len(samples.x):
            n = min(len(samples.x) - first, len(self._x) - self._waiting)
            room = slice(self._waiting, self._waiting + n)
            self._x[room] = samples.x[first : first + n]
            self._label[room] = samples.label[first : first + n]
            self._waiting, first = self._waiting + n, first + n
            if self._waiting == len(self._x):
                self._work()

    def gather(self, loaders: Any) -> list[Thresholds]:
        """The thresholds of each edit, on every rank, each sample once.

        Args:
            loaders: the loaders that were run, as the trainer holds them.

        Raises:
            NotFinite: NaN or infinity in the inputs.
        """
        self.close()
        self._work()
        keys = self.keys(loaders)
        mine = [self._merged(parts, keys) for parts in self._found]
        ranks = self.gathered((self._finite, self._definitions, mine))
        if not all(finite for finite, _, _ in ranks):
            raise self.not_finite()
        names = {i: found for _, definitions, _ in ranks for i, found in definitions.items()}
        return [
            self._whole(names.get(i, ("flip",)), [found[i] for _, _, found in ranks])
            for i in range(len(mine))
        ]

    def _work(self) -> None:
        if self._edits is None:
            self._edits = self._prepare()
            self._found = [[] for _ in self._edits]
        x, label = self._x[: self._waiting], self._label[: self._waiting]
        for i, edit in enumerate(self._edits):
            own = (label == edit.target).nonzero().flatten()
            if not len(own) or not self._finite:
                continue
            found = edit.thresholds(x[own])
            self._definitions[i] = tuple(found.by_definition)
            alpha = torch.stack([a.double() for a in found.by_definition.values()], dim=1)
            self._found[i].append(_Found(own + self._done, alpha, found.flip.returns))
        self._done, self._waiting = self._done + self._waiting, 0

    @staticmethod
    def _merged(parts: Sequence[_Found], keys: Tensor) -> _Found | None:
        """All of one edit, with keys in place of places."""
        if not parts:
            return None
        place, alpha, returns = (torch.cat(column) for column in zip(*parts, strict=True))
        return _Found(keys[place], alpha, returns)

    @staticmethod
    def _whole(definitions: Sequence[str], ranks: Sequence[_Found | None]) -> Thresholds:
        there = [found for found in ranks if found is not None]
        if not there:
            none = torch.empty(0, dtype=torch.float64)
            flip = summarised(none, none.bool(), none.bool())
            return Thresholds(dict.fromkeys(definitions, none), flip)
        keys, alpha, returns = (torch.cat(column) for column in zip(*there, strict=True))
        once = first_of_each(keys)
        columns = dict(zip(definitions, alpha[once].unbind(1), strict=True))
        first = columns["flip"]
        return Thresholds(columns, summarised(first, ~first.isnan(), returns[once]))
