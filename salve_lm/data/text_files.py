"""Records of local text, JSON, JSON-lines and parquet files, read as far as they are asked for."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from salve_lm.errors import BadConfig, CorruptFile, MissingFile

KINDS = (".txt", ".jsonl", ".json", ".parquet")
Record = Mapping[str, Any]
_CHARACTERS = 1 << 20
"""Of a text file, read at once."""


def find_files(given: Sequence[str]) -> list[Path]:
    """The files that paths, folders and patterns stand for.

    Raises:
        MissingFile: nothing there, or an environment variable that is not set.
        BadConfig: a file of a kind that cannot be read.
    """
    found: list[Path] = []
    for text in given:
        expanded = os.path.expanduser(os.path.expandvars(text))
        unset = re.search(r"\$\{?(\w+)", expanded)
        if unset:
            raise MissingFile(f"{text}: the environment variable {unset[1]} is not set. Set it.")
        path = Path(expanded)
        if path.is_dir():
            here = sorted(p for p in path.rglob("*") if p.suffix in KINDS)
        elif path.is_file():
            here = [path]
        else:
            here = [Path(p) for p in sorted(glob.glob(expanded, recursive=True))]
        if not here:
            raise MissingFile(f"No text at {expanded}. Give {', '.join(KINDS)} files.")
        found.extend(here)
    foreign = [p for p in found if p.suffix not in KINDS]
    if foreign:
        raise BadConfig(f"Cannot read {foreign[0]}: give {', '.join(KINDS)} files.")
    return found


def file_records(path: Path) -> Iterator[tuple[str, Record]]:
    """(where it stands, record) of each record in a .jsonl, .json or .parquet file.

    Raises:
        CorruptFile: not what its name says.
    """
    if path.suffix == ".parquet":
        yield from _parquet_records(path)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                where = f"line {number} of {path}"
                yield where, _record(_json(line, path, f"line {number} is"), path, where)
    else:
        records = _json(_read_text(path), path, "it is")
        if not isinstance(records, list):
            raise CorruptFile(
                path,
                "it is no list of records",
                "Write [{...}, {...}], or one record a line as .jsonl.",
            )
        for number, record in enumerate(records):
            where = f"record {number} of {path}"
            yield where, _record(record, path, where)


def _record(value: object, path: Path, where: str) -> Record:
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, dict):
        return value
    raise CorruptFile(path, f"{where} is neither a record nor a text")


def _json(text: str, path: Path, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as e:
        raise CorruptFile(path, f"{what} not valid JSON ({e})", "Is it truncated?") from e


def _parquet_records(path: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    yield f"row {number} of {path}", record
                    number += 1
    except (pa.ArrowException, OSError) as e:
        raise CorruptFile(path, f"it is truncated or no parquet file ({e})") from e


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError:
        _read_text(path)  # says where


def passages(path: Path, separator: str | None) -> Iterator[str]:
    """A text file, or what stands between its separators, as `str.split` has it, read bit by bit.

    Raises:
        CorruptFile: not UTF-8 text.
    """
    if separator is None:
        yield _read_text(path)
        return
    rest = ""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while more := file.read(_CHARACTERS):
                *whole, rest = (rest + more).split(separator)
                yield from whole
    except UnicodeDecodeError:
        _read_text(path)  # says where
    yield rest


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise CorruptFile(
            path, f"it is not UTF-8 text (byte {e.start})", "Convert it, e.g. with iconv."
        ) from e
