"""Ranges: of bytes in files, and of successive numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from salve_lm.errors import CorruptFile


def read_range(path: Path, offset: int, target: memoryview) -> None:
    """Fill `target` with the bytes of the file from `offset` on.

    Plain reads, where a memory map would be faulted in page by page: the kernel serves them in
    large requests, without Python's lock held and without a copy in between. The file is opened for
    each: a store may have more files than a process may hold open.

    Raises:
        CorruptFile: the file ends before.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        while target:
            n = os.preadv(fd, [target], offset)
            if n == 0:
                raise CorruptFile(path, "it became shorter while it was read", "Make it again.")
            target, offset = target[n:], offset + n
    finally:
        os.close(fd)


def will_need(path: Path, offset: int, size: int) -> None:
    """Ask the kernel to begin reading these bytes, where it can be asked."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        advise(fd, offset, size, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)


def runs(numbers: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """First and last of each stretch of successive numbers in `numbers` [n], as long as one is."""
    if not len(numbers):
        return
    borders = np.flatnonzero(np.diff(numbers) != 1)
    firsts = numbers[np.append(0, borders + 1)]
    lasts = numbers[np.append(borders, len(numbers) - 1)]
    yield from zip(firsts.tolist(), lasts.tolist(), strict=True)
