"""The sections of a language report about injections: every variant, every subject, energies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from salve_lm.commands.injection_variants import BASE, SELECTED
from salve_lm.report.language_charts import Axis, Mark, strip, strip_axis
from salve_lm.report.language_run import LanguageRun
from salve_lm.report.language_summary import (
    by_subject,
    general_task,
    is_loss,
    per_subject,
)
from salve_lm.report.limits import MAX_COLUMNS, MAX_ROWS
from salve_lm.report.markup import finite, left_out, percent, row, section, table, text
from salve_lm.tasks.compare import ALL

LEVEL = 0.05
SHOWN_METRICS = 4


def variants_section(found: LanguageRun, summary: Mapping[str, Any]) -> str:
    """Every variant with its metrics, its paired difference from the base, and general loss."""
    metric = str(summary["metric"])
    rows_of = {name: by_subject(found, metric, name) for name in found.variants if name != BASE}
    whole = {name: rows[0] for name, rows in rows_of.items() if rows}
    share = next(iter(whole.values()))["kind"] == "share" if whole else False
    axis = Axis.over(
        (w[k] for w in whole.values() for k in ("low", "high", "difference")), include=(0.0,)
    )
    general, others = _metrics(found, metric)
    shown = list(found.variants)[: 2 * MAX_ROWS]
    rows, previous = [], None
    for name in shown:
        variant = found.variants[name]
        values = variant["summary"]
        mine = whole.get(name)
        css = "chosen" if name == SELECTED else ""
        if previous is not None and variant["kind"] != previous:
            css = f"{css} rule".strip()
        previous = variant["kind"]
        strips = "" if mine is None else strip(_difference(mine, name == SELECTED), axis)
        rows.append(
            f'<tr class="{css}"><th scope="row">{text(name.replace("_", " "), 34)}</th>'
            f"<td>{text(' '.join(map(str, variant['layers'])), 24)}</td>"
            f"<td><b>{_value(values[metric], share)}</b></td>"
            f'<td class="strips">{strips}</td>'
            f"<td>{_p(mine['p'] if mine else None)}</td>"
            + "".join(f"<td>{_value(values[m], m in share_metrics(found))}</td>" for m in others)
            + (f"<td>{_loss(values, found.variants[BASE]['summary'], general)}</td></tr>"
               if general else "</tr>")
        )  # fmt: skip
    filler = "<td></td>" * (1 + len(others) + bool(general))
    rows.append(f'<tr class="axis"><th></th><td></td><td></td><td class="strips">'
                f"{strip_axis(axis, 100 if share else 1)}</td>{filler}</tr>")  # fmt: skip
    unit = "points" if share else "nats per token"
    head = ["", "layers", text(metric, 34) + (", %" if share else ""),
            f'<span class="strips">change from base, {unit}</span>', "p",
            *(text(m, 26) + (", %" if m in share_metrics(found) else "") for m in others),
            *(["general loss"] if general else [])]  # fmt: skip
    better = "left" if is_loss(metric) else "right"
    return section(
        "variants",
        "Every variant",
        f"<code>{text(metric, 80)}</code> of each variant on the same problems, and its change "
        f"from the unedited model with the paired bootstrap interval ({better} is better; "
        '<span class="key kept"></span> the chosen layers, <span class="key chance"></span> the '
        "others). p: exact McNemar for shares of right answers, paired t test for means, not "
        "corrected for the number of variants."
        + (" General loss: nats per token on text that has nothing to do with the task."
           if general else ""),
        table(head, rows, "wide"),
        left_out(len(shown), len(found.variants), "variants", "in the order of the run"),
    )  # fmt: skip


def subjects_section(found: LanguageRun, summary: Mapping[str, Any]) -> str:
    """The chosen layers subject by subject, with intervals and Holm; other variants beside."""
    metric = str(summary["metric"])
    rows_of = by_subject(found, metric, SELECTED)
    if len(rows_of) < 2:
        return ""
    share = rows_of[0]["kind"] == "share"
    axis = Axis.over((r[k] for r in rows_of for k in ("low", "high", "difference")), include=(0.0,))
    rows = []
    for r in rows_of[: MAX_ROWS + 1]:
        every = r["subject"] == ALL
        cells = [
            str(r["n"]), _value(r["base"], share), f"<b>{_value(r['after'], share)}</b>",
            strip(_difference(r, True), axis), _interval(r, share), _p(r["p"]),
            f"<b>{_p(r.get('p_holm'))}</b>" if _below(r.get("p_holm")) else _p(r.get("p_holm")),
        ]  # fmt: skip
        if share:
            cells += [f"{_number(r.get('z_wald'), 2)}", _p(r.get("p_wald"))]
        line = row("all problems" if every else text(r["subject"]), *cells,
                   css="rule chosen" if every else "")  # fmt: skip
        rows.append(line.replace("<td><svg", '<td class="strips"><svg'))
    filler = "<td></td>" * (5 if share else 3)
    rows.append(f'<tr class="axis"><th></th><td></td><td></td><td></td><td class="strips">'
                f"{strip_axis(axis, 100 if share else 1)}</td>{filler}</tr>")  # fmt: skip
    test = "McNemar p" if share else "t test p"
    head = ["", "n", "base", "chosen layers", '<span class="strips">change</span>', "interval",
            test, "Holm p", *(["z unpooled", "p unpooled"] if share else [])]  # fmt: skip
    n = len(rows_of) - 1
    better = [r for r in rows_of[1:] if _below(r.get("p_holm")) and _gain(r, metric) > 0]
    worse = [r for r in rows_of[1:] if _below(r.get("p_holm")) and _gain(r, metric) < 0]
    return section(
        "subjects",
        "Subject by subject",
        f"The task vector in the chosen layers against the unedited model{', in %' * share}. Both "
        f"answer the same problems. After Holm's correction over {n} subjects, {len(better)} got "
        f"better and {len(worse)} worse (p ≤ {LEVEL})."
        + (" The unpooled z test is what papers print; it ignores that both answer the same "
           "problems." if share else ""),
        table(head, rows, "wide"),
        left_out(min(n, MAX_ROWS), n, "subjects", "in order of their names"),
        _subject_table(found, metric, share),
    )  # fmt: skip


def _subject_table(found: LanguageRun, metric: str, share: bool) -> str:
    """Every single variant by subject."""
    base = per_subject(found.variants[BASE]["summary"], metric)
    names = list(base)[:MAX_COLUMNS]
    singles = [
        n
        for n, v in found.variants.items()
        if v["kind"] not in ("random_layers", "windows", "all_but_one", "single_layers")
    ]
    rows = []
    for name in singles[:MAX_ROWS]:
        values = per_subject(found.variants[name]["summary"], metric)
        css = "chosen" if name == SELECTED else ""
        cells = (_value(values[n], share) for n in names)
        rows.append(row(text(name.replace("_", " ")), *cells, css=css))
    caption = f"<b>Variants by subject</b> {text(metric, 60)}{', %' if share else ''}"
    return table(["", *(text(n, 16) for n in names)], rows, "", caption) + left_out(
        len(names), len(base), "subjects", "in order of their names"
    )  # fmt: skip


def projection_section(found: LanguageRun) -> str:
    """What the projection keeps of every tensor, against what chance keeps."""
    data = found.projection
    if data is None:
        return section(
            "projection",
            "What the projection keeps",
            "No projection was injected (controls <code>projected</code> and "
            "<code>projected_rescaled</code>).",
        )
    tensors = data["tensors"]
    shown = [*data["totals"], *tensors][: 2 * MAX_ROWS]
    ends = [v for e in shown for v in (e["retained_energy"], e["random_subspace"]["high"],
            (e["random_latents"] or {}).get("high"), e["principal_components"])
            if v is not None]  # fmt: skip
    axis = Axis.over(ends, include=(0.0,))
    rows = []
    for e in shown:
        total = e["name"].startswith("layer ")
        rows.append(
            row(
                f"<b>{text(e['name'])}</b>" if total else text(_short(e["name"]), 40),
                f"{e['rank']} of {e['width']}",
                strip(_energies(e), axis, 26),
                f"<b>{percent(e['retained_energy'])}</b>",
                percent(e["k_over_d"]),
                f"{e['ratio']:.2f}",
                f"{e['random_subspace']['as_low']:.2g}",
                "–" if e["random_latents"] is None else percent(e["random_latents"]["mean"]),
                percent(e["principal_components"]),
                css="rule chosen" if total else "",
            ).replace("<td><svg", '<td class="strips"><svg')
        )
    filler = "<td></td>" * 6
    rows.append(f'<tr class="axis"><th></th><td></td><td class="strips">{strip_axis(axis, 100)}'
                f"</td>{filler}</tr>")  # fmt: skip
    head = ["", "rank", '<span class="strips">energy kept, %</span>', "kept, %", "k/d, %", "ratio",
            "p (as low)", "random latents, %", "principal, %"]  # fmt: skip
    dropped = len(data["untouched"])
    note = (
        f'<p class="note">{dropped} changed tensors read or write no residual stream (gains of '
        "norms), so that no projection applies to them; they are left out here and stay unedited "
        "in the projected variants.</p>"
        if dropped
        else ""
    )
    return section(
        "projection",
        "What the projection keeps",
        "Share of the task vector's energy in the span of the selected latents <span class=\"key "
        'kept"></span>, as the residual stream sees it. Beside it, <span class="key chance">'
        "</span> random subspaces of the same rank (bar: 95 %; tick: their mean, k/d exactly), "
        '<span class="key latents"></span> spans of as many random live decoder rows, <span '
        'class="key pca"></span> the principal components of the layer\'s activations. Ratio 1 is '
        "chance; p: share of random subspaces that keep no more.",
        table(head, rows, "wide"),
        left_out(len(shown), len(data["totals"]) + len(tensors), "tensors", "in their order"),
        note,
    )


def _energies(e: Mapping[str, Any]) -> list[Mark]:
    null, latents = e["random_subspace"], e["random_latents"]
    marks = [
        Mark("bar", "chance", null["low"], null["high"], "random subspaces", -6),
        Mark("tick", "chance", e["k_over_d"], title="k/d", shift=-6),
    ]
    if latents is not None:
        marks += [
            Mark("bar", "latents", latents["low"], latents["high"], "random live latents", 6),
            Mark("tick", "latents", latents["mean"], title="random live latents, mean", shift=6),
        ]
    if e["principal_components"] is not None:
        marks.append(Mark("tick", "pca", e["principal_components"], title="principal components"))
    return [*marks, Mark("dot", "kept", e["retained_energy"], title="selected latents")]


def _difference(r: Mapping[str, Any], own: bool) -> list[Mark]:
    css = "kept" if own else "chance"
    p = r["p"] if r["subject"] == ALL else r.get("p_holm")
    title = f"{r['difference']:+.4g} ({r['low']:+.4g} to {r['high']:+.4g})"
    return [
        Mark("bar", css, r["low"], r["high"]),
        Mark("dot" if _below(p) else "ring", css, r["difference"], title=title),
    ]


def share_metrics(found: LanguageRun) -> set[str]:
    """`TASK/METRIC` of those that are shares of right answers."""
    table_ = found.comparison[found.comparison["kind"] == "share"]
    return set(table_["task"] + "/" + table_["metric"])


def _metrics(found: LanguageRun, metric: str) -> tuple[str | None, list[str]]:
    """The metric of general text, and the other overall metrics besides `metric`."""
    task = general_task(found)
    general = None if task is None else f"{task}/loss"
    known = found.variants[BASE]["summary"]
    every = [f"{t}/{m}" for t, about in found.tasks.items() for m in about["metrics"]]
    others = [m for m in every if m in known and m not in (metric, general)]
    return (None if general == metric else general), others[:SHOWN_METRICS]


def _loss(after: Mapping[str, float], before: Mapping[str, float], name: str) -> str:
    change = after[name] - before[name]
    return f"{after[name]:.4f}" + (f" <small>{change:+.4f}</small>" if change else "")


def _interval(r: Mapping[str, Any], share: bool) -> str:
    factor, digits = (100, 1) if share else (1, 4)
    bounds = [finite(r[k]) for k in ("difference", "low", "high")]
    if None in bounds:
        return "–"
    change, low, high = (f"{factor * (v or 0.0):+.{digits}f}".replace("-", "−") for v in bounds)
    return f"{change} <small>{low} to {high}</small>"


def _value(value: float, share: bool) -> str:
    return percent(value) if share else f"{value:.4f}"


def _gain(r: Mapping[str, Any], metric: str) -> float:
    return -float(r["difference"]) if is_loss(metric) else float(r["difference"])


def _below(p: float | None) -> bool:
    return p is not None and p <= LEVEL


def _number(value: float | None, digits: int) -> str:
    number = finite(value)
    return "–" if number is None else f"{number:.{digits}f}".replace("-", "−")


def _p(value: float | None) -> str:
    number = finite(value)
    if number is None:
        return "–"
    return "&lt; 1e-16" if number < 1e-16 else f"{number:.2g}"


def _short(name: str) -> str:
    """A tensor's name from its layer's number on."""
    parts: Sequence[str] = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[at:]).removesuffix(".weight")
