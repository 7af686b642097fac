"""A share with its exact bounds."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from salve_lm.significance import clopper_pearson


class Proportion(NamedTuple):
    """`successes` of `n`, with two-sided 95 % Clopper-Pearson bounds.

    Of nothing (`n` 0) the share is NaN and the bounds are 0 and 1: nothing is known.
    """

    successes: int
    n: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, successes: int, n: int) -> Proportion:
        """`successes` of `n`, bounded."""
        if n == 0:
            return cls(0, 0, float("nan"), 0.0, 1.0)
        low, high = clopper_pearson(successes, n)
        return cls(successes, n, successes / n, low, high)

    @classmethod
    def of_mask(cls, mask: Tensor) -> Proportion:
        """The share of True in the bool tensor `mask`."""
        return cls.of(int(mask.sum()), mask.numel())
