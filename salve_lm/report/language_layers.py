"""The sections of a language report about layers: scores, their worth, latents with texts, SAEs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from salve_lm.report.language_charts import Axis, LayerPoint, score_chart
from salve_lm.report.language_run import LanguageRun
from salve_lm.report.language_summary import gains, is_loss
from salve_lm.report.limits import MAX_ROWS
from salve_lm.report.markup import clip, finite, left_out, percent, row, section, table, text
from salve_lm.specificity.judge import RankCorrelation
from salve_lm.specificity.windows import MARKS

MAX_LAYERS = 24  # with latents shown, the chosen ones first
MAX_LATENTS, MAX_WINDOWS = 6, 3
LONGEST_WINDOW = 240
FEWEST_POINTS = 3  # below that, a chart of scores against gains shows nothing
KINDS = {
    "single": "inject into that layer alone",
    "all_but_one": "leave out that layer alone",
    "windows": "inject into neighbouring layers",
}


def layers_section(
    found: LanguageRun, summary: Mapping[str, Any], correlations: Sequence[RankCorrelation]
) -> str:
    """Every score of every layer, with its interval, against the gain that was measured."""
    metric = str(summary["metric"])
    measured = {s[0]: g for s, g in gains(found, metric).items() if len(s) == 1}
    single = {c.score: c for c in correlations if c.kind == "single"}
    charts = ""
    if len(measured) >= FEWEST_POINTS:
        axis = Axis.over(measured.values(), include=(0.0,))
        rankings = found.selection.record["rankings"]
        for name, by_layer in rankings.items():
            points = [
                LayerPoint(
                    int(n), i["estimate"], i["low"], i["high"], measured[int(n)],
                    int(n) in found.selection.layers,
                )
                for n, i in by_layer.items()
                if int(n) in measured
            ]  # fmt: skip
            c = single.get(name)
            rho = None if c is None else finite(c.spearman)
            note = "" if c is None or rho is None else f"Spearman {rho:+.2f}, p {c.spearman_p:.2g}"
            charts += score_chart(name.replace("_", " "), note, points, axis)
    unit = "less nats per token" if is_loss(metric) else "as a share"
    lede = (
        "Every layer's specificity to the task against what injecting the task vector into that "
        f"layer alone gained in <code>{text(metric, 80)}</code> ({unit}, up is better). Points: "
        'layers, <span class="key target"></span> chosen, <span class="key others"></span> not; '
        "whiskers: interval from resampled documents. A score is worth something if its points "
        "rise to the right."
        if charts
        else "Single layers were not injected (control <code>single_layers</code>), so nothing "
        "says what the scores are worth."
    )
    return section(
        "layers",
        "Layer scores, and what they were worth",
        lede,
        f'<div class="two">{charts}</div>' if charts else "",
        _layer_table(found, summary),
        _correlation_table(correlations),
    )


def _layer_table(found: LanguageRun, summary: Mapping[str, Any]) -> str:
    rankings = found.selection.record["rankings"]
    others = [name for name in rankings if name != found.selection.score]
    rows = []
    shown = sorted(summary["layers"], key=lambda e: -e["score"])[:MAX_ROWS]
    for e in shown:
        contrast = rankings[found.selection.score][str(e["layer"])]["contrast"]
        rows.append(
            row(
                f"layer {e['layer']}",
                "chosen" if e["selected"] else "",
                _interval(e["score"], *e["ci"]),
                f"{contrast['low']:+.3f} to {contrast['high']:+.3f}",
                *(_of(rankings[name], e["layer"]) for name in others),
                _signed(e["measured_gain"]),
                css="chosen" if e["selected"] else "",
            )
        )
    head = ["", "", f"{text(found.selection.score)}, interval", "minus mean layer",
            *(text(n.replace("_", " ")) for n in others), "measured gain"]  # fmt: skip
    rule = found.selection.record["rule"]
    words = {
        "top_n": f"the {rule.get('n')} highest",
        "above_mean": "those whose interval lies above the mean layer",
        "threshold": f"those that score at least {rule.get('threshold')}",
    }.get(str(rule.get("rule")), str(rule))
    caption = f"<b>Layers</b> by {text(found.selection.score)}; chosen: {text(words, 80)}"
    return table(head, rows, "", caption) + left_out(
        len(shown), len(summary["layers"]), "layers", "highest scores first"
    )


def _correlation_table(correlations: Sequence[RankCorrelation]) -> str:
    if not correlations:
        return (
            '<p class="note">No rank correlation: it takes the measured gains of three single '
            "layers or more (control <code>single_layers</code>).</p>"
        )
    rows = [
        row(
            text(c.score.replace("_", " ")), KINDS[c.kind], str(c.n), _signed(c.spearman, 2),
            _p(c.spearman_p), _signed(c.kendall, 2), _p(c.kendall_p), text(c.words, 200),
        )
        for c in correlations
    ]  # fmt: skip
    head = ["score", "against the gain when one would", "n", "Spearman", "p", "Kendall", "p", ""]
    caption = "<b>Rank correlation</b> of score and gain; p from permuting the layers"
    return table(head, rows, "words", caption)


def features_section(found: LanguageRun) -> str:
    """Each layer's most task-specific latents, with the texts that fire them."""
    chosen = found.selection.layers
    frame = found.features
    layers = sorted({int(n) for n in frame["layer"]}, key=lambda n: (n not in chosen, n))
    parts = []
    for n in layers[:MAX_LAYERS]:
        mine = frame[(frame["layer"] == n) & (frame["rank"] < MAX_LATENTS)]
        rows = []
        for _, windows in mine.groupby("rank"):
            first = windows.iloc[0]
            texts = "".join(f"<p>{_window(t)}</p>" for t in windows["text"][:MAX_WINDOWS])
            rows.append(
                f'<tr><th scope="row">{int(first["latent"])}</th>'
                f"<td>{_signed(float(first['specificity']), 2)}</td>"
                f"<td>{percent(float(first['mass_share']))}</td>"
                f"<td>{float(first['task_mean']):.3g}</td>"
                f"<td>{float(first['reference_mean']):.3g}</td>"
                f'<td class="text">{texts}</td></tr>'
            )
        mark = "<small>chosen</small>" if n in chosen else ""
        head = ["latent", "specificity", "mass, %", "task", "reference", "strongest texts"]
        parts.append(f'<h3 class="layer-head">Layer {n}{mark}</h3>{table(head, rows, "latents")}')
    return section(
        "features",
        "Latents that stand for the task",
        "The latents most specific to the task: specificity (m<sub>task</sub> − m<sub>reference"
        "</sub>) / (m<sub>task</sub> + m<sub>reference</sub>), m the mean activation per token; "
        "their share of the layer's activation on the task; and the task texts in which they are "
        "strongest, with the <mark>token</mark> at which they fire.",
        *parts,
        left_out(min(len(layers), MAX_LAYERS), len(layers), "layers", "the chosen ones first"),
    )


def autoencoders_section(found: LanguageRun) -> str:
    """How good the SAEs are; empty for SAEs that were not trained in this run."""
    if not found.saes:
        return ""
    keys = ("explained_variance", "l0", "dead_fraction", "loss_recovered")
    rows = []
    for name, sae in list(found.saes.items())[:MAX_ROWS]:
        variance, l0, dead, recovered = (finite(sae.get(k)) for k in keys)
        rows.append(
            row(
                text(name),
                text(sae.get("architecture", "")),
                str(sae.get("d_sae", "–")),
                "–" if variance is None else f"{variance:.3f}",
                "–" if l0 is None else f"{l0:.1f}",
                percent(dead),
                percent(recovered),
            )
        )
    head = ["", "architecture", "latents", "explained variance", "L0", "dead, %",
            "loss recovered, %"]  # fmt: skip
    return section(
        "autoencoders",
        "Autoencoders",
        "On held-out text. Loss recovered: how much of the language model's loss remains when the "
        "layer's output is replaced by its reconstruction; 100 is all, 0 is none (zeros in its "
        "place).",
        table(head, rows),
        left_out(len(rows), len(found.saes), "autoencoders", "in order of the layers"),
    )


def _window(window: str) -> str:
    """A text on one line with its firing token marked, cut around it."""
    before, _, rest = str(window).replace("\n", "↵").partition(MARKS[0])
    token, _, after = rest.partition(MARKS[1])
    half = LONGEST_WINDOW // 2
    left = ("…" if len(before) > half else "") + before[-half:]
    right = after[:half] + ("…" if len(after) > half else "")
    return f"{clip(left, 10**6)}<mark>{clip(token, 200)}</mark>{clip(right, 10**6)}"


def _of(by_layer: Mapping[str, Any], layer: int) -> str:
    entry = by_layer.get(str(layer))
    return "–" if entry is None else _interval(entry["estimate"], entry["low"], entry["high"])


def _interval(estimate: float, low: float, high: float) -> str:
    return f"<b>{estimate:.3f}</b> <small>{low:.3f} to {high:.3f}</small>"


def _signed(value: float | None, digits: int = 4) -> str:
    number = finite(value)
    return "–" if number is None else f"{number:+.{digits}f}".replace("-", "−")


def _p(value: float) -> str:
    return "–" if value != value else f"{value:.2g}"
