"""`inject`, `measure` and harvesting tokens on two ranks: as one process, and one set of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from salve_lm.cli import main
from tests.distributed.ranks import TWO, run_ranks
from tests.edits.language import build
from tests.language.tiny_models import make_tokenizer
from tests.sae.group import fit_group, read_folder, state_of, token_data
from tests.test_language_pipeline import DATA, MODEL, TASKS, TRAINER, injection

ON_TWO = ["--trainer.strategy=ddp", "--trainer.devices=2"]


def text_loss(file: Path) -> dict[str, Any]:
    corpus = {
        "class_path": "salve_lm.data.text.TextCorpus",
        "init_args": {"files": [str(file)], "separator": "\n\n"},
    }
    return {
        "class_path": "salve_lm.tasks.text_loss.TextLoss",
        "init_args": {"corpus": corpus, "context": 48, "name": "text"},
    }


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Command -> its config, without `out`."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "text.txt").write_text("\n\n".join(f"once upon {i * i} times" for i in range(7)))
    # three problems: no even share
    tasks: list[Any] = json.loads(json.dumps(TASKS))
    for task in tasks:
        task["init_args"]["problems"]["init_args"]["limit"] = 3
    language = build(folder, "gemma3_text")
    language.model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    edits = [
        {
            "class_path": "salve_lm.edits.ResidualAblation",
            "init_args": {
                "name": "ablation", "sae": language.sae, "latents": [2, 3], "layers": "all",
            },
        },
        {
            "class_path": "salve_lm.edits.Steering",
            "init_args": {
                "name": "steering", "sae": language.sae, "feature": 2, "module": "resid_post.1",
                "alpha": 4.0, "direction": "enhance",
            },
        },
    ]  # fmt: skip
    data = DATA["class_path"]
    contents: dict[str, dict[str, Any]] = {
        "inject": {
            "model": MODEL, "data": {"class_path": data, "init_args": {"tasks": tasks}},
            "edit": injection(), "alphas": [0.5], "controls": ["all_layers"], "resamples": 200,
        },
        "measure": {
            "model": {**MODEL, "init_args": {"source": str(folder / "base")}},
            "data": {
                "class_path": data, "init_args": {"tasks": [text_loss(folder / "text.txt")]}
            },
            "edits": edits, "resamples": 200,
        },
    }  # fmt: skip
    for name, content in contents.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"trainer": TRAINER, **content}))
    return {name: folder / f"{name}.yaml" for name in contents}


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.mark.parametrize("command", ["inject", "measure"])
def test_same_results(command: str, configs: dict[str, Path], tmp_path: Path) -> None:
    given = [command, "--config", str(configs[command])]
    one, two = tmp_path / "one", tmp_path / "two"
    main([*given, f"--out={one}"])
    assert run_ranks(lambda _: main([*given, *ON_TWO, f"--out={two}"]), seconds=200) == [0, 0]
    assert files(one) == files(two)
    tables = [p for p in one.rglob("*") if p.suffix in (".csv", ".parquet")]
    assert len(tables) > 3
    for table in tables:
        read = pd.read_csv if table.suffix == ".csv" else pd.read_parquet
        pd.testing.assert_frame_equal(
            read(table), read(two / table.relative_to(one)), rtol=1e-5, atol=1e-6
        )


def test_tokens_are_harvested_once(tmp_path: Path) -> None:
    """By one rank for both, which then train on them as one process does."""
    options = {"sites": ["resid_post.0"], "store": str(tmp_path / "two")}
    alone, _ = fit_group(token_data(**{**options, "store": str(tmp_path / "one")}), {})

    def fit(rank: int) -> None:
        group, _ = fit_group(token_data(**options), {}, **TWO)
        if rank == 0:
            (name,) = [m.member.name for m in group.members]
            torch.save(state_of(group, name), tmp_path / "state.pt")

    assert run_ranks(fit) == [0, 0]
    assert read_folder(tmp_path / "one") == read_folder(tmp_path / "two")
    (name,) = [m.member.name for m in alone.members]
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for key, value in state_of(alone, name).items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5, msg=key)
