from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from salve_lm.edits import DecoderGuided, EditPlan, PlainModel, apply, plan_edit
from salve_lm.errors import (
    BadConfig,
    NameNotFound,
    NoEffect,
    SalveError,
    ShapeMismatch,
    StaleStore,
    UnsupportedEdit,
)
from tests.edits.tiny import D_IN, D_SAE, NAMES, Conv1D, Fixture, K, state, write_sae


def plan(tiny: Fixture, studied: PlainModel | None = None, **options: Any) -> EditPlan:
    options = {**tiny.paths, **options}
    return plan_edit(DecoderGuided(**options), studied or tiny.studied, tiny.context)


def edited(tiny: Fixture, studied: PlainModel | None = None, **options: Any) -> dict[str, Any]:
    studied = studied or tiny.studied
    before = state(studied.model)
    after = apply(before, plan(tiny, studied, **options).ops)
    assert all(torch.equal(t, before[n]) for n, t in studied.model.state_dict().items())
    return {n: t.numpy() for n, t in after.items()}


def weight(tiny: Fixture) -> np.ndarray:
    return tiny.studied.model.fc.weight.detach().numpy().astype(np.float64)


def guide(tiny: Fixture, latent: int) -> np.ndarray:
    row = np.abs(tiny.decoder[latent].numpy())
    return row / np.linalg.norm(row)


@settings(deadline=None, max_examples=30)
@given(
    latent=st.integers(0, D_SAE - 1),
    alpha=st.floats(0.01, 1000),
    enhance=st.booleans(),
    rows=st.sampled_from(["class", "all", [1, 3], ["tower"]]),
)
def test_the_formula(tiny: Fixture, latent: int, alpha: float, enhance: bool, rows: Any) -> None:
    direction = "enhance" if enhance else "suppress"
    got = edited(
        tiny, feature=latent, alpha=alpha, direction=direction, rows=rows, target_class="church"
    )
    sign = 1 if enhance else -1
    factor = np.maximum(0, 1 + sign * alpha * guide(tiny, latent))
    expected = weight(tiny)
    chosen = {"class": [0], "all": list(range(K))}.get(str(rows), [NAMES.index(r) if r in NAMES else r for r in rows])  # noqa: E501  # fmt: skip
    expected[chosen] = expected[chosen] * factor
    assert list(got) == ["fc.weight"]
    np.testing.assert_allclose(got["fc.weight"], expected, rtol=3e-7)


def test_all_rows_equal_gating_the_input(tiny: Fixture) -> None:
    got = edited(tiny, feature=3, alpha=1.5, rows="all")
    x = tiny.x.numpy()
    gated = x * np.maximum(0, 1 - 1.5 * guide(tiny, 3))
    np.testing.assert_allclose(x @ got["fc.weight"].T, gated @ weight(tiny).T, rtol=1e-4, atol=1e-5)


def test_several_features_multiply(tiny: Fixture) -> None:
    together = edited(tiny, feature=[2, "dominant:tower"], alpha=0.7, rows="all")
    other = tiny.table.dominant("tower")
    factor = 1.0
    for latent in (2, other):
        factor = factor * np.maximum(0, 1 - 0.7 * guide(tiny, latent))
    np.testing.assert_allclose(together["fc.weight"], weight(tiny) * factor, rtol=3e-7)
    assert plan(tiny, feature=[2, "dominant:tower"], rows="all").features == (2, other)


@pytest.mark.parametrize("norm", ["unit", "raw", "max"])
def test_decoder_norms(tiny: Fixture, norm: str) -> None:
    row = np.abs(tiny.decoder[5].numpy())
    scale = {"unit": np.linalg.norm(row), "raw": 1.0, "max": row.max()}[norm]
    got = edited(tiny, feature=5, alpha=0.5, rows="all", decoder_norm=norm)
    factor = np.maximum(0, 1 - 0.5 * row / scale)
    np.testing.assert_allclose(got["fc.weight"], weight(tiny) * factor, rtol=3e-7)


def test_with_max_the_first_channel_is_cut_at_one(tiny: Fixture) -> None:
    got = edited(tiny, feature=5, alpha=1.0, rows="all", decoder_norm="max")["fc.weight"]
    assert (got == 0).all(axis=0).sum() == 1


def test_default_rows_and_features(tiny: Fixture) -> None:
    dominant = tiny.table.dominant("pump")
    for options in (
        {"target_class": "pump"},
        {"target_class": 3, "feature": "dominant"},
        {"feature": "dominant:pump"},
        {"feature": ["dominant:3"]},
    ):
        made = plan(tiny, **options)
        assert made.features == (dominant,)
        assert made.target == 3
        assert made.ops[0].rows == (3,)
    # features of two classes, or by index, name no class: all rows
    for feature in (["dominant:pump", "dominant:church"], dominant):
        made = plan(tiny, feature=feature)
        assert made.target is None
        assert made.ops[0].rows is None


def test_signed_guide(tiny: Fixture) -> None:
    table, decoder = tiny.table, tiny.decoder.numpy()
    rows = weight(tiny)
    mu = table.mean.numpy()
    contrast = mu[1] - np.delete(mu, 1, axis=0).mean(0)
    scores = (decoder @ (rows[1] - rows.mean(0))) * contrast
    best = np.argsort(-scores, kind="stable")[:4]
    c = np.maximum(0, (contrast[best, None] * decoder[best]).sum(0))
    c /= np.linalg.norm(c)
    made = plan(tiny, target_class=1, guide="decoder_signed", signed_top_k=4)
    assert made.features == tuple(best)
    np.testing.assert_allclose(made.ops[0].c[0], c, rtol=1e-12)

    named = plan(tiny, target_class=1, guide="decoder_signed", feature=[2, 7])
    c = np.maximum(0, (contrast[[2, 7], None] * decoder[[2, 7]]).sum(0))
    np.testing.assert_allclose(named.ops[0].c[0], c / np.linalg.norm(c), rtol=1e-12)


def test_signed_guide_needs_activations_that_are_never_negative(signed: Fixture) -> None:
    assert signed.x.min() < 0
    with pytest.raises(UnsupportedEdit, match="never negative"):
        plan(signed, target_class=1, guide="decoder_signed")
    plan(signed, target_class=1)  # the paper's guide does not


def test_control_guides(tiny: Fixture) -> None:
    unit = guide(tiny, tiny.table.dominant(2))
    shuffled = plan(tiny, target_class=2, guide="permuted", seed=1).ops[0].c[0].numpy()
    assert not np.array_equal(shuffled, unit)
    np.testing.assert_allclose(np.sort(shuffled), np.sort(unit), rtol=1e-12)
    again = plan(tiny, target_class=2, guide="permuted", seed=1).ops[0].c[0].numpy()
    np.testing.assert_array_equal(shuffled, again)
    other = plan(tiny, target_class=2, guide="permuted", seed=2).ops[0].c[0].numpy()
    assert not np.array_equal(shuffled, other)

    row = np.abs(weight(tiny)[2])
    head = plan(tiny, target_class=2, guide="head_row")
    np.testing.assert_allclose(head.ops[0].c[0], row / np.linalg.norm(row), rtol=1e-12)
    assert head.features == ()

    means = np.stack([tiny.x.double().numpy()[tiny.label.numpy() == k].mean(0) for k in range(K)])
    c = np.maximum(0, means[2] - np.delete(means, 2, axis=0).mean(0))
    mean = plan(tiny, target_class=2, guide="class_mean", decoder_norm="max")
    np.testing.assert_allclose(mean.ops[0].c[0], c / c.max(), rtol=1e-9)


def test_controls_without_a_sae(tiny: Fixture) -> None:
    spec = DecoderGuided(target_class=2, guide="head_row")
    plan_edit(spec, tiny.studied)
    plan_edit(
        DecoderGuided(target_class=2, guide="class_mean", features=tiny.features), tiny.studied
    )


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("axis", ["input", "output"])
def test_convolutions(tiny: Fixture, kernel: int, axis: str) -> None:
    conv = nn.Conv2d(D_IN, D_IN, kernel)
    model = PlainModel(nn.Sequential(conv, nn.Flatten()), None)
    got = edited(tiny, model, module="0", feature=4, alpha=2.0, axis=axis)
    factor = np.maximum(0, 1 - 2.0 * guide(tiny, 4))
    old = conv.weight.detach().numpy()
    shape = (1, -1, 1, 1) if axis == "input" else (-1, 1, 1, 1)
    np.testing.assert_allclose(got["0.weight"], old * factor.reshape(shape), rtol=3e-7)
    if axis == "output":
        np.testing.assert_allclose(got["0.bias"], conv.bias.detach().numpy() * factor, rtol=3e-7)
    else:
        assert "0.bias" not in got
    # the same as gating what the layer reads or writes
    image = torch.randn(2, D_IN, 5, 5)
    gate = torch.from_numpy(factor).float().reshape(1, -1, 1, 1)
    wanted = conv(image * gate) if axis == "input" else conv(image) * gate
    bias = torch.from_numpy(got["0.bias"]) if axis == "output" else conv.bias
    seen = nn.functional.conv2d(image, torch.from_numpy(got["0.weight"]), bias)
    torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", ["input", "output"])
def test_gpt2_layers_have_their_axes_swapped(tiny: Fixture, axis: str) -> None:
    wide = {"nf": 5, "nx": D_IN} if axis == "input" else {"nf": D_IN, "nx": 5}
    layer = Conv1D(**wide)
    got = edited(
        tiny, PlainModel(nn.Sequential(layer)), module="0", feature=4, alpha=2.0, axis=axis
    )
    factor = np.maximum(0, 1 - 2.0 * guide(tiny, 4))
    by_axis = factor[:, None] if axis == "input" else factor[None]
    np.testing.assert_allclose(got["0.weight"], layer.weight.detach().numpy() * by_axis, rtol=3e-7)
    assert ("0.bias" in got) == (axis == "output")


def test_real_gpt2_layer_is_recognised(tiny: Fixture) -> None:
    from transformers.pytorch_utils import Conv1D as TransformersConv1D

    layer = TransformersConv1D(5, D_IN)
    got = edited(tiny, PlainModel(nn.Sequential(layer)), module="0", feature=4, alpha=2.0)
    factor = np.maximum(0, 1 - 2.0 * guide(tiny, 4))
    old = layer.weight.detach().numpy()
    np.testing.assert_allclose(got["0.weight"], old * factor[:, None], rtol=3e-7)


def test_patterns_edit_every_match(tiny: Fixture) -> None:
    layers = nn.ModuleList([nn.Linear(D_IN, 3) for _ in range(11)])
    model = PlainModel(nn.ModuleDict({"layers": layers}), None)
    assert set(edited(tiny, model, module="layers.1", feature=0)) == {"layers.1.weight"}
    made = plan(tiny, model, module="layers.1*", feature=0)
    assert made.modules == ("layers.1", "layers.10")
    assert len(edited(tiny, model, module="layers.*", feature=0)) == 11


def test_with_alpha_resolves_nothing_again(tiny: Fixture) -> None:
    first = plan(tiny, target_class="tower", alpha=0.0)
    for alpha in (0.5, 3.0):
        swept = first.with_alpha(alpha)
        fresh = plan(tiny, target_class="tower", alpha=alpha)
        assert swept.spec == fresh.spec
        a, b = (apply(state(tiny.studied.model), p.ops) for p in (swept, fresh))
        assert torch.equal(a["fc.weight"], b["fc.weight"])
    with pytest.raises(NoEffect, match="Raise alpha"):
        apply(state(tiny.studied.model), first.ops)


BAD: list[tuple[dict[str, Any], type[SalveError], str]] = [
    ({"feature": 99}, NameNotFound, "The latents are 0 to 11"),
    ({"feature": "dominant:churhc"}, NameNotFound, "'church'"),
    ({"target_class": "towr"}, NameNotFound, "'tower'"),
    ({"target_class": 7}, NameNotFound, "4 classes"),
    ({}, BadConfig, "Name a `feature`"),
    ({"feature": 1, "sae": None}, BadConfig, "needs an SAE"),
    ({"feature": "dominant:tower", "features": None}, BadConfig, "needs class statistics"),
    ({"feature": 1, "rows": "class"}, BadConfig, "target_class"),
    ({"feature": 1, "rows": []}, BadConfig, "empty list"),
    ({"feature": 1, "rows": [9]}, NameNotFound, "4 classes"),
    ({"feature": 1, "rows": ["chruch"]}, NameNotFound, "'church'"),
    ({"feature": []}, BadConfig, "empty list"),
    ({"guide": "head_row"}, BadConfig, "target_class"),
    ({"feature": 1, "alpha": -1.0}, BadConfig, "not negative"),
    ({"feature": 1, "alpha": float("nan")}, BadConfig, "finite"),
    ({"feature": 1, "signed_top_k": 0}, BadConfig, "at least 1"),
    ({"target_class": 1, "guide": "head_row", "axis": "output"}, UnsupportedEdit, "output axis"),
    ({"feature": 1, "module": "fcc"}, NameNotFound, "'fc'"),
    ({"feature": 1, "module": "relu"}, UnsupportedEdit, "is a ReLU"),
    ({"feature": 1, "module": "rel*"}, UnsupportedEdit, "no Linear or Conv"),
    ({"feature": 1, "module": "hidden"}, ShapeMismatch, "width 8, the input axis of 'hidden' has 5. Layers whose input axis has 8: fc"),  # noqa: E501
    ({"feature": 1, "axis": "output"}, ShapeMismatch, "the output axis of 'fc' has 4. Layers whose output axis has 8: hidden"),  # noqa: E501
    ({"feature": 1, "axis": "output", "module": "hidden", "rows": "class", "target_class": 1}, UnsupportedEdit, "leave `rows` out"),  # noqa: E501
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_input(tiny: Fixture, options: Any, error: type[SalveError], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(tiny, **options)


def test_class_rows_belong_to_the_head(tiny: Fixture) -> None:
    model = PlainModel(nn.ModuleDict({"a": nn.Linear(D_IN, K), "fc": nn.Linear(D_IN, K)}), "fc")
    with pytest.raises(UnsupportedEdit, match="are not classes"):
        plan(tiny, model, module="a", target_class=1, rows="class")
    assert plan(tiny, model, module="a", target_class=1).ops[0].rows is None
    assert plan(tiny, model, module="a", feature=1, rows=[0, "2"]).ops[0].rows == (0, 2)
    with pytest.raises(BadConfig, match="indices 0 to 3"):
        plan(tiny, model, module="a", feature=1, rows=[4])


def test_other_unsuitable_layers(tiny: Fixture) -> None:
    grouped = nn.Conv2d(D_IN, D_IN, 1, groups=2)
    with pytest.raises(UnsupportedEdit, match="2 groups"):
        plan(tiny, PlainModel(nn.Sequential(grouped)), module="0", feature=1)
    empty = nn.Sequential(nn.Linear(D_IN, 2, device="meta"))
    planned = plan(tiny, PlainModel(empty), module="0", feature=1)
    with pytest.raises(UnsupportedEdit, match="meta"):
        apply(empty.state_dict(), planned.ops)
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(D_IN, 2))
    with pytest.raises(UnsupportedEdit, match="ordinary"):
        plan(tiny, PlainModel(nn.Sequential(parametrised)), module="0", feature=1)
    with pytest.raises(BadConfig, match="head_name"):
        plan(tiny, PlainModel(nn.Sequential(nn.Linear(D_IN, 2))), feature=1)


def test_artefacts_that_do_not_belong_together(tiny: Fixture, tmp_path: Any) -> None:
    other = write_sae(tmp_path / "other", seed=5)
    with pytest.raises(StaleStore, match="another SAE"):
        plan(tiny, sae=other, feature="dominant:tower")
    narrow = write_sae(tmp_path / "narrow", d_in=6)
    with pytest.raises(ShapeMismatch, match=r"width 6, the input axis of 'fc' has 8. No layer"):
        plan(tiny, sae=narrow, feature=0)
    wider = PlainModel(nn.ModuleDict({"fc": nn.Linear(D_IN, K + 1)}), "fc")
    with pytest.raises(ShapeMismatch, match="4 classes, 'fc' has 5 outputs"):
        plan(tiny, wider, feature="dominant:tower")
    with pytest.raises(StaleStore, match="'church' there, 'chapel' here"):
        spec = DecoderGuided(target_class=1, **tiny.paths)
        plan_edit(spec, tiny.studied, tiny.context, ["chapel", *NAMES[1:]])


def test_a_dead_latent(tiny: Fixture, tmp_path: Any) -> None:
    dead = write_sae(tmp_path / "dead", zero_row=4)
    with pytest.raises(UnsupportedEdit, match=r"Latent 4 .* zero decoder row"):
        plan(tiny, sae=dead, feature=4)


def test_specs_are_values(tiny: Fixture) -> None:
    spec = DecoderGuided(feature="dominant:tower")
    assert dataclasses.replace(spec, alpha=3.0).alpha == 3.0
    assert spec == DecoderGuided(feature="dominant:tower")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.alpha = 2.0  # type: ignore[misc]
    assert spec.title == "DecoderGuided(dominant:tower, alpha=1)"
    assert dataclasses.replace(spec, name="mine").title == "mine"
