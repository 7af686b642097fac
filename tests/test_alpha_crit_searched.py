"""Searched thresholds: through synthetic margins, and through real networks against `exact`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from salve_lm.alpha_crit import (
    alpha_gain,
    class_flip,
    exact,
    gated_margin,
    linear_contributions,
    pooled_contributions,
    search_grid,
    searched,
)
from salve_lm.errors import BadConfig, NameNotFound, NotFinite, ShapeMismatch, UnsupportedEdit

INF = math.inf


def test_search_grid_covers_the_linear_part_and_every_gate() -> None:
    c = torch.tensor([0.0, 0.5, 2.0, 0.01])
    grid = search_grid(c, 16)
    assert len(grid) == 17
    assert grid[0] == 0
    assert grid[4] == pytest.approx(0.5)  # 1 / max c
    assert grid[-1] == 1 / c.double()[3]  # 1 / min positive c
    assert (grid.diff() > 0).all()
    with pytest.raises(BadConfig, match="at least 4"):
        search_grid(c, 3)
    with pytest.raises(BadConfig, match="zero"):
        search_grid(torch.zeros(3))


def test_search_grid_with_equal_strengths_ends_at_their_gate() -> None:
    grid = search_grid(torch.full((5,), 0.5), 16)
    assert grid[-1] == 2.0
    assert (grid.diff() > 0).all()


def test_searched_equals_brentq_on_curved_margins() -> None:
    rng = np.random.default_rng(0)
    a, s = rng.uniform(0.2, 3, 40), rng.uniform(0.5, 2, 40)

    def margin(alpha: Tensor) -> Tensor:
        return torch.from_numpy(s) - torch.sinh(alpha * torch.from_numpy(a))

    found = searched(margin, 40, torch.linspace(0, 20, 50, dtype=torch.float64), rtol=1e-12)
    expected = [
        brentq(lambda x, a=a, s=s: s - np.sinh(x * a), 0, 20) for a, s in zip(a, s, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-10)


def test_searched_takes_the_first_sign_change_zero_and_infinity() -> None:
    offsets = torch.tensor([0.5, -0.5, 2.0, 0.0, 1.0]).double()

    def margin(alpha: Tensor) -> Tensor:
        return offsets + torch.cos(alpha) * (offsets != 0)

    grid = torch.linspace(0, 20, 200, dtype=torch.float64)
    expected = [math.acos(-0.5), math.acos(0.5), INF, 0.0, math.pi]
    found = searched(margin, 5, grid)
    # cos only touches -1, so whether the grid sees the last root is not defined.
    assert found[:4].tolist() == pytest.approx(expected[:4], rel=1e-6)


def test_searched_stops_looking_once_all_are_bracketed() -> None:
    seen: list[float] = []

    def margin(alpha: Tensor) -> Tensor:
        seen.append(float(alpha.max()))
        return 1 - alpha

    found = searched(margin, 3, torch.arange(100, dtype=torch.float64) * 0.75)
    assert found.tolist() == pytest.approx([1.0] * 3)
    assert max(seen) == 1.5


def test_searched_with_no_samples_and_root_on_the_grid() -> None:
    assert searched(lambda a: 1 - a, 0, torch.tensor([0.0, 1.0])).shape == (0,)
    assert searched(lambda a: 1 - a, 2, torch.tensor([0.0, 1.0, 2.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "grid", [[0.0], [1.0, 2.0], [0.0, 2.0, 1.0], [0.0, 1.0, INF], [[0.0, 1.0]]]
)
def test_bad_grids(grid: list) -> None:
    with pytest.raises(BadConfig, match="ascending from 0"):
        searched(lambda a: 1 - a, 1, torch.tensor(grid))


def test_bad_margins() -> None:
    grid = torch.tensor([0.0, 10.0])
    with pytest.raises(ShapeMismatch, match="one margin per sample"):
        searched(lambda a: torch.zeros(3), 2, grid)
    with pytest.raises(NotFinite, match="margins"):
        searched(lambda a: a * math.nan, 2, grid)
    with pytest.raises(BadConfig, match="max_iterations"):
        searched(lambda a: 1 - a**9, 2, grid, rtol=1e-14, max_iterations=2)


class LinearHead(nn.Module):
    """A body and a head called fc."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


class ConvHead(nn.Module):
    """A head that is a 1x1 convolution before an average pool, as in SqueezeNet without ReLU."""

    def __init__(self, kernel: int = 1, relu: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
        self.classifier = nn.Conv2d(12, 4, kernel, padding=kernel // 2)
        self.end = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.classifier(self.body(x))).mean((2, 3))


def made(net: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, 0, 0.4)
    inputs = torch.randn(60, *shape)
    strengths = torch.rand(16 if isinstance(net, LinearHead) else 12) + 0.02
    return net, inputs, strengths


def fine_grid(c: Tensor) -> Tensor:
    """All breakpoints: between them a linear head is linear, so no root can hide."""
    return torch.cat([torch.zeros(1).double(), (1 / c.double()).sort().values])


@pytest.mark.parametrize("rows", ["class", "all", [0, 2]])
@pytest.mark.parametrize("margin", ["flip", "logit"])
def test_searched_equals_exact_on_a_linear_head(rows: str | list[int], margin: str) -> None:
    net, inputs, c = made(LinearHead(), (6,))
    with torch.no_grad():
        x = net.eval().body(inputs)
        target = int(net.fc(x).argmax(1).mode().values)
        if margin == "logit":  # a bias that most samples start above and end below
            scores = (x @ net.fc.weight.t()).median(0).values
            target = int(scores.argmax())
            net.fc.bias[target] = -scores[target] / 2
    rows = sorted({target, *rows}) if isinstance(rows, list) else rows
    with gated_margin(
        net, "fc", c, rows, -1, target, inputs, margin=margin, batch_size=17
    ) as margins:
        found = searched(margins, len(inputs), fine_grid(c))
        coarse = searched(margins, len(inputs), search_grid(c, 256))
    if margin == "logit":
        u = linear_contributions(x, net.fc.weight[target])
        expected = exact(u, net.fc.bias[target], c)
    else:
        flips = class_flip(x, net.fc.weight, net.fc.bias, c, target, rows)
        expected = torch.where(flips.counted, flips.alpha, 0.0)  # searched has them at 0
    assert (expected.isfinite() & (expected > 0)).sum() > 5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(coarse, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", ["class", "all"])
def test_searched_equals_exact_on_a_convolution_and_an_average_pool(rows: str) -> None:
    net, inputs, c = made(ConvHead(), (3, 7, 7))
    with torch.no_grad():
        a = net.eval().body(inputs)
        target = int(net(inputs).argmax(1).mode().values)
    with gated_margin(net, "classifier", c, rows, -1, target, inputs, margin="logit") as margins:
        found = searched(margins, len(inputs), fine_grid(c))
    weight, bias = net.classifier.weight, net.classifier.bias
    expected = exact(pooled_contributions(a, weight[target]), bias[target], c)
    assert (expected.isfinite() & (expected > 0)).sum() > 5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    with gated_margin(net, "classifier", c, rows, -1, target, inputs) as margins:
        found = searched(margins, len(inputs), fine_grid(c))
    flips = class_flip(a.mean((2, 3)), weight.flatten(1), bias, c, target, rows)
    expected = torch.where(flips.counted, flips.alpha, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("net", "name", "shape", "rows", "dim"),
    [
        (LinearHead(), "fc", (6,), [1], 16),
        (LinearHead(), "fc", (6,), "all", 16),
        (LinearHead(), "body.0", (6,), [0, 5, 9], 6),
        (ConvHead(3, relu=True), "classifier", (3, 7, 7), "class", 12),
        (ConvHead(3, relu=True), "classifier", (3, 7, 7), "all", 12),
        (ConvHead(3, relu=True), "body.0", (3, 7, 7), [2, 3], 3),
    ],
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_gated_margins_are_those_of_edited_weights(
    net: nn.Module, name: str, shape: tuple[int, ...], rows, dim: int, sign: int
) -> None:
    """Every sample at its own alpha, against a network whose weights were edited for it."""
    torch.manual_seed(1)
    inputs, c, target = torch.randn(12, *shape), torch.rand(dim), 1
    alpha = torch.linspace(0, 3, 12).double()
    with gated_margin(net, name, c, rows, sign, target, inputs, batch_size=5) as margins:
        found = margins(alpha)
    weight = net.get_submodule(name).weight
    kept = weight.detach().clone()
    chosen = {"class": [target], "all": list(range(len(kept)))}.get(str(rows), rows)
    net.eval()
    for i in range(12):
        factor = (1 + sign * alpha[i].float() * c).clamp(min=0)
        with torch.no_grad():
            weight[chosen] = kept[chosen] * factor.view(1, -1, *[1] * (kept.ndim - 2))
            z = net(inputs[i : i + 1])[0]
            weight.copy_(kept)
        others = torch.cat([z[:target], z[target + 1 :]])
        assert float(found[i]) == pytest.approx(float(z[target] - others.max()), abs=2e-5)


def test_a_float64_network_keeps_its_outputs() -> None:
    net, inputs, c = made(LinearHead(), (6,))
    net, inputs = net.double().eval(), inputs.double()
    with torch.no_grad():
        z = net(inputs)
    with gated_margin(net, "fc", c, "all", -1, 2, inputs) as margins:
        found = margins(torch.zeros(60))
    torch.testing.assert_close(found, z[:, 2] - z[:, [0, 1, 3]].amax(1))


def test_a_relu_before_the_pool_is_searched_through_the_network() -> None:
    net, inputs, c = made(ConvHead(relu=True), (3, 7, 7))
    with torch.no_grad():
        target = int(net.eval()(inputs).argmax(1).mode().values)
    with gated_margin(net, "classifier", c, "class", -1, target, inputs) as margins:
        found = searched(margins, len(inputs), search_grid(c, 128))
        finite = found.isfinite() & (found > 0)
        assert finite.sum() > 5
        safe = torch.where(found.isfinite(), found, 0.0)
        before, after = margins(safe * (1 - 1e-4)), margins(safe * (1 + 1e-4))
    assert (before[finite] > 0).all()
    assert (after[finite] <= 0).all()


def test_enhancement_is_searched_with_the_other_sign() -> None:
    net, inputs, c = made(LinearHead(), (6,))
    with torch.no_grad():
        x = net.eval().body(inputs)
    expected = alpha_gain(x, net.fc.weight, net.fc.bias, c, 3)
    with gated_margin(net, "fc", c, "class", 1, 3, inputs) as margins:
        # searched looks for margins that fall, so a class that has to win is turned round.
        found = searched(lambda a: -margins(a), len(inputs), torch.linspace(0, 50, 200))
    near = (expected > 0) & (expected < 45)
    assert near.sum() > 5
    torch.testing.assert_close(found[near], expected[near], rtol=1e-4, atol=0)


def test_nothing_is_left_behind() -> None:
    net, inputs, c = made(LinearHead(), (6,))
    net.train()
    net.body[1].eval()
    modes = [m.training for m in net.modules()]
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    with (
        pytest.raises(RuntimeError, match="stop"),
        gated_margin(net, "fc", c, "all", -1, 0, inputs) as margins,
    ):
        assert not net.training
        assert not margins(torch.ones(60)).requires_grad
        # Outside a margin the network is its own self, also within the scope.
        torch.testing.assert_close(net(inputs), net.fc(net.body(inputs)), rtol=0, atol=0)
        raise RuntimeError("stop")
    assert [m.training for m in net.modules()] == modes
    assert not net.fc._forward_hooks
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())


class Skips(LinearHead):
    """Never runs its head."""

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[:, :4]


class Folds(LinearHead):
    """Moves samples out of the first axis."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).repeat(2, 1))


def test_bad_inputs() -> None:
    net, inputs, c = made(LinearHead(), (6,))

    def one(net: nn.Module = net, **change: object) -> Tensor:
        arguments = {
            "module_name": "fc",
            "c": c,
            "rows": "class",
            "sign": -1,
            "target": 0,
            "inputs": inputs,
        } | change
        with gated_margin(net, **arguments) as margins:  # type: ignore[arg-type]
            return margins(torch.ones(60))

    assert one().shape == (60,)
    with pytest.raises(NameNotFound, match="Did you mean 'fc'"):
        one(module_name="fx")
    with pytest.raises(UnsupportedEdit, match="ReLU"):
        one(module_name="body.1")
    with pytest.raises(UnsupportedEdit, match="ungrouped"):
        one(nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), module_name="0")
    with pytest.raises(ShapeMismatch, match="16 input channels"):
        one(c=torch.ones(5))
    with pytest.raises(BadConfig, match="sign is 2"):
        one(sign=2)
    with pytest.raises(BadConfig, match="margin is"):
        one(margin="loss")
    with pytest.raises(BadConfig, match=r"rows \[7\]"):
        one(rows=[7])
    with pytest.raises(BadConfig, match="Class 9"):
        one(target=9)
    with pytest.raises(ShapeMismatch, match="class 9"):
        one(target=9, rows="all")
    with pytest.raises(UnsupportedEdit, match="did not run"):
        one(Skips())
    with pytest.raises(ShapeMismatch, match="first axis"):
        one(Folds())
    with (
        pytest.raises(ShapeMismatch, match="60 samples"),
        gated_margin(net, "fc", c, "class", -1, 0, inputs) as margins,
    ):
        margins(torch.ones(3))
