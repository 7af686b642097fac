"""Two or more results of the same problems, compared problem by problem (METHODS 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from salve_lm.errors import BadConfig, NameNotFound
from salve_lm.significance import (
    clopper_pearson,
    holm,
    mcnemar_of_answers,
    paired_bootstrap,
    paired_tests,
    pairs_needed,
    two_proportion_z,
)
from salve_lm.tasks.results import Results

if TYPE_CHECKING:
    import pandas as pd

ALL = "all"  # the row of all subjects together
_LISTED = 6  # differences that an error names


class Options(NamedTuple):
    """How to compare; see `salve_lm.commands.compare.compare`."""

    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0


def compare_results(
    base: Results,
    others: Mapping[str, Results],
    *,
    tasks: Sequence[str] | None = None,
    options: Options | None = None,
) -> pd.DataFrame:
    """One row per task, metric, other run and subject; the row `all` pools the subjects.

    Columns: `task`, `metric`, `kind` (`share` of right answers or `mean`), `other`, `subject`, `n`,
    `base`, `after`, `difference` (after - base) with the paired bootstrap interval `low`, `high`;
    then, for shares, Clopper-Pearson bounds of both, Wald and pooled z and p, exact McNemar `p`
    and its discordant pairs; for means, t and `p` of the paired t test and Wilcoxon's p. `p_holm`
    corrects `p` over the subjects of this task, metric and other run (`family` tests); the row
    `all` stands outside of that family, with `p_holm` empty. A subject of too few problems has no
    interval.

    Args:
        base: the run the others are compared with.
        others: label -> run.
        tasks: only these; all that every run has by default.
        options: confidence, resamples and seed.

    Raises:
        NameNotFound: a task that some run lacks.
        BadConfig: runs of different problems, nothing in common, or too few problems for the
            interval.
    """
    import pandas as pd

    options = Options() if options is None else options
    rows: list[dict[str, Any]] = []
    for task in _common_tasks(base, others, tasks):
        for label, other in others.items():
            joined = _join(task, base, label, other)
            shared = [m for m in base.metrics(task) if m in other.metrics(task)]
            if not shared:
                raise BadConfig(
                    f"{task}: {base.folder} has the metrics {list(base.metrics(task))}, {label} "
                    f"has {list(other.metrics(task))}. Run both with the same task."
                )
            for metric in shared:
                rows += _compare(task, metric, label, joined, options)
    return pd.DataFrame(rows)


# options that change how fast a task runs, not what it asks
_HARMLESS = {"rows", "batch_size", "share_prefix", "name"}


def option_differences(base: Results, other: Results, task: str) -> list[str]:
    """Options of `task` in which two runs differ, as `max_new_tokens: 256 and 512`."""
    a, b = base.options(task), other.options(task)
    return [
        f"{name}: {a.get(name)} and {b.get(name)}"
        for name in dict.fromkeys([*a, *b])
        if a.get(name) != b.get(name) and name not in _HARMLESS
    ]


def _common_tasks(
    base: Results, others: Mapping[str, Results], asked: Sequence[str] | None
) -> list[str]:
    if not others:
        raise BadConfig("Nothing to compare with: give at least one other folder of results.")
    for results in (base, *others.values()):
        for task in asked or ():
            if task not in results.tables:
                raise NameNotFound(f"task in {results.folder}", task, results.tables)
    common = [t for t in base.tables if all(t in other.tables for other in others.values())]
    chosen = [t for t in common if asked is None or t in asked]
    if not chosen:
        listed = "; ".join(f"{r.folder}: {', '.join(r.tables)}" for r in (base, *others.values()))
        raise BadConfig(f"These results have no task in common ({listed}).")
    return chosen


def _join(task: str, base: Results, label: str, other: Results) -> pd.DataFrame:
    """Rows of both side by side (`METRIC`, `METRIC_other`), if of the same problems."""
    first, second = base.tables[task], other.tables[task]
    for results, table in ((base, first), (other, second)):
        twice = table["sample"][table["sample"].duplicated()].tolist()
        if twice:
            raise BadConfig(
                f"{results.folder} has sample {twice[0]} of {task} twice; such rows cannot be "
                "paired. Run the task again."
            )
    missing = sorted(set(first["sample"]) - set(second["sample"]))
    added = sorted(set(second["sample"]) - set(first["sample"]))
    if missing or added:
        parts = [
            f"{len(ids)} only in {where} (sample {', '.join(map(str, ids[:_LISTED]))}"
            f"{' ...' if len(ids) > _LISTED else ''})"
            for ids, where in ((missing, base.folder), (added, label))
            if ids
        ]
        raise BadConfig(
            f"{task}: not the same problems: {'; '.join(parts)}. Run both with the same problems, "
            "subjects and limit."
        )
    joined = first.merge(second, on="sample", suffixes=("", "_other"), validate="1:1")
    if "problem_id" in joined and "problem_id_other" in joined:
        changed = joined["sample"][joined["problem_id"] != joined["problem_id_other"]].tolist()
        if changed:
            raise BadConfig(
                f"{task}: {len(changed)} samples are other problems in {label} than in "
                f"{base.folder} (sample {', '.join(map(str, changed[:_LISTED]))}). Run both with "
                "the same files."
            )
    if "tokens" in joined and (joined["tokens"] != joined["tokens_other"]).any():
        raise BadConfig(
            f"{task}: {label} counts other tokens than {base.folder} for the same texts, so losses "
            "per token do not compare. Run both with the same tokenizer and options."
        )
    return joined


def _compare(
    task: str, metric: str, label: str, joined: pd.DataFrame, options: Options
) -> list[dict[str, Any]]:
    """The row of all problems and one of each subject, for one metric."""
    first, second = (_values(joined[name]) for name in (metric, f"{metric}_other"))
    kind = "share" if first.dtype == torch.bool else "mean"
    known = {"task": task, "metric": metric, "kind": kind, "other": label}
    measure = _shares if kind == "share" else _means
    everything = {
        **known,
        "subject": ALL,
        **measure(first, second),
        **_interval(first, second, options, required=True),
    }
    subjects = joined.get("subject")
    if subjects is None or subjects.nunique() < 2:
        return [everything]
    rows = []
    for subject in sorted(subjects.dropna().unique()):
        chosen = torch.from_numpy((subjects == subject).to_numpy(copy=True))
        a, b = first[chosen], second[chosen]
        rows.append(
            {
                **known,
                "subject": subject,
                **measure(a, b),
                **_interval(a, b, options, required=False),
            }
        )
    corrected = holm([row["p"] for row in rows])
    for row, p in zip(rows, corrected, strict=True):
        row |= {"p_holm": p, "family": len(rows)}
    return [everything, *rows]


def _values(column: pd.Series) -> Tensor:
    if column.isna().any():
        raise BadConfig(f"{column.name} has empty values; run the task again.")
    values = torch.from_numpy(column.to_numpy(copy=True))
    return values if values.dtype == torch.bool else values.double()


def _interval(first: Tensor, second: Tensor, options: Options, *, required: bool) -> dict[str, Any]:
    if not required and len(first) < pairs_needed(options.confidence):
        return {"low": math.nan, "high": math.nan}
    bounds = paired_bootstrap(
        first, second,
        confidence=options.confidence, resamples=options.resamples, seed=options.seed,
    )  # fmt: skip
    return {"low": bounds.low, "high": bounds.high}


def _shares(first: Tensor, second: Tensor) -> dict[str, Any]:
    n, a, b = len(first), int(first.sum()), int(second.sum())
    pairs = mcnemar_of_answers(first, second)
    pooled = two_proportion_z(a, n, b, n, pooled=True)
    try:
        wald = two_proportion_z(a, n, b, n)
    except BadConfig:  # 0 against 1: no variance to divide by
        wald = type(pooled)(math.nan, math.nan)
    before, after = clopper_pearson(a, n), clopper_pearson(b, n)
    return {
        "n": n,
        "base": a / n,
        "after": b / n,
        "difference": (b - a) / n,
        "base_low": before.low,
        "base_high": before.high,
        "after_low": after.low,
        "after_high": after.high,
        "only_base": pairs.only_first,
        "only_after": pairs.only_second,
        "p": pairs.p,
        "z_wald": wald.z,
        "p_wald": wald.p,
        "z_pooled": pooled.z,
        "p_pooled": pooled.p,
    }


def _means(first: Tensor, second: Tensor) -> dict[str, Any]:
    test = paired_tests(first, second)
    return {
        "n": len(first),
        "base": float(first.mean()),
        "after": float(second.mean()),
        "difference": float((second - first).mean()),
        "t": test.t,
        "p": test.t_p,
        "p_wilcoxon": test.wilcoxon_p,
    }
