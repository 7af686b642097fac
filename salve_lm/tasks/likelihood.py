"""How likely a model finds the right answers: tells models apart where none of them is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from salve_lm.errors import BadConfig
from salve_lm.tasks.base import EvaluationTask, Row
from salve_lm.tasks.context import context_of, input_device, pad_left, unpad
from salve_lm.tasks.memory import RowLimit
from salve_lm.tasks.per_subject import subject_means
from salve_lm.tasks.problems import Problem, ProblemSource
from salve_lm.tasks.prompts import PlainPrompt, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class AnswerItem(NamedTuple):
    """A problem with its answer, as tokens; from `ids[start]` on they are the answer's."""

    sample: int
    problem: Problem
    ids: list[int]
    start: int


class Window(NamedTuple):
    """Tokens `begin` to `end` of a text; those from `scored` on are scored."""

    begin: int
    scored: int
    end: int


class AnswerLikelihood(EvaluationTask):
    """Log-likelihood of each right answer, given the problem.

    One row a problem: `sample`, `subject`, `level`, `problem_id`, `answer`, `log_likelihood` (sum
    over the answer's tokens, in nats), `tokens`, `loss` (its negative per token), `greedy` (whether
    every token was the most likely one, so that greedy decoding would write this answer) and
    `windows`.

    A text longer than the context is scored in several overlapping windows: each token of the
    answer once, after at least half a context of what precedes it.

    Args:
        problems: Where the problems come from.
        target: Score the worked `solution`, or the bare `answer`.
        prompt: How the problem is put; by default without examples, as "Problem:", the problem,
            "Solution:". The target follows after a space.
        batch_size: Texts at once; halved whenever memory runs out.
        context: Tokens of a window; the model's own by default.
        name: Of the task, in logs and on disk.
    """

    metrics = ("loss", "greedy")

    def __init__(
        self,
        problems: ProblemSource,
        target: Literal["solution", "answer"] = "solution",
        prompt: Prompt | None = None,
        batch_size: int = 16,
        context: int | None = None,
        name: str = "likelihood",
    ) -> None:
        if batch_size < 1:
            raise BadConfig(f"batch_size is {batch_size}; give at least 1.")
        if context is not None and context < 2:
            raise BadConfig(f"context is {context}; a window needs 2 tokens at least.")
        self.problems, self.target = problems, target
        default = PlainPrompt("Problem:\n{problem}\n\nSolution:")
        self.prompt: Prompt = default if prompt is None else prompt
        self.batch_size, self.context, self.name = batch_size, context, name
        self._limit = RowLimit(batch_size, f"AnswerLikelihood ({name})")

    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[AnswerItem]:
        """Tokenized problems with answers, the longest first.

        The prompt is encoded alone and with the answer: what both have in common at the beginning
        is the prompt, so that a token which spans the border counts to the answer.
        """
        problems = self.problems.problems()
        prompts = [self.prompt.text(p) for p in problems]
        texts = [f"{q} {getattr(p, self.target)}" for q, p in zip(prompts, problems, strict=True)]
        items = []
        encoded = zip(
            problems, tokenizer(prompts)["input_ids"], tokenizer(texts)["input_ids"], strict=True
        )
        for problem, alone, whole in encoded:
            pairs = zip(alone, whole, strict=False)
            start = next((i for i, (a, b) in enumerate(pairs) if a != b), len(alone))
            # the first token of a text follows nothing
            items.append(AnswerItem(problem.sample, problem, list(whole), max(start, 1)))
        return sorted(items, key=lambda item: (-len(item.ids), item.sample))

    def collate(
        self, items: Sequence[AnswerItem], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any]:
        """`input_ids` and `attention_mask` [n, longest]; `start` and `problems`, lists."""
        return {
            **pad_left([item.ids for item in items]),
            "start": [item.start for item in items],
            "problems": [item.problem for item in items],
        }

    def step(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Any]
    ) -> list[Row]:
        """Score one batch.

        Raises:
            OutOfMemory: a single text does not fit.
        """
        texts = unpad(batch["input_ids"], batch["attention_mask"])
        context = context_of(model, self.context)
        queue = [
            (i, window)
            for i, (ids, start) in enumerate(zip(texts, batch["start"], strict=True))
            for window in windows(len(ids), start, context)
        ]
        totals = [_Total() for _ in texts]
        while queue:
            now = queue[: self._limit.rows]
            try:
                scored = _score(model, [(texts[i], window) for i, window in now])
            except torch.OutOfMemoryError:
                scored = None  # the traceback holds the tensors until this handler ends
            if scored is None:
                self._limit.halve()
                continue
            for (i, _), found in zip(now, scored, strict=True):
                totals[i].add(found)
            queue = queue[len(now) :]
        return [
            {
                "sample": problem.sample,
                "subject": problem.subject,
                "level": problem.level,
                "problem_id": problem.fingerprint,
                "answer": problem.answer,
                **total.columns(),
            }
            for problem, total in zip(batch["problems"], totals, strict=True)
        ]

    def summary(self, rows: Sequence[Row]) -> dict[str, float]:
        """`loss` (mean over problems) and `greedy`, in all and per subject; `token_loss`.

        `token_loss` weighs every token alike, so long solutions more.
        """
        means = {k: v for m in self.metrics for k, v in subject_means(rows, m).items()}
        total = sum(row["log_likelihood"] for row in rows)
        return means | {"token_loss": -total / sum(row["tokens"] for row in rows)}


class _Total:
    """What the windows of one text add up to."""

    def __init__(self) -> None:
        self.log_likelihood, self.tokens, self.greedy, self.windows = 0.0, 0, True, 0

    def add(self, scored: tuple[float, int, bool]) -> None:
        self.log_likelihood += scored[0]
        self.tokens += scored[1]
        self.greedy &= scored[2]
        self.windows += 1

    def columns(self) -> dict[str, Any]:
        loss = -self.log_likelihood / self.tokens
        return {
            "log_likelihood": self.log_likelihood,
            "tokens": self.tokens,
            "loss": loss,
            "greedy": self.greedy,
            "windows": self.windows,
        }


def windows(length: int, start: int, context: int) -> list[Window]:
    """Windows of at most `context` tokens that score each of `start` ... `length` - 1 once.

    The first reaches as far as it can; each further one scores half a context.
    """
    found = []
    scored = start
    while scored < length:
        end = min(length, max(context, scored + context // 2))
        found.append(Window(max(0, end - context), scored, end))
        scored = end
    return found


def _score(
    model: PreTrainedModel, texts: Sequence[tuple[list[int], Window]]
) -> list[tuple[float, int, bool]]:
    """Sum of log-probabilities (float64), tokens, and whether each was the arg max."""
    device = input_device(model)
    lengths = [w.end - w.begin for _, w in texts]
    longest = max(lengths)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    # padded on the right, where a causal model does not look
    for row, (text, w) in enumerate(texts):
        ids[row, : lengths[row]] = torch.tensor(text[w.begin : w.end])
        mask[row, : lengths[row]] = 1
    # logits [n, kept, vocabulary] only from where the first answer begins
    first = min(w.scored - w.begin for _, w in texts) - 1
    keep = torch.arange(first, longest - 1, device=device)
    with torch.no_grad():
        logits: Tensor = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            use_cache=False,
            logits_to_keep=keep,
        ).logits
    found = []
    for row, (text, w) in enumerate(texts):
        target = torch.tensor(text[w.scored : w.end], device=logits.device)
        before = w.scored - w.begin - 1 - first
        own = logits[row, before : before + len(target)].float()
        loss = F.cross_entropy(own, target, reduction="none").double().sum()
        found.append((-float(loss), len(target), bool((own.argmax(-1) == target).all())))
    return found
