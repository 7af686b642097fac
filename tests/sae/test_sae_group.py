from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch

from salve_lm.activations.datamodule import ActivationData
from salve_lm.errors import BadConfig, NameNotFound, OutputExists, ShapeMismatch
from salve_lm.modules.sae import SAETraining
from salve_lm.modules.sae_group import SAEGroupTraining
from salve_lm.modules.sae_sweep import members_of
from salve_lm.sae import ARCHITECTURES
from salve_lm.sae.early_backward import differentiated
from tests.activations.tiny import TinyData, TinyStudied
from tests.activations.tiny_language import LAYERS, WIDTH
from tests.sae.group import (
    SHARED,
    Alone,
    OneSite,
    fit_group,
    read_folder,
    state_of,
    token_data,
    trainer,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "batchtopk": {"k": 3},
    "matryoshka_batchtopk": {"k": 3, "matryoshka_widths": [4, 12]},
}
SITES = [f"resid_post.{n}" for n in range(LAYERS)]


def images() -> ActivationData:
    return ActivationData(None, TinyStudied(), TinyData(n_train=97, n_val=37), batch_size=16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_member_ends_as_if_trained_alone(architecture: str) -> None:
    """To the bit: with clipping, schedules, input scaling, resampling, and each its own seed."""
    top_k = "topk" in architecture
    shared = {
        **SHARED, "architecture": architecture, "options": OPTIONS.get(architecture, {}),
        "normalize_input": "expected_average_only_in", "lr_warm_up_steps": 3, "dead_after": 60,
        "lr_decay_steps": 4, "l1_warm_up_steps": 0 if top_k else 5,
        "dead_feature_handling": "aux" if top_k else "resample",
    }  # fmt: skip
    group, of_group = fit_group(
        images(), {**shared, "sweep": {"seed": [0, 3], "lr": [1e-2, 3e-3]}}, gradient_clip_val=0.5
    )
    assert len(group.members) == 4
    for seed in (0, 3):
        for lr in (1e-2, 3e-3):
            alone = SAETraining(**{**shared, "seed": seed, "lr": lr})
            of_alone = trainer(gradient_clip_val=0.5)
            of_alone.fit(alone, datamodule=images())
            name = f"seed_{seed}-lr_{lr}"
            state = state_of(group, name)
            assert state.keys() == alone.state_dict().keys()
            for key, value in alone.state_dict().items():
                assert torch.equal(state[key], value), (name, key)
            for key, value in of_alone.callback_metrics.items():
                assert torch.equal(of_group.callback_metrics[f"{name}/{key}"], value), key


@pytest.mark.parametrize("normalize", ["none", "covariance_whitening"])
def test_layers_of_a_language_model_in_one_pass(normalize: str) -> None:
    options = {"architecture": "standard", "normalize_input": normalize}
    group, _ = fit_group(token_data(), options)
    for site in SITES:
        alone = Alone(**{**SHARED, **options})
        trainer().fit(alone, datamodule=OneSite(token_data(), site))
        for key, value in alone.state_dict().items():
            assert torch.equal(state_of(group, site)[key], value), (site, key)


def test_members_of_their_own(tmp_path: Path) -> None:
    members = {
        "deep": {"site": "resid_post.2", "architecture": "topk", "options": {"k": 2}},
        "wide": {"site": "resid_post.0", "d_sae": 40, "options": {"l1_coefficient": 0.3}},
    }
    group, fitted = fit_group(token_data(), {"members": members, "out": str(tmp_path / "saes")})
    assert sorted(p.name for p in (tmp_path / "saes").iterdir()) == ["deep", "wide"]
    deep = sae_lens.SAE.load_from_disk(tmp_path / "saes" / "deep")
    wide = sae_lens.SAE.load_from_disk(tmp_path / "saes" / "wide")
    assert deep.cfg.architecture() == "topk"
    assert wide.cfg.architecture() == "linear_l1"
    assert wide.W_dec.shape == (40, WIDTH)
    told = deep.cfg.metadata
    assert told.hook_name == "blocks.2.hook_resid_post"
    assert told.layer == 2
    assert told.context_size == 12
    assert told.model_dtype == "float32"
    assert told.activations["site"] == "model.layers.2:output:positions"
    metrics = json.loads((tmp_path / "saes" / "deep" / "metrics.json").read_text())
    for name in ("explained_variance", "l0", "dead_fraction"):
        assert metrics[name] == pytest.approx(float(fitted.callback_metrics[f"deep/val/{name}"]))
    tested = trainer().validate(group, datamodule=token_data(), verbose=False)[0]
    assert tested["wide/val/l0"] == pytest.approx(float(fitted.callback_metrics["wide/val/l0"]))


def test_metrics_are_measured_in_one_pass_where_no_validation_came_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, passes = token_data(), []
    original = data.val_dataloader
    monkeypatch.setattr(data, "val_dataloader", lambda: passes.append(1) or original())
    options = {"architecture": "standard", "out": str(tmp_path / "saes")}
    fit_group(data, options, limit_val_batches=0)
    assert len(passes) == 1
    fit_group(token_data(), {**options, "out": str(tmp_path / "validated")})
    a, b = read_folder(tmp_path / "saes"), read_folder(tmp_path / "validated")
    assert len(a) == 3 * 3
    assert a == b


def test_loss_recovered_is_saved(tmp_path: Path) -> None:
    options = {"architecture": "standard", "out": str(tmp_path), "loss_recovered_windows": 6}
    fit_group(token_data(), {**options, "out": str(tmp_path / "saes")}, max_epochs=12)
    for site in SITES:
        metrics = json.loads((tmp_path / "saes" / site / "metrics.json").read_text())
        gap = metrics["loss_zero"] - metrics["loss_clean"]
        expected = (metrics["loss_zero"] - metrics["loss_spliced"]) / gap
        assert metrics["loss_recovered"] == pytest.approx(expected)
    with pytest.raises(BadConfig, match="loss_recovered_windows to 0"):
        fit_group(images(), {**options, "out": str(tmp_path / "images")})


class Kept:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_a_differentiated_loss_keeps_no_latents() -> None:
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> Kept:
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    w = torch.randn(5, 7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        loss = (torch.randn(9, 5) @ w).square().mean()
        assert len(alive) >= 2
        early = differentiated(loss, [w])
        del loss
        assert not alive
    early.backward()
    assert w.grad is not None


def test_gradients_by_a_weight() -> None:
    w, unused = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    (expected,) = torch.autograd.grad((w**3).sum() * 0.5, w)
    early = differentiated((w**3).sum(), [w, unused])
    (early * 0.5).backward()
    torch.testing.assert_close(w.grad, expected)
    assert unused.grad is None


def test_loads_from_a_checkpoint_without_data(tmp_path: Path) -> None:
    group, fitted = fit_group(token_data(), {"architecture": "standard"})
    fitted.save_checkpoint(tmp_path / "group.ckpt")
    again = SAEGroupTraining.load_from_checkpoint(tmp_path / "group.ckpt")
    assert [m.member.name for m in again.members] == SITES
    for key, value in group.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_a_checkpoint_of_other_members_is_refused(tmp_path: Path) -> None:
    _, fitted = fit_group(token_data(), {"architecture": "standard"})
    fitted.save_checkpoint(tmp_path / "group.ckpt")
    for options, message in (
        ({"sites": SITES[:2]}, r"members resid_post\.0, .* and now they are"),
        ({"seed": 1}, r"seed \(was 0, is 1\)"),
    ):
        group = SAEGroupTraining(**{**SHARED, "architecture": "standard", **options})
        with pytest.raises(BadConfig, match=message):
            trainer().fit(group, datamodule=token_data(), ckpt_path=tmp_path / "group.ckpt")


def test_names_of_a_grid() -> None:
    sweep = {"l1_coefficient": [0.5, 1], "seed": [0, 1]}
    one = members_of(["pooled"], {"lr": 0.1}, sweep)
    assert [m.name for m in one] == [
        f"l1_coefficient_{a}-seed_{s}" for a in (0.5, 1) for s in (0, 1)
    ]
    assert one[3].arguments == {"lr": 0.1, "seed": 1, "options": {"l1_coefficient": 1}}
    assert members_of(["pooled"], {})[0].name == "pooled"
    two = members_of(SITES[:2], {}, {"k": [3]})
    assert [m.name for m in two] == ["resid_post.0-k_3", "resid_post.1-k_3"]
    assert members_of(["a"], {}, {"lr": ["1e-3"]})[0].arguments["lr"] == 1e-3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sweep": {"seed": []}}, BadConfig, "one or more values"),
        ({"sweep": {"sede": [0]}}, NameNotFound, "sede"),
        ({"sweep": {"seed": [0, 0]}}, BadConfig, "are the same"),
        ({"members": {"a": {}}, "sweep": {"seed": [0]}}, BadConfig, "not both"),
        ({"members": {"a": {"site": "resid_post.0", "sed": 1}}}, NameNotFound, "'seed'"),
        ({"members": {"a": {"site": "resid_post.0", "out": "x"}}}, BadConfig, "Remove 'out'"),
        ({"members": {"a": {"site": "resid_post.0", "lr": "x"}}}, BadConfig, "a number"),
        ({"members": {"a": {"d_sae": 3}}}, BadConfig, "needs a `site`"),
        ({"members": {"a": {"site": "resid_post.9"}}}, NameNotFound, r"resid_post\.2"),
        ({"members": {"a/b": {"site": "resid_post.0"}}}, BadConfig, "name of a folder"),
        ({"sites": ["resid_post.7"]}, BadConfig, r"no site 'resid_post\.7'"),
        ({"d_in": {"resid_post.0": 5}}, ShapeMismatch, "16 wide"),
        ({"architecture": "tpk"}, NameNotFound, "topk"),
        ({"lr": -1.0}, BadConfig, "lr must be positive"),
        ({"loss_recovered_windows": -1}, BadConfig, "not be negative"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit_group(token_data(), {"architecture": "standard", **options})


def test_an_existing_output_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "saes" / SITES[1]).mkdir(parents=True)
    with pytest.raises(OutputExists, match=r"resid_post\.1"):
        fit_group(token_data(), {"architecture": "standard", "out": str(tmp_path / "saes")})
