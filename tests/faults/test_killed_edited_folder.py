from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from salve_lm.errors import MissingFile, OutputUnwritable
from salve_lm.task_vectors import writer
from salve_lm.task_vectors.changing import NamedDeltas
from salve_lm.task_vectors.tensor_files import TensorFiles
from salve_lm.task_vectors.writer import write_edited
from tests.faults.processes import die, run_killed, small_disk


class Ones:
    """A change that may end the process when row `at` is asked for."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at

    def rows(self, start: int, stop: int) -> Tensor:
        if self.at is not None and start <= self.at < stop:
            die()
        return torch.ones(stop - start, 500)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {"kept": torch.zeros(3000, 500), "changed": torch.zeros(3000, 500)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def write(base: Path, out: Path, delta: Ones) -> None:
    write_edited(TensorFiles(base), [NamedDeltas("e", {"changed": delta})], out)


@pytest.mark.parametrize("where", ["first rows", "last rows", "before the rename"])
def test_killed_at_any_time_leaves_nothing_that_looks_finished(
    base: Path, tmp_path: Path, where: str
) -> None:
    out = tmp_path / "runs" / "out"

    def work() -> None:
        if where == "before the rename":
            writer.carry_over = lambda *_: die()  # type: ignore[assignment]
            write(base, out, Ones())
        else:
            write(base, out, Ones(0 if where == "first rows" else 2999))

    run_killed(work)
    assert not out.exists()
    (left,) = out.parent.iterdir()
    assert left.name.startswith(".out.partial-")
    with pytest.raises(MissingFile):
        TensorFiles(out)
    write(base, out, Ones())  # and the next writer clears it away
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert bool((TensorFiles(out).read("changed") == 1).all())


def test_a_disk_that_fills_up_on_the_way(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Free:
        free = 1 << 40  # as if another process took the space after the look at it

    with small_disk(tmp_path / "disk", 4000) as disk:
        with pytest.raises(OutputUnwritable, match=r"takes 0\.01 GB"):
            write(base, disk / "out", Ones())
        monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: Free())
        with pytest.raises(OutputUnwritable, match="disk is full"):
            write(base, disk / "out", Ones())
        assert list(disk.iterdir()) == []
