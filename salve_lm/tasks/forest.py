"""One plot of a comparison: differences with intervals, by subject, as an SVG that stands alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from salve_lm.report.markup import clip
from salve_lm.tasks.compare import ALL

if TYPE_CHECKING:
    import pandas as pd

WIDTH, LEFT, RIGHT = 720, 190, 24
ROW, HEAD, FOOT, LEGEND = 22, 34, 30, 22
# told apart also without colour: each run has a mark of its own
_COLOURS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#a16207", "#475569")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2937}.h{font-weight:600}.a{font-weight:600}"
    ".n{fill:#6b7280;font-size:11px}.g{stroke:#e5e7eb}.z{stroke:#6b7280}"
    "@media(prefers-color-scheme:dark){svg{background:#111827}text{fill:#e5e7eb}.n{fill:#9ca3af}"
    ".g{stroke:#374151}.z{stroke:#9ca3af}}"
)


def forest_plot(table: pd.DataFrame, base: str) -> str:
    """An SVG of all rows of `compare_results`, one panel a task and metric.

    A filled mark: significant at 5 % (after Holm, for a subject). A mark without a line: too few
    problems for an interval.
    """
    others = list(dict.fromkeys(table["other"]))
    parts, y = _legend(others, base), LEGEND * len(others) + 24.0
    for task, metric in table[["task", "metric"]].drop_duplicates().itertuples(index=False):
        rows = table[(table["task"] == task) & (table["metric"] == metric)]
        panel, y = _panel(task, metric, rows.to_dict("records"), others, y)
        parts += panel
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" '
        f'width="{WIDTH}" height="{y:.0f}" role="img" '
        f'aria-label="differences from {clip(base, 100)}, with intervals">'
        f"<style>{_STYLE}</style>{''.join(parts)}</svg>\n"
    )


def _legend(others: Sequence[str], base: str) -> list[str]:
    parts = [f'<text class="n" x="8" y="14">difference from {clip(base, 60)}</text>']
    for i, other in enumerate(others):
        y = 24 + LEGEND * i + 8
        parts += [_mark(16, y, i, True), f'<text x="28" y="{y + 4}">{clip(other, 90)}</text>']
    return parts


def _panel(
    task: str, metric: str, rows: list[dict[str, Any]], others: Sequence[str], top: float
) -> tuple[list[str], float]:
    """The elements of one panel, and where it ends."""
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    factor, unit = (100, "points") if rows[0]["kind"] == "share" else (1, "")
    ends = [factor * row[k] for row in rows for k in ("low", "high", "difference")]
    ticks = _ticks([v for v in ends if math.isfinite(v)])
    low, high = ticks[0], ticks[-1]

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    height = ROW * max(1.0, 0.6 * len(others))
    first, bottom = top + HEAD, top + HEAD + height * len(subjects)
    parts = [
        f'<text class="h" x="8" y="{top + 20:.1f}">{clip(task, 30)}: {clip(metric, 30)}</text>'
    ]
    for tick in ticks:
        css = "z" if tick == 0 else "g"
        at = f"{x(tick):.1f}"
        parts.append(f'<line class="{css}" x1="{at}" x2="{at}" y1="{first}" y2="{bottom}"/>')
        parts.append(
            f'<text class="n" x="{at}" y="{bottom + 15}" text-anchor="middle">{tick:+g}</text>'
        )
    if unit:
        parts.append(f'<text class="n" x="{WIDTH - RIGHT - 34}" y="{top + 20:.1f}">{unit}</text>')
    for i, subject in enumerate(subjects):
        middle = first + height * (i + 0.5)
        css = ' class="a"' if subject == ALL else ""
        parts.append(f'<text{css} x="8" y="{middle + 4:.1f}">{clip(subject, 26)}</text>')
        for row in (r for r in rows if r["subject"] == subject):
            which = others.index(row["other"])
            y = middle + (which - (len(others) - 1) / 2) * 0.6 * ROW
            parts.append(_estimate(row, which, y, x, factor))
    return parts, bottom + FOOT


def _estimate(row: dict[str, Any], which: int, y: float, x: Any, factor: float) -> str:
    colour = _COLOURS[which % len(_COLOURS)]
    line = ""
    if math.isfinite(row["low"]):
        ends = f'x1="{x(factor * row["low"]):.1f}" x2="{x(factor * row["high"]):.1f}"'
        line = f'<line {ends} y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="2"/>'
    p = row["p"] if row["subject"] == ALL else row["p_holm"]
    title = f"{row['subject']}: {factor * row['difference']:+.4g}"
    mark = _mark(x(factor * row["difference"]), y, which, p <= 0.05)
    return f"<g><title>{clip(title, 80)}</title>{line}{mark}</g>"


def _mark(x: float, y: float, which: int, filled: bool) -> str:
    colour = _COLOURS[which % len(_COLOURS)]
    shape = (
        "M-4 0a4 4 0 108 0a4 4 0 10-8 0z",
        "M-4-4h8v8h-8z",
        "M0-5l5 9h-10z",
        "M0-5l5 5-5 5-5-5z",
    )
    fill = colour if filled else "#fff"
    path = shape[which % len(shape)]
    return (
        f'<path d="{path}" transform="translate({x:.1f} {y:.1f})" fill="{fill}" '
        f'stroke="{colour}" stroke-width="1.5"/>'
    )


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, zero among them, that hold all `values`."""
    low, high = min([0.0, *values]), max([0.0, *values])
    span = high - low or 1.0
    rough = span / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        last += 1
    return [round(i * step, 12) for i in range(first, last + 1)]
