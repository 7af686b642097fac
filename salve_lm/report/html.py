"""`report.html`: what a run found, on one page that needs nothing but a browser."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import salve_lm
from salve_lm.errors import CorruptFile
from salve_lm.report.cards import Cards, cards_section, read_cards
from salve_lm.report.figures import curves_section, side_effects_section, thresholds_section
from salve_lm.report.limits import IMAGE_BYTES, MAX_BYTES, MAX_ROWS, most_telling
from salve_lm.report.markup import clip, finite, percent, text
from salve_lm.report.material import Material, read_material
from salve_lm.report.provenance import data_name, model_name, provenance_section
from salve_lm.report.results import edits_section, removal_section
from salve_lm.report.verdict import judge

REPORT = "report.html"
NAVIGATION = {
    "edits": "Edits",
    "removal": "Features",
    "curves": "Curves",
    "thresholds": "Thresholds",
    "side-effects": "Side effects",
    "cards": "Feature cards",
    "repeat": "Repeat",
}


def render_report(run: str | Path, summary: Mapping[str, Any]) -> str:
    """The page of `run`, at most 20 MB.

    Args:
        run: folder of a finished run, which `summary` was made from.
        summary: what `summarise_run` returns.

    Raises:
        CorruptFile: a file of the run is damaged, foreign or of another version.
        MissingFile: an image that `cards/cards.json` names is not there.
    """
    run = Path(run)
    cards = read_cards(run)
    material = read_material(run, summary, most_telling(summary["edits"], MAX_ROWS))
    try:
        for budget in (IMAGE_BYTES, IMAGE_BYTES // 4, 0):
            page = _page(material, summary, cards, budget)
            if len(page.encode()) <= MAX_BYTES:
                break
        return page
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
        if isinstance(e, CorruptFile):
            raise
        raise CorruptFile(run, f"not what the stages write ({e!r})", "Run the stages again.") from e


def _page(material: Material, summary: Mapping[str, Any], cards: Cards | None, budget: int) -> str:
    shown = most_telling(summary["edits"], MAX_ROWS)
    latents = [e["feature"] for e in summary["edits"] if isinstance(e["feature"], int)]
    body = "".join(
        [
            edits_section(material, summary),
            removal_section(material, summary, shown),
            curves_section(material, summary),
            thresholds_section(material, summary),
            side_effects_section(material, summary),
            cards_section(cards, list(dict.fromkeys(latents)), budget),
            provenance_section(material, summary),
        ]
    )
    links = "".join(
        f'<a href="#{anchor}">{title}</a>'
        for anchor, title in NAVIGATION.items()
        if f'id="{anchor}"' in body
    )
    style = resources.files("salve_lm.report").joinpath("page.css").read_text()
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    title = _title(material)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="generator" content="salve_lm {salve_lm.__version__}">'
        f"<title>{title}: what the edits did</title><style>{style}</style></head><body>"
        f"<header><p class='eyebrow'>Edit report<span>{text(material.name)}, {made}</span></p>"
        f"<h1>{title}</h1><p class='what'>{_what(material, summary)}</p>"
        f"{_facts(summary)}{_verdict(material, summary)}<nav>{links}</nav></header>"
        f"<main>{body}</main><footer>salve_lm {salve_lm.__version__}. Figures: summary.json in the "
        "same folder. This file needs no network.</footer></body></html>\n"
    )


def _title(material: Material) -> str:
    data = data_name(material)
    return clip(model_name(material)) + (f" on {clip(data)}" if data else "")


def _what(material: Material, summary: Mapping[str, Any]) -> str:
    """What was done, in plain words."""
    sae, features = summary["sae"], material.features
    site = (features.get("provenance") or {}).get("site", "")
    where = f" at <code>{text(site)}</code>" if site else ""
    width = f" with {features['d_sae']:,} latents" if "d_sae" in features else ""
    n = len({e["target_class"] for e in summary["edits"]})
    directions = {e["direction"] for e in summary["edits"]}
    verbs = [v for k, v in (("suppress", "switch off"), ("enhance", "strengthen"))
             if k in directions]  # fmt: skip
    classes = f"each of {n} classes" if n > 1 else "one class"
    return (
        f"A sparse autoencoder ({text(sae['architecture'])}{width}) learned the network's "
        f"activations{where}; the latents that stand for a class then told which weights to change "
        f"to {' or '.join(verbs) or 'change'} {classes} for good, without retraining."
    )


def _facts(summary: Mapping[str, Any]) -> str:
    sae, exported = summary["sae"], summary["exported"]
    variance, l0 = finite(sae["explained_variance"]), finite(sae["l0"])
    facts = [
        (f"{percent(summary['baseline']['accuracy'])} %", "held-out accuracy, unedited"),
        ("–" if variance is None else f"{variance:.3f}", "variance the autoencoder explains"),
        ("–" if l0 is None else f"{l0:.0f}", "latents active per sample (L0)"),
        (f"{percent(sae['dead_fraction'])} %", "latents dead"),
        (
            "identical" if exported["matches_live"] else "DIFFERS",
            f"exported weights and the live edit ({text(exported['checked_on'], 80)})",
        ),
    ]
    cells = "".join(f"<div><dt>{meaning}</dt><dd>{value}</dd></div>" for value, meaning in facts)
    return f'<dl class="facts">{cells}</dl>'


def _verdict(material: Material, summary: Mapping[str, Any]) -> str:
    verdict = judge(summary, material.controls, material.removal)
    lines = "".join(f"<li>{line}</li>" for line in verdict.lines)
    return f'<div class="verdict {verdict.tone}"><p>{verdict.headline}</p><ul>{lines}</ul></div>'
