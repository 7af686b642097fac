"""Bytes from one file to another inside the kernel, where it can do that."""

from __future__ import annotations

import errno
import os

# so long a piece goes to the disk, and is hashed, while the next one is copied
PIECE = 1 << 25
_UNABLE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}


class RangeCopier:
    """Copies byte ranges between two open files, by `copy_file_range` as long as that works.

    The kernel may refuse it (other file systems, old kernels, other operating systems); then bytes
    go through `buffer`.

    Args:
        source: file descriptor to read.
        target: file descriptor to write.
        buffer: working memory.
    """

    def __init__(self, source: int, target: int, buffer: memoryview) -> None:
        self._source, self._target, self._buffer = source, target, buffer
        self._in_kernel = hasattr(os, "copy_file_range")

    def copy(self, start: int, to: int, n: int) -> None:
        """Copy `n` bytes from `start` of the source to `to` of the target.

        Raises:
            EOFError: the source ends before.
            OSError: whatever the operating system says, such as a full disk.
        """
        done = 0
        while done < n:
            k = self._once(start + done, to + done, n - done)
            if k == 0:
                raise EOFError
            done += k

    def _once(self, start: int, to: int, n: int) -> int:
        if self._in_kernel:
            try:
                k = os.copy_file_range(self._source, self._target, n, start, to)
            except OSError as e:
                if e.errno not in _UNABLE:
                    raise
                k = 0
            if k:
                return k
            self._in_kernel = False  # some file systems answer 0 instead of an error
        k = os.preadv(self._source, [self._buffer[:n]], start)
        write_all(self._target, self._buffer[:k], to)
        return k


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def start_writeback(fd: int, offset: int, n: int) -> None:
    """Ask the kernel to begin to write a range to disk now, instead of all of it at the end."""
    if hasattr(os, "posix_fadvise"):
        # what is not on disk yet is sent there, and only what already is leaves the cache
        os.posix_fadvise(fd, offset, n, os.POSIX_FADV_DONTNEED)


def expect_reading(fd: int, offset: int, n: int) -> None:
    """Ask the kernel to begin to read a range from disk now."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, n, os.POSIX_FADV_WILLNEED)
