"""The row blocks in which tensors are read, changed and written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

# Elements of a block: 0.5 MB of bfloat16 to read at a time, 1 MB of float32 to compute with.
BLOCK = 1 << 18


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Blocks `(start, stop)` along the first axis that cover a tensor of `shape` once, in order.

    The live edit and the writer on disk both use these blocks, so that a change that comes out of a
    matrix product (a LoRA adapter's) has the same bits in both.

    Args:
        shape: of the tensor as it is stored. A scalar is one row; an empty tensor has no blocks.

    Yields:
        Ranges of at most `BLOCK` elements, or of one row where a row is longer than that.
    """
    rows = shape[0] if shape else 1
    width = math.prod(shape[1:])
    if rows == 0 or width == 0:
        return
    step = max(1, BLOCK // width)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
