from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from salve_lm.errors import BadConfig
from salve_lm.specificity.judge import (
    critical_spearman,
    layer_gains,
    rank_correlations,
    smallest_p,
)


def single(values: list[float]) -> dict[tuple[int, ...], float]:
    return {(i,): v for i, v in enumerate(values)}


@settings(max_examples=25)
@given(
    scores=st.lists(st.integers(0, 4), min_size=4, max_size=5),
    seed=st.integers(0, 1000),
)
def test_equals_scipy_and_exact_permutations(scores: list[int], seed: int) -> None:
    gains = np.random.default_rng(seed).integers(0, 4, len(scores)).astype(float)
    found = rank_correlations({"s": dict(enumerate(map(float, scores)))}, single(list(gains)), 9)[0]
    if len(set(scores)) == 1 or len(set(gains)) == 1:
        assert math.isnan(found.spearman) and math.isnan(found.kendall_p)
        assert "no order" in found.words
        return
    assert found.spearman == pytest.approx(stats.spearmanr(scores, gains).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau(scores, gains).statistic)
    for statistic, p in ((stats.spearmanr, found.spearman_p), (stats.kendalltau, found.kendall_p)):
        own = abs(statistic(scores, gains).statistic)
        null = [abs(statistic(order, gains).statistic) for order in permutations(scores)]
        assert p == pytest.approx(np.mean(np.array(null) >= own - 1e-9))
    assert found.exact and found.n == len(scores)


def test_what_few_layers_permit() -> None:
    assert smallest_p(4) == pytest.approx(2 / 24)
    assert critical_spearman(4) is None
    assert critical_spearman(5) == pytest.approx(1.0)
    assert critical_spearman(6) == pytest.approx(0.886, abs=5e-4)
    perfect = rank_correlations({"s": dict(enumerate([1.0, 2, 3, 4]))}, single([1, 2, 3, 4]), 4)[0]
    assert perfect.spearman == 1 and perfect.smallest_p == pytest.approx(2 / 24)
    assert "proves nothing" in perfect.words
    five = {"s": dict(enumerate([1.0, 2, 3, 4, 5]))}
    assert "higher the gain" in rank_correlations(five, single([1, 2, 3, 4, 5]), 5)[0].words
    almost = rank_correlations(five, single([1, 2, 3, 5, 4]), 5)[0]
    assert "only the perfect order" in almost.words and almost.spearman_p > 0.05
    assert "high scores gain less" in rank_correlations(five, single([5, 4, 3, 2, 1]), 5)[0].words


def test_runs_are_sorted_by_what_they_say() -> None:
    gains = {(0,): 1.0, (2,): 2.0, (0, 1, 2, 3): 7.0, (3, 2, 1): 4.0, (0, 2): 9.0, (0, 1): 3.0}
    found = layer_gains(gains, 4)
    assert found["single"] == {(0,): 1.0, (2,): 2.0}
    assert found["all_but_one"] == {(0,): 3.0}
    assert found["windows"] == {(0, 1): 3.0, (1, 2, 3): 4.0}
    del gains[(0, 1, 2, 3)]
    assert layer_gains(gains, 4)["all_but_one"] == {}


def test_windows_are_judged_by_permuting_layers() -> None:
    scores = [0.3, 0.1, 0.7, 0.2, 0.9]
    windows = {(i, i + 1): g for i, g in enumerate([1.0, 3.0, 2.0, 5.0])}
    found = rank_correlations({"s": dict(enumerate(scores))}, windows, 5)[0]
    assert (found.kind, found.n) == ("windows", 4)
    gains = list(windows.values())

    def rho(order: tuple[float, ...]) -> float:
        means = [round((order[a] + order[b]) / 2, 12) for a, b in windows]
        return float(stats.spearmanr(means, gains).statistic)

    null = np.array([abs(rho(order)) for order in permutations(scores)])
    assert found.spearman == pytest.approx(rho(tuple(scores)))
    assert found.spearman_p == pytest.approx((null >= abs(found.spearman) - 1e-9).mean())


def test_many_layers_draw_permutations() -> None:
    generator = np.random.default_rng(0)
    scores = dict(enumerate(generator.normal(size=20)))
    gains = {(n,): v + generator.normal() for n, v in scores.items()}
    found = rank_correlations({"s": scores}, gains, 20)[0]
    expected = stats.spearmanr(list(scores.values()), list(gains.values()))
    assert not found.exact
    assert found.spearman == pytest.approx(expected.statistic)
    assert found.spearman_p == pytest.approx(expected.pvalue, abs=0.01)


def test_too_little_to_judge() -> None:
    scores = {"s": {0: 1.0, 1: 2.0, 2: 3.0}}
    with pytest.raises(BadConfig, match="at least three single layers"):
        rank_correlations(scores, {(0,): 1.0, (1,): 2.0}, 3)
    with pytest.raises(BadConfig, match="NaN"):
        rank_correlations(scores, single([1.0, 2.0, math.nan]), 3)
    # a layer without score is left out
    assert rank_correlations(scores, single([1.0, 3.0, 2.0, 9.0]), 4)[0].n == 3
    assert len(list(combinations(range(3), 2))) == 3
