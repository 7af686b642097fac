"""The generated arithmetic subjects as problems of a task."""

from __future__ import annotations

from typing import Literal

from salve_lm.data.arithmetic import SUBJECTS, arithmetic_problems
from salve_lm.errors import BadConfig, NameNotFound
from salve_lm.tasks.problems import Problem, ProblemSource


class ArithmeticProblems(ProblemSource):
    """The seven arithmetic subjects of `salve_lm.data.arithmetic`, generated, nothing to download.

    Args:
        split: `train`, `val` or `test`; the splits share no problem.
        subjects: Only these; all seven by default.
        limit: Only the first so many problems of each subject.
        seed: Shuffles the problems before they are split; that of the training text.
    """

    def __init__(
        self,
        split: Literal["train", "val", "test"] = "test",
        subjects: list[str] | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        if limit is not None and limit < 1:
            raise BadConfig(f"limit is {limit}; give at least 1, or leave it out.")
        self.split, self.subjects, self.limit, self.seed = split, subjects, limit, seed

    def problems(self) -> list[Problem]:
        """Problems by subject; their numbers count all problems of all subjects.

        Raises:
            NameNotFound: no such subject or split.
        """
        wanted = list(SUBJECTS) if self.subjects is None else self.subjects
        for subject in wanted:
            if subject not in SUBJECTS:
                raise NameNotFound("arithmetic subject", subject, SUBJECTS)
        found, number = [], 0
        for subject in SUBJECTS:
            made = arithmetic_problems(subject, self.split, seed=self.seed)
            if subject in wanted:
                found += [
                    Problem(number + i, subject, p.problem, p.answer, p.answer)
                    for i, p in enumerate(made[: self.limit])
                ]
            number += len(made)
        return found
