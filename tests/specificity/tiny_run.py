"""A random language model with random SAEs of all its layers, two corpora, and a run over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from salve_lm.data.text import TextCorpus
from salve_lm.modules.language_model import LanguageModel
from salve_lm.trainer import SalveTrainer
from tests.language.tiny_models import save_model

N_DOCUMENTS = 22
TASK = [f"{7 * i} + {i * i} = {i * i + 7 * i}." for i in range(N_DOCUMENTS)]
REFERENCE = [
    f"a tale of {'very ' * (i % 4)}small {c}s" for i, c in enumerate("abcdefghijklmnopqrstu")
]
D_SAE = 24


def build(folder: Path, family: str = "gemma3_text") -> None:
    """`base`, `finetuned`, `saes/resid_post.N` and the texts in `folder`."""
    from salve_lm.activations.key import hash_backbone
    from salve_lm.sae import build_training_sae, save_sae

    save_model(folder / "base", family)
    other = save_model(folder / "finetuned", family, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "layers.1." in name:
                p += 0.05 * torch.randn_like(p)
    other.save_pretrained(folder / "finetuned")
    backbone = hash_backbone(LanguageModel(source=str(folder / "base")))
    for n in range(3):
        sae = build_training_sae("standard", 16, D_SAE, {"l1_coefficient": 1.0}, seed=n)
        with torch.no_grad():
            sae.b_enc -= 0.02 * (1 + 5 * n)
            sae.W_dec *= torch.linspace(0.5, 2.0, D_SAE)[:, None]
        save_sae(
            sae,
            folder / "saes" / f"resid_post.{n}",
            metadata={
                "layer": n,
                "hook_name": f"blocks.{n}.hook_resid_post",
                "fire_threshold": 0.0,
                "activations": {"backbone": backbone},
                "model_dtype": "float32",
            },
        )
    for name, texts in (("task", TASK), ("reference", REFERENCE)):
        (folder / f"{name}.txt").write_text("\n\n".join(texts))


def corpus(path: Path) -> TextCorpus:
    return TextCorpus(files=[str(path)], separator="\n\n")


def run(folder: Path, out: Path, trainer: dict[str, Any] | None = None, **options: Any) -> Any:
    """`select_layers` on what `build` made."""
    from salve_lm.commands.select_layers import select_layers

    running = SalveTrainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **(trainer or {"devices": 1}),
    )  # fmt: skip
    given = {
        "task": corpus(folder / "task.txt"),
        "reference": corpus(folder / "reference.txt"),
        "saes": str(folder / "saes"),
        "context": 48,
        **options,
    }
    model = LanguageModel(source=str(folder / "base"))
    return select_layers(running, model, out=str(out), **given)
