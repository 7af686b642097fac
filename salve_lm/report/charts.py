"""Inline SVG: accuracy against strength, and strips of thresholds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from salve_lm.report.markup import clip, finite, strength
from salve_lm.report.material import Curve

WIDTH, HEIGHT = 230, 147
LEFT, RIGHT, TOP, BOTTOM = 26, 14, 20, 25
ZERO_GAP = 14  # pixels between the mark of alpha 0 and the smallest alpha of the logarithmic axis


class LogAxis(NamedTuple):
    """A logarithmic axis from `low` to `high`, as shares of its length."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float], margin: float = 1.0) -> LogAxis:
        """The axis that holds all finite, positive `values`, widened by the factor `margin`."""
        known = [v for v in values if v > 0 and math.isfinite(v)] or [1.0]
        low, high = min(known) / margin, max(known) * margin
        return cls(low, high) if high > low else cls(low / 3, high * 3)

    def place(self, value: float) -> float:
        """Where `value` lies, 0 to 1; outside of it for values beyond the ends."""
        return math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Powers of ten within the axis; 1, 3, 10 ... on a short one."""
        steps = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        within = [10.0**k for k in steps if self.low <= 10.0**k <= self.high]
        if len(within) < 2:
            fine = [m * 10.0**k for k in steps for m in (1, 2, 5)]
            within = [v for v in fine if self.low <= v <= self.high]
        return within


def curve_chart(
    name: str,
    train: Curve | None,
    held_out: Curve | None,
    axis: LogAxis,
    chosen: float | None,
    flip: float | None,
) -> str:
    """Target and other accuracy of one class against alpha, with alpha 0 left of the axis.

    Args:
        name: of the class.
        train: dashed.
        held_out: solid.
        axis: of alpha, the same for all classes of an edit.
        chosen: strength chosen on training data: a line and dots.
        flip: median class-flip threshold: a triangle on the axis.
    """
    note = f"α {strength(chosen)}" if chosen else "no strength accepted"
    parts = [
        f'<text class="t" x="{LEFT}" y="12">{clip(name, 20)}</text>',
        f'<text class="n" x="{WIDTH - RIGHT}" y="12">{note}</text>',
        *(_grid_line(share) for share in (0.0, 0.5, 1.0)),
        *(
            _x_label(LEFT + ZERO_GAP + axis.place(t) * _plot_width(), strength(t))
            for t in axis.ticks()
        ),
        _x_label(LEFT, "0"),
    ]
    if chosen:
        x = _x(chosen, axis)
        parts.append(f'<line class="c" x1="{x}" x2="{x}" y1="{TOP}" y2="{_y(0)}"/>')
    for curve, split in ((train, "d"), (held_out, "")):
        if curve is not None:
            parts += [
                _line(curve.alpha, getattr(curve, which), axis, f"l{which[0]} {split}".strip())
                for which in ("others", "target")
            ]
    if held_out is not None and chosen in held_out.alpha:
        at = held_out.alpha.index(chosen)
        parts += [
            f'<circle class="{which[0]}p" r="3" cx="{_x(chosen, axis)}" '
            f'cy="{_y(getattr(held_out, which)[at])}"/>'
            for which in ("others", "target")
            if finite(getattr(held_out, which)[at]) is not None
        ]
    if flip is not None and axis.low <= flip <= axis.high:
        tip = float(_y(0)) - 1
        parts.append(f'<path class="f" d="M{_x(flip, axis)} {tip:.1f}l4.5 8h-9z"/>')
    return (
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="accuracy against alpha, {clip(name, 200)}">{"".join(parts)}</svg>'
    )


def box_strip(boxes: Sequence[tuple[str, Sequence[float | None]]], axis: LogAxis) -> str:
    """Medians and quartiles, one under the other; text does not scale with the width.

    Args:
        boxes: (CSS class, (lower quartile, median, upper quartile)); infinite values run off the
            right end, None is left out.
        axis: shared by all strips of the table.
    """
    parts = [
        f'<line class="g" x1="{100 * axis.place(t):.2f}%" x2="{100 * axis.place(t):.2f}%" '
        f'y1="0" y2="100%"/>'
        for t in axis.ticks()
    ]
    for i, (css, quartiles) in enumerate(boxes):
        y = 8 + 11 * i
        left, centre, right = (_share(v, axis) for v in quartiles)
        if left is not None and right is not None and right > left:
            parts.append(
                f'<rect class="{css}" x="{left:.2f}%" width="{right - left:.2f}%" '
                f'y="{y - 3}" height="6" rx="2"/>'
            )
        if centre is not None and centre < 100:
            parts.append(
                f'<line class="{css}" x1="{centre:.2f}%" x2="{centre:.2f}%" '
                f'y1="{y - 5}" y2="{y + 5}"/>'
            )
        elif centre is not None:
            parts.append(f'<text class="{css}" x="100%" dx="-2" y="{y + 4}">∞</text>')
    height = 11 * len(boxes) + 5
    return f'<svg class="strip" height="{height}" aria-hidden="true">{"".join(parts)}</svg>'


def axis_strip(axis: LogAxis) -> str:
    """The labels of the axis of `box_strip`."""
    labels = "".join(
        f'<text x="{100 * axis.place(t):.2f}%" y="11">{strength(t)}</text>' for t in axis.ticks()
    )
    return f'<svg class="strip axis" height="15" aria-hidden="true">{labels}</svg>'


def _share(value: float | None, axis: LogAxis) -> float | None:
    """Where `value` lies in percent, held within the strip; None for none."""
    if value is None or value != value:
        return None
    if value <= axis.low:
        return 0.0
    return 100.0 if value >= axis.high * (1 - 1e-9) else 100 * axis.place(value)


def _plot_width() -> float:
    return WIDTH - LEFT - RIGHT - ZERO_GAP


def _x(alpha: float, axis: LogAxis) -> str:
    if alpha <= 0:
        return f"{LEFT:.1f}"
    return f"{LEFT + ZERO_GAP + min(max(axis.place(alpha), 0), 1) * _plot_width():.1f}"


def _y(share: float) -> str:
    return f"{TOP + (1 - share) * (HEIGHT - TOP - BOTTOM):.1f}"


def _grid_line(share: float) -> str:
    y = _y(share)
    return (
        f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text class="y" x="{LEFT - 4}" y="{float(y) + 3:.1f}">{100 * share:.0f}</text>'
    )


def _x_label(x: float, label: str) -> str:
    return f'<text class="x" x="{x:.1f}" y="{HEIGHT - 5}">{label}</text>'


def _line(alphas: Sequence[float], values: Sequence[float], axis: LogAxis, css: str) -> str:
    points = " ".join(
        f"{_x(a, axis)},{_y(v)}"
        for a, v in zip(alphas, values, strict=True)
        if finite(v) is not None
    )
    return f'<polyline class="{css}" points="{points}"/>'
