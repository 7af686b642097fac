from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from salve_lm.activations.hooks import evaluating, record, run_to
from salve_lm.activations.sites import Site
from salve_lm.errors import BadConfig, NameNotFound, NotFinite
from tests.activations.tiny import TinyNet, TinyStudied, pooled

POOLED = {"x": Site("fc", "input")}
IMAGES = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_equals_the_network_written_out() -> None:
    studied = TinyStudied()
    torch.testing.assert_close(run_to(studied.model, POOLED, IMAGES)["x"], pooled(studied, IMAGES))


@pytest.mark.parametrize("site", [Site("fc", "input"), Site("fc"), Site("relu", "output", "mean")])
def test_later_modules_are_not_executed(site: Site) -> None:
    model = TinyNet()
    run_to(model, {"x": site}, IMAGES)
    assert model.after.runs == 0


def test_stops_at_the_deepest_of_several_sites() -> None:
    model = TinyNet()
    sites = {"deep": Site("fc", "input"), "shallow": Site("conv", "output", "mean")}
    found = run_to(model, sites, IMAGES)
    assert found.keys() == sites.keys()
    assert model.after.runs == 0


def test_what_is_read_is_not_changed_by_later_in_place_modules() -> None:
    model = TinyNet()
    sites = {"x": Site("norm", "output", "positions"), "deep": Site("fc", "input")}
    assert run_to(model, sites, IMAGES)["x"].min() < 0  # the ReLU behind works in place


def test_eval_mode_without_gradients_and_every_module_back_in_its_own_mode() -> None:
    model = TinyNet()
    model.train()
    model.norm.eval()
    before = model.norm.running_mean.clone()
    first, second = (run_to(model, POOLED, IMAGES)["x"] for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    assert not first.requires_grad
    assert torch.equal(model.norm.running_mean, before)
    assert model.training and model.drop.training and not model.norm.training


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken")


def test_nothing_leaks_after_an_exception() -> None:
    model = TinyNet()
    model.pool = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        run_to(model, POOLED, IMAGES)
    with pytest.raises(ValueError, match="mine"), record(model, POOLED):
        raise ValueError("mine")
    with pytest.raises(NameNotFound, match="Did you mean 'conv'"):
        run_to(model, {"a": Site("fc"), "b": Site("cnv")}, IMAGES)
    assert n_hooks(model) == 0
    assert model.training and torch.is_grad_enabled()


class Swallows(nn.Module):
    """Catches every ordinary exception, as a model with a fallback path does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.fell_back = False

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.inner(x)
        except Exception:
            self.fell_back = True
            return x


def test_a_model_that_catches_exceptions_is_stopped_all_the_same() -> None:
    model = Swallows()
    assert run_to(model, {"x": Site("inner")}, torch.ones(2, 3))["x"].shape == (2, 2)
    assert not model.fell_back


def test_record_keeps_the_graph_and_the_latest_pass() -> None:
    model = TinyNet().eval()
    with record(model, POOLED) as read:
        model(IMAGES)
        first = read["x"]
        model(IMAGES[:2])
        read["x"].sum().backward()
        assert read["x"].shape[0] == 2 and first.shape[0] == 4
    assert model.conv.weight.grad is not None
    assert model.after.runs == 2
    assert n_hooks(model) == 0


class TwiceAndKeywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.pair = nn.LSTM(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        x = self.act(input=x + 1)
        return self.pair(x[:, None])[0][:, 0]


def test_shared_modules_keywords_and_tuples() -> None:
    model, x = TwiceAndKeywords(), torch.tensor([[-1.0, 0.0, 2.0]])
    torch.testing.assert_close(run_to(model, {"a": Site("act")}, x)["a"], x.clamp(min=0))
    with record(model, {"a": Site("act")}) as read:
        model(x)
        torch.testing.assert_close(read["a"], x.clamp(min=0))
    tokens = run_to(model, {"p": Site("pair", "output", "mean")}, x)["p"]
    assert tokens.shape == (1, 3)


def test_a_module_that_does_not_run() -> None:
    model = TinyNet()
    model.idle = nn.Linear(1, 1)
    with pytest.raises(BadConfig, match="'idle' did not run"):
        run_to(model, {"x": Site("idle")}, IMAGES)


def test_a_module_without_tensors() -> None:
    class Answer(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x}

    model = nn.Sequential(Answer())
    with pytest.raises(BadConfig, match="gives a dict, not a tensor"):
        run_to(model, {"x": Site("0")}, IMAGES)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_names_site_and_sample(bad: float) -> None:
    images = IMAGES.clone()
    images[2, 0, 3, 3] = bad
    model = TinyNet()
    with pytest.raises(NotFinite, match=r"'fc:input' \(sample 2 of the batch\)"):
        run_to(model, POOLED, images)
    with pytest.raises(NotFinite, match="mine-2"):
        run_to(model, POOLED, images, describe=lambda i: f"mine-{i}")
    with pytest.raises(NotFinite, match=r"'conv:output:positions' \(sample 2"):
        run_to(model, {"x": Site("conv", "output", "positions")}, images)


def test_a_sum_that_overflows_is_not_mistaken_for_infinity() -> None:
    class Huge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((2, 3), 3e38)

    model = nn.Sequential(Huge())
    assert run_to(model, {"x": Site("0")}, IMAGES)["x"].isfinite().all()


def test_evaluating_restores_after_an_exception() -> None:
    model = TinyNet()
    model.norm.eval()
    with pytest.raises(ValueError, match="mine"), evaluating(model):
        assert not model.training
        raise ValueError("mine")
    assert model.training and not model.norm.training
