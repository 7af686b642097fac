"""A classifier with dropout, killed or preempted within an epoch, ends in the same bits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from salve_lm.fault_tolerance.checkpoint_io import AtomicCheckpointIO
from tests.distributed.ranks import TWO, run_ranks
from tests.distributed.test_any_size import QUIET, MadeImages
from tests.distributed.test_preemption import NEVER, Curves, Preempt, curves
from tests.distributed.training import KillAt, checkpoints
from tests.faults.processes import run_killed
from vision import Classifier

EPOCHS, STEPS_PER_EPOCH = 3, 6


def command(folder: Path, *more: Callback, **options: Any) -> None:
    """The one command: it goes on where it was, or starts where there is nothing yet."""
    pl.seed_everything(3, verbose=False)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Dropout(0.5), nn.Linear(16, 2))
    data = MadeImages(50, 9, batch_size=4 if options.get("devices") == 2 else 8)
    schedule = options.pop("schedule", NEVER)
    trainer = pl.Trainer(
        **QUIET | options | {"logger": Curves(folder / "curves.jsonl")},
        max_epochs=EPOCHS,
        plugins=[AtomicCheckpointIO()],
        callbacks=[checkpoints(folder, **schedule), *more],
    )
    module = Classifier(net, 2)
    trainer.fit(module, datamodule=data, ckpt_path="last")
    if trainer.is_global_zero:
        torch.save(module.state_dict(), folder / "weights.pt")


def check_same(folder: Path, whole: Path) -> None:
    a, b = (torch.load(f / "weights.pt", weights_only=True) for f in (folder, whole))
    for name, weight in b.items():
        assert torch.equal(a[name], weight), name
    assert curves(folder) == curves(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    command(folder)
    losses = [x["train_loss"] for _, x in curves(folder) if "train_loss" in x]
    assert len(set(losses)) == EPOCHS * STEPS_PER_EPOCH
    return folder


def test_preempted(tmp_path: Path, whole: Path) -> None:
    # within an epoch, on its last batch, on its first one, and while it validates
    for hook, step in (
        ("on_train_batch_start", 2),
        ("on_train_batch_start", 5),
        ("on_train_batch_start", 6),
        ("on_validation_start", 12),
        ("on_train_batch_start", 15),
    ):
        with pytest.raises(SIGTERMException):
            command(tmp_path, Preempt(hook, step))
    command(tmp_path)
    check_same(tmp_path, whole)


def test_killed(tmp_path: Path, whole: Path) -> None:
    every = {"schedule": {"every_n_train_steps": 1}}
    for step in (2, 6, 9, 12):
        run_killed(partial(command, tmp_path, KillAt("on_train_batch_start", step), **every))
    command(tmp_path, **every)
    (tmp_path / "curves.jsonl").write_bytes((whole / "curves.jsonl").read_bytes())
    check_same(tmp_path, whole)


def test_two_processes(tmp_path: Path) -> None:
    assert run_ranks(lambda _: command(tmp_path / "whole", **TWO)) == [0, 0]
    told = Preempt("on_train_batch_start", 8, rank=1)
    assert run_ranks(lambda _: command(tmp_path / "cut", told, **TWO)) == [143, 0]
    assert run_ranks(lambda _: command(tmp_path / "cut", **TWO)) == [0, 0]
    check_same(tmp_path / "cut", tmp_path / "whole")
