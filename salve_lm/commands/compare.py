"""`compare`: any two or more results of the same problems, as a table, a plot and words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from salve_lm.atomic import atomic_folder, check_writable_target
from salve_lm.errors import BadConfig

if TYPE_CHECKING:
    import pandas as pd

    from salve_lm.tasks.results import Results


def compare(
    base: str,
    others: list[str],
    out: str,
    tasks: list[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare results of the same problems: paired and unpaired tests, intervals, Holm.

    Writes `compare.csv` and `compare.parquet` (one row per task, metric, run and subject),
    `compare.svg` (differences with intervals), `compare.md` (in words) and `compare.json` (what
    was compared) into `out`, and shows the table.

    Args:
        base: Folder of results that the others are compared with.
        others: Folders of results to compare with it.
        out: New folder for table, plot and words.
        tasks: Only these tasks; all that every run has by default.
        confidence: Of the intervals; one less this is the level of the tests in the words.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        OutputExists: `out` is there already.
        MissingFile, CorruptFile: no results in a folder, or damaged ones.
        NameNotFound: a task that some run lacks.
        BadConfig: runs of different problems, or too few for the interval.
    """
    if not others:
        raise BadConfig("Nothing to compare with: give at least one other folder of results.")
    labels = _labels([base, *others])
    runs = dict(zip(labels[1:], others, strict=True))
    table, words = write_comparison(
        base, runs, out, label=labels[0], tasks=tasks, confidence=confidence, resamples=resamples,
        seed=seed,
    )  # fmt: skip
    _show(table, labels[0], words, out)
    return table


def write_comparison(
    base: str | Path,
    others: Mapping[str, str | Path],
    out: str | Path,
    *,
    label: str = "base",
    tasks: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[pd.DataFrame, str]:
    """Write the comparison of results that have names; see `compare`.

    Args:
        base: folder of results.
        others: name -> folder of results to compare with it.
        out: new folder.
        label: what the base is called.
        tasks: only these tasks.
        confidence: of the intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The table, and what it says in words.
    """
    from salve_lm.tasks.compare import Options, compare_results, option_differences
    from salve_lm.tasks.forest import forest_plot
    from salve_lm.tasks.results import read_results
    from salve_lm.tasks.words import describe

    check_writable_target(out)
    first = read_results(base)
    runs = {name: read_results(folder) for name, folder in others.items()}
    options = Options(confidence, resamples, seed)
    table = compare_results(first, runs, tasks=tasks, options=options)
    notes = {
        (task, name): option_differences(first, run, task)
        for task in table["task"].unique()
        for name, run in runs.items()
    }
    words = describe(table, label, options, notes)
    about = {
        "format": "salve-lm comparison",
        "version": 1,
        "base": _about(first),
        "others": {name: _about(run) for name, run in runs.items()},
        **options._asdict(),
    }
    with atomic_folder(out) as folder:
        table.to_csv(folder / "compare.csv", index=False)
        table.to_parquet(folder / "compare.parquet", index=False)
        (folder / "compare.svg").write_text(forest_plot(table, label), encoding="utf-8")
        (folder / "compare.md").write_text(words, encoding="utf-8")
        (folder / "compare.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return table, words


def _labels(folders: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that differ: `edited`, or else `run1/edited`."""
    parts = [Path(f).resolve().parts for f in folders]
    if len(set(parts)) < len(parts):
        raise BadConfig("The same folder of results is given twice; give different ones.")
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _about(results: Results) -> Mapping[str, object]:
    info = results.info
    return {"folder": str(results.folder), "model": info["model"], "edits": info["edits"]}


def _show(table: pd.DataFrame, base: str, words: str, out: str) -> None:
    """The main columns on the screen."""
    from rich.console import Console
    from rich.table import Table

    from salve_lm.tasks.words import p

    shown = Table(title=f"Compared with {base}")
    for name in ("task", "metric", "run", "subject"):
        shown.add_column(name)
    for name in ("n", "base", "after", "difference", "interval", "p", "Holm"):
        shown.add_column(name, justify="right")
    for row in table.to_dict("records"):
        interval = "–" if row["low"] != row["low"] else f"{row['low']:+.3f} {row['high']:+.3f}"
        shown.add_row(
            row["task"], row["metric"], row["other"], row["subject"], str(row["n"]),
            f"{row['base']:.3f}", f"{row['after']:.3f}", f"{row['difference']:+.3f}", interval,
            p(row["p"]), p(row.get("p_holm", float("nan"))),
        )  # fmt: skip
    console = Console()
    console.print(shown)
    console.print(words, markup=False, highlight=False)
    console.print(f"Written to {out}", markup=False)
