"""Packing: every token once, in order, with the right masks; documents do not see each other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from salve_lm.data.corpus import Document
from salve_lm.data.encoding import encode
from salve_lm.data.packing import Packing, pack
from salve_lm.data.tokens import PackedTokens
from salve_lm.errors import BadConfig
from salve_lm.language import new_causal_lm
from tests.language.tiny_models import BOS, CONFIGS, EOS, PAD, make_tokenizer

PACKINGS: tuple[Packing, ...] = ("cut", "whole", "none")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
lengths = st.lists(st.integers(0, 40), min_size=1, max_size=20)


@given(lengths, st.integers(2, 24), st.sampled_from(PACKINGS), st.booleans())
def test_pieces_are_the_documents_in_order(
    lengths: list[int], context: int, packing: Packing, bos: bool
) -> None:
    rows = list(pack(lengths, context, packing, bos))
    seen: list[list[int]] = [[] for _ in lengths]
    for row in rows:
        used = [stop - start + bos for _, start, stop in row]
        assert row
        assert min(used) > bos
        assert sum(used) <= context
        assert packing != "none" or len(row) == 1
        for document, start, stop in row:
            seen[document].extend(range(start, stop))
    assert seen == [list(range(n)) for n in lengths]
    order = [piece for row in rows for piece in row]
    assert order == sorted(order)
    for row, after in pairwise(rows):
        used = sum(stop - start + bos for _, start, stop in row)
        if packing == "cut":
            assert used >= context - 1
        elif packing == "whole":
            document, start, _ = after[0]
            rest = lengths[document] - start + bos
            assert used + rest > context
    if packing == "whole":
        for n, length in enumerate(lengths):
            cuts = sum(piece.document == n for piece in order)
            assert cuts <= -(-length // (context - bos))


def documents(*texts: str) -> list[Document]:
    return [Document(t) for t in texts]


def text_of(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_against_plain_python(packing: Packing, bos: bool) -> None:
    tokenizer = make_tokenizer(bos)
    given = [Document("abc" * 5, "Say: "), Document("x"), Document("hello world")]
    tokens = PackedTokens(given, tokenizer, 12, packing, completion_only=True)
    batch = tokens.batch(torch.arange(len(tokens)))
    found: dict[int, str] = dict.fromkeys(range(3), "")
    for r in range(len(tokens)):
        before = None
        for t in range(12):
            token, document = int(batch.input_ids[r, t]), int(batch.document[r, t])
            begins = document != before
            where = (r, t)
            if document == -1:
                assert token == PAD
                assert not batch.target[where]
                assert not batch.keep[where]
                continue
            if begins:
                assert batch.position_ids[where] == 0
                assert not batch.target[where]
                assert not batch.keep[where]
                assert not bos or token == BOS
            else:
                assert batch.position_ids[where] == batch.position_ids[r, t - 1] + 1
                assert batch.keep[where]
            if not (begins and bos):
                in_prompt = document == 0 and len(found[0]) < len("Say: ")
                assert bool(batch.target[where]) == (not begins and not in_prompt)
                found[document] += "\0" if token == EOS else text_of([token], tokenizer)
            before = document
    assert list(found.values()) == [d.prompt + d.text + "\0" for d in given]
    assert batch.n_targets == int(batch.target.sum())
    assert tokens.n_tokens == sum(map(len, found.values()))
    some = tokens.batch(torch.tensor([1, 0]))
    assert torch.equal(some.input_ids, batch.input_ids[[1, 0]])
    none = tokens.batch(torch.tensor([], dtype=torch.int64), 5)
    assert none.input_ids.shape == (0, 12)
    assert none.n_targets == 5


@pytest.mark.parametrize("family", list(CONFIGS))
def test_documents_of_a_row_do_not_see_each_other(family: str) -> None:
    """Logits in a packed row equal those of each document alone."""
    model, tokenizer = new_causal_lm(CONFIGS[family]), make_tokenizer()
    texts = ["first text", "b", "and a third one of them"]
    tokens = PackedTokens(documents(*texts), tokenizer, 44, "whole")
    batch = tokens.batch(torch.arange(1))
    with torch.no_grad():
        packed = model(**batch.model_inputs()).logits[0]
        for i, text in enumerate(texts):
            ids = [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"], EOS]
            alone = model(input_ids=torch.tensor([ids])).logits[0]
            torch.testing.assert_close(packed[batch.document[0] == i], alone, atol=1e-5, rtol=1e-4)


def test_prompt_tokens_are_counted_by_characters() -> None:
    tokenizer = make_tokenizer()
    (ids, n_prompt), (_, none) = encode([Document("ü!", "Wé"), Document("x")], tokenizer)
    assert ids.tolist() == [*tokenizer("Wéü!")["input_ids"], EOS]
    assert n_prompt == len(tokenizer("Wé")["input_ids"])
    assert none == 0


def test_chat_template() -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    ask = {"role": "user", "content": "hi"}
    talk = Document("", messages=(ask, {"role": "assistant", "content": "yes"}))
    (ids, n_prompt), (only, none) = encode([talk, Document("", messages=(ask,))], tokenizer)
    assert text_of(ids.tolist(), tokenizer) == "<user>hi|<assistant>yes|"
    assert text_of(ids[:n_prompt].tolist(), tokenizer) == "<user>hi|<assistant>"
    assert (text_of(only.tolist(), tokenizer), none) == ("<user>hi|", 0)
    row = PackedTokens([talk], tokenizer, 40, "none").batch(torch.arange(1))
    assert row.input_ids[0, :2].tolist() == [BOS, ids[0]]
    with pytest.raises(BadConfig, match=r"no chat template.*chat_template: false"):
        encode([talk], make_tokenizer())
    refuses = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadConfig, match=r"refuses .*roles must alternate.*'user', 'assistant'"):
        encode([talk], refuses)


def test_refusals() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(BadConfig, match=r"too small: 6 tokens in 1 documents .*context=16"):
        PackedTokens(documents("short"), tokenizer, 16)
    with pytest.raises(BadConfig, match="corpus is empty"):
        PackedTokens([], tokenizer, 16)
    with pytest.raises(BadConfig, match="context must be at least 2"):
        PackedTokens(documents("short"), tokenizer, 1)
    with pytest.raises(BadConfig, match=r"No token .* is to be learned"):
        PackedTokens([Document("", "all prompt")], tokenizer, 8, eos=False, completion_only=True)
