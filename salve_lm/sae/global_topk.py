"""Batch-top-k and matryoshka whose k is that of the global batch, whatever the number of ranks.

SAELens' classes take `k * rows` latents of the batch they see, and move `topk_threshold` by the
smallest of them. Under DDP each rank would then choose its own k and drift from the others (the
threshold is a buffer, which DDP overwrites with rank 0's). Here both come from the global batch;
with one process these are SAELens' own classes, value for value.
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

from salve_lm.sae import ranks


class GlobalBatchTopK(BatchTopK):
    """Keep the `int(k * n_global)` largest activations of the global batch.

    Attributes:
        n_global: rows of the global batch; 0 means that of one process, the rows at hand.
        empty: this rank has no rows: its input is a stand-in that must not take part.
    """

    n_global: int = 0
    empty: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """Activations [n, d_sae] with all but the kept ones zero."""
        if ranks.world_size() == 1 or self.n_global == 0:
            return super().forward(x)
        acts = x.relu()
        if self.empty:
            # not zeros_like: the encoder must stay in the graph, or DDP waits for its gradient
            acts = acts * 0
        keep = int(self.k * self.n_global)
        if keep == 0:
            return acts * 0
        mine = acts.detach().flatten()
        largest = mine.new_zeros(keep)
        n_mine = min(keep, mine.numel())
        largest[:n_mine] = torch.topk(mine, n_mine, sorted=False).values
        # every rank sends `keep` values, so the k-th of them all is that of the whole batch
        kth = torch.topk(ranks.gather_equal(largest), keep, sorted=False).values.min()
        return acts * (acts >= kth)


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
