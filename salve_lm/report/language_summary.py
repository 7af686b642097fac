"""`summary.json` of a language run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from salve_lm.commands.inject import LOSSES
from salve_lm.commands.injection_variants import BASE, SELECTED
from salve_lm.errors import BadConfig
from salve_lm.report.language_edits import summarise_edits
from salve_lm.report.language_run import LanguageRun
from salve_lm.specificity.judge import RankCorrelation, rank_correlations
from salve_lm.tasks.compare import ALL

# variants that are one each; random layers are a list
ONE_EACH = (
    BASE, "finetuned", SELECTED, "least_specific", "all_layers", "projected", "projected_rescaled",
    "random_subspace",
)  # fmt: skip
SHIFT, ATTRIBUTION = "latent_shift", "attribution"


def summarise_language_run(found: LanguageRun) -> dict[str, Any]:
    """The contents of `summary.json`, all but `report`; what was not measured is null.

    Shares are from 0 to 1, losses in nats per token. A gain is the metric after minus before, the
    other way round for losses, so that more is better.
    """
    metric = main_metric(found)
    correlations = correlate(found)
    return {
        "model": found.selection.model,
        "metric": metric,
        "chosen_by": found.selection.score,
        "layers": _layers(found, metric),
        "rank_correlation": {
            c.score: _number(c.spearman) for c in correlations if c.kind == "single"
        },
        "accuracy": _accuracy(found, metric),
        "tests": _tests(found, metric),
        "projection": _projection(found),
        "general_loss": general_loss(found),
        "edits": summarise_edits(found.measured),
        "exported": _exported(found),
        "verdicts": [
            {k: v[k] for k in ("metric", "beats_random", "p", "words")}
            for v in found.injection["verdicts"]
        ],
    }


def main_metric(found: LanguageRun) -> str:
    """`TASK/METRIC` that the run is read by: the first that was judged, else the first measured."""
    verdicts = found.injection["verdicts"]
    if verdicts:
        return str(verdicts[0]["metric"])
    task, about = next(iter(found.tasks.items()))
    return f"{task}/{(about['metrics'] or ['loss'])[0]}"


def is_loss(metric: str) -> bool:
    """Whether less of `metric` is better."""
    return metric.rsplit("/", 1)[-1].startswith(LOSSES)


def gains(found: LanguageRun, metric: str) -> dict[tuple[int, ...], float]:
    """Layers -> gain of injecting tau itself there at the edit's own strength; more is better."""
    sign = -1.0 if is_loss(metric) else 1.0
    before = found.variants[BASE]["summary"][metric]
    alpha = found.variants[SELECTED]["spec"]["init_args"]["alpha"]
    raw = ("selected", "all_layers", "random_layers", "single_layers", "all_but_one", "windows",
           "least_specific")  # fmt: skip
    return {
        tuple(v["layers"]): sign * (v["summary"][metric] - before)
        for v in found.variants.values()
        if v["kind"] in raw and v["spec"]["init_args"]["alpha"] == alpha
    }


def correlate(found: LanguageRun) -> list[RankCorrelation]:
    """Every score against every kind of measured gain; none where too few were measured."""
    measured = gains(found, main_metric(found))
    try:
        return rank_correlations(
            found.selection.scores, measured, int(found.selection.model["n_layers"])
        )
    except BadConfig:  # fewer than three single layers were injected
        return []


def general_task(found: LanguageRun) -> str | None:
    """The task of text that has nothing to do with the others."""
    return next(
        (
            name
            for name, about in found.tasks.items()
            if str(about["config"].get("class_path", "")).endswith(".TextLoss")
        ),
        None,
    )


def general_loss(found: LanguageRun) -> dict[str, float]:
    """Variant -> loss on general text, nats per token; empty where none was measured."""
    task = general_task(found)
    if task is None:
        return {}
    return {name: v["summary"][f"{task}/loss"] for name, v in found.variants.items()}


def per_subject(summary: Mapping[str, float], metric: str) -> dict[str, float]:
    """Subject -> value, from entries `METRIC/SUBJECT`."""
    start = f"{metric}/"
    return {k.removeprefix(start): v for k, v in summary.items() if k.startswith(start)}


def by_subject(found: LanguageRun, metric: str, variant: str) -> list[dict[str, Any]]:
    """Rows of the comparison of `variant` with the base model; the row `all` first."""
    task, name = metric.rsplit("/", 1)
    table = found.comparison
    mine = table[(table["task"] == task) & (table["metric"] == name) & (table["other"] == variant)]
    rows: list[dict[str, Any]] = mine.to_dict("records")
    return sorted(rows, key=lambda r: r["subject"] != ALL)


def _layers(found: LanguageRun, metric: str) -> list[dict[str, Any]]:
    selection, measured = found.selection, gains(found, metric)
    own = selection.record["rankings"][selection.score]
    return [
        {
            "layer": n,
            "score": own[str(n)]["estimate"],
            "ci": [own[str(n)]["low"], own[str(n)]["high"]],
            SHIFT: selection.scores.get(SHIFT, {}).get(n),
            ATTRIBUTION: selection.scores.get(ATTRIBUTION, {}).get(n),
            "measured_gain": measured.get((n,)),
            "selected": n in selection.layers,
        }
        for n in sorted(map(int, own))
    ]


def _accuracy(found: LanguageRun, metric: str) -> dict[str, Any]:
    def read(variant: Mapping[str, Any]) -> dict[str, Any]:
        summary = variant["summary"]
        return {"overall": summary[metric], "per_subject": per_subject(summary, metric)}

    accuracy: dict[str, Any] = {
        name: read(found.variants[name]) if name in found.variants else None for name in ONE_EACH
    }
    accuracy["random_layers"] = [
        {"layers": list(v["layers"]), **read(v)}
        for v in found.variants.values()
        if v["kind"] == "random_layers"
    ]
    return accuracy


def _tests(found: LanguageRun, metric: str) -> dict[str, dict[str, float | None]]:
    tests = {}
    for row in by_subject(found, metric, SELECTED):
        if row["subject"] == ALL:
            continue
        share = row["kind"] == "share"
        tests[row["subject"]] = {
            "z_unpooled": _number(row.get("z_wald")),
            "p_unpooled": _number(row.get("p_wald")),
            "mcnemar_p": _number(row["p"]) if share else None,
            "holm_p": _number(row.get("p_holm")),
        }
        if not share:  # a paired t test of means, and Wilcoxon's
            tests[row["subject"]] |= {"t_p": _number(row["p"]),
                                      "wilcoxon_p": _number(row["p_wilcoxon"])}  # fmt: skip
    return tests


def _projection(found: LanguageRun) -> dict[str, float] | None:
    if found.projection is None:
        return None
    kept, expected = found.projection["retained_energy"], found.projection["k_over_d"]
    return {
        "retained_energy": kept,
        "k_over_d": expected,
        "ratio": kept / expected if expected else 0.0,
    }


def _exported(found: LanguageRun) -> dict[str, Any]:
    """One weight file by its own hash where the record has it, else the folder by its digest."""
    record = found.exported
    files: Sequence[Mapping[str, Any]] = record["result"]["files"]
    path, sha256 = found.run / "exported", record["result"]["sha256"]
    if len(files) == 1 and files[0].get("sha256"):
        path, sha256 = path / files[0]["name"], files[0]["sha256"]
    return {
        "path": str(path),
        "sha256": sha256,
        "matches_live": (record.get("check") or {}).get("matches_live"),
        "rss_growth_mb": (record.get("memory") or {}).get("peak_growth_mb"),
    }


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
