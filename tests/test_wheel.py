"""The wheel that users install holds both packages and the shipped configs."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from salve_lm.configs import ROOT, list_configs

CHECKOUT = Path(__file__).parents[1]


def test_the_wheel_holds_code_and_configs(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    (built,) = wheel.WheelBuilder(str(CHECKOUT)).build(
        directory=str(tmp_path), versions=["standard"]
    )
    names = set(zipfile.ZipFile(built).namelist())
    assert {"salve_lm/cli.py", "vision/classifier.py"} <= names
    configs = {str(p.relative_to(ROOT)) for p in ROOT.rglob("*.yaml")}
    assert {f"salve_lm/lightning_configs/{c}" for c in configs} <= names
    assert not any(n.startswith(("tests/", "runs/", "benchmarks/")) for n in names)
    entry = next(n for n in names if n.endswith("entry_points.txt"))
    assert "salve-lm = salve_lm.cli:main" in zipfile.ZipFile(built).read(entry).decode()
    assert list_configs()
