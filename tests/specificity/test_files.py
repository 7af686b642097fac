from __future__ import annotations

import json
from pathlib import Path

import pytest

from salve_lm.errors import BadConfig, CorruptFile, MissingFile, NameNotFound, StaleStore
from salve_lm.specificity.bootstrap import Bootstrap
from salve_lm.specificity.overlap import check_overlap
from salve_lm.specificity.saes import (
    ModelIdentity,
    check_weights,
    layer_of_metadata,
    load_layer_saes,
)
from salve_lm.specificity.scores import LatentShift, MassShare
from salve_lm.specificity.selection import rank_layers
from salve_lm.specificity.selection_file import check_model, read_selection, selection_record
from salve_lm.task_vectors.patterns import read_latents, read_layers
from tests.specificity.made import layer

MODEL = {
    "source": "a/b", "model_type": "llama", "n_layers": 5, "d_model": 8, "vocabulary": 9,
    "weights": "a" * 64,
}  # fmt: skip


def written(folder: Path, layers: tuple[int, ...] = (1, 3)) -> Path:
    rankings = rank_layers(
        [MassShare(), LatentShift()], [layer(i, i) for i in range(5)], Bootstrap()
    )
    record = selection_record(
        layers, MODEL, rankings[0], rankings, {"rule": "top_n", "n": 2}, latents={"1": [4, 2]}
    )
    path = folder / "layers.json"
    path.write_text(json.dumps(record))
    return path


def test_a_selection_comes_back_and_edits_read_it(tmp_path: Path) -> None:
    path = written(tmp_path)
    found = read_selection(path)
    assert found == read_selection(tmp_path)
    assert found.layers == (1, 3) and found.score == "mass_share"
    assert set(found.scores) == {"mass_share", "latent_shift"}
    assert found.record["scores"]["3"] == found.scores["mass_share"][3]
    low, high = (found.record["rankings"]["mass_share"]["2"][k] for k in ("low", "high"))
    assert low <= high
    check_model(found, MODEL)
    check_model(found, {"n_layers": 5, "weights": None})
    # the reader of TaskVectorInjection
    assert read_layers(str(path), 5) == (1, 3)
    assert read_latents(None, str(path), [1]) == {1: [4, 2]}


def test_a_selection_of_another_model_is_refused(tmp_path: Path) -> None:
    found = read_selection(written(tmp_path))
    with pytest.raises(
        StaleStore, match=r"weights aaaaaaaaaaaa, here bbbbbbbbbbbb.*Run select_lay"
    ):
        check_model(found, {**MODEL, "weights": "b" * 64})
    with pytest.raises(StaleStore, match="n_layers 5, here 6"):
        check_model(found, {"n_layers": 6})


def test_files_that_are_no_selection(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="select_layers"):
        read_selection(tmp_path / "none.json")
    path = tmp_path / "x.json"
    for content, words in (
        ("{", "not readable"),
        ('{"format": "other"}', "not a salve_lm.layers file"),
        ('{"format": "salve_lm.layers", "version": 9}', "format version 9"),
        ('{"format": "salve_lm.layers", "version": 1, "layers": [1]}', "damaged"),
    ):
        path.write_text(content)
        with pytest.raises(CorruptFile, match=words):
            read_selection(path)
    with pytest.raises(CorruptFile, match=r"no layer was chosen.*top_n"):
        read_selection(written(tmp_path, ()))


def test_corpora_must_differ() -> None:
    task = [f"problem {i}" for i in range(20)]
    other = [f"story {i}" for i in range(20)]
    assert check_overlap(task, other).shared == 0
    found = check_overlap(task, [*other, task[3]])
    assert (found.shared, found.share) == (1, 0.05)
    with pytest.raises(BadConfig, match="is the task corpus"):
        check_overlap(task, task[::-1])
    with pytest.raises(BadConfig, match=r"3 of the 20 task documents \(15%\)"):
        check_overlap(task, [*other, *task[:3]])


@pytest.mark.parametrize(
    ("metadata", "layer"),
    [
        ({"layer": 3, "hook_name": "blocks.4.hook_resid_post"}, 3),
        ({"hook_name": "blocks.12.hook_resid_post"}, 12),
        ({"hook_layer": 2}, 2),
        ({"hook_name": "model.language_model.layers.7:output:positions"}, 7),
        ({"hook_name": "transformer.h.1:output:positions"}, 1),
        ({"site": "resid_post.30"}, 30),
        ({"hook_name": "fc:input"}, None),
        ({}, None),
    ],
)
def test_layers_in_metadata(metadata: dict, layer: int | None) -> None:
    assert layer_of_metadata(metadata) == layer


def test_saes_of_other_weights() -> None:
    own = ModelIdentity("x", 8, 5, "a" * 64, "float32")
    made = {"activations": {"backbone": "b" * 64}, "model_dtype": "float32"}
    with pytest.raises(StaleStore, match=r"other weights.*allow_other_model"):
        check_weights("sae", made, own)
    check_weights("sae", made, own, allow_other_model=True)
    check_weights("sae", {**made, "model_dtype": "bfloat16"}, own)
    check_weights("sae", {"activations": {"backbone": "a" * 64}}, own)
    check_weights("sae", {}, own)


def test_public_releases_are_checked_without_a_network() -> None:
    gemma = ModelIdentity("google/gemma-3-4b-it", 2560, 34)
    with pytest.raises(NameNotFound, match="gemma-scope-2-4b-it-res"):
        load_layer_saes("gemma-scope-2-4b-itres:layer_{layer}_width_16k_l0_small", gemma)
    with pytest.raises(NameNotFound, match="width_16k_l0"):
        load_layer_saes("gemma-scope-2-4b-it-res-all:layer_{layer}_width_16k_l0_tiny", gemma)
    with pytest.raises(MissingFile, match=r"No SAE of layer 3 at.*9, 17, 22, 29"):
        load_layer_saes(
            "gemma-scope-2-4b-it-res:layer_{layer}_width_16k_l0_small", gemma, layers=[3, 9]
        )
