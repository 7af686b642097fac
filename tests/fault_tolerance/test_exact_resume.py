"""Every checkpoint of a run, and of the runs resumed from them, leads to the same steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from salve_lm.activations import ActivationBatch, ActivationData
from salve_lm.activations.harvest import harvest
from salve_lm.fault_tolerance.exact_resume import ExactResume, settle_progress
from tests.activations.test_datamodule import trainer
from tests.activations.tiny import TinyData, TinyStudied

EPOCHS, BATCHES = 2, 3
Steps = list[tuple[int, int, int, int, list[int]]]


class Follower(pl.LightningModule):
    """Writes down, for each batch, all by which two runs could differ."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps: Steps = []

    def training_step(self, batch: ActivationBatch, batch_idx: int) -> torch.Tensor:
        logged_step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        samples = batch.sample.tolist()
        where = (self.current_epoch, batch_idx, self.global_step, logged_step, samples)
        self.steps.append(where)
        return self.weight * batch.x.sum()

    def validation_step(self, batch: ActivationBatch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class SaveEverywhere(Callback):
    """A checkpoint in and after each step, validation and epoch; counts the batches before it.

    `only` names the one to write; None writes all.
    """

    def __init__(self, folder: Path, only: int | None) -> None:
        self.folder, self.only, self.n = folder, only, 0
        self.saved: list[tuple[Path, int]] = []

    def _save(self, trainer: pl.Trainer, module: Follower, *_: Any) -> None:
        path = self.folder / f"{self.n}.ckpt"
        self.n += 1
        if self.only not in (None, self.n - 1):
            return
        trainer.save_checkpoint(path)
        done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        begun = trainer.fit_loop.epoch_loop.batch_progress.current.started
        self.saved.append((path, len(module.steps) - (begun - done)))

    on_train_batch_start = on_before_optimizer_step = _save
    on_train_batch_end = on_validation_end = on_train_epoch_end = _save


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("activations") / "store"
    data = TinyData(n_train=11, n_val=3)
    data.setup("fit")
    harvest(TinyStudied(), data, "pooled", path, progress=False)
    return path


def run(
    store: Path,
    folder: Path,
    ckpt_path: Path | None = None,
    only: int | None = None,
    **options: Any,
) -> tuple[Steps, list[tuple[Path, int]]]:
    data = ActivationData(str(store), batch_size=4)
    follower, save = Follower(), SaveEverywhere(folder, only)
    trainer(callbacks=[ExactResume(), save], **options).fit(
        follower, datamodule=data, ckpt_path=ckpt_path
    )
    return follower.steps, save.saved


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit_val_batches": 0},
        {"check_val_every_n_epoch": 2},
        {"val_check_interval": 2, "check_val_every_n_epoch": None},
        {"limit_train_batches": 2},
        {"accumulate_grad_batches": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("by_steps", [False, True], ids=["max_epochs", "max_steps"])
def test_every_checkpoint_leads_to_the_same_steps(
    store: Path, tmp_path: Path, options: dict[str, Any], by_steps: bool
) -> None:
    per_epoch = options.get("limit_train_batches", BATCHES)
    updates = -(-per_epoch // options.get("accumulate_grad_batches", 1))
    until = (
        {"max_epochs": -1, "max_steps": EPOCHS * updates} if by_steps else {"max_epochs": EPOCHS}
    )
    options = {**options, **until}
    whole, saved = run(store, tmp_path, **options)
    assert len(whole) == EPOCHS * per_epoch
    for i, (path, done) in enumerate(saved):
        steps, saved_again = run(store, tmp_path / path.stem, path, only=i % 7, **options)
        assert steps == whole[done:], f"resumed from {path.name}"
        for path_again, done_again in saved_again:
            steps, _ = run(store, tmp_path, path_again, only=-1, **options)
            assert steps == whole[done + done_again :], f"{path.name}, then {path_again.name}"


def test_an_interrupted_step_is_given_back_to_the_loader() -> None:
    loops = fit_loop((2, 1, 1), (3, 2, 2), last=False)
    settle_progress(loops)
    assert loops["state_dict"]["combined_loader"] == [{"position": 2}]


def progress(ready: int, processed: int, completed: int) -> dict[str, int]:
    return {"ready": ready, "completed": completed, "started": ready, "processed": processed}


def fit_loop(epoch: tuple[int, int, int], batch: tuple[int, int, int], last: bool) -> Any:
    """Progress of a run of 7 batches an epoch that is in its second epoch."""
    ready, processed, completed = batch
    return {
        "state_dict": {"combined_loader": [{"position": ready}]},
        "epoch_progress": {"total": progress(*epoch), "current": progress(*epoch)},
        "epoch_loop.batch_progress": {
            "total": progress(ready + 7, processed + 7, completed + 7),
            "current": progress(*batch),
            "is_last_batch": last,
        },
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {"step": {"total": {"ready": 14}, "current": {"ready": 7}}}
        },
        "epoch_loop.val_loop.batch_progress": {
            "total": progress(3, 3, 3),
            "current": progress(3, 3, 3),
            "is_last_batch": True,
        },
    }


@pytest.mark.parametrize(
    ("epoch", "batch"), [((2, 1, 1), (7, 7, 6)), ((2, 2, 1), (7, 7, 7)), ((2, 2, 2), (7, 7, 7))]
)
def test_progress_from_the_end_of_an_epoch(
    epoch: tuple[int, int, int], batch: tuple[int, int, int]
) -> None:
    settled = fit_loop(epoch, batch, last=True)
    settle_progress(settled)
    assert settled["epoch_progress"]["current"] == progress(2, 2, 2)
    assert settled["epoch_loop.batch_progress"] == {
        "total": progress(14, 14, 14),
        "current": progress(0, 0, 0),
        "is_last_batch": False,
    }
    step = settled["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    assert step == {"total": {"ready": 14}, "current": {"ready": 0}}
    again = copy.deepcopy(settled)
    settle_progress(again)
    assert again == settled


@pytest.mark.parametrize(
    ("epoch", "batch", "last"),
    [
        ((2, 1, 1), (3, 3, 2), False),  # after a batch in the midst
        ((2, 1, 1), (3, 3, 3), False),  # in a validation in the midst
        ((2, 1, 1), (7, 7, 7), True),  # in the validation behind the last batch
    ],
)
def test_other_progress_is_left_alone(
    epoch: tuple[int, int, int], batch: tuple[int, int, int], last: bool
) -> None:
    loops = fit_loop(epoch, batch, last)
    before = copy.deepcopy(loops)
    settle_progress(loops)
    assert loops == before
