"""The sections of the report that hold the run's figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from salve_lm.report.limits import MAX_CONTROLS, MAX_EDITS, MAX_ROWS, WORST_FIRST, most_telling
from salve_lm.report.markup import (
    bar,
    finite,
    left_out,
    percent,
    row,
    section,
    strength,
    table,
    text,
)
from salve_lm.report.material import Material
from salve_lm.report.verdict import TOLERANCE, TRIVIAL, effects

KINDS = {
    "DecoderGuided": "scales the class's weights along the channels that its latent writes to",
    "LatentContrastErasure": "one rank-one change of all rows: takes out what sets the class apart",
    "DirectionalAblation": "projects the latent's direction out of the weights",
    "DiscriminantErasure": "the same along the discriminant of the activations, without an SAE",
    "RankOneHead": "a rank-one update of the head",
    "Steering": "adds a multiple of the latent's direction, folded into the bias",
}
LABELS = {
    "removed": ("●", "neither a refitted head nor nearest neighbours find the class"),
    "linearly erased": ("◐", "a linear probe no longer finds the class, something else still may"),
    "suppressed": ("○", "the output hides the class, the features still hold it"),
    "not suppressed": ("–", "the class is still called often"),
}


def edits_section(material: Material, summary: Mapping[str, Any]) -> str:
    """The headline edits class by class, the controls beside them."""
    names = list(dict.fromkeys(e["edit"] for e in summary["edits"]))
    tables = "".join(_edit_table(n, material, summary) for n in names[:MAX_EDITS])
    return section(
        "edits",
        "What each edit did",
        "Accuracy in %, <b>held out</b>; strength α was chosen on training data. Pale bar: before; "
        'full bar: after. <span class="key target"></span> the class edited, '
        '<span class="key others"></span> all other classes. <b>flip α</b>: median strength at '
        "which a sample loses its class; <b>floor</b>: lowest target accuracy any strength "
        "reaches.",
        '<div class="split"><div>',
        tables,
        left_out(min(len(names), MAX_EDITS), len(names), "edits", "in the order of the sweep"),
        f"</div><aside>{_controls(material, summary)}{_legend(material)}</aside></div>",
    )


def _edit_table(name: str, material: Material, summary: Mapping[str, Any]) -> str:
    mine = [e for e in summary["edits"] if e["edit"] == name]
    shown = set(most_telling(mine, MAX_ROWS))
    own = mine[0]["kind"] == "DecoderGuided" and mine[0]["direction"] == "suppress"
    floors = summary["floor"] if own else {}
    # the same columns in every table, so that they stand under each other
    has_floor, labelled = bool(summary["floor"]), bool(material.removal)
    has_flip = any(flip_of(e, summary) is not None for e in summary["edits"])
    head = ["class", "latent", "α"]
    head += ['<span title="median strength at which a sample loses its class">flip α</span>'] * (
        has_flip
    )
    head += ["target", "others"]
    head += ["<span title='lowest target accuracy any strength reaches'>floor</span>"] * has_floor
    head += ["label"] * labelled
    rows = []
    for e in mine:
        if e["target_class"] not in shown:
            continue
        entry = material.removal.get(e["name"])
        cells = [_latents(e["feature"]), _strength(e)]
        cells += [strength(flip_of(e, summary))] * has_flip
        cells += [
            bar(e["target_accuracy_before"], e["target_accuracy_after"], "target") + _bounds(entry),
            bar(e["other_accuracy_before"], e["other_accuracy_after"], "others"),
        ]
        cells += [percent(floors.get(e["target_class"]))] * has_floor
        cells += [_label(entry)] * labelled
        rows.append(row(text(e["target_class"], 28), *cells))
    kind = KINDS.get(mine[0]["kind"], "")
    caption = f"<b>{text(name)}</b> {text(mine[0]['kind'])}{': ' + kind if kind else ''}"
    note = left_out(len(rows), len(mine), "classes", WORST_FIRST)
    return table(head, rows, "edits", caption) + note


def _strength(edit: Mapping[str, Any]) -> str:
    if not edit["alpha"]:
        return "none"
    idle = "<br><small>no gain in training</small>" * (edit.get("raised_on_training") is False)
    return strength(edit["alpha"]) + idle


def flip_of(edit: Mapping[str, Any], summary: Mapping[str, Any]) -> Any:
    """Median flip threshold of an edit, where the run's thresholds are about this very edit."""
    found = summary["alpha_crit"].get(edit["target_class"])
    same = (
        found is not None
        and edit["kind"] == "DecoderGuided"
        and edit["direction"] == "suppress"
        and edit["rows"] == "class"
        and found["feature"] == edit["feature"]
    )
    return found["flip_median"] if same else None


def _latents(feature: int | Sequence[int]) -> str:
    if isinstance(feature, int):
        return str(feature)
    first = " ".join(map(str, feature[:3]))
    return first if len(feature) <= 3 else f"{first} <small>+{len(feature) - 3}</small>"


def _bounds(entry: Mapping[str, Any] | None) -> str:
    after = (entry or {}).get("target_after")
    if not isinstance(after, dict) or finite(after.get("low")) is None:
        return ""
    n = f", n = {after['n']}" if "n" in after else ""
    title = f"95 % Clopper-Pearson bounds{n}"
    return (
        f'<small class="bounds" title="{title}">{percent(after["low"])} to '
        f"{percent(after['high'])}</small>"
    )


def _label(entry: Mapping[str, Any] | None, figures: bool = True) -> str:
    if entry is None:
        return "–"
    name = str(entry["label"])
    mark, _ = LABELS.get(name, ("", ""))
    label = f'<span class="label">{mark} {text(name)}</span>'
    if not figures:
        return label
    known = finite(entry.get("recoverability"))
    share = finite(entry.get("runner_up_share"))
    left = "–" if known is None else f"{known:.2f}"
    return f"{label}<small>R {left}, runner-up {percent(share, 0)} %</small>"


def _controls(material: Material, summary: Mapping[str, Any]) -> str:
    """Edits and controls in one table, so that one look compares them."""
    entries = [
        (e.name, e.direction, e.target, e.worst, e.others, "headline") for e in effects(summary)
    ]
    controls = list(summary["controls"].items())
    for name, c in controls[:MAX_CONTROLS]:
        about = material.controls.get(name)
        css = "trivial" if about and about.kind in TRIVIAL else ""
        direction = about.direction if about else "suppress"
        target, worst = c["target_accuracy_after"], c["worst_target_accuracy_after"]
        entries.append((name, direction, target, worst, c["other_accuracy_after"], css))
    parts = []
    for direction in dict.fromkeys(e[1] for e in entries):
        mine = [e for e in entries if e[1] == direction]
        mine.sort(key=lambda e: (finite(e[2]) or 0.0) * (-1 if direction == "enhance" else 1))
        rows = [
            row(
                text(name, 30),
                f"<b>{percent(target)}</b> <small>({percent(worst)})</small>",
                f"<b>{percent(others)}</b>",
                css=css,
            )
            for name, _, target, worst, others, css in mine
        ]
        verb = "raise" if direction == "enhance" else "lower"
        caption = f"<b>All edits that {verb} a class</b> mean over classes (worst class)"
        parts.append(table(["edit or control", "target", "others"], rows, "controls", caption))
    note = (
        '<p class="note"><b>Bold rows</b>: edits of this report. <span class="dagger">†</span> '
        "needs no autoencoder: an edit worth its name does better than these. In the verdict, "
        f"figures within {100 * TOLERANCE:g} point count as the same.</p>"
    )
    return (
        "".join(parts)
        + note
        + left_out(
            min(len(controls), MAX_CONTROLS), len(controls), "controls", "in the order of the sweep"
        )
    )


def _legend(material: Material) -> str:
    if not material.removal:
        return (
            '<div class="box"><h3>Not measured: what the features still hold</h3><p>A class can be '
            "hidden at the output and still be in the features. This run has no entries in "
            "<code>sweep/removal.json</code>, so its edits carry no label.</p></div>"
        )
    entries = "".join(
        f"<dt>{mark} {name}</dt><dd>{meaning}</dd>" for name, (mark, meaning) in LABELS.items()
    )
    return (
        f'<div class="box"><h3>What the labels mean</h3><dl>{entries}</dl><p><b>R</b> '
        "(recoverability): how well a linear probe finds the class after the edit, against before: "
        "1 all there, 0 gone. <b>Runner-up</b>: share of changed predictions that went to the "
        "sample's second choice; 100 % is the mark of hiding one output. <b>Small figures</b> "
        "under the target: 95 % Clopper-Pearson bounds.</p></div>"
    )


def removal_section(material: Material, summary: Mapping[str, Any], classes: Sequence[str]) -> str:
    """What probes still find in the features; empty where it was not measured."""
    if not material.removal:
        return ""
    headline = {e["edit"] for e in summary["edits"]}
    mine = [e for e in material.removal.values() if e["edit"] in headline]
    shown = [e for e in mine if e["target_class"] in set(classes)][: 2 * MAX_ROWS]
    controls: dict[str, list[Mapping[str, Any]]] = {}
    for e in material.removal.values():
        if e["edit"] not in headline:
            controls.setdefault(str(e["edit"]), []).append(e)
    head = ["label", "R", "probe AUROC", "refitted head", "nearest neighbours",
            "few images", "chance"]  # fmt: skip
    names = [f"{text(e['edit'], 24)}: {text(e['target_class'], 28)}" for e in shown]
    rows = [
        row(n, _label(e, figures=False), *_probes([e])) for n, e in zip(names, shown, strict=True)
    ]
    body = table(["edit", *head], rows, "probes")
    body += left_out(len(rows), len(mine), "edits", WORST_FIRST)
    if controls:
        rows = [
            row(text(name, 30), _counted(entries), *_probes(entries))
            for name, entries in list(controls.items())[:MAX_CONTROLS]
        ]
        caption = "<b>The controls</b> mean over classes"
        body += table(["control", *head], rows, "probes", caption)
    return section(
        "removal",
        "Is the class still in the features?",
        "What someone finds who is given the edited network's features: recall of the class, in % "
        "with 95 % bounds, by a linear head refitted on all training samples, by nearest "
        "neighbours, and by a head refitted on a few images a class.",
        body,
    )


def _probes(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cells of the probes' figures: of one edit, or the mean of several."""
    after = [e.get("after") or {} for e in entries]
    few = [v for a in after for v in a.get("few_shot") or []]
    r, auroc = (_mean(values) for values in (
        [e.get("recoverability") for e in entries], [a.get("auroc") for a in after]
    ))  # fmt: skip
    shares = []
    for key in ("refit", "knn"):
        found = [a.get(key) for a in after]
        one = found[0] if len(found) == 1 else None
        means = _mean([f.get("share") if isinstance(f, dict) else f for f in found])
        shares.append(_share(one) if one is not None else f"<b>{percent(means)}</b>")
    return [
        "–" if r is None else f"{r:.2f}",
        "–" if auroc is None else f"{auroc:.3f}",
        *shares,
        percent(_mean(few)),
        percent(_mean([a.get("chance") for a in after])),
    ]


def _counted(entries: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(str(e["label"]) for e in entries)
    return ", ".join(f"{n} × {text(label)}" for label, n in counts.most_common())


def _mean(values: Iterable[Any]) -> float | None:
    known = [v for v in map(finite, values) if v is not None]
    return sum(known) / len(known) if known else None


def _share(value: Any) -> str:
    if not isinstance(value, dict):
        return percent(value)
    low, high = percent(value.get("low")), percent(value.get("high"))
    return f"<b>{percent(value.get('share'))}</b><small>{low} to {high}</small>"
