"""Class-flip and enhancement thresholds against exact rational arithmetic and applied edits."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from salve_lm.alpha_crit import (
    alpha_gain,
    class_flip,
    exact,
    gain_interval,
    lce_flip,
    linear_contributions,
)
from salve_lm.errors import BadConfig, NotFinite, ShapeMismatch

INF = math.inf


def margins(
    alpha: Fraction,
    x: list[int],
    W: list[list[int]],
    b: list[int],
    c: list[Fraction],
    target: int,
    rows: list[int],
) -> list[Fraction]:
    """Target minus every rival, by applying the edit to the weights of the named rows."""
    gate = [max(Fraction(0), 1 - alpha * cj) for cj in c]
    z = [
        bias + sum(w * xj * (g if k in rows else 1) for w, xj, g in zip(row, x, gate, strict=True))
        for k, (row, bias) in enumerate(zip(W, b, strict=True))
    ]
    return [z[target] - z[k] for k in range(len(W)) if k != target]


def flip_and_return(
    x: list[int],
    W: list[list[int]],
    b: list[int],
    c: list[Fraction],
    target: int,
    rows: list[int],
) -> tuple[float, bool]:
    """First alpha without a win, and whether a win follows, in rational arithmetic.

    Wins can only begin or end at a breakpoint or at a root of one margin within a segment, so
    those places, and one point between each two of them, decide everything.
    """
    knots = [Fraction(0), *sorted({1 / v for v in c if v > 0})]
    places = set(knots)
    for left, right in pairwise(knots):
        for p, q in zip(
            margins(left, x, W, b, c, target, rows),
            margins(right, x, W, b, c, target, rows),
            strict=True,
        ):
            if (p > 0) != (q > 0):
                places.add(left + (right - left) * p / (p - q))
    ordered = sorted(places)
    ordered = sorted(ordered + [(p + q) / 2 for p, q in pairwise(ordered)])
    wins = [all(m > 0 for m in margins(a, x, W, b, c, target, rows)) for a in ordered]
    if all(wins):
        return INF, False
    first = wins.index(False)
    return float(ordered[first]), any(wins[first:])


small = st.integers(-3, 3)


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    d, k = draw(st.integers(1, 20)), draw(st.integers(2, 4))
    x = draw(st.lists(st.integers(0, 3), min_size=d, max_size=d))
    W = draw(st.lists(st.lists(small, min_size=d, max_size=d), min_size=k, max_size=k))
    b = draw(st.lists(small, min_size=k, max_size=k))
    # Powers of two: every value at a breakpoint is exact, so ties are ties.
    c = draw(st.lists(st.sampled_from([0, 1, 2, 4, 8]), min_size=d, max_size=d))
    rows = draw(st.sets(st.integers(0, k - 1), min_size=1))
    return x, W, b, [Fraction(v, 4) for v in c], draw(st.integers(0, k - 1)), sorted(rows)


@given(problems())
@settings(max_examples=200, deadline=None)
def test_flip_and_re_entry_in_rational_arithmetic(problem: tuple) -> None:
    x, W, b, c, target, rows = problem
    found = class_flip(
        torch.tensor([x]).double(),
        torch.tensor(W).double(),
        torch.tensor(b).double(),
        torch.tensor([float(v) for v in c]),
        target,
        rows,
    )
    z = [b[k] + sum(w * v for w, v in zip(W[k], x, strict=True)) for k in range(len(W))]
    if z.index(max(z)) != target:
        assert found.left_out_share == 1.0
        assert math.isnan(found.alpha[0])
        assert not found.counted[0]
        assert math.isnan(found.re_entry_share)
        return
    alpha, returns = flip_and_return(x, W, b, c, target, rows)
    assert float(found.alpha[0]) == pytest.approx(alpha, rel=1e-14)
    assert bool(found.returns[0]) == returns
    assert found.re_entry_share == float(returns)


def random_head(seed: int, n: int = 300, d: int = 24, k: int = 5) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, d, generator=g, dtype=torch.float64)
    W = torch.randn(k, d, generator=g, dtype=torch.float64)
    W = W - W.mean(1, keepdim=True)  # so that every class wins somewhere
    b = torch.randn(k, generator=g, dtype=torch.float64) / 5
    c = torch.rand(d, generator=g, dtype=torch.float64) * (torch.rand(d, generator=g) < 0.8)
    return x, W, b, c


def edited_logits(x: Tensor, W: Tensor, b: Tensor, factor: Tensor, rows: list[int]) -> Tensor:
    edited = W.clone()
    edited[rows] = W[rows] * factor
    return x @ edited.t() + b


@pytest.mark.parametrize("rows", ["class", "all", [0, 3], [3]])
def test_flip_is_where_the_edited_head_changes_its_mind(rows: str | list[int]) -> None:
    x, W, b, c = random_head(3)
    found = class_flip(x, W, b, c, 0, rows)
    assert torch.equal(found.counted, (x @ W.t() + b).argmax(1) == 0)
    assert torch.equal(found.alpha.isnan(), ~found.counted)
    assert found.counted.sum() > 20
    assert found.left_out_share == pytest.approx(1 - found.counted.double().mean().item())
    numbers = [0] if rows == "class" else list(range(5)) if rows == "all" else list(rows)
    grid = torch.cat([torch.linspace(0, 3, 400), torch.logspace(0.5, 3, 200)]).double()
    curve = torch.stack(
        [edited_logits(x, W, b, (1 - a * c).clamp(min=0), numbers).argmax(1) == 0 for a in grid]
    )
    flipped = torch.where(curve.all(0), INF, grid[(~curve).double().argmax(0)])
    for i in torch.nonzero(found.counted).flatten().tolist():
        before = grid[grid < found.alpha[i] - 1e-9]
        assert curve[: len(before), i].all()
        if found.alpha[i].isfinite():
            just_after = found.alpha[i] * (1 + 1e-9) + 1e-12
            z = edited_logits(x[i : i + 1], W, b, (1 - just_after * c).clamp(min=0), numbers)[0]
            assert z.argmax() != 0 or bool(found.returns[i])
        elif not found.returns[i]:
            assert math.isinf(flipped[i])
    if not found.returns.any():
        accuracy = curve[:, found.counted].double().mean(1)
        survivors = (found.alpha[found.counted][None] > grid[:, None]).double().mean(1)
        torch.testing.assert_close(accuracy, survivors)


def test_a_common_vector_moves_the_zero_logit_but_not_the_flip() -> None:
    x, W, b, c = random_head(5)
    shift = torch.full((24,), 2.0, dtype=torch.float64)
    plain, moved = class_flip(x, W, b, c, 1, "all"), class_flip(x, W + shift, b, c, 1, "all")
    assert plain.counted.any()
    torch.testing.assert_close(plain.alpha, moved.alpha, equal_nan=True, rtol=1e-9, atol=0)
    assert torch.equal(plain.returns, moved.returns)

    def zero_logit(W: Tensor) -> Tensor:
        return exact(linear_contributions(x, W[1]), b[1], c)

    assert not torch.allclose(zero_logit(W)[plain.counted], zero_logit(W + shift)[plain.counted])


def test_a_sample_can_come_back() -> None:
    # Margin 1 - but its first channel (closing at 1/2) carries 3 and its second (at 2) -4.
    W = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    found = class_flip(torch.ones(1, 2), W, torch.tensor([2.0, 0.0]), torch.tensor([2.0, 0.5]), 0)
    assert float(found.alpha) == 0.25
    assert bool(found.returns)
    assert found.re_entry_share == 1.0


def test_a_win_strictly_inside_a_segment_counts_as_re_entry() -> None:
    # Behind the flip, one margin rises through zero before the other falls through it, both
    # between two breakpoints: at the breakpoints themselves the class never wins again.
    for seed in range(400):
        g = torch.Generator().manual_seed(seed)
        x = torch.randint(0, 4, (1, 6), generator=g).tolist()[0]
        W = torch.randint(-4, 5, (3, 6), generator=g).tolist()
        b = torch.randint(-4, 5, (3,), generator=g).tolist()
        c = [Fraction(1, 2 ** (j // 3 * 4)) for j in range(6)]  # two breakpoints, three ties each
        knots = [Fraction(0), Fraction(1), Fraction(16)]
        at = [all(m > 0 for m in margins(k, x, W, b, c, 0, [0, 1, 2])) for k in knots]
        alpha, returns = flip_and_return(x, W, b, c, 0, [0, 1, 2])
        if at[0] and returns and not at[1] and not at[2]:
            found = class_flip(
                torch.tensor([x]).double(),
                torch.tensor(W).double(),
                torch.tensor(b).double(),
                torch.tensor([float(v) for v in c]),
                0,
                "all",
            )
            assert float(found.alpha) == pytest.approx(alpha)
            assert bool(found.returns)
            return
    pytest.fail("no such head among the seeds")


def test_chunks_dtypes_and_missing_bias() -> None:
    x, W, _, c = random_head(7, n=9000, k=4)
    x = x.float().double()
    whole = class_flip(x, W, None, c, 2, "all")
    parts = torch.cat([class_flip(p, W, torch.zeros(4), c, 2, "all").alpha for p in x.split(211)])
    torch.testing.assert_close(whole.alpha, parts, equal_nan=True, rtol=1e-12, atol=0)
    narrow = class_flip(x.float(), W, None, c, 2, "all")
    torch.testing.assert_close(narrow.alpha, whole.alpha, equal_nan=True, rtol=1e-12, atol=0)


def test_no_samples_and_no_gate() -> None:
    empty = class_flip(torch.empty(0, 2), torch.eye(2), None, torch.ones(2), 0)
    assert empty.alpha.shape == (0,)
    assert math.isnan(empty.left_out_share)
    still = class_flip(torch.tensor([[1.0, 0.0]]), torch.eye(2), None, torch.zeros(2), 0, "all")
    assert still.alpha.tolist() == [INF]
    assert not still.returns.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": []}, BadConfig, "empty"),
        ({"rows": [5]}, BadConfig, r"\[5\]"),
        ({"rows": "some"}, BadConfig, "'class', 'all'"),
        ({"target": 3}, BadConfig, "Class 3 does not exist"),
        ({"W": torch.ones(1, 2), "b": torch.ones(1)}, BadConfig, "two rows"),
        ({"W": torch.ones(3, 5)}, ShapeMismatch, "2 channels"),
        ({"b": torch.ones(4)}, ShapeMismatch, "3 rows"),
        ({"c": torch.ones(3)}, ShapeMismatch, "2 input channels"),
        ({"x": torch.tensor([[math.nan, 1.0]])}, NotFinite, "logits"),
    ],
)
def test_bad_inputs(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.ones(4, 2),
        "W": torch.ones(3, 2),
        "b": torch.ones(3),
        "c": torch.ones(2),
        "target": 0,
        "rows": "class",
    }
    with pytest.raises(error, match=message):
        class_flip(**(arguments | change))


def lce_head(W: Tensor, b: Tensor, v: Tensor, a: Tensor, mu: Tensor, alpha: float) -> tuple:
    """W' and b' after T(x) = x - alpha s(x) v with s(x) = a . (x - mu), folded into the head."""
    return W - alpha * torch.outer(W @ v, a), b + alpha * (a @ mu) * (W @ v)


def test_lce_flip_is_where_the_folded_head_changes_its_mind() -> None:
    x, W, b, _ = random_head(11, n=200)
    g = torch.Generator().manual_seed(1)
    v, a, mu = (torch.randn(24, generator=g, dtype=torch.float64) for _ in range(3))
    z, s = x @ W.t() + b, (x - mu) @ a
    found = lce_flip(z, W, v, s, 2)
    assert found.counted.any()
    assert not found.returns.any()
    assert torch.equal(found.counted, z.argmax(1) == 2)
    for i in torch.nonzero(found.counted).flatten().tolist():
        alpha = float(found.alpha[i])
        if math.isinf(alpha):
            steps = [(1e3, True)]
        else:
            steps = [(alpha * (1 - 1e-9), True), (alpha * (1 + 1e-9), False), (50 * alpha, False)]
        for at, stays in steps:
            W2, b2 = lce_head(W, b, v, a, mu, at)
            assert bool((W2 @ x[i] + b2).argmax() == 2) == stays


def test_lce_bad_inputs() -> None:
    z, W, v, s = torch.ones(4, 3), torch.ones(3, 2), torch.ones(2), torch.ones(4)
    with pytest.raises(ShapeMismatch, match="do not agree"):
        lce_flip(z, W, v, s[:2], 0)
    with pytest.raises(ShapeMismatch, match="W has shape"):
        lce_flip(z, W, torch.ones(5), s, 0)
    with pytest.raises(NotFinite, match="'s'"):
        lce_flip(z, W, v, s * math.nan, 0)
    with pytest.raises(BadConfig, match="does not exist"):
        lce_flip(z, W, v, s, 3)


def test_alpha_gain_is_where_the_class_takes_over() -> None:
    x, W, b, c = random_head(13)
    x = x - 0.3
    alpha = alpha_gain(x, W, b, c, 3)
    wins = (x @ W.t() + b).argmax(1) == 3
    assert torch.equal(alpha == 0, wins)
    assert {"inf", "finite"} == {"inf" if v else "finite" for v in alpha[~wins].isinf().tolist()}
    for i, value in enumerate(alpha.tolist()):
        near = [1e4] if math.isinf(value) else [value * (1 - 1e-9), value * (1 + 1e-9) + 1e-12]
        after = [
            bool(edited_logits(x[i : i + 1], W, b, 1 + a * c, [3]).argmax() == 3) for a in near
        ]
        if value > 0:
            assert after == ([False] if math.isinf(value) else [False, True])


def test_gain_interval_is_where_the_class_wins_with_all_rows_enhanced() -> None:
    x, W, b, c = random_head(17)
    found = gain_interval(x, W, b, c, 1)
    assert found.empty.any()
    assert (~found.empty).any()
    assert torch.equal(found.empty, found.low.isnan())
    assert torch.equal(found.empty, found.high.isnan())
    grid = torch.logspace(-4, 3, 400, dtype=torch.float64)
    curve = torch.stack(
        [edited_logits(x, W, b, 1 + a * c, list(range(5))).argmax(1) == 1 for a in grid]
    )
    inside = (grid[:, None] >= found.low) & (grid[:, None] <= found.high)
    edge = ((grid[:, None] / found.low - 1).abs() < 1e-9) | (
        (grid[:, None] / found.high - 1).abs() < 1e-9
    )
    assert torch.equal(curve | edge, inside | edge)
    assert torch.equal(found.low == 0, (x @ W.t() + b).argmax(1) == 1)


def test_gain_interval_without_any_slope() -> None:
    same = torch.tensor([[1.0], [1.0]])
    behind = gain_interval(torch.ones(1, 1), same, torch.tensor([0.0, 1.0]), torch.ones(1), 0)
    assert bool(behind.empty)
    ahead = gain_interval(torch.ones(1, 1), same, torch.tensor([1.0, 0.0]), torch.ones(1), 0)
    assert (float(ahead.low), float(ahead.high)) == (0.0, INF)


@pytest.mark.parametrize("function", [alpha_gain, gain_interval])
def test_gain_bad_inputs(function) -> None:
    x, W, c = torch.ones(4, 2), torch.ones(3, 2), torch.ones(2)
    with pytest.raises(BadConfig, match="rival"):
        function(x, W[:1], None, c, 0)
    with pytest.raises(BadConfig, match="Class 3"):
        function(x, W, None, c, 3)
    with pytest.raises(NotFinite, match="logits"):
        function(x * INF, W, None, c, 0)
    with pytest.raises(ShapeMismatch, match=r"\[samples, channels\]"):
        function(x[0], W, None, c, 0)
