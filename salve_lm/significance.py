"""Tests for proportions (METHODS 7): Clopper-Pearson bounds, two-proportion z, exact McNemar.

Two models that answer the same problems are paired: exact McNemar is the honest test for them.
The two-proportion z is there because papers report it. Differences are second minus first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from salve_lm.errors import BadConfig, ShapeMismatch


class Interval(NamedTuple):
    """A confidence interval of a proportion."""

    low: float
    high: float


class ZTest(NamedTuple):
    """z of second minus first, and its two-sided p."""

    z: float
    p: float


class McNemarTest(NamedTuple):
    """Two-sided exact p, and the pairs it rests on.

    only_first: pairs right in the first and wrong in the second.
    only_second: the other way round; the net gain is only_second - only_first.
    """

    p: float
    only_first: int
    only_second: int


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Exact two-sided bounds of a proportion; also for 0 and n (0 of 150 is at most 2.4 %)."""
    _check_count(successes, n)
    if not 0 < confidence < 1:
        raise BadConfig(f"confidence is {confidence}; it must lie between 0 and 1, such as 0.95.")
    from scipy.stats import binomtest

    bounds = binomtest(successes, n).proportion_ci(confidence, method="exact")
    return Interval(float(bounds.low), float(bounds.high))


def two_proportion_z(
    first: int, n_first: int, second: int, n_second: int, *, pooled: bool = False
) -> ZTest:
    """Wald (unpooled) or pooled z of two independent proportions.

    Args:
        first, n_first: successes and trials before.
        second, n_second: successes and trials after.
        pooled: estimate the variance from both together, as under equality.
    """
    _check_count(first, n_first)
    _check_count(second, n_second)
    p1, p2 = first / n_first, second / n_second
    if pooled:
        p = (first + second) / (n_first + n_second)
        variance = p * (1 - p) * (1 / n_first + 1 / n_second)
    else:
        variance = p1 * (1 - p1) / n_first + p2 * (1 - p2) / n_second
    if variance == 0:
        if p1 == p2:
            return ZTest(0.0, 1.0)
        raise BadConfig(
            f"{first}/{n_first} against {second}/{n_second} has no Wald variance. "
            "Use pooled=True, or mcnemar_exact for paired answers."
        )
    from scipy.stats import norm

    z = (p2 - p1) / math.sqrt(variance)
    return ZTest(z, float(2 * norm.sf(abs(z))))


def mcnemar_exact(only_first: int, only_second: int) -> McNemarTest:
    """Exact two-sided McNemar test from the discordant pairs: binomial with probability 1/2.

    p = 1 without any discordant pair.
    """
    if only_first < 0 or only_second < 0:
        raise BadConfig(f"Counts of pairs cannot be negative: {only_first}, {only_second}.")
    from scipy.stats import binomtest

    n = only_first + only_second
    p = float(binomtest(only_first, n).pvalue) if n else 1.0
    return McNemarTest(p, only_first, only_second)


def mcnemar_of_answers(first: Tensor, second: Tensor) -> McNemarTest:
    """`mcnemar_exact` of two bool tensors [n]: which of the same n problems each got right."""
    if first.shape != second.shape or first.ndim != 1:
        raise ShapeMismatch(
            f"{tuple(first.shape)} against {tuple(second.shape)} answers; "
            "pass those to the same problems [n], in the same order."
        )
    if first.dtype != torch.bool or second.dtype != torch.bool:
        raise BadConfig("Answers must be boolean (right or wrong); compare scores first.")
    return mcnemar_exact(int((first & ~second).sum()), int((~first & second).sum()))


def _check_count(successes: int, n: int) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise BadConfig(
            f"{successes} of {n} is no proportion: it needs 0 <= successes <= n, n > 0."
        )
