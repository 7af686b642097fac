"""Edits of a language model that is exported as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from salve_lm.commands.edit import edit, folder_of
from salve_lm.commands.edit_folder import edit_folder
from salve_lm.edits import (
    DecoderGuided,
    DirectionalAblation,
    EditSpec,
    PlainModel,
    ResidualAblation,
    ResidualScaling,
    ShrinkClassRow,
    TaskVectorInjection,
    apply_named,
    plan_edits,
)
from salve_lm.errors import EditConflict, NoEffect, UnsupportedEdit
from salve_lm.language import load_causal_lm
from salve_lm.modules.language_model import LanguageModel
from salve_lm.task_vectors.record import rebuild_folder
from salve_lm.task_vectors.tensor_files import TensorFiles
from tests.edits.language import FAMILIES, WIDTH, Language, build
from tests.edits.tiny import write_sae
from tests.task_vectors.pair import Pair, build_pair


class Exportable(NamedTuple):
    """A pair of models on disk, the base in bfloat16 and in shards, and SAEs."""

    pair: Pair
    base: Path
    saes: str

    def edits(self) -> list[EditSpec]:
        sae = self.saes.format(layer=1)
        final = "final_norm"
        return [
            TaskVectorInjection(finetuned=self.pair.tuned, layers=[0, 1], alpha=0.5),
            ResidualScaling(sae=self.saes, latents={1: [1, 3]}, layers=[1], reads=True, alpha=2.0),
            ResidualAblation(sae=sae, latents=[2, 4], layers=[1, 2], reads=True),
            DecoderGuided(sae=sae, feature=[5], module=final, axis="output", alpha=3.0),
        ]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exportable:
    return make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Exportable:
    return make(tmp_path_factory.mktemp("gemma"), "gemma3_text")


def make(folder: Path, family: str) -> Exportable:
    pair = build_pair(folder, family)
    model = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.bfloat16)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder / "bf16", max_shard_size="30KB")
    (folder / "bf16" / "tokenizer.json").write_bytes(
        (Path(pair.base) / "tokenizer.json").read_bytes()
    )
    for n in range(3):
        write_sae(folder / f"layer_{n}", seed=n, d_in=WIDTH)
    return Exportable(pair, folder / "bf16", str(folder / "layer_{layer}"))


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "edit.json").read_text())


def test_the_folder_is_the_live_edit(case: Exportable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = edit_folder(case.base, case.edits(), out, check_live=True)
    # an independent look: transformers' model of the folder, against the live edit of the base
    live = load_causal_lm(case.base)
    plans = plan_edits(case.edits(), PlainModel(live, "lm_head"))
    expected = live.state_dict()
    expected |= apply_named(expected, [p.named for p in plans]).tensors
    found, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert found.generation_config.max_new_tokens == 7
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    names = [p.name for p in Path(out).iterdir()]
    assert {p.name for p in case.base.iterdir()} | {"edit.json"} == set(names)
    assert TensorFiles(out).names == TensorFiles(case.base).names
    # how far each tensor moved is what the live edit says
    changes = apply_named(live.state_dict(), [p.named for p in plans]).changes
    assert sorted(c.applied for c in done.changes.values()) == pytest.approx(
        sorted(c.applied for c in changes.values())
    )
    tensors = {k: v for f in TensorFiles(out).files for k, v in load_file(out / f).items()}
    assert {e["name"] for e in record(out)["changed"]} <= tensors.keys()


def test_float32_and_the_way_back(case: Exportable, tmp_path: Path) -> None:
    for name, dtype in (("same", None), ("wide", "float32")):
        edit_folder(case.base, case.edits(), tmp_path / name, dtype=dtype, check_live=True)
        rebuild_folder(tmp_path / name, case.base, tmp_path / f"{name}-again")
        first, second = (
            {p.name: p.read_bytes() for p in (tmp_path / n).iterdir()}
            for n in (name, f"{name}-again")
        )
        assert first == second
    assert all(e["applied_energy"] == 1 for e in record(tmp_path / "wide")["changed"])


def test_the_command_writes_the_folder_of_a_loaded_model(gemma: Exportable, tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    edits = gemma.edits()[1:]
    for dtype in ("auto", "float32"):
        model = LanguageModel(source=str(gemma.base), dtype=dtype)
        assert folder_of(model) == gemma.base
        edit(trainer, model, edits, str(tmp_path / dtype))
        plans = plan_edits(edits, model)
        state = model.model.state_dict()
        expected = state | apply_named(state, [p.named for p in plans]).tensors
        written = load_causal_lm(tmp_path / dtype)
        assert all(torch.equal(t, expected[n]) for n, t in written.state_dict().items())
    edit(trainer, None, edits, str(tmp_path / "source"), source=str(gemma.base), check_live=True)
    assert record(tmp_path / "source")["result"] == record(tmp_path / "auto")["result"]
    assert record(tmp_path / "auto")["edits"][0]["sources"]["saes"][0]["sha256"]
    # an edit that looks at the weights needs the loaded model
    row = ShrinkClassRow(target_class=3, alpha=0.5)
    tied = dataclasses.replace(row, allow_tied=True)
    with pytest.raises(EditConflict):
        edit(trainer, None, [row], str(tmp_path / "row"), source=str(gemma.base))
    model = LanguageModel(source=str(gemma.base))
    edit(trainer, model, [tied], str(tmp_path / "row"))
    assert "lm_head.weight" not in TensorFiles(tmp_path / "row")
    with pytest.raises(UnsupportedEdit, match="--model"):
        guided = DecoderGuided(guide="head_row", target_class=3, allow_tied=True)
        edit(trainer, None, [guided], str(tmp_path / "no"), source=str(gemma.base))
    edit(trainer, model, [guided], str(tmp_path / "guided"))


def test_bad_edits_leave_nothing(gemma: Exportable, tmp_path: Path) -> None:
    sae = gemma.saes.format(layer=1)
    idle = ResidualScaling(sae=sae, latents=[1], layers=[0], alpha=0.0)
    with pytest.raises(NoEffect, match="Raise alpha"):
        edit_folder(gemma.base, [*gemma.edits(), idle], tmp_path / "out")
    lost = ResidualScaling(sae=sae, latents=[1], layers=[0], alpha=1e-4, reads=True, writes=False)
    with pytest.raises(NoEffect, match="resolution of the dtype"):
        edit_folder(gemma.base, [lost], tmp_path / "out")
    edit_folder(gemma.base, [lost], tmp_path / "wide", dtype="float32")
    plain = DirectionalAblation(module="model.layers.0.mlp.up_proj", feature=1, sae=sae)
    edit_folder(gemma.base, [plain], tmp_path / "plain", check_live=True)
    assert not (tmp_path / "out").exists()


def test_thread_counts_do_not_matter(tmp_path: Path) -> None:
    language: Language = build(tmp_path, "llama")
    language.model.save_pretrained(tmp_path / "base")
    edits = [
        ResidualAblation(sae=language.sae, latents=[1, 2], layers="all", reads=True),
        DirectionalAblation(module="model.layers.0.mlp.up_proj", feature=1, sae=language.sae),
    ]
    edit_folder(tmp_path / "base", edits, tmp_path / "out")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        live = language.edited(*edits).tensors
    finally:
        torch.set_num_threads(before)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[n], t) for n, t in live.items())
