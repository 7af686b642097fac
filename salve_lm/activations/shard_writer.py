"""Collects rows of one split and writes them in shards of equal size."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from salve_lm.activations.shard import Rows, write_shard
from salve_lm.activations.store import ShardEntry
from salve_lm.errors import OutputUnwritable
from salve_lm.hashing import hash_file


class ShardWriter:
    """Writes `SPLIT-00000.safetensors` and so on as soon as a shard is full.

    Args:
        folder: where to.
        split: the split's name.
        dtype: of the stored activations.
        shard_rows: rows a file.
    """

    def __init__(self, folder: Path, split: str, dtype: torch.dtype, shard_rows: int) -> None:
        self.dtype = dtype
        self._folder, self._split, self._shard_rows = folder, split, shard_rows
        self._waiting: list[Rows] = []
        self._n_waiting = 0
        self._shards: list[ShardEntry] = []

    def check_space(self, rows: int, d_in: int) -> None:
        """Fail before the work where the disk cannot hold the split."""
        need = rows * (d_in * self.dtype.itemsize + 16)
        free = shutil.disk_usage(self._folder).free
        if need > free:
            raise OutputUnwritable(
                f"Split {self._split!r} needs {need / 1e9:.3g} GB at {self._folder.parent}, where "
                f"{free / 1e9:.3g} GB are free. Free some space, choose another folder, or store "
                "as bfloat16."
            )

    def add(self, x: Tensor, label: Tensor, sample: Tensor) -> None:
        """Take in rows; `x` [n, d_in] in the dtype to be stored, on the CPU."""
        self._waiting.append(Rows(x, label, sample))
        self._n_waiting += len(x)
        while self._n_waiting >= self._shard_rows:
            self._write(self._shard_rows)

    def finish(self) -> list[ShardEntry]:
        """Write what is left and list what was written."""
        if self._n_waiting:
            self._write(self._n_waiting)
        return self._shards

    def _write(self, n: int) -> None:
        whole = Rows(*(torch.cat(parts) for parts in zip(*self._waiting, strict=True)))
        name = f"{self._split}-{len(self._shards):05d}.safetensors"
        path = self._folder / name
        write_shard(path, Rows(*(t[:n] for t in whole)))
        self._shards.append(
            {"file": name, "rows": n, "bytes": path.stat().st_size, "sha256": hash_file(path)}
        )
        # a copy, or the few rows left would keep the whole shard in memory
        self._waiting = [Rows(*(t[n:].clone() for t in whole))]
        self._n_waiting -= n
