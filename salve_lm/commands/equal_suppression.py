"""Edits compared at equal suppression of the target class, from the curves of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from salve_lm.commands.swept import Swept

LEVELS = (0.5, 0.2, 0.05, 0.02, 0.0)
"""Shares of the target's *training* samples that may still be called so."""
PRINTED = 0.02


class EqualSuppression(NamedTuple):
    """One edit at one level, over the classes it was swept for.

    Attributes:
        edit: its name.
        level: target accuracy on training data that was to be reached.
        classes: number of classes.
        reached: those where some strength of the grid reaches it; the means are over these.
        target: mean held-out target accuracy, NaN where no class reaches the level.
        worst_target: the highest.
        others: mean held-out accuracy of the other classes.
        others_lost: mean loss of that against the unedited model.
        worst_others_lost: the largest loss.
    """

    edit: str
    level: float
    classes: int
    reached: int
    target: float
    worst_target: float
    others: float
    others_lost: float
    worst_others_lost: float


def equal_suppression(
    swept: Sequence[Swept], levels: Sequence[float] = LEVELS
) -> list[EqualSuppression]:
    """Every suppressing edit at the smallest strength whose *training* target is low enough.

    The other classes have no say in this strength, so that what an edit costs them at a given
    suppression compares. It is a strength of the grid: the level is reached, not hit.
    """
    names = dict.fromkeys(s.edit for s in swept if s.direction == "suppress")
    return [_at(name, [s for s in swept if s.edit == name], v) for name in names for v in levels]


def _at(name: str, mine: Sequence[Swept], level: float) -> EqualSuppression:
    target, others, lost = [], [], []
    for s in mine:
        reached = [
            held_out
            for train, held_out in zip(s.curves["train"], s.curves["val"], strict=True)
            if train.target <= level + 1e-9
        ]
        if reached:
            target.append(reached[0].target)
            others.append(reached[0].others)
            lost.append(s.before["val"].others - reached[0].others)
    nan = float("nan")
    return EqualSuppression(
        edit=name,
        level=level,
        classes=len(mine),
        reached=len(target),
        target=fmean(target) if target else nan,
        worst_target=max(target, default=nan),
        others=fmean(others) if others else nan,
        others_lost=fmean(lost) if lost else nan,
        worst_others_lost=max(lost, default=nan),
    )


def table_of(rows: Sequence[EqualSuppression], level: float = PRINTED) -> Any:
    """A table for the screen of the rows at one level."""
    from rich.table import Table

    table = Table(
        title=f"At equal suppression: training target at most {100 * level:g} %, held out in %",
        title_justify="left",
    )
    for column in ("edit", "classes", "target (worst)", "others", "others lost (worst)"):
        table.add_column(column, justify="left" if column == "edit" else "right")
    for r in rows:
        if r.level == level:
            each = (r.target, r.worst_target, r.others, r.others_lost, r.worst_others_lost)
            t, tw, o, lost, lw = ("" if v != v else f"{100 * v:.1f}" for v in each)
            shown = (f"{t} ({tw})", o, f"{lost} ({lw})") if r.reached else ("", "", "")
            table.add_row(r.edit, f"{r.reached} of {r.classes}", *shown)
    return table
