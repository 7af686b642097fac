from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from salve_lm.errors import BadConfig, CorruptFile, MissingFile, NameNotFound, ShapeMismatch
from salve_lm.language import new_causal_lm
from salve_lm.task_vectors.sources import open_source
from salve_lm.task_vectors.weights import FolderWeights, GivenWeights
from tests.language.tiny_models import CONFIGS, save_model
from tests.task_vectors.pair import FAMILIES, Pair, build_pair


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return build_pair(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_folders(family: str, tmp_path: Path) -> None:
    """Both spellings, sharded and not; every parameter under its name in memory."""
    pair = build_pair(tmp_path, family)
    source = open_source(pair.tuned, pair.base)
    source.check(GivenWeights(pair.theta, pair.model.config))
    assert set(pair.theta) <= set(source.names)
    for name, tau in pair.tau.items():
        assert source.shape(name) == tuple(tau.shape)
        assert torch.equal(source.rows(name, 0, len(tau)), tau)
        assert torch.equal(source.rows(name, len(tau) // 2, len(tau)), tau[len(tau) // 2 :])
    assert source.to_dict() == {"finetuned": pair.tuned, "base": pair.base}


def test_the_base_may_come_later(llama: Pair) -> None:
    source = open_source(llama.tuned)
    name = "model.norm.weight"
    with pytest.raises(BadConfig, match="needs the base model"):
        source.rows(name, 0, 3)
    bound = source.with_base(GivenWeights(llama.theta))
    assert torch.equal(bound.rows(name, 0, 3), llama.tau[name][:3])
    own = open_source(llama.tuned, llama.base)
    assert own.with_base(GivenWeights({})) is own
    with pytest.raises(NameNotFound, match="norm"):
        own.rows("model.nrm.weight", 0, 1)


def test_bfloat16_is_subtracted_in_float32(tmp_path: Path) -> None:
    for i, name in enumerate(("a", "b")):
        model = new_causal_lm(CONFIGS["llama"], i).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name)
    a, b = (FolderWeights(tmp_path / n) for n in ("a", "b"))
    name = "model.layers.0.mlp.up_proj.weight"
    tau = open_source(tmp_path / "b", tmp_path / "a").rows(name, 0, 4)
    assert tau.dtype == torch.float32
    assert torch.equal(tau, b.rows(name, 0, 4) - a.rows(name, 0, 4))
    # lambda = 1 between two bf16 checkpoints is lossless
    assert torch.equal((a.rows(name, 0, 4) + tau).bfloat16(), b.stored_rows(name, 0, 4))


def test_hashes_are_of_the_tensors_read(llama: Pair) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    found = open_source(llama.tuned, llama.base).sha256(name)
    assert set(found) == {"finetuned", "base"}
    assert found["finetuned"] == GivenWeights(llama.tuned_theta).sha256(name)
    assert found["base"] == GivenWeights(llama.theta).sha256(name)
    assert found["base"] != found["finetuned"]


def test_lightning_checkpoint(llama: Pair, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    state = {f"model.{n}": t for n, t in llama.tuned_theta.items()}
    torch.save({"state_dict": state, "epoch": 3}, path)
    source = open_source(path, llama.base)
    source.check(GivenWeights(llama.theta, llama.model.config))
    for name, tau in llama.tau.items():
        assert torch.equal(source.rows(name, 1, 4), tau[1:4])
    torch.save({"state_dict": {"other.weight": torch.zeros(2)}}, path)
    with pytest.raises(BadConfig, match="No network"):
        open_source(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(CorruptFile, match="not a Lightning checkpoint"):
        open_source(path)
    path.write_bytes(b"not a file of torch")
    with pytest.raises(CorruptFile, match="not a Lightning checkpoint"):
        open_source(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 32}, ["hidden_size 32 against 16", "embed_tokens"]),
        ({"num_hidden_layers": 2}, ["num_hidden_layers 2 against 3", "tensors only in"]),
        ({"vocab_size": 300}, ["vocab_size 300 against 259"]),
        ({"num_attention_heads": 4}, ["num_attention_heads 4 against 2"]),
        ({"hidden_act": "gelu"}, ["hidden_act gelu against silu"]),
    ],
)
def test_other_models_are_refused_with_what_differs(
    llama: Pair, tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    new_causal_lm({**CONFIGS["llama"], **change}, 0).save_pretrained(tmp_path / "other")
    with pytest.raises(ShapeMismatch) as e:
        open_source(tmp_path / "other").check(GivenWeights(llama.theta, llama.model.config))
    assert all(word in str(e.value) for word in words), str(e.value)
    with pytest.raises(ShapeMismatch):  # a base that is not the model under edit
        open_source(llama.tuned, tmp_path / "other").check(
            GivenWeights(llama.theta, llama.model.config)
        )


def test_other_families_and_vocabularies(llama: Pair, tmp_path: Path) -> None:
    save_model(tmp_path / "gemma", "gemma3_text")
    base = FolderWeights(llama.base)
    with pytest.raises(ShapeMismatch, match="model_type gemma3_text against llama"):
        open_source(tmp_path / "gemma").check(base)
    other = tmp_path / "tokens"
    shutil.copytree(llama.tuned, other)
    data = json.loads((other / "tokenizer.json").read_text())
    words = data["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ShapeMismatch, match=r"2 tokens of the vocabulary \('A', 'B'\)"):
        open_source(other).check(base)
    with pytest.raises(ShapeMismatch, match="2 tokens of the vocabulary"):
        open_source(other).check(GivenWeights(llama.theta, llama.model.config))
    with pytest.raises(ShapeMismatch, match="2 tokens of the vocabulary"):
        open_source(other, llama.base).check(GivenWeights(llama.theta, llama.model.config))


def test_damaged_folders(llama: Pair, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="No fine-tuned model at"):
        open_source(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    shutil.copytree(llama.tuned, broken)
    shard = sorted(broken.glob("model-*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFile, match="truncated"):
        open_source(broken)
    shard.unlink()
    with pytest.raises(MissingFile, match="shards are missing"):
        open_source(broken)


def test_a_tied_head_is_read_from_the_embedding(tmp_path: Path) -> None:
    save_model(tmp_path / "tied", "llama_tied")
    weights = FolderWeights(tmp_path / "tied")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    assert head not in load_file(tmp_path / "tied" / "model.safetensors")
    assert torch.equal(weights.rows(head, 0, 5), weights.rows(embedding, 0, 5))
    assert weights.disk_name(head) == weights.disk_name(embedding)


def test_integers_are_refused(llama: Pair, tmp_path: Path) -> None:
    quantised = tmp_path / "quantised"
    shutil.copytree(llama.base, quantised)
    tensors = load_file(quantised / "model.safetensors")
    name = "model.norm.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, quantised / "model.safetensors")
    with pytest.raises(Exception, match="quantised"):
        open_source(quantised, llama.base).rows(name, 0, 2)
