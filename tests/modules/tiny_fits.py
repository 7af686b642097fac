"""Small fits of the real `LanguageModel` on text of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from salve_lm.data.language_data import LanguageData
from salve_lm.data.text import TextCorpus
from salve_lm.fault_tolerance.checkpoint_io import AtomicCheckpointIO
from salve_lm.modules.language_model import LanguageModel
from salve_lm.tasks.text_loss import TextLoss

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "hat", "that", "ran"]
CONTEXT, BATCH_SIZE, EPOCHS = 24, 4, 2


def write_text(folder: Path, n: int = 20) -> str:
    """`n` short documents, each with a prompt and a group."""
    path = folder / "text.jsonl"
    lines = [
        {"ask": WORDS[i % 7], "tell": " ".join(WORDS[i % 5 :: i % 4 + 2]), "kind": "ab"[i % 2]}
        for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def corpus(path: str, **options: Any) -> TextCorpus:
    return TextCorpus([path], text="{tell}", prompt="{ask}: ", group="{kind}", **options)


def data(path: str, **options: Any) -> LanguageData:
    """One corpus to train on, two tasks of unequal length."""
    tasks = [
        TextLoss(corpus(path, limit=7), "told", CONTEXT, 2, completion_only=True),
        TextLoss(corpus(path, start=7), "all", CONTEXT, 3),
    ]
    return LanguageData(
        corpus(path), tasks, **{"context": CONTEXT, "batch_size": BATCH_SIZE, **options}
    )


class Losses(Callback):
    """Step -> training loss."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.losses[trainer.global_step] = float(trainer.callback_metrics["train/loss"])


class Kept(Callback):
    """Writes what the parent of forked processes is to see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses = Losses()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.losses.on_train_batch_end(trainer, *args)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.sanity_checking:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "losses": self.losses.losses,
            "results": module.results,
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
            "weights": {k: v.clone() for k, v in module.state_dict().items()},
        }
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")


def read(folder: Path, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)  # type: ignore[no-any-return]


def trainer(*callbacks: Callback, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
        "plugins": [AtomicCheckpointIO()],
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**{**settings, **options})


def model(source: Path, **options: Any) -> LanguageModel:
    return LanguageModel(str(source), **{"learning_rate": 1e-2, "warmup_steps": 2, **options})
