"""A group that streams through a shuffle buffer: killed and resumed, and on two processes."""

from __future__ import annotations

import json
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing import ProcessExitedException

from salve_lm.activations.batch import SitesBatch
from salve_lm.fault_tolerance.checkpoint_io import AtomicCheckpointIO
from salve_lm.modules.sae_group import SAEGroupTraining
from tests.distributed.ranks import TWO as DDP
from tests.distributed.ranks import run_ranks
from tests.distributed.test_preemption import Preempt
from tests.distributed.training import KillAt, checkpoints
from tests.faults.processes import run_killed
from tests.sae.group import read_folder, token_data

# 10 batches an epoch, of which a buffer holds 4: kills hit the buffer's beginning, midst and end
MEMBERS: dict[str, Any] = {
    "a": {"site": "resid_post.0", "normalize_input": "expected_average_only_in"},
    "b": {"site": "resid_post.2", "architecture": "topk", "options": {"k": 3}},
    "c": {
        "site": "resid_post.2",
        "architecture": "batchtopk",
        "options": {"k": 3},
        "seed": 4,
        # Adam makes large steps of rounding errors where resampling leaves a latent without
        # gradients: one process and two would then end apart
        "dead_feature_handling": "aux",
    },
}
TWO = {"strategy": "ddp_fork", "devices": 2}
STEPS = 30


class Diary(Callback):
    """Writes down losses, rows and the final state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: dict[int, list[float]] = {}
        self.rows: dict[int, list[int]] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: SitesBatch, index: int
    ) -> None:
        logged = trainer.callback_metrics
        self.losses[trainer.global_step] = [float(logged[f"{m}/train/loss"]) for m in MEMBERS]
        self.rows[trainer.global_step] = batch.position.tolist()

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"rows-{trainer.global_rank}.json"
        (self.folder / name).write_text(json.dumps(self.rows))
        if trainer.is_global_zero:
            (self.folder / "losses.json").write_text(json.dumps(self.losses))
            state = {k: v for k, v in module.state_dict().items() if torch.is_tensor(v)}
            optimizer = trainer.optimizers[0].state_dict()["state"]
            torch.save({"state": state, "optimizer": optimizer}, self.folder / "weights.pt")


def command(folder: Path, *more: Callback, store: bool = False, **trainer: Any) -> None:
    """The one command: it goes on where it was, or starts where there is nothing yet."""
    group = SAEGroupTraining(
        members=MEMBERS, out=str(folder / "saes"), architecture="standard", d_sae=24, lr=1e-2,
        dead_after=100, lr_warm_up_steps=5, dead_feature_handling="resample",
    )  # fmt: skip
    settings: dict[str, Any] = {
        "max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "log_every_n_steps": 1, "num_sanity_val_steps": 0,
        "plugins": [AtomicCheckpointIO()], "gradient_clip_val": 1.0,
        "callbacks": [
            Diary(folder), checkpoints(folder, every_n_train_steps=1), *more
        ],
    }  # fmt: skip
    pl.Trainer(**{**settings, **trainer}).fit(
        group,
        datamodule=token_data(store=str(folder.parent / "store") if store else None),
        ckpt_path="last",
    )


def read(folder: Path, world: int = 1) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
    rows = [json.loads((folder / f"rows-{r}.json").read_text()) for r in range(world)]
    losses = json.loads((folder / "losses.json").read_text())
    return losses, rows, torch.load(folder / "weights.pt", weights_only=True)


def check_same(resumed: Path, whole: Path, world: int = 1) -> None:
    (losses, rows, weights), (all_losses, all_rows, expected) = (
        read(folder, world) for folder in (resumed, whole)
    )
    for step, loss in losses.items():
        assert loss == all_losses[step], f"step {step}"
        assert [r[step] for r in rows] == [r[step] for r in all_rows]
    assert max(map(int, losses)) == STEPS
    for name, value in expected["state"].items():
        assert torch.equal(weights["state"][name], value), name
    for number, moments in expected["optimizer"].items():
        for name, value in moments.items():
            assert torch.equal(weights["optimizer"][number][name], value), (number, name)
    a, b = read_folder(resumed / "saes"), read_folder(whole / "saes")
    assert len(a) == 3 * len(MEMBERS)
    assert a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "run"
    command(folder)
    return folder


def test_killed_again_and_again(tmp_path: Path, whole: Path) -> None:
    for step in (2, 4, 5, 9, 14, 18, 26):
        run_killed(partial(command, tmp_path, KillAt("on_train_batch_start", step)))
    command(tmp_path)
    check_same(tmp_path, whole)


@pytest.mark.parametrize(
    ("hook", "step"),
    [("on_before_optimizer_step", 6), ("on_validation_start", 9), ("on_train_epoch_end", 18)],
)
def test_killed_at_a_hook(tmp_path: Path, whole: Path, hook: str, step: int) -> None:
    run_killed(partial(command, tmp_path, KillAt(hook, step)))
    command(tmp_path)
    check_same(tmp_path, whole)


def test_killed_while_reading_a_store(tmp_path: Path) -> None:
    command(tmp_path / "whole", store=True)
    for step in (5, 13):
        kill = KillAt("on_train_batch_start", step)
        run_killed(partial(command, tmp_path / "killed", kill, store=True))
    command(tmp_path / "killed", store=True)
    check_same(tmp_path / "killed", tmp_path / "whole")


def test_two_processes_killed(tmp_path: Path) -> None:
    command(tmp_path / "whole", **TWO)
    for step in (3, 14):
        kill = KillAt("on_train_batch_start", step)
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            command(tmp_path / "killed", kill, **TWO)
    command(tmp_path / "killed", **TWO)
    check_same(tmp_path / "killed", tmp_path / "whole", world=2)


def test_two_processes_train_as_one(tmp_path: Path, whole: Path) -> None:
    command(tmp_path, **TWO)
    (losses, rows, weights), (expected, (alone,), reference) = read(tmp_path, 2), read(whole)
    for step, values in expected.items():
        assert losses[step] == pytest.approx(values, rel=1e-4, abs=1e-6), f"step {step}"
        # the ranks' shares, side by side, are the batch of the single process
        assert list(chain(*(r[step] for r in rows))) == alone[step]
    for name, value in reference["state"].items():
        torch.testing.assert_close(weights["state"][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_the_checkpoint_holds_neither_model_nor_buffer(whole: Path) -> None:
    checkpoint = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(name.startswith("members.") for name in checkpoint["state_dict"])
    loader = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    assert loader["buffer_rows"] == 256
    assert (whole / "checkpoints" / "last.ckpt").stat().st_size < 200_000


def test_preempted(tmp_path: Path, whole: Path) -> None:
    """SIGTERM while streaming: also where a buffer begins and ends."""
    for step in (3, 4, 13):
        with pytest.raises(SIGTERMException):
            command(tmp_path, Preempt("on_train_batch_start", step))
    command(tmp_path)
    check_same(tmp_path, whole)


def test_two_processes_preempted(tmp_path: Path) -> None:
    run_ranks(lambda _: command(tmp_path / "whole", **DDP))
    told = Preempt("on_train_batch_start", 6, rank=1)
    assert run_ranks(lambda _: command(tmp_path / "told", told, **DDP)) == [143, 0]
    run_ranks(lambda _: command(tmp_path / "told", **DDP))
    check_same(tmp_path / "told", tmp_path / "whole", world=2)
