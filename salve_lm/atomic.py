"""Folders and files that appear whole or not at all.

An export, a store or an SAE is written under a temporary sibling name, flushed to disk and renamed
at the end. A process killed half-way leaves only `.NAME.partial-PID`, which no reader takes for the
real thing; the next writer of the same target removes what dead processes left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from salve_lm.errors import OutputExists, OutputUnwritable


def check_writable_target(target: str | Path) -> Path:
    """Fail now, not after an hour of work, if `target` exists or cannot be created.

    Raises:
        OutputExists: `target` is there already.
        OutputUnwritable: its parent cannot be created or written.
    """
    target = Path(target)
    if target.exists():
        raise OutputExists(target)
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = target.parent / f".{target.name}.probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    return target


@contextlib.contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an exception.

    Raises:
        OutputExists: `target` is there already (checked before and after the block).
        OutputUnwritable: no permission, no space, or a file in the way.
    """
    target = check_writable_target(target)
    _remove_leftovers(target)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        with _explained(target):
            partial.mkdir()
            yield partial
            for path in sorted(partial.rglob("*")):
                if path.is_file():
                    _fsync(path)
            if target.exists():
                raise OutputExists(target)
            os.rename(partial, target)
            _fsync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path whose file replaces `target` when the block ends without an exception."""
    target = Path(target)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        with _explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _fsync(partial)
            os.replace(partial, target)
            _fsync(target.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals into an error that names the cure."""
    cures = {
        errno.ENOSPC: "the disk is full; free some space",
        errno.EDQUOT: "the disk quota is used up; free some space",
        errno.EACCES: "no permission to write there; choose another folder",
        errno.EPERM: "no permission to write there; choose another folder",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.ENOTDIR: "a file stands where a folder is needed; choose another folder",
        errno.EEXIST: "a file stands where a folder is needed; choose another folder",
    }
    try:
        yield
    except OutputExists:
        raise
    except OSError as e:
        if e.errno in cures:
            raise OutputUnwritable(f"Cannot write {target}: {cures[e.errno]}.") from e
        raise
    except Exception as e:
        # safetensors reports the operating system's refusal only in its message
        if "os error 28" in str(e) or "No space left" in str(e):
            cure = cures[errno.ENOSPC]
            raise OutputUnwritable(f"Cannot write {target}: {cure}.") from e
        raise


def _remove_leftovers(target: Path) -> None:
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        pid = leftover.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
