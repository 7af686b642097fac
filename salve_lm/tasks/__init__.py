"""Evaluations of language models: losses, likelihoods, generation, scoring, comparison."""

from salve_lm.tasks.arithmetic import ArithmeticProblems
from salve_lm.tasks.base import EvaluationTask
from salve_lm.tasks.generation import Generation
from salve_lm.tasks.likelihood import AnswerLikelihood
from salve_lm.tasks.minerva import MinervaPrompt
from salve_lm.tasks.problems import MathProblems, Problem, ProblemFiles, ProblemSource
from salve_lm.tasks.prompts import PlainPrompt, Prompt
from salve_lm.tasks.text_loss import TextLoss

__all__ = [
    "AnswerLikelihood",
    "ArithmeticProblems",
    "EvaluationTask",
    "Generation",
    "MathProblems",
    "MinervaPrompt",
    "PlainPrompt",
    "Problem",
    "ProblemFiles",
    "ProblemSource",
    "Prompt",
    "TextLoss",
]
