"""The closing tables of a run on the screen, none wider than 80 characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

THRESHOLDS = {
    "flip": "flip_median",
    "linear": "linear_median",
    "exact": "exact_median",
    "centred": "exact_centred_median",
}


def print_summary(summary: dict[str, Any], path: Path) -> None:
    """Accuracy before and after, strengths, controls, thresholds, reachable floor, export."""
    console = Console()
    sae = summary["sae"]
    console.print(
        f"\nUnedited accuracy {pct(summary['baseline']['accuracy'])} %. "
        f"SAE {sae['architecture']}: explained variance {sae['explained_variance']:.3f}, "
        f"L0 {sae['l0']:.0f}, dead {pct(sae['dead_fraction'])} %."
    )
    for edit in dict.fromkeys(e["edit"] for e in summary["edits"]):
        console.print(_edits([e for e in summary["edits"] if e["edit"] == edit], summary["floor"]))
    console.print(_controls(summary["controls"]))
    console.print(_thresholds(summary["alpha_crit"]))
    exported = summary["exported"]
    verdict = "equals" if exported["matches_live"] else "DIFFERS from"
    console.print(
        f"Exported {exported['path']}; it {verdict} the live edit bit for bit "
        f"({exported['checked_on']})."
    )
    console.print(f"Everything above: {path}")
    if "report" in summary:
        console.print(f"The report: {summary['report']}")


def _edits(edits: list[dict[str, Any]], floor: dict[str, float | None]) -> Table:
    kind, name, direction = (edits[0][k] for k in ("kind", "edit", "direction"))
    has_floor = kind == "DecoderGuided" and direction == "suppress"
    table = _table(
        f"{name} ({kind}): held-out accuracy in %, strength chosen on training data",
        ["class", "latent", "alpha", "target", "others", *(["floor"] if has_floor else [])],
    )
    for e in edits:
        latents = e["feature"] if isinstance(e["feature"], list) else [e["feature"]]
        table.add_row(
            e["target_class"],
            " ".join(map(str, latents[:3])) + (" ..." if len(latents) > 3 else ""),
            f"{e['alpha']:g}" if e["alpha"] else "none",
            f"{pct(e['target_accuracy_before'])} → {pct(e['target_accuracy_after'])}",
            f"{pct(e['other_accuracy_before'])} → {pct(e['other_accuracy_after'])}",
            *([pct(floor.get(e["target_class"]))] if has_floor else []),
        )
    return table


def _controls(controls: dict[str, dict[str, float]]) -> Table:
    table = _table(
        "Controls: mean over classes (worst class), held-out accuracy in %",
        ["control", "target", "others"],
    )
    for name, c in controls.items():
        worst = pct(c["worst_target_accuracy_after"])
        target = f"{pct(c['target_accuracy_after'])} ({worst})"
        table.add_row(name, target, pct(c["other_accuracy_after"]))
    return table


def _thresholds(found: dict[str, dict[str, Any]]) -> Table:
    table = _table(
        "alpha_crit of the paper's edit: medians over the class's held-out samples",
        ["class", "latent", *THRESHOLDS, "seen", "no flip", "back"],
    )
    for name, t in found.items():
        seen = (t["observed"] or {}).get("half_accuracy")
        values = [*(t[key] for key in THRESHOLDS.values()), seen]
        table.add_row(
            name,
            str(t["feature"]),
            *map(_alpha, values),
            pct(t["no_root_share"]),
            pct(t["re_entry_share"]),
        )
    table.caption = (
        "flip: no longer the arg max; linear, exact: logit at zero; centred: exact, head without "
        "its mean row; seen: class accuracy halved in the sweep; no flip, back (flips back at a "
        "larger alpha): shares of samples in %"
    )
    table.caption_justify = "left"
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", padding=(0, 1))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _alpha(value: float | str | None) -> str:
    if isinstance(value, str):
        return value.replace("inf", "∞")
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def pct(share: float | None) -> str:
    """A share in percent; empty for None."""
    return "" if share is None else f"{100 * share:.1f}"
