"""A rank that is killed, or hangs: the others end with a message, and the checkpoint is whole."""

from __future__ import annotations

import os
import signal
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from salve_lm.errors import NotFinite
from salve_lm.fault_tolerance.lost_rank import end_children, lost_rank
from tests.distributed.ranks import TWO, run_ranks
from tests.distributed.test_preemption import Preempt, check_same, command, curves

SECONDS = 45.0  # far more than it takes, and far less than Lightning's own 30 minutes
EVERY_TWO = {"every_n_train_steps": 2}
SAID = 7


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(lambda _: command(store, folder, **TWO)) == [0, 0]
    return folder


def survive(store: Path, folder: Path, *more: Any, **options: Any) -> None:
    """Train, and end with `SAID` where the loss of the other rank is told."""
    try:
        command(store, folder, *more, schedule=EVERY_TWO, **options)
    except RuntimeError as e:
        told = lost_rank(e)
        if told is None or "Another process of this run has died" not in str(told):
            raise
        raise SystemExit(SAID) from e


@pytest.mark.parametrize(
    ("hook", "step", "rank", "last"),
    [
        ("on_train_batch_start", 9, 1, 8),
        ("on_before_optimizer_step", 9, 0, 8),
        ("on_validation_start", 7, 1, 6),
        # while a checkpoint is about to be written: the one before stays
        ("on_save_checkpoint", 10, 0, 8),
    ],
)
def test_killed(
    store: Path, tmp_path: Path, whole: Path, hook: str, step: int, rank: int, last: int
) -> None:
    kill = Preempt(hook, step, rank, signal.SIGKILL)
    codes = run_ranks(lambda _: survive(store, tmp_path, kill, **TWO), seconds=SECONDS)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == SAID
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == last
    run_ranks(lambda _: command(store, tmp_path, schedule=EVERY_TWO, **TWO))
    # steps behind the checkpoint were logged before the loss and once more after it, alike
    by_step = {str(line): line for line in curves(tmp_path)}
    (tmp_path / "curves.jsonl").write_bytes((whole / "curves.jsonl").read_bytes())
    assert {str(line) for line in curves(whole)} == set(by_step)
    check_same(tmp_path, whole, world=2)


def test_hanging(store: Path, tmp_path: Path) -> None:
    """The strategy's `timeout` says how long the others wait."""
    strategy = DDPStrategy(timeout=timedelta(seconds=4))
    stop = Preempt("on_train_batch_start", 9, 1, signal.SIGSTOP)

    def one(rank: int) -> None:
        number = tmp_path / "pid"
        if rank == 1:
            number.write_text(str(os.getpid()))
        try:
            survive(store, tmp_path, stop, strategy=strategy, devices=2)
        finally:
            os.kill(int(number.read_text()), signal.SIGKILL)

    assert run_ranks(one, seconds=SECONDS) == [SAID, -signal.SIGKILL]
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 8


def test_a_child_that_hangs_is_ended() -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    child = subprocess.Popen(["sleep", "100"])
    child.send_signal(signal.SIGSTOP)
    trainer.strategy.launcher.procs = [child]  # type: ignore[union-attr]
    end_children(trainer)
    assert child.wait(10) == -signal.SIGKILL
    end_children(pl.Trainer(accelerator="cpu", devices=1, logger=False))


def test_other_errors_are_not_taken_for_it() -> None:
    assert lost_rank(NotFinite("loss", "training step 3")) is None
    assert lost_rank(RuntimeError("Connection reset by peer")) is None  # no ranks here
