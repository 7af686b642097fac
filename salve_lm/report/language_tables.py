"""The closing tables of a language run on the screen, none wider than 80 characters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_language_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Layers, variants, the verdicts in words, and where everything is."""
    console = Console()
    console.print(_layers(summary))
    console.print(_variants(summary))
    for verdict in summary["verdicts"]:
        console.print(f"{verdict['metric']}: {verdict['words']}", markup=False, highlight=False)
    found = summary["projection"]
    if found is not None:
        console.print(
            f"Projection keeps {100 * found['retained_energy']:.1f} % of the task vector's energy; "
            f"k/d is {100 * found['k_over_d']:.1f} %.",
            highlight=False,
        )
    console.print(f"Everything above: {path}", markup=False)
    console.print(f"The report: {summary['report']}", markup=False)


def _layers(summary: Mapping[str, Any]) -> Table:
    shown = Table(title=f"Layers by {summary['chosen_by']}", title_justify="left", padding=(0, 1))
    for column in ("layer", "score", "interval", "shift", "attribution", "gain", "chosen"):
        shown.add_column(column, justify="right")
    for e in summary["layers"]:
        shown.add_row(
            str(e["layer"]),
            _figure(e["score"]),
            f"{e['ci'][0]:.3f} .. {e['ci'][1]:.3f}",
            _figure(e["latent_shift"]),
            _figure(e["attribution"]),
            _figure(e["measured_gain"], "+.4f"),
            "yes" if e["selected"] else "",
        )
    return shown


def _variants(summary: Mapping[str, Any]) -> Table:
    shown = Table(title=f"{summary['metric']}", title_justify="left", padding=(0, 1))
    for column in ("variant", "overall", "general loss"):
        shown.add_column(column, justify="left" if column == "variant" else "right")
    for name, value in summary["accuracy"].items():
        if name == "random_layers":
            overall = sorted(v["overall"] for v in value)
            if overall:
                between = f"{overall[0]:.4f} .. {overall[-1]:.4f}"
                shown.add_row(f"{len(overall)} other layer sets", between, "")
        elif value is not None:
            loss = summary["general_loss"].get(name)
            shown.add_row(name.replace("_", " "), f"{value['overall']:.4f}", _figure(loss, ".4f"))
    return shown


def _figure(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else f"{value:{form}}"
