"""Likelihoods of answers against one text at a time, token by token."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from salve_lm.errors import BadConfig
from salve_lm.tasks import likelihood as module
from salve_lm.tasks.likelihood import AnswerLikelihood, windows
from salve_lm.tasks.memory import OutOfMemory
from salve_lm.tasks.prompts import PlainPrompt
from tests.tasks.language_tiny import FAMILIES, byte_tokenizer, rows_of, tiny_model
from tests.tasks.made_problems import MadeProblems

TOKENIZER = byte_tokenizer(("Ġ", "I"))


def run(task: AnswerLikelihood, model: Any, world: int = 1) -> list[dict[str, Any]]:
    return rows_of(task, model, TOKENIZER, world)


@torch.no_grad()
def brute_force(model: Any, prompt: str, target: str) -> tuple[float, int, bool]:
    """Sum of log-probabilities, one forward pass a token."""
    start = 1 + len(prompt)  # BOS, and a token a character
    ids = TOKENIZER.encode(f"{prompt} {target}")
    total, greedy = 0.0, True
    for i in range(start, len(ids)):
        logits = model(torch.tensor([ids[:i]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[ids[i]])
        greedy &= int(logits.argmax()) == ids[i]
    return total, len(ids) - start, greedy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["solution", "answer"])
def test_batches_equal_brute_force(family: str, target: Any) -> None:
    model = tiny_model(family)
    task = AnswerLikelihood(MadeProblems(), target, PlainPrompt("{problem} ="), batch_size=4)
    for problem, row in zip(MadeProblems().problems(), run(task, model), strict=True):
        expected = brute_force(model, f"{problem.problem} =", getattr(problem, target))
        assert row["log_likelihood"] == pytest.approx(expected[0], rel=1e-5)
        assert (row["tokens"], row["greedy"]) == expected[1:]
        assert row["loss"] == pytest.approx(-expected[0] / expected[1], rel=1e-5)
        assert (row["sample"], row["problem_id"]) == (problem.sample, problem.fingerprint)


def test_ranks_and_batch_sizes_agree() -> None:
    model = tiny_model("llama")
    rows = run(AnswerLikelihood(MadeProblems(), batch_size=1), model)
    for other in (
        run(AnswerLikelihood(MadeProblems(), batch_size=16), model),
        run(AnswerLikelihood(MadeProblems(), batch_size=2), model, world=3),
    ):
        for a, b in zip(rows, other, strict=True):
            assert a["log_likelihood"] == pytest.approx(b["log_likelihood"], rel=1e-5)
    summary = AnswerLikelihood(MadeProblems()).summary(rows)
    assert summary["loss"] == pytest.approx(sum(r["loss"] for r in rows) / 6)
    tokens = sum(r["tokens"] for r in rows)
    expected = -sum(r["log_likelihood"] for r in rows) / tokens
    assert summary["token_loss"] == pytest.approx(expected)
    assert {"loss/even", "loss/odd", "greedy"} <= set(summary)


@given(st.integers(2, 60), st.integers(1, 59), st.integers(2, 30))
def test_windows_score_each_token_once(length: int, start: int, context: int) -> None:
    start = min(start, length - 1)
    found = windows(length, start, context)
    assert [i for w in found for i in range(w.scored, w.end)] == list(range(start, length))
    for i, w in enumerate(found):
        assert 0 <= w.begin < w.scored and w.end - w.begin <= context
        # at least half a context before it, or all there is
        assert w.scored - w.begin >= min(w.scored, context // 2) or i == 0


def test_long_texts_are_scored_in_windows() -> None:
    model = tiny_model("llama")
    rows = run(AnswerLikelihood(MadeProblems(), context=16), model)
    whole = run(AnswerLikelihood(MadeProblems()), model)
    assert all(row["windows"] > 1 for row in rows)
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in whole]
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_out_of_memory_halves_the_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    expected = run(AnswerLikelihood(MadeProblems(), batch_size=1), model)
    score, tried = module._score, []

    def tight(model: Any, texts: Any) -> Any:
        tried.append(len(texts))
        if len(texts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(model, texts)

    monkeypatch.setattr(module, "_score", tight)
    with caplog.at_level(logging.WARNING):
        rows = run(AnswerLikelihood(MadeProblems(), batch_size=4), model)
    assert tried == [4, 2, 2, 2] and "going on with 2" in caplog.text
    assert [r["tokens"] for r in rows] == [r["tokens"] for r in expected]
    monkeypatch.setattr(module, "_score", lambda *_: tight(model, [0] * 9))
    with pytest.raises(OutOfMemory, match="single row"):
        run(AnswerLikelihood(MadeProblems(), batch_size=1), model)


def test_bad_options() -> None:
    with pytest.raises(BadConfig, match="batch_size is 0"):
        AnswerLikelihood(MadeProblems(), batch_size=0)
    with pytest.raises(BadConfig, match="2 tokens at least"):
        AnswerLikelihood(MadeProblems(), context=1)
