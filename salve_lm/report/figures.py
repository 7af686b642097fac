"""The sections of the report that are pictures: curves, thresholds, side effects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from salve_lm.report.charts import LogAxis, axis_strip, box_strip, curve_chart
from salve_lm.report.limits import (
    MAX_CHARTS,
    MAX_COLUMNS,
    MAX_EDITS,
    MAX_ROWS,
    WORST_FIRST,
    most_telling,
)
from salve_lm.report.markup import finite, left_out, percent, row, section, strength, table, text
from salve_lm.report.material import Material
from salve_lm.report.results import flip_of

DEFINITIONS = {
    "flip": "the sample is no longer given its class",
    "exact": "the class's logit reaches zero",
    "linear": "the same, by the paper's linear formula",
}
SATURATED = 0.10  # change of accuracy at which a cell has its full colour


def curves_section(material: Material, summary: Mapping[str, Any]) -> str:
    """Small multiples: for every headline edit one chart a class, all on one scale."""
    parts = []
    for edit in list(dict.fromkeys(e["edit"] for e in summary["edits"]))[:MAX_EDITS]:
        mine = [e for e in summary["edits"] if e["edit"] == edit]
        read = [e for e in mine if (edit, e["target_class"], "val") in material.curves]
        kept = set(most_telling(read, MAX_CHARTS))
        shown = [e for e in read if e["target_class"] in kept]
        pairs = [
            [material.curves.get((edit, e["target_class"], split)) for split in ("train", "val")]
            for e in shown
        ]
        axis = LogAxis.over(a for pair in pairs for curve in pair if curve for a in curve.alpha)
        charts = "".join(
            curve_chart(
                e["target_class"], train, held_out, axis, e["alpha"], finite(flip_of(e, summary))
            )
            for e, (train, held_out) in zip(shown, pairs, strict=True)
        )
        parts.append(
            f'<div class="group"><h3>{text(edit)}</h3><div class="charts">{charts}</div>'
            f"{left_out(len(shown), len(mine), 'classes', WORST_FIRST)}</div>"
        )
    return section(
        "curves",
        "Accuracy against strength",
        'Accuracy in % against α (logarithmic, 0 at the left): <span class="key target"></span> '
        'the class edited, <span class="key others"></span> all others; solid held out, dashed '
        "training. Vertical line and dots: the strength chosen on training data. ▲ on the axis: "
        "median strength at which a held-out sample loses its class, computed in closed form.",
        *parts,
    )


def thresholds_section(material: Material, summary: Mapping[str, Any]) -> str:
    """Medians and quartiles of the critical strengths per class."""
    mine = [e for e in summary["edits"] if e["target_class"] in summary["alpha_crit"]]
    kept = set(most_telling(mine, MAX_ROWS)) if mine else set()
    entries = [t for t in material.thresholds if t["class"] in kept or not mine][:MAX_ROWS]
    values = [
        abs(v)
        for t in entries
        for name in DEFINITIONS
        for v in (_number(t.get(f"{name}_{q}")) for q in ("q25", "median", "q75"))
        if v is not None
    ]
    axis = LogAxis.over(values, margin=1.25)
    rows = []
    seen = {name: found["observed"] for name, found in summary["alpha_crit"].items()}
    for t in entries:
        boxes = [
            (name, [_number(t.get(f"{name}_{q}")) for q in ("q25", "median", "q75")])
            for name in DEFINITIONS
        ]
        medians = "<br>".join(strength(quartiles[1]) for _, quartiles in boxes)
        none = "<br>".join(percent(t.get(f"{name}_no_root_share")) for name in DEFINITIONS)
        rows.append(
            row(
                text(t["class"], 28),
                text(t["feature"], 12),
                str(t.get("samples", "–")),
                box_strip(boxes, axis),
                f'<span class="three">{medians}</span>',
                f'<span class="three">{none}</span>',
                percent(t.get("re_entry_share")),
                strength((seen.get(t["class"]) or {}).get("half_accuracy")),
            )
        )
    rows.append(f'<tr class="axis"><th></th><td></td><td></td><td>{axis_strip(axis)}</td>'
                f"{4 * '<td></td>'}</tr>")  # fmt: skip
    keys = "; ".join(
        f'<span class="key {name}"></span> <b>{name}</b>: {meaning}'
        for name, meaning in DEFINITIONS.items()
    )
    head = ["class", "latent", "samples", "α, logarithmic", "median", "never, %", "back, %", "seen"]
    return section(
        "thresholds",
        "How strongly the paper's edit must act",
        f"Critical strength of each held-out sample: median (tick) and quartiles (bar). {keys}. "
        "<b>never</b>: share of samples that no strength suffices for; <b>back</b>: share that "
        "regains its class at a larger strength; <b>seen</b>: strength at which the class's "
        "accuracy fell to half in the sweep.",
        table(head, rows, "thresholds"),
        left_out(len(entries), len(material.thresholds), "classes", WORST_FIRST),
    )


def side_effects_section(material: Material, summary: Mapping[str, Any]) -> str:
    """Edit and target x every class: change of its held-out accuracy in points."""
    before = summary["baseline"]["per_class"]
    names = list(before)
    edits = [e for e in summary["edits"] if (e["edit"], e["target_class"]) in material.side_effects]
    shown = edits[: 2 * MAX_ROWS]
    changes = [_changes(e, material, before) for e in shown]
    columns = _columns(names, changes, [e["target_class"] for e in shown])
    rows, previous = [], None
    for e, change in zip(shown, changes, strict=True):
        cells = [_cell(change[names[k]], own=names[k] == e["target_class"]) for k in columns]
        css = "first" if e["edit"] != previous and previous is not None else ""
        previous = e["edit"]
        attribute = f' class="{css}"' if css else ""
        rows.append(
            f'<tr{attribute}><th scope="row">{text(e["edit"], 20)}</th>'
            f'<th scope="row">{text(e["target_class"], 20)}</th>{"".join(cells)}</tr>'
        )
    head = ["edit", "of", *(text(names[k], 12) for k in columns)]
    total = len(summary["edits"])
    return section(
        "side-effects",
        "Side effects",
        "Change of every class's held-out accuracy, in points, at the chosen strength. Outlined: "
        'the class edited. <span class="key loss"></span> loses, <span class="key gain"></span> '
        f"gains; full colour from {100 * SATURATED:.0f} points.",
        table(head, rows, "heat"),
        left_out(len(columns), len(names), "classes across", "those that change most"),
        left_out(len(shown), total, "edits", WORST_FIRST),
    )


def _changes(
    edit: Mapping[str, Any], material: Material, before: Mapping[str, Any]
) -> dict[str, float | None]:
    after = material.side_effects[edit["edit"], edit["target_class"]]
    found = {}
    for (name, old), new in zip(before.items(), after, strict=True):
        known = finite(old) is not None and finite(new) is not None
        found[name] = new - old if known else None
    return found


def _columns(
    names: Sequence[str], changes: Sequence[Mapping[str, float | None]], targets: Sequence[str]
) -> list[int]:
    """The classes to show: all, or those that change most where they are not the target."""
    if len(names) <= MAX_COLUMNS:
        return list(range(len(names)))
    most = {
        name: max(
            (abs(c[name] or 0.0) for c, t in zip(changes, targets, strict=True) if t != name),
            default=0.0,
        )
        for name in names
    }
    kept = set(sorted(names, key=lambda n: -most[n])[:MAX_COLUMNS])
    return [k for k, n in enumerate(names) if n in kept]


def _cell(change: float | None, own: bool) -> str:
    css = "own" if own else ""
    if change is None:
        return f'<td class="{css}">–</td>'
    points = 100 * change
    if abs(points) < 0.05:
        return f'<td class="{css}"><span class="zero">·</span></td>'
    depth = min(abs(change) / SATURATED, 1.0)
    colour = "86,180,233" if change > 0 else "230,120,30"
    shade = f' style="background:rgba({colour},{0.12 + 0.68 * depth:.2f})"'
    sign = "+" if points > 0 else "−"
    digits = 0 if abs(points) >= 99.95 else 1
    return f'<td class="{css}"{shade}>{sign}{abs(points):.{digits}f}</td>'


def _number(value: Any) -> float | None:
    """A figure of `critical_thresholds.json`, in which infinity is written as text."""
    if value == "inf":
        return math.inf
    return float(value) if isinstance(value, int | float) and value == value else None
