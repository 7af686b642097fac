from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from salve_lm import atomic
from salve_lm.errors import CorruptFile, MissingFile, OutputUnwritable
from salve_lm.fault_tolerance.checkpoint_io import AtomicCheckpointIO
from tests.faults.processes import die, run_killed, small_disk

CHECKPOINT = {"state_dict": {"w": torch.arange(5.0)}, "epoch": 3, "loops": {"a": [1, None, "b"]}}


def same(loaded: dict[str, object]) -> bool:
    return (
        torch.equal(loaded["state_dict"]["w"], CHECKPOINT["state_dict"]["w"])  # type: ignore[index]
        and loaded["loops"] == CHECKPOINT["loops"]
        and loaded["epoch"] == 3
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "deep" / "a.ckpt"
    io.save_checkpoint(CHECKPOINT, path)
    assert same(io.load_checkpoint(path))
    assert same(torch.load(path, weights_only=True))
    assert os.listdir(path.parent) == ["a.ckpt"]
    io.remove_checkpoint(path)
    assert not path.exists()


def test_written_beside_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[Path, Path]] = []
    replace = os.replace
    monkeypatch.setattr(
        atomic.os, "replace", lambda a, b: (moves.append((Path(a), Path(b))), replace(a, b))
    )
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "last.ckpt")
    [(source, target)] = moves
    assert source.parent == target.parent == tmp_path
    # Lightning looks for files last*.ckpt
    assert not source.name.startswith("last") and source.suffix != ".ckpt"


def test_killed_while_saving_keeps_the_old_one(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(CHECKPOINT, path)

    def killed_before_the_rename() -> None:
        atomic.os.replace = lambda *_: die()  # type: ignore[assignment]
        io.save_checkpoint({"epoch": 4}, path)

    run_killed(killed_before_the_rename)
    assert same(io.load_checkpoint(path))


def test_full_disk_keeps_the_old_one(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        io.save_checkpoint(CHECKPOINT, disk / "last.ckpt")
        with pytest.raises(OutputUnwritable, match="the disk is full; free some space"):
            io.save_checkpoint({"w": torch.zeros(100_000)}, disk / "last.ckpt")
        assert os.listdir(disk) == ["last.ckpt"]
        assert same(io.load_checkpoint(disk / "last.ckpt"))


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(OutputUnwritable, match="a file stands where a folder is needed"):
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "file" / "a.ckpt")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"No checkpoint at .*--ckpt_path"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize("keep", [0, 1, 10, 200, -1])
def test_truncated(tmp_path: Path, keep: int) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint(CHECKPOINT, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptFile, match="Use an earlier checkpoint"):
        io.load_checkpoint(path)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 no", b"hello world, not a checkpoint", b"\x80\x02N"]
)
def test_foreign(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match="not a checkpoint"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_objects_are_not_unpickled_unless_asked(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint({"where": Path("x")}, path)
    with pytest.raises(CorruptFile, match=r"neither tensors nor plain values.*weights_only=False"):
        io.load_checkpoint(path)
    assert io.load_checkpoint(path, weights_only=False) == {"where": Path("x")}


def test_storage_options_are_refused_as_by_lightning(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "a", storage_options={})


def test_remote_paths_go_to_lightning() -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint(CHECKPOINT, "memory://a.ckpt")
    assert same(io.load_checkpoint("memory://a.ckpt"))


def test_a_whole_lightning_checkpoint_loads_with_tensors_and_plain_values_only(
    tmp_path: Path,
) -> None:
    from tests.activations.test_datamodule import Watcher, on_the_fly, trainer

    io = AtomicCheckpointIO()
    callback = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    fitted = trainer(enable_checkpointing=True, callbacks=[callback], plugins=[io], max_epochs=1)
    fitted.fit(Watcher(), datamodule=on_the_fly())
    loops = io.load_checkpoint(tmp_path / "last.ckpt")["loops"]
    assert loops["fit_loop"]["state_dict"]["combined_loader"][0]["position"] == 5
