"""Tests of proportions against statsmodels and the numbers in METHODS 7."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from salve_lm.errors import BadConfig, ShapeMismatch
from salve_lm.significance import (
    McNemarTest,
    ZTest,
    clopper_pearson,
    holm,
    mcnemar_exact,
    mcnemar_of_answers,
    paired_bootstrap,
    paired_tests,
    two_proportion_z,
)


def test_the_published_numbers() -> None:
    unpooled = two_proportion_z(160, 540, 213, 540)
    assert (round(unpooled.z, 3), round(unpooled.p, 5)) == (3.410, 0.00065)
    pooled = two_proportion_z(160, 540, 213, 540, pooled=True)
    assert (round(pooled.z, 3), round(pooled.p, 5)) == (3.392, 0.00069)
    assert mcnemar_exact(0, 53).p == pytest.approx(2**-52)
    assert mcnemar_exact(0, 53).p == pytest.approx(1e-16, rel=2)
    assert mcnemar_exact(107, 160).p == pytest.approx(0.0014, abs=2e-4)
    assert clopper_pearson(0, 150).high == pytest.approx(0.024, abs=5e-4)


counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts, st.sampled_from([0.8, 0.95, 0.99]))
@settings(deadline=None)
def test_clopper_pearson_equals_statsmodels(count: tuple[int, int], confidence: float) -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    expected = proportion.proportion_confint(*count, alpha=1 - confidence, method="beta")
    assert clopper_pearson(*count, confidence) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(counts, counts)
@settings(deadline=None)
def test_z_equals_statsmodels(first: tuple[int, int], second: tuple[int, int]) -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    assume(0 < first[0] < first[1] and 0 < second[0] < second[1])
    (k1, n1), (k2, n2) = first, second
    z, p = proportion.proportions_ztest([k2, k1], [n2, n1])
    assert two_proportion_z(k1, n1, k2, n2, pooled=True) == pytest.approx((z, p), abs=1e-9)
    wald = proportion.test_proportions_2indep(k2, n2, k1, n1, method="wald")
    expected = (wald.statistic, wald.pvalue)
    assert two_proportion_z(k1, n1, k2, n2) == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 80), st.integers(0, 80))
@settings(deadline=None)
def test_mcnemar_equals_statsmodels(only_first: int, only_second: int) -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    assume(only_first + only_second > 0)
    expected = tables.mcnemar([[5, only_first], [only_second, 7]], exact=True).pvalue
    assert mcnemar_exact(only_first, only_second).p == pytest.approx(min(1.0, expected))


def test_mcnemar_of_answers_counts_the_discordant_pairs() -> None:
    first = torch.tensor([True, True, True, False, False])
    second = torch.tensor([True, False, False, True, False])
    assert mcnemar_of_answers(first, second) == McNemarTest(1.0, 2, 1)
    assert mcnemar_of_answers(first, first) == McNemarTest(1.0, 0, 0)


def test_equal_extremes_are_no_difference() -> None:
    assert two_proportion_z(0, 10, 0, 20) == ZTest(0.0, 1.0)
    assert two_proportion_z(10, 10, 20, 20, pooled=True) == ZTest(0.0, 1.0)
    assert math.isfinite(two_proportion_z(0, 10, 20, 20, pooled=True).z)


def test_bad_inputs() -> None:
    with pytest.raises(BadConfig, match="pooled=True"):
        two_proportion_z(0, 10, 20, 20)
    with pytest.raises(BadConfig, match="5 of 4"):
        clopper_pearson(5, 4)
    with pytest.raises(BadConfig, match="0 of 0"):
        two_proportion_z(0, 0, 1, 2)
    with pytest.raises(BadConfig, match="confidence"):
        clopper_pearson(1, 4, 95)
    with pytest.raises(BadConfig, match="negative"):
        mcnemar_exact(-1, 2)
    with pytest.raises(BadConfig, match="boolean"):
        mcnemar_of_answers(torch.ones(3), torch.ones(3))
    with pytest.raises(ShapeMismatch, match="same problems"):
        mcnemar_of_answers(torch.ones(3) > 0, torch.ones(4) > 0)


values = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 2.0]), min_size=6, max_size=40)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(deadline=None)
def test_holm_rejects_step_by_step(p: list[float]) -> None:
    """Holm's procedure itself: at any level, go up from the smallest p until one is too large."""
    adjusted = holm(p)
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for k, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[i] * (len(p) - k) > level:
                break
            rejected.add(i)
        assert rejected == {i for i, value in enumerate(adjusted) if value <= level}


def test_holm_equals_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    for p in ([0.04, 0.01, 0.03, 0.5], [0.2, 0.2, 0.001, 1.0, 0.0, 0.02, 0.9]):
        assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])


def test_holm_leaves_gaps_alone() -> None:
    nan = float("nan")
    adjusted = holm([0.01, nan, 0.04])
    assert adjusted[0] == pytest.approx(0.02) and adjusted[2] == pytest.approx(0.04)
    assert math.isnan(adjusted[1])
    assert holm([]) == []
    with pytest.raises(BadConfig, match="between 0 and 1"):
        holm([0.5, 1.5])


@given(values, st.integers(0, 3))
@settings(deadline=None, max_examples=20)
def test_paired_bootstrap_properties(difference: list[float], seed: int) -> None:
    second = torch.tensor(difference, dtype=torch.float64)
    first = torch.zeros_like(second)
    bounds = paired_bootstrap(first, second, resamples=500, seed=seed)
    assert bounds == paired_bootstrap(first, second, resamples=500, seed=seed)
    slack = 1e-9
    assert min(difference) - slack <= bounds.low <= bounds.high <= max(difference) + slack
    mirrored = paired_bootstrap(second, first, resamples=2000, seed=seed)
    spread = float(second.std())
    assert mirrored.low == pytest.approx(-bounds.high, abs=spread / 2 + slack)
    wider = paired_bootstrap(first, second, resamples=500, seed=seed, confidence=0.6)
    assert bounds.low <= wider.low and wider.high <= bounds.high


@pytest.mark.parametrize("kind", ["answers", "losses"])
def test_paired_bootstrap_equals_scipys(kind: str) -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(200, generator=generator, dtype=torch.float64)
    second = first + 0.2 + 0.5 * torch.randn(200, generator=generator, dtype=torch.float64)
    if kind == "answers":
        first, second = first > 0, second > 0
    difference = (second.double() - first.double()).numpy()
    expected = stats.bootstrap(
        (difference,), lambda x, axis: x.mean(axis=axis), method="percentile", rng=0
    ).confidence_interval
    assert paired_bootstrap(first, second) == pytest.approx(tuple(expected), abs=0.006)


def test_the_bootstrap_covers_the_truth() -> None:
    """In about 95 of 100 samples of 60 problems."""
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for seed in range(100):
        difference = 0.3 + torch.randn(60, generator=generator)
        bounds = paired_bootstrap(torch.zeros(60), difference, resamples=400, seed=seed)
        hits += bounds.low <= 0.3 <= bounds.high
    assert 88 <= hits <= 99


def test_paired_tests_equal_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(50, generator=generator)
    second = first + 0.1 * torch.randn(50, generator=generator)
    found = paired_tests(first, second)
    t = stats.ttest_rel(second.double(), first.double())
    assert (found.t, found.t_p) == pytest.approx((t.statistic, t.pvalue))
    wilcoxon = stats.wilcoxon((second.double() - first.double()).numpy())
    assert found.wilcoxon_p == pytest.approx(wilcoxon.pvalue)
    assert paired_tests(first, first) == (0.0, 1.0, 1.0)
    assert math.isnan(paired_tests(first[:1], second[:1]).t_p)
    constant = paired_tests(torch.zeros(8), torch.ones(8))
    assert (constant.t, constant.t_p) == (math.inf, 0.0)
    assert constant.wilcoxon_p == pytest.approx(2 * 0.5**8)


def test_bad_pairs() -> None:
    few = torch.arange(5.0)
    with pytest.raises(BadConfig, match=r"5 problem.*needs 6"):
        paired_bootstrap(few, few + 1)
    with pytest.raises(BadConfig, match=r"6 problem.*99%.*needs 8"):
        paired_bootstrap(torch.arange(6.0), torch.arange(6.0), confidence=0.99)
    with pytest.raises(BadConfig, match="50 resamples"):
        paired_bootstrap(torch.arange(9.0), torch.arange(9.0), resamples=50)
    with pytest.raises(BadConfig, match="NaN"):
        paired_tests(few, few * float("nan"))
    with pytest.raises(ShapeMismatch, match="same problems"):
        paired_tests(few, few[:3])
