"""Documents from local text, JSON, JSON-lines and parquet files, or from a public data set."""

from __future__ import annotations

import glob
import json
import os
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from salve_lm.data.corpus import Corpus, Document
from salve_lm.errors import BadConfig, CorruptFile, MissingFile, NameNotFound

KINDS = (".txt", ".jsonl", ".json", ".parquet")
MESSAGES = "messages"
Record = Mapping[str, Any]


class TextCorpus(Corpus):
    """Documents made from the records of files or of a data set.

    A record of a .jsonl, .json (a list of records) or .parquet file has named fields; a text file
    gives records with the one field `text`.

    Args:
        files: Files, folders or patterns such as `data/*.jsonl`; environment variables in them are
            filled in. Read in this order; a pattern's or folder's files sorted by name.
        dataset: In place of files, a data set that `datasets.load_dataset` knows by name.
        subset: Configuration of the data set, where it has several.
        split: Its split.
        text: The document, with record fields in braces.
        prompt: What comes before it, in the same way: `Problem: {problem}`. Training with
            `completion_only` does not learn the prompt.
        group: The class of a document, in the same way: `{subject}`. Losses are given per group.
        separator: Cuts text files into documents: `<|endoftext|>`, or two line ends for
            paragraphs. Without it a text file is one document.
        collapse_spaces: Replace runs of spaces by one.
        chat_template: Write documents out by the tokenizer's chat template: the record's own
            `messages`, or else `prompt` (as the user's) and `text` (as the assistant's message).
        start: Documents to leave out at the beginning.
        limit: Documents to read at most.

    Raises:
        BadConfig: neither or both of files and dataset, or options out of range.
    """

    def __init__(
        self,
        files: list[str] | None = None,
        dataset: str | None = None,
        subset: str | None = None,
        split: str = "train",
        text: str = "{text}",
        prompt: str | None = None,
        group: str | None = None,
        separator: str | None = None,
        collapse_spaces: bool = False,
        chat_template: bool = False,
        start: int = 0,
        limit: int | None = None,
    ) -> None:
        if bool(files) == bool(dataset):
            raise BadConfig("A TextCorpus takes either `files` or the name of a `dataset`.")
        if start < 0 or (limit is not None and limit < 1):
            raise BadConfig("start must be at least 0 and limit at least 1.")
        if separator == "":
            raise BadConfig("separator must not be empty; leave it out for whole files.")
        self.files, self.dataset, self.subset, self.split = files, dataset, subset, split
        self.text, self.prompt, self.group = text, prompt, group
        self.separator, self.collapse_spaces = separator, collapse_spaces
        self.chat_template, self.start, self.limit = chat_template, start, limit

    def documents(self) -> Sequence[Document]:
        """All documents; records whose text is blank are left out.

        Raises:
            MissingFile: no such file, or no data set of that name within reach.
            CorruptFile: a file that is not what its name says; names the line.
            NameNotFound: a field that a record does not have; names the nearest.
            BadConfig: no document is left.
        """
        found: list[Document] = []
        passed = 0
        for where, record in self._records():
            document = self._document(where, record)
            if document is None:
                continue
            passed += 1
            if passed <= self.start:
                continue
            found.append(document)
            if len(found) == self.limit:
                break
        if not found:
            cut = f", of which start={self.start} leaves none" if passed else ""
            raise BadConfig(
                f"No documents: {self._named()} hold {passed}{cut}. Check the files, and that "
                f"text={self.text!r} is not blank for every record."
            )
        return found

    def _named(self) -> str:
        return ", ".join(self.files) if self.files else f"data set {self.dataset}"

    def _records(self) -> Iterator[tuple[str, Record]]:
        if self.dataset is not None:
            yield from _dataset_records(self.dataset, self.subset, self.split)
            return
        for path in find_files(self.files or []):
            if path.suffix == ".txt":
                yield from self._passages(path)
            else:
                yield from file_records(path)

    def _passages(self, path: Path) -> Iterator[tuple[str, Record]]:
        text = _read_text(path)
        parts = [text] if self.separator is None else text.split(self.separator)
        for i, part in enumerate(parts):
            yield f"document {i} of {path}", {"text": part.strip()}

    def _document(self, where: str, record: Record) -> Document | None:
        group = None if self.group is None else fill(self.group, record, where)
        if self.chat_template and MESSAGES in record:
            return Document("", group=group, messages=self._messages(record[MESSAGES], where))
        text = self._tidy(fill(self.text, record, where))
        prompt = "" if self.prompt is None else self._tidy(fill(self.prompt, record, where))
        if not text.strip():
            return None
        if not self.chat_template:
            return Document(text, prompt, group)
        asked = [{"role": "user", "content": prompt}] if prompt else []
        role = "assistant" if prompt else "user"
        return Document("", group=group, messages=(*asked, {"role": role, "content": text}))

    def _messages(self, given: object, where: str) -> tuple[dict[str, str], ...]:
        wanted = {"role", "content"}
        if (
            not isinstance(given, list)
            or not given
            or not all(isinstance(m, Mapping) and wanted <= m.keys() for m in given)
        ):
            raise BadConfig(
                f"`{MESSAGES}` in {where} is no list of messages with `role` and `content`. Mend "
                "the record, or set chat_template: false."
            )
        return tuple(
            {"role": str(m["role"]), "content": self._tidy(str(m["content"]))} for m in given
        )

    def _tidy(self, text: str) -> str:
        return re.sub(" {2,}", " ", text) if self.collapse_spaces else text


def fill(template: str, record: Record, where: str) -> str:
    """`template` with the fields of `record` in the place of `{field}`.

    Raises:
        NameNotFound: a field that the record does not have.
        BadConfig: a template that is none (unpaired braces), or a field without a value.
    """
    try:
        fields = [f for _, f, _, _ in string.Formatter().parse(template) if f is not None]
    except ValueError as e:
        raise BadConfig(
            f"{template!r} is no template ({e}). Write {{field}}, and {{{{ for a brace."
        ) from e
    for field in fields:
        if field not in record:
            raise NameNotFound("field", field, record, f"(In {where}, for {template!r}.)")
        if record[field] is None:
            raise BadConfig(
                f"Field {field!r} has no value in {where}. Leave that record out, or choose "
                "another field."
            )
    return template.format_map({f: record[f] for f in fields})


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
        for number, line in enumerate(_read_text(path).split("\n"), start=1):
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


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise CorruptFile(
            path, f"it is not UTF-8 text (byte {e.start})", "Convert it, e.g. with iconv."
        ) from e


def _dataset_records(name: str, subset: str | None, split: str) -> Iterator[tuple[str, Record]]:
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise BadConfig("Data sets by name need the package datasets: pip install datasets.") from e
    try:
        rows = load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError) as e:
        raise MissingFile(
            f"Cannot load split {split!r} of data set {name!r}: {e}. Check name, subset and split, "
            "and the network; or download it and give its `files`."
        ) from e
    for number, record in enumerate(rows):
        yield f"row {number} of {name}", record
