from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from salve_lm.errors import CorruptFile, MissingFile, NameNotFound
from salve_lm.task_vectors.blocks import BLOCK, row_blocks
from salve_lm.task_vectors.safetensors_header import layout
from salve_lm.task_vectors.tensor_files import INDEX, TensorFiles

DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool,
]  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    made = {str(d): (torch.arange(15).view(5, 3) % 2).to(d) for d in DTYPES}
    return made | {
        "scalar": torch.tensor(2.5),
        "cube": torch.randn(4, 2, 3),
        "empty": torch.empty(0, 3),
    }


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    all_of = tensors()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {name: files[k % 2] for k, name in enumerate(sorted(all_of))}
    for file in files:
        mine = {n: t for n, t in all_of.items() if where[n] == file}
        save_file(mine, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))
    return all_of


@given(st.lists(st.integers(0, 3000), max_size=3))
def test_blocks_cover_every_row_once(shape: list[int]) -> None:
    blocks = list(row_blocks(shape))
    rows = [r for start, stop in blocks for r in range(start, stop)]
    assert rows == (list(range(shape[0] if shape else 1)) if math.prod(shape) else [])
    width = math.prod(shape[1:])
    assert all(stop - start == 1 or (stop - start) * width <= BLOCK for start, stop in blocks)


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    expected = sharded(tmp_path / "model")
    with TensorFiles(tmp_path / "model") as files:
        assert set(files.names) == set(expected)
        assert len(files.files) == 2
        assert files.total_size == sum(t.numel() * t.element_size() for t in expected.values())
        for name, tensor in expected.items():
            assert torch.equal(files.read(name), tensor)
            assert (files.info(name).dtype, files.info(name).shape) == (tensor.dtype, tensor.shape)
            if tensor.ndim:
                got = files.read_rows(name, 1, 3) if len(tensor) else files.read_rows(name, 0, 0)
                assert torch.equal(got, tensor[1:3])
        assert torch.equal(files.read_rows("scalar", 0, 1), expected["scalar"])


def test_reads_one_file_by_its_path(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    files = TensorFiles(tmp_path / "adapter_model.safetensors")
    assert files.names == ("a",)
    with pytest.raises(IndexError):
        files.read_rows("a", 0, 3)
    with pytest.raises(NameNotFound, match="Did you mean 'a'"):
        files.info("A")


def test_a_new_layout_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    wanted = {"b": (torch.bfloat16, (3,)), "f": (torch.float32, (2, 2)), "u": (torch.uint8, (1,))}
    header = layout("x.safetensors", wanted, {"format": "pt"})
    assert len(header.raw) % 8 == 0
    assert all(i.offset % i.dtype.itemsize == 0 for i in header.tensors.values())
    path = tmp_path / "x.safetensors"
    path.write_bytes(header.raw + bytes(header.size - len(header.raw)))
    read = load_file(path)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in read.items()} == wanted
    assert TensorFiles(path).headers["x.safetensors"].tensors == header.tensors


def header_of(entries: object, data: int, folder: Path) -> Path:
    raw = json.dumps(entries).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data))
    return folder


def f32(begin: int, end: int, shape: list[int] | None = None) -> dict[str, object]:
    n = (end - begin) // 4
    return {"dtype": "F32", "shape": shape or [n], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ({"a": f32(0, 8), "b": f32(4, 12)}, 12, "'b' overlaps"),
        ({"a": f32(0, 8), "b": f32(12, 16)}, 16, "'b' leaves a gap"),
        ({"a": f32(0, 8)}, 4, "truncated"),
        ({"a": f32(0, 8)}, 12, "4 bytes follow"),
        ({"a": f32(0, 8, [3])}, 8, "not what its shape needs"),
        ({"a": f32(0, 8, [-2])}, 8, "bad shape"),
        ({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}, 1, "unknown dtype 'F4'"),
        ({"a": {"dtype": "F32"}}, 8, "header is damaged"),
        ({"a": 3}, 8, "header is damaged"),
        ([1], 8, "header is damaged"),
    ],
)
def test_damaged_headers(tmp_path: Path, entries: object, data: int, message: str) -> None:
    with pytest.raises(CorruptFile, match=message):
        TensorFiles(header_of(entries, data, tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 20, "not a safetensors file"),
        ((100).to_bytes(8, "little") + b"{", "truncated"),
        ((4).to_bytes(8, "little") + b"{{{{", "header is damaged"),
    ],
)
def test_foreign_and_truncated_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptFile, match=message):
        TensorFiles(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as f:
        f.truncate(200)
    with pytest.raises(CorruptFile, match="became shorter"):
        files.read("a")


def rename_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").rename(folder / "elsewhere")


def name_another(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["typo"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def swap_shards(folder: Path) -> None:
    one, two = (folder / f"model-0000{k}-of-00002.safetensors" for k in (1, 2))
    other = folder / "t"
    one.rename(other), two.rename(one), other.rename(two)


def double(folder: Path) -> None:
    one, two = (folder / f"model-0000{k}-of-00002.safetensors" for k in (1, 2))
    two.write_bytes(one.read_bytes())


def no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def bad_index(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def outside(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (rename_shard, MissingFile, "1 of 2 shards are missing.*model-00002-of-00002"),
        (name_another, CorruptFile, "names 1 tensors that its shards do not hold: typo"),
        (swap_shards, CorruptFile, "do not hold"),
        (double, CorruptFile, "model-00001.* and model-00002"),
        (no_index, MissingFile, "Add the index"),
        (bad_index, CorruptFile, "not an index"),
        (outside, CorruptFile, "names no files in this folder"),
    ],
)
def test_shards_that_do_not_match(
    tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    sharded(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(error, match=message):
        TensorFiles(tmp_path / "model")


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="No folder"):
        TensorFiles(tmp_path / "nowhere")
    with pytest.raises(MissingFile, match="Give a model folder"):
        TensorFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(MissingFile, match=r"only pytorch_model.bin\. Convert"):
        TensorFiles(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(MissingFile, match="LoRA adapter, not a model"):
        TensorFiles(tmp_path)
