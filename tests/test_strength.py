"""The choice of a strength against a brute-force reading of its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from salve_lm.strength import Outcome, choose_strength, outcome

SHARES = st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.93, 0.94, 0.95, 1.0])
CURVES = st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=8)


def point(target: float, others: float) -> Outcome:
    return Outcome(target, others, 0.0, [])


def brute_force(
    curve: list[tuple[float, float]], unedited: tuple[float, float], drop: float
) -> float:
    """Suppression, by enumeration: alphas are 1, 2, 3, ..."""
    allowed = {a: t for a, (t, o) in enumerate(curve, 1) if o >= unedited[1] - drop - 1e-9}
    zero = [a for a, t in allowed.items() if t <= 1e-9]
    if zero:
        beyond = [a for a in zero if a >= 1.5 * min(zero)]
        return min(beyond) if beyond else min(zero)
    better = {a: t for a, t in allowed.items() if t < unedited[0]}
    lowest = min(better.values(), default=None)
    return min((a for a, t in better.items() if t == lowest), default=0)


@given(CURVES, st.tuples(SHARES, SHARES), st.sampled_from([0.0, 0.01, 0.05]))
def test_suppression_matches_its_definition(
    curve: list[tuple[float, float]], unedited: tuple[float, float], drop: float
) -> None:
    chosen = choose_strength(
        range(1, len(curve) + 1),
        [point(*p) for p in curve],
        point(*unedited),
        "suppress",
        others_drop=drop,
    )
    assert chosen == brute_force(curve, unedited, drop)


def test_strengths_need_not_be_sorted() -> None:
    curve = [point(0.0, 1.0), point(0.5, 1.0), point(0.0, 1.0)]
    assert choose_strength([8, 1, 4], curve, point(1.0, 1.0), "suppress", margin=1) == 4
    assert choose_strength([8, 1, 4], curve, point(1.0, 1.0), "suppress") == 8


def test_enhancement_takes_the_smallest_of_the_best() -> None:
    curve = [point(0.9, 0.95), point(0.97, 0.95), point(0.97, 0.945), point(1.0, 0.5)]
    assert choose_strength([1, 2, 3, 4], curve, point(0.9, 0.95), "enhance") == 2


def test_no_acceptable_strength_is_zero() -> None:
    curve = [point(0.0, 0.2)]
    assert choose_strength([1], curve, point(1.0, 1.0), "suppress") == 0
    assert choose_strength([1], curve, point(1.0, 1.0), "enhance") == 0


def test_outcome_against_counting() -> None:
    logits = torch.tensor([[2.0, 1, 0], [0, 3, 1], [5, 0, 0], [0, 0, 1]])
    label = torch.tensor([0, 1, 1, 2])
    found = outcome(logits, label, 1)
    assert found.target == 0.5
    assert found.others == 1.0
    assert found.per_class == [1.0, 0.5, 1.0]
    assert found.target_logit in (0.0, 3.0)  # torch's median of two values is the lower


def test_a_class_without_samples_is_nan() -> None:
    found = outcome(torch.eye(3)[:2], torch.tensor([0, 1]), 0)
    assert math.isnan(found.per_class[2])
    assert found.per_class[:2] == pytest.approx([1.0, 1.0])
