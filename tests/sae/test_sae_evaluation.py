from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salve_lm.errors import BadConfig, MissingFile, NameNotFound, ShapeMismatch
from salve_lm.modules.sae_evaluation import SAEEvaluation
from salve_lm.sae import build_training_sae, save_sae
from tests.sae.group import fit_group, token_data, trainer


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("group") / "saes"
    options = {"architecture": "topk", "options": {"k": 3}, "loss_recovered_windows": 5}
    fit_group(token_data(), {**options, "out": str(out)})
    return out


def validate(saes: dict[str, str], **options: Any) -> dict[str, float]:
    module = SAEEvaluation(saes, **options)
    return dict(trainer().validate(module, datamodule=token_data(), verbose=False)[0])


def test_gives_what_was_saved_with_the_autoencoders(saes: Path) -> None:
    sites = ["resid_post.0", "resid_post.2"]
    found = validate({s: str(saes / s) for s in sites}, loss_recovered_windows=5)
    for site in sites:
        metrics = json.loads((saes / site / "metrics.json").read_text())
        for name in ("explained_variance", "l0", "dead_fraction", "loss_clean", "loss_zero",
                     "loss_spliced", "loss_recovered"):  # fmt: skip
            assert found[f"{site}/val/{name}"] == pytest.approx(metrics[name], rel=1e-4), name
    assert len(found) == 2 * 7


def test_autoencoders_that_do_not_belong(saes: Path, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"trained on layer 0 .* not on layer 1"):
        validate({"resid_post.1": str(saes / "resid_post.0")})
    with pytest.raises(NameNotFound, match=r"resid_post\.2"):
        validate({"resid_post.7": str(saes / "resid_post.0")})
    wide = save_sae(build_training_sae("standard", 17, 24, seed=0), tmp_path / "wide")
    with pytest.raises(ShapeMismatch, match="width 17"):
        validate({"resid_post.1": str(wide)})
    with pytest.raises(MissingFile, match="No autoencoder at"):
        validate({"resid_post.1": str(tmp_path / "none")})
    with pytest.raises(NameNotFound, match="gemma-scope"):
        validate({"resid_post.1": "gemma-scope-2-4b-it-re:x"})
    with pytest.raises(BadConfig, match="one or more `saes`"):
        validate({})
