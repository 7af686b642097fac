"""Results on disk, and comparisons of them, against statsmodels and by hand."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from salve_lm.commands.compare import compare
from salve_lm.errors import BadConfig, CorruptFile, MissingFile, NameNotFound, OutputExists
from salve_lm.tasks.base import Row
from salve_lm.tasks.generation import Generation
from salve_lm.tasks.minerva import MinervaPrompt
from salve_lm.tasks.results import read_results, write_results
from tests.tasks.made_problems import MadeProblems


def rows_with(
    right: Sequence[bool], subjects: Sequence[str], **columns: Sequence[Any]
) -> list[Row]:
    return [
        {"sample": i, "subject": s, "problem_id": f"p{i}", "exact_match": bool(r)}
        | {name: values[i] for name, values in columns.items()}
        for i, (r, s) in enumerate(zip(right, subjects, strict=True))
    ]


class Fixed(Generation):
    """A task whose rows are made up."""

    def __init__(self, name: str = "math", max_new_tokens: int = 8, **options: Any) -> None:
        super().__init__(
            MadeProblems(), MinervaPrompt(), name=name, max_new_tokens=max_new_tokens, **options
        )
        self.metrics = ("exact_match", "math_verify", "loss")

    def summary(self, rows: Sequence[Row]) -> dict[str, float]:
        return {"n": float(len(rows))}


def write(folder: Path, rows: list[Row], name: str = "math", **options: Any) -> str:
    write_results(folder, [Fixed(name, **options)], {name: rows}, model={"source": folder.name})
    return str(folder)


def pairs(both: int, only_first: int, only_second: int, none: int) -> tuple[np.ndarray, np.ndarray]:
    counts = [both, only_first, only_second, none]
    return np.repeat([1, 1, 0, 0], counts) > 0, np.repeat([1, 0, 1, 0], counts) > 0


def test_the_published_numbers(tmp_path: Path) -> None:
    """160 and 213 of 540, as nested answers and with many lost ones."""
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    subjects = ["number_theory"] * 540
    for only_first, expected in ((0, 2**-52), (107, 0.0014)):
        a, b = pairs(160 - only_first, only_first, 53 + only_first, 327 - only_first)
        assert (a.sum(), b.sum(), len(a)) == (160, 213, 540)
        base = write(tmp_path / f"a{only_first}", rows_with(a, subjects))
        other = write(tmp_path / f"b{only_first}", rows_with(b, subjects))
        table = compare(base, [other], str(tmp_path / f"out{only_first}"))
        (row,) = table.to_dict("records")
        assert row["subject"] == "all" and row["n"] == 540
        assert (round(row["z_wald"], 3), round(row["p_wald"], 5)) == (3.410, 0.00065)
        assert (round(row["z_pooled"], 3), round(row["p_pooled"], 5)) == (3.392, 0.00069)
        wald = proportion.test_proportions_2indep(213, 540, 160, 540, method="wald")
        assert (row["z_wald"], row["p_wald"]) == pytest.approx((wald.statistic, wald.pvalue))
        pooled = proportion.proportions_ztest([213, 160], [540, 540])
        assert (row["z_pooled"], row["p_pooled"]) == pytest.approx(pooled)
        cells = [[160 - only_first, only_first], [53 + only_first, 327 - only_first]]
        assert row["p"] == pytest.approx(tables.mcnemar(cells, exact=True).pvalue)
        assert row["p"] == pytest.approx(expected, rel=0.1)
        assert (row["only_base"], row["only_after"]) == (only_first, 53 + only_first)
        # the normal interval of a paired difference
        d = b.astype(float) - a
        half = 1.96 * d.std(ddof=1) / math.sqrt(540)
        assert row["low"] == pytest.approx(d.mean() - half, abs=0.004)
        assert row["high"] == pytest.approx(d.mean() + half, abs=0.004)


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """A base and two others over three subjects, with a loss beside."""
    generator = np.random.default_rng(0)
    subjects = ["algebra"] * 80 + ["geometry"] * 60 + ["few"] * 4
    base = generator.random(144) < 0.3
    loss = generator.gamma(2.0, size=144)
    folders = [write(tmp_path / "base", rows_with(base, subjects, loss=loss, math_verify=base))]
    for name, gain in (("raw", 0.5), ("null", 0.0)):
        right = base | (generator.random(144) < gain)
        moved = loss - gain + 0.1 * generator.standard_normal(144)
        rows = rows_with(right, subjects, loss=moved, math_verify=base)
        folders.append(write(tmp_path / name, rows, max_new_tokens=9))
    return folders


def test_holm_and_intervals_by_subject(three: list[str], tmp_path: Path) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    table = compare(three[0], three[1:], str(tmp_path / "out"))
    assert len(table) == 2 * 3 * 4  # others, metrics, subjects and all
    assert set(table["other"]) == {"raw", "null"}
    for _, rows in table[table["subject"] != "all"].groupby(["metric", "other"]):
        expected = multitest.multipletests(rows["p"], method="holm")[1]
        assert rows["p_holm"].to_numpy() == pytest.approx(expected)
        assert set(rows["family"]) == {3}
    whole = table[table["subject"] == "all"]
    assert whole["p_holm"].isna().all()
    assert table[table["subject"] == "few"]["low"].isna().all(), "4 problems have no interval"
    assert not table[table["subject"] != "few"]["low"].isna().any()
    loss = whole[(whole["metric"] == "loss") & (whole["other"] == "raw")].iloc[0]
    a, b = (pd.read_parquet(Path(f) / "math.parquet")["loss"] for f in three[:2])
    t = stats.ttest_rel(b, a)
    assert (loss["t"], loss["p"]) == pytest.approx((t.statistic, t.pvalue))
    assert loss["p_wilcoxon"] == pytest.approx(stats.wilcoxon(b - a).pvalue)
    boot = stats.bootstrap((b - a,), np.mean, n_resamples=10_000, method="percentile", rng=1)
    assert (loss["low"], loss["high"]) == pytest.approx(tuple(boot.confidence_interval), abs=0.003)


def test_what_is_written(three: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = compare(three[0], three[1:], str(out))
    assert sorted(p.name for p in out.iterdir()) == [
        "compare.csv", "compare.json", "compare.md", "compare.parquet", "compare.svg",
    ]  # fmt: skip
    pd.testing.assert_frame_equal(pd.read_parquet(out / "compare.parquet"), table)
    assert len(pd.read_csv(out / "compare.csv")) == len(table)
    root = ElementTree.fromstring((out / "compare.svg").read_text())
    text = "".join(root.itertext())
    assert all(word in text for word in ("geometry", "raw", "null", "math: loss"))
    assert len(root.findall(".//{*}g")) == len(table)
    words = (out / "compare.md").read_text()
    assert "Families of Holm's correction: the subjects of one task, metric and run" in words
    assert "exact_match rises and math_verify does not" in words
    assert "had different options: max_new_tokens: 8 and 9" in words
    assert "Too few problems for an interval: few" in words
    about = json.loads((out / "compare.json").read_text())
    assert about["seed"] == 0 and set(about["others"]) == {"raw", "null"}
    with pytest.raises(OutputExists):
        compare(three[0], three[1:], str(out))
    again = compare(three[0], three[1:], str(tmp_path / "again"))
    pd.testing.assert_frame_equal(again, table)


def test_nothing_right_in_either(tmp_path: Path) -> None:
    none = rows_with([False] * 150, ["a"] * 150)
    base, other = (write(tmp_path / name, none) for name in ("base", "other"))
    row = compare(base, [other], str(tmp_path / "out")).iloc[0]
    assert row["after_high"] == pytest.approx(0.024, abs=5e-4)
    assert (row["p"], row["p_wald"], row["low"], row["high"]) == (1.0, 1.0, 0.0, 0.0)
    words = (tmp_path / "out" / "compare.md").read_text()
    assert "0% in both: it cannot tell them apart (each is at most 2.4%" in words


def test_other_problems_are_refused(tmp_path: Path) -> None:
    rows = rows_with([True] * 20, ["a"] * 20)
    base = write(tmp_path / "base", rows)
    out = str(tmp_path / "out")

    def refused(changed: list[Row], message: str) -> None:
        other = write(tmp_path / f"other{len(list(tmp_path.iterdir()))}", changed)
        with pytest.raises(BadConfig, match=message):
            compare(base, [other], out)

    refused(rows[:-2], r"2 only in .*base \(sample 18, 19\)")
    refused([*rows, {**rows[0], "sample": 99}], r"1 only in other\d+ \(sample 99\)")
    refused([{**rows[0], "problem_id": "x"}, *rows[1:]], r"1 samples are other problems .*sample 0")
    refused([*rows, rows[0]], "sample 0 of math twice")
    refused(
        [{k: v for k, v in row.items() if k != "exact_match"} | {"loss": 1.0} for row in rows],
        "Run both with the same task",
    )
    refused([{**row, "exact_match": None} for row in rows], "empty values")
    longer = write(tmp_path / "longer", [{**row, "tokens": 3, "loss": 1.0} for row in rows])
    refused_by = write(tmp_path / "shorter", [{**row, "tokens": 4, "loss": 1.0} for row in rows])
    with pytest.raises(BadConfig, match="other tokens"):
        compare(longer, [refused_by], out)
    assert not Path(out).exists()


def test_too_few_problems(tmp_path: Path) -> None:
    rows = rows_with([True] * 5, ["a"] * 5)
    folders = [write(tmp_path / name, rows) for name in ("base", "other")]
    with pytest.raises(BadConfig, match=r"5 problem.*too few.*needs 6"):
        compare(folders[0], folders[1:], str(tmp_path / "out"))


def test_tasks_and_folders(tmp_path: Path) -> None:
    rows = rows_with([True, False] * 5, ["a"] * 10)
    one = write(tmp_path / "one", rows)
    two = write(tmp_path / "deep" / "one", rows)
    out = str(tmp_path / "out")
    assert set(compare(one, [two], out, tasks=["math"])["other"]) == {"deep/one"}
    out = str(tmp_path / "out2")
    with pytest.raises(NameNotFound, match=r"'maths'.*'math'"):
        compare(one, [two], out, tasks=["maths"])
    with pytest.raises(BadConfig, match="no task in common"):
        compare(one, [write(tmp_path / "text", rows, "text")], out)
    with pytest.raises(BadConfig, match="given twice"):
        compare(one, [one], out)
    with pytest.raises(BadConfig, match="at least one other"):
        compare(one, [], out)
    with pytest.raises(MissingFile, match="ProblemResults"):
        compare(one, [str(tmp_path)], out)


def test_damaged_results(tmp_path: Path) -> None:
    rows = rows_with([True] * 10, ["a"] * 10)
    folder = Path(write(tmp_path / "one", rows))
    assert read_results(folder).options("math")["max_new_tokens"] == 8
    text = (folder / "results.json").read_text()
    for damaged, message in (
        ("{", "no JSON"),
        ("[]", "not 'salve-lm problem results'"),
        (text.replace('"version": 1', '"version": 9'), "version 9"),
        (text.replace('"n": 10,', '"n": 11,'), "10 rows, where 11"),
    ):
        (folder / "results.json").write_text(damaged)
        with pytest.raises(CorruptFile, match=message):
            read_results(folder)
    (folder / "results.json").write_text(text)
    table = (folder / "math.parquet").read_bytes()
    (folder / "math.parquet").write_bytes(table[: len(table) // 2])
    with pytest.raises(CorruptFile, match="no parquet"):
        read_results(folder)
    (folder / "math.parquet").unlink()
    with pytest.raises(MissingFile, match="Run the task again"):
        read_results(folder)


def test_options_are_recorded(tmp_path: Path) -> None:
    task = Generation(MadeProblems(3), name="math")
    row = {"sample": 0, "subject": "a", "exact_match": True, "math_verify": True, "output": ""}
    rows = [row | {"truncated": False, "prompt_cut": False}]
    edit = {"class_path": "x.Edit", "init_args": {"alpha": 2.0}}
    write_results(tmp_path / "x", [task], {"math": rows}, model={"source": "m"}, edits=[edit])
    read = read_results(tmp_path / "x")
    assert read.metrics("math") == ("exact_match", "math_verify")
    options = read.options("math")
    assert options["prompt.shots"] == 4 and options["max_new_tokens"] == 512
    assert options["problems.count"] == 3
    assert options["problems.class_path"].endswith("made_problems.MadeProblems")
    assert read.info["edits"] == [edit] and read.info["model"] == {"source": "m"}
    assert read.info["tasks"]["math"]["summary"]["exact_match"] == 1.0
    assert {"torch", "transformers", "math-verify"} <= set(read.info["versions"])


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    rows = rows_with([True], ["a"])
    with pytest.raises(BadConfig, match=r"would both write a_b.parquet"):
        tasks = [Fixed("a b"), Fixed("a_b")]
        write_results(tmp_path / "x", tasks, {"a b": rows, "a_b": rows}, model={})
    with pytest.raises(BadConfig, match="no rows"):
        write_results(tmp_path / "x", [Fixed()], {"math": []}, model={})
    with pytest.raises(OutputExists):
        write_results(tmp_path, [Fixed()], {"math": rows}, model={})
    assert list(tmp_path.iterdir()) == []
