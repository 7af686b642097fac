"""Inline SVG of language runs: scores against gains, and strips of points and intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from salve_lm.report.markup import clip

WIDTH, HEIGHT = 300, 196
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 34, 34
_APART = 9  # pixels between the labels of two layers at the same place


class Axis(NamedTuple):
    """A linear axis with round ends; `ticks` from the one end to the other."""

    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Iterable[float], include: Sequence[float] = ()) -> Axis:
        """The axis that holds all finite `values`, and those in `include`."""
        known = [*(v for v in values if math.isfinite(v)), *include] or [0.0]
        low, high = min(known), max(known)
        span = high - low or abs(high) or 1.0
        rough = span / 4
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough * (1 - 1e-9))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(tuple(k * step for k in range(first, max(last, first + 1) + 1)))

    def place(self, value: float) -> float:
        """Where `value` lies, 0 to 1; held within the axis."""
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return min(max(share, 0.0), 1.0)

    def label(self, tick: float) -> str:
        """`tick` without digits that all ticks share no need of."""
        step = self.ticks[1] - self.ticks[0]
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return f"{tick:.{digits}f}".replace("-", "−") if abs(tick) > step * 1e-6 else "0"


class LayerPoint(NamedTuple):
    """A layer in a chart of scores against gains."""

    layer: int
    score: float
    low: float
    high: float
    gain: float
    chosen: bool


def score_chart(title: str, note: str, points: Sequence[LayerPoint], gains: Axis) -> str:
    """Score with its interval (across) against the measured gain (up), one point a layer.

    Args:
        title: name of the score.
        note: right of it, such as the rank correlation.
        points: chosen layers are filled.
        gains: the axis that charts of one run share.
    """
    across = Axis.over(v for p in points for v in (p.score, p.low, p.high))
    parts = [
        f'<text class="t" x="{LEFT}" y="13">{clip(title, 24)}</text>',
        f'<text class="n" x="{WIDTH - RIGHT}" y="13">{clip(note, 30)}</text>',
    ]
    for tick in gains.ticks:
        y = _y(tick, gains)
        css = "z" if abs(tick) < 1e-12 else "g"
        parts.append(
            f'<line class="{css}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="y" x="{LEFT - 5}" y="{y + 3:.1f}">{gains.label(tick)}</text>'
        )
    foot = HEIGHT - BOTTOM
    for tick in across.ticks:
        parts.append(
            f'<text class="x" x="{_x(tick, across):.1f}" y="{foot + 14}">'
            f"{across.label(tick)}</text>"
        )
    parts.append(f'<text class="x" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}">score</text>')
    for p in points:
        y = _y(p.gain, gains)
        parts.append(
            f'<line class="w" x1="{_x(p.low, across):.1f}" x2="{_x(p.high, across):.1f}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    labels: list[tuple[float, float]] = []
    for p in points:
        x, y = _x(p.score, across), _y(p.gain, gains)
        at = y - 6
        while any(abs(x - a) < 2 * _APART and abs(at - b) < _APART for a, b in labels):
            at -= _APART
        labels.append((x, at))
        css = "on" if p.chosen else "off"
        parts.append(
            f'<circle class="{css}" r="4" cx="{x:.1f}" cy="{y:.1f}"/>'
            f'<text class="x {css}" x="{x:.1f}" y="{at:.1f}">{p.layer}</text>'
        )
    return (
        f'<svg class="curve scores" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{clip(title, 60)} of each layer against its measured gain">'
        f"{''.join(parts)}</svg>"
    )


class Mark(NamedTuple):
    """Something at a place of a strip.

    kind: `dot`, `ring`, `tick` or `bar` (from `value` to `end`).
    css: class that colours it.
    title: shown when one points at it.
    shift: pixels below the middle.
    """

    kind: str
    css: str
    value: float
    end: float = math.nan
    title: str = ""
    shift: float = 0.0


def strip(marks: Sequence[Mark], axis: Axis, height: int = 18) -> str:
    """A row of marks on an axis that all rows of a table share; as wide as its cell."""
    middle = height / 2
    parts = [
        f'<line class="{"z" if abs(t) < 1e-12 else "g"}" x1="{_share(t, axis)}" '
        f'x2="{_share(t, axis)}" y1="0" y2="100%"/>'
        for t in axis.ticks
    ]
    parts += [_mark(m, axis, middle) for m in marks if math.isfinite(m.value)]
    return f'<svg class="strip marks" height="{height}" role="img">{"".join(parts)}</svg>'


def strip_axis(axis: Axis, factor: float = 1.0) -> str:
    """The labels under strips; `factor` 100 shows shares in percent."""
    scaled = Axis(tuple(factor * t for t in axis.ticks))
    labels = "".join(
        f'<text x="{_share(t, axis)}" y="11">{scaled.label(s)}</text>'
        for t, s in zip(axis.ticks, scaled.ticks, strict=True)
    )
    return f'<svg class="strip axis" height="15" aria-hidden="true">{labels}</svg>'


def _mark(mark: Mark, axis: Axis, middle: float) -> str:
    x = _share(mark.value, axis)
    middle += mark.shift
    if mark.kind == "bar":
        if not math.isfinite(mark.end):
            return ""
        width = 100 * (axis.place(mark.end) - axis.place(mark.value))
        drawn = (
            f'<rect class="{mark.css}" x="{x}" width="{max(width, 0.4):.2f}%" '
            f'y="{middle - 4}" height="8" rx="2"/>'
        )
    elif mark.kind == "tick":
        ends = f'y1="{middle - 5}" y2="{middle + 5}"'
        drawn = f'<line class="{mark.css}" x1="{x}" x2="{x}" {ends}/>'
    else:
        drawn = f'<circle class="{mark.css} {mark.kind}" cx="{x}" cy="{middle}" r="4.5"/>'
    return f"<g><title>{clip(mark.title, 100)}</title>{drawn}</g>" if mark.title else drawn


def _share(value: float, axis: Axis) -> str:
    return f"{100 * axis.place(value):.2f}%"


def _x(value: float, axis: Axis) -> float:
    return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def _y(value: float, axis: Axis) -> float:
    return HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM)
