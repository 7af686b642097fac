"""Small fits of the real `SAETraining`, that write down all that two runs must have in common.

Also a program: `python -m tests.distributed.training FOLDER [--kill-at STEP] [--devices N]`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from salve_lm.activations import ActivationBatch, ActivationData
from salve_lm.fault_tolerance.checkpoint_io import AtomicCheckpointIO
from salve_lm.modules.sae import SAETraining
from salve_lm.sae.gathering import gathered
from tests.activations.tiny import TinyData, TinyStudied
from tests.faults.processes import die

EPOCHS = 3
# 97 = 6 * 16 + 1: the last global batch has one row, so that one of two ranks gets none
SOURCE = {"n_train": 97, "n_val": 37}
BATCH_SIZE = 16
STEPS_PER_EPOCH = 7


class Run(NamedTuple):
    """What one fit left behind."""

    losses: dict[int, float]  # step -> training loss
    metrics: dict[str, float]
    weights: dict[str, torch.Tensor]
    samples: dict[str, list[list[list[int]]]]  # stage -> step -> rank -> samples


class Diary(Callback):
    """Writes a run down: losses by step, samples by rank and step, and the final state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: dict[int, float] = {}
        self.samples: dict[str, list[list[int]]] = {"train": [], "val": []}

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: ActivationBatch, index: int
    ) -> None:
        self.losses[trainer.global_step] = float(trainer.callback_metrics["train/loss"])
        self.samples["train"].append(batch.sample.tolist())

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: ActivationBatch, *_: Any
    ) -> None:
        self.samples["val"].append(batch.sample.tolist())

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rank = trainer.global_rank
        # all ranks ask: each may have a part of it
        state = gathered(module.state_dict())
        (self.folder / f"samples-{rank}.json").write_text(json.dumps(self.samples))
        if rank == 0:
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
            (self.folder / "losses.json").write_text(json.dumps(self.losses))
            (self.folder / "metrics.json").write_text(json.dumps(metrics))
            torch.save(state, self.folder / "weights.pt")


class KillAt(Callback):
    """Ends the process at a hook of its choice, as soon as `step` optimiser steps are done."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self._kill)

    def _kill(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.step:
            die()


def read_run(folder: Path, world: int = 1) -> Run:
    """What `Diary` wrote."""
    by_rank = [json.loads((folder / f"samples-{r}.json").read_text()) for r in range(world)]
    return Run(
        {int(k): v for k, v in json.loads((folder / "losses.json").read_text()).items()},
        json.loads((folder / "metrics.json").read_text()),
        torch.load(folder / "weights.pt", weights_only=True),
        {
            stage: [list(step) for step in zip(*(r[stage] for r in by_rank), strict=True)]
            for stage in ("train", "val")
        },
    )


def activation_data(folder: Path, on_the_fly: bool = False) -> ActivationData:
    """The activations of tiny images, in a store under `folder` or made on the fly."""
    return ActivationData(
        None if on_the_fly else str(folder / "store"),
        TinyStudied(),
        TinyData(**SOURCE),
        batch_size=BATCH_SIZE,
    )


def checkpoints(folder: Path, **options: Any) -> ModelCheckpoint:
    """Checkpoints for an exact resume: a fixed folder, and `last.ckpt` always."""
    return ModelCheckpoint(
        folder / "checkpoints", **{"every_n_train_steps": 2, "save_last": True, **options}
    )


def fit(
    data: ActivationData,
    folder: Path,
    architecture: str = "linear_l1",
    callbacks: tuple[Callback, ...] = (),
    module: dict[str, Any] | None = None,
    resume: bool = False,
    **trainer: Any,
) -> None:
    """Train and write the run down in `folder`."""
    options: dict[str, Any] = {
        "architecture": architecture,
        "d_sae": 12,
        "lr": 1e-2,
        "l1_warm_up_steps": 9,
        "lr_warm_up_steps": 5,
        "dead_after": 60,
        **(module or {}),
    }
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "plugins": [AtomicCheckpointIO()],
        "callbacks": [Diary(folder), *callbacks],
    }
    pl.Trainer(**{**settings, **trainer}).fit(
        SAETraining(**options), datamodule=data, ckpt_path="last" if resume else None
    )


def run_program(arguments: list[str] | None = None) -> None:
    """The command line: run once more after it was killed, it goes on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kill = () if args.kill_at is None else (KillAt("on_train_batch_start", args.kill_at),)
    fit(
        activation_data(args.folder),
        args.folder / "run",
        callbacks=(checkpoints(args.folder), *kill),
        resume=True,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
    )


if __name__ == "__main__":
    run_program()
