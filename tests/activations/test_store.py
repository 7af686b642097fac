from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from salve_lm.activations.harvest import harvest
from salve_lm.activations.store import ActivationStore
from salve_lm.errors import BadConfig, CorruptFile, MissingStore
from tests.activations.tiny import D_IN, TinyStudied, ready_data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "store"
    harvest(TinyStudied(), ready_data(), "pooled", path, shard_rows=6, progress=False)
    return path


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def edit_index(store: Path, **changes: object) -> None:
    file = store / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_it_says_of_itself(written: Path) -> None:
    store = ActivationStore(written)
    assert store.d_in == D_IN
    assert store.class_names == ["ant", "bee", "cat"]
    assert store.splits == ("train", "val")
    assert (store.rows("train"), store.rows("val")) == (23, 11)
    assert store.key["site"] == "fc:input"
    assert store.key["data"].keys() == {"train", "val"}
    store.verify()


def test_shards_are_plain_safetensors(written: Path) -> None:
    shards = [load_file(p) for p in sorted(written.glob("train-*.safetensors"))]
    assert [len(s["x"]) for s in shards] == [6, 6, 6, 5]
    assert torch.equal(torch.cat([s["sample"] for s in shards]), torch.arange(23))
    store = ActivationStore(written)
    assert torch.equal(
        store.gather("train", torch.arange(23)).x, torch.cat([s["x"] for s in shards])
    )


@given(rows=st.lists(st.integers(0, 22), max_size=40))
@settings(max_examples=60, deadline=None)
def test_gathers_any_rows_in_any_order(written: Path, rows: list[int]) -> None:
    store = ActivationStore(written)
    whole = store.gather("train", torch.arange(23))
    some = store.gather("train", torch.tensor(rows, dtype=torch.int64))
    assert some.x.shape == (len(rows), D_IN)
    for part, all_of_it in zip(some, whole, strict=True):
        assert torch.equal(part, all_of_it[rows])


def test_what_is_gathered_is_the_callers_own(written: Path) -> None:
    store = ActivationStore(written)
    rows = torch.arange(4)
    store.gather("val", rows).x.zero_()
    assert store.gather("val", rows).x.abs().sum() > 0
    store.verify()


@pytest.mark.parametrize("row", [-1, 23])
def test_rows_outside(written: Path, row: int) -> None:
    with pytest.raises(IndexError, match="run from 0 to 22"):
        ActivationStore(written).gather("train", torch.tensor([row]))


def test_a_split_it_does_not_hold(written: Path) -> None:
    with pytest.raises(BadConfig, match="has the splits train, val, not 'test'"):
        ActivationStore(written).rows("test")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingStore, match="Give `model` and `source`"):
        ActivationStore(tmp_path / "nowhere")


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=r"it has no index\.json"):
        ActivationStore(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"format": "other"}', "its format is 'other'"),
        ('{"format": "salve-activation-store", "version": 2}', "version 2 of the format"),
        ('{"format": "salve-activation-store", "version": 1}', "damaged"),
    ],
)
def test_a_damaged_or_foreign_index(copy: Path, content: str, message: str) -> None:
    (copy / "index.json").write_text(content)
    with pytest.raises(CorruptFile, match=message):
        ActivationStore(copy)


def test_an_index_that_contradicts_itself(copy: Path) -> None:
    splits = json.loads((copy / "index.json").read_text())["splits"]
    splits["train"]["rows"] = 7
    edit_index(copy, splits=splits)
    with pytest.raises(CorruptFile, match="do not add up"):
        ActivationStore(copy)
    edit_index(copy, dtype="int3")
    with pytest.raises(CorruptFile, match="unknown dtype 'int3'"):
        ActivationStore(copy)


def test_a_missing_shard(copy: Path) -> None:
    (copy / "val-00001.safetensors").unlink()
    with pytest.raises(CorruptFile, match=r"val-00001\.safetensors: the shard is missing"):
        ActivationStore(copy)


def test_a_truncated_shard(copy: Path) -> None:
    shard = copy / "train-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CorruptFile, match=r"train-00002.*bytes, the index says.*harvest it again"):
        ActivationStore(copy)


@pytest.mark.parametrize(
    ("start", "message"),
    [(b"\xff" * 8, "not a safetensors file"), ((5).to_bytes(8, "little"), "not a safetensors")],
)
def test_a_foreign_shard_of_the_right_size(copy: Path, start: bytes, message: str) -> None:
    shard = copy / "train-00000.safetensors"
    shard.write_bytes(start + shard.read_bytes()[8:])
    with pytest.raises(CorruptFile, match=message):
        ActivationStore(copy)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"F32"', b'"I32"', "tensor 'x' is not what"),
        (b"[6,6]", b"[4,9]", "tensor 'x' is not what"),
        (b'"label"', b'"lebal"', "tensor 'label' is not what"),
    ],
)
def test_a_header_that_contradicts_the_index(
    copy: Path, old: bytes, new: bytes, message: str
) -> None:
    shard = copy / "train-00000.safetensors"
    content = shard.read_bytes()
    assert old in content
    shard.write_bytes(content.replace(old, new))
    with pytest.raises(CorruptFile, match=message):
        ActivationStore(copy)


def test_verify_finds_a_changed_bit(copy: Path) -> None:
    shard = copy / "val-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    store = ActivationStore(copy)  # opening compares sizes and headers only
    with pytest.raises(CorruptFile, match=r"val-00000\.safetensors: its content changed"):
        store.verify()
