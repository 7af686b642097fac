"""Explained variance of a reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class ExplainedVariance(Metric):
    """1 - SSE / SST over everything seen, with SST measured from the mean of x, not from zero.

    SSE = sum over rows of |x_hat - x|^2, SST = sum over rows of |x - mean|^2. Sums are float64 and
    add up over batches and ranks, so the result does not depend on how rows were divided. NaN
    before any row and where x does not vary.

    Args:
        d_in: width of the activations.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    n: Tensor
    sse: Tensor
    sum_x: Tensor
    sum_x2: Tensor

    def __init__(self, d_in: int) -> None:
        super().__init__()
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("n", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("sse", zero.clone(), dist_reduce_fx="sum")
        self.add_state("sum_x", torch.zeros(d_in, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum_x2", zero.clone(), dist_reduce_fx="sum")

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add rows of activations and their reconstructions, both [n, d_in]."""
        x, x_hat = x.double(), x_hat.double()
        self.n += x.shape[0]
        # not in place: a module cast to half precision has cast these states, empty, with it
        self.sse = self.sse.double() + (x_hat - x).square().sum()
        self.sum_x = self.sum_x.double() + x.sum(0)
        self.sum_x2 = self.sum_x2.double() + x.square().sum()

    def compute(self) -> Tensor:
        """The explained variance [], at most 1 and without a lower bound."""
        sst = self.sum_x2 - self.sum_x.square().sum() / self.n
        # what float64 leaves of a constant input is rounding, not variance
        constant = sst <= 1e-12 * self.sum_x2
        return torch.where(constant, torch.nan, 1 - self.sse / sst).float()
