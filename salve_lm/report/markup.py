"""Small pieces of HTML that every section of the report is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def text(value: Any, longest: int = 48) -> str:
    """`value` escaped; beyond `longest` characters cut, with the whole in a tooltip."""
    whole = str(value)
    if len(whole) <= longest:
        return escape(whole)
    return f'<span title="{escape(whole[:400])}">{escape(whole[: longest - 1])}…</span>'


def clip(value: Any, longest: int = 48) -> str:
    """`value` escaped and cut, without markup: for attributes, titles and SVG."""
    whole = str(value)
    return escape(whole if len(whole) <= longest else whole[: longest - 1] + "…")


def percent(share: float | str | None, digits: int = 1) -> str:
    """A share in percent without the sign; a dash for none."""
    number = finite(share)
    return "–" if number is None else f"{100 * number:.{digits}f}"


def strength(value: float | str | None) -> str:
    """An alpha: three digits, a sign for infinity, a dash for none."""
    if value in ("inf", math.inf):
        return "∞"
    number = finite(value)
    if number is None:
        return "–"
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"


def finite(value: Any) -> float | None:
    """`value` as a finite number, or None; "inf" and the like count as none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def bar(before: float | None, after: float | None, kind: str) -> str:
    """`before → after` in percent over a bar: pale for before, full for after.

    Args:
        before: a share, or None.
        after: likewise.
        kind: CSS class that colours the bar: "target" or "others".
    """
    pale, full = (100 * min(max(finite(v) or 0.0, 0.0), 1.0) for v in (before, after))
    return (
        f'<span class="ba">{percent(before)} → <b>{percent(after)}</b></span>'
        f'<span class="bar {kind}" aria-hidden="true"><i style="width:{pale:.1f}%"></i>'
        f'<b style="width:{full:.1f}%"></b></span>'
    )


def table(head: Sequence[str], rows: Iterable[str], css: str = "", caption: str = "") -> str:
    """A table in a box that scrolls by itself where the page is too narrow for it.

    Args:
        head: contents of the header cells, as HTML; the first column is left-aligned.
        rows: `<tr>` elements.
        css: classes of the table.
        caption: as HTML.
    """
    cells = "".join(f'<th scope="col">{h}</th>' for h in head)
    caption = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table class="{css}">{caption}<thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def row(name: str, *cells: str, css: str = "") -> str:
    """A table row whose first cell is its header; all as HTML."""
    attribute = f' class="{css}"' if css else ""
    rest = "".join(f"<td>{c}</td>" for c in cells)
    return f'<tr{attribute}><th scope="row">{name}</th>{rest}</tr>'


def section(anchor: str, title: str, lede: str, *body: str) -> str:
    """A section of the page; `lede` says in a sentence or two how to read it."""
    return (
        f'<section id="{anchor}"><h2>{title}</h2><p class="lede">{lede}</p>'
        f"{''.join(body)}</section>"
    )


def left_out(shown: int, total: int, what: str, why: str) -> str:
    """The note that says what a section leaves out; empty where it shows all."""
    if shown >= total:
        return ""
    return (
        f'<p class="left-out">{shown:,} of {total:,} {what} shown ({why}); '
        f"{total - shown:,} left out.</p>"
    )
