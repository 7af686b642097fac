"""The text that this Python brings, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from salve_lm.data.pydoc_topics import PydocTopics, collapsed
from salve_lm.data.text import TextCorpus
from salve_lm.errors import BadConfig


def test_chapters_are_read_in_order() -> None:
    from pydoc_data.topics import topics

    found = PydocTopics().documents()
    assert [d.group for d in found] == sorted(topics)
    for document, name in zip(found, sorted(topics), strict=True):
        assert document.text.split() == topics[name].split()
    assert PydocTopics(limit=3).documents() == found[:3]


def test_blanks_and_empty_lines_collapse() -> None:
    assert collapsed(" a  b\n\n\n   c\n  d ") == "a b\n\nc\n d"


def test_the_file_reads_back_as_the_same_text(tmp_path: Path) -> None:
    topics = PydocTopics(limit=4)
    path = topics.write(tmp_path / "topics.jsonl")
    read = TextCorpus(files=[str(path)], group="{topic}").documents()
    assert read == topics.documents()


def test_another_versions_text_is_refused() -> None:
    right = PydocTopics(limit=2).fingerprint()
    assert len(PydocTopics(limit=2, sha256=right).documents()) == 2
    with pytest.raises(BadConfig, match="other pydoc topics"):
        PydocTopics(limit=2, sha256="0" * 64).documents()
    with pytest.raises(BadConfig, match="at least 1 chapter"):
        PydocTopics(limit=0)
