"""Batch-top-k and matryoshka whose k is that of the global batch, whatever the number of ranks.

SAELens' classes take `k * rows` latents of the batch they see, and move `topk_threshold` by the
smallest of them. Under DDP each rank would then choose its own k and drift from the others (the
threshold is a buffer, which DDP overwrites with rank 0's). Here both come from the global batch;
with one process and without ties these are SAELens' own classes, value for value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from torch import Tensor
from torch.nn import functional as F

from salve_lm.sae import ranks
from salve_lm.sae.sparse_products import may_look


class GlobalBatchTopK(BatchTopK):
    """Keep exactly the `int(k * n_global)` largest activations of the global batch.

    Of equal activations at the border, those that come first in the global batch are kept (by row,
    then by latent), so that any number of processes keeps the same ones. Which of them torch.topk
    keeps is not specified, and with bfloat16 or repeated tokens there are such ties in every step.

    Attributes:
        n_global: rows of the global batch; 0 means the rows at hand.
        empty: this rank has no rows: its input is a stand-in that must not take part.
    """

    n_global: int = 0
    empty: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """Activations [n, d_sae] with all but the kept ones zero."""
        acts = x.relu()
        if self.empty:
            # not zeros_like: the encoder must stay in the graph, or DDP waits for its gradient
            acts = acts * 0
        together = ranks.world_size() > 1 and self.n_global > 0
        keep = int(self.k * (self.n_global if together else acts.shape[:-1].numel()))
        kept = _largest(acts.detach().flatten(), keep, together)
        # a product, so that NaN stays NaN and is noticed
        return acts * kept.view(acts.shape)


def _largest(mine: Tensor, keep: int, together: bool) -> Tensor:
    """Which of the activations `mine` [m] are among the `keep` largest, bool [m].

    Args:
        mine: activations of this rank's rows, none negative.
        keep: how many to keep; zeros do not matter.
        together: of all ranks' activations, in order of rank, and not of these alone.
    """
    if keep == 0:
        return torch.zeros_like(mine, dtype=torch.bool)
    # one more than is kept: it says whether the border runs through equal values
    n = min(keep + 1, mine.numel())
    largest = _largest_values(mine, n)
    if together:
        sent = mine.new_full((keep + 1,), -1)
        sent[:n] = largest
        largest = torch.topk(ranks.gather_equal(sent), keep + 1, sorted=False).values
    elif n == keep:
        return torch.ones_like(mine, dtype=torch.bool)
    first_out = largest.min()
    kept = mine > first_out
    # where looking costs nothing, often there is nothing more to do
    if may_look(mine.device) and int((largest == first_out).sum()) == 1:
        return kept
    ties = mine == first_out
    counts, place = torch.stack([kept.sum(), ties.sum()])[None], 0
    if together:
        counts, place = ranks.gather_equal(counts), ranks.rank()
    left = keep - counts[:, 0].sum() - counts[:place, 1].sum()
    at = torch.nonzero_static(ties, size=keep, fill_value=-1)[:, 0]
    number = torch.arange(keep, device=mine.device)
    # one more place, for those that are not kept
    chosen = torch.where((number < left) & (at >= 0), at, mine.numel())
    return F.pad(kept, (0, 1)).index_fill_(0, chosen, True)[:-1]


def _largest_values(values: Tensor, n: int) -> Tensor:
    """The `n` largest of `values` [m], in any order."""
    part = max(1 << 22, 4 * n)
    # on a CPU topk copies all values beside 64-bit indices: four times the memory of the latents
    while values.device.type == "cpu" and values.numel() > part:
        found = [p.topk(min(n, p.numel()), sorted=False).values for p in values.split(part)]
        values = torch.cat(found)
    return torch.topk(values, n, sorted=False).values


class GlobalBatchTopKTrainingSAE(BatchTopKTrainingSAE):
    """SAELens' BatchTopK, exact under DDP."""

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """The global activation in place of SAELens' per-batch one."""
        return GlobalBatchTopK(self.cfg.k)

    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        """Moving average of the smallest kept activation of the global batch, in float64.

        In place: SAELens rebinds the buffer every step, and DDP would go on broadcasting the old
        tensor.
        """
        kept = torch.where(acts_topk > 0, acts_topk, torch.inf)
        smallest = ranks.all_reduce(kept.min().to(self.topk_threshold.dtype), "min")
        lr = self.cfg.topk_threshold_lr
        moved = (1 - lr) * self.topk_threshold + lr * smallest
        self.topk_threshold.copy_(torch.where(smallest.isinf(), self.topk_threshold, moved))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        out = super()._apply(*args, **kwargs)
        # `.to(bfloat16)` casts every float buffer; steps of 1 % of a small gap would round away
        self.topk_threshold.data = self.topk_threshold.data.double()
        return out


class GlobalMatryoshkaTrainingSAE(GlobalBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE):
    """SAELens' matryoshka BatchTopK, exact under DDP."""

    cfg: MatryoshkaBatchTopKTrainingSAEConfig
