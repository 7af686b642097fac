from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from salve_lm import atomic
from salve_lm.activations.harvest import harvest
from salve_lm.activations.store import ActivationStore
from salve_lm.data.labelled import Split
from salve_lm.errors import CorruptFile, MissingStore, OutputUnwritable
from tests.activations.tiny import TinyData, TinyStudied, ready_data
from tests.faults.processes import die, run_killed, small_disk


class Interrupted(Dataset):
    """Does something when one of its samples is read."""

    def __init__(self, dataset: Dataset, at: int, action: Callable[[], object]) -> None:
        self.dataset, self.at, self.action = dataset, at, action

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        if index == self.at:
            self.action()
        return self.dataset[index]


class InterruptedData(TinyData):
    def __init__(self, split: Split, at: int, action: Callable[[], object], **options: Any) -> None:
        super().__init__(**options)
        self.interruption = (split, at, action)
        self.setup("fit")

    def eval_dataset(self, split: Split) -> Dataset:
        dataset = super().eval_dataset(split)
        at_split, at, action = self.interruption
        return Interrupted(dataset, at, action) if split == at_split else dataset


def quiet_harvest(data: TinyData, out: Path, shard_rows: int = 4) -> ActivationStore:
    return harvest(TinyStudied(), data, "pooled", out, shard_rows=shard_rows, progress=False)


def check_mended(out: Path) -> None:
    """The next harvest works, and nothing else is left."""
    quiet_harvest(ready_data(), out).verify()
    assert os.listdir(out.parent) == [out.name]


@pytest.mark.parametrize(("split", "at"), [("train", 0), ("train", 17), ("val", 10)])
def test_killed_harvest(tmp_path: Path, split: Split, at: int) -> None:
    out = tmp_path / "store"
    run_killed(lambda: quiet_harvest(InterruptedData(split, at, die), out))
    assert not out.exists()
    with pytest.raises(MissingStore):
        ActivationStore(out)
    [left] = tmp_path.iterdir()
    with pytest.raises(CorruptFile, match="it is not an activation store"):
        ActivationStore(left)
    check_mended(out)


def test_killed_just_before_the_end(tmp_path: Path) -> None:
    out = tmp_path / "store"

    def killed_before_the_rename() -> None:
        atomic.os.rename = lambda *_: die()  # type: ignore[assignment]
        quiet_harvest(ready_data(), out)

    run_killed(killed_before_the_rename)
    with pytest.raises(MissingStore):
        ActivationStore(out)
    check_mended(out)


def test_a_data_error_leaves_nothing(tmp_path: Path) -> None:
    def unreadable() -> None:
        raise OSError("image 9 cannot be read")

    with pytest.raises(OSError, match="image 9"):
        quiet_harvest(InterruptedData("train", 9, unreadable), tmp_path / "store")
    check_mended(tmp_path / "store")


def test_a_disk_too_small_is_noticed_before_the_work(tmp_path: Path) -> None:
    data = ready_data(n_train=3000)
    studied = TinyStudied()
    runs = []
    studied.model.conv.register_forward_hook(lambda *_: runs.append(1))
    with small_disk(tmp_path / "disk", kilobytes=100) as disk:
        with pytest.raises(
            OutputUnwritable, match=r"'train' needs 0\.00012 GB.*0\.0001\d* GB are free.*bfloat16"
        ):
            harvest(studied, data, "pooled", disk / "store", progress=False)
        assert len(runs) == 1
        check_mended(disk / "store")


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes=200) as disk:
        hog = disk / "hog"

        def fill_up() -> None:
            with contextlib.suppress(OSError), open(hog, "wb", buffering=0) as f:
                while True:
                    f.write(bytes(4096))

        data = InterruptedData("train", 500, fill_up, n_train=1000)
        with pytest.raises(OutputUnwritable, match="the disk is full; free some space"):
            quiet_harvest(data, disk / "store", shard_rows=100)
        assert os.listdir(disk) == ["hog"]
        hog.unlink()
        check_mended(disk / "store")


def test_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    studied = TinyStudied()
    studied.model.conv.register_forward_hook(lambda *_: pytest.fail("ran before the check"))
    with pytest.raises(OutputUnwritable, match="a file stands where a folder is needed"):
        harvest(studied, ready_data(), "pooled", tmp_path / "file" / "store")
    with pytest.raises(OutputUnwritable):
        harvest(studied, ready_data(), "pooled", Path("/proc/store"))


def test_two_harvests_at_once(tmp_path: Path) -> None:
    """The second to finish finds the first one's store, which holds the same."""
    from salve_lm.activations import ActivationData

    out = tmp_path / "store"

    def in_another_process() -> None:
        if not out.exists():
            run_killed(lambda: (quiet_harvest(ready_data(), out), die()))

    source = InterruptedData("val", 3, in_another_process)
    second = ActivationData(str(out), TinyStudied(), source)
    second.prepare_data()
    second.setup("fit")
    assert torch.isfinite(next(iter(second.train_dataloader())).x).all()
    assert os.listdir(tmp_path) == ["store"]
