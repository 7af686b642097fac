"""Killed at any step and started again by the same command, a run ends in the same bits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.multiprocessing import ProcessExitedException

from salve_lm import atomic
from salve_lm.errors import BadConfig
from tests.distributed.training import (
    BATCH_SIZE,
    EPOCHS,
    STEPS_PER_EPOCH,
    KillAt,
    Run,
    activation_data,
    checkpoints,
    fit,
    read_run,
    run_program,
)
from tests.faults.processes import die, run_killed

MODULE = {"dead_feature_handling": "resample", "normalize_input": "expected_average_only_in"}
LAST = EPOCHS * STEPS_PER_EPOCH


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    fit(activation_data(store), folder, module=MODULE)
    run = read_run(folder)
    assert len(run.losses) == LAST
    return run


def command(
    store: Path, folder: Path, schedule: dict[str, Any], *more: Callback, **options: Any
) -> None:
    """The one command: it goes on where it was, or starts where there is nothing yet."""
    on_the_fly, workers = options.pop("on_the_fly", False), options.pop("num_workers", 0)
    data = activation_data(store, on_the_fly)
    data.num_workers = workers
    fit(
        data,
        folder / "run",
        callbacks=(checkpoints(folder, **schedule), *more),
        resume=True,
        **{"module": MODULE, **options},
    )


def check_same(resumed: Run, whole: Run, metrics: bool = True) -> None:
    assert resumed.losses.keys() <= whole.losses.keys()
    assert max(resumed.losses, default=LAST) == LAST
    for step, loss in resumed.losses.items():
        assert loss == whole.losses[step], f"step {step}"
    done = len(resumed.samples["train"])
    assert done == 0 or resumed.samples["train"] == whole.samples["train"][-done:]
    assert resumed.weights.keys() == whole.weights.keys()
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
    if metrics:
        assert resumed.metrics == whole.metrics


EVERY_STEP = {"every_n_train_steps": 1}
EVERY_TWO = {"every_n_train_steps": 2}
EVERY_EPOCH_AS_STEPS = {"every_n_train_steps": STEPS_PER_EPOCH}  # on the last batch of an epoch
EPOCH_END = {"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": True}
VALIDATION = {
    "every_n_train_steps": None,
    "every_n_epochs": 1,
    "monitor": "val/l0",
    "save_on_train_epoch_end": False,
}
BY_EPOCHS: dict[str, Any] = {}
BY_STEPS = {"max_epochs": -1, "max_steps": LAST}


@pytest.mark.parametrize("until", [BY_EPOCHS, BY_STEPS], ids=["max_epochs", "max_steps"])
@pytest.mark.parametrize(
    ("schedule", "hook", "step"),
    [
        # in the midst of an epoch, with and without a step lost
        (EVERY_STEP, "on_train_batch_start", 9),
        (EVERY_TWO, "on_train_batch_start", 9),
        (EVERY_TWO, "on_before_optimizer_step", 4),
        # saved on the last batch of an epoch
        (EVERY_STEP, "on_validation_start", 7),
        (EVERY_EPOCH_AS_STEPS, "on_train_batch_start", 14),
        (EVERY_EPOCH_AS_STEPS, "on_train_epoch_end", 7),
        # saved at the end of an epoch, killed just after and in the next one
        (EPOCH_END, "on_train_epoch_start", 7),
        (EPOCH_END, "on_train_batch_start", 16),
        (VALIDATION, "on_train_epoch_start", 7),
        (VALIDATION, "on_train_batch_start", 16),
        # before the first checkpoint
        (EVERY_TWO, "on_train_batch_start", 1),
    ],
)  # fmt: skip
def test_killed_at_a_hook(
    store: Path,
    tmp_path: Path,
    whole: Run,
    schedule: dict[str, Any],
    hook: str,
    step: int,
    until: dict[str, Any],
) -> None:
    run_killed(partial(command, store, tmp_path, schedule, KillAt(hook, step), **until))
    command(store, tmp_path, schedule, **until)
    check_same(read_run(tmp_path / "run"), whole)


@pytest.mark.parametrize("schedule", [EVERY_STEP, EPOCH_END, VALIDATION])
@pytest.mark.parametrize("until", [BY_EPOCHS, BY_STEPS], ids=["max_epochs", "max_steps"])
def test_killed_again_and_again(
    store: Path, tmp_path: Path, whole: Run, schedule: dict[str, Any], until: dict[str, Any]
) -> None:
    for step in (3, 7, 8, 14, 15, 19):
        kill = KillAt("on_train_batch_start", step)
        run_killed(partial(command, store, tmp_path, schedule, kill, **until))
    command(store, tmp_path, schedule, **until)
    check_same(read_run(tmp_path / "run"), whole)


@pytest.mark.parametrize("write", [1, 6, 13])
def test_killed_while_a_checkpoint_is_written(
    store: Path, tmp_path: Path, whole: Run, write: int
) -> None:
    def killed_at_a_write() -> None:
        replace, count = os.replace, iter(range(1, 1000))
        atomic.os.replace = lambda a, b: die() if next(count) == write else replace(a, b)  # type: ignore[assignment]
        command(store, tmp_path, EVERY_TWO)

    run_killed(killed_at_a_write)
    command(store, tmp_path, EVERY_TWO)
    check_same(read_run(tmp_path / "run"), whole)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.suffix != ".ckpt"]


def test_killed_from_outside_at_a_random_moment(store: Path, tmp_path: Path, whole: Run) -> None:
    pause = random.SystemRandom().uniform(0, 0.3)
    sys.stderr.write(f"pause {pause}\n")
    process = get_context("fork").Process(target=partial(command, store, tmp_path, EVERY_STEP))
    process.start()
    while process.is_alive() and not (tmp_path / "checkpoints").exists():
        time.sleep(0.001)
    time.sleep(pause)
    process.kill()
    process.join()
    command(store, tmp_path, EVERY_STEP)
    run = read_run(tmp_path / "run")
    # a kill behind the last step leaves nothing to train, and so nothing to log
    check_same(run, whole, metrics=bool(run.losses))


def test_a_finished_run_is_left_as_it_is(store: Path, tmp_path: Path, whole: Run) -> None:
    for steps in (LAST, 0):
        command(store, tmp_path, EVERY_STEP)
        run = read_run(tmp_path / "run")
        check_same(run, whole, metrics=False)
        assert len(run.losses) == steps


@pytest.mark.parametrize("workers", [0, 2])
def test_on_the_fly(store: Path, tmp_path: Path, workers: int) -> None:
    """Also with worker processes, which read ahead of what was trained on."""
    fit(activation_data(store, on_the_fly=True), tmp_path / "whole", module=MODULE)
    run = partial(command, store, tmp_path, EVERY_STEP, on_the_fly=True, num_workers=workers)
    for step in (3, 7, 15):
        run_killed(partial(run, KillAt("on_train_batch_start", step)))
    run()
    check_same(read_run(tmp_path / "run"), read_run(tmp_path / "whole"))


def test_two_processes(store: Path, tmp_path: Path) -> None:
    two: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2}
    fit(activation_data(store), tmp_path / "whole", module=MODULE, **two)
    for step in (3, 7, 16):
        kill = KillAt("on_train_batch_start", step)
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            command(store, tmp_path, EVERY_STEP, kill, **two)
    command(store, tmp_path, EVERY_STEP, **two)
    resumed, whole = (read_run(tmp_path / name, world=2) for name in ("run", "whole"))
    assert min(resumed.losses) == 17
    check_same(resumed, whole)


def test_one_process_then_two(store: Path, tmp_path: Path, whole: Run) -> None:
    """The position counts global batches, so the world may change: equal up to rounding."""
    run_killed(partial(command, store, tmp_path, EVERY_STEP, KillAt("on_train_batch_start", 9)))
    command(store, tmp_path, EVERY_STEP, strategy="ddp_fork", devices=2)
    two = read_run(tmp_path / "run", world=2)
    for step, loss in two.losses.items():
        assert loss == pytest.approx(whole.losses[step], rel=1e-5)
    assert min(two.losses) == 10


def test_gradient_accumulation_and_limits(store: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "limit_train_batches": 5}
    fit(activation_data(store), tmp_path / "whole", module=MODULE, **options)
    for step in (2, 3, 4, 7):
        kill = KillAt("on_train_batch_start", step)
        run_killed(partial(command, store, tmp_path, EVERY_STEP, kill, **options))
    command(store, tmp_path, EVERY_STEP, **options)
    resumed, whole = read_run(tmp_path / "run"), read_run(tmp_path / "whole")
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


def test_another_order_is_refused(store: Path, tmp_path: Path) -> None:
    run_killed(partial(command, store, tmp_path, EVERY_STEP, KillAt("on_train_batch_start", 9)))
    data = activation_data(store)
    data.batch_size = BATCH_SIZE + 1
    with pytest.raises(BadConfig, match=r"batch_size \(was 16, is 17\).*--ckpt_path"):
        fit(
            data,
            tmp_path / "run",
            callbacks=(checkpoints(tmp_path),),
            resume=True,
            module=MODULE,
        )


def program(*arguments: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.training", *arguments],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_programs_of_their_own(tmp_path: Path) -> None:
    """From the shell: a killed run goes on in a new interpreter; Lightning launches two ranks."""
    one, two, whole = (tmp_path / name for name in ("one", "two", "whole"))
    launched = program(str(two), "--devices", "2")
    fit(activation_data(whole), whole)
    run_killed(partial(run_program, [str(one), "--kill-at", "9"]))
    resumed = program(str(one))
    for process in (resumed, launched):
        shown, _ = process.communicate(timeout=300)
        assert process.returncode == 0, shown
    run = read_run(one / "run")
    assert min(run.losses) == 9  # the last checkpoint was of step 8
    check_same(run, read_run(whole))
    both = read_run(two / "run", world=2)
    assert both.losses == pytest.approx(read_run(whole).losses, rel=1e-5)
    assert both.metrics == pytest.approx(read_run(whole).metrics, rel=1e-5)
