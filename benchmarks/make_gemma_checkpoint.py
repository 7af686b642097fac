"""Random-weight checkpoints of Gemma 3's true shapes, written as streams, and a fine-tuned twin.

`text-1b`: google/gemma-3-1b-it's 1.0B text model. `vl-4b`: google/gemma-3-4b-it with its vision
tower, under the names that its files use. Weights are N(0, 0.02^2) in bfloat16, norms' gains
smaller; the twin differs by N(0, 1e-3^2) in all decoder layers and equals the base elsewhere.

    python benchmarks/make_gemma_checkpoint.py text-1b /tmp/base --finetuned /tmp/finetuned
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 20
STD, TAU = 0.02, 1e-3

TEXT_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "dtype": "bfloat16",
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
}
VL_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "eos_token_id": [1, 106],
    "text_config": {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
SHARD_MB = {"text-1b": 500, "vl-4b": 4960}
CONFIGS = {"text-1b": TEXT_1B, "vl-4b": VL_4B}


def text_tensors(config: dict[str, Any], prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Gemma 3 text decoder, in the order of its files."""
    d, ff, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield f"{prefix}embed_tokens.weight", (config["vocab_size"], d)
    for n in range(config["num_hidden_layers"]):
        layer = f"{prefix}layers.{n}."
        for name, shape in [
            ("input_layernorm", (d,)),
            ("mlp.down_proj", (d, ff)),
            ("mlp.gate_proj", (ff, d)),
            ("mlp.up_proj", (ff, d)),
            ("post_attention_layernorm", (d,)),
            ("post_feedforward_layernorm", (d,)),
            ("pre_feedforward_layernorm", (d,)),
            ("self_attn.k_norm", (head,)),
            ("self_attn.k_proj", (kv, d)),
            ("self_attn.o_proj", (d, q)),
            ("self_attn.q_norm", (head,)),
            ("self_attn.q_proj", (q, d)),
            ("self_attn.v_proj", (kv, d)),
        ]:
            yield f"{layer}{name}.weight", shape
    yield f"{prefix}norm.weight", (d,)


def image_tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of Gemma 3's projector and SigLIP tower."""
    v = config["vision_config"]
    d, ff, patch = v["hidden_size"], v["intermediate_size"], v["patch_size"]
    yield (
        "multi_modal_projector.mm_input_projection_weight",
        (d, config["text_config"]["hidden_size"]),
    )
    yield "multi_modal_projector.mm_soft_emb_norm.weight", (d,)
    tower = "vision_tower.vision_model."
    yield f"{tower}embeddings.patch_embedding.bias", (d,)
    yield f"{tower}embeddings.patch_embedding.weight", (d, 3, patch, patch)
    yield f"{tower}embeddings.position_embedding.weight", ((v["image_size"] // patch) ** 2, d)
    for n in range(v["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{n}."
        for name, out, width in [
            ("mlp.fc1", ff, d),
            ("mlp.fc2", d, ff),
            *((f"self_attn.{k}_proj", d, d) for k in ("k", "out", "q", "v")),
        ]:
            yield f"{layer}{name}.bias", (out,)
            yield f"{layer}{name}.weight", (out, width)
        for name in ("layer_norm1", "layer_norm2"):
            yield f"{layer}{name}.bias", (d,)
            yield f"{layer}{name}.weight", (d,)
    yield f"{tower}post_layernorm.bias", (d,)
    yield f"{tower}post_layernorm.weight", (d,)


def tensors_of(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Names on disk and shapes of a whole checkpoint."""
    if "text_config" in config:
        text = text_tensors(config["text_config"], "language_model.model.")
        return [*text, *image_tensors(config)]
    return list(text_tensors(config, "model."))


def shards_of(
    tensors: list[tuple[str, tuple[int, ...]]], most: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Tensors in order, split so that no shard is longer than `most` bytes if it can be helped."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in tensors:
        nbytes = 2 * math.prod(shape)
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    return shards


class Noise:
    """Blocks of normal numbers cut out of one drawn pool: drawing 4e9 of them takes minutes."""

    def __init__(self, std: float, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(BLOCK + 65537, generator=self._random).mul_(std)

    def take(self, n: int) -> Tensor:
        """The next `n` <= BLOCK numbers."""
        start = int(torch.randint(65537, (1,), generator=self._random))
        return self._pool[start : start + n]


def write_checkpoint(config: dict[str, Any], folders: list[Path], shard_bytes: int) -> int:
    """Write the base and, where two folders are given, its fine-tuned twin; bytes of one."""
    shards = shards_of(tensors_of(config), shard_bytes)
    noise, tau = Noise(STD, 0), Noise(TAU, 1)
    weight_map, total = {}, 0
    for folder in folders:
        folder.mkdir(parents=True)
    for k, shard in enumerate(shards):
        file = f"model-{k + 1:05}-of-{len(shards):05}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shard:
            nbytes = 2 * math.prod(shape)
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + nbytes]}
            end += nbytes
            weight_map[name] = file
        total += end
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        files = [open(folder / file, "wb") for folder in folders]  # noqa: SIM115
        for f in files:
            f.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shard:
            is_layer = ".layers." in name and not name.startswith("vision_tower")
            for begin in range(0, math.prod(shape), BLOCK):
                n = min(BLOCK, math.prod(shape) - begin)
                values = noise.take(n).bfloat16()
                files[0].write(values.view(torch.uint8).numpy().data)
                if len(files) == 2:
                    moved = values.float().add_(tau.take(n)).bfloat16() if is_layer else values
                    files[1].write(moved.view(torch.uint8).numpy().data)
        for f in files:
            f.flush()
            os.fsync(f.fileno())
            f.close()
    for folder in folders:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(CONFIGS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--finetuned", type=Path, help="also write a fine-tuned twin here")
    parser.add_argument("--shard-mb", type=int, help="size of the shards")
    options = parser.parse_args()
    folders = [f for f in (options.out, options.finetuned) if f is not None]
    start = time.perf_counter()
    shard_bytes = (options.shard_mb or SHARD_MB[options.shape]) * 1_000_000
    total = write_checkpoint(CONFIGS[options.shape], folders, shard_bytes)
    print(json.dumps({"bytes": total, "s": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
