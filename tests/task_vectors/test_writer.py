from __future__ import annotations

import errno
import json
import math
import resource
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from salve_lm.edits.ops import ScaleChannels
from salve_lm.edits.plan import NamedOps, apply_named
from salve_lm.errors import (
    BadConfig,
    CorruptFile,
    NameNotFound,
    NoEffect,
    NotFinite,
    OutputExists,
    OutputUnwritable,
    ShapeMismatch,
    UnsupportedEdit,
)
from salve_lm.task_vectors import changing, copying, writer
from salve_lm.task_vectors.changing import NamedDeltas
from salve_lm.task_vectors.tensor_files import INDEX, TensorFiles
from salve_lm.task_vectors.writer import Written, write_edited

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class Given:
    """A change that is there already."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop] if self.tensor.ndim else self.tensor


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(700, 600).mul_(0.02).to(dtype),  # more than one block
        "b.weight": torch.randn(5, 3).to(dtype),
        "b.bias": torch.randn(5).to(dtype),
        "c.weight": torch.randn(4, 3, 2).to(dtype),
        "ids": torch.arange(7),
        "scale": torch.tensor(1.5).to(dtype),
    }


def model_folder(folder: Path, tensors: Mapping[str, Tensor], shards: bool = True) -> Path:
    folder.mkdir()
    if shards:
        where = {n: SHARDS[k % 2] for k, n in enumerate(tensors)}
        for file in SHARDS:
            mine = {n: t for n, t in tensors.items() if where[n] == file}
            save_file(mine, folder / file, {"format": "pt"})
        index = {"metadata": {"total_parameters": 5}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index))
    else:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    config = {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "n": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def deltas(tensors: Mapping[str, Tensor], names: list[str], scale: float = 0.01) -> NamedDeltas:
    generator = torch.Generator().manual_seed(1)
    made = {n: torch.randn(tensors[n].shape, generator=generator) * scale for n in names}
    return NamedDeltas("edit", {n: Given(t) for n, t in made.items()})


@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_changes_what_it_should_and_nothing_else(
    tmp_path: Path, dtype: torch.dtype, shards: bool
) -> None:
    tensors = weights(dtype)
    base = TensorFiles(model_folder(tmp_path / "base", tensors, shards))
    first = deltas(tensors, ["a.weight", "b.bias", "scale"])
    second = deltas(tensors, ["a.weight", "c.weight"], 0.1)
    done = write_edited(base, [first, second], tmp_path / "out")
    after = read(tmp_path / "out")
    assert after.keys() == tensors.keys()
    for name, old in tensors.items():
        wide = old.float() if old.is_floating_point() else old
        for edit in (first, second):
            if name in edit.deltas:
                wide = wide + edit.deltas[name].tensor  # type: ignore[attr-defined]
        assert torch.equal(after[name], wide.to(old.dtype)), name
    assert list(done.changes) == [n for n in base.names if n in {*first.deltas, *second.deltas}]
    # everything but values is as it was, to the byte
    for file in base.files:
        new = TensorFiles(tmp_path / "out" / file)
        assert new.headers[file].raw == base.headers[file].raw
        with safe_open(tmp_path / "out" / file, "pt") as f:
            assert f.metadata() == {"format": "pt"}
    if shards:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert index["metadata"] == {"total_parameters": 5, "total_size": size}
        assert (
            index["weight_map"] == json.loads((tmp_path / "base" / INDEX).read_text())["weight_map"]
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]
    sizes = sum((tmp_path / "out" / f).stat().st_size for f in base.files)
    assert (done.bytes_read, done.bytes_written) == (sizes, sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_accounts_for_the_change_as_the_live_edit_does(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(700, 600).mul_(0.02).to(dtype)
    c = torch.rand(1, 600, dtype=torch.float64)
    op = ScaleChannels(module="m", output_dim=0, alpha=0.01, c=c, sign=-1)
    live = apply_named({"m.weight": weight}, [NamedOps("e", [op])])
    change = weight.float().clone()
    op.apply_({"weight": change}, 0, 700)
    base = TensorFiles(model_folder(tmp_path / "base", {"m.weight": weight}, False))
    delta = Given(change - weight.float())
    done = write_edited(base, [NamedDeltas("e", {"m.weight": delta})], tmp_path / "out")
    ours, theirs = done.changes["m.weight"], live.changes["m.weight"]
    for key in ("norm_before", "norm_after", "requested", "applied", "dot"):
        assert getattr(ours, key) == pytest.approx(getattr(theirs, key), rel=1e-3), key
    assert ours.cosine == pytest.approx(theirs.cosine, rel=1e-3)
    assert (dtype == torch.float32) == (ours.applied_energy == 1)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6), st.data(), st.integers(1, 300),
    st.integers(1, 64),
)  # fmt: skip
def test_any_layout_and_any_piece_size(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[int],
    data: st.DataObject,
    piece: int,
    run: int,
) -> None:
    """Runs, pieces and hash buffers may end anywhere in a tensor."""
    folder = tmp_path_factory.mktemp("layout")
    tensors = {f"t{k}": torch.randn(n, 3).bfloat16() for k, n in enumerate(rows)}
    chosen = data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, unique=True))
    base = TensorFiles(model_folder(folder / "base", tensors, False))
    edit = deltas(tensors, chosen, 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "PIECE", piece)
        patch.setattr(writer, "_RUN", run)
        patch.setattr(writer, "_HASHED", 7)
        done = write_edited(base, [edit], folder / "out")
    whole = write_edited(base, [edit], folder / "whole")
    first, second = ((folder / n / "model.safetensors").read_bytes() for n in ("out", "whole"))
    assert first == second
    assert (done.base_sha256, done.result_sha256) == (whole.base_sha256, whole.result_sha256)
    after = TensorFiles(folder / "out")
    again = write_edited(after, [deltas(tensors, chosen, 1.0)], folder / "again")
    assert again.base_sha256 == done.result_sha256 != done.base_sha256


def test_float32_output_is_declared_and_aligned(tmp_path: Path) -> None:
    tensors = weights()
    base = TensorFiles(model_folder(tmp_path / "base", tensors))
    edit = deltas(tensors, ["a.weight", "b.bias"], 1e-6)
    done = write_edited(base, [edit], tmp_path / "out", dtype=torch.float32)
    after = read(tmp_path / "out")
    for name, old in tensors.items():
        if name in edit.deltas:
            exact = old.float() + edit.deltas[name].tensor  # type: ignore[attr-defined]
            assert torch.equal(after[name], exact)
            assert done.changes[name].cosine == pytest.approx(1)
        else:
            assert torch.equal(after[name], old) and after[name].dtype == old.dtype
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"dtype": "float32", "text_config": {"torch_dtype": "float32", "n": 1}}
    size = sum(t.numel() * t.element_size() for t in after.values())
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"] == size
    with pytest.raises(NoEffect, match=r"below the resolution.*float32"):
        write_edited(base, [deltas(tensors, ["c.weight"], 1e-6)], tmp_path / "lost")


def test_carries_over_everything_but_weights(tmp_path: Path) -> None:
    tensors = weights()
    folder = model_folder(tmp_path / "base", tensors)
    kept = ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE",
            "preprocessor_config.json", "tokenizer.model", "README.md")  # fmt: skip
    dropped = ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "edit.json",
               "adapter_config.json", ".gitattributes", "optimizer.pt")  # fmt: skip
    for name in (*kept, *dropped):
        (folder / name).write_text(name)
    (tmp_path / "blob").write_text("linked")
    (folder / "vocab.txt").symlink_to(tmp_path / "blob")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
    (folder / "original").mkdir()
    done = write_edited(TensorFiles(folder), [deltas(tensors, ["b.bias"])], tmp_path / "out")
    assert sorted(done.left_out) == sorted([*dropped, "original"])
    for name in kept:
        assert (tmp_path / "out" / name).read_text() == name
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()
    assert (tmp_path / "out" / "vocab.txt").read_text() == "linked"
    assert (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").read_text() == "x"
    assert not any((tmp_path / "out" / name).exists() for name in (*dropped, "original"))


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, None])
def test_copies_without_the_kernels_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def unable(*_: object) -> int:
        if code is None:
            return 0
        raise OSError(code, "no")

    monkeypatch.setattr(copying.os, "copy_file_range", unable)
    tensors = weights()
    base = TensorFiles(model_folder(tmp_path / "base", tensors))
    write_edited(base, [deltas(tensors, ["b.bias"])], tmp_path / "out")
    after = read(tmp_path / "out")
    assert all(torch.equal(after[n], t) for n, t in tensors.items() if n != "b.bias")


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    """100 MB of one tensor, and as much of another that stays, in a process of its own."""
    import multiprocessing

    folder = tmp_path / "base"
    folder.mkdir()
    size = (50_000, 1000)
    big = {n: torch.zeros(size, dtype=torch.bfloat16) for n in ("changed", "kept")}
    save_file(big, folder / "model.safetensors")

    class Ones:
        def rows(self, start: int, stop: int) -> Tensor:
            return torch.ones(stop - start, size[1])

    def work(queue: multiprocessing.Queue) -> None:
        torch.set_num_threads(1)
        base = TensorFiles(folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        write_edited(base, [NamedDeltas("e", {"changed": Ones()})], tmp_path / "out")
        queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    del big
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    assert queue.get(timeout=60) < 60_000  # kB; each tensor alone has 100 MB
    process.join()


@pytest.mark.parametrize("where", ["base", "delta", "result"])
def test_not_finite(tmp_path: Path, where: str) -> None:
    tensors = weights(torch.float16)
    edit = deltas(tensors, ["b.weight", "c.weight"])
    change = edit.deltas["b.weight"].tensor  # type: ignore[attr-defined]
    if where == "base":
        tensors["b.weight"][1, 1] = float("nan")
    else:
        change[1, 1] = float("inf") if where == "delta" else 1e5  # too large for float16
    base = TensorFiles(model_folder(tmp_path / "base", tensors))
    with pytest.raises(NotFinite, match=r"b\.weight") as e:
        write_edited(base, [edit], tmp_path / "out")
    assert e.value.tensor == "b.weight"
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_refusals(tmp_path: Path) -> None:
    tensors = weights()
    base = TensorFiles(model_folder(tmp_path / "base", tensors))
    out = tmp_path / "out"
    with pytest.raises(BadConfig, match="at least one edit"):
        write_edited(base, [], out)
    with pytest.raises(NameNotFound, match="Did you mean"):
        write_edited(base, [NamedDeltas("e", {"a.wieght": Given(torch.ones(1))})], out)
    with pytest.raises(ShapeMismatch, match=r"b\.bias"):
        write_edited(base, [NamedDeltas("e", {"b.bias": Given(torch.ones(5, 2))})], out)
    with pytest.raises(ShapeMismatch, match=r"float64 \[5\]"):
        write_edited(base, [NamedDeltas("e", {"b.bias": Given(torch.ones(5).double())})], out)
    with pytest.raises(UnsupportedEdit, match="'ids' is stored as int64"):
        write_edited(base, [NamedDeltas("e", {"ids": Given(torch.ones(7))})], out)
    both = [
        deltas(tensors, ["b.bias"]),
        NamedDeltas("idle", {"b.weight": Given(torch.zeros(5, 3))}),
    ]
    with pytest.raises(NoEffect, match="'idle' changes nothing: every value stays"):
        write_edited(base, both, out)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    with pytest.raises(OutputExists):
        write_edited(base, [deltas(tensors, ["b.bias"])], tmp_path / "base")


def test_what_goes_wrong_later_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = weights()
    base = TensorFiles(model_folder(tmp_path / "base", tensors))
    edit = deltas(tensors, ["a.weight"])

    def refuse(folder: Path, written: Written) -> None:
        assert (folder / SHARDS[0]).exists() and written.path == tmp_path / "out"
        raise CorruptFile(folder, "no")

    with pytest.raises(CorruptFile):
        write_edited(base, [edit], tmp_path / "out", finish=refuse)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(changing, "write_all", full)
        with pytest.raises(OutputUnwritable, match="disk is full"):
            write_edited(base, [edit], tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "disk_usage", lambda _: _Free())
        with pytest.raises(OutputUnwritable, match=r"takes 0\.00 GB and 0\.00 GB are free"):
            write_edited(base, [edit], tmp_path / "out")

    class Interrupting(Given):
        def rows(self, start: int, stop: int) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edits = [NamedDeltas("e", {"a.weight": Interrupting(tensors["a.weight"])})]
        write_edited(base, edits, tmp_path / "out")
    with open(tmp_path / "base" / SHARDS[1], "r+b") as f:
        f.truncate(100)
    with pytest.raises(CorruptFile, match="became shorter"):
        write_edited(base, [edit], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


class _Free:
    free = 0


def test_threads_change_no_bit(tmp_path: Path) -> None:
    tensors = weights()
    base = TensorFiles(model_folder(tmp_path / "base", tensors))
    edit = deltas(tensors, ["a.weight", "b.weight"])
    done = [write_edited(base, [edit], tmp_path / str(n), threads=n) for n in (1, 5)]
    assert done[0].changes == done[1].changes
    assert done[0].result_sha256 == done[1].result_sha256
    assert math.isfinite(done[0].changes["a.weight"].cosine)
