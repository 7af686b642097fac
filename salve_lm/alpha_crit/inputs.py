"""Checks and layouts shared by the threshold functions: wrong inputs stop here, with a cure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from salve_lm.errors import BadConfig, NotFinite, ShapeMismatch

Rows = Literal["class", "all"] | Sequence[int]
"""Which rows of the head an edit scales: the target's, all of them, or a list."""

_BLOCK = 4096


def gating_strength(c: Tensor, d_in: int) -> Tensor:
    """`c` [d_in] in float64, checked: one non-negative finite strength per input channel.

    Raises ShapeMismatch, NotFinite or BadConfig (a negative entry).
    """
    if c.ndim != 1 or len(c) != d_in:
        raise ShapeMismatch(
            f"c has shape {tuple(c.shape)}, but the edited axis has {d_in} input channels. "
            "Use the decoder row of an SAE trained on the input of this layer."
        )
    c = c.detach().to(torch.float64)
    if not torch.isfinite(c).all():
        raise NotFinite("c", "the strengths of an edit", "Train the SAE again.")
    if (c < 0).any():
        raise BadConfig("c has negative entries. Pass magnitudes, such as W_dec[l].abs().")
    return c


def matrix(x: Tensor, name: str) -> Tensor:
    """`x` detached, if it is [samples, channels]; ShapeMismatch otherwise."""
    if x.ndim != 2:
        raise ShapeMismatch(
            f"{name} has shape {tuple(x.shape)}; thresholds need [samples, channels]. "
            "Reduce positions first (pooled_contributions, or a site with :mean or :cls)."
        )
    return x.detach()


def head(W: Tensor, b: Tensor | None, d_in: int) -> tuple[Tensor, Tensor]:
    """A head `W` [n_classes, d_in], `b` [n_classes] in float64; zeros for an absent bias."""
    if W.ndim != 2 or W.shape[1] != d_in:
        raise ShapeMismatch(
            f"W has shape {tuple(W.shape)}, but x has {d_in} channels; W must be [n_classes, d_in]."
        )
    W = W.detach().to(torch.float64)
    if b is None:
        return W, W.new_zeros(len(W))
    if b.shape != W.shape[:1]:
        raise ShapeMismatch(f"b has shape {tuple(b.shape)}, but W has {len(W)} rows.")
    return W, b.detach().to(torch.float64)


def row_numbers(rows: Rows, target: int, n_rows: int) -> list[int]:
    """The rows that `rows` names, sorted and unique; BadConfig where one does not exist."""
    if not 0 <= target < n_rows:
        raise BadConfig(f"Class {target} does not exist: there are {n_rows} (0 to {n_rows - 1}).")
    if isinstance(rows, str):
        if rows == "class":
            return [target]
        if rows == "all":
            return list(range(n_rows))
        raise BadConfig(f"rows is {rows!r}; use 'class', 'all' or a list of row numbers.")
    wanted = sorted({int(r) for r in rows})
    if not wanted:
        raise BadConfig("rows is an empty list: nothing would be edited. Name at least one row.")
    if wanted[0] < 0 or wanted[-1] >= n_rows:
        raise BadConfig(f"rows {wanted} leave the {n_rows} rows of the layer (0 to {n_rows - 1}).")
    return wanted


def wide_blocks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """`x` [n, channels] in float64, some thousand rows at a time: (which rows, their values).

    Widening all of `x` at once would double or quadruple its memory, and a new tensor for every
    block fragments the heap; so the values are overwritten by the next block.
    """
    as_is = x.dtype == torch.float64
    room = x.new_empty(0 if as_is else min(_BLOCK, len(x)), x.shape[1], dtype=torch.float64)
    for first in range(0, len(x), _BLOCK):
        part = slice(first, min(first + _BLOCK, len(x)))
        block = x[part]
        yield part, block if as_is else room[: len(block)].copy_(block)
