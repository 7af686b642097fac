"""Names in memory and on disk, against what transformers itself writes and reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig

from salve_lm.errors import BadConfig, CorruptFile, MissingFile
from salve_lm.language import (
    d_model,
    decoder_prefix,
    disk_names,
    is_tied,
    layer_of,
    load_config,
    memory_name,
    n_layers,
)
from salve_lm.language.names import embedding_name, final_norm_name
from tests.language.tiny_models import CONFIGS, save_model

FAMILIES = list(CONFIGS)
PREFIXES = {
    "gemma3_text": "model.layers",
    "gemma3": "model.language_model.layers",
    "llama": "model.layers",
    "llama_tied": "model.layers",
    "gpt2": "transformer.h",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_with_what_transformers_writes(family: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, family)
    config = load_config(tmp_path)
    disk = set(load_file(tmp_path / "model.safetensors"))
    memory = set(model.state_dict())
    assert {memory_name(name, config) for name in disk} == memory - (
        {"lm_head.weight"} if is_tied(config) else set()
    )
    for name in memory:
        (held,) = disk.intersection(disk_names(name, config))
        tied = name == "lm_head.weight" and is_tied(config)
        assert memory_name(held, config) == (embedding_name(config) if tied else name)
    for name in disk:
        assert name in disk_names(memory_name(name, config), config)
        assert memory_name(memory_name(name, config), config) == memory_name(name, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_modules(family: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, family)
    config = model.config
    assert (n_layers(config), d_model(config)) == (3, 16)
    assert decoder_prefix(config) == PREFIXES[family]
    assert len(model.get_submodule(decoder_prefix(config))) == 3  # type: ignore[arg-type]
    assert isinstance(model.get_submodule(final_norm_name(config)), torch.nn.Module)
    assert model.get_parameter(embedding_name(config)) is model.get_input_embeddings().weight
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_tied(config) == shared
    for name, _ in model.named_modules():
        number = layer_of(name, config)
        inside = name.startswith(PREFIXES[family] + ".")
        assert (number is not None) == inside
        if inside:
            assert f"{PREFIXES[family]}.{number}" == ".".join(
                name.split(".")[: PREFIXES[family].count(".") + 2]
            )


def test_layers_of_the_vision_tower_are_no_decoder_layers(tmp_path: Path) -> None:
    model = save_model(tmp_path, "gemma3")
    names = [n for n in model.state_dict() if "vision_tower" in n and ".layers.1." in n]
    assert names
    assert {layer_of(n, model.config) for n in names} == {None}
    assert layer_of("model.language_model.layers.10.mlp.up_proj.weight", model.config) is None


SPELLINGS = {
    "hub": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "written": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "memory": {},
    "short": {
        "model.language_model.": "language_model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
}
CASES = [("gemma3", k) for k in SPELLINGS] + [("llama", "bare"), ("gpt2", "bare")]


@pytest.mark.parametrize(("family", "spelling"), CASES)
def test_every_spelling_that_transformers_reads(family: str, spelling: str, tmp_path: Path) -> None:
    """The tensors that transformers takes from a file are those that the names say."""
    model = save_model(tmp_path, family)
    config = model.config
    bare = {"llama": {"model.": ""}, "gpt2": {"transformer.": ""}}
    prefixes = bare[family] if spelling == "bare" else SPELLINGS[spelling]

    def spell(name: str) -> str:
        for memory, disk in prefixes.items():
            if name.startswith(memory):
                return disk + name.removeprefix(memory)
        return name

    state = {
        n: t for n, t in model.state_dict().items() if n != "lm_head.weight" or not is_tied(config)
    }
    names = {spell(n): n for n in state}
    for disk, memory in names.items():
        assert memory_name(disk, config) == memory
        assert disk in disk_names(memory, config)
    written = {disk: state[memory].clone() for disk, memory in names.items()}
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_unknown_family() -> None:
    with pytest.raises(BadConfig, match=r"names of 'gpt_neox' .* gemma3, .*llama"):
        decoder_prefix(GPTNeoXConfig())


def test_config_errors(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"No config.json in .*Hugging Face folder"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(CorruptFile, match="transformers does not know it"):
        load_config(tmp_path)
    with pytest.raises(MissingFile, match=r"No model 'no/such_model'.*public name.*hf auth login"):
        load_config("no/such_model")


def test_the_configuration_alone_is_enough() -> None:
    options = {k: v for k, v in CONFIGS["gemma3"].items() if k != "model_type"}
    config = AutoConfig.for_model("gemma3", **options)
    assert decoder_prefix(config) == "model.language_model.layers"
    assert disk_names("lm_head.weight", config)[0] == "language_model.model.embed_tokens.weight"
