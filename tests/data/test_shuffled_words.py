"""A reference that matches the task on the surface: the same words in another order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from salve_lm.data.arithmetic import ArithmeticText
from salve_lm.data.shuffled_words import ShuffledWords
from salve_lm.data.text import TextCorpus
from salve_lm.errors import BadConfig


def test_every_document_keeps_its_words_and_loses_their_order() -> None:
    plain = ArithmeticText(limit=50)
    found = ShuffledWords(plain).documents()
    pairs = list(zip(plain.documents(), found, strict=True))
    for before, after in pairs:
        assert sorted(f"{before.prompt} {before.text}".split()) == sorted(after.text.split())
        assert after.group == before.group and not after.prompt
    moved = [f"{b.prompt} {b.text}".split() != a.text.split() for b, a in pairs]
    assert sum(moved) > 40


def test_the_order_is_that_of_the_seed() -> None:
    corpus = ArithmeticText(limit=20)
    first = ShuffledWords(corpus, seed=1)
    assert first.fingerprint() == ShuffledWords(ArithmeticText(limit=20), seed=1).fingerprint()
    assert first.fingerprint() != ShuffledWords(corpus, seed=2).fingerprint()


def test_conversations_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"text": "four", "question": "2 + 2"}) + "\n")
    chat = TextCorpus(files=[str(file)], prompt="{question}", chat_template=True)
    with pytest.raises(BadConfig, match="chat_template: false"):
        ShuffledWords(chat).documents()
