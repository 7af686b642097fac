from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from salve_lm.edits import DecoderGuided, PlainModel, plan_edit
from salve_lm.edits.lookup import ModelIndex
from salve_lm.errors import BadConfig, EditConflict, NameNotFound
from tests.edits.tiny import D_IN, Fixture, Net


def stack() -> nn.Module:
    layers = [nn.Sequential(nn.Linear(D_IN, D_IN), nn.ReLU()) for _ in range(12)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(D_IN, 2)})


def test_names_and_patterns_are_anchored(caplog: pytest.LogCaptureFixture) -> None:
    model = stack()
    with caplog.at_level(logging.INFO, "salve_lm"):
        assert list(ModelIndex(model).find("layers.1.0", None)) == ["layers.1.0"]
        assert list(ModelIndex(model).find("layers.1.*", None)) == ["layers.1.0"]
        assert list(ModelIndex(model).find("layers.1*.0", None)) == [
            "layers.1.0", "layers.10.0", "layers.11.0",
        ]  # fmt: skip
        assert len(ModelIndex(model).find("*.0", None)) == 12
    assert "matches 3 layers: layers.1.0, layers.10.0, layers.11.0" in caplog.text
    for pattern in ("ayers.1.0", "layers.1.", "LAYERS.*", "layer?.1.0.x"):
        with pytest.raises(NameNotFound):
            ModelIndex(model).find(pattern, None)
    with pytest.raises(NameNotFound, match=r"Did you mean 'layers\.1\.0'"):
        ModelIndex(model).find("layer.1.0", None)


def test_head_is_an_alias() -> None:
    model = stack()
    assert list(ModelIndex(model).find("head", "layers.3.0")) == ["layers.3.0"]
    assert list(ModelIndex(model).find("head", None)) == ["head"]
    with pytest.raises(BadConfig, match="head_name"):
        ModelIndex(Net()).find("head", None)


def test_compiled_modules_keep_their_names() -> None:
    net = Net()
    compiled = torch.compile(net, backend="eager")
    assert ModelIndex(compiled).find("fc", None)["fc"] is net.fc
    net.hidden = torch.compile(net.hidden, backend="eager")  # type: ignore[assignment]
    assert "hidden.weight" in ModelIndex(compiled).tensors
    assert set(ModelIndex(net).tensors) == set(Net().state_dict())


class Tied(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(2 * D_IN, D_IN)
        self.fc = nn.Linear(D_IN, 2 * D_IN, bias=False)
        if how == "parameter":
            self.fc.weight = self.embed.weight
        elif how == "memory":
            self.fc.weight = nn.Parameter(self.embed.weight.detach())
        elif how == "part":
            self.fc.weight = nn.Parameter(self.embed.weight.detach()[:D_IN])
        elif how == "module":
            self.again = self.fc
        elif how == "buffer":
            self.register_buffer("copy", self.fc.weight.detach()[3])
        elif how == "halves":  # one storage, no shared element
            both = torch.zeros(4 * D_IN, D_IN)
            self.embed.weight = nn.Parameter(both[: 2 * D_IN])
            self.fc.weight = nn.Parameter(both[2 * D_IN :])


@pytest.mark.parametrize("how", ["parameter", "memory", "part", "module", "buffer"])
def test_tied_weights_are_refused(tiny: Fixture, how: str) -> None:
    model = PlainModel(Tied(how), None)
    other = {"module": "again.weight", "buffer": "copy"}.get(how, "embed.weight")
    spec = DecoderGuided(module="fc", feature=1, sae=tiny.sae)
    with pytest.raises(EditConflict, match=f"'fc.weight' shares its memory with '{other}'"):
        plan_edit(spec, model, tiny.context)
    allowed = DecoderGuided(module="fc", feature=1, sae=tiny.sae, allow_tied=True)
    assert plan_edit(allowed, model, tiny.context).tensors == ("fc.weight",)


@pytest.mark.parametrize("how", ["none", "halves"])
def test_neighbours_in_memory_are_not_tied(tiny: Fixture, how: str) -> None:
    model = Tied(how)
    plan_edit(DecoderGuided(module="fc", feature=1, sae=tiny.sae), PlainModel(model), tiny.context)
    assert [o.name for o in ModelIndex(model).sharing(model.fc.weight)] == ["fc.weight"]
