from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from salve_lm.commands.edit_folder import edit_folder
from salve_lm.edits import DecoderGuided
from salve_lm.edits.spec import EditSpec
from salve_lm.edits.task_vector import TaskVectorInjection
from salve_lm.errors import (
    BadConfig,
    CorruptFile,
    EditConflict,
    MissingFile,
    NameNotFound,
    ShapeMismatch,
    StaleStore,
    UnsupportedEdit,
)
from salve_lm.hashing import hash_file
from salve_lm.task_vectors.folder_plan import empty_model
from salve_lm.task_vectors.record import rebuild_folder
from salve_lm.task_vectors.tensor_files import TensorFiles
from salve_lm.task_vectors.weights import FolderWeights
from tests.task_vectors.pair import FAMILIES, Pair, build_pair


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return build_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return build_pair(tmp_path_factory.mktemp("gemma"), "gemma3_text")


def as_bfloat16(folder: str, out: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(out, max_shard_size="30KB")
    return out


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "edit.json").read_text())


def test_every_family_loads_whole_and_equals_the_live_edit(pair: Pair, tmp_path: Path) -> None:
    base = as_bfloat16(pair.base, tmp_path / "base")
    edits = [
        TaskVectorInjection(finetuned=pair.tuned, layers=[1], alpha=0.7),
        TaskVectorInjection(
            finetuned=pair.tuned,
            layers=[0],
            tensors=["*mlp*"],
            alpha=-0.2,
            variant="random_direction",
        ),
    ]
    done = edit_folder(base, edits, tmp_path / "out", check_live=True)
    data = record(tmp_path / "out")
    assert data["check"]["matches_live"]
    assert TensorFiles(tmp_path / "out").names == TensorFiles(base).names
    assert len(done.changes) == len(data["changed"]) > 5
    edit_folder(base, edits, tmp_path / "wide", dtype="float32", check_live=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for entry in record(tmp_path / "wide")["changed"]:
        assert entry["applied_energy"] == 1 and entry["dtype"] == "F32"
    # rebuilt from the record, base and sources alone
    for name in ("out", "wide"):
        rebuild_folder(tmp_path / name, base, tmp_path / f"{name}-again")
        first, second = (
            {p.name: p.read_bytes() for p in (tmp_path / n).iterdir()}
            for n in (name, f"{name}-again")
        )
        assert first == second


def test_a_lora_adapter_is_written_without_a_merged_copy(pair: Pair, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    gpt2 = pair.model.config.model_type == "gpt2"
    targets = r".*c_proj" if gpt2 else r".*(q|down)_proj"
    if pair.model.config.model_type == "gemma3":
        targets = r".*language_model.*(q|down)_proj"
    options = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=gpt2)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(pair.base), options)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_()
    tuned.save_pretrained(tmp_path / "adapter")
    edit = TaskVectorInjection(finetuned=str(tmp_path / "adapter"), layers="all", alpha=0.3)
    edit_folder(pair.base, [edit], tmp_path / "out", check_live=True)
    rebuild_folder(tmp_path / "out", pair.base, tmp_path / "again")


def test_an_empty_model_has_the_names_of_the_loaded_one(pair: Pair) -> None:
    empty = empty_model(pair.model.config)
    assert {n: p.shape for n, p in empty.named_parameters(remove_duplicate=False)} == {
        n: p.shape for n, p in pair.model.named_parameters(remove_duplicate=False)
    }
    assert all(p.is_meta for p in empty.parameters())


def test_the_record(gemma: Pair, tmp_path: Path) -> None:
    edit = TaskVectorInjection(finetuned=gemma.tuned, layers=[1], alpha=0.5)
    model = {"library": "transformers", "source": "x"}
    edit_folder(gemma.base, [edit], tmp_path / "out", file_digests=True, model=model)
    data = record(tmp_path / "out")
    assert (data["format"], data["version"], data["model"]) == ("salve_lm.edited_folder", 1, model)
    assert data["base"]["tensors"] == len(TensorFiles(gemma.base).names)
    for part, folder in (("base", Path(gemma.base)), ("result", tmp_path / "out")):
        for entry in data[part]["files"]:
            assert entry["sha256"] == hash_file(folder / entry["name"])
            assert entry["bytes"] == (folder / entry["name"]).stat().st_size
    assert TaskVectorInjection(**data["edits"][0]["spec"]["init_args"]) == edit
    assert data["edits"][0]["sources"] == {"finetuned": {"path": gemma.tuned}}
    before, after = (
        load_file(Path(f) / "model.safetensors") for f in (gemma.base, tmp_path / "out")
    )
    for entry in data["changed"]:
        name = entry["name"]
        change = (after[name].double() - before[name].double()).norm()
        assert entry["applied"] == pytest.approx(float(change) ** 2)
        assert entry["norm_after"] == pytest.approx(float(after[name].double().norm()))
        assert entry["requested"] == pytest.approx(
            0.25 * float(gemma.tau[name].double().norm()) ** 2
        )
        assert entry["sha256"] != entry["sha256_before"]
    assert {e["name"] for e in data["changed"]} == {n for n in before if ".layers.1." in n}
    assert (data["left_out"], data["tied"]) == ([], {})
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_tied_weights_stay_tied(gemma: Pair, tmp_path: Path) -> None:
    edit = TaskVectorInjection(finetuned=gemma.tuned, tensors=["model.embed_tokens.weight"])
    with pytest.raises(EditConflict, match="lm_head"):
        edit_folder(gemma.base, [edit], tmp_path / "refused")
    allowed = dataclasses.replace(edit, allow_tied=True)
    edit_folder(gemma.base, [allowed], tmp_path / "out", check_live=True)
    assert "lm_head.weight" not in TensorFiles(tmp_path / "out")
    # a base that stores the one tensor twice gets it changed twice
    twice = tmp_path / "twice"
    shutil.copytree(gemma.base, twice)
    tensors = load_file(twice / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice / "model.safetensors", {"format": "pt"})
    edit_folder(twice, [allowed], tmp_path / "both", check_live=True)
    after = load_file(tmp_path / "both" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert record(tmp_path / "both")["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}


def test_an_edited_folder_can_be_edited_again(gemma: Pair, tmp_path: Path) -> None:
    first = TaskVectorInjection(finetuned=gemma.tuned, base=gemma.base, layers=[0])
    second = TaskVectorInjection(finetuned=gemma.tuned, base=gemma.base, layers=[1])
    edit_folder(gemma.base, [first], tmp_path / "one")
    done = edit_folder(tmp_path / "one", [second], tmp_path / "two")
    edit_folder(gemma.base, [first, second], tmp_path / "both")
    assert "edit.json" in done.left_out
    one, two = (hash_file(tmp_path / n / "model.safetensors") for n in ("two", "both"))
    assert one == two


def test_bad_edits(gemma: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    good = TaskVectorInjection(finetuned=gemma.tuned, layers=[0])
    with pytest.raises(BadConfig, match="at least one edit"):
        edit_folder(gemma.base, [], out)
    with pytest.raises(BadConfig, match="No output dtype 'int8'"):
        edit_folder(gemma.base, [good], out, dtype="int8")
    with pytest.raises(NameNotFound, match="No layer named '99'"):
        edit_folder(gemma.base, [dataclasses.replace(good, layers=[99])], out)
    with pytest.raises(MissingFile):
        edit_folder(gemma.base, [dataclasses.replace(good, finetuned=str(tmp_path / "no"))], out)
    with pytest.raises(MissingFile):
        edit_folder(tmp_path / "nowhere", [good], out)
    other = build_pair(tmp_path / "other", "llama")
    with pytest.raises(ShapeMismatch, match="Different"):
        edit_folder(gemma.base, [dataclasses.replace(good, finetuned=other.tuned)], out)
    guided: list[EditSpec] = [DecoderGuided(feature=0)]
    with pytest.raises((UnsupportedEdit, BadConfig)):
        edit_folder(gemma.base, guided, out)
    assert not out.exists()


def test_bad_rebuilds(gemma: Pair, tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    shutil.copytree(gemma.base, base)
    shutil.copytree(gemma.tuned, tuned)
    edit_folder(base, [TaskVectorInjection(finetuned=str(tuned), layers=[0])], tmp_path / "out")
    again = tmp_path / "again"
    good = record(tmp_path / "out")
    path = tmp_path / "edit.json"
    for change, message in [
        ({"format": "salve_lm.edit"}, "not a salve_lm.edited_folder record"),
        ({"version": 2}, "format version 2"),
        ({"edits": [{"title": "t"}]}, "damaged edits"),
        ({"result": {"sha256": "0", "files": []}}, "differ from the recorded ones"),
    ]:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(CorruptFile, match=message):
            rebuild_folder(path, base, again)
    path.write_text(json.dumps({k: v for k, v in good.items() if k != "base"}))
    with pytest.raises(CorruptFile, match="'base'"):
        rebuild_folder(path, base, again)
    path.write_text("{")
    with pytest.raises(CorruptFile, match="JSON"):
        rebuild_folder(path, base, again)
    with pytest.raises(MissingFile):
        rebuild_folder(tmp_path / "nowhere", base, again)
    # a base that differs in a tensor the edit does not even touch
    with pytest.raises(StaleStore, match="not those that"):
        rebuild_folder(tmp_path / "out", changed(base, tmp_path / "other", "layers.1"), again)
    shutil.rmtree(tuned)
    changed(Path(gemma.tuned), tuned, "layers.0")
    with pytest.raises(StaleStore, match="finetuned weights"):
        rebuild_folder(tmp_path / "out", base, again)
    assert not again.exists()


def changed(folder: Path, out: Path, part: str) -> Path:
    """A copy of a model folder in which one value of one tensor differs."""
    shutil.copytree(folder, out)
    files = FolderWeights(out).files
    name = next(n for n in files.names if part in n and len(files.info(n).shape) == 2)
    info = files.info(name)
    files.close()
    with open(out / info.file, "r+b") as f:
        f.seek(info.offset)
        byte = f.read(1)
        f.seek(info.offset)
        f.write(bytes([byte[0] ^ 1]))
    return out
