from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from salve_lm.errors import BadConfig, CorruptFile, MissingFile, NameNotFound
from salve_lm.task_vectors.patterns import read_latents, read_layers, select_tensors

INSIDE = ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight",
          "input_layernorm.weight")  # fmt: skip
LLAMA = AutoConfig.for_model("llama", num_hidden_layers=20)
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{name}" for i in range(20) for name in INSIDE),
    "model.norm.weight",
    "lm_head.weight",
]
GEMMA = AutoConfig.for_model("gemma3", text_config={"num_hidden_layers": 20})
IMAGES = [
    "model.vision_tower.encoder.layers.1.self_attn.q_proj.weight",
    "model.vision_tower.encoder.layers.1.layer_norm1.weight",
    "model.multi_modal_projector.mm_input_projection_weight",
]
GEMMA_NAMES = [*IMAGES, *(n.replace("model.", "model.language_model.", 1) for n in NAMES)]


def select(layers: object, patterns: list[str] | None) -> tuple[str, ...]:
    return select_tensors(NAMES, LLAMA, read_layers(layers, 20), patterns)  # type: ignore[arg-type]


def test_a_layer_is_only_that_layer() -> None:
    assert select([1], None) == tuple(f"model.layers.1.{n}" for n in INSIDE)
    assert len(select("all", None)) == 20 * len(INSIDE)
    assert select([1], ["self_attn.*"]) == tuple(f"model.layers.1.{n}" for n in INSIDE[:2])
    assert select([11, 1], ["*norm.weight"]) == (
        "model.layers.1.input_layernorm.weight",
        "model.layers.11.input_layernorm.weight",
    )


def test_images_are_never_matched() -> None:
    found = select_tensors(GEMMA_NAMES, GEMMA, (1,), ["*"])
    assert found == tuple(f"model.language_model.layers.1.{n}" for n in INSIDE)
    everything = select_tensors(GEMMA_NAMES, GEMMA, tuple(range(20)), ["*", "model.*"])
    assert not set(everything) & set(IMAGES)
    assert len(everything) == len(GEMMA_NAMES) - len(IMAGES) - 1  # but for lm_head
    with pytest.raises(NameNotFound):
        select_tensors(GEMMA_NAMES, GEMMA, (1,), ["model.vision_tower.*"])


def test_outside_of_layers_by_full_name_only() -> None:
    assert select(None, ["model.norm.weight"]) == ("model.norm.weight",)
    assert select(None, ["lm_head.weight", "model.embed_tokens.*"]) == (
        "model.embed_tokens.weight",
        "lm_head.weight",
    )
    assert select([3], ["model.layers.3.mlp.*", "model.norm.weight"]) == (
        "model.layers.3.mlp.down_proj.weight",
        "model.norm.weight",
    )
    with pytest.raises(NameNotFound, match="give it by that full name"):
        select([1], ["embed_tokens.weight"])
    with pytest.raises(NameNotFound):
        select([1], ["model.layers.3.mlp.*"])  # not among the chosen layers


@pytest.mark.parametrize("pattern", ["q_proj", "self_attn.q_proj", "q_proj.weight", "self_attn"])
def test_half_a_name_is_an_error_that_lists_near_ones(pattern: str) -> None:
    with pytest.raises(NameNotFound, match=r"only a part of 'self_attn\.q_proj\.weight'"):
        select([1], [pattern])


def test_typing_errors_list_near_names() -> None:
    with pytest.raises(NameNotFound, match=r"mlp\.down_proj\.weight"):
        select([1], ["mlp.dwn_proj.weight"])
    with pytest.raises(NameNotFound, match="Known: self_attn"):
        select([1], ["zzz"])
    with pytest.raises(BadConfig, match="Which layers"):
        select(None, ["self_attn.*"])
    with pytest.raises(BadConfig, match="Which layers"):
        select(None, None)
    with pytest.raises(BadConfig, match="is empty"):
        select([1], [])


def test_layers(tmp_path: Path) -> None:
    file = tmp_path / "selection.json"
    file.write_text(json.dumps({"layers": [9, 17], "latents": {"9": [1], "17": [2, 3]}}))
    assert read_layers(str(file), 20) == (9, 17)
    assert read_layers([3, 1, 3], 20) == (1, 3)
    assert read_layers(None, 20) is None
    for wrong in ([20], [-1]):
        with pytest.raises(NameNotFound, match="0 to 19"):
            read_layers(wrong, 20)
    with pytest.raises(BadConfig, match="empty"):
        read_layers([], 20)
    with pytest.raises(BadConfig, match="whole numbers"):
        read_layers([1.5], 20)  # type: ignore[list-item]
    with pytest.raises(MissingFile, match=r"nowhere\.json"):
        read_layers(str(tmp_path / "nowhere.json"), 20)
    file.write_text("{")
    with pytest.raises(CorruptFile, match="not readable as JSON"):
        read_layers(str(file), 20)
    file.write_text('{"layers": "all"}')
    with pytest.raises(CorruptFile, match="no list"):
        read_layers(str(file), 20)


def test_latents(tmp_path: Path) -> None:
    file = tmp_path / "selection.json"
    file.write_text(json.dumps({"layers": [9, 17], "latents": {"9": [1], "17": [2, 3]}}))
    expected = {9: [1], 17: [2, 3]}
    assert read_latents(None, str(file), [9, 17]) == expected
    assert read_latents(str(file), [9, 17], [9, 17]) == expected
    assert read_latents(expected, [9, 17], [17]) == {17: [2, 3]}
    assert read_latents([4], [9], [9]) == {9: [4]}
    with pytest.raises(BadConfig, match="one list for layers"):
        read_latents([4], [9, 17], [9, 17])
    with pytest.raises(BadConfig, match=r"layers \[3\]"):
        read_latents(expected, [3], [3])
    with pytest.raises(BadConfig, match="Which latents"):
        read_latents(None, [3], [3])
    with pytest.raises(BadConfig, match="layer -> list"):
        read_latents({9: 3}, [9], [9])  # type: ignore[dict-item]


def test_a_wrapped_model_is_refused() -> None:
    with pytest.raises(BadConfig, match="not a wrapper"):
        select_tensors([f"base_model.{n}" for n in NAMES], LLAMA, (1,), None)
