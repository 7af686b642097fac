"""The header of a safetensors file: what it holds, and where.

A file is 8 bytes of length (little-endian), that many bytes of JSON, then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from salve_lm.errors import CorruptFile

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# safetensors itself refuses longer ones
_LONGEST = 100_000_000
_AGAIN = "Fetch or write it again."


class TensorInfo(NamedTuple):
    """One tensor on disk.

    Attributes:
        dtype: as stored.
        shape: as stored.
        file: name of the file in its folder.
        offset: of its first byte, from the beginning of the file.
        nbytes: its length.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What one file holds.

    Attributes:
        raw: the bytes before the first tensor, length included.
        metadata: free text by key, such as `format: pt`.
        tensors: in order of their place.
        size: of the whole file in bytes.
    """

    raw: bytes
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    size: int


def read_header(path: Path, fd: int) -> Header:
    """The header of the file at `path`, open as `fd`, checked against the file's size.

    Raises:
        CorruptFile: truncated, not a safetensors file, or tensors that overlap or leave gaps.
    """
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > _LONGEST:
        raise CorruptFile(path, f"not a safetensors file ({size} bytes)", _AGAIN)
    if 8 + length > size:
        raise CorruptFile(
            path, f"truncated: {size} bytes, the header alone needs {8 + length}", _AGAIN
        )
    raw = os.pread(fd, 8 + length, 0)
    try:
        entries = json.loads(raw[8:])
        metadata = entries.pop("__metadata__", None) or {}
        found = [_info(path, name, entry, 8 + length) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CorruptFile(path, f"its header is damaged ({e!r})", _AGAIN) from e
    found.sort(key=lambda pair: (pair[1].offset, pair[1].nbytes))
    end = 8 + length
    for name, info in found:
        if info.offset != end:
            what = "overlaps the one before it" if info.offset < end else "leaves a gap before it"
            raise CorruptFile(path, f"its header is damaged: tensor {name!r} {what}", _AGAIN)
        end += info.nbytes
    if end > size:
        raise CorruptFile(path, f"truncated: {size} bytes of {end}", _AGAIN)
    if end < size:
        raise CorruptFile(path, f"{size - end} bytes follow its last tensor", _AGAIN)
    return Header(raw, metadata, dict(found), size)


def layout(
    file: str, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> Header:
    """A new header for tensors of these dtypes and shapes, in this order except for alignment.

    Readers view a tensor's bytes in its dtype, so that wider dtypes have to come first.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    order = sorted(tensors, key=lambda n: -tensors[n][0].itemsize)
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        nbytes = math.prod(shape) * dtype.itemsize
        offsets = [end, end + nbytes]
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": offsets}
        end += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    infos = {}
    for name in order:
        dtype, shape = tensors[name]
        begin, stop = entries[name]["data_offsets"]
        infos[name] = TensorInfo(dtype, tuple(shape), file, len(raw) + begin, stop - begin)
    return Header(raw, metadata, infos, len(raw) + end)


def _info(path: Path, name: str, entry: Any, start: int) -> tuple[str, TensorInfo]:
    if entry["dtype"] not in DTYPES:
        raise CorruptFile(path, f"{name!r} has the unknown dtype {entry['dtype']!r}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"bad shape or offsets of {name!r}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has {end - begin} bytes, not what its shape needs")
    return name, TensorInfo(dtype, shape, path.name, start + begin, end - begin)
