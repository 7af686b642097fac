"""A base and a fine-tuned model of one family, on disk and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from salve_lm.language import load_causal_lm, new_causal_lm
from tests.language.tiny_models import CONFIGS, make_tokenizer

FAMILIES = ("llama", "gemma3_text", "gemma3", "gpt2")


class Pair(NamedTuple):
    """Two models of one family, and their folders."""

    base: str
    tuned: str
    model: PreTrainedModel  # the base, in float32
    theta: dict[str, Tensor]
    tuned_theta: dict[str, Tensor]

    @property
    def tau(self) -> dict[str, Tensor]:
        return {n: self.tuned_theta[n] - t for n, t in self.theta.items()}


def build_pair(folder: Path, family: str) -> Pair:
    """Both with random norms and biases too; the fine-tuned one in shards."""
    models = []
    for seed, (name, options) in enumerate(
        (("base", {}), ("tuned", {"max_shard_size": "20KB"})), start=1
    ):
        model = new_causal_lm(CONFIGS[family], seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 1:
                    p.add_(0.2 * torch.randn(p.shape, generator=generator))
        model.save_pretrained(folder / name, **options)
        make_tokenizer().save_pretrained(folder / name)
        models.append(model)
    loaded = load_causal_lm(folder / "base", dtype="float32")
    theta, tuned = (
        {n: p.detach().clone() for n, p in m.named_parameters(remove_duplicate=False)}
        for m in models
    )
    return Pair(str(folder / "base"), str(folder / "tuned"), loaded, theta, tuned)
