"""Comparing two models on the same problems (METHODS 7).

Proportions: Clopper-Pearson bounds, two-proportion z, exact McNemar. Any paired values: bootstrap
interval, t and Wilcoxon tests. Holm's correction over subjects.

Two models that answer the same problems are paired: exact McNemar and the paired bootstrap are the
honest tests for them. The two-proportion z is there because papers report it. Differences are
second minus first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from salve_lm.errors import BadConfig, ShapeMismatch


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class ZTest(NamedTuple):
    """z of second minus first, and its two-sided p."""

    z: float
    p: float


class PairedTest(NamedTuple):
    """Two-sided p of no difference: by Student's t of the mean, by Wilcoxon's signed ranks."""

    t: float
    t_p: float
    wilcoxon_p: float


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
    _check_confidence(confidence)
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


def pairs_needed(confidence: float = 0.95) -> int:
    """Fewest pairs from which an interval of this confidence can mean anything.

    With fewer, not even differences that all have one sign reach p <= 1 - confidence in the
    two-sided sign test: 2 * 0.5^n. 6 at 95 %, 8 at 99 %.
    """
    _check_confidence(confidence)
    return math.ceil(round(1 - math.log2(1 - confidence), 9))


def paired_bootstrap(
    first: Tensor,
    second: Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the mean of second - first, resampling problems.

    Args:
        first, second: values [n] of the same problems in the same order; bool counts as 0 and 1.
        confidence: of the two-sided interval.
        resamples: of the n problems, drawn with replacement.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        ShapeMismatch: not the same problems.
        BadConfig: too few problems for an interval of this confidence, or NaN among the values.
    """
    difference = _paired(first, second)
    n, needed = len(difference), pairs_needed(confidence)
    if n < needed:
        raise BadConfig(
            f"{n} problem(s) are too few for an interval at {confidence:.0%}: it needs "
            f"{needed}. Use more problems, or a lower confidence."
        )
    if resamples < 100:
        raise BadConfig(f"{resamples} resamples are too few for an interval; use 1000 or more.")
    import numpy as np

    generator = np.random.default_rng(seed)
    values, counts = np.unique(difference.numpy(), return_counts=True)
    if len(values) <= 16:
        # right or wrong: only how often each difference is drawn matters
        means = generator.multinomial(n, counts / n, size=resamples) @ values / n
    else:
        whole, step = difference.numpy(), max(1, 2**22 // n)
        means = np.concatenate(
            [
                whole[generator.integers(0, n, (min(step, resamples - done), n))].mean(axis=1)
                for done in range(0, resamples, step)
            ]
        )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def paired_tests(first: Tensor, second: Tensor) -> PairedTest:
    """t test and Wilcoxon signed-rank test of two values [n] of the same problems.

    Without any difference p = 1; both are NaN of a single problem.

    Raises:
        ShapeMismatch: not the same problems.
        BadConfig: NaN among the values.
    """
    difference = _paired(first, second)
    if not difference.any():
        return PairedTest(0.0, 1.0, 1.0)
    if len(difference) < 2:
        return PairedTest(math.nan, math.nan, math.nan)
    from scipy.stats import ttest_1samp, wilcoxon

    d = difference.numpy()
    if bool((difference == difference[0]).all()):
        # scipy divides by the rounding error of a spread that is zero
        t = math.copysign(math.inf, d[0])
        return PairedTest(t, 0.0, float(wilcoxon(d).pvalue))
    test = ttest_1samp(d, 0.0)
    return PairedTest(float(test.statistic), float(test.pvalue), float(wilcoxon(d).pvalue))


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm (1979) over the family `p`; NaN stays NaN and does not count.

    The k-th smallest of m is multiplied by m - k + 1, but never below the one before it.
    The same as statsmodels' `multipletests(method="holm")`, of which one call takes 60 ms.

    Raises:
        BadConfig: a value that is no p-value.
    """
    known = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    if any(not 0 <= value <= 1 for value, _ in known):
        raise BadConfig(f"p-values lie between 0 and 1; got {list(p)}.")
    adjusted, largest = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        adjusted[i] = largest
    return adjusted


def _paired(first: Tensor, second: Tensor) -> Tensor:
    """second - first in float64 [n]."""
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ShapeMismatch(
            f"{tuple(first.shape)} against {tuple(second.shape)} values; "
            "pass those of the same problems [n], in the same order."
        )
    difference = second.double() - first.double()
    if not bool(difference.isfinite().all()):
        raise BadConfig(
            "NaN or infinity among the values to compare; look for it in the rows of the results."
        )
    return difference.cpu()


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise BadConfig(f"confidence is {confidence}; it must lie between 0 and 1, such as 0.95.")


def _check_count(successes: int, n: int) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise BadConfig(
            f"{successes} of {n} is no proportion: it needs 0 <= successes <= n, n > 0."
        )
