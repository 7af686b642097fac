"""What a comparison says, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from salve_lm.tasks.compare import ALL, Options

if TYPE_CHECKING:
    import pandas as pd

# metrics of which less is better
LOWER_IS_BETTER = ("loss",)


def describe(
    table: pd.DataFrame,
    base: str,
    options: Options,
    notes: Mapping[tuple[str, str], Sequence[str]] | None = None,
) -> str:
    """A comparison as Markdown: what each difference is, whether it is significant, what to doubt.

    Args:
        table: of `compare_results`.
        base: label of the run that the others are compared with.
        options: that the table was made with.
        notes: (task, other) -> options in which the two runs differ.
    """
    level = 1 - options.confidence
    lines = [
        f"# Compared with {base}",
        "",
        "Both runs answer the same problems, so the tests are paired: exact McNemar for right or "
        "wrong, the paired t test for means. Intervals: paired percentile bootstrap over problems, "
        f"{options.confidence:.0%}, {options.resamples:,} resamples, seed {options.seed}. "
        "Families of Holm's correction: the subjects of one task, metric and run; the line over "
        "all problems stands outside of them.",
    ]
    keys = table[["task", "other"]].drop_duplicates().itertuples(index=False)
    for task, other in keys:
        part = table[(table["task"] == task) & (table["other"] == other)]
        lines += ["", f"## {task}: {other}", ""]
        for metric in part["metric"].unique():
            lines.append(_metric(part[part["metric"] == metric], metric, level))
        lines += [f"- {note}" for note in _doubts(part, level)]
        differing = (notes or {}).get((task, other), ())
        if differing:
            lines.append(f"- The two runs had different options: {'; '.join(differing)}.")
    return "\n".join(lines) + "\n"


def _metric(rows: pd.DataFrame, metric: str, level: float) -> str:
    whole = rows[rows["subject"] == ALL].iloc[0].to_dict()
    text = f"- **{metric}**, {whole['n']:,} problems: {_change(whole)}, {_tests(whole)}"
    subjects = rows[rows["subject"] != ALL]
    if subjects.empty:
        return text + "."
    significant = subjects[subjects["p_holm"] <= level]
    up = significant[significant["difference"] > 0]
    down = significant[significant["difference"] < 0]
    if metric in LOWER_IS_BETTER:
        up, down = down, up
    return (
        f"{text}. Of {len(subjects)} subjects (Holm, {level:.2g}), better: {_listed(up)}; "
        f"worse: {_listed(down)}."
    )


def _doubts(part: pd.DataFrame, level: float) -> Iterator[str]:
    """Reasons not to take the figures at face value."""
    whole = {row["metric"]: row for row in part[part["subject"] == ALL].to_dict("records")}
    stated, verified = whole.get("exact_match"), whole.get("math_verify")
    if stated and verified:
        moved = stated["p"] <= level and stated["difference"] > 0
        if moved and not (verified["p"] <= level and verified["difference"] > 0):
            yield (
                "exact_match rises and math_verify does not: the outputs may only state their "
                "answers in the expected sentence more often."
            )
    for metric, row in whole.items():
        if row["kind"] == "share" and row["base"] in (0.0, 1.0) and row["after"] == row["base"]:
            bound = row["base_high"] if row["base"] == 0 else row["base_low"]
            word = "at most" if row["base"] == 0 else "at least"
            yield (
                f"{metric} is {row['base']:.0%} in both: it cannot tell them apart "
                f"(each is {word} {bound:.1%}, Clopper-Pearson). Compare likelihoods."
            )
    few = sorted(set(part[part["low"].isna()]["subject"]))
    if few:
        yield f"Too few problems for an interval: {', '.join(few)}."


def _change(row: dict[str, Any]) -> str:
    if row["kind"] == "share":
        return (
            f"{row['base']:.1%} → {row['after']:.1%} ({100 * row['difference']:+.1f} points, "
            f"interval {100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
        )
    return (
        f"{row['base']:.4f} → {row['after']:.4f} ({row['difference']:+.4f}, interval "
        f"{row['low']:+.4f} to {row['high']:+.4f})"
    )


def _tests(row: dict[str, Any]) -> str:
    if row["kind"] == "share":
        wald = f"Wald z {row['z_wald']:.2f} p {p(row['p_wald'])}, "
        if math.isnan(row["z_wald"]):
            wald = ""
        return (
            f"McNemar p {p(row['p'])} ({row['only_after']:.0f} gained, {row['only_base']:.0f} "
            f"lost); unpaired, for comparison with papers: {wald}"
            f"pooled z {row['z_pooled']:.2f} p {p(row['p_pooled'])}"
        )
    return f"t {row['t']:.2f} p {p(row['p'])}, Wilcoxon p {p(row['p_wilcoxon'])}"


def _listed(rows: pd.DataFrame) -> str:
    if rows.empty:
        return "none"
    return ", ".join(
        f"{r['subject']} ({_size(r)}, p {p(r['p_holm'])})" for r in rows.to_dict("records")
    )


def _size(row: dict[str, Any]) -> str:
    if row["kind"] == "share":
        return f"{100 * row['difference']:+.1f}"
    return f"{row['difference']:+.3f}"


def p(value: float) -> str:
    """A p-value in two digits; a dash for none."""
    if math.isnan(value):
        return "–"
    return "< 1e-16" if value < 1e-16 else f"{value:.2g}"
