"""Pure application: dtypes, blocks, finiteness, effect, and the bookkeeping of changes."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import salve_lm.edits.plan as plan_module
from salve_lm.edits.ops import (
    FoldInput,
    Op,
    RankOneUpdate,
    ScaleChannels,
    ShiftBias,
)
from salve_lm.edits.plan import NamedOps, apply, apply_named
from salve_lm.edits.records import op_from_dict, op_to_dict
from salve_lm.errors import CorruptFile, NoEffect, NotFinite, UnsupportedEdit

D_OUT, D = 7, 5


def vector(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_ops(alpha: float = 0.3) -> list[Op]:
    common = {"module": "m", "output_dim": 0, "alpha": alpha}
    c = torch.rand(2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [
        ScaleChannels(**common, c=c, sign=-1),
        ScaleChannels(**common, c=c[:1], sign=1, rows=(0, 6)),
        ScaleChannels(**common, c=vector(D_OUT, 1).abs()[None], sign=-1, axis="output", has_bias=True),  # noqa: E501
        FoldInput(**common, v=vector(D, 2), q=vector(D, 3), offset=0.7),
        FoldInput(**common, v=vector(D, 2), offset=1.0),
        RankOneUpdate(**common, left=vector(D_OUT, 4), right=vector(D, 5)),
        ShiftBias(**common, delta=vector(D_OUT, 6)),
    ]  # fmt: skip


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        "m.weight": torch.randn(D_OUT, D, generator=generator).to(dtype),
        "m.bias": torch.randn(D_OUT, generator=generator).to(dtype),
        "other": torch.randn(3, generator=generator),
    }


@pytest.mark.parametrize("op", all_ops(), ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_pure_in_float32_and_cast_back(op: Op, dtype: torch.dtype) -> None:
    originals = tensors(dtype)
    kept = {n: t.clone() for n, t in originals.items()}
    result = apply(originals, [op])
    assert set(result) == {f"m.{k}" for k in op.touches}
    assert all(torch.equal(originals[n], kept[n]) for n in kept)
    in_float32 = apply({n: t.float() for n, t in originals.items()}, [op])
    for name, tensor in result.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, in_float32[name].to(dtype))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_block_size_does_not_change_a_bit(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = [NamedOps("all", all_ops())]
    whole = apply_named(tensors(), edits).tensors
    monkeypatch.setattr(plan_module, "BLOCK", rows * D)
    in_blocks = apply_named(tensors(), edits).tensors
    assert all(torch.equal(whole[n], in_blocks[n]) for n in whole)


def test_swapped_axes_and_kernels_are_the_same_edit() -> None:
    for op in all_ops():
        plain = apply(tensors(), [op])
        swapped = {**tensors(), "m.weight": tensors()["m.weight"].T.contiguous()}
        turned = apply(swapped, [_at(op, output_dim=1)])
        kernel = {**tensors(), "m.weight": tensors()["m.weight"][..., None, None]}
        pointwise = apply(kernel, [op])
        for name, tensor in plain.items():
            same = turned[name].T if name == "m.weight" else turned[name]
            assert torch.equal(tensor, same)
            assert torch.equal(tensor, pointwise[name].reshape(tensor.shape))


def _at(op: Op, **changes: object) -> Op:
    import dataclasses

    return dataclasses.replace(op, **changes)  # type: ignore[arg-type]


def test_memory_format_is_kept() -> None:
    weight = torch.randn(4, D, 3, 3).to(memory_format=torch.channels_last)
    op = ScaleChannels(module="m", output_dim=0, alpha=1.0, c=torch.rand(1, D), sign=-1)
    new = apply({"m.weight": weight}, [op])["m.weight"]
    assert new.stride() == weight.stride()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(bad: float) -> None:
    damaged = tensors()
    damaged["m.weight"][3, 2] = bad
    with pytest.raises(NotFinite, match=r"'m.weight' .*before the edit"):
        apply(damaged, [all_ops()[0]])
    with pytest.raises(NotFinite, match=r"'m.bias' .*after the edit"):
        apply(tensors(), [_at(all_ops()[-1], alpha=1e300)])
    half = {n: t.half() for n, t in tensors().items()}
    with pytest.raises(NotFinite, match="after the edit"):  # fits float32, not float16
        apply(half, [_at(all_ops()[-1], alpha=1e6)])


def test_no_effect() -> None:
    for op in all_ops(alpha=0.0):
        with pytest.raises(NoEffect, match="every value stays"):
            apply(tensors(), [op])
    # lost in storage: there, but below half a unit in the last place of every value
    tiny = _at(all_ops()[0], alpha=1e-5)
    assert apply(tensors(), [tiny])
    with pytest.raises(NoEffect, match="below the resolution"):
        apply(tensors(torch.bfloat16), [tiny])
    with pytest.raises(NoEffect, match="'second'"):
        apply_named(
            tensors(), [NamedOps("first", all_ops()), NamedOps("second", [_at(tiny, alpha=0.0)])]
        )
    with pytest.raises(NoEffect, match="'empty'"):
        apply_named(tensors(), [NamedOps("empty", [])])


def test_a_missing_bias() -> None:
    without = {"m.weight": tensors()["m.weight"]}
    with pytest.raises(UnsupportedEdit, match=r"m\.bias"):
        apply(without, [all_ops()[3]])


@settings(deadline=None, max_examples=30)
@given(alpha=st.floats(1e-3, 1.0), low=st.booleans())
def test_changes_are_measured(alpha: float, low: bool) -> None:
    dtype = torch.bfloat16 if low else torch.float32
    originals = tensors(dtype)
    result, changes = apply_named(originals, [NamedOps("e", [_at(all_ops()[3], alpha=alpha)])])
    wanted = apply({n: t.float() for n, t in originals.items()}, [_at(all_ops()[3], alpha=alpha)])
    for name, change in changes.items():
        old, new = originals[name].double(), result[name].double()
        asked = wanted[name].double() - old
        assert change.norm_before == pytest.approx(float(old.norm()))
        assert change.norm_after == pytest.approx(float(new.norm()))
        assert change.relative == pytest.approx(float((new - old).norm() / old.norm()))
        ratio = float((new - old).norm() / asked.norm()) ** 2
        assert change.applied_energy == pytest.approx(ratio, rel=1e-5)
        cosine = float(((new - old) * asked).sum() / (new - old).norm() / asked.norm())
        assert change.cosine == pytest.approx(cosine, rel=1e-5)
        if not low:
            assert change.applied_energy == pytest.approx(1) == change.cosine


def test_only_a_few_mib_beside_the_result() -> None:
    """`apply` allocates the replacement and blocks: no second float32 copy of a bfloat16 layer."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        largest_after_result = 0
        results = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not func.is_view:
                size = out.numel() * out.element_size()
                if size >= 16 << 20:
                    self.results += 1
                elif not any(
                    isinstance(a, Tensor) and a.data_ptr() == out.data_ptr() for a in args
                ):
                    self.largest_after_result = max(self.largest_after_result, size)
            return out

    weight = torch.ones(2048, 4096, dtype=torch.bfloat16)  # 16 MiB
    op = ScaleChannels(module="m", output_dim=0, alpha=1.0, c=torch.rand(1, 4096), sign=-1)
    with Largest() as seen:
        apply({"m.weight": weight}, [op])
    assert seen.results == 1
    assert seen.largest_after_result <= 2 << 20


def test_json_round_trip_to_the_bit() -> None:
    for op in all_ops(alpha=0.1 + 0.2):
        again = op_from_dict(json.loads(json.dumps(op_to_dict(op))))
        first, second = apply(tensors(), [op]), apply(tensors(), [again])
        assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "Unknown"}, "unknown op 'Unknown'"),
        ({"extra": 1}, "damaged ScaleChannels"),
        ({"c": {"shape": [3, 3], "float64": "AAAA"}}, "damaged ScaleChannels"),
        ({"c": {"shape": [1]}}, "damaged ScaleChannels"),
        ({"c": {"shape": [1], "float64": "???"}}, "damaged ScaleChannels"),
    ],
)
def test_damaged_json(change: dict[str, object], message: str) -> None:
    with pytest.raises(CorruptFile, match=message):
        op_from_dict({**op_to_dict(all_ops()[0]), **change})
