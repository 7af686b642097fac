"""What the figures say, in words: is the class gone, and does the edit beat its controls?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from salve_lm.report.markup import percent, text
from salve_lm.report.material import Control

TOLERANCE = 0.01  # shares closer than this count as the same
# controls that need no autoencoder, in words
TRIVIAL = {
    "LowerClassBias": "lowering the class's bias",
    "ShrinkClassRow": "zeroing the class's row of the head",
}


class Verdict(NamedTuple):
    """One sentence, and a line for each reason; all as HTML."""

    headline: str
    tone: str  # "good" | "mixed" | "bad": colour of its edge
    lines: list[str]


class Effect(NamedTuple):
    """One edit over its classes."""

    name: str
    direction: str
    target_before: float
    target: float
    worst: float
    others_before: float
    others: float
    classes: int
    unused: int  # classes for which no strength was accepted
    no_gain: int  # classes that an enhancement did not raise on training data

    @property
    def reached(self) -> bool:
        """Whether it did what it is for, over its classes on average."""
        if self.direction == "enhance":
            return self.target > self.target_before
        return self.target <= 0.1


def effects(summary: Mapping[str, Any]) -> list[Effect]:
    """The headline edits, in order, over their classes."""
    named: dict[str, list[Mapping[str, Any]]] = {}
    for e in summary["edits"]:
        named.setdefault(e["edit"], []).append(e)
    return [_effect(name, mine) for name, mine in named.items()]


def equals(
    edit: Effect, figures: Mapping[str, Mapping[str, Any]], controls: Mapping[str, Control]
) -> list[str]:
    """Controls of the same direction that do as much and cost no more, within TOLERANCE."""
    enhance = edit.direction == "enhance"
    return [
        name
        for name, c in figures.items()
        if name in controls
        and controls[name].direction == edit.direction
        and None not in (c["target_accuracy_after"], c["other_accuracy_after"])
        and (
            c["target_accuracy_after"] >= edit.target - TOLERANCE
            if enhance
            else c["target_accuracy_after"] <= edit.target + TOLERANCE
        )
        and c["other_accuracy_after"] >= edit.others - TOLERANCE
    ]


def judge(
    summary: Mapping[str, Any],
    controls: Mapping[str, Control],
    removal: Mapping[str, Mapping[str, Any]],
) -> Verdict:
    """The verdict of a run.

    Args:
        summary: as in `summary.json`.
        controls: name -> kind and direction.
        removal: edit name -> entry of `removal.json`; empty where it was not measured.
    """
    figures = summary["controls"]
    found = effects(summary)
    lines = [_line(e, figures, controls) for e in found]
    edits = {e.name for e in found}
    lines.append(_removal_line({k: r for k, r in removal.items() if r["edit"] in edits}))
    suppressing = [e for e in found if e.direction != "enhance"]
    if not suppressing:
        return Verdict("This run suppresses no class.", "mixed", lines)
    rivals = {e.name: equals(e, figures, controls) for e in suppressing}
    compared = any(c.direction != "enhance" for c in controls.values())
    reached = [e for e in suppressing if e.reached]
    beating = [e for e in reached if not rivals[e.name]]
    if not reached:
        return Verdict("No edit switches its classes off.", "bad", lines)
    if not compared:
        says = "The classes are switched off. Nothing was run to compare the edits with."
        return Verdict(says, "mixed", lines)
    if beating:
        which = ", ".join(_quoted(e.name) for e in beating)
        return Verdict(f"By accuracy, {which} beats every control.", "good", lines)
    trivial = _trivial([r for e in reached for r in rivals[e.name]], controls)
    same = f"{trivial[0]} does the same" if trivial else "other edits do as much"
    count = "the edit does" if len(reached) == 1 else "these edits do"
    headline = (
        f"The classes are switched off, but by accuracy {count} not beat the controls: {same}."
    )
    deeper = [name for name in _reaches_features(removal) if name in {e.name for e in reached}]
    if deeper:
        verb = "changes" if len(deeper) == 1 else "change"
        # a comparator may reach as deep
        only = "But" if any(n in controls for n in _reaches_features(removal)) else "Only"
        headline += f" {only} {', '.join(map(_quoted, deeper))} also {verb} what the features hold."
    return Verdict(headline, "mixed", lines)


def _effect(name: str, mine: Sequence[Mapping[str, Any]]) -> Effect:
    def mean(key: str) -> float:
        known = [e[key] for e in mine if e[key] is not None]
        return fmean(known) if known else 0.0

    direction = mine[0]["direction"]
    after = [e["target_accuracy_after"] or 0.0 for e in mine]
    return Effect(
        name,
        direction,
        mean("target_accuracy_before"),
        mean("target_accuracy_after"),
        min(after) if direction == "enhance" else max(after),
        mean("other_accuracy_before"),
        mean("other_accuracy_after"),
        len(mine),
        sum(not e["alpha"] for e in mine),
        sum(e.get("raised_on_training") is False and bool(e["alpha"]) for e in mine),
    )


def _line(
    e: Effect, figures: Mapping[str, Mapping[str, Any]], controls: Mapping[str, Control]
) -> str:
    each = f"{e.classes} classes" if e.classes > 1 else "one class"
    line = (
        f"<b>{text(e.name)}</b> ({each}): target {percent(e.target_before)} → "
        f"<b>{percent(e.target)} %</b> (worst class {percent(e.worst)}), others "
        f"{percent(e.others_before)} → <b>{percent(e.others)} %</b>."
    )
    if e.unused:
        line += f" For {e.unused} of them no strength was acceptable; they are left as they were."
    if e.no_gain:
        line += (
            f" For {e.no_gain} of them no strength raised the training accuracy (often there was "
            "nothing left to gain), so the smallest one stands; read nothing into its figures."
        )
    rivals = equals(e, figures, controls)
    comparable = [n for n, c in controls.items() if c.direction == e.direction]
    trivial = _trivial(rivals, controls)
    if not comparable:
        return line + " No control in this run does the like, so there is nothing to compare."
    if trivial:
        verb = "needs" if len(trivial) == 1 else "need"
        return line + f" It does not beat {' or '.join(trivial)}, which {verb} no autoencoder."
    if rivals:
        return line + f" It does not beat {', '.join(map(text, rivals[:4]))}."
    return line + f" It beats all {len(comparable)} controls."


def _trivial(rivals: Sequence[str], controls: Mapping[str, Control]) -> list[str]:
    kinds = {controls[r].kind for r in rivals}
    # zeroing the row first: the plainest of them
    return [words for kind, words in reversed(TRIVIAL.items()) if kind in kinds]


def _removal_line(removal: Mapping[str, Mapping[str, Any]]) -> str:
    if not removal:
        return (
            "Whether the features still hold the classes was not measured (no entries in "
            "<code>sweep/removal.json</code>), so no edit here may be called a removal."
        )
    counted: dict[str, Counter[str]] = {}
    for entry in removal.values():
        counted.setdefault(str(entry["edit"]), Counter())[str(entry["label"])] += 1
    each = "; ".join(
        f"<b>{text(edit)}</b> "
        + ", ".join(f"{n} × {text(label)}" for label, n in counts.most_common())
        for edit, counts in counted.items()
    )
    deeper = _reaches_features(removal)
    if deeper:
        # an edit of the class's own row or bias maps the features to themselves (METHODS 3c)
        each += (
            ". No change of the class's row or bias does what "
            f"{', '.join(map(_quoted, deeper))} does here: that leaves the features as they are"
        )
    gone = sum(counts["removed"] for counts in counted.values())
    tail = (
        f"In {gone} of {len(removal)} cases the features no longer hold the class."
        if gone
        else "Nothing was removed: a refitted head or nearest neighbours still find the classes in "
        "the features."
    )
    return f"What is left in the features: {each}. {tail}"


def _reaches_features(removal: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Edits that took at least half of their classes out of the features, linearly or wholly."""
    found: dict[str, list[bool]] = {}
    for entry in removal.values():
        found.setdefault(str(entry["edit"]), []).append(
            entry["label"] in ("linearly erased", "removed")
        )
    return [edit for edit, each in found.items() if 2 * sum(each) >= len(each)]


def _quoted(name: str) -> str:
    return f"“{text(name)}”"
