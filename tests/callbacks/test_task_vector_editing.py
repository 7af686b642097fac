"""A task vector inside `WeightEditing`: live in validation, gone after it, alike on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from salve_lm.callbacks import WeightEditing
from salve_lm.edits import TaskVectorInjection
from salve_lm.errors import BadConfig, EditConflict
from tests.callbacks.task_vector_run import Model, data
from tests.callbacks.tiny import trainer
from tests.task_vectors.pair import build_pair

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("llama_tied", "gemma3", "gpt2")


@pytest.mark.parametrize("own_base", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_live_in_validation_and_original_bits_after(
    family: str, own_base: bool, tmp_path: Path
) -> None:
    pair = build_pair(tmp_path, family)
    base = pair.base if own_base else None
    studied = Model(pair.model)
    spec = TaskVectorInjection(finetuned=pair.tuned, base=base, layers=[1], alpha=0.5)
    editing = WeightEditing([spec])
    running = trainer(editing)
    for _ in range(2):
        studied.seen.clear()
        running.validate(studied, data(), verbose=False)
        assert studied.seen
        for seen in studied.seen:
            for name, tensor in seen.items():
                touched = f".1.{name.partition('.1.')[2]}" in name and name in editing.changes
                expected = pair.theta[name] + 0.5 * pair.tau[name] if touched else pair.theta[name]
                assert torch.equal(tensor, expected), name
        after = dict(pair.model.named_parameters(remove_duplicate=False))
        assert all(torch.equal(after[n], t) for n, t in pair.theta.items())
    assert len(editing.changes) == len([n for n in pair.tau if _layer_one(n, family)])


def _layer_one(name: str, family: str) -> bool:
    prefix = {"gemma3": "model.language_model.layers.1.", "gpt2": "transformer.h.1."}
    return name.startswith(prefix.get(family, "model.layers.1."))


def test_training_keeps_the_originals(tmp_path: Path) -> None:
    """Edits follow the weights as they learn; a checkpoint inside validation holds originals."""
    pair = build_pair(tmp_path, "llama")
    studied = Model(pair.model)
    editing = WeightEditing([TaskVectorInjection(finetuned=pair.tuned, layers=[1], alpha=0.5)])
    path = tmp_path / "inside.ckpt"
    originals: list[dict[str, torch.Tensor]] = []

    class Saving(Callback):
        def on_validation_batch_end(self, running: Any, *_: Any) -> None:
            running.save_checkpoint(path)
            originals.append({n: t.clone() for n, t in editing.originals.items()})

    trainer(editing, Saving(), max_epochs=2).fit(studied, data())
    saved = torch.load(path, weights_only=True)["state_dict"]
    trained = dict(pair.model.named_parameters())
    assert all(torch.equal(saved[f"model.{n}"], p) for n, p in trained.items())
    for seen, old in zip(studied.seen, originals, strict=True):
        for name, tensor in old.items():
            tau = pair.tuned_theta[name] - tensor  # from the weights of the moment
            assert torch.equal(seen[name], tensor + 0.5 * tau)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(originals[0][name], originals[-1][name])


def test_refused_before_hours_are_spent(tmp_path: Path) -> None:
    pair = build_pair(tmp_path, "llama_tied")
    studied = Model(pair.model)
    tied = TaskVectorInjection(finetuned=pair.tuned, tensors=["lm_head.weight"])
    with pytest.raises(EditConflict, match="allow_tied"):
        trainer(WeightEditing([tied])).validate(studied, data(), verbose=False)
    with pytest.raises(BadConfig, match="Which layers"):
        trainer(WeightEditing([TaskVectorInjection(finetuned=pair.tuned)])).fit(studied, data())


def test_two_ranks(tmp_path: Path) -> None:
    build_pair(tmp_path, "llama")
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.task_vector_run", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith('{"scenario"')]
    found = {line["scenario"]: line["failure"] for line in lines}
    assert set(found) == {"alike", "disagree"}, done.stderr
    assert found["alike"] is None
    assert "RankMismatch: The edited tensors differ" in found["disagree"]
