"""Zero-logit thresholds against exact rational arithmetic, dense scans and scipy's brentq."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from salve_lm.alpha_crit import (
    exact,
    linear,
    linear_contributions,
    lower_bound_share,
    pooled_contributions,
    row_centred,
)
from salve_lm.errors import BadConfig, NotFinite, ShapeMismatch

INF = math.inf


def logit(alpha: Fraction, u: list[Fraction], b: Fraction, c: list[Fraction]) -> Fraction:
    """The definition, in rational arithmetic."""
    return b + sum((uj * max(Fraction(0), 1 - alpha * cj) for uj, cj in zip(u, c, strict=True)))


def first_root(u: list[float], b: float, c: list[float]) -> float:
    """First root by trying each segment from the left; exact for every float input."""
    us, bias, cs = [Fraction(v) for v in u], Fraction(b), [Fraction(v) for v in c]
    knots = [Fraction(0), *sorted({1 / v for v in cs if v > 0})]
    values = [logit(k, us, bias, cs) for k in knots]
    if values[0] <= 0:
        return 0.0
    for i in range(1, len(knots)):
        if values[i] <= 0:
            share = values[i - 1] / (values[i - 1] - values[i])
            return float(knots[i - 1] + (knots[i] - knots[i - 1]) * share)
    return INF


def brent_root(u: np.ndarray, b: float, c: np.ndarray) -> float:
    """First sign change on a dense grid, refined by scipy on the definition."""

    def z(alpha: float) -> float:
        return float(b + (u * np.maximum(0, 1 - alpha * c)).sum())

    ends = 1 / c[c > 0]
    grid = np.unique(np.concatenate([np.linspace(0, ends.max(), 2000), ends]))
    values = np.array([z(alpha) for alpha in grid])
    if values[0] <= 0:
        return 0.0
    at = np.flatnonzero(values <= 0)
    return INF if not len(at) else float(brentq(z, grid[at[0] - 1], grid[at[0]], xtol=1e-14))


def exact_one(u: list[float], b: float, c: list[float]) -> float:
    return float(
        exact(torch.tensor([u], dtype=torch.float64), b, torch.tensor(c, dtype=torch.float64))[0]
    )


# Powers of two: breakpoints, values and slopes are exact in float64, so roots on breakpoints,
# ties and touching roots must come out to the bit.
dyadic_c = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 4.0])
whole = st.integers(-8, 8).map(float)


@given(st.lists(st.tuples(whole, dyadic_c), min_size=1, max_size=40), whole)
@settings(deadline=None)
def test_exact_is_the_first_root_in_rational_arithmetic(
    channels: list[tuple[float, float]], b: float
) -> None:
    u, c = [list(v) for v in zip(*channels, strict=True)]
    assert exact_one(u, b, c) == pytest.approx(first_root(u, b, c), rel=1e-14)


real_c = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))


@given(st.lists(st.tuples(st.floats(-10, 10), real_c), min_size=1, max_size=30), st.floats(-10, 10))
@settings(deadline=None)
def test_exact_on_arbitrary_floats(channels: list[tuple[float, float]], b: float) -> None:
    u, c = [list(v) for v in zip(*channels, strict=True)]
    expected = first_root(u, b, c)
    found = exact_one(u, b, c)
    bias, us, cs = Fraction(b), [Fraction(v) for v in u], [Fraction(v) for v in c]
    scale = float(abs(b) + sum(map(abs, u)))
    knots = [Fraction(0), *(1 / v for v in cs if v > 0)]
    # A value within rounding of zero decides nothing in float64.
    assume(all(abs(logit(k, us, bias, cs)) > 1e-11 * scale for k in knots))
    if math.isinf(expected) or expected == 0:
        assert found == expected
        return
    # Ill-conditioned roots (flat segments) are compared by value, the others by place.
    assert abs(float(logit(Fraction(found), us, bias, cs))) <= 1e-12 * scale
    slope = abs(float(logit(Fraction(expected * (1 - 1e-6)), us, bias, cs))) / 1e-6
    if slope > 1e-4 * scale:
        assert found == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 2**31), st.booleans())
@settings(max_examples=15, deadline=None)
def test_exact_equals_brentq_on_random_heads(seed: int, monotone: bool) -> None:
    rng = np.random.default_rng(seed)
    d = 50
    u = rng.normal(0.1, 0.3, (4, d))
    u = np.abs(u) if monotone else u
    c = np.abs(rng.normal(size=d)) * (rng.random(d) < 0.9)
    b = float(rng.normal(-0.5, 1))
    found = exact(torch.from_numpy(u), b, torch.from_numpy(c))
    expected = [brent_root(row, b, c) for row in u]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_first_root_of_a_logit_that_recovers() -> None:
    # u = +3 closes at 1/2, u = -4 closes at 2: down to 0 first, up later, down never.
    u, c, b = [3.0, -4.0], [2.0, 0.5], 2.0
    values = [
        float(
            logit(
                Fraction(a), [Fraction(3), Fraction(-4)], Fraction(2), [Fraction(2), Fraction(1, 2)]
            )
        )
        for a in ("0", "1/4", "1/2", "2")
    ]
    assert values == [1.0, 0.0, -1.0, 2.0]
    assert exact_one(u, b, c) == 0.25


@pytest.mark.parametrize(
    ("u", "b", "c", "expected"),
    [
        ([4.0], 0.0, [2.0], 0.5),  # reaches zero exactly where its gate closes, and stays there
        ([4.0, 0.0], 0.0, [2.0, 1.0], 0.5),  # on an inner breakpoint
        ([3.0, -3.0], 1.0, [1.0, 0.0], 1 / 3),  # c_j = 0 keeps its share for ever
        ([3.0, -2.0], 1.0, [1.0, 0.0], 2 / 3),
        ([3.0, 0.0], 1.0, [1.0, 0.0], INF),
        ([2.0, -1.0], 0.0, [1.0, 1.0], 1.0),  # tied breakpoints
        ([2.0, -2.0], 1.0, [1.0, 1.0], INF),
        ([-1.0], 0.5, [1.0], 0.0),  # at or below zero before the edit
        ([1.0], -1.0, [1.0], 0.0),
        ([1.0], 1.0, [0.0], INF),  # no gate ever closes
        ([-1.0], 1.0, [0.0], 0.0),
        ([1.0], 1.0, [1e-310], INF),  # 1/c is beyond float64
        ([1.0], 0.0, [1e-300], 1e300),
    ],
)
def test_exact_special_cases(u: list[float], b: float, c: list[float], expected: float) -> None:
    assert exact_one(u, b, c) == pytest.approx(expected, rel=1e-15)


def test_nothing_left_means_the_bias_to_the_bit() -> None:
    # With all gates closed the logit is b. Total minus prefix sums would leave a remainder of
    # either sign here, and invent or lose the root.
    rng = np.random.default_rng(1)
    u = torch.from_numpy(rng.normal(1.0, 5.0, (200, 300)))
    c = torch.from_numpy(np.abs(rng.normal(size=300)) + 1e-3)
    start = u.sum(1) > 0
    assert torch.isfinite(exact(u, 0.0, c)[start]).all()
    never = exact(u.abs(), 1e-13, c)
    assert torch.isinf(never).all()


def test_linear_is_exact_below_the_first_clamp_and_special_elsewhere() -> None:
    rng = np.random.default_rng(0)
    u = torch.from_numpy(rng.normal(0.3, 1, (500, 20)))
    c = torch.from_numpy(np.abs(rng.normal(size=20)))
    z, rate = u.sum(1) + 0.4, (u * c).sum(1)
    found = linear(u, 0.4, c)
    assert torch.equal(found == 0, z <= 0)
    assert torch.equal(found.isinf(), (z > 0) & (rate <= 0))
    both = (z > 0) & (rate > 0)
    torch.testing.assert_close(found[both], (z / rate)[both])
    unclamped = both & (found * c.max() <= 1)
    assert unclamped.any()
    torch.testing.assert_close(exact(u, 0.4, c)[unclamped], found[unclamped])


def test_bias_may_differ_by_sample() -> None:
    u = torch.tensor([[2.0, 1.0]]).repeat(3, 1)
    bias = torch.tensor([0.0, -1.0, -3.0])
    c = torch.tensor([1.0, 0.5])
    for function in (exact, linear):
        apart = [float(function(u[:1], float(b), c)) for b in bias]
        assert function(u, bias, c).tolist() == apart


@pytest.mark.parametrize("layout", ["rows", "channels", "float32", "strided"])
def test_layout_and_number_of_samples_do_not_matter(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    n = 10241 if layout == "rows" else 700  # more than one chunk
    u = torch.randn(n, 9, generator=generator, dtype=torch.float64) + 0.2
    u = u.float().double()  # the same numbers in every dtype
    c = torch.rand(9, generator=generator, dtype=torch.float64)
    expected = torch.cat([exact(part, 0.1, c) for part in u.split(97)])
    same = {
        "rows": u,
        "channels": u.t().contiguous().t(),
        "float32": u.float(),
        "strided": torch.stack([u, u], 2)[:, :, 0],
    }[layout]
    # Not to the bit: vectorised loops fuse multiply and add, their remainders do not.
    torch.testing.assert_close(exact(same, 0.1, c), expected, rtol=1e-12, atol=0)


def test_no_samples() -> None:
    assert exact(torch.empty(0, 3), 0.0, torch.ones(3)).shape == (0,)
    assert linear(torch.empty(0, 3), 0.0, torch.ones(3)).shape == (0,)


def test_inputs_are_left_alone_and_gradients_are_not_followed() -> None:
    u = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    c = torch.rand(3, requires_grad=True)
    before = u.detach().clone()
    assert not exact(u, 0.5, c).requires_grad
    assert torch.equal(u.detach(), before)


def test_contributions_of_a_linear_head() -> None:
    x, w = torch.rand(5000, 7), torch.randn(7)
    u = linear_contributions(x, w)
    assert u.dtype == torch.float64
    torch.testing.assert_close(u, x.double() * w.double(), rtol=0, atol=0)


def test_contributions_of_a_convolution_before_an_average_pool() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 3, 1).double()
    a = torch.rand(8, 6, 5, 4, dtype=torch.float64)
    logits = conv(a).mean((2, 3))
    u = pooled_contributions(a, conv.weight[1])
    torch.testing.assert_close(u.sum(1) + conv.bias[1], logits[:, 1])
    assert torch.equal(u, pooled_contributions(a, conv.weight[1].flatten()))


def test_row_centred_head_predicts_the_same_and_ignores_a_common_vector() -> None:
    torch.manual_seed(0)
    x, W, b = torch.rand(30, 5).double(), torch.randn(4, 5).double(), torch.randn(4).double()
    shift = torch.randn(5).double() * 3
    c = torch.rand(5).double()
    plain, moved = row_centred(W, b), row_centred(W + shift, b + 2)
    assert torch.equal((x @ W.t() + b).argmax(1), (x @ plain.W.t() + plain.b).argmax(1))

    def threshold(W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return exact(linear_contributions(x, W[0]), b[0], c)

    torch.testing.assert_close(threshold(*plain), threshold(*moved))
    assert not torch.allclose(threshold(W, b), threshold(W + shift, b + 2), equal_nan=True)


def test_lower_bound_share() -> None:
    lin = torch.tensor([1.0, 2.0, 3.0, INF, 1.0, 0.0, INF, math.nan])
    ex = torch.tensor([1.0, 3.0, 2.0, 5.0, INF, 0.0, INF, 1.0])
    assert lower_bound_share(lin, ex) == 3 / 5  # three bounds, two not, three say nothing
    assert math.isnan(lower_bound_share(torch.zeros(2), torch.zeros(2)))
    # Positive contributions: closing gates only flattens the fall, so it is always a bound.
    u, c = torch.rand(200, 10).double(), torch.rand(10).double()
    assert lower_bound_share(linear(u, -1.0, c), exact(u, -1.0, c)) == 1.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"c": torch.ones(4)}, ShapeMismatch, "3 input channels"),
        ({"c": torch.tensor([1.0, -1.0, 0.0])}, BadConfig, "negative"),
        ({"c": torch.tensor([1.0, INF, 0.0])}, NotFinite, "'c'"),
        ({"u": torch.ones(2, 3, 4)}, ShapeMismatch, "pooled_contributions"),
        ({"u": torch.tensor([[1.0, math.nan, 1.0]])}, NotFinite, "'u'"),
        ({"u": torch.tensor([[1.0, INF, -INF]])}, NotFinite, "'u'"),
        ({"bias": torch.ones(7)}, ShapeMismatch, "one per sample"),
        ({"bias": math.nan}, NotFinite, "bias"),
    ],
)
@pytest.mark.parametrize("function", [exact, linear])
def test_bad_inputs(function, change: dict, error: type[Exception], message: str) -> None:
    arguments = {"u": torch.ones(2, 3), "bias": 0.0, "c": torch.tensor([1.0, 0.5, 0.0])} | change
    with pytest.raises(error, match=message):
        function(**arguments)


def test_bad_contributions() -> None:
    with pytest.raises(ShapeMismatch, match="one row of W"):
        linear_contributions(torch.ones(2, 3), torch.ones(4))
    with pytest.raises(ShapeMismatch, match="linear_contributions"):
        pooled_contributions(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ShapeMismatch, match="1x1"):
        pooled_contributions(torch.ones(2, 3, 4, 4), torch.ones(3, 3, 3))
    with pytest.raises(ShapeMismatch, match="same samples"):
        lower_bound_share(torch.ones(2), torch.ones(3))
