"""The report's section on measured edits: figures of the rows, honest words, stale folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from salve_lm.errors import MissingFile, StaleStore
from salve_lm.report.language_edits import edits_in_words, edits_section
from salve_lm.report.language_measured import Change, Measured, MeasuredEdit
from salve_lm.report.language_run import read_language_run
from salve_lm.report.summary import report


@pytest.fixture
def copy(language_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(language_run, tmp_path / "run")
    return tmp_path / "run"


def test_changes_are_those_of_the_rows(language_run: Path) -> None:
    """Against the parquet files, by pandas alone."""
    summary = json.loads((language_run / "summary.json").read_text())
    results = language_run / "edits/results"
    names = [e["name"] for e in summary["edits"]]
    assert names == [
        "scaling_alpha_1", "scaling_alpha_3", "shuffled_alpha_1", "shuffled_alpha_3", "ablation",
    ]  # fmt: skip
    assert [e["control"] for e in summary["edits"]] == [False, False, True, True, False]
    assert [e["alpha"] for e in summary["edits"]] == [1, 3, 1, 3, 1]
    for e in summary["edits"]:
        for task, key, metric in (("made", "task_loss", "loss"), ("text", "general_loss", "loss")):
            before, after = (
                pd.read_parquet(results / v / f"{task}.parquet").set_index("sample")
                for v in ("base", e["name"])
            )
            if metric not in before:
                before[metric] = before["nll"] / before["tokens"]
                after[metric] = after["nll"] / after["tokens"]
            change = (after[metric] - before[metric]).mean()
            assert e[key]["change"] == pytest.approx(change, abs=1e-9), (e["name"], key)
            assert e[key]["low"] <= change <= e[key]["high"]
    general = [e["general_loss"]["change"] for e in summary["edits"]]
    assert len({round(v, 6) for v in general}) == len(general)  # every edit does something else


def test_the_page_shows_every_edit(language_run: Path) -> None:
    page = (language_run / "report.html").read_text()
    part = page[page.index('<section id="edits"') :]
    part = part[: part.index("</section>")]
    assert part.count("ResidualScaling") == 4 and part.count("ResidualAblation") == 1
    assert part.count("<small>control</small>") == 2
    assert "made/loss" in part and "text/loss" in part
    assert '<a href="#edits">' in page
    # how to repeat it, in the order of the run
    assert page.index("salve_lm inject") < page.index("salve_lm measure")


def measured(*edits: MeasuredEdit) -> Measured:
    class Made(Measured):
        def edits(self) -> list[MeasuredEdit]:
            return list(edits)

    return Made({}, {}, pd.DataFrame(), None)


def edit(name: str, control: bool, task: float, general: float, **changed: Any) -> MeasuredEdit:
    changes = [Change(v, v - 0.01, v + 0.01, 0.0) for v in (task, general)]
    made = MeasuredEdit(name, name, "ResidualScaling", 1.0, control, *changes)
    return made._replace(**changed)


def test_words_ask_for_more_than_chance() -> None:
    chance = edit("shuffled", True, 0.3, 0.3)
    (better,) = edits_in_words(measured(edit("a", False, 0.6, 0.3), chance))
    assert "is more about the task than its control" in better and "2.00 against 1.00" in better
    (like,) = edits_in_words(measured(edit("a", False, 0.31, 0.3), chance))
    assert "is not shown to be more" in like
    strengths = [edit("a", False, 0.6, 0.3), edit("a", False, 0.3, 0.3, alpha=3.0)]
    controls = [chance, chance._replace(alpha=3.0)]
    (some,) = edits_in_words(measured(*strengths, *controls))
    assert "at some strengths only" in some
    (alone,) = edits_in_words(measured(edit("b", False, 0.6, 0.3)))
    assert "has no control" in alone
    # a control of another strength says nothing
    (other,) = edits_in_words(measured(edit("a", False, 0.6, 0.3), chance._replace(alpha=3.0)))
    assert "has no control" in other


def test_no_ratio_without_a_rise_of_general_loss() -> None:
    assert edit("a", False, 0.3, 0.005).ratio is None
    ratio = edit("a", False, 0.3, 0.1).ratio
    assert ratio is not None and ratio == pytest.approx((3.0, 0.29 / 0.11, 0.31 / 0.09))


def test_a_run_without_measured_edits_has_no_section(copy: Path) -> None:
    shutil.rmtree(copy / "edits")
    report(copy)
    assert json.loads((copy / "summary.json").read_text())["edits"] is None
    page = (copy / "report.html").read_text()
    assert 'id="edits"' not in page and "salve_lm measure" not in page
    assert edits_section(None) == ""


@pytest.mark.parametrize("missing", ["measured.json", "compare/compare.parquet"])
def test_a_stopped_measurement_is_named(missing: str, copy: Path) -> None:
    (copy / "edits" / missing).unlink()
    with pytest.raises(MissingFile, match="Run measure again") as e:
        read_language_run(copy)
    assert missing in str(e.value)


def test_edits_of_other_layers_are_refused(copy: Path) -> None:
    path = copy / "edits/measured.json"
    record = json.loads(path.read_text())
    chosen = json.loads((copy / "layers/layers.json").read_text())["layers"]
    other = next(n for n in range(3) if n not in chosen)
    changes = record["variants"]["scaling_alpha_1"]["changes"]
    record["variants"]["scaling_alpha_1"]["changes"] = {
        name.replace(f".{chosen[0]}.", f".{other}."): c for name, c in changes.items()
    }
    path.write_text(json.dumps(record))
    with pytest.raises(StaleStore, match=rf"scaling_alpha_1 .* edited layers \[{other}\]"):
        read_language_run(copy)


def test_edits_of_another_model_are_refused(copy: Path) -> None:
    path = copy / "edits/results/base/results.json"
    info = json.loads(path.read_text())
    info["model"]["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(info))
    with pytest.raises(StaleStore, match="with other weights"):
        read_language_run(copy)
