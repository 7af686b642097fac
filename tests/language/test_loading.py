"""A model is loaded whole, or an error says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from salve_lm.errors import BadConfig, CorruptFile, MissingFile, ShapeMismatch
from salve_lm.language import load_causal_lm, load_tokenizer, new_causal_lm
from tests.language.tiny_models import CONFIGS, save_model

FILE = "model.safetensors"


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("sharded", [False, True])
def test_loads_every_tensor(family: str, sharded: bool, tmp_path: Path) -> None:
    options = {"max_shard_size": "20KB"} if sharded else {}
    model = save_model(tmp_path, family, **options)
    assert (tmp_path / f"{FILE}.index.json").exists() == sharded
    loaded = load_causal_lm(tmp_path)
    assert not loaded.training
    assert type(loaded) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_dtype_and_device_map(tmp_path: Path) -> None:
    model = new_causal_lm(CONFIGS["llama"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert load_causal_lm(tmp_path).dtype == torch.bfloat16
    assert load_causal_lm(tmp_path, dtype="float32").dtype == torch.float32
    layers = {f"model.layers.{n}": "cpu" if n else "disk" for n in range(3)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    spread = load_causal_lm(tmp_path, device_map={**layers, **rest})
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    ids = torch.arange(8)[None]
    torch.testing.assert_close(spread(ids).logits, load_causal_lm(tmp_path)(ids).logits)


def test_a_missing_shard(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", max_shard_size="20KB")
    gone = sorted(tmp_path.glob("model-*"))[1]
    gone.unlink()
    with pytest.raises(MissingFile, match=rf"lacks 1 of \d shards: {gone.name}. Copy"):
        load_causal_lm(tmp_path)


def test_an_index_that_does_not_match(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", max_shard_size="20KB")
    index = tmp_path / f"{FILE}.index.json"
    content = json.loads(index.read_text())
    first, last = sorted(set(content["weight_map"].values()))[
        :: len(set(content["weight_map"].values())) - 1
    ]
    moved = next(k for k, v in content["weight_map"].items() if v == first)
    content["weight_map"][moved] = last
    index.write_text(json.dumps(content))
    with pytest.raises(CorruptFile, match=rf"it puts {moved} into {last}, which lacks it"):
        load_causal_lm(tmp_path)
    index.write_text("{")
    with pytest.raises(CorruptFile, match="not an index"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(keep: float, tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    file = tmp_path / FILE
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(CorruptFile, match=r"truncated or not a safetensors file .*again"):
        load_causal_lm(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    (tmp_path / FILE).unlink()
    with pytest.raises(MissingFile, match=r"No weights in .*safetensors"):
        load_causal_lm(tmp_path)


def rewrite(folder: Path, change: Any) -> None:
    state = load_file(folder / FILE)
    change(state)
    save_file(state, folder / FILE, metadata={"format": "pt"})


def test_missing_tensors_would_be_random(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    rewrite(tmp_path, lambda state: state.pop("model.norm.weight"))
    with pytest.raises(
        BadConfig, match=r"1 tensors are missing and would be random: model.norm.weight. Give"
    ):
        load_causal_lm(tmp_path)


def test_images_checkpoint_with_the_text_config(tmp_path: Path) -> None:
    """What transformers fills with random numbers from end to end, with a warning."""
    save_model(tmp_path, "gemma3")
    config = json.loads((tmp_path / "config.json").read_text())["text_config"]
    config["architectures"] = ["Gemma3ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadConfig, match=r"would be random: .* have no place .*Gemma 3 with images"):
        load_causal_lm(tmp_path)


def test_unexpected_tensors(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    extra = torch.zeros(2)
    rewrite(tmp_path, lambda state: state.update({"model.layers.3.mlp.up_proj.weight": extra}))
    with pytest.raises(BadConfig, match=r"1 have no place in the model: model.layers.3.mlp.up"):
        load_causal_lm(tmp_path)


def test_constants_of_old_files_are_let_pass(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt2")
    mask = {
        "transformer.h.0.attn.bias": torch.ones(1),
        "transformer.h.0.attn.masked_bias": torch.ones(1),
    }
    rewrite(tmp_path, lambda state: state.update(mask))
    load_causal_lm(tmp_path)


def test_other_shapes(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config["intermediate_size"] = 24
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ShapeMismatch, match=r"9 tensors .*down_proj.weight \[16, 32\], not \[16, 24\]"
    ):
        load_causal_lm(tmp_path)


def test_no_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(BadConfig, match="names of 'vit' models are not known"):
        load_causal_lm(tmp_path)


def test_new_model_is_a_function_of_its_seed() -> None:
    before = torch.random.get_rng_state()
    a, b, c = (new_causal_lm(CONFIGS["llama"], seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(a.state_dict()[weight], b.state_dict()[weight])
    assert not torch.equal(a.state_dict()[weight], c.state_dict()[weight])


def test_new_model_from_a_file(tmp_path: Path) -> None:
    save_model(tmp_path, "gemma3_text")
    for path in (tmp_path, tmp_path / "config.json"):
        assert new_causal_lm(path).config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 8}, "needs a model_type"),
        ({"model_type": "gema3"}, "No model can be made of this config"),
        ({**CONFIGS["llama"], "num_attention_heads": "two"}, "No model can be made of this config"),
        ({"model_type": "vit"}, "names of 'vit'"),
    ],
)
def test_new_model_errors(config: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        new_causal_lm(config)


def test_tokenizer_pads_left(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.padding_side == "left"
    ids = tokenizer(["ab", "a"], padding=True)["input_ids"]
    assert ids[1][0] == tokenizer.pad_token_id


def test_tokenizer_without_padding_takes_eos(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).pad_token == "<eos>"
    del config["eos_token"]
    path.write_text(json.dumps(config))
    with pytest.raises(BadConfig, match=r"neither a padding nor an EOS token\. Set pad_token"):
        load_tokenizer(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    for file in tmp_path.glob("token*"):
        file.unlink()
    with pytest.raises(MissingFile, match=r"No tokenizer in .*`tokenizer`"):
        load_tokenizer(tmp_path)
