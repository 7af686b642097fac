"""Documents from local text, JSON, JSON-lines and parquet files, or from a public data set."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from salve_lm.data.corpus import Corpus, Document
from salve_lm.data.text_files import Record, file_records, find_files, passages
from salve_lm.errors import BadConfig, MissingFile, NameNotFound

MESSAGES = "messages"


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
        """All documents; raises what `stream` raises."""
        return list(self.stream())

    def stream(self) -> Iterator[Document]:
        """One document after the other; records whose text is blank are left out.

        In memory are one record of .jsonl or .parquet files, one document of a .txt file, and the
        whole of a .json file.

        Raises:
            MissingFile: no such file, or no data set of that name within reach.
            CorruptFile: a file that is not what its name says; names the line.
            NameNotFound: a field that a record does not have; names the nearest.
            BadConfig: no document is left.
        """
        found = passed = 0
        for where, record in self._records():
            document = self._document(where, record)
            if document is None:
                continue
            passed += 1
            if passed <= self.start:
                continue
            found += 1
            yield document
            if found == self.limit:
                break
        if not found:
            cut = f", of which start={self.start} leaves none" if passed else ""
            raise BadConfig(
                f"No documents: {self._named()} hold {passed}{cut}. Check the files, and that "
                f"text={self.text!r} is not blank for every record."
            )

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
        for i, part in enumerate(passages(path, self.separator)):
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
