from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from torch import Tensor

from salve_lm.errors import CorruptFile, MissingFile, NameNotFound, NotFinite, OutputExists
from salve_lm.hashing import hash_file
from salve_lm.sae import hash_sae, load_sae, read_metadata, save_sae, to_inference

Make = Callable[..., Any]


def test_saelens_reads_what_is_saved(
    architecture: str,
    trained_looking: Make,
    make_activations: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    x = make_activations(40)
    inference = to_inference(trained_looking(architecture))
    folder = save_sae(inference, tmp_path / "sae", metadata={"l0": 3.5})
    theirs, ours = sae_lens.SAE.load_from_disk(folder), load_sae(folder)
    with torch.no_grad():
        z, x_hat = inference.encode(x), inference(x)
        assert z.count_nonzero() > 0
        for sae in (theirs, ours):
            torch.testing.assert_close(sae.encode(x), z, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(sae(x), x_hat, rtol=1e-6, atol=1e-6)
    assert theirs.cfg.metadata.sae_lens_version == sae_lens.__version__
    assert theirs.cfg.metadata.l0 == 3.5
    assert theirs.cfg.metadata.training_architecture == architecture
    assert theirs.cfg.normalize_activations == "none"
    assert sorted(p.name for p in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_batch_top_k_becomes_jump_relu_at_its_threshold(
    trained_looking: Make, make_activations: Callable[..., Tensor]
) -> None:
    x = make_activations(40)
    for name in ("batchtopk", "matryoshka_batchtopk"):
        sae = trained_looking(name)
        inference = to_inference(sae)
        assert inference.cfg.architecture() == "jumprelu"
        with torch.no_grad():
            _, pre = sae.encode_with_hidden_pre(x)
            expected = torch.where(pre > 0.4, pre, 0.0)
            torch.testing.assert_close(inference.encode(x), expected, rtol=1e-5, atol=1e-6)


def test_a_training_autoencoder_is_untouched_by_its_copy(
    architecture: str, trained_looking: Make
) -> None:
    sae = trained_looking(architecture)
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    to_inference(sae, fold_decoder_norm=True)
    assert all(torch.equal(before[k], v) for k, v in sae.state_dict().items())
    assert str(sae.cfg.device) == "cpu"


SAELENS_ALONE = """
import json, sys, torch
from sae_lens import SAE
assert not any(m.startswith("salve_lm") for m in sys.modules)
x = torch.load(sys.argv[1], weights_only=True)
for folder in sys.argv[2:]:
    with torch.no_grad():
        torch.save(SAE.load_from_disk(folder)(x), folder + ".out")
"""


def test_saelens_alone_opens_its_own_architectures(
    trained_looking: Make,
    options: dict[str, Any],
    make_activations: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    x = make_activations(20)
    torch.save(x, tmp_path / "x.pt")
    expected = {}
    for name in options:
        if name != "linear_l1":
            sae = to_inference(trained_looking(name))
            save_sae(sae, tmp_path / name, metadata={"site": "pooled"}, metrics={"l0": 1.0})
            with torch.no_grad():
                expected[str(tmp_path / name)] = sae(x)
    arguments = [sys.executable, "-c", SAELENS_ALONE, str(tmp_path / "x.pt"), *expected]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(arguments, check=True, cwd=tmp_path, env=env)
    for folder, x_hat in expected.items():
        read = torch.load(folder + ".out", weights_only=True)
        torch.testing.assert_close(read, x_hat, rtol=1e-6, atol=1e-6)


def test_linear_l1_opens_with_saelens_after_the_import(
    trained_looking: Make, make_activations: Callable[..., Tensor], tmp_path: Path
) -> None:
    x = make_activations(20)
    sae = to_inference(trained_looking("linear_l1"))
    save_sae(sae, tmp_path / "sae")
    torch.save(x, tmp_path / "x.pt")
    with torch.no_grad():
        expected = x @ sae.W_enc + sae.b_enc
        expected = expected @ sae.W_dec + sae.b_dec
    code = SAELENS_ALONE.replace("assert not any", "import salve_lm.sae\nassert any")
    # the CLI imports the training module at its start: SAELens, which is slow, must wait
    early = (
        "import sys, salve_lm.modules.sae, salve_lm.metrics; assert 'sae_lens' not in sys.modules"
    )
    code = f"{early}\n{code}"
    arguments = [sys.executable, "-c", code, str(tmp_path / "x.pt"), str(tmp_path / "sae")]
    subprocess.run(arguments, check=True)
    read = torch.load(str(tmp_path / "sae.out"), weights_only=True)
    torch.testing.assert_close(read, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture
def folder(trained_looking: Make, tmp_path: Path) -> Path:
    return save_sae(trained_looking("standard"), tmp_path / "sae", metrics={"l0": 2.0})


def test_hash_metadata_and_metrics(folder: Path) -> None:
    assert hash_sae(folder) == hash_file(folder / "sae_weights.safetensors")
    assert read_metadata(folder)["training_architecture"] == "standard"
    assert json.loads((folder / "metrics.json").read_text()) == {"l0": 2.0}


def test_an_existing_folder_is_kept(folder: Path, trained_looking: Make) -> None:
    before = hash_sae(folder)
    with pytest.raises(OutputExists):
        save_sae(trained_looking("gated"), folder)
    assert hash_sae(folder) == before
    save_sae(trained_looking("gated"), folder, replace=True)
    assert load_sae(folder).cfg.architecture() == "gated"
    assert [p.name for p in folder.parent.iterdir()] == ["sae"]


def test_nan_is_not_saved(trained_looking: Make, tmp_path: Path) -> None:
    sae = trained_looking("standard")
    sae.b_dec.data[0] = float("nan")
    with pytest.raises(NotFinite, match=r"'b_dec'.*Nothing was written"):
        save_sae(sae, tmp_path / "sae")
    assert list(tmp_path.iterdir()) == []


def test_training_checkpoints_of_saelens_are_converted(
    trained_looking: Make, make_activations: Callable[..., Tensor], tmp_path: Path
) -> None:
    x = make_activations(20)
    sae = trained_looking("batchtopk")
    sae.save_model(tmp_path / "checkpoint")
    with torch.no_grad():
        torch.testing.assert_close(load_sae(tmp_path / "checkpoint")(x), to_inference(sae)(x))


def test_a_file_of_an_old_saelens_is_read(folder: Path) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["metadata"], cfg["architecture"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    assert load_sae(folder).cfg.architecture() == "standard"


def test_missing(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(MissingFile, match=r"No autoencoder at .*nowhere.*Give the folder"):
        load_sae(tmp_path / "nowhere")
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(MissingFile, match=r"No sae_weights\.safetensors in"):
        load_sae(folder)
    with pytest.raises(MissingFile):
        hash_sae(folder)


def test_foreign_folder_or_file(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").touch()
    with pytest.raises(CorruptFile, match=r"no cfg\.json \(found model\.safetensors\)"):
        load_sae(tmp_path / "other")
    with pytest.raises(CorruptFile, match=r"is a folder with cfg\.json, not a file"):
        load_sae(folder / "cfg.json")
    (folder / "cfg.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CorruptFile, match="not the config of a SAELens autoencoder"):
        load_sae(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -3])
def test_truncated_weights(folder: Path, keep: int) -> None:
    file = folder / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CorruptFile, match="truncated or not a safetensors file"):
        load_sae(folder)


def test_foreign_weights(folder: Path) -> None:
    (folder / "sae_weights.safetensors").write_bytes(b"\x80\x04 a pickle, perhaps" * 20)
    with pytest.raises(CorruptFile, match="truncated or not a safetensors file"):
        load_sae(folder)


def test_truncated_config(folder: Path) -> None:
    file = folder / "cfg.json"
    file.write_text(file.read_text()[:40])
    with pytest.raises(CorruptFile, match=r"cfg\.json: truncated or not JSON"):
        load_sae(folder)


def _change(folder: Path, **changes: Any) -> None:
    cfg = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps(cfg))


def test_wrong_architecture(folder: Path) -> None:
    _change(folder, architecture="standart")
    with pytest.raises(NameNotFound, match=r"'standard'.*cfg\.json"):
        load_sae(folder)
    _change(folder, architecture="gated")
    with pytest.raises(CorruptFile, match="weights do not fit"):
        load_sae(folder)


def test_weights_of_another_size(folder: Path) -> None:
    _change(folder, d_sae=25)
    with pytest.raises(CorruptFile, match=r"weights do not fit its cfg\.json .*size mismatch"):
        load_sae(folder)


def test_nan_in_the_file(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "sae_weights.safetensors"
    weights = load_file(file)
    weights["W_enc"][0, 0] = float("inf")
    save_file(weights, file)
    with pytest.raises(NotFinite, match="'W_enc'"):
        load_sae(folder)


def test_a_scale_that_saelens_ignores_is_warned_about(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _change(folder, normalize_activations="expected_average_only_in")
    load_sae(folder)
    assert "SAELens does not do after loading" in caplog.text
