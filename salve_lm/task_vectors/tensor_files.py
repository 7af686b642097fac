"""Reading tensors of safetensors files by rows, with plain `pread`.

`safetensors.safe_open` maps files into memory, so that every byte read counts as resident until the
file is closed: 1 GB for a checkpoint of 1 GB. Here memory is what the caller asks for.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salve_lm.errors import CorruptFile, MissingFile, NameNotFound
from salve_lm.task_vectors.safetensors_header import Header, TensorInfo, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


class TensorFiles:
    """The tensors of a model folder, or of one safetensors file, under their names on disk.

    Only headers are read on opening. Reads use no shared position, so that threads may read at the
    same time. Where a folder holds both a single file and an index, the single file counts, as it
    does for transformers.

    Args:
        source: A folder with `model.safetensors`, or with shards and
            `model.safetensors.index.json`; or one `.safetensors` file.

    Raises:
        MissingFile: no such folder, no safetensors weights in it, or shards missing (all listed).
        CorruptFile: a truncated file, a damaged header or index, tensors that overlap, or an index
            that names tensors its shards do not hold.
    """

    def __init__(self, source: str | Path) -> None:
        source = Path(source)
        if source.is_file():
            self.folder, self.index, files = source.parent, None, [source.name]
        else:
            self.folder = source
            self.index, files = _find(source)
        self.headers: dict[str, Header] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self._fds: dict[str, int] = {}
        self._closer = weakref.finalize(self, _close, self._fds)
        try:
            for file in files:
                path = self.folder / file
                try:
                    self._fds[file] = os.open(path, os.O_RDONLY)
                except PermissionError as e:
                    raise CorruptFile(path, "no permission", "Make the file readable.") from e
                self.headers[file] = read_header(path, self._fds[file])
            self._collect()
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in order of file and place in it."""
        return tuple(self._tensors)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the safetensors files, in order."""
        return tuple(self.headers)

    @property
    def total_size(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(info.nbytes for info in self._tensors.values())

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor.

        Raises:
            NameNotFound: there is none of that name.
        """
        if name not in self._tensors:
            raise NameNotFound("tensor", name, self._tensors, f"The weights are {self.folder}.")
        return self._tensors[name]

    def read(self, name: str) -> Tensor:
        """A whole tensor, in the dtype it is stored in; memory of its own."""
        info = self.info(name)
        return self._read(info, info.shape, 0)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` [stop - start, *shape[1:]], in the dtype they are stored in.

        A scalar counts as one row and comes back as a scalar.

        Raises:
            IndexError: rows that the tensor does not have.
            CorruptFile: the file became shorter since it was opened.
        """
        info = self.info(name)
        rows = info.shape[0] if info.shape else 1
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of {name!r}, which has {rows}")
        if not info.shape:
            return self._read(info, (), 0)
        row = math.prod(info.shape[1:]) * info.dtype.itemsize
        return self._read(info, (stop - start, *info.shape[1:]), start * row)

    def read_into(self, file: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes of `file` from `offset` on.

        Raises:
            CorruptFile: the file ends before.
        """
        done = 0
        while done < len(buffer):
            n = os.preadv(self._fds[file], [buffer[done:]], offset + done)
            if n == 0:
                raise CorruptFile(
                    self.folder / file, "it became shorter while it was read", "Fetch it again."
                )
            done += n

    def fileno(self, file: str) -> int:
        """The open file descriptor of one of `files`, for copying ranges of bytes."""
        return self._fds[file]

    def close(self) -> None:
        """Close the files; also done when the object is no longer used."""
        self._closer()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, info: TensorInfo, shape: Sequence[int], skip: int) -> Tensor:
        raw = torch.empty(math.prod(shape) * info.dtype.itemsize, dtype=torch.uint8)
        if raw.numel():
            self.read_into(info.file, raw.numpy().data, info.offset + skip)
        return raw.view(info.dtype).view(tuple(shape))

    def _collect(self) -> None:
        wanted: Mapping[str, str] = {} if self.index is None else self.index["weight_map"]
        for file, header in self.headers.items():
            for name, info in header.tensors.items():
                if name in self._tensors:
                    both = f"{self._tensors[name].file} and {file}"
                    raise CorruptFile(self.folder, f"{name!r} is in {both}", "Fetch both again.")
                self._tensors[name] = info
        held = {name: info.file for name, info in self._tensors.items()}
        absent = sorted(n for n, file in wanted.items() if held.get(n) != file)
        if absent:
            some = ", ".join(f"{n} ({wanted[n]})" for n in absent[:5])
            raise CorruptFile(
                self.folder / INDEX,
                f"it names {len(absent)} tensors that its shards do not hold: {some}",
                "Index and shards are of different models or downloads; fetch both again.",
            )


def _find(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The index, if there is one, and the names of the safetensors files of a model folder."""
    if not folder.is_dir():
        raise MissingFile(f"No folder {folder}. Give a model folder with safetensors weights.")
    if (folder / SINGLE).is_file():
        return None, [SINGLE]
    if not (folder / INDEX).is_file():
        raise MissingFile(_no_weights(folder))
    try:
        index = json.loads((folder / INDEX).read_text())
        weight_map = index["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CorruptFile(
            folder / INDEX, f"not an index of shards ({e!r})", "Fetch it again."
        ) from e
    if not files or not all(isinstance(f, str) and Path(f).name == f for f in files):
        raise CorruptFile(folder / INDEX, "its weight_map names no files in this folder")
    missing = [f for f in files if not (folder / f).is_file()]
    if missing:
        raise MissingFile(
            f"{len(missing)} of {len(files)} shards are missing in {folder}: {', '.join(missing)}. "
            "Fetch them again; the download may have been interrupted."
        )
    return index, files


def _no_weights(folder: Path) -> str:
    present = sorted(p.name for p in folder.iterdir())
    if "adapter_model.safetensors" in present:
        return f"{folder} holds a LoRA adapter, not a model. Give the folder of the base model."
    shards = [n for n in present if n.endswith(".safetensors")]
    if shards:
        return (
            f"No {SINGLE} and no {INDEX} in {folder}, only {', '.join(shards[:5])}. Add the index, "
            "or give the one file by its full path."
        )
    others = [n for n in present if n.endswith(_OTHER_FORMATS)]
    if others:
        return (
            f"No safetensors weights in {folder}, only {', '.join(others[:5])}. Convert them: load "
            "the model with transformers and call save_pretrained on a new folder."
        )
    return f"No {SINGLE} and no {INDEX} in {folder}. Give a model folder with safetensors weights."


def _close(fds: dict[str, int]) -> None:
    while fds:
        os.close(fds.popitem()[1])
