"""The language side as a user runs it: inject, go on after a stop, compare, write the model."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from salve_lm.cli import main
from salve_lm.configs import ROOT

PAIR = ROOT.parent / "checkpoints/tiny_gemma3"
TRAINER = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip
MODEL = {
    "class_path": "salve_lm.modules.language_model.LanguageModel",
    "init_args": {"source": str(PAIR / "base")},
}
PROBLEMS = {
    "class_path": "salve_lm.tasks.ArithmeticProblems",
    "init_args": {"split": "val", "limit": 4},
}
PROMPT = {
    "class_path": "salve_lm.tasks.PlainPrompt",
    "init_args": {"template": "Problem: {problem}\nAnswer:"},
}
TASKS = [
    {
        "class_path": "salve_lm.tasks.Generation",
        "init_args": {
            "problems": PROBLEMS, "prompt": PROMPT, "max_new_tokens": 6, "name": "written",
        },
    },
    {
        "class_path": "salve_lm.tasks.AnswerLikelihood",
        "init_args": {
            "problems": PROBLEMS, "prompt": PROMPT, "target": "answer", "name": "answers",
        },
    },
]  # fmt: skip
DATA = {
    "class_path": "salve_lm.data.language_data.LanguageData",
    "init_args": {"tasks": TASKS},
}


def injection(**options: object) -> dict[str, object]:
    return {
        "class_path": "salve_lm.edits.TaskVectorInjection",
        "init_args": {"finetuned": str(PAIR / "finetuned"), "layers": [0, 1], **options},
    }


def write(path: Path, config: dict[str, object]) -> str:
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("language")


@pytest.fixture(scope="module")
def config(folder: Path) -> str:
    return write(
        folder / "inject.yaml",
        {
            "trainer": TRAINER, "model": MODEL, "data": DATA, "edit": injection(),
            "alphas": [0.5], "controls": ["finetuned", "all_layers", "single_layers"],
            "resamples": 200, "out": str(folder / "run"),
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(folder: Path, config: str) -> Path:
    main(["inject", "--config", config])
    return folder / "run"


def test_every_variant_is_measured_and_compared(run: Path) -> None:
    record = json.loads((run / "injection.json").read_text())
    singles = {f"single_layers_{i}" for i in range(6)}
    names = {"base", "selected", "selected_alpha_0.5", "finetuned", "all_layers"} | singles
    assert set(record["variants"]) == names
    table = pd.read_csv(run / "variants.csv").set_index("variant")
    assert (table.loc[["selected", "all_layers"], "applied_energy"] > 0.999).all()
    # embeddings and final norm were frozen, so that all layers are the whole of the fine-tuning
    for metric in ("written/exact_match", "answers/loss"):
        assert table.loc["all_layers", metric] == table.loc["finetuned", metric]
    assert table.loc["finetuned", "answers/loss"] < table.loc["base", "answers/loss"]
    compared = pd.read_parquet(run / "compare/compare.parquet")
    assert set(compared["other"]) == names - {"base"}


def test_the_measured_loss_is_that_of_the_edited_model(run: Path) -> None:
    from salve_lm.edits import PlainModel, TaskVectorInjection, plan_edit
    from salve_lm.edits.plan import apply_named
    from salve_lm.language import load_causal_lm, load_tokenizer
    from salve_lm.tasks import AnswerLikelihood, ArithmeticProblems, PlainPrompt

    model = load_causal_lm(str(PAIR / "base"))
    spec = TaskVectorInjection(finetuned=str(PAIR / "finetuned"), layers=[0, 1])
    plan = plan_edit(spec, PlainModel(model))
    edited = apply_named(dict(model.named_parameters()), [plan.named]).tensors
    model.load_state_dict(edited, strict=False)
    task = AnswerLikelihood(
        ArithmeticProblems(split="val", limit=4), "answer",
        PlainPrompt(template="Problem: {problem}\nAnswer:"),
    )  # fmt: skip
    tokenizer = load_tokenizer(str(PAIR / "base"))
    with torch.no_grad():
        batch = task.collate(task.items(tokenizer), tokenizer)
        rows = task.step(model, tokenizer, batch)
    kept = pd.read_parquet(run / "results/selected/answers.parquet").set_index("sample")
    assert len(kept) == len(rows) == 28
    for row in rows:
        assert kept.loc[row["sample"], "loss"] == pytest.approx(row["loss"], rel=1e-4)


def test_a_finished_run_is_not_overwritten(run: Path, config: str) -> None:
    with pytest.raises(SystemExit, match="exist"):
        main(["inject", "--config", config])


def test_a_stopped_run_goes_on(run: Path, config: str) -> None:
    before = (run / "variants.csv").read_text()
    (run / "injection.json").unlink()
    for path in sorted((run / "results/single_layers_5").iterdir()):
        path.unlink()
    (run / "results/single_layers_5").rmdir()
    # `compare` stays: a run can be stopped between it and the last file
    kept = (run / "results/base/results.json").stat().st_mtime_ns
    main(["inject", "--config", config])
    assert (run / "variants.csv").read_text() == before
    assert (run / "results/base/results.json").stat().st_mtime_ns == kept


def test_a_stopped_run_of_other_options_is_refused(folder: Path, run: Path) -> None:
    record = (run / "injection.json").read_text()
    (run / "injection.json").unlink()
    other = write(
        folder / "other.yaml",
        {
            "trainer": TRAINER, "model": MODEL, "data": DATA, "edit": injection(layers=[2]),
            "resamples": 200, "out": str(run),
        },
    )  # fmt: skip
    try:
        with pytest.raises(SystemExit, match="unfinished run with another model or other options"):
            main(["inject", "--config", other])
    finally:
        (run / "injection.json").write_text(record)


def test_a_judge_without_random_layers_is_refused(folder: Path) -> None:
    config = write(
        folder / "judged.yaml",
        {
            "trainer": TRAINER, "model": MODEL, "data": DATA, "edit": injection(),
            "judge": ["answers/loss"], "out": str(folder / "judged"),
        },
    )  # fmt: skip
    with pytest.raises(SystemExit, match="add `random_layers` to `controls`"):
        main(["inject", "--config", config])
    assert not (folder / "judged").exists()


def test_two_results_are_compared(run: Path, folder: Path) -> None:
    out = folder / "compared"
    main(["compare", "--base", str(run / "results/base"),
          "--others", f"[{run / 'results/selected'}]", "--out", str(out),
          "--resamples", "200"])  # fmt: skip
    assert {"compare.csv", "compare.md", "compare.svg"} <= {p.name for p in out.iterdir()}


def test_the_edited_folder_is_the_live_edit(folder: Path) -> None:
    from salve_lm.language import load_causal_lm

    edits = write(folder / "edits.yaml", {"edits": [injection()]})
    out = folder / "edited"
    main(["edit", "--config", edits, "--source", str(PAIR / "base"), "--out", str(out),
          "--check_live", "true"])  # fmt: skip
    record = json.loads((out / "edit.json").read_text())
    assert record["check"]["matches_live"] is True
    names = ("base", "finetuned")
    base, tuned = (load_causal_lm(str(PAIR / n)).state_dict() for n in names)
    for name, tensor in load_causal_lm(str(out)).state_dict().items():
        injected = ".layers.0." in name or ".layers.1." in name
        # both are float32, so that base + (tuned - base) is the sum as it rounds
        expected = base[name] + (tuned[name] - base[name]) if injected else base[name]
        assert torch.equal(tensor, expected), name


def test_edit_takes_a_model_or_a_folder(folder: Path) -> None:
    edits = write(folder / "edits_alone.yaml", {"edits": [injection()]})
    with pytest.raises(SystemExit, match="either a --model or the --source"):
        main(["edit", "--config", edits, "--out", str(folder / "nothing")])
    assert not (folder / "nothing").exists()
