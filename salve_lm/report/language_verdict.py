"""What a language run found, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from salve_lm.commands.injection_variants import BASE, SELECTED
from salve_lm.report.language_edits import edits_in_words
from salve_lm.report.language_run import LanguageRun
from salve_lm.report.language_summary import general_task, is_loss
from salve_lm.report.markup import finite, percent, text
from salve_lm.report.verdict import Verdict
from salve_lm.specificity.judge import LEVEL, RankCorrelation


def judge_run(
    found: LanguageRun, summary: Mapping[str, Any], correlations: Sequence[RankCorrelation]
) -> Verdict:
    """Did the choice beat random layers, do scores foretell gains, what does a projection lose?"""
    verdicts = summary["verdicts"]
    beaten = [v for v in verdicts if v["beats_random"]]
    lines = [f"<code>{text(v['metric'], 80)}</code>: {text(v['words'], 2000)}" for v in verdicts]
    lines += [
        line
        for line in (
            _gained(found, summary),
            _scores(correlations),
            _projection(found, summary),
            _general(found, summary),
            *edits_in_words(found.measured),
        )
        if line
    ]
    chosen = ", ".join(map(str, found.selection.layers))
    noun = "Layer" if len(found.selection.layers) == 1 else "Layers"
    if not verdicts:
        return Verdict(
            "Nothing says whether the chosen layers beat other layers",
            "mixed",
            [
                "Run <code>inject</code> with <code>random_layers</code> among the controls and "
                "metrics to <code>judge</code>.",
                *lines,
            ],
        )
    if len(beaten) == len(verdicts):
        return Verdict(f"{noun} {chosen} beat other layers chosen at random", "good", lines)
    if beaten:
        names = ", ".join(text(v["metric"], 60) for v in beaten)
        headline = f"{noun} {chosen} beat random layers by {names}, but not by every metric judged"
        return Verdict(headline, "mixed", lines)
    judged = found.injection["verdicts"]
    if all(v["rank"] == 1 and v["smallest_p"] > LEVEL for v in judged):
        headline = (
            f"{noun} {chosen} did better than all {judged[0]['compared']} other sets of layers, "
            "which are too few to call that more than chance"
        )
        return Verdict(headline, "mixed", lines)
    return Verdict(
        f"The chosen {noun.lower()} {chosen} did not beat layers chosen at random",
        "bad",
        lines,
    )


def _gained(found: LanguageRun, summary: Mapping[str, Any]) -> str:
    metric = str(summary["metric"])
    values = {name: v["summary"][metric] for name, v in found.variants.items()}
    said = [f"unedited {_value(values[BASE], metric)}"]
    for name, words in (
        (SELECTED, "chosen layers"),
        ("least_specific", "least specific layers"),
        ("all_layers", "all layers"),
        ("finetuned", "the fine-tuned model"),
    ):
        if name in values:
            said.append(f"{words} {_value(values[name], metric)}")
    return f"<code>{text(metric, 80)}</code>: {', '.join(said)}."


def _scores(correlations: Sequence[RankCorrelation]) -> str:
    single = [c for c in correlations if c.kind == "single" and finite(c.spearman) is not None]
    if not single:
        return ""
    telling = [c for c in single if c.spearman_p <= LEVEL and c.spearman > 0]
    named = ", ".join(
        f"{text(c.score.replace('_', ' '))} {c.spearman:+.2f} (p {c.spearman_p:.2g})"
        for c in single
    )
    said = (
        f"{' and '.join(text(c.score.replace('_', ' ')) for c in telling)} foretold the gain"
        if telling
        else "No score foretold the gain"
    )
    return f"{said} of injecting single layers. Rank correlations: {named}."


def _projection(run: LanguageRun, summary: Mapping[str, Any]) -> str:
    found = summary["projection"]
    if found is None or run.projection is None:
        return ""
    kept, expected, ratio = (found[k] for k in ("retained_energy", "k_over_d", "ratio"))
    if 0.95 <= ratio <= 1.05:
        than = "about what a random subspace of the same rank keeps: the loss is that of dimension"
    elif ratio < 1:
        than = "less than a random subspace of the same rank: it loses more than dimension explains"
    else:
        than = "more than a random subspace of the same rank: it loses less than dimension explains"
    said = (
        f"Projected on the selected latents the task vector keeps {percent(kept)} % of its energy, "
        f"k/d is {percent(expected)} % (ratio {ratio:.2f}): {than}."
    )
    totals = [t for t in run.projection["totals"] if t["random_latents"] is not None]
    energy = sum(t["energy"] for t in totals)
    if energy:
        other = sum(t["energy"] * t["random_latents"]["mean"] for t in totals) / energy
        said += f" As many live latents drawn at random keep {percent(other)} % on average."
    return said


def _general(found: LanguageRun, summary: Mapping[str, Any]) -> str:
    losses, task = summary["general_loss"], general_task(found)
    if task is None or f"{task}/loss" == summary["metric"]:
        return ""
    changes = ", ".join(
        f"{words} {losses[name] - losses[BASE]:+.4f}"
        for name, words in ((SELECTED, "chosen layers"), ("all_layers", "all layers"))
        if name in losses
    )
    return (
        f"Loss on general text (<code>{text(task)}</code>), {losses[BASE]:.4f} nats per token "
        f"unedited, changed by: {changes}."
    )


def _value(value: float, metric: str) -> str:
    return f"{value:.4f}" if is_loss(metric) else f"{percent(value)} %"
