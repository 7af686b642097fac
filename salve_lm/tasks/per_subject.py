"""Means over all problems and over those of each subject."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from salve_lm.tasks.base import Row


def subject_means(rows: Sequence[Row], key: str) -> dict[str, float]:
    """`KEY` over all rows, and `KEY/SUBJECT` where there are several subjects."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        groups[row["subject"]].append(float(row[key]))
    means = {key: fmean(float(row[key]) for row in rows)}
    if len(groups) > 1:
        means |= {f"{key}/{subject}": fmean(groups[subject]) for subject in sorted(groups)}
    return means
