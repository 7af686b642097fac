"""How a problem is put to a model, where its output ends, and how the output is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from salve_lm.errors import BadConfig
from salve_lm.tasks.problems import Problem

# what `Generation` records of an output: numbers and the extracted answer
Scores = dict[str, Any]


class Prompt(ABC):
    """A prompt format together with its scoring. A config names it by class_path.

    Keep each init argument as an attribute of the same name, so that results can record it.

    Attributes:
        stop: texts that end an output; what follows the first of them is cut off, with it.
        metrics: keys of `score` that are right or wrong.
    """

    stop: list[str]
    metrics: tuple[str, ...]

    @abstractmethod
    def text(self, problem: Problem) -> str:
        """What the model is to continue."""

    @abstractmethod
    def score(self, problem: Problem, output: str) -> Scores:
        """`extracted` (the answer found in `output`, or None) and a bool for each metric."""


class PlainPrompt(Prompt):
    """A template without examples; the output up to a line break is the answer.

    `exact_match` compares the output, without surrounding white space, with the answer, character
    by character.

    Args:
        template: Text with `{problem}` in it; other braces stand for themselves.
        stop: Texts that end an output.
    """

    metrics = ("exact_match",)

    def __init__(self, template: str = "{problem}", stop: list[str] | None = None) -> None:
        if "{problem}" not in template:
            raise BadConfig(f"The template {template!r} lacks {{problem}}.")
        self.template = template
        self.stop = ["\n"] if stop is None else list(stop)
        check_stop(self.stop)

    def text(self, problem: Problem) -> str:
        """The template, filled in."""
        return self.template.replace("{problem}", problem.problem)

    def score(self, problem: Problem, output: str) -> Scores:
        """Whether `output` is the answer."""
        extracted = output.strip()
        return {"extracted": extracted, "exact_match": extracted == problem.answer.strip()}


def check_stop(stop: list[str]) -> None:
    """Refuse an empty stop text, which every output contains."""
    if "" in stop:
        raise BadConfig("An empty stop text would end every output at once; remove it.")
