"""Problems that tests make up."""

from __future__ import annotations

from salve_lm.tasks.problems import Problem, ProblemSource


class MadeProblems(ProblemSource):
    """`count` sums in two subjects, of different length."""

    def __init__(self, count: int = 6) -> None:
        self.count = count

    def problems(self) -> list[Problem]:
        return [
            Problem(
                10 * i,
                ("even", "odd")[i % 2],
                "one and " * (i % 3) + f"{i} + {i}",
                f"It is $\\boxed{{{2 * i}}}$.",
                str(2 * i),
                f"Level {i % 5}",
            )
            for i in range(self.count)
        ]
