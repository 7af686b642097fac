"""`report.html` of a language run: one page that needs nothing but a browser."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import salve_lm
from salve_lm.atomic import atomic_file
from salve_lm.commands.injection_variants import BASE, SELECTED
from salve_lm.errors import CorruptFile
from salve_lm.report.html import REPORT
from salve_lm.report.language_edits import edits_section
from salve_lm.report.language_layers import autoencoders_section, features_section, layers_section
from salve_lm.report.language_provenance import provenance_section
from salve_lm.report.language_run import LanguageRun, read_language_run
from salve_lm.report.language_summary import correlate, is_loss, summarise_language_run
from salve_lm.report.language_tables import print_language_summary
from salve_lm.report.language_variants import (
    projection_section,
    subjects_section,
    variants_section,
)
from salve_lm.report.language_verdict import judge_run
from salve_lm.report.markup import clip, percent, text
from salve_lm.specificity.judge import RankCorrelation

NAVIGATION = {
    "layers": "Layers",
    "variants": "Variants",
    "subjects": "Subjects",
    "projection": "Projection",
    "edits": "Edits",
    "features": "Latents",
    "autoencoders": "Autoencoders",
    "repeat": "Repeat",
}


def report_language_run(run: Path) -> dict[str, Any]:
    """Collect `run` into `run/summary.json` and `run/report.html`, and print what it found.

    Raises:
        MissingFile: a stage is missing; names the commands.
        CorruptFile: a file is damaged, foreign, or of another version.
        StaleStore: stages that do not belong together.
    """
    found = read_language_run(run)
    try:
        correlations = correlate(found)
        summary = summarise_language_run(found)
        page = render(found, summary, correlations)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
        if isinstance(e, CorruptFile):
            raise
        raise CorruptFile(run, f"not what the stages write ({e!r})", "Run the stages again.") from e
    summary["report"] = str(run / REPORT)
    with atomic_file(run / REPORT) as path:
        path.write_text(page, encoding="utf-8")
    with atomic_file(run / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    print_language_summary(summary, run / "summary.json")
    return summary


def render(
    found: LanguageRun, summary: Mapping[str, Any], correlations: Sequence[RankCorrelation]
) -> str:
    """The page."""
    body = "".join(
        [
            layers_section(found, summary, correlations),
            variants_section(found, summary),
            subjects_section(found, summary),
            projection_section(found),
            edits_section(found.measured),
            features_section(found),
            autoencoders_section(found),
            provenance_section(found, summary),
        ]
    )
    links = "".join(
        f'<a href="#{anchor}">{title}</a>'
        for anchor, title in NAVIGATION.items()
        if f'id="{anchor}"' in body
    )
    package = resources.files("salve_lm.report")
    style = "".join(package.joinpath(f).read_text() for f in ("page.css", "language.css"))
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    title = _title(found, summary)
    verdict = judge_run(found, summary, correlations)
    lines = "".join(f"<li>{line}</li>" for line in verdict.lines)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="generator" content="salve_lm {salve_lm.__version__}">'
        f"<title>{title}: which layers</title><style>{style}</style></head><body>"
        f"<header><p class='eyebrow'>Layer report<span>{text(found.name)}, {made}</span></p>"
        f"<h1>{title}</h1><p class='what'>{_what(found, summary)}</p>{_facts(found, summary)}"
        f'<div class="verdict {verdict.tone}"><p>{verdict.headline}</p><ul>{lines}</ul></div>'
        f"<nav>{links}</nav></header><main>{body}</main><footer>salve_lm "
        f"{salve_lm.__version__}. Figures: summary.json in the same folder. This file needs no "
        "network.</footer></body></html>\n"
    )


def _title(found: LanguageRun, summary: Mapping[str, Any]) -> str:
    task = str(summary["metric"]).split("/")[0]
    return f"{clip(_model(found))}: {clip(task)}"


def _model(found: LanguageRun) -> str:
    """The model by its public name, or by its last folders."""
    source = found.selection.model.get("source")
    if not source:
        return str(found.selection.model.get("model_type", "a language model"))
    return "/".join(Path(str(source)).parts[-2:])


def _what(found: LanguageRun, summary: Mapping[str, Any]) -> str:
    n = len(found.selection.layers)
    chosen = ", ".join(map(str, found.selection.layers))
    which = f"layer {chosen}" if n == 1 else f"layers {chosen}"
    score = text(found.selection.score.replace("_", " "))
    compared = len(summary["layers"])
    return (
        f"Sparse autoencoders of the residual stream behind {compared} layers told how specific "
        f"each layer's latents are to the task ({score}), and that chose {which}. What "
        f"fine-tuning had changed in {'it' if n == 1 else 'them'} was then added to the unedited "
        "model, and, for comparison, the same in other layers, projected, and at random."
    )


def _facts(found: LanguageRun, summary: Mapping[str, Any]) -> str:
    metric, exported = str(summary["metric"]), summary["exported"]
    values = {name: v["summary"][metric] for name, v in found.variants.items()}

    def shown(name: str) -> str:
        if name not in values:
            return "–"
        return f"{values[name]:.4f}" if is_loss(metric) else f"{percent(values[name])} %"

    same = {True: "identical", False: "DIFFERS", None: "not compared"}[exported["matches_live"]]
    facts = [
        (shown(BASE), f"{clip(metric)}, unedited"),
        (shown(SELECTED), f"with the task vector in {_layers(found)}"),
        (shown("finetuned"), "the fine-tuned model"),
        (_kept(summary), "of its energy kept by the selected latents (k/d)"),
        (same, "exported weights and the live edit"),
    ]
    cells = "".join(f"<div><dt>{meaning}</dt><dd>{value}</dd></div>" for value, meaning in facts)
    return f'<dl class="facts">{cells}</dl>'


def _layers(found: LanguageRun) -> str:
    n = len(found.selection.layers)
    return f"{n} of {found.selection.model['n_layers']} layers"


def _kept(summary: Mapping[str, Any]) -> str:
    found = summary["projection"]
    if found is None:
        return "–"
    return f"{percent(found['retained_energy'])} % <small>({percent(found['k_over_d'])} %)</small>"
