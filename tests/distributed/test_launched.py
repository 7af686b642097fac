"""Runs that real launchers start: `ddp` of the command line, and torchrun on two machines."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from salve_lm.cli import main
from salve_lm.sae import load_sae
from tests.distributed.training import EPOCHS, STEPS_PER_EPOCH, read_run

ROOT = Path(__file__).parents[2]
LAST = EPOCHS * STEPS_PER_EPOCH
TWO = ("--trainer.strategy=ddp", "--trainer.devices=2")
NODES = ("--trainer.strategy=ddp", "--trainer.devices=1", "--trainer.num_nodes=2")


class Signal(Callback):
    """Sends a signal to the process of one rank before a step begins."""

    def __init__(self, signum: int, step: int, rank: int) -> None:
        self.signum, self.step, self.rank = signum, step, rank

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.signum)


def config(store: Path, folder: Path, name: str = "run", **told: int) -> Path:
    """A config of a fit in `folder`; `told` are arguments of `Signal`."""
    here = "tests.distributed"
    save = {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": 4, "save_last": True,
            "enable_version_counter": False}  # fmt: skip
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": save},
        {"class_path": f"{here}.training.Diary", "init_args": {"folder": str(folder / "diary")}},
    ]
    if told:
        callbacks.append({"class_path": f"{here}.test_launched.Signal", "init_args": told})
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger",
              "init_args": {"save_dir": str(folder), "name": None, "version": "logs"}}  # fmt: skip
    content = {
        "trainer": {
            "max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "logger": logger,
            "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
            "callbacks": callbacks,
        },
        "model": {
            "class_path": "salve_lm.modules.sae.SAETraining",
            "init_args": {
                "architecture": "batchtopk", "options": {"k": 3}, "d_sae": 12, "lr": 1e-2,
                "dead_after": 60, "out": str(folder / "sae"),
            },
        },
        "data": {
            "class_path": "salve_lm.activations.ActivationData",
            "init_args": {"store": str(store / "store"), "batch_size": 16},
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}-{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str]:
    """Exit status and all that was shown."""
    shown, _ = process.communicate(timeout=seconds)
    return process.returncode, shown


def left_over(folder: Path) -> list[str]:
    """Command lines of processes that still work on `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        if str(folder) in line:
            found.append(line)
    return found


def fit(given: Path, *more: str) -> list[str]:
    return ["-m", "salve_lm", "fit", "--config", str(given), *more]


def torchrun(given: Path, *more: str) -> list[subprocess.Popen[str]]:
    """`torchrun` on two machines, each with one process, which share this one's loopback."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    module = "torch.distributed.run"
    return [
        start(
            sys.executable, "-m", module, "--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}",
            "--master_addr=127.0.0.1", f"--master_port={port}", *fit(given, *NODES, *more),
        )
        for rank in (0, 1)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("launched") / "whole"
    given = config(store, folder)
    main(["fit", "--config", str(given)])
    return folder


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "diary" not in str(p)}


def check_equal(folder: Path, whole: Path, diary: bool = True) -> None:
    """The same autoencoder, metrics and losses, and one set of files."""
    saved, expected = (load_sae(f / "sae") for f in (folder, whole))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    mine, theirs = (json.loads((f / "sae/metrics.json").read_text()) for f in (folder, whole))
    for name, value in theirs.items():
        assert mine[name] == (pytest.approx(value, rel=1e-4) if name != "split" else value)
    if diary:
        two, one = read_run(folder / "diary", world=2), read_run(whole / "diary")
        for step, loss in two.losses.items():
            assert loss == pytest.approx(one.losses[step], rel=1e-5)
        assert max(two.losses) == LAST


def test_two_machines_train_as_one(store: Path, tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "two"
    for status, shown in [ended(p) for p in torchrun(config(store, folder))]:
        assert status == 0, shown
    check_equal(folder, whole)
    assert files(folder) == files(whole)
    assert not left_over(tmp_path)


def test_a_machine_that_is_lost(store: Path, tmp_path: Path, whole: Path) -> None:
    """Both ends of the run end; the same commands go on from the last checkpoint."""
    folder = tmp_path / "two"
    cut = config(store, folder, "cut", signum=int(signal.SIGKILL), step=10, rank=1)
    (status, shown), (other, _) = [ended(p) for p in torchrun(cut)]
    assert status and other
    assert "error: Another process of this run has died" in shown
    assert "--ckpt_path last" in shown
    assert not left_over(tmp_path)
    last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 8
    main(["fit", "--config", str(config(store, folder)), "--ckpt_path=last"])
    check_equal(folder, whole, diary=False)


def test_preempted_and_then_a_rank_is_lost(store: Path, tmp_path: Path, whole: Path) -> None:
    """`ddp` of the command line: SIGTERM ends it in order, SIGKILL of a rank with a message."""
    folder = tmp_path / "two"
    told = config(store, folder, "told", signum=int(signal.SIGTERM), step=5, rank=1)
    status, shown = ended(start(sys.executable, *fit(told, *TWO)))
    assert status == 143, shown
    assert re.search(r"Asked to stop: step 6 is saved to .*last.ckpt", shown)
    assert not left_over(tmp_path)
    cut = config(store, folder, "cut", signum=int(signal.SIGKILL), step=10, rank=1)
    status, shown = ended(start(sys.executable, *fit(cut, *TWO, "--ckpt_path=last")))
    assert status not in (0, 143)
    # Lightning looks after its children every five seconds, and may be the first to notice
    said = "error: Another process of this run has died", "Child process with PID"
    assert any(message in shown for message in said), shown
    assert not left_over(tmp_path)
    last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 8
    main(["fit", "--config", str(config(store, folder)), "--ckpt_path=last"])
    check_equal(folder, whole, diary=False)
