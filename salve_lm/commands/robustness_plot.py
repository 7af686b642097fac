"""The plot of a robustness study: every autoencoder a mark, the edit beside its controls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from salve_lm.commands.robustness_effects import ITSELF
from salve_lm.report.language_charts import Axis
from salve_lm.report.markup import clip

if TYPE_CHECKING:
    import pandas as pd

WIDTH, LEFT, GAP = 900, 200, 56
ROW, LANE, HEAD, FOOT = 12, 11, 58, 30
# (column, title, factor, values that the axis holds): what the three panels show
PANELS = (
    ("target", "edited class, % right", 100.0, (0.0, 100.0)),
    ("others_lost", "others, points lost", 100.0, (0.0, 1.0)),
    ("flip_median", "class-flip threshold, median", 1.0, (0.0,)),
)
CONTROLS = {ITSELF: "edit", "random_latent": "random latent", "permuted": "shuffled c"}
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2937}.h{font-weight:600}"
    ".n{fill:#6b7280;font-size:11px}.g{stroke:#e5e7eb}"
    ".m0{fill:#0b6e99}.m1{fill:none;stroke:#c2410c;stroke-width:1.3}"
    ".m2{fill:none;stroke:#6b7280;stroke-width:1.3}"
    "@media(prefers-color-scheme:dark){svg{background:#111827}text{fill:#e5e7eb}.n{fill:#9ca3af}"
    ".g{stroke:#374151}.m0{fill:#5eb3d9}.m1{stroke:#fb923c}.m2{stroke:#9ca3af}}"
)


def robustness_plot(effects: pd.DataFrame) -> str:
    """An SVG that stands alone.

    One row a class where there is one setting; one a setting, mean over the classes, where there
    are several. In a row a lane for the edit and for each control, in a lane a mark for each
    autoencoder.
    """
    table = effects.assign(others_lost=effects["others_before"] - effects["others"])
    by = "class" if table["setting"].nunique() == 1 else "setting"
    names = [p[0] for p in PANELS]
    marks = table.groupby(["edit", by, "control", "sae"], sort=False)[names].mean().reset_index()
    panels = [p for p in PANELS if marks[p[0]].notna().any()]
    width = (WIDTH - LEFT) / len(panels)
    parts, top = _legend([c for c in CONTROLS if c in set(marks["control"])]), 26.0
    for edit, mine in marks.groupby("edit", sort=False):
        controls = [c for c in CONTROLS if c in set(mine["control"])]
        rows = list(dict.fromkeys(mine[by]))
        height = len(rows) * (LANE * len(controls) + ROW)
        parts.append(f'<text class="h" x="8" y="{top + 18:.0f}">{clip(edit, 26)}</text>')
        for i, (column, title, factor, include) in enumerate(panels):
            left = LEFT + i * width
            values = mine.rename(columns={by: "row"}).assign(value=factor * mine[column])
            axis = Axis.over(values["value"], include)
            parts.append(f'<text class="n" x="{left:.0f}" y="{top + 18:.0f}">{title}</text>')
            parts += _panel(values, axis, rows, controls, (left, width - GAP, top + HEAD))
        for i, row in enumerate(rows):
            y = top + HEAD + (i + 0.5) * height / len(rows)
            parts.append(f'<text x="8" y="{y + 4:.1f}">{clip(row, 30)}</text>')
        top += HEAD + height + FOOT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0f}" '
        f'width="{WIDTH}" height="{top:.0f}" role="img" aria-label="effect of each edit with every '
        f'autoencoder"><style>{_STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _legend(controls: Sequence[str]) -> list[str]:
    parts, x = [], 12.0
    for i, control in enumerate(controls):
        parts.append(_mark(x, 13, i))
        parts.append(f'<text x="{x + 10}" y="17">{CONTROLS[control]}</text>')
        x += 34 + 7 * len(CONTROLS[control])
    parts.append(f'<text class="n" x="{x}" y="17">a mark is an autoencoder, held-out data</text>')
    return parts


def _panel(
    table: pd.DataFrame,
    axis: Axis,
    rows: Sequence[Any],
    controls: Sequence[str],
    place: tuple[float, float, float],
) -> list[str]:
    """Elements of one panel at `place`: left, width, top."""
    left, width, top = place
    lane = LANE * len(controls) + ROW
    bottom = top + lane * len(rows)
    parts = []
    for tick in axis.ticks:
        x = left + axis.place(tick) * width
        parts.append(
            f'<line class="g" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 8:.1f}" y2="{bottom:.1f}"/>'
            f'<text class="n" x="{x:.1f}" y="{top - 14:.1f}" text-anchor="middle">'
            f"{axis.label(tick)}</text>"
        )
    for record in table.to_dict("records"):
        if math.isnan(record["value"]):
            continue
        which = controls.index(record["control"])
        y = top + lane * rows.index(record["row"]) + ROW / 2 + LANE * (which + 0.5)
        title = f"{record['sae']}: {record['value']:.4g}"
        if math.isinf(record["value"]):  # no strength is enough
            drawn = f'<text class="n" x="{left + width + 8:.1f}" y="{y + 4:.1f}">∞</text>'
        else:
            drawn = _mark(left + axis.place(record["value"]) * width, y, which)
        parts.append(f"<g><title>{clip(title, 100)}</title>{drawn}</g>")
    return parts


def _mark(x: float, y: float, which: int) -> str:
    """Told apart also without colour: a disc, a ring, a cross."""
    if which < 2:
        return f'<circle class="m{which}" cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'
    return f'<path class="m2" d="M{x - 3:.1f} {y - 3:.1f}l6 6m0-6l-6 6"/>'
