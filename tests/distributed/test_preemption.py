"""SIGTERM, on any rank, at any moment: a checkpoint first, and going on ends in the same bits."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from salve_lm.errors import NotFinite
from tests.distributed.ranks import TWO, run_ranks
from tests.distributed.training import (
    EPOCHS,
    STEPS_PER_EPOCH,
    Run,
    activation_data,
    checkpoints,
    fit,
    read_run,
)

LAST = EPOCHS * STEPS_PER_EPOCH
# no step of the run is a multiple: what is found was written because of the signal
NEVER = {"every_n_train_steps": 1000}
MODULE = {"dead_feature_handling": "resample", "normalize_input": "expected_average_only_in"}


class Curves(Logger):
    """Appends what is logged to a file, as a logger of a service does: nothing is taken back."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    @property
    def name(self) -> str:
        return "curves"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as f:
            f.write(json.dumps([step, metrics]) + "\n")


class Preempt(Callback):
    """Sends SIGTERM to one rank, once, at a hook, as soon as `step` optimiser steps are done."""

    def __init__(self, hook: str, step: int, rank: int = 0, signum: int = signal.SIGTERM) -> None:
        self.step, self.rank, self.signum, self.sent = step, rank, signum, False
        setattr(self, hook, self._send)

    def _send(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.step and trainer.global_rank == self.rank and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.signum)


def command(store: Path, folder: Path, *more: Callback, **options: Any) -> None:
    """The one command: it goes on where it was, or starts where there is nothing yet."""
    schedule = options.pop("schedule", NEVER)
    fit(
        activation_data(store),
        folder / "run",
        callbacks=(checkpoints(folder, **schedule), *more),
        module=MODULE,
        resume=True,
        logger=Curves(folder / "curves.jsonl"),
        **options,
    )


def curves(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]


def check_same(folder: Path, whole: Path, world: int = 1) -> Run:
    resumed, expected = (read_run(f / "run", world) for f in (folder, whole))
    for name, weight in expected.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
    for step, loss in resumed.losses.items():
        assert loss == expected.losses[step], f"step {step}"
    # every point of every curve once, in its order
    assert curves(folder) == curves(whole)
    return resumed


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    command(store, folder)
    return folder


@pytest.fixture(scope="module")
def whole_on_two(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(lambda _: command(store, folder, **TWO)) == [0, 0]
    return folder


MOMENTS = [
    ("on_train_start", 0, 1),
    ("on_train_batch_start", 9, 10),
    ("on_before_optimizer_step", 4, 5),
    # the last batch of an epoch: stopped behind its validation
    ("on_before_zero_grad", 6, 7),
    ("on_validation_start", 7, 7),
    ("on_validation_batch_end", 7, 7),
    ("on_train_epoch_end", 7, 8),
    ("on_train_batch_end", LAST, LAST),
]


BY_STEPS = {"max_epochs": -1, "max_steps": LAST}
ALSO_ON_EXCEPTION = {**NEVER, "save_on_exception": True}


@pytest.mark.parametrize(
    ("hook", "step", "stops_at", "schedule", "until"),
    [
        *((*moment, NEVER, {}) for moment in MOMENTS),
        *((*moment, NEVER, BY_STEPS) for moment in MOMENTS[3:]),
        *((*moment, ALSO_ON_EXCEPTION, {}) for moment in MOMENTS[2:5]),
    ],
)
def test_one_process(
    store: Path,
    tmp_path: Path,
    whole: Path,
    hook: str,
    step: int,
    stops_at: int,
    schedule: Any,
    until: Any,
) -> None:
    with pytest.raises(SIGTERMException) as stopped:
        command(store, tmp_path, Preempt(hook, step), schedule=schedule, **until)
    assert stopped.value.code == 143
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == stops_at
    command(store, tmp_path, schedule=schedule, **until)
    check_same(tmp_path, whole)


def test_again_and_again(store: Path, tmp_path: Path, whole: Path) -> None:
    for step in (2, 3, 6, 7, 13, 14, 18):
        with pytest.raises(SIGTERMException):
            command(store, tmp_path, Preempt("on_train_batch_start", step))
    command(store, tmp_path)
    check_same(tmp_path, whole)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("hook", "step"), [MOMENTS[n][:2] for n in (2, 3, 5)])
def test_two_processes_of_which_one_is_told(
    store: Path, tmp_path: Path, whole_on_two: Path, rank: int, hook: str, step: int
) -> None:
    told = Preempt(hook, step, rank)
    assert run_ranks(lambda _: command(store, tmp_path, told, **TWO)) == [143, 0]
    run_ranks(lambda _: command(store, tmp_path, **TWO))
    assert len(check_same(tmp_path, whole_on_two, world=2).losses) < LAST


def test_both_are_told_at_different_moments(
    store: Path, tmp_path: Path, whole_on_two: Path
) -> None:
    told = Preempt("on_train_batch_start", 9, 0), Preempt("on_before_optimizer_step", 9, 1)
    assert run_ranks(lambda _: command(store, tmp_path, *told, **TWO)) == [143, 0]
    run_ranks(lambda _: command(store, tmp_path, **TWO))
    check_same(tmp_path, whole_on_two, world=2)


def test_validation_within_an_epoch(store: Path, tmp_path: Path) -> None:
    often: dict[str, Any] = {"val_check_interval": 3}
    command(store, tmp_path / "whole", **often)
    for step in (2, 5, 9):
        with pytest.raises(SIGTERMException):
            command(store, tmp_path / "cut", Preempt("on_train_batch_start", step), **often)
    with pytest.raises(SIGTERMException):
        command(store, tmp_path / "cut", Preempt("on_validation_start", 12), **often)
    command(store, tmp_path / "cut", **often)
    check_same(tmp_path / "cut", tmp_path / "whole")


def test_gradients_under_accumulation_are_not_lost(store: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 3}
    command(store, tmp_path / "whole", **options)
    for step in (1, 4):
        with pytest.raises(SIGTERMException):
            command(store, tmp_path / "cut", Preempt("on_train_batch_start", step), **options)
    command(store, tmp_path / "cut", **options)
    resumed, whole = (read_run(tmp_path / name / "run") for name in ("cut", "whole"))
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


def test_slurms_own_signal(
    store: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `srun` (as Lightning finds out from these variables), SIGUSR1 does the same."""
    job = {"JOB_ID": 12345, "NTASKS": 1, "NTASKS_PER_NODE": 1, "PROCID": 0, "LOCALID": 0,
           "NODEID": 0, "NNODES": 1, "JOB_NAME": "fit", "NODELIST": "node[7-9]"}  # fmt: skip
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        command(store, tmp_path, Preempt("on_train_batch_start", 9, signum=signal.SIGUSR1))
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == before
    assert not list(tmp_path.rglob("hpc_ckpt*"))
    command(store, tmp_path)
    check_same(tmp_path, whole)


class Poison(Callback):
    """NaN in the weights, as of one step."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == 10:
            with torch.no_grad():
                module.sae.W_enc.fill_(float("nan"))


def test_nan_never_replaces_a_good_checkpoint(store: Path, tmp_path: Path, whole: Path) -> None:
    """Neither on the way out of the exception nor after a signal."""
    schedule = {"every_n_train_steps": 4, "save_on_exception": True}
    with pytest.raises(NotFinite):
        told = Preempt("on_train_batch_start", 10)
        command(store, tmp_path, Poison(), told, schedule=schedule)
    (tmp_path / "curves.jsonl").unlink()
    command(store, tmp_path, schedule=schedule)
    resumed, expected = (read_run(f / "run") for f in (tmp_path, whole))
    assert min(resumed.losses) == 9
    for name, weight in expected.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


def test_without_a_folder_for_checkpoints_it_says_so(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SIGTERMException):
        fit(activation_data(store), tmp_path, callbacks=(Preempt("on_train_batch_start", 3),))
    assert "without a ModelCheckpoint" in caplog.text
    assert not list(tmp_path.rglob("*.ckpt"))
