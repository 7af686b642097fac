"""One tensor on its way from file to file, changed block by block."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from salve_lm.edits.plan import Effect
from salve_lm.edits.tensor_change import ChangeSums, TensorChange
from salve_lm.errors import ShapeMismatch, UnsupportedEdit
from salve_lm.task_vectors.blocks import BLOCK, row_blocks
from salve_lm.task_vectors.copying import expect_reading, start_writeback, write_all
from salve_lm.task_vectors.safetensors_header import TensorInfo
from salve_lm.task_vectors.tensor_files import TensorFiles

EDITABLE = (torch.float32, torch.bfloat16, torch.float16)
# blocks that go to the disk together
_TOGETHER = 16


class Delta(Protocol):
    """The change of one tensor, computed when and where it is wanted."""

    def rows(self, start: int, stop: int) -> Tensor:
        """float32 change of rows `start` to `stop`, [stop - start, *shape[1:]], strength included.

        Called for the blocks of `row_blocks`, in order; different tensors are asked from different
        threads at the same time.
        """


class NamedDeltas(NamedTuple):
    """The changes that one edit makes, by the tensor's name on disk."""

    name: str
    deltas: Mapping[str, Delta]


class Changed(NamedTuple):
    """One finished tensor: how far it moved, and the SHA-256 of its bytes before and after."""

    change: TensorChange
    sha256_before: str
    sha256_after: str


def change_tensor(
    name: str,
    base: TensorFiles,
    target: TensorInfo,
    fd: int,
    deltas: Sequence[tuple[Delta, Effect]],
    proceed: Callable[[], None],
) -> Changed:
    """Read a tensor by blocks, add the deltas in float32 and in order, cast once, and write it.

    Args:
        name: of the tensor in `base`.
        base: the unedited weights.
        target: dtype and place of the new tensor in its file.
        fd: the new file, open for writing.
        deltas: the change of each edit, with what is noted about it.
        proceed: called once a block; raises where the work is to end.

    Raises:
        NotFinite: NaN or infinity in the original, a delta or the result.
        ShapeMismatch: a delta of another shape or dtype.
        UnsupportedEdit: a tensor that does not hold 16 or 32-bit floating-point numbers.
    """
    info = base.info(name)
    if info.dtype not in EDITABLE:
        raise UnsupportedEdit(
            f"{name!r} is stored as {str(info.dtype).removeprefix('torch.')}; only float32, "
            "bfloat16 and float16 tensors can be changed. Use an unquantised base."
        )
    width = math.prod(info.shape[1:])
    most = min(math.prod(info.shape), max(BLOCK, width))
    old_memory = torch.empty(most, dtype=info.dtype)
    new_memory = torch.empty(most, dtype=target.dtype)
    block_memory = torch.empty(most)
    sums = ChangeSums(target.dtype, most, torch.device("cpu"))
    before, after = hashlib.sha256(), hashlib.sha256()
    flushed = 0
    for k, (start, stop) in enumerate(row_blocks(info.shape)):
        proceed()
        n = (stop - start) * width
        first = start * width
        if k % _TOGETHER == 0:
            ahead = _TOGETHER * n * info.dtype.itemsize
            expect_reading(base.fileno(info.file), info.offset + first * info.dtype.itemsize, ahead)
        old, new, block = old_memory[:n], new_memory[:n], block_memory[:n]
        raw = _bytes(old)
        base.read_into(info.file, raw, info.offset + first * info.dtype.itemsize)
        before.update(raw)
        block.copy_(old)
        for delta, effect in deltas:
            change = _checked(delta.rows(start, stop), name, (stop - start, *info.shape[1:]))
            _add(block, change.reshape(-1), target.dtype, effect)
        new.copy_(block)
        sums.add(old, block, new)
        result = _bytes(new)
        after.update(result)
        write_all(fd, result, target.offset + first * target.dtype.itemsize)
        if k % _TOGETHER == _TOGETHER - 1:
            written = (first + n) * target.dtype.itemsize
            start_writeback(fd, target.offset + flushed, written - flushed)
            flushed = written
    return Changed(sums.change(name), before.hexdigest(), after.hexdigest())


def _add(block: Tensor, change: Tensor, dtype: torch.dtype, effect: Effect) -> None:
    if effect.stored:
        block.add_(change)
        return
    before = block.clone()
    block.add_(change)
    effect.computed |= not torch.equal(block, before)
    effect.stored |= not torch.equal(block.to(dtype), before.to(dtype))


def _checked(change: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if change.dtype != torch.float32 or change.numel() != math.prod(shape):
        raise ShapeMismatch(
            f"The change of {name!r} is {change.dtype} {list(change.shape)}; these rows of the "
            f"base are {list(shape)}. Base and fine-tuned weights must belong together."
        )
    return change


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data
