"""Real processes that die, and real disks that fill up."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


def die() -> None:
    """End this process at once, as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_killed(work: Callable[[], object]) -> None:
    """Run `work` in a process of its own and check that SIGKILL ended it."""

    def with_one_thread() -> None:
        torch.set_num_threads(1)  # the OpenMP threads of the parent are not in the fork
        work()

    process = multiprocessing.get_context("fork").Process(target=with_one_thread)
    process.start()
    process.join()  # a timeout would wait for its worker processes too
    assert process.exitcode == -signal.SIGKILL


@contextlib.contextmanager
def small_disk(mount_point: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own at `mount_point`; skips the test where none can be mounted."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    mount_point.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(mount_point)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine refuses to mount a small disk")
    try:
        yield mount_point
    finally:
        # lazily: a memory map of a file on it may still be open
        subprocess.run(["umount", "--lazy", str(mount_point)], check=True)
