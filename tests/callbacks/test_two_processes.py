from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = ("one", "two", "unpadded", "fit", "disagree", "fail")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def failures(folder: Path) -> dict[str, str | None]:
    """What each scenario ended with, None where it went well."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.two_processes", str(folder), *SCENARIOS],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith('{"scenario"')]
    found = {line["scenario"]: line["failure"] for line in lines}
    assert set(found) == set(SCENARIOS), done.stderr
    return found


def test_two_processes_measure_what_one_does(failures: dict[str, str | None], folder: Path) -> None:
    assert [failures[s] for s in ("one", "two", "unpadded")] == [None] * 3
    for name in ("critical_thresholds.json", "compare_edits.json"):
        one, two, unpadded = (
            json.loads((folder / s / name).read_text()) for s in ("one", "two", "unpadded")
        )
        assert len(one) >= 4
        assert one == two == unpadded
    table = json.loads((folder / "two" / "critical_thresholds.json").read_text())
    assert [row["samples"] for row in table] == [30, 30, 30, 29]


def test_fit_with_edits_saves_the_originals(failures: dict[str, str | None]) -> None:
    assert failures["fit"] is None


def test_ranks_that_disagree_stop_the_run(failures: dict[str, str | None]) -> None:
    assert "RankMismatch: The edited tensors differ" in str(failures["disagree"])


def test_a_rank_that_fails_does_not_leave_the_other_waiting(
    failures: dict[str, str | None],
) -> None:
    assert "RankMismatch" in str(failures["fail"]) or "'nowhere'" in str(failures["fail"])
