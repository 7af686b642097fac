"""Documents from files: what is read, in which order, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from salve_lm.data.corpus import Document
from salve_lm.data.text import TextCorpus
from salve_lm.errors import BadConfig, CorruptFile, MissingFile, NameNotFound

RECORDS: list[dict[str, Any]] = [
    {"problem": "1+1?", "solution": "2  {is}", "type": "Algebra"},
    {"problem": "2+2?", "solution": "4", "type": "Geometry"},
    {"problem": "3+3?", "solution": "6", "type": "Algebra"},
]
TEMPLATES = {"text": " {solution}", "prompt": "Q: {problem}", "group": "{type}"}


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_records(folder: Path, kind: str) -> str:
    if kind == "json":
        return write(folder, "a.json", json.dumps(RECORDS))
    if kind == "jsonl":
        return write(folder, "a.jsonl", "\n".join(map(json.dumps, RECORDS)) + "\n\n")
    pq.write_table(pa.Table.from_pylist(RECORDS), folder / "a.parquet")
    return str(folder / "a.parquet")


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_records(kind: str, tmp_path: Path) -> None:
    corpus = TextCorpus([write_records(tmp_path, kind)], **TEMPLATES)
    assert corpus.documents() == [
        Document(" 2  {is}", "Q: 1+1?", "Algebra"),
        Document(" 4", "Q: 2+2?", "Geometry"),
        Document(" 6", "Q: 3+3?", "Algebra"),
    ]
    assert corpus.fingerprint() == TextCorpus([str(tmp_path)], **TEMPLATES).fingerprint()
    assert corpus.fingerprint() != TextCorpus([str(tmp_path)], text="{problem}").fingerprint()


def test_start_and_limit_count_documents(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one|two| |three|four")
    texts = [d.text for d in TextCorpus([path], separator="|", start=1, limit=2).documents()]
    assert texts == ["two", "three"]
    with pytest.raises(BadConfig, match=r"hold 4, of which start=4 leaves none"):
        TextCorpus([path], separator="|", start=4).documents()


def test_text_files(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\ufeffa  b\n\nc   d\r\n\n\n\n")
    assert [d.text for d in TextCorpus([path]).documents()] == ["a  b\n\nc   d"]
    collapsed = TextCorpus([path], separator="\n\n", collapse_spaces=True)
    assert [d.text for d in collapsed.documents()] == ["a b", "c d"]


def test_files_in_a_fixed_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.txt", "b/c/x.jsonl"):
        write(tmp_path, name, json.dumps(name))
    write(tmp_path, "b/SOURCE.md", "not text")
    monkeypatch.setenv("TEXTS", str(tmp_path))
    texts = [d.text.strip('"') for d in TextCorpus(["$TEXTS/b", "$TEXTS/*.txt"]).documents()]
    assert texts == ["b/10.txt", "b/2.txt", "b/c/x.jsonl", "a.txt"]


def test_chat(tmp_path: Path) -> None:
    corpus = TextCorpus([write_records(tmp_path, "json")], chat_template=True, **TEMPLATES)
    assert corpus.documents()[1].messages == (
        {"role": "user", "content": "Q: 2+2?"},
        {"role": "assistant", "content": " 4"},
    )
    talk = [{"role": "user", "content": "hi  there"}]
    path = write(tmp_path, "c.jsonl", json.dumps({"messages": talk}))
    (document,) = TextCorpus([path], chat_template=True, collapse_spaces=True).documents()
    assert document.messages == ({"role": "user", "content": "hi there"},)
    path = write(tmp_path, "d.jsonl", json.dumps({"messages": [{"role": "user"}]}))
    with pytest.raises(BadConfig, match=r"line 1 of .*d.jsonl is no list of messages"):
        TextCorpus([path], chat_template=True).documents()


def test_a_missing_field_names_the_nearest(tmp_path: Path) -> None:
    path = write_records(tmp_path, "jsonl")
    with pytest.raises(NameNotFound, match=r"field named 'solutoin'.*'solution'.*line 1 of"):
        TextCorpus([path], text="{solutoin}").documents()
    with pytest.raises(NameNotFound, match=r"field named 'x'.*Known: problem, solution, type"):
        TextCorpus([path], group="{x}").documents()


def test_bad_records(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": null}\n')
    with pytest.raises(BadConfig, match=r"'text' has no value in line 2 of"):
        TextCorpus([path]).documents()
    path = write(tmp_path, "b.jsonl", '{"text": "a"}\n{"text": "b')
    with pytest.raises(CorruptFile, match=r"line 2 is not valid JSON .*truncated"):
        TextCorpus([path]).documents()
    path = write(tmp_path, "c.jsonl", "17\n")
    with pytest.raises(CorruptFile, match=r"line 1 of .* is neither a record nor a text"):
        TextCorpus([path]).documents()
    path = write(tmp_path, "d.json", '{"train": []}')
    with pytest.raises(CorruptFile, match=r"no list of records.*\.jsonl"):
        TextCorpus([path]).documents()
    write(tmp_path, "e.parquet", "PAR1")
    with pytest.raises(CorruptFile, match="truncated or no parquet file"):
        TextCorpus([str(tmp_path / "e.parquet")]).documents()
    (tmp_path / "f.txt").write_bytes(b"abc\xff")
    with pytest.raises(CorruptFile, match=r"not UTF-8 text \(byte 3\)"):
        TextCorpus([str(tmp_path / "f.txt")]).documents()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"No text at .*nowhere"):
        TextCorpus([str(tmp_path / "nowhere*.txt")]).documents()
    with pytest.raises(MissingFile, match="environment variable NO_SUCH_THING is not set"):
        TextCorpus(["${NO_SUCH_THING}/a.txt"]).documents()
    with pytest.raises(BadConfig, match=r"Cannot read .*a.csv: give \.txt"):
        TextCorpus([write(tmp_path, "a.csv", "a")]).documents()
    with pytest.raises(BadConfig, match=r"No documents: .*hold 0"):
        TextCorpus([write(tmp_path, "a.txt", "  \n ")]).documents()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either `files` or the name of a `dataset`"),
        ({"files": ["a"], "dataset": "b"}, "either `files` or the name of a `dataset`"),
        ({"files": ["a"], "limit": 0}, "limit at least 1"),
        ({"files": ["a"], "separator": ""}, "separator must not be empty"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        TextCorpus(**options)


def test_a_broken_template(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"'\{text' is no template .*\{field\}, and \{\{ for"):
        TextCorpus([write(tmp_path, "a.txt", "a")], text="{text").documents()


def test_data_sets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, subset: str | None, split: str) -> list[dict[str, str]]:
        if (name, subset, split) != ("wikitext", "small", "test"):
            raise ValueError("Unknown split")
        return [{"text": "a"}, {"text": ""}, {"text": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    corpus = TextCorpus(dataset="wikitext", subset="small", split="test")
    assert [d.text for d in corpus.documents()] == ["a", "b"]
    with pytest.raises(MissingFile, match=r"split 'train' of data set 'wikitext'.*its `files`"):
        TextCorpus(dataset="wikitext").documents()
