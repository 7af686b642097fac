"""The generation task: rows, scores, context, memory, chat template."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from salve_lm.errors import BadConfig
from salve_lm.tasks import generation as module
from salve_lm.tasks.base import Row
from salve_lm.tasks.decoding import greedy_decode
from salve_lm.tasks.generation import Generation
from salve_lm.tasks.memory import OutOfMemory
from salve_lm.tasks.minerva import SHOTS, MinervaPrompt
from salve_lm.tasks.prompts import PlainPrompt
from tests.tasks.language_tiny import CHAT, byte_tokenizer, rows_of, tiny_model
from tests.tasks.made_problems import MadeProblems

TOKENIZER = byte_tokenizer()


def run(task: Generation, model: Any = None, world: int = 1) -> list[Row]:
    return rows_of(task, tiny_model("llama") if model is None else model, TOKENIZER, world)


def plain(**options: Any) -> Generation:
    return Generation(MadeProblems(), PlainPrompt(), max_new_tokens=8, **options)


def test_rows_and_summary() -> None:
    task = plain(rows=2, batch_size=4)
    rows = run(task)
    assert [row["sample"] for row in rows] == [0, 10, 20, 30, 40, 50]
    assert set(rows[0]) == {
        "sample", "subject", "level", "problem_id", "answer", "output", "extracted", "exact_match",
        "new_tokens", "truncated", "prompt_cut",
    }  # fmt: skip
    assert rows == run(plain(rows=1, batch_size=1)) == run(plain(), world=4)
    summary = task.summary(rows)
    assert set(summary) == {
        "exact_match", "exact_match/even", "exact_match/odd", "truncated", "prompt_cut",
    }  # fmt: skip
    assert summary["truncated"] == sum(row["truncated"] for row in rows) / 6


def test_outputs_equal_transformers_own() -> None:
    model = tiny_model("gemma3")
    task = Generation(MadeProblems(), PlainPrompt(stop=[]), max_new_tokens=8)
    for item, row in zip(
        sorted(task.items(TOKENIZER), key=lambda i: i.sample), run(task, model), strict=True
    ):
        ids = torch.tensor([item.ids])
        whole = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert row["output"] == TOKENIZER.decode(whole, skip_special_tokens=True)


class Scripted:
    """Stands in for `greedy_decode`: writes what it is told."""

    def __init__(self, *outputs: str) -> None:
        self.outputs = outputs

    def __call__(self, model: Any, prompts: Any, **_: Any) -> Iterator[Any]:
        for i, text in enumerate(self.outputs):
            ids = TOKENIZER.encode(text, add_special_tokens=False)
            yield module.Decoded(i, ids, False)


def test_plain_answers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = (" 0\nmore", "3", "4 ", "06", "8.", "10")
    # items come longest first; here by their number
    monkeypatch.setattr(module, "greedy_decode", Scripted(*outputs))
    task = plain()
    items = sorted(task.items(TOKENIZER), key=lambda i: i.sample)
    rows = task.step(tiny_model("llama"), TOKENIZER, task.collate(items, TOKENIZER))
    assert [row["exact_match"] for row in rows] == [True, False, True, False, False, True]
    assert rows[0]["output"] == " 0"


def test_out_of_memory_halves_the_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[tuple[int, int]] = []

    def tight(model: Any, prompts: Any, *, rows: int, **options: Any) -> Iterator[Any]:
        """Fails in the middle with more than two rows, and at once with more than four."""
        tried.append((rows, len(prompts)))
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        for done, found in enumerate(greedy_decode(model, prompts, rows=rows, **options)):
            if rows > 2 and done == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield found

    expected = run(plain())
    monkeypatch.setattr(module, "greedy_decode", tight)
    task = plain(rows=8, batch_size=8)
    with caplog.at_level(logging.WARNING):
        assert run(task) == expected
    assert tried == [(8, 6), (4, 6), (2, 4)]
    assert "with 8 rows at once: going on with 4" in caplog.text
    assert "with 4 rows at once: going on with 2" in caplog.text
    run(task)
    assert tried[3:] == [(2, 6)], "the limit is kept for later batches"


def test_out_of_memory_with_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Iterator[Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(module, "greedy_decode", never)
    with pytest.raises(OutOfMemory, match=r"single row.*bfloat16"):
        run(plain(rows=2, batch_size=2))


def test_long_prompts_lose_their_beginning(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    task = plain(context=20)
    rows = run(task, model)
    lengths = {item.sample: len(item.ids) for item in task.items(TOKENIZER)}
    assert [row["prompt_cut"] for row in rows] == [lengths[r["sample"]] > 12 for r in rows]
    assert any(row["prompt_cut"] for row in rows) and not all(row["prompt_cut"] for row in rows)
    with caplog.at_level(logging.WARNING):
        assert 0 < task.summary(rows)["prompt_cut"] < 1
    assert "lost their beginning" in caplog.text and "fewer shots" in caplog.text.replace("\n", " ")
    with pytest.raises(BadConfig, match="leave no room"):
        run(plain(context=8), model)
    with pytest.raises(BadConfig, match="the model takes 256"):
        run(plain(context=1000), model)


def test_chat_template() -> None:
    task = plain(chat_template=True)
    with pytest.raises(BadConfig, match="no chat template"):
        task.items(TOKENIZER)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    item = min(task.items(tokenizer), key=lambda i: i.sample)
    # no BOS of the tokenizer's own beside what the template writes
    assert tokenizer.decode(item.ids) == "<user>0 + 0\n<model>"


def test_bad_options() -> None:
    with pytest.raises(BadConfig, match="rows is 0"):
        plain(rows=0)
    with pytest.raises(BadConfig, match="batch_size 2 is below rows 4"):
        plain(rows=4, batch_size=2)
    with pytest.raises(BadConfig, match=r"lacks \{problem\}"):
        PlainPrompt("solve")
    with pytest.raises(BadConfig, match="empty stop text"):
        PlainPrompt(stop=[""])
    with pytest.raises(BadConfig, match="0 to 4"):
        MinervaPrompt(shots=5)


def test_shots() -> None:
    problem = MadeProblems(1).problems()[0]
    assert MinervaPrompt(0).text(problem) == "Problem:\n0 + 0\n\nSolution:"
    text = MinervaPrompt(1).text(problem)
    assert text.count("Problem:") == 2 and SHOTS[0][1] in text
