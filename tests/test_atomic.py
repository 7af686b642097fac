from __future__ import annotations

import multiprocessing
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from salve_lm import atomic
from salve_lm.atomic import atomic_file, atomic_folder, check_writable_target
from salve_lm.errors import OutputExists, OutputUnwritable
from tests.faults.processes import die, run_killed, small_disk


def write_folder(target: Path, content: str = "new") -> None:
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "a.txt").write_text(content)
        (folder / "sub" / "b.txt").write_text(content)


def write_file(target: Path, content: str = "new") -> None:
    with atomic_file(target) as partial:
        partial.write_text(content)


def in_another_process(work: Callable[[], object]) -> None:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_folder_appears_whole_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as folder:
        (folder / "a.txt").write_text("a")
        assert not target.exists()
        assert folder.parent == target.parent  # the rename stays on one file system
    assert (target / "a.txt").read_text() == "a"
    assert os.listdir(target.parent) == ["out"]


def test_a_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    write_file(target, "old")
    with atomic_file(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["out"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), atomic_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
        raise ValueError("mine")
    (tmp_path / "file").write_text("old")
    with pytest.raises(ValueError, match="mine"), atomic_file(tmp_path / "file") as partial:
        partial.write_text("half")
        raise ValueError("mine")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", "old")
    with pytest.raises(OutputExists, match="Choose another output, or remove it first"):
        check_writable_target(tmp_path / "out")
    with pytest.raises(OutputExists), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert (tmp_path / "out" / "a.txt").read_text() == "old"


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(OutputExists), atomic_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("mine")
        in_another_process(lambda: write_folder(tmp_path / "out", "theirs"))
    assert (tmp_path / "out" / "a.txt").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_another_machine_writes_at_the_same_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "out", os.rename

    def late(a: Path, b: Path) -> None:
        target.mkdir()
        (target / "theirs").touch()
        rename(a, b)

    monkeypatch.setattr(atomic.os, "rename", late)
    with pytest.raises(OutputExists):
        write_folder(target)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(target) == ["theirs"]


def killed_while_writing_folder(target: Path) -> None:
    with atomic_folder(target) as folder:
        (folder / "a.txt").write_text("half")
        die()


def killed_before_renaming_folder(target: Path) -> None:
    atomic.os.rename = lambda *_: die()  # type: ignore[assignment]
    write_folder(target)


def killed_before_replacing_file(target: Path) -> None:
    atomic.os.replace = lambda *_: die()  # type: ignore[assignment]
    write_file(target, "half")


@pytest.mark.parametrize("work", [killed_while_writing_folder, killed_before_renaming_folder])
def test_killed_while_writing_a_folder(tmp_path: Path, work: object) -> None:
    target = tmp_path / "out"
    run_killed(lambda: work(target))  # type: ignore[operator]
    assert not target.exists()
    assert len(os.listdir(tmp_path)) == 1  # what the dead process left
    write_folder(target)
    assert os.listdir(tmp_path) == ["out"]
    assert (target / "a.txt").read_text() == "new"


def test_killed_while_writing_a_file(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    write_file(target, "old")
    run_killed(lambda: killed_before_replacing_file(target))
    assert target.read_text() == "old"
    write_file(target)
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["out.bin"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder, atomic_file(tmp_path / "file") as file:
        file.write_text("mine")
        in_another_process(lambda: write_folder(tmp_path / "out", "theirs"))
        in_another_process(lambda: write_file(tmp_path / "file", "theirs"))
        assert folder.exists() and file.exists()
        (tmp_path / "out").rename(tmp_path / "moved")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_another_machine_writes_on_a_shared_disk_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / ".out.partial-another-host-999999999"
    other.mkdir()
    write_folder(tmp_path / "out")
    assert other.exists()


def test_what_an_earlier_process_with_our_id_left_is_removed(tmp_path: Path) -> None:
    """A container's processes are numbered from 1 each time it starts."""
    (tmp_path / f".out.partial-{platform.node()}-{os.getpid()}").mkdir()
    (tmp_path / f".file.partial-{platform.node()}-{os.getpid()}").write_text("half")
    write_folder(tmp_path / "out")
    write_file(tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


def test_a_file_that_cannot_be_read_is_not_called_unwritable(tmp_path: Path) -> None:
    for error in (
        PermissionError(13, "denied", str(tmp_path / "image.png")),
        FileNotFoundError(2, "none", str(tmp_path / "image.png")),
    ):
        for write in (atomic_folder, atomic_file):
            with pytest.raises(type(error)) as e, write(tmp_path / "out"):
                raise error
            assert e.value is error


def test_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        (disk / "keep").write_text("old")
        big = {"w": torch.zeros(100_000)}
        with (
            pytest.raises(OutputUnwritable, match="the disk is full; free some space"),
            atomic_folder(disk / "out") as folder,
        ):
            save_file(big, folder / "model.safetensors")
        with (
            pytest.raises(OutputUnwritable, match="the disk is full; free some space"),
            atomic_folder(disk / "out") as folder,
        ):
            (folder / "a.bin").write_bytes(bytes(200_000))
        with (
            pytest.raises(OutputUnwritable, match="the disk is full"),
            atomic_file(disk / "keep") as partial,
        ):
            partial.write_bytes(bytes(200_000))
        assert os.listdir(disk) == ["keep"]
        assert (disk / "keep").read_text() == "old"
        write_folder(disk / "out")  # there is space again


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    for write in (write_folder, write_file):
        with pytest.raises(OutputUnwritable, match="a file stands where a folder is needed"):
            write(tmp_path / "file" / "out")
        with pytest.raises(OutputUnwritable, match="a file stands where a folder is needed"):
            write(tmp_path / "file" / "deep" / "out")
    assert (tmp_path / "file").read_text() == "here"


def test_no_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("permission bits do not bind root")
    tmp_path.chmod(0o500)
    try:
        for write in (write_folder, write_file):
            with pytest.raises(OutputUnwritable, match="no permission to write there"):
                write(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_that_takes_no_files() -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs a /proc file system")
    for write in (write_folder, write_file):
        with pytest.raises(OutputUnwritable, match="Cannot write /proc/out"):
            write(Path("/proc/out"))


def test_a_read_only_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for write in (write_folder, write_file):
            with pytest.raises(OutputUnwritable, match="read-only; choose another folder"):
                write(disk / "out")
