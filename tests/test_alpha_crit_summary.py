"""Observed thresholds, summaries and rank agreement."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from salve_lm.alpha_crit import (
    observed,
    rank_agreement,
    rank_agreements,
    summarise,
    summarise_by_class,
)
from salve_lm.errors import BadConfig, NotFinite, ShapeMismatch

INF, NAN = math.inf, math.nan


def test_observed_reads_the_first_crossing_of_each_kind() -> None:
    found = observed(
        [0, 1, 2, 4, 8], [0.96, 0.7, 0.48, 0.05, 0.6], [5, 2, 0, -1, 3], baseline=0.96, chance=0.1
    )
    assert (found.half_accuracy, found.below_chance, found.logit_below_zero) == (2, 4, 4)
    assert found.alphas == (0, 1, 2, 4, 8)
    assert found.accuracy == (0.96, 0.7, 0.48, 0.05, 0.6)
    assert found.median_logit == (5, 2, 0, -1, 3)


def test_observed_never_makes_a_threshold_up() -> None:
    found = observed([0, 1], [0.9, 0.5], [3, 0], baseline=0.9, chance=0.1)
    assert (found.half_accuracy, found.below_chance, found.logit_below_zero) == (INF, INF, INF)
    assert observed([], [], [], 0.9, 0.1).half_accuracy == INF


def test_observed_bad_sweeps() -> None:
    with pytest.raises(BadConfig, match="2 alphas"):
        observed([0, 1], [1, 1, 1], [1, 1], 1, 0.1)
    with pytest.raises(BadConfig, match="ascending"):
        observed([0, 2, 1], [1, 1, 1], [1, 1, 1], 1, 0.1)
    with pytest.raises(NotFinite, match="median logit"):
        observed([0, 1], [1, 1], [1, NAN], 1, 0.1)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
@settings(deadline=None)
def test_quartiles_equal_numpy_where_all_are_finite(values: list[float]) -> None:
    found = summarise(torch.tensor(values, dtype=torch.float64))
    assert (found.q25, found.median, found.q75) == pytest.approx(
        tuple(np.quantile(values, [0.25, 0.5, 0.75])), rel=1e-12
    )
    assert (found.no_root_share, found.left_out_share, found.n) == (0, 0, len(values))


def test_no_root_is_the_top_of_the_distribution_and_never_a_number() -> None:
    found = summarise(torch.tensor([1.0, INF, 2.0, NAN, INF]))
    assert (found.q25, found.median, found.q75) == (1.75, INF, INF)
    assert found.no_root_share == 0.5
    assert found.left_out_share == pytest.approx(0.2)
    assert found.n == 4
    assert summarise(torch.tensor([1.0, INF, INF])).q25 == INF


def test_summary_of_nothing() -> None:
    found = summarise(torch.tensor([NAN, NAN]))
    assert math.isnan(found.median)
    assert (found.n, found.left_out_share) == (0, 1.0)
    assert math.isnan(summarise(torch.empty(0)).left_out_share)


def test_summaries_by_class() -> None:
    alpha, label = torch.tensor([1.0, 3.0, INF, NAN]), torch.tensor([0, 0, 1, 1])
    found = summarise_by_class(alpha, label, ["church", "tench", "empty"])
    assert list(found) == ["church", "tench", "empty"]
    assert found["church"].median == 2
    assert found["tench"].no_root_share == 1
    assert found["empty"].n == 0
    with pytest.raises(BadConfig, match="class names"):
        summarise_by_class(alpha, label, ["church"])
    with pytest.raises(ShapeMismatch, match="labels"):
        summarise_by_class(alpha, label[:2], ["church"])
    with pytest.raises(ShapeMismatch, match="one class"):
        summarise(torch.ones(2, 2))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=40))
@settings(deadline=None)
def test_rank_agreement_equals_scipy_with_ties(pairs: list[tuple[int, int]]) -> None:
    a, b = (list(map(float, v)) for v in zip(*pairs, strict=True))
    found = rank_agreement(torch.tensor(a), torch.tensor(b))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_rank_agreement_ties_samples_without_root_and_drops_those_left_out() -> None:
    a = torch.tensor([1.0, 2.0, INF, INF, NAN, 5.0])
    b = torch.tensor([10.0, 20.0, 99.0, 99.0, 1.0, 30.0])
    assert rank_agreement(a, b) == pytest.approx(1.0)
    assert math.isnan(rank_agreement(a[:1], b[:1]))
    with pytest.raises(ShapeMismatch, match="same samples"):
        rank_agreement(a, b[:3])


def test_rank_agreements_of_all_pairs() -> None:
    t = torch.arange(5).double()
    found = rank_agreements({"linear": t, "exact": t**2, "flip": -t})
    assert set(found) == {("linear", "exact"), ("linear", "flip"), ("exact", "flip")}
    assert found["linear", "exact"] == pytest.approx(1)
    assert found["exact", "flip"] == pytest.approx(-1)
