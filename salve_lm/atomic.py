"""Folders and files that appear whole or not at all.

An export, a store or an SAE is written under a temporary sibling name, flushed to disk and renamed
at the end. A process killed half-way leaves only `.NAME.partial-HOST-PID`, which no reader takes
for the real thing; the next writer of the same target removes what dead processes left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from salve_lm.errors import OutputExists, OutputUnwritable, SalveError

_CURES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EACCES: "no permission to write there; choose another folder",
    errno.EPERM: "no permission to write there; choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "no folder can be made there; choose another folder",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another folder",
    errno.EEXIST: "a file stands where a folder is needed; choose another folder",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)


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
    partial = _partial(target)
    try:
        with _explained(target):
            partial.mkdir()
            yield partial
            for path in sorted(partial.rglob("*")):
                if path.is_file():
                    _finish(path)
            if target.exists():
                raise OutputExists(target)
            try:
                os.rename(partial, target)
            except OSError as e:
                # another machine with the same disk was faster by a moment
                if e.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise OutputExists(target) from e
                raise
            _fsync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path whose file replaces `target` when the block ends without an exception.

    Raises:
        OutputUnwritable: no permission, no space, or a file in the way.
    """
    target = Path(target)
    partial = _partial(target)
    try:
        with _explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target)
            yield partial
            _finish(partial)
            os.replace(partial, target)
            _fsync(target.parent)
    except BaseException:
        # whatever forbids writing may forbid this too, and must not hide the reason
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _partial(target: Path) -> Path:
    """Where this process writes `target`: beside it, so that the rename stays on one disk."""
    return target.parent / f"{_partial_prefix(target)}{os.getpid()}"


def _partial_prefix(target: Path) -> str:
    # with the host: on a shared disk, a process id says nothing about other machines
    return f".{target.name}.partial-{platform.node()}-"


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write `target` into an error that names the cure."""
    try:
        yield
    except SalveError:
        raise
    except Exception as e:
        cure = _cure(e, target)
        if cure is None:
            raise
        raise OutputUnwritable(f"Cannot write {target}: {cure}.") from e


def _cure(e: Exception, target: Path) -> str | None:
    if isinstance(e, OSError) and e.errno in _CURES and _concerns(e, target):
        return _CURES[e.errno]
    # torch raises an error of its own while it handles the one of the operating system
    cause = e.__cause__ or e.__context__
    if isinstance(cause, OSError) and cause.errno in _FULL:
        return _CURES[cause.errno]
    # safetensors reports the operating system's refusal only in its message
    if "os error 28" in str(e) or "No space left" in str(e):
        return _CURES[errno.ENOSPC]
    return None


def _concerns(e: OSError, target: Path) -> bool:
    """Whether `e` is about the output, and not about a file that the block only reads."""
    if e.filename is None:
        return True
    path = Path(os.path.abspath(os.fsdecode(e.filename)))
    target = Path(os.path.abspath(target))
    if path == target or path in target.parents:
        return True
    depth = len(target.parent.parts)
    beside = path.parts[:depth] == target.parent.parts
    return beside and path.parts[depth].startswith(f".{target.name}.")


def _remove_leftovers(target: Path) -> None:
    prefix = _partial_prefix(target)
    for leftover in target.parent.iterdir():
        pid = leftover.name.removeprefix(prefix)
        if pid == leftover.name or not pid.isdigit():
            continue
        # Our own id, before we have written anything, was an earlier process's: containers begin
        # to count anew.
        if int(pid) == os.getpid() or not _alive(int(pid)):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _finish(path: Path) -> None:
    """Give a file the permissions that new files have, and flush it to disk."""
    # safetensors makes its files readable by their owner alone
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    _fsync(path)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
