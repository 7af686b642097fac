"""Fits on a store that is shuffled a buffer at a time: killed and resumed, and on two processes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from salve_lm.activations import rows
from tests.activations.tiny import D_IN
from tests.distributed.training import KillAt, Run, activation_data, checkpoints, fit, read_run
from tests.faults.processes import run_killed


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rows, "BLOCK_BYTES", 3 * 4 * D_IN)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def command(store: Path, folder: Path, *more: Callback, **trainer: object) -> None:
    """97 rows in batches of 16, in buffers of 32; goes on where it was."""
    data = activation_data(store)
    data.buffer_rows = 32
    callbacks = (checkpoints(folder, every_n_train_steps=1), *more)
    fit(data, folder / "run", callbacks=callbacks, resume=True, **trainer)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("activations")
    activation_data(folder).prepare_data()
    return folder


def whole_of(store: Path, folder: Path) -> Run:
    command(store, folder)
    return read_run(folder / "run")


def test_killed_and_resumed_to_the_bit(store: Path, tmp_path: Path) -> None:
    whole = whole_of(store, tmp_path / "whole")
    for step in (2, 9, 15):
        kill = KillAt("on_train_batch_start", step)
        run_killed(partial(command, store, tmp_path / "killed", kill))
    command(store, tmp_path / "killed")
    resumed = read_run(tmp_path / "killed" / "run")
    assert resumed.losses == {s: whole.losses[s] for s in resumed.losses}
    assert max(resumed.losses) == max(whole.losses) == 21
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


def test_two_processes_train_as_one(store: Path, tmp_path: Path) -> None:
    whole = whole_of(store, tmp_path / "one")
    command(store, tmp_path / "two", strategy="ddp_fork", devices=2)
    two = read_run(tmp_path / "two" / "run", world=2)
    assert two.losses == pytest.approx(whole.losses, rel=1e-5)
    for alone, shares in zip(whole.samples["train"], two.samples["train"], strict=True):
        assert list(chain(*shares)) == alone[0]
    for epoch in range(3):
        steps = two.samples["train"][7 * epoch : 7 * (epoch + 1)]
        assert sorted(chain(*chain(*steps))) == list(range(97))
