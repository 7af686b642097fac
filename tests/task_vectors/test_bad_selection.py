"""SAEs and selection files that do not go with the model are told before anything is computed."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from salve_lm.commands.edit_folder import edit_folder
from salve_lm.commands.inject import inject
from salve_lm.data.language_data import LanguageData
from salve_lm.edits import PlainModel, TaskVectorInjection, plan_edit
from salve_lm.errors import BadConfig, MissingFile, SalveError, ShapeMismatch, StaleStore
from salve_lm.language.names import d_model
from salve_lm.modules.language_model import LanguageModel
from salve_lm.sae import load_sae, save_sae
from salve_lm.tasks.base import EvaluationTask
from salve_lm.trainer import SalveTrainer
from tests.edits.tiny import write_sae
from tests.specificity.test_selection_of_other_model import write_selection
from tests.task_vectors.pair import Pair, build_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return build_pair(tmp_path_factory.mktemp("pair"), "llama")


@pytest.fixture(scope="module")
def saes(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`right`, `wide`, and `shifted`: of the layer after the one that the folder is called by."""
    folder = tmp_path_factory.mktemp("saes")
    width = d_model(pair.model.config)
    for layer in (0, 1):
        plain = write_sae(folder / f"plain_{layer}", seed=layer, d_in=width)
        for name, of in (("right", layer), ("shifted", layer + 1)):
            hook = {"hook_name": f"blocks.{of}.hook_resid_post"}
            save_sae(load_sae(plain), folder / name / f"layer_{layer}", metadata=hook)
        write_sae(folder / "wide" / f"layer_{layer}", d_in=width + 8)
    shutil.copytree(folder / "right/layer_0", folder / "one/layer_0")
    return folder


class Unreached(EvaluationTask):
    """A task that must not be run."""

    metrics = ("loss",)
    name = "unreached"
    batch_size = 1

    def items(self, tokenizer: Any) -> Any:
        return range(1)

    def collate(self, items: Any, tokenizer: Any) -> Any:
        raise AssertionError("computed before the check")

    def step(self, model: Any, tokenizer: Any, batch: Any) -> Any:
        raise AssertionError("computed before the check")

    def summary(self, rows: Any) -> dict[str, float]:
        return {}


CASES = [
    ("wide", ShapeMismatch, "takes activations of width"),
    ("shifted", BadConfig, "was trained on layer 2 .*, not on layer 1"),
    ("one", MissingFile, "one/layer_1"),
]


def projected(pair: Pair, saes: Path, name: str) -> TaskVectorInjection:
    return TaskVectorInjection(
        finetuned=pair.tuned, layers=[1], latents={1: [0, 3]}, variant="projected",
        sae=str(saes / name / "layer_{layer}"),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "error", "said"), CASES)
def test_an_sae_of_another_place_is_refused(
    name: str, error: type[SalveError], said: str, pair: Pair, saes: Path
) -> None:
    model = PlainModel(pair.model)
    assert plan_edit(projected(pair, saes, "right"), model).tensors
    with pytest.raises(error, match=said):
        plan_edit(projected(pair, saes, name), model)


@pytest.mark.parametrize(("name", "error", "said"), CASES)
def test_inject_tells_before_anything_is_run(
    name: str, error: type[SalveError], said: str, pair: Pair, saes: Path, tmp_path: Path
) -> None:
    """The edit itself is raw and needs no SAE; its control `projected` does."""
    edit = dataclasses.replace(projected(pair, saes, name), variant="raw")
    data = LanguageData(tasks=[Unreached()])
    trainer = SalveTrainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(error, match=said):
        inject(
            trainer, LanguageModel(source=pair.base), data, edit, str(tmp_path / "out"),
            controls=["projected"],
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_streamed_edit_is_checked_with_its_values(pair: Pair, tmp_path: Path) -> None:
    """Without values a model of the same shape cannot be told apart; `check_live` loads them."""
    path = write_selection(tmp_path, pair, weights="0" * 64)
    edits = [TaskVectorInjection(finetuned=pair.tuned, layers=path)]
    with pytest.raises(StaleStore, match="weights 000000000000"):
        edit_folder(pair.base, edits, tmp_path / "out", check_live=True)
    assert not (tmp_path / "out").exists()
    right = write_selection(tmp_path, pair)
    edits = [TaskVectorInjection(finetuned=pair.tuned, layers=right)]
    assert edit_folder(pair.base, edits, tmp_path / "out", check_live=True)
    with pytest.raises(StaleStore, match="n_layers 9"):
        other = write_selection(tmp_path, pair, n_layers=9)
        edits = [TaskVectorInjection(finetuned=pair.tuned, layers=other)]
        edit_folder(pair.base, edits, tmp_path / "out2")
