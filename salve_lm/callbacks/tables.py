"""Small tables written beside a run: CSV for spreadsheets, JSON for programs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salve_lm.atomic import atomic_file


def write_table(folder: str | Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `NAME.csv` and `NAME.json`, replacing those of an earlier evaluation.

    JSON has no infinity or NaN: they become "inf", "-inf" and null.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (
        atomic_file(Path(folder) / f"{name}.csv") as path,
        path.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    with atomic_file(Path(folder) / f"{name}.json") as path:
        plain = [{key: _plain(value) for key, value in row.items()} for row in rows]
        path.write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
