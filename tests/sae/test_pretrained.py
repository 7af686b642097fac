from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
import sae_lens
import torch

from salve_lm.errors import BadConfig, MissingFile, NameNotFound, OutputExists, ShapeMismatch
from salve_lm.sae import build_training_sae, load_sae, save_sae, to_inference
from salve_lm.sae.pretrained import (
    at_layer,
    check_belongs,
    check_release,
    copy_to_folder,
    is_release,
    open_sae,
    saes_of_layers,
)

RELEASE, ID = "gemma-scope-2-4b-it-res", "layer_9_width_16k_l0_medium"


def make_sae(**metadata: Any) -> Any:
    sae = to_inference(build_training_sae("jumprelu", 12, 24, seed=0))
    for name, value in metadata.items():
        sae.cfg.metadata[name] = value
    return sae


def test_the_releases_of_the_papers_are_known() -> None:
    lookup = check_release(RELEASE, ID)
    assert lookup.model == "google/gemma-3-4b-it"
    assert is_release(f"{RELEASE}:{ID}")


def test_a_folder(tmp_path: Path) -> None:
    out = save_sae(make_sae(), tmp_path / "a:b")  # a colon does not make it a release
    assert not is_release(str(out))
    sae = open_sae(str(out))
    assert torch.equal(sae.W_dec, make_sae().W_dec)
    assert not is_release("./missing:sae")
    with pytest.raises(MissingFile, match=r"No autoencoder at .*RELEASE:ID of SAELens"):
        open_sae("runs/missing")


def test_an_unknown_release_lists_the_nearest() -> None:
    with pytest.raises(NameNotFound) as e:
        open_sae(f"gemma-scope-2-4b-it-ress:{ID}")
    assert RELEASE in e.value.candidates
    with pytest.raises(NameNotFound, match=f"Did you mean .*'{ID}'"):
        open_sae(f"{RELEASE}:layer_9_width_16k_l0_mediun")


def test_an_id_that_another_release_has() -> None:
    with pytest.raises(NameNotFound, match="Release 'gemma-scope-2-4b-it-res-all' has it"):
        open_sae(f"{RELEASE}:layer_0_width_16k_l0_big")


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("no route to host"),
        OSError("offline mode is enabled"),
        RuntimeError("no route to host"),
    ],
)
def test_without_a_network(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", fail)
    with pytest.raises(MissingFile, match=r"google/gemma-scope-2-4b-it.*needs a network.*folder"):
        open_sae(f"{RELEASE}:{ID}")


def test_a_release_is_copied_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def fake(release: str, sae_id: str, *args: Any, **kwargs: Any) -> Any:
        asked.append((release, sae_id))
        return make_sae(hook_name="blocks.9.hook_resid_post", model_name="google/gemma-3-4b-it")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", fake)
    out = copy_to_folder(f"{RELEASE}:{ID}", tmp_path / "sae")
    assert asked == [(RELEASE, ID)]
    sae = load_sae(out)
    assert sae.cfg.metadata["hook_name"] == "blocks.9.hook_resid_post"
    assert sae.cfg.metadata["source"] == f"{RELEASE}:{ID}"
    with pytest.raises(OutputExists):
        copy_to_folder(f"{RELEASE}:{ID}", out)


def test_layers() -> None:
    template = f"{RELEASE}:layer_{{layer}}_width_16k_l0_medium"
    assert at_layer(template, 9) == f"{RELEASE}:{ID}"
    assert saes_of_layers(template, [9, 17])[17].endswith("layer_17_width_16k_l0_medium")
    assert saes_of_layers("runs/sae", [3]) == {3: "runs/sae"}
    assert saes_of_layers(["a", "b"], [0, 1]) == {0: "a", 1: "b"}
    with pytest.raises(BadConfig, match=r"\{layer\}"):
        saes_of_layers("runs/sae", [3, 4])
    with pytest.raises(BadConfig, match="2 SAEs for 3 layers"):
        saes_of_layers(["a", "b"], [0, 1, 2])


@pytest.mark.parametrize(
    "hook",
    [
        {"hook_name": "blocks.9.hook_resid_post"},
        {"hook_name": "model.layers.9"},
        {"hook_name": "x", "site": "resid_post.9"},
        {"hook_name": "model.language_model.layers.9:output:positions"},
    ],
)
def test_another_layer(hook: dict[str, str]) -> None:
    sae = make_sae(**hook)
    check_belongs(sae, "a", layer=9, d_in=12)
    with pytest.raises(BadConfig, match=r"trained on layer 9 .* not on layer 19.*SAE of layer 19"):
        check_belongs(sae, "a", layer=19)


def test_another_width_place_or_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sae = make_sae(hook_name="blocks.9.hook_mlp_out", model_name="google/gemma-3-4b-it")
    with pytest.raises(ShapeMismatch, match=r"width 12.*they are 2560 wide"):
        check_belongs(sae, "a", d_in=2560)
    with pytest.raises(BadConfig, match="hook_mlp_out, not on resid_post"):
        check_belongs(sae, "a", layer=9)
    with pytest.raises(BadConfig, match="google/gemma-3-4b-it, not on google/gemma-3-12b-it"):
        check_belongs(sae, "a", model_name="google/gemma-3-12b-it")
    check_belongs(sae, "a", model_name="gemma-3-4b-it")
    with caplog.at_level(logging.WARNING):
        check_belongs(sae, "a", model_name=str(tmp_path))
    assert "fine-tuned copy" in caplog.text
    check_belongs(make_sae(), "a", d_in=12, layer=3, model_name="anything")
