"""Loss recovered, against a forward pass written out and edited by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from salve_lm.data.tokens import PackedTokens
from salve_lm.errors import NameNotFound, ShapeMismatch
from salve_lm.sae import build_training_sae, to_inference
from salve_lm.sae.spliced import Splice, replaced, spliced_losses
from tests.activations.tiny_language import WIDTH, TinyCorpus, TinyLanguage

LAYER = 1


@pytest.fixture(scope="module")
def studied() -> TinyLanguage:
    return TinyLanguage()


@pytest.fixture(scope="module")
def windows(studied: TinyLanguage) -> PackedTokens:
    return PackedTokens(TinyCorpus(20).documents(), studied.tokenizer, 12)


def make_sae(architecture: str = "standard", d_in: int = WIDTH) -> Any:
    options = {"k": 4} if architecture == "topk" else {}
    return to_inference(build_training_sae(architecture, d_in, 24, options, seed=0))


def batches(windows: PackedTokens) -> list[Any]:
    return [windows.batch(part) for part in torch.arange(len(windows)).split(4)]


class Replace(nn.Module):
    """A decoder layer whose output is replaced, built into a copy of the model."""

    def __init__(self, layer: nn.Module, change: Any) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.change(self.layer(*args, **kwargs))


@torch.no_grad()
def by_hand(studied: TinyLanguage, windows: PackedTokens, change: Any, layer: int = LAYER) -> float:
    """One window and one token at a time; `change(x [d]) -> [d]` of the tokens that count."""
    total, n = 0.0, 0
    for w in range(len(windows)):
        window = windows.batch(torch.tensor([w]))
        # BOS is token 1, padding 0; a document's first token stands at place 0
        counts = [
            int(t) not in (0, 1) and int(p) > 0
            for t, p in zip(window.input_ids[0], window.position_ids[0], strict=True)
        ]

        def edit(x: Tensor, counts: list[bool] = counts) -> Tensor:
            return torch.stack([change(v) if c else v for v, c in zip(x[0], counts, strict=True)])[
                None
            ]

        model = copy.deepcopy(studied.model)
        if change is not None:
            model.model.layers[layer] = Replace(model.model.layers[layer], edit)
        logits = model(**window.model_inputs()).logits[0]
        for t in range(1, windows.context):
            if window.target[0, t]:
                total -= float(logits[t - 1].log_softmax(-1)[window.input_ids[0, t]])
                n += 1
    return total / n


@pytest.mark.parametrize("architecture", ["standard", "topk", "linear_l1"])
def test_equals_a_model_edited_by_hand(
    studied: TinyLanguage, windows: PackedTokens, architecture: str
) -> None:
    sae = make_sae(architecture)
    splice = Splice(f"model.layers.{LAYER}", "output", sae)
    found = spliced_losses(studied.model, {"a": splice}, batches(windows))["a"]
    clean = by_hand(studied, windows, None)
    spliced = by_hand(studied, windows, lambda x: sae.decode(sae.encode(x[None]))[0])
    zero = by_hand(studied, windows, torch.zeros_like)
    assert found.clean == pytest.approx(clean, rel=1e-5)
    assert found.spliced == pytest.approx(spliced, rel=1e-5)
    assert found.zero == pytest.approx(zero, rel=1e-5)
    assert found.recovered == pytest.approx((zero - spliced) / (zero - clean), rel=1e-3)


def test_several_at_once_are_each_alone(studied: TinyLanguage, windows: PackedTokens) -> None:
    splices = {
        "a": Splice("model.layers.0", "output", make_sae()),
        "b": Splice("model.layers.2", "output", make_sae("topk")),
        "c": Splice("model.layers.0", "output", make_sae("linear_l1")),
        "d": Splice("model.layers.1", "input", make_sae()),
    }
    together = spliced_losses(studied.model, splices, batches(windows))
    for name, splice in splices.items():
        assert (
            spliced_losses(studied.model, {name: splice}, batches(windows))[name]
            == (together[name])
        )
    # what enters a layer is what the one before it gave
    assert together["d"].spliced == pytest.approx(together["a"].spliced)
    assert together["d"].zero == pytest.approx(together["a"].zero)


def test_a_perfect_autoencoder_recovers_all(studied: TinyLanguage, windows: PackedTokens) -> None:
    sae = to_inference(build_training_sae("linear_l1", WIDTH, WIDTH, seed=0))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(WIDTH) * 2)
        sae.W_dec.copy_(torch.eye(WIDTH) / 2)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    splice = Splice("model.layers.0", "output", sae)
    found = spliced_losses(studied.model, {"a": splice}, batches(windows))["a"]
    assert found.recovered == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():
        sae.W_dec.zero_()
    found = spliced_losses(studied.model, {"a": splice}, batches(windows))["a"]
    assert found.recovered == pytest.approx(0.0, abs=1e-5)


def test_the_model_is_left_as_it_was(studied: TinyLanguage, windows: PackedTokens) -> None:
    studied.model.train()
    splice = Splice("model.layers.0", "output", make_sae(d_in=WIDTH + 1))
    with pytest.raises(ShapeMismatch, match=r"width 17, but model\.layers\.0 gives 16"):
        spliced_losses(studied.model, {"a": splice}, batches(windows))
    assert all(module.training for module in studied.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in studied.model.modules())
    studied.model.eval()
    with pytest.raises(NameNotFound, match=r"model\.layers\.2"):
        spliced_losses(studied.model, {"a": splice._replace(module="model.layers.22")}, [])


def test_replaces_the_first_of_several_outputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x, "rest"

    module = Two()
    with replaced(module, lambda x: x + 1):
        assert module(torch.zeros(1)) == (torch.ones(1), "rest")
    with replaced(module, lambda x: x + 1, "input"):
        assert module(x=torch.zeros(1)) == (torch.ones(1), "rest")
    assert module(torch.zeros(1)) == (torch.zeros(1), "rest")
