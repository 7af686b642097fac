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
    mcnemar_exact,
    mcnemar_of_answers,
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
