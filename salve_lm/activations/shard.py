"""One shard of an activation store: a safetensors file with `x`, `label` and `sample`.

Single rows are read through a memory map: they come from the page cache and never all at once into
the process (`safetensors.safe_open` slices count as its resident memory). Ranges of rows are read
with `salve_lm.activations.columns`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from salve_lm.errors import CorruptFile

StoreDtype = Literal["float32", "float16", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
_CURE = "Remove the store and harvest it again."


class Rows(NamedTuple):
    """Rows of a store: `x` [n, d_in]; `label` [n] int64, -1 unknown; `sample` [n] int64."""

    x: Tensor
    label: Tensor
    sample: Tensor


class Shard(NamedTuple):
    """A shard that was checked.

    Attributes:
        path: the file.
        mapped: its rows, mapped into memory.
        offsets: tensor -> place of its first byte in the file.
    """

    path: Path
    mapped: Rows
    offsets: dict[str, int]


def write_shard(path: Path, rows: Rows) -> None:
    """Write `rows`; `x` in the dtype it has."""
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in rows._asdict().items()}, path)


def map_shard(path: Path, rows: int, d_in: int, dtype: torch.dtype, size: int) -> Shard:
    """Map a shard into memory, after comparing its header and size with what the index says.

    Args:
        path: the shard.
        rows: how many rows it holds.
        d_in: width of `x`.
        dtype: of `x`.
        size: of the file in bytes.

    Raises:
        CorruptFile: missing, truncated or foreign.
    """
    if not path.is_file():
        raise CorruptFile(path, "the shard is missing", _CURE)
    actual = path.stat().st_size
    if actual != size:
        raise CorruptFile(path, f"it has {actual} bytes, the index says {size}", _CURE)
    header, data_start = _read_header(path)
    expected = {
        "x": (dtype, [rows, d_in]),
        "label": (torch.int64, [rows]),
        "sample": (torch.int64, [rows]),
    }
    # copy-on-write: torch wants writable memory, and nothing written here reaches the file
    mapped = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
    tensors, offsets = {}, {}
    for name, (kind, shape) in expected.items():
        entry = header.get(name)
        if (
            not isinstance(entry, dict)
            or entry.get("dtype") != _SAFETENSORS_NAMES[kind]
            or entry.get("shape") != shape
        ):
            raise CorruptFile(path, f"its tensor {name!r} is not what the index says", _CURE)
        start, stop = (data_start + offset for offset in entry["data_offsets"])
        if stop > size or stop - start != kind.itemsize * int(np.prod(shape)):
            raise CorruptFile(path, f"its tensor {name!r} lies outside of the file", _CURE)
        tensors[name] = mapped[start:stop].view(kind).view(shape)
        offsets[name] = start
    return Shard(path, Rows(**tensors), offsets)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The safetensors header and the position in the file where the data begin."""
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if 8 + length > path.stat().st_size:
            raise CorruptFile(path, "it is not a safetensors file", _CURE)
        try:
            header = json.loads(f.read(length))
        except ValueError as e:
            raise CorruptFile(path, "it is not a safetensors file", _CURE) from e
    if not isinstance(header, dict):
        raise CorruptFile(path, "it is not a safetensors file", _CURE)
    return header, 8 + length
