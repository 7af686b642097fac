from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from salve_lm.cli import main
from salve_lm.commands.edit import folder_of
from salve_lm.commands.measure import edit_variants, measure
from salve_lm.data.language_data import LanguageData
from salve_lm.edits import ResidualAblation, ResidualScaling, Steering
from salve_lm.errors import BadConfig, NameNotFound, NoEffect, OutputExists, StaleStore
from salve_lm.modules.language_model import LanguageModel
from salve_lm.tasks import TextLoss
from salve_lm.tasks.results import read_results
from salve_lm.trainer import SalveTrainer
from tests.edits.language import Language, build
from tests.language.tiny_models import make_tokenizer
from tests.specificity.tiny_run import corpus

EDITS = "salve_lm.edits"


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Language:
    folder = tmp_path_factory.mktemp("measure")
    language = build(folder, "gemma3_text")
    language.model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for name, words in (("task", "1 + 2 = 3 and 4"), ("general", "once upon a time")):
        texts = [f"{words} {i * i} {words[i % 9 :]}" for i in range(12)]
        (folder / f"{name}.txt").write_text("\n\n".join(texts))
    return language


def base_of(language: Language) -> Path:
    return Path(language.sae).parent / "base"


def tasks(language: Language) -> list[TextLoss]:
    folder = base_of(language).parent
    return [
        TextLoss(corpus(folder / f"{name}.txt"), context=48, name=name)
        for name in ("task", "general")
    ]


def quiet() -> SalveTrainer:
    return SalveTrainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def test_one_table_of_task_and_general_loss(
    language: Language, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = base_of(language).parent
    text = "salve_lm.data.text.TextCorpus"
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False},
        "model": {
            "class_path": "salve_lm.modules.language_model.LanguageModel",
            "init_args": {"source": str(base_of(language))},
        },
        "data": {
            "class_path": "salve_lm.data.language_data.LanguageData",
            "init_args": {
                "tasks": [
                    {
                        "class_path": "salve_lm.tasks.text_loss.TextLoss",
                        "init_args": {
                            "corpus": {
                                "class_path": text,
                                "init_args": {
                                    "files": [str(folder / f"{name}.txt")], "separator": "\n\n"
                                },
                            },
                            "context": 48,
                            "name": name,
                        },
                    }
                    for name in ("task", "general")
                ]
            },
        },
        "edits": [
            {
                "class_path": f"{EDITS}.ResidualScaling",
                "init_args": {
                    "name": "scaling", "sae": language.saes, "latents": {1: [2], 2: [3]},
                    "layers": [1, 2], "reads": True,
                },
            },
            {
                "class_path": f"{EDITS}.ResidualAblation",
                "init_args": {
                    "name": "ablation", "sae": language.sae, "latents": [2, 3], "layers": "all"
                },
            },
            {
                "class_path": f"{EDITS}.Steering",
                "init_args": {
                    "name": "steering", "sae": language.sae, "feature": 2,
                    "module": "resid_post.1", "alpha": 4.0, "direction": "enhance",
                },
            },
        ],
        "alphas": {"scaling": [1.0, 3.0]},
        "resamples": 400,
        "out": "out",
    }  # fmt: skip
    Path("measure.yaml").write_text(yaml.safe_dump(config))
    main(["measure", "--config", "measure.yaml"])
    table = pd.read_csv("out/edits.csv").set_index("variant")
    assert list(table.index) == [
        "base", "scaling_alpha_1", "scaling_alpha_3", "ablation", "steering"
    ]  # fmt: skip
    metric = next(c for c in table.columns if re.fullmatch("task/.*loss", c))
    for name in ("task", "general"):
        column = metric.replace("task/", f"{name}/")
        change = table[column] - table.loc["base", column]
        assert table[f"change:{column}"].to_numpy() == pytest.approx(change.to_numpy())
        assert (change[1:].abs() > 1e-6).all()
    record = json.loads(Path("out/measured.json").read_text())
    assert record["variants"]["ablation"]["spec"]["class_path"].endswith("ResidualAblation")
    assert Path("out/compare/compare.csv").is_file()
    # steering, by hooks of its own
    model = LanguageModel(source=str(base_of(language)))
    row = language.decoder(1, [2])[0]
    shift = (4.0 * row / row.norm()).float()
    handle = model.model.get_submodule("model.layers.1").register_forward_hook(
        lambda m, a, y: y + shift
    )
    found = quiet().validate(model, LanguageData(tasks=tasks(language)), verbose=False)
    handle.remove()
    merged = {k: v for part in found for k, v in part.items()}
    assert table.loc["steering", metric] == pytest.approx(merged[metric], rel=1e-6)
    steered = read_results(Path("out/results/steering")).info["edits"]
    assert steered[0]["init_args"]["module"] == "resid_post.1"


def test_bad_input(language: Language, tmp_path: Path) -> None:
    model = LanguageModel(source=str(base_of(language)))
    data = LanguageData(tasks=tasks(language))
    one = ResidualScaling(name="one", sae=language.sae, latents=[1], layers=[0])
    out = str(tmp_path / "out")

    def refused(kind: type[Exception], match: str, *edits: Any, **more: Any) -> None:
        with pytest.raises(kind, match=match):
            measure(quiet(), model, data, list(edits), out, resamples=400, **more)

    refused(BadConfig, "at least one edit")
    refused(BadConfig, "name", one, one)
    refused(NameNotFound, "'two'", one, alphas={"two": [1.0]})
    refused(NameNotFound, "resid_post.0", Steering(module="resid_post.9", feature=1))
    refused(NameNotFound, "layer", ResidualAblation(sae=language.sae, latents=[1], layers=[9]))
    refused(NoEffect, "changes nothing", one, alphas=[0.0])
    with pytest.raises(BadConfig, match="LanguageModel"):
        measure(quiet(), torch.nn.Linear(1, 1), data, [one], out)  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match="tasks"):
        measure(quiet(), model, LanguageData(), [one], out)
    variants = edit_variants([ResidualAblation(latents=[1], layers="all")], [0.5, 1.0])
    assert [v.name for v in variants[1:]] == [
        "ResidualAblation_0_alpha_0.5", "ResidualAblation_0_alpha_1"
    ]  # fmt: skip
    # results that are there already must be of the same edits; a finished run is not repeated
    measure(quiet(), model, data, [one], str(tmp_path / "done"), resamples=400)
    with pytest.raises(OutputExists):
        measure(quiet(), model, data, [one], str(tmp_path / "done"))
    (tmp_path / "done" / "measured.json").unlink()
    with pytest.raises(StaleStore, match="other options"):
        measure(quiet(), model, data, [one], str(tmp_path / "done"), alphas=[2.0])


def test_a_public_model_has_its_folder_in_the_cache(
    language: Language, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    base = base_of(language)

    def cached(name: str, **options: Any) -> str:
        assert (name, options["local_files_only"]) == ("me/tiny", True)
        return str(base)

    model = LanguageModel(source=str(base))
    assert folder_of(model) == base
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    model.hparams["source"] = "me/tiny"
    assert folder_of(model) == base
    monkeypatch.undo()
    assert folder_of(model) is None
    model.hparams.update(source=str(base), dtype="bfloat16")
    assert folder_of(model) is None  # rounded: not what the folder holds
