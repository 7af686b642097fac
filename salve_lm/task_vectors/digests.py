"""What identifies the weights of a folder: hashes that streaming computes on its way.

The SHA-256 of a whole file can only be computed from its beginning to its end. That of every tensor
needs each byte once, whatever the order, and an edit that leaves a tensor alone need not read it a
second time for the result. With the SHA-256 of each file's header, which says where every tensor
lies, they fix the files byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from salve_lm.hashing import hash_plain
from salve_lm.task_vectors.safetensors_header import CODES, Header


def weights_digest(headers: Mapping[str, Header], sha256: Mapping[str, str]) -> str:
    """SHA-256 (hex) over name, dtype, shape and SHA-256 of each tensor, in order of name.

    Independent of how the tensors are spread over files.

    Args:
        headers: of all files, by file name.
        sha256: of each tensor's bytes, by its name on disk.
    """
    rows = [
        [name, CODES[info.dtype], list(info.shape), sha256[name]]
        for header in headers.values()
        for name, info in header.tensors.items()
    ]
    return hash_plain(sorted(rows))


def file_entries(headers: Mapping[str, Header]) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of the header of each file, as plain data."""
    return [
        {"name": name, "bytes": h.size, "header": hashlib.sha256(h.raw).hexdigest()}
        for name, h in headers.items()
    ]
