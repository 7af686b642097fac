"""SHA-256 of files and of named tensors, equal on every machine and rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor


def hash_file(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and raw bytes, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name}|{t.dtype}|{tuple(t.shape)}|".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_plain(value: object) -> str:
    """SHA-256 (hex) of plain data (dicts, lists, strings, numbers), independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_listed(values: Iterable[object]) -> str:
    """`hash_plain` of the list of these values, which are never all in memory."""
    digest = hashlib.sha256(b"[")
    for i, value in enumerate(values):
        text = json.dumps(value, sort_keys=True)
        digest.update((f", {text}" if i else text).encode())
    digest.update(b"]")
    return digest.hexdigest()
