"""LoRA adapters against peft's own `merge_and_unload`, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import salve_lm.task_vectors.blocks as blocks
from salve_lm.errors import (
    BadConfig,
    CorruptFile,
    MissingFile,
    NameNotFound,
    ShapeMismatch,
    UnsupportedEdit,
)
from salve_lm.language import new_causal_lm
from salve_lm.task_vectors.delta import RawDelta
from salve_lm.task_vectors.lora_files import WEIGHTS
from salve_lm.task_vectors.sources import ADAPTER, TaskVectorSource, open_source
from salve_lm.task_vectors.weights import GivenWeights
from tests.language.tiny_models import CONFIGS

LLAMA = ["q_proj", "o_proj", "down_proj"]


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}


def adapter(
    folder: Path, family: str, options: dict[str, Any], **changes: Any
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A trained-looking adapter in `folder`; the fresh base, and the merged model's parameters."""
    settings = {**CONFIGS[family], **changes}
    wrapped = get_peft_model(
        new_causal_lm(settings, 0), LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **options)
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    wrapped.save_pretrained(folder)
    merged = parameters(wrapped.merge_and_unload())
    return new_causal_lm(settings, 0), merged


def opened(folder: Path, base: PreTrainedModel) -> TaskVectorSource:
    weights = GivenWeights(parameters(base), base.config)
    source = open_source(folder, config=base.config).with_base(weights)
    source.check(weights)
    return source


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": LLAMA}),
    "rslora": ("llama", {"target_modules": LLAMA, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": LLAMA,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 4},
            "alpha_pattern": {"o_proj": 9, r"^model\.layers\.2\..*q_proj": 1},
        },
    ),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "all biases": (
        "gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "own biases": (
        "gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "bias of B": (
        "gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True, "lora_bias": True}),
    "whole modules": ("llama", {"target_modules": LLAMA, "modules_to_save": ["norm", "lm_head"]}),
    "embedding": ("llama", {"target_modules": [*LLAMA, "embed_tokens"]}),
    "images": ("gemma3", {"target_modules": r".*language_model.*(v_proj|gate_proj)"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_merged_model(kind: str, tmp_path: Path) -> None:
    family, options = KINDS[kind]
    base, merged = adapter(tmp_path, family, options)
    source = opened(tmp_path, base)
    theta = parameters(base)
    changed = {n for n in theta if not torch.equal(theta[n], merged[n])}
    assert changed <= set(source.names) <= set(theta)
    assert changed
    for name in source.names:
        tau = source.rows(name, 0, len(theta[name]))
        assert tau.dtype == torch.float32
        assert source.shape(name) == tuple(theta[name].shape)
        torch.testing.assert_close(theta[name] + tau, merged[name], rtol=1e-5, atol=1e-6)


def test_the_same_bits_for_any_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 5 * 16)
    base, _ = adapter(tmp_path, "llama", {"target_modules": LLAMA})
    delta = RawDelta(opened(tmp_path, base), "model.layers.0.mlp.down_proj.weight", 0.7)
    whole = delta.rows(0, 16)
    for start, stop in ((0, 16), (3, 4), (4, 11)):
        assert torch.equal(delta.rows(start, stop), whole[start:stop])


def test_names_of_older_models(tmp_path: Path) -> None:
    """An adapter that an older transformers named, as files of that time are."""
    base, merged = adapter(tmp_path, *KINDS["images"])
    tensors = load_file(tmp_path / WEIGHTS)
    assert any(".model.language_model.layers" in n for n in tensors)
    old = {
        n.replace("model.model.language_model.layers", "model.language_model.model.layers"): t
        for n, t in tensors.items()
    }
    save_file(old, tmp_path / WEIGHTS)
    source = opened(tmp_path, base)
    name = "model.language_model.layers.0.self_attn.v_proj.weight"
    tau = source.rows(name, 0, 8)
    torch.testing.assert_close(parameters(base)[name] + tau, merged[name])


def test_in_a_checkpoint_of_a_language_model(tmp_path: Path) -> None:
    base, merged = adapter(tmp_path, "gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True})
    tensors = load_file(tmp_path / WEIGHTS)
    state = {
        n.replace("base_model.model.", "model.").replace(".weight", ".default.weight"): t
        for n, t in tensors.items()
    }
    about = {"model_type": "gpt2", "lora": {"r": 3, "alpha": 5.0, "rslora": False}}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": state, "language_model": about}, path)
    source = opened(path, base)
    for name in source.names:
        tau = source.rows(name, 0, len(merged[name]))
        torch.testing.assert_close(parameters(base)[name] + tau, merged[name])
    torch.save({"state_dict": state}, path)
    with pytest.raises(CorruptFile, match="not its settings"):
        open_source(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "only LoRA"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "another depth"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights too"),
    ],
)
def test_more_than_a_product_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    base, _ = adapter(tmp_path, "llama", {"target_modules": LLAMA})
    options = json.loads((tmp_path / ADAPTER).read_text())
    (tmp_path / ADAPTER).write_text(json.dumps({**options, **change}))
    with pytest.raises(UnsupportedEdit, match=words):
        opened(tmp_path, base)


def test_real_dora_is_refused(tmp_path: Path) -> None:
    base, _ = adapter(tmp_path, "llama", {"target_modules": LLAMA, "use_dora": True})
    with pytest.raises(UnsupportedEdit, match="DoRA"):
        opened(tmp_path, base)


def test_an_adapter_for_another_base(tmp_path: Path) -> None:
    base, _ = adapter(tmp_path, "llama", {"target_modules": LLAMA})
    wider = new_causal_lm({**CONFIGS["llama"], "intermediate_size": 48}, 0)
    with pytest.raises(ShapeMismatch, match=r"down_proj.weight \[16, 32\] against \[16, 48\]"):
        opened(tmp_path, wider)
    fewer = new_causal_lm({**CONFIGS["llama"], "num_hidden_layers": 2}, 0)
    with pytest.raises(BadConfig, match=r"3 tensors that .* does not have .*layers\.2"):
        opened(tmp_path, fewer)
    options = json.loads((tmp_path / ADAPTER).read_text())
    options["base_model_name_or_path"] = "someone/base-1b"
    (tmp_path / ADAPTER).write_text(json.dumps(options))
    base.config._name_or_path = "/models/Base-1B/"
    opened(tmp_path, base)
    base.config._name_or_path = "/models/base-1b-it"
    with pytest.raises(BadConfig, match=r"someone/base-1b.*other_base: true"):
        opened(tmp_path, base)
    open_source(tmp_path, config=base.config, other_base=True).check(
        GivenWeights(parameters(base), base.config)
    )


def test_damaged_adapters(tmp_path: Path) -> None:
    base, _ = adapter(tmp_path, "llama", {"target_modules": LLAMA})
    tensors = load_file(tmp_path / WEIGHTS)
    first = next(n for n in tensors if ".lora_A." in n)
    save_file({n: t for n, t in tensors.items() if n != first}, tmp_path / WEIGHTS)
    with pytest.raises(CorruptFile, match="only one of its two matrices"):
        opened(tmp_path, base)
    save_file({**tensors, first: tensors[first][:2].contiguous()}, tmp_path / WEIGHTS)
    with pytest.raises(CorruptFile, match="do not multiply"):
        opened(tmp_path, base)
    save_file(
        {**tensors, "base_model.model.x.lora_magnitude": tensors[first] + 0}, tmp_path / WEIGHTS
    )
    with pytest.raises(UnsupportedEdit, match="of a kind not known"):
        opened(tmp_path, base)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(MissingFile, match=WEIGHTS):
        opened(tmp_path, base)
    (tmp_path / ADAPTER).write_text("[]")
    with pytest.raises(CorruptFile, match="not a JSON object"):
        opened(tmp_path, base)


def test_a_tensor_that_it_leaves_alone(tmp_path: Path) -> None:
    base, _ = adapter(tmp_path, "llama", {"target_modules": LLAMA})
    with pytest.raises((BadConfig, NameNotFound), match="does not change"):
        opened(tmp_path, base).rows("model.norm.weight", 0, 1)
