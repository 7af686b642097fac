"""Generation: each problem answered by greedy decoding, and scored."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from salve_lm.errors import BadConfig
from salve_lm.tasks.base import EvaluationTask, Row
from salve_lm.tasks.context import context_of, pad_left, unpad
from salve_lm.tasks.decoding import Decoded, greedy_decode
from salve_lm.tasks.memory import RowLimit
from salve_lm.tasks.minerva import MinervaPrompt
from salve_lm.tasks.per_subject import subject_means
from salve_lm.tasks.problems import Problem, ProblemSource
from salve_lm.tasks.prompts import Prompt
from salve_lm.tasks.stopping import StopTexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class PromptItem(NamedTuple):
    """A problem and the tokens of its prompt."""

    sample: int
    problem: Problem
    ids: list[int]


class Generation(EvaluationTask):
    """Answers to problems, by greedy decoding.

    One row a problem: `sample`, `subject`, `level`, `problem_id`, `answer`, `output` (up to the
    first stop text), `extracted`, the scores of the prompt (for Minerva Math `exact_match` and
    `math_verify`), `new_tokens`, `truncated` (no end within `max_new_tokens`) and `prompt_cut`.

    The context is `context`, or else the model's own. A prompt that leaves less than
    `max_new_tokens` of it loses its first tokens (as in lm-eval), and is counted.

    Out of memory halves the number of rows decoded at once, for the rest of the run, with a
    warning; finished rows are kept.

    Args:
        problems: Where the problems come from.
        prompt: How they are put and scored; Minerva Math by default.
        max_new_tokens: The most tokens of an output. Long solutions are cut: see `truncated`.
        rows: Problems decoded at once.
        batch_size: Problems handed over at once; while some of them wait, finished rows are
            replaced. At least `rows`.
        chat_template: Put the prompt as a user's message in the tokenizer's chat template.
        share_prefix: Run what all prompts begin with (the worked examples) through the model once
            per `batch_size` problems, in place of once a problem.
        context: Tokens of prompt and output together; the model's own by default.
        name: Of the task, in logs and on disk.
    """

    def __init__(
        self,
        problems: ProblemSource,
        prompt: Prompt | None = None,
        max_new_tokens: int = 512,
        rows: int = 16,
        batch_size: int = 64,
        chat_template: bool = False,
        share_prefix: bool = True,
        context: int | None = None,
        name: str = "generation",
    ) -> None:
        for option, value in (("max_new_tokens", max_new_tokens), ("rows", rows)):
            if value < 1:
                raise BadConfig(f"{option} is {value}; give at least 1.")
        if batch_size < rows:
            raise BadConfig(
                f"batch_size {batch_size} is below rows {rows}; raise it, or lower rows."
            )
        self.problems = problems
        self.prompt: Prompt = MinervaPrompt() if prompt is None else prompt
        self.max_new_tokens, self.rows, self.batch_size = max_new_tokens, rows, batch_size
        self.chat_template, self.share_prefix = chat_template, share_prefix
        self.context, self.name = context, name
        self.metrics = self.prompt.metrics
        self._limit = RowLimit(rows, f"Generation ({name})")

    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[PromptItem]:
        """Tokenized prompts, the longest first: what runs out of memory does so at once."""
        problems = self.problems.problems()
        texts = [self._text(p, tokenizer) for p in problems]
        # a chat template writes its own special tokens
        encoded = tokenizer(texts, add_special_tokens=not self.chat_template)["input_ids"]
        items = [
            PromptItem(p.sample, p, list(ids)) for p, ids in zip(problems, encoded, strict=True)
        ]
        return sorted(items, key=lambda item: (-len(item.ids), item.sample))

    def collate(
        self, items: Sequence[PromptItem], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any]:
        """`input_ids` and `attention_mask` [n, longest], padded on the left; `problems`, a list."""
        return {
            **pad_left([item.ids for item in items]),
            "problems": [item.problem for item in items],
        }

    def step(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Any]
    ) -> list[Row]:
        """Decode and score one batch.

        Raises:
            BadConfig: `max_new_tokens` leave no room for a prompt.
            OutOfMemory: a single row does not fit.
        """
        room = context_of(model, self.context) - self.max_new_tokens
        if room < 1:
            raise BadConfig(
                f"max_new_tokens {self.max_new_tokens} leave no room for a prompt in a context of "
                f"{room + self.max_new_tokens} tokens; lower it."
            )
        whole = unpad(batch["input_ids"], batch["attention_mask"])
        prompts = [ids[-room:] for ids in whole]
        stop = StopTexts(self.prompt.stop, tokenizer)
        decoded = self._decode(model, prompts, stop, _end_tokens(model, tokenizer))
        return [
            self._row(problem, found, stop, cut=len(ids) > room)
            for problem, ids, found in zip(batch["problems"], whole, decoded, strict=True)
        ]

    def summary(self, rows: Sequence[Row]) -> dict[str, float]:
        """Each score over all problems and per subject; shares truncated and cut."""
        cut = sum(row["prompt_cut"] for row in rows)
        if cut:
            logger.warning(
                "%s: %d of %d prompts lost their beginning, the context being too short. Use fewer "
                "shots, lower max_new_tokens, or a model with a longer context.",
                self.name, cut, len(rows),
            )  # fmt: skip
        means = {k: v for m in self.metrics for k, v in subject_means(rows, m).items()}
        shares = {k: sum(row[k] for row in rows) / len(rows) for k in ("truncated", "prompt_cut")}
        return means | shares

    def _text(self, problem: Problem, tokenizer: PreTrainedTokenizerBase) -> str:
        text = self.prompt.text(problem)
        if not self.chat_template:
            return text
        if tokenizer.chat_template is None:
            raise BadConfig("The tokenizer has no chat template; set `chat_template: false`.")
        message = [{"role": "user", "content": text}]
        return str(
            tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        )

    def _decode(
        self, model: PreTrainedModel, prompts: list[list[int]], stop: StopTexts, ends: set[int]
    ) -> list[Decoded]:
        """`greedy_decode` of all prompts in order, with fewer rows whenever memory runs out."""
        done: dict[int, Decoded] = {}
        while len(done) < len(prompts):
            left = [i for i in range(len(prompts)) if i not in done]
            try:
                for found in greedy_decode(
                    model,
                    [prompts[i] for i in left],
                    max_new_tokens=self.max_new_tokens,
                    end_tokens=ends,
                    ended=stop.reached,
                    rows=self._limit.rows,
                    share_prefix=self.share_prefix,
                ):
                    done[left[found.prompt]] = found
                continue
            except torch.OutOfMemoryError:
                # the traceback holds the tensors until this handler ends
                pass
            self._limit.halve()
        return [done[i] for i in range(len(prompts))]

    def _row(self, problem: Problem, found: Decoded, stop: StopTexts, *, cut: bool) -> Row:
        output = stop.cut(stop.decode(found.ids))
        return {
            "sample": problem.sample,
            "subject": problem.subject,
            "level": problem.level,
            "problem_id": problem.fingerprint,
            "answer": problem.answer,
            "output": output,
            **self.prompt.score(problem, output),
            "new_tokens": len(found.ids),
            "truncated": found.truncated,
            "prompt_cut": cut,
        }


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What the model's generation config and the tokenizer call the end of a text."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list | tuple) else [configured]
    return {int(token) for token in (*several, tokenizer.eos_token_id) if token is not None}
