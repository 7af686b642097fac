from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from salve_lm.edits import (
    DecoderGuided,
    EditContext,
    PlainModel,
    ResidualScaling,
    apply,
    plan_edit,
)
from salve_lm.edits.live import LiveEdit
from salve_lm.edits.lookup import ModelIndex
from salve_lm.edits.ops import ScaleChannels
from salve_lm.errors import (
    BadConfig,
    MissingFile,
    NameNotFound,
    ShapeMismatch,
    StaleStore,
    UnsupportedEdit,
)
from salve_lm.specificity.selection_file import identity_of
from tests.edits.language import (
    BEHIND,
    FAMILIES,
    READERS,
    SANDWICH,
    WRITERS,
    Language,
    build,
    tensors_of,
)
from tests.edits.tiny import write_sae


@pytest.fixture(scope="module", params=FAMILIES)
def language(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Language:
    return build(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Language:
    return build(tmp_path_factory.mktemp("gemma"), "gemma3_text")


@pytest.mark.parametrize("direction", ["suppress", "enhance"])
def test_readers_equal_gated_inputs(language: Language, direction: str) -> None:
    edit = ResidualScaling(
        sae=language.saes, latents={0: [2], 1: [1, 5]}, layers=[0, 1], reads=True, writes=False,
        alpha=2.0, direction=direction,
    )  # fmt: skip
    done = language.edited(edit)
    names = {n: [f"{language.layers}.{n}.{r}" for r in READERS[language.family]] for n in (0, 1)}
    assert set(done.tensors) == {f"{n}.weight" for both in names.values() for n in both}
    sign = 1 if direction == "enhance" else -1
    first = language.factors(0, [2], 2.0, sign)
    second = language.factors(1, [1, 5], 2.0, sign)
    with (
        language.changed(names[0], inputs=lambda x: x * first),
        language.changed(names[1], inputs=lambda x: x * second),
    ):
        expected = language.logits()
    assert torch.allclose(language.logits(done.tensors), expected, atol=1e-5)
    assert not torch.allclose(language.logits(), expected, atol=1e-2)


def test_writers_equal_gated_outputs(language: Language) -> None:
    edit = ResidualScaling(sae=language.sae, latents=[1, 5], layers="all", alpha=1.5)
    done = language.edited(edit)
    sandwich = language.family in SANDWICH
    where = BEHIND if sandwich else WRITERS[language.family]
    names = [f"{language.layers}.{n}.{w}" for n in range(3) for w in where]
    expected_names = {f"{n}.weight" for n in names}
    if language.family == "gpt2":
        expected_names |= {f"{n}.bias" for n in names}
    assert set(done.tensors) == expected_names
    f = language.factors(1, [1, 5], 1.5)
    with language.changed(names, outputs=lambda m, x, y: y * f):
        expected = language.logits()
    assert torch.allclose(language.logits(done.tensors), expected, atol=1e-5)
    assert not torch.allclose(language.logits(), expected, atol=1e-2)
    # the same through single layers
    one = DecoderGuided(module=names[0], axis="output", feature=[1, 5], alpha=1.5, sae=language.sae)
    for name, tensor in language.edited(one).tensors.items():
        assert torch.equal(tensor, done.tensors[name])


def test_the_final_norm_gates_the_unembedding(language: Language) -> None:
    edit = ResidualScaling(sae=language.sae, latents=[3], final=True, alpha=3.0)
    done = language.edited(edit)
    bias = [f"{language.final_norm}.bias"] if language.family == "gpt2" else []
    assert set(done.tensors) == {f"{language.final_norm}.weight", *bias}
    f = language.factors(1, [3], 3.0)
    with language.changed(["lm_head"], inputs=lambda x: x * f):
        expected = language.logits()
    assert torch.allclose(language.logits(done.tensors), expected, atol=1e-5)
    for module in ("final_norm", language.final_norm):
        one = DecoderGuided(module=module, feature=3, alpha=3.0, sae=language.sae)
        for name, tensor in language.edited(one).tensors.items():
            assert torch.equal(tensor, done.tensors[name])
    # the SAE of the last chosen layer counts where every layer has its own
    both = ResidualScaling(sae=language.saes, latents={0: [0], 2: [4]}, layers=[0, 2], final=True)
    f = language.factors(2, [4], 1.0)
    with language.changed(["lm_head"], inputs=lambda x: x * f):
        expected = language.logits(
            {n: t for n, t in language.edited(both).tensors.items() if language.layers in n}
        )
    assert torch.allclose(language.logits(language.edited(both).tensors), expected, atol=1e-5)


def test_a_live_edit_gives_the_bits_back(language: Language) -> None:
    before = tensors_of(language.model)
    edit = ResidualScaling(
        sae=language.sae, latents=[1], layers=[0, 2], reads=True, final=True, alpha=2.0
    )
    done = language.edited(edit)
    live = LiveEdit(ModelIndex(language.model), done.tensors)
    shown = language.model.state_dict()
    assert all(torch.equal(shown[n], t) for n, t in before.items())
    assert all(
        torch.equal(language.model.get_parameter(n), t) and not torch.equal(before[n], t)
        for n, t in done.tensors.items()
    )
    live.restore()
    after = tensors_of(language.model)
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_a_gain_with_an_offset_keeps_channels_that_are_not_scaled() -> None:
    w = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 1e-3
    c = torch.zeros(1, 64, dtype=torch.float64)
    c[0, :8] = 0.5
    op = ScaleChannels(module="n", output_dim=0, alpha=1.0, c=c, sign=-1, axis="output", offset=1.0)
    new = apply({"n.weight": w}, [op])["n.weight"]
    assert torch.equal(new[8:], w[8:])
    assert torch.allclose(1 + new[:8].double(), (1 + w[:8].double()) / 2, atol=1e-7)
    cut = apply({"n.weight": w}, [dataclasses.replace(op, alpha=9.0)])["n.weight"]
    assert (cut[:8] == -1).all()


def test_permuted_is_a_control_of_the_same_factors(gemma: Language) -> None:
    edit = ResidualScaling(sae=gemma.sae, latents=[1], layers=[1], alpha=2.0)
    control = dataclasses.replace(edit, guide="permuted", seed=3)
    plans = [plan_edit(e, PlainModel(gemma.model, "lm_head")) for e in (edit, control)]
    plain, shuffled = (p.ops[0].factors for p in plans)
    assert torch.equal(plain.sort().values, shuffled.sort().values)
    assert not torch.equal(plain, shuffled)
    assert plans[0].features == (1,) and "writes" in edit.title


def test_selection_files_name_layers_and_latents(gemma: Language, tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    record = {
        "format": "salve_lm.layers", "version": 1, "layers": [2], "score": "s", "rankings": {},
        "latents": {"0": [7], "2": [4, 3, 1]}, "model": identity_of(gemma.model.config),
    }  # fmt: skip
    file.write_text(json.dumps(record))
    edit = ResidualScaling(sae=gemma.saes, layers=str(file), top=2)
    plan = plan_edit(edit, PlainModel(gemma.model, "lm_head"))
    assert plan.features == (4, 3)
    assert {m.split(".")[2] for m in plan.modules} == {"2"}
    record["model"]["d_model"] = 8  # type: ignore[index]
    file.write_text(json.dumps(record))
    with pytest.raises(StaleStore, match="another model"):
        plan_edit(edit, PlainModel(gemma.model, "lm_head"))


def test_tensors_by_pattern(gemma: Language) -> None:
    edit = ResidualScaling(
        sae=gemma.sae, latents=[1], layers=[1], tensors=["mlp.*"], reads=True, writes=False
    )
    plan = plan_edit(edit, PlainModel(gemma.model, "lm_head"))
    assert plan.modules == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")


def test_bad_input(gemma: Language, tmp_path: Path) -> None:
    good = ResidualScaling(sae=gemma.saes, latents={0: [1], 1: [2]}, layers=[0, 1])

    def refused(kind: type[Exception], match: str, **changes: object) -> None:
        with pytest.raises(kind, match=match):
            edit = dataclasses.replace(good, **changes)
            plan_edit(edit, PlainModel(gemma.model, "lm_head"), EditContext())

    narrow = write_sae(tmp_path / "narrow", d_in=8)
    dead = write_sae(tmp_path / "dead", d_in=16, zero_row=2)
    other = tmp_path / "other"
    shutil.copytree(gemma.saes.format(layer=0), other)
    config = json.loads((other / "cfg.json").read_text())
    config.setdefault("metadata", {})["hook_name"] = "blocks.2.hook_resid_post"
    (other / "cfg.json").write_text(json.dumps(config))
    (tmp_path / "wrong_0").symlink_to(other)
    one = {"layers": [0], "latents": [1]}
    refused(ShapeMismatch, "8", sae=narrow, **one)
    refused(UnsupportedEdit, "zero decoder row", sae=dead, layers=[0], latents=[2])
    refused(BadConfig, "layer 2", sae=str(tmp_path / "wrong_{layer}"), **one)
    refused(MissingFile, "nowhere", sae=str(tmp_path / "nowhere"), **one)
    refused(NameNotFound, "RELEASE|release", sae="gemma-scope-9-4b:layer_1", **one)
    refused(NameNotFound, "99", latents={0: [99], 1: [0]})
    refused(NameNotFound, "layer", layers=[0, 7])
    refused(BadConfig, "as one list", sae=gemma.sae)
    refused(BadConfig, "No latents", latents={0: [1]})
    refused(BadConfig, "Which latents", latents=None)
    refused(BadConfig, "needs an SAE", sae=None)
    refused(BadConfig, "Where", layers=None)
    refused(BadConfig, "set one to true", writes=False)
    refused(BadConfig, "matrix that writes", tensors=["mlp.gate_proj.weight"])
    refused(BadConfig, "top", top=0)
    refused(BadConfig, "Which layer's SAE", layers=None, final=True)
    with pytest.raises(BadConfig, match="language model of transformers"):
        plan_edit(good, PlainModel(nn.Linear(16, 2)))
    with pytest.raises(BadConfig, match="final norm of a language model"):
        plan_edit(
            DecoderGuided(module="final_norm", feature=1, sae=gemma.sae),
            PlainModel(nn.Sequential(nn.Linear(16, 2))),
        )
    # scaling what a norm rescales
    with pytest.raises(UnsupportedEdit, match="post_feedforward_layernorm"):
        plan_edit(
            DecoderGuided(
                module="model.layers.1.mlp.down_proj", axis="output", feature=1, sae=gemma.sae
            ),
            PlainModel(gemma.model, "lm_head"),
        )
    with pytest.raises(ShapeMismatch, match="16"):
        plan_edit(
            DecoderGuided(module="model.layers.1.self_attn.q_norm", feature=1, sae=gemma.sae),
            PlainModel(gemma.model, "lm_head"),
        )
