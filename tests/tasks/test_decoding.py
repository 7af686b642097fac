"""Greedy decoding in batches gives what each prompt alone gives."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from salve_lm.errors import BadConfig
from salve_lm.tasks.decoding import Decoded, greedy_decode
from salve_lm.tasks.stopping import StopTexts
from tests.tasks.language_tiny import FAMILIES, byte_tokenizer, tiny_model

VOCAB, ENDS, MOST = 40, {5, 6}, 12
model_of = functools.cache(functools.partial(tiny_model, vocab=VOCAB))


def ended(ids: list[int]) -> bool:
    return ids[-1] in (7, 8)


@torch.no_grad()
def alone(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], bool]:
    """One prompt, without padding, cache or batch."""
    out: list[int] = []
    while len(out) < MOST:
        token = int(model(torch.tensor([[*prompt, *out]])).logits[0, -1].argmax())
        if token in ENDS:
            return out, False
        out.append(token)
        if ended(out):
            return out, False
    return out, True


def decode(model: PreTrainedModel, prompts: list[list[int]], **options: object) -> list[Decoded]:
    found = greedy_decode(
        model, prompts, max_new_tokens=MOST, end_tokens=ENDS, ended=ended, **options
    )  # type: ignore[arg-type]
    return sorted(found)


tokens = st.integers(9, VOCAB - 4)


@pytest.mark.parametrize("family", FAMILIES)
@given(
    shared=st.lists(tokens, max_size=14),
    rests=st.lists(st.lists(tokens, min_size=1, max_size=14), min_size=1, max_size=6),
    rows=st.integers(1, 6),
    share=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_batches_equal_one_by_one(
    family: str, shared: list[int], rests: list[list[int]], rows: int, share: bool
) -> None:
    model = model_of(family)
    prompts = [shared + rest for rest in rests]
    found = decode(model, prompts, rows=rows, share_prefix=share)
    assert [(d.ids, d.truncated) for d in found] == [alone(model, p) for p in prompts]


def test_equal_prompts_and_single_tokens() -> None:
    model = model_of("llama")
    same = [[9] * 12] * 3
    assert [d.ids for d in decode(model, same, rows=2)] == [alone(model, same[0])[0]] * 3
    assert [d.ids for d in decode(model, [[9], [10]], rows=2)] == [
        alone(model, [9])[0], alone(model, [10])[0],
    ]  # fmt: skip
    assert decode(model, [], rows=2) == []


def test_a_shared_beginning_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    seen: list[tuple[int, ...]] = []
    forward = type(model).forward

    def counted(self: object, input_ids: torch.Tensor, **kwargs: object) -> object:
        seen.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model), "forward", counted)
    prompts = [[9] * 20 + [10 + i] for i in range(4)]
    decode(model, prompts, rows=4)
    assert seen[:2] == [(1, 20), (4, 1)]
    seen.clear()
    decode(model, prompts, rows=4, share_prefix=False)
    assert seen[0] == (4, 21)


def test_states_that_are_no_keys_and_values_are_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = MambaForCausalLM(config).eval()
    with pytest.raises(BadConfig, match="Evaluate it by likelihood"):
        decode(model, [[9, 10], [9]], rows=2)


def test_stop_texts_however_they_are_split() -> None:
    tokenizer = byte_tokenizer(("l", "e"), ("le", "m"), ("m", ":"), (":", "x"))
    stop = StopTexts(["lem:", "é"], tokenizer)

    def first_stop(text: str) -> str | None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        for n in range(1, len(ids) + 1):
            if stop.reached(ids[:n]):
                return stop.cut(stop.decode(ids[:n]))
        return None

    assert first_stop("a prob" + "lem:" + "x") == "a prob"
    assert first_stop("le m: lem :") is None
    # one character of two bytes
    assert first_stop("caf\u00e9 lem:") == "caf"
    assert StopTexts([], tokenizer).cut("abc") == "abc"
    assert not StopTexts([], tokenizer).reached([1])
