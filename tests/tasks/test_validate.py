"""Tasks under `validate`: rows of all ranks, none twice, and what ProblemResults writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from lightning.pytorch import LightningModule, Trainer

from salve_lm.callbacks.problem_results import ProblemResults
from salve_lm.commands.compare import compare
from salve_lm.errors import BadConfig, OutputExists
from salve_lm.hashing import hash_tensors
from salve_lm.tasks.results import read_results
from tests.tasks.language_tiny import tiny_model
from tests.tasks.validate_runs import save, validate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate")
    done = subprocess.run(
        [sys.executable, "-m", "tests.tasks.validate_runs", str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_write_what_one_writes(folder: Path) -> None:
    one, two = read_results(folder / "one"), read_results(folder / "two")
    assert one.tables["generated"]["sample"].tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert one.tables["likelihood"]["sample"].tolist() == [0, 10, 20]
    for task in ("generated", "likelihood"):
        pd.testing.assert_frame_equal(one.tables[task], two.tables[task], rtol=1e-5)
        a, b = (r.info["tasks"][task]["summary"] for r in (one, two))
        assert a == pytest.approx(b)
    assert one.info["model"] == two.info["model"]


def test_what_identifies_the_model(folder: Path) -> None:
    model = read_results(folder / "one").info["model"]
    assert model["class"] == "LlamaForCausalLM" and model["source"] == str(folder / "model")
    assert model["weights_sha256"] == hash_tensors(tiny_model("llama").state_dict())


def test_the_two_runs_compare(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    table = compare(str(folder / "one"), [str(folder / "two")], out, tasks=["generated"])
    whole = table[table["subject"] == "all"].iloc[0]
    assert (whole["n"], whole["difference"], whole["p"]) == (7, 0.0, 1.0)


def test_an_earlier_result_is_kept(tmp_path: Path) -> None:
    source, out = save(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputExists):
        validate(source, out, devices=1)
    assert list(out.iterdir()) == []


def test_other_modules_are_refused(tmp_path: Path) -> None:
    callback = ProblemResults(str(tmp_path / "out"))
    with pytest.raises(BadConfig, match="LanguageModel, not LightningModule"):
        callback.setup(Trainer(logger=False, barebones=True), LightningModule(), "validate")
