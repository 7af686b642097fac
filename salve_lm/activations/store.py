"""Activations on disk: a folder of safetensors shards and `index.json`.

The format is described in `docs/formats/activation-store.md`. A store is immutable and appears
whole (`salve_lm.activations.harvest` writes it); this module reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from salve_lm.activations.columns import Column, Piece
from salve_lm.activations.key import StoreKey
from salve_lm.activations.shard import DTYPES, Rows, Shard, map_shard
from salve_lm.errors import BadConfig, CorruptFile, MissingStore
from salve_lm.hashing import hash_file

FORMAT = "salve-activation-store"
VERSION = 1
INDEX = "index.json"


class ShardEntry(TypedDict):
    """One shard in the index: file name, rows, size in bytes, SHA-256 of the file."""

    file: str
    rows: int
    bytes: int
    sha256: str


class SplitEntry(TypedDict):
    """One split in the index."""

    samples: int
    rows: int
    shards: list[ShardEntry]


class Index(TypedDict):
    """The content of `index.json`."""

    format: str
    version: int
    key: StoreKey
    class_names: list[str]
    d_in: int
    dtype: str
    splits: dict[str, SplitEntry]
    versions: NotRequired[dict[str, str]]


class ActivationStore:
    """Reads a store: single rows through memory maps, ranges of rows with large reads.

    Attributes:
        path: the folder.
        key: what it was made from (`StoreKey`: backbone, site, data, dtype).
        class_names: names of the classes that labels count.
        d_in: width of a row.
        dtype: in which activations are stored.
        splits: names of the splits it holds.

    Raises:
        MissingStore: there is no folder `path`.
        CorruptFile: the folder is not a store, or a file of it is missing, truncated or foreign.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = _read_index(self.path)
        self.key: StoreKey = index["key"]
        self.class_names: list[str] = index["class_names"]
        self.d_in: int = index["d_in"]
        self.splits: tuple[str, ...] = tuple(index["splits"])
        self._index = index
        self.dtype = DTYPES[index["dtype"]]
        self._shards: dict[str, list[Shard]] = {
            split: [
                map_shard(self.path / s["file"], s["rows"], self.d_in, self.dtype, s["bytes"])
                for s in entry["shards"]
            ]
            for split, entry in index["splits"].items()
        }
        # row at which each shard begins, and at the end the number of rows
        self._starts: dict[str, Tensor] = {
            split: torch.tensor([0, *(len(s.mapped.label) for s in shards)]).cumsum(0)
            for split, shards in self._shards.items()
        }

    def rows(self, split: str) -> int:
        """Number of rows in `split`."""
        return int(self._starts[self._known(split)][-1])

    def samples(self, split: str) -> int:
        """Number of samples in `split`: as many as rows, but where a site reduces by positions."""
        return self._index["splits"][self._known(split)]["samples"]

    def gather(self, split: str, rows: Tensor) -> Rows:
        """Copy `rows` (int64 [n], any order, repeats allowed) of `split` out of the map.

        Returns:
            `x` [n, d_in] float32 whatever is stored, `label` [n], `sample` [n]. The three are the
            caller's own.

        Raises:
            IndexError: a row below 0 or not below `self.rows(split)`.
        """
        shards, starts = self._shards[self._known(split)], self._starts[split]
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= int(starts[-1])):
            raise IndexError(f"Rows of split {split!r} run from 0 to {int(starts[-1]) - 1}.")
        if len(shards) == 1:
            x, label, sample = (t.index_select(0, rows) for t in shards[0].mapped)
            return Rows(x.float(), label, sample)
        gathered = Rows(
            torch.empty(len(rows), self.d_in),
            torch.empty(len(rows), dtype=torch.int64),
            torch.empty(len(rows), dtype=torch.int64),
        )
        shard_of = torch.bucketize(rows, starts[1:], right=True)
        for i in shard_of.unique().tolist():
            place = (shard_of == i).nonzero().squeeze(1)
            local = rows[place] - starts[i]
            for whole, part in zip(gathered, shards[i].mapped, strict=True):
                whole[place] = part.index_select(0, local).to(whole.dtype)
        return gathered

    def column(self, split: str, name: str) -> Column:
        """`x`, `label` or `sample` of `split`, to be read by ranges of rows."""
        shards = self._shards[self._known(split)]
        pieces = [Piece(s.path, s.offsets[name], len(s.mapped.label)) for s in shards]
        if name == "x":
            return Column(pieces, (self.d_in,), self.dtype)
        return Column(pieces, (), torch.int64)

    def verify(self) -> None:
        """Read every shard and compare its SHA-256 with the index (opening checks sizes only).

        Raises:
            CorruptFile: a shard was changed after it was written.
        """
        for entry in self._index["splits"].values():
            for shard in entry["shards"]:
                if hash_file(self.path / shard["file"]) != shard["sha256"]:
                    raise CorruptFile(
                        self.path / shard["file"],
                        "its content changed after it was written",
                        "Remove the store and harvest it again.",
                    )

    def _known(self, split: str) -> str:
        if split not in self._index["splits"]:
            raise BadConfig(
                f"The activation store {self.path} has the splits {', '.join(self.splits)}, not "
                f"{split!r}. Harvest a new one with {split!r} among its `splits`."
            )
        return split


def write_index(folder: Path, index: Index) -> None:
    """Write `index.json`; the last file of a store, so that a folder without it is no store."""
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _read_index(path: Path) -> Index:
    if not path.exists():
        raise MissingStore(
            f"No activation store at {path}. Give `model` and `source` beside `store` and it is "
            "harvested there; or check the path."
        )
    file = path / INDEX
    if not file.is_file():
        raise CorruptFile(
            path, f"it is not an activation store (it has no {INDEX})", "Check the path."
        )
    try:
        raw: Any = json.loads(file.read_text())
        if raw["format"] != FORMAT:
            raise CorruptFile(file, f"its format is {raw['format']!r}, not {FORMAT!r}")
        if raw["version"] != VERSION:
            raise CorruptFile(
                file,
                f"it has version {raw['version']} of the format, this package reads {VERSION}",
                "Update this package, or harvest the store again.",
            )
        index: Index = raw
        if index["dtype"] not in DTYPES:
            raise CorruptFile(file, f"it names an unknown dtype {index['dtype']!r}")
        for entry in index["splits"].values():
            if entry["rows"] != sum(s["rows"] for s in entry["shards"]):
                raise CorruptFile(file, "the rows of its shards do not add up")
        for name in ("key", "class_names", "d_in"):
            raw[name]
    except (ValueError, KeyError, TypeError) as e:
        if isinstance(e, CorruptFile):
            raise
        raise CorruptFile(
            file, f"it is damaged ({e!r})", "Remove the store and harvest it again."
        ) from e
    return index
