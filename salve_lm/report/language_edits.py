"""The section of a language report about edits of the weights other than task vectors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from salve_lm.report.language_charts import Axis, Mark, strip, strip_axis
from salve_lm.report.language_measured import Change, Measured, MeasuredEdit
from salve_lm.report.limits import MAX_ROWS
from salve_lm.report.markup import left_out, section, table, text
from salve_lm.specificity.judge import LEVEL

_HOW = (
    "SALVE's own edits of the chosen layers, its controls and comparators: how the loss on the "
    "task changed (<code>{task}</code>, nats) and how that on text that has nothing to do with it "
    "(<code>{general}</code>), with paired bootstrap intervals. An edit that is about the task "
    'raises the first more than the second: its ratio is large. <span class="key kept"></span> '
    'edits, <span class="key chance"></span> controls with shuffled channels. The ratio\'s range '
    "is that of the two intervals' ends."
)


def edits_section(measured: Measured | None) -> str:
    """Change in task loss beside change in general loss for every edit; empty for none."""
    if measured is None:
        return ""
    edits = measured.edits()
    shown = edits[: 2 * MAX_ROWS]
    task, general = ([getattr(e, which) for e in shown] for which in ("task", "general"))
    axis = Axis.over((v for c in (*task, *general) if c is not None for v in c[:3]), include=(0.0,))
    rows, previous = [], None
    for e in shown:
        css = "rule" if previous not in (None, e.edit) else ""
        previous = e.edit
        rows.append(
            f'<tr class="{css}"><th scope="row">{text(e.edit, 30)}'
            f"{' <small>control</small>' if e.control else ''}</th>"
            f"<td>{text(e.kind, 30)}</td><td>{e.alpha:g}</td>"
            f'<td class="strips half">{_strip(e.task, e.control, axis)}</td>'
            f'<td class="strips half">{_strip(e.general, e.control, axis)}</td>'
            f"<td>{_ratio(e)}</td><td>{_p(e.task)}</td></tr>"
        )
    ticks = f'<div class="valued">{strip_axis(axis)}<span></span></div>'
    rows.append(
        '<tr class="axis"><th></th><td></td><td></td>'
        f'<td class="strips half">{ticks}</td><td class="strips half">{ticks}</td>'
        "<td></td><td></td></tr>"
    )
    head = ["", "edit", "α", '<span class="strips">task loss, change</span>',
            '<span class="strips">general loss, change</span>', "ratio", "p (task)"]  # fmt: skip
    names = {"task": text(measured.task or "none", 60), "general": text(measured.general, 60)}
    return section(
        "edits",
        "Edits guided by the autoencoders",
        _HOW.format(**names),
        table(head, rows, "wide"),
        left_out(len(shown), len(edits), "edits", "in the order of the run"),
        "".join(f'<p class="note">{line}</p>' for line in edits_in_words(measured)),
    )


def edits_in_words(measured: Measured | None) -> list[str]:
    """Whether each edit is more about the task than its control of the same kind and strength."""
    found = [] if measured is None else measured.edits()
    lines = []
    for name, mine in itertools.groupby((e for e in found if not e.control), lambda e: e.edit):
        strengths = list(mine)
        judged = [
            (e.alpha, e.ratio, c.ratio)
            for e in strengths
            for c in _controls_of(e, found)
            if e.ratio is not None and c.ratio is not None
        ]
        if not judged:
            known = [f"α {e.alpha:g}: {e.ratio[0]:.2f}" for e in strengths if e.ratio is not None]
            if known:
                lines.append(
                    f"<b>{text(name)}</b> has no control of its kind (change of the task's loss by "
                    f"that of general loss, {'; '.join(known)})."
                )
            continue
        beaten = [own for _, own, chance in judged if own[1] > chance[2]]
        said = "; ".join(f"α {a:g}: {own[0]:.2f} against {c[0]:.2f}" for a, own, c in judged)
        if len(beaten) == len(judged):
            verdict = "is more about the task than its control with shuffled channels"
        elif beaten:
            verdict = "is more about the task than its control at some strengths only"
        else:
            verdict = "is not shown to be more about the task than its control"
        lines.append(
            f"<b>{text(name)}</b> {verdict} (change of the task's loss by that of general loss, "
            f"{said})."
        )
    return lines


def summarise_edits(measured: Measured | None) -> list[dict[str, Any]] | None:
    """The entries of `summary.json`; None where nothing was measured."""
    if measured is None:
        return None
    return [
        {
            "name": e.name,
            "edit": e.edit,
            "kind": e.kind,
            "alpha": e.alpha,
            "control": e.control,
            "task_loss": _entry(e.task),
            "general_loss": _entry(e.general),
            "ratio": None if e.ratio is None else e.ratio[0],
        }
        for e in measured.edits()
    ]


def _controls_of(edit: MeasuredEdit, found: Sequence[MeasuredEdit]) -> list[MeasuredEdit]:
    return [c for c in found if c.control and (c.kind, c.alpha) == (edit.kind, edit.alpha)]


def _entry(change: Change | None) -> dict[str, float | None] | None:
    if change is None:
        return None
    named = {"change": change.difference, "low": change.low, "high": change.high}
    return {**{k: v if v == v else None for k, v in named.items()}, "p": change.p}


def _strip(change: Change | None, control: bool, axis: Axis) -> str:
    if change is None:
        return "–"
    css = "chance" if control else "kept"
    title = f"{change.difference:+.4f} ({change.low:+.4f} to {change.high:+.4f})"
    sure = change.p is not None and change.p <= LEVEL
    marks = [
        Mark("bar", css, change.low, change.high),
        Mark("dot" if sure else "ring", css, change.difference, title=title),
    ]
    value = f"{change.difference:+.3f}".replace("-", "−")
    return f'<div class="valued">{strip(marks, axis)}<span>{value}</span></div>'


def _ratio(edit: MeasuredEdit) -> str:
    if edit.ratio is None:
        return "–"
    value, low, high = edit.ratio
    return f"<b>{value:.2f}</b> <small>{low:.2f} to {high:.2f}</small>"


def _p(change: Change | None) -> str:
    if change is None or change.p is None:
        return "–"
    return "&lt; 1e-16" if change.p < 1e-16 else f"{change.p:.2g}"
