"""Packed text on disk is the packed text, and memory does not hold the corpus."""

from __future__ import annotations

import gc
import json
import random
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salve_lm.activations.tokens_data import TokenActivationData
from salve_lm.data import encoding, packing, text_files
from salve_lm.data.corpus import Corpus, Document
from salve_lm.data.packing import Packing
from salve_lm.data.stored_tokens import StoredTokens, check_text, write_tokens
from salve_lm.data.text import TextCorpus
from salve_lm.data.tokens import PackedTokens
from salve_lm.errors import CorruptFile, OutputExists, StaleStore
from salve_lm.hashing import hash_listed, hash_plain
from tests.activations.tiny_language import TinyCorpus, TinyLanguage, make_tokenizer


class Alive(str):
    """A text that knows how many of its kind there are."""

    now = most = 0

    def __new__(cls, text: str) -> Alive:
        cls.now += 1
        cls.most = max(cls.most, cls.now)
        return super().__new__(cls, text)

    def __del__(self) -> None:
        type(self).now -= 1


class Streamed(Corpus):
    """Documents that come one by one."""

    def __init__(self, n: int) -> None:
        self.n = n

    def documents(self) -> Sequence[Document]:
        """All of them."""
        return list(self.stream())

    def stream(self) -> Iterator[Document]:
        """One by one."""
        draw = random.Random(0)
        for _ in range(self.n):
            yield Document(Alive(" ".join(f"w{draw.randrange(600)}" for _ in range(20))))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_DOCUMENTS", 16)
    monkeypatch.setattr(packing, "_ROWS", 8)


@pytest.mark.parametrize("kind", ["cut", "whole", "none"])
def test_the_same_rows_as_in_memory(tmp_path: Path, kind: Packing, small_blocks: None) -> None:
    corpora, tokenizer = [TinyCorpus(), TinyCorpus(9, seed=1)], make_tokenizer()
    documents = [d for c in corpora for d in c.documents()]
    held = PackedTokens(documents, tokenizer, 12, kind)
    write_tokens(tmp_path / "t", corpora, tokenizer, 12, kind)
    stored = StoredTokens(tmp_path / "t", tokenizer, 12, kind)
    assert len(stored) == len(held)
    assert (stored.n_documents, stored.n_tokens) == (held.n_documents, held.n_tokens) != (0, 0)
    assert torch.equal(stored.n_kept, held.n_kept)
    assert stored.fingerprint() == held.fingerprint()
    some = torch.tensor([3, 4, 5, 0, 5, len(held) - 1])
    for rows in (torch.arange(len(held)), some, some[:0]):
        a, b = stored.batch(rows), held.batch(rows)
        assert a.n_targets == b.n_targets
        for x, y in zip(a[:-1], b[:-1], strict=True):
            assert torch.equal(x, y)
    assert torch.equal(held.n_kept, held.batch(torch.arange(len(held))).keep.sum(1))


def test_few_documents_are_held_at_a_time(tmp_path: Path, small_blocks: None) -> None:
    tokenizer = make_tokenizer()
    Alive.most = Alive.now = 0
    write_tokens(tmp_path / "t", Streamed(800), tokenizer, 12, "cut")
    gc.collect()
    assert Alive.most <= 2 * 16 + 2
    Alive.most = Alive.now
    PackedTokens(Streamed(800).stream(), tokenizer, 12)
    assert Alive.most <= 2 * 16 + 2


def test_memory_grows_by_less_than_64_bytes_a_window(tmp_path: Path, small_blocks: None) -> None:
    """Of 12 tokens, for which the packed text itself has 156 bytes, and its words many more."""
    tokenizer = make_tokenizer()

    def peak(n: int) -> tuple[int, int]:
        corpus, folder = Streamed(n), tmp_path / str(n)
        tracemalloc.start()
        write_tokens(folder, corpus, tokenizer, 12, "cut")
        stored = StoredTokens(folder, tokenizer, 12, "cut")
        for first in range(0, len(stored), 8):
            stored.batch(torch.arange(first, min(first + 8, len(stored))))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, len(stored)

    peak(50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("salve_lm.data.tokens._AT_ONCE", 64)
        patch.setattr(packing, "_ROWS", 64)
        (few, windows), (many, more) = peak(200), peak(2000)
    assert more - windows > 3000
    assert many - few < 64 * (more - windows)


def test_training_reads_it_and_makes_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def data(**options: Any) -> TokenActivationData:
        settings: dict[str, Any] = {
            "model": TinyLanguage(), "train": TinyCorpus(), "context": 12, "batch_size": 32,
            "buffer_rows": 128, "sequences": 5,
        }  # fmt: skip
        made = TokenActivationData(**{**settings, **options})
        made.prepare_data()
        made.setup("fit")
        return made

    folder = str(tmp_path / "tokens")
    held = list(data().train_dataloader())
    for _ in range(2):
        stored = data(tokens=folder)
        for a, b in zip(stored.train_dataloader(), held, strict=True):
            assert torch.equal(a.position, b.position)
            assert torch.equal(a.sample, b.sample)
            assert torch.equal(a.x["resid_post.1"], b.x["resid_post.1"])
        # the second time, nothing is encoded
        monkeypatch.setattr(encoding, "encode", None)
    assert stored.provenance_of("resid_post.1", "train")["data"]
    with pytest.raises(StaleStore, match="another text"):
        data(tokens=folder, train=TinyCorpus(61))
    with pytest.raises(StaleStore, match=r"context \(was 12, is 13\)"):
        data(tokens=folder, context=13)


def test_what_is_stale_damaged_or_in_the_way(tmp_path: Path) -> None:
    folder, corpus, tokenizer = tmp_path / "t", TinyCorpus(), make_tokenizer()
    write_tokens(folder, corpus, tokenizer, 12, "cut")
    check_text(folder, [corpus])
    with pytest.raises(StaleStore, match="another text"):
        check_text(folder, TinyCorpus(61))
    with pytest.raises(StaleStore, match=r"packing \(was cut, is whole\)"):
        StoredTokens(folder, tokenizer, 12, "whole")
    other = make_tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(StaleStore, match="tokenizer"):
        StoredTokens(folder, other, 12, "cut")
    with pytest.raises(OutputExists):
        write_tokens(folder, corpus, tokenizer, 12, "cut")
    rows = (folder / "rows.bin").read_bytes()
    (folder / "rows.bin").write_bytes(rows[:-1])
    with pytest.raises(CorruptFile, match=r"rows\.bin: it does not hold"):
        StoredTokens(folder, tokenizer, 12, "cut")
    (folder / "counts.npy").unlink()
    with pytest.raises(CorruptFile, match="damaged"):
        StoredTokens(folder, tokenizer, 12, "cut")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "version": 2}))
    with pytest.raises(CorruptFile, match="version 2"):
        StoredTokens(folder, tokenizer, 12, "cut")
    (folder / "index.json").unlink()
    with pytest.raises(CorruptFile, match="no packed text"):
        StoredTokens(folder, tokenizer, 12, "cut")


@given(st.text("ab|", max_size=40), st.integers(1, 5), st.sampled_from(["|", "||", "ab", "a|b"]))
@settings(max_examples=100, deadline=None)
def test_a_text_file_is_cut_as_split_does(
    tmp_path_factory: pytest.TempPathFactory, content: str, characters: int, separator: str
) -> None:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text(content + "end")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHARACTERS", characters)
        found = [d.text for d in TextCorpus([str(file)], separator=separator).stream()]
    assert found == [part for part in (content + "end").split(separator) if part]


def test_a_file_is_read_as_far_as_documents_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "two"}\n{"text": \n')
    documents = TextCorpus([str(file)]).stream()
    assert [next(documents).text, next(documents).text] == ["one", "two"]
    with pytest.raises(CorruptFile, match="line 4"):
        next(documents)


@given(st.lists(st.text() | st.integers() | st.dictionaries(st.text(), st.none()), max_size=5))
def test_a_list_is_hashed_value_by_value(values: list[object]) -> None:
    assert hash_listed(iter(values)) == hash_plain(values)
