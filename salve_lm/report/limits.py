"""How much the report shows, so that it stays a file one can mail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MEGABYTE = 1024 * 1024
MAX_BYTES = 20 * MEGABYTE
IMAGE_BYTES = 12 * MEGABYTE  # of embedded images, base64 included
CONFIG_BYTES = 64 * 1024  # of one config file
MAX_CONFIGS = 20
MAX_CARDS = 200
MAX_ROWS = 100  # classes in a table
MAX_CHARTS = 24  # classes with curves, for each edit
MAX_COLUMNS = 20  # classes across the table of side effects
MAX_CONTROLS = 40
MAX_EDITS = 8  # headline edits
WORST_FIRST = "those where an edit reaches least or costs the others most"


def most_telling(edits: Sequence[Mapping[str, Any]], limit: int) -> list[str]:
    """At most `limit` classes, in the run's order; where there are more, the worst results.

    Worst: the edit left most of what it should have changed, or cost the other classes most. So
    what is left out is never what a reader should have been warned of.
    """
    classes = list(dict.fromkeys(str(e["target_class"]) for e in edits))
    if len(classes) <= limit:
        return classes
    worst = dict.fromkeys(classes, 0.0)
    for e in edits:
        name = str(e["target_class"])
        worst[name] = max(worst[name], _shortfall(e))
    kept = set(sorted(classes, key=lambda c: -worst[c])[:limit])
    return [c for c in classes if c in kept]


def _shortfall(edit: Mapping[str, Any]) -> float:
    target = edit["target_accuracy_after"] or 0.0
    lost = (edit["other_accuracy_before"] or 0.0) - (edit["other_accuracy_after"] or 0.0)
    return float((1 - target if edit["direction"] == "enhance" else target) + max(lost, 0.0))
