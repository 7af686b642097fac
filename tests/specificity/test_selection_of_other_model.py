"""A selection file goes with the model that it was made for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from salve_lm.edits import PlainModel, TaskVectorInjection, plan_edit
from salve_lm.errors import StaleStore
from salve_lm.hashing import hash_tensors
from salve_lm.specificity.selection_file import FORMAT, VERSION, identity_of
from tests.task_vectors.pair import Pair, build_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return build_pair(tmp_path_factory.mktemp("pair"), "llama")


def write_selection(folder: Path, pair: Pair, **other: object) -> str:
    model = {
        **identity_of(pair.model.config),
        "weights": hash_tensors(pair.model.state_dict()),
        "dtype": "float32",
        **other,
    }
    record = {
        "format": FORMAT, "version": VERSION, "layers": [1], "model": model, "score": "mass_share",
        "rankings": {"mass_share": {"1": {"estimate": 0.5}}},
    }  # fmt: skip
    path = folder / "layers.json"
    path.write_text(json.dumps(record))
    return str(path)


def test_the_selection_of_this_model_is_taken(pair: Pair, tmp_path: Path) -> None:
    spec = TaskVectorInjection(finetuned=pair.tuned, layers=write_selection(tmp_path, pair))
    plan = plan_edit(spec, PlainModel(pair.model))
    assert (
        plan.tensors
        == plan_edit(
            TaskVectorInjection(finetuned=pair.tuned, layers=[1]), PlainModel(pair.model)
        ).tensors
    )


@pytest.mark.parametrize(
    ("other", "said"),
    [({"weights": "0" * 64}, "weights 000000000000"), ({"n_layers": 9}, "n_layers 9")],
)
def test_the_selection_of_another_model_is_refused(
    pair: Pair, tmp_path: Path, other: dict[str, object], said: str
) -> None:
    path = write_selection(tmp_path, pair, **other)
    with pytest.raises(StaleStore, match=said):
        plan_edit(TaskVectorInjection(finetuned=pair.tuned, layers=path), PlainModel(pair.model))


def test_weights_of_another_dtype_are_not_compared(pair: Pair, tmp_path: Path) -> None:
    path = write_selection(tmp_path, pair, weights="0" * 64, dtype="bfloat16")
    spec = TaskVectorInjection(finetuned=pair.tuned, layers=path)
    assert next(pair.model.parameters()).dtype == torch.float32
    assert plan_edit(spec, PlainModel(pair.model)).tensors
