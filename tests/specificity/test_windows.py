from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salve_lm.specificity.documents import LEFT_OUT
from salve_lm.specificity.windows import TopPlaces, text_window
from tests.language.tiny_models import make_tokenizer
from tests.specificity.made import tokens_of


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), cut=st.integers(0, 30))
def test_places_equal_sorting_on_any_number_of_ranks(seed: int, cut: int) -> None:
    document, z = tokens_of(seed, 10, 4)
    z = (z * 8).round() / 8  # ties
    document[:2] = LEFT_OUT
    place = torch.arange(len(document)) * 3
    ranks = [TopPlaces(3), TopPlaces(3)]
    # documents are not cut: a stretch gives one place
    first = int((document <= document[min(cut, len(document) - 1)]).sum())
    for rank, rows in zip(ranks, (slice(0, first), slice(first, None)), strict=True):
        rank.update(document[rows], place[rows], z[rows])
    ranks[1].merge(ranks[0])
    for latent in range(4):
        best = {}
        for d, p, v in zip(document.tolist(), place.tolist(), z[:, latent].tolist(), strict=True):
            if d != LEFT_OUT and v > best.get(d, (0.0, 0))[0]:
                best[d] = (v, p)
        expected = sorted(((v, p, d) for d, (v, p) in best.items()), key=lambda e: (-e[0], e[1]))
        assert [(v, d) for v, _, d in ranks[1].of(latent)] == [(v, d) for v, _, d in expected[:3]]


def test_nothing_seen() -> None:
    places = TopPlaces(2)
    places.merge(TopPlaces(2))
    assert places.of(0) == []


def test_text_is_marked_and_complete() -> None:
    tokenizer = make_tokenizer()
    text = "Grüße an 12 + 30 = 42"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    at = text.encode().index(b"4")
    found = text_window(ids, at, tokenizer, radius=100)
    assert found.token == "4"
    assert found.text == "Grüße an 12 + 30 = ⟦4⟧2"
    near = text_window(ids, at, tokenizer, radius=2)
    assert (near.before, near.after) == ("= ", "2")
    # half of a letter has no text of its own
    assert "Gr" in text_window(ids, 2, tokenizer).text
