from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score, recall_score
from torch import Tensor
from torchmetrics import Metric

from salve_lm.errors import ShapeMismatch
from salve_lm.metrics import (
    L0,
    DeadFraction,
    ExplainedVariance,
    ParticipationRatio,
    PerClassAccuracy,
    SpilloverAccuracy,
    participation_ratio,
)

SEEDS = st.integers(0, 10_000)


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _merged(make: object, parts: list[tuple[Tensor, ...]]) -> Metric:
    """One metric per rank, merged as torchmetrics' synchronisation merges states."""
    metrics = []
    for part in parts:
        metric = make()  # type: ignore[operator]
        metric.update(*part)
        metrics.append(metric)
    first = metrics[0]
    for other in metrics[1:]:
        first.merge_state(other)
    return first


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, n=st.integers(2, 40), d=st.integers(1, 6), cuts=st.lists(st.integers(0, 40)))
def test_explained_variance_is_sklearns(seed: int, n: int, d: int, cuts: list[int]) -> None:
    x = _randn(seed, n, d) * 3 + 10
    x_hat = x + 0.5 * _randn(seed + 1, n, d)
    expected = r2_score(x.double(), x_hat.double(), multioutput="variance_weighted")
    bounds = [0, *sorted(min(c, n) for c in cuts), n]  # batches, some of them empty
    metric = ExplainedVariance(d)
    parts = [(x[a:b], x_hat[a:b]) for a, b in pairwise(bounds)]
    for part in parts:
        metric.update(*part)
    # sklearn leaves out columns that do not vary; none here
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-6, abs=1e-5)
    merged = _merged(lambda: ExplainedVariance(d), parts)
    assert float(merged.compute()) == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_explained_variance_is_measured_from_the_mean() -> None:
    x = _randn(0, 500, 4) + 100
    mean = x.mean(0).expand_as(x)
    metric = ExplainedVariance(4)
    metric.update(x, mean)
    assert float(metric.compute()) == pytest.approx(0.0, abs=1e-6)
    metric.reset()
    metric.update(x, x)
    assert float(metric.compute()) == 1.0


def test_explained_variance_survives_a_far_mean() -> None:
    x = (_randn(0, 500, 4).double() + 1e5).float()
    x_hat = x + 0.5
    metric = ExplainedVariance(4)
    metric.update(x, x_hat)
    expected = r2_score(x.double(), x_hat.double(), multioutput="variance_weighted")
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_explained_variance_of_nothing_is_nan() -> None:
    metric = ExplainedVariance(4)
    assert metric.compute().isnan()
    metric.update(torch.full((9, 4), 0.1), torch.zeros(9, 4))
    assert metric.compute().isnan()


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, threshold=st.sampled_from([0.0, 0.3, 1.0]), n=st.integers(1, 20))
def test_sparsity_by_counting(seed: int, threshold: float, n: int) -> None:
    z = _randn(seed, n, 12)
    z[:, :3] = 0.0
    counts = [[abs(float(v)) > threshold for v in row] for row in z]
    halves = [(z[: n // 2],), (z[n // 2 :],)]
    l0 = _merged(lambda: L0(threshold), halves)
    assert float(l0.compute()) == pytest.approx(sum(map(sum, counts)) / n, rel=1e-6)
    dead = _merged(lambda: DeadFraction(12, threshold), halves)
    never = sum(not any(column) for column in zip(*counts, strict=True))
    assert float(dead.compute()) == pytest.approx(never / 12)
    ratio = _merged(ParticipationRatio, halves)
    rows = [sum(abs(float(v)) for v in r) ** 2 / sum(float(v) ** 2 for v in r) for r in z]
    assert float(ratio.compute()) == pytest.approx(sum(rows) / n, rel=1e-5)


def test_participation_ratio_counts_equal_shares() -> None:
    z = torch.tensor([[2.0, -2.0, 0.0, 0.0], [5.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert participation_ratio(z).tolist() == pytest.approx([2, 1, 4, 0])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("metric", [L0(), DeadFraction(3), ParticipationRatio()])
def test_of_no_rows_is_nan(metric: Metric) -> None:
    assert metric.compute().isnan()
    metric.update(torch.zeros(0, 3))
    assert metric.compute().isnan()


def test_a_cast_module_still_measures_in_double() -> None:
    x = _randn(0, 500, 4) + 100
    expected = ExplainedVariance(4)
    expected.update(x, x + 0.1)
    cast = ExplainedVariance(4).to(torch.bfloat16)
    cast.update(x, x + 0.1)
    assert torch.equal(cast.compute(), expected.compute())
    ratio = ParticipationRatio().to(torch.bfloat16)
    ratio.update(torch.ones(300, 3))
    assert float(ratio.compute()) == 3.0


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, n=st.integers(1, 60))
def test_per_class_accuracy_is_recall(seed: int, n: int) -> None:
    logits = _randn(seed, n, 5)
    target = torch.randint(5, (n,), generator=torch.Generator().manual_seed(seed))
    halves = [(logits[: n // 2], target[: n // 2]), (logits[n // 2 :], target[n // 2 :])]
    got = _merged(lambda: PerClassAccuracy(5), halves).compute()
    expected = torch.tensor(
        recall_score(
            target, logits.argmax(1), labels=range(5), average=None, zero_division=float("nan")
        )
    )
    torch.testing.assert_close(got.double(), expected, equal_nan=True, rtol=1e-6, atol=0)

    predicted = logits.argmax(1)
    spill = _merged(lambda: SpilloverAccuracy(5, 2), halves).compute()
    mine, others = target == 2, target != 2
    for mask, value in ((mine, spill["target"]), (others, spill["other"])):
        expected_share = (predicted[mask] == target[mask]).double().mean().float()
        torch.testing.assert_close(value, expected_share, equal_nan=True)


def test_predictions_may_be_classes() -> None:
    metric = PerClassAccuracy(3)
    metric.update(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]))
    assert metric.compute().tolist() == [1.0, 1.0, 0.5]


def test_bad_input() -> None:
    metric = PerClassAccuracy(3)
    with pytest.raises(ShapeMismatch, match="over 3 classes got logits of 4"):
        metric.update(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ShapeMismatch, match="2 predictions for 3 targets"):
        metric.update(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    for target in (torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(ShapeMismatch, match="got targets from"):
            metric.update(torch.zeros(2, 3), target)
    with pytest.raises(ShapeMismatch, match="Target class 3 does not lie between 0 and 2"):
        SpilloverAccuracy(3, 3)
