"""What a sweep finds out about one edit of one class."""

from __future__ import annotations

from dataclasses import dataclass

from salve_lm.edits import EditPlan, EditSpec
from salve_lm.strength import Direction, Outcome


@dataclass(frozen=True)
class Swept:
    """One edit of one class.

    Attributes:
        edit: Name of the edit, shared by all classes.
        plan: The edit at the strength chosen on training data (0: no strength was acceptable).
        target: Index of the class.
        alphas: Strengths tried.
        curves: Split -> outcome at each strength.
        before: Split -> outcome of the unedited model.
        after: Split -> outcome at the chosen strength.
        floor: Held-out target accuracy as the strength of a suppressing multiplicative edit grows
            without bound, the least it can reach; NaN for other edits.
    """

    edit: str
    plan: EditPlan
    target: int
    alphas: list[float]
    curves: dict[str, list[Outcome]]
    before: dict[str, Outcome]
    after: dict[str, Outcome]
    floor: float

    @property
    def spec(self) -> EditSpec:
        """What was asked for, at the strength chosen."""
        return self.plan.spec

    @property
    def direction(self) -> Direction:
        """`suppress` or `enhance`."""
        return direction_of(self.spec)


def direction_of(spec: EditSpec) -> Direction:
    """What a spec is for; edits without a direction suppress."""
    return getattr(spec, "direction", "suppress")
