"""How many latents are active, how many never are, and how many carry the reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def participation_ratio(z: Tensor) -> Tensor:
    """(sum_l |z_l|)^2 / sum_l z_l^2 per row [n], from 1 to d_sae; 0 for a row of zeros.

    The number of latents that share a row's activation evenly: what L0 means where no latent is
    exactly zero.
    """
    z = z.double()
    l1, l2 = z.abs().sum(-1), z.square().sum(-1)
    return torch.where(l2 > 0, l1.square() / l2, 0.0)


class L0(Metric):
    """Mean number of active latents per row: those with |z_l| > `threshold`.

    Args:
        threshold: 0 counts what is not exactly zero. Linear autoencoders have no exact zeros: give
            a threshold, and report it.
    """

    is_differentiable = False
    full_state_update = False

    n: Tensor
    active: Tensor

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = threshold
        self.add_state("n", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("active", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, z: Tensor) -> None:
        """Add rows of latents [n, d_sae]."""
        self.n += z.shape[0]
        self.active += (z.abs() > self.threshold).sum()

    def compute(self) -> Tensor:
        """The mean count []; NaN before any row."""
        return (self.active.double() / self.n).float()


class DeadFraction(Metric):
    """Share of latents that were active (|z_l| > `threshold`) in none of the rows seen.

    Args:
        d_sae: number of latents.
        threshold: as in `L0`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    n: Tensor
    fired: Tensor

    def __init__(self, d_sae: int, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = threshold
        self.add_state("n", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("fired", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, z: Tensor) -> None:
        """Add rows of latents [n, d_sae]."""
        self.n += z.shape[0]
        self.fired += (z.abs() > self.threshold).sum(0)

    def compute(self) -> Tensor:
        """The dead share [], in [0, 1]; NaN before any row."""
        share = (self.fired == 0).double().mean()
        return torch.where(self.n > 0, share, torch.nan).float()


class ParticipationRatio(Metric):
    """Mean of `participation_ratio` over rows."""

    is_differentiable = False
    full_state_update = False

    n: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("n", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, z: Tensor) -> None:
        """Add rows of latents [n, d_sae]."""
        self.n += z.shape[0]
        # not in place: a module cast to half precision has cast this state, empty, with it
        self.total = self.total.double() + participation_ratio(z).sum()

    def compute(self) -> Tensor:
        """The mean ratio []; NaN before any row."""
        return (self.total / self.n).float()
