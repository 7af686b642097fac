"""Tasks as list entries of a config."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from salve_lm.tasks import AnswerLikelihood, Generation, MathProblems, MinervaPrompt, PlainPrompt
from salve_lm.tasks.base import EvaluationTask
from salve_lm.tasks.results import config_of

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "evaluate.md"


def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--tasks", type=list[EvaluationTask])
    return parser


@pytest.mark.skipif(not GUIDE.is_file(), reason="no docs beside the tests")
def test_the_guides_config() -> None:
    block = re.search(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    tasks = yaml.safe_load(block.group(1))["data"]["init_args"]["tasks"]
    made = parser().instantiate_classes(parser().parse_object({"tasks": tasks})).tasks
    assert [type(t) for t in made] == [Generation, AnswerLikelihood]
    assert made[0].problems.limit == 100 and isinstance(made[0].prompt, MinervaPrompt)


def test_a_recorded_config_makes_the_task_again() -> None:
    task = Generation(MathProblems("math", subjects=["algebra"]), PlainPrompt("Q: {problem}"))
    recorded = config_of(task)
    again = parser().instantiate_classes(parser().parse_object({"tasks": [recorded]})).tasks[0]
    assert config_of(again) == recorded
    assert again.prompt.text(type("P", (), {"problem": "1 + 1"})) == "Q: 1 + 1"
