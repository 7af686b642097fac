"""Piecewise linear functions of alpha that share their breakpoints, swept from right to left.

Every logit, and every difference of two logits, of a decoder-guided edit has the form

    f(alpha) = constant + sum_j weight_j x_j max(0, 1 - alpha c_j)

whose breakpoints 1/c_j depend on the edit alone. One pass over the channels, from the last
gate to close to the first, gives f at all breakpoints:

    f(alpha_k) = f(alpha_k+1) + (alpha_k+1 - alpha_k) * sum of weight_j x_j c_j over open gates

The sums run over the gates still open (suffix sums). Total minus prefix would lose the roots
that depend on nothing being left: with all gates closed, f must be `constant` to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_SEGMENTS = 24  # swept per piece; a piece should stay in cache until it is searched
_WIDTH = 10240  # functions times samples per operation: few enough to stay in cache, and many
_BLOCK = 2048  # enough that an operation costs its work, not its call; samples per transpose


class Breakpoints(NamedTuple):
    """Where the gates of an edit close.

    alpha: [m + 1] ascending: 0, then 1/c_j of the m channels with c_j > 0 (repeated for ties).
    channels: [m] the channel whose gate closes at alpha[k + 1].
    strength: [m] its c_j.
    never: [d_in - m] channels with c_j = 0, whose gates stay open.
    """

    alpha: Tensor
    channels: Tensor
    strength: Tensor
    never: Tensor


class Piece(NamedTuple):
    """Values at neighbouring breakpoints.

    alpha: [k + 1] the breakpoints, ascending.
    values: [k + 1, n_functions, n]; overwritten by the next piece.
    """

    alpha: Tensor
    values: Tensor


def breakpoints(c: Tensor) -> Breakpoints:
    """Breakpoints of the gates max(0, 1 - alpha c_j) for checked strengths `c` [d_in]."""
    ordered, channels = torch.sort(c, descending=True, stable=True)
    # 1/c of a subnormal overflows; such a gate does not close at any representable alpha.
    m = int((ordered >= torch.finfo(torch.float64).tiny).sum())
    strength = ordered[:m]
    alpha = torch.cat([c.new_zeros(1), 1 / strength])
    return Breakpoints(alpha, channels[:m], strength, channels[m:])


def column_chunks(
    x: Tensor, n_functions: int, rows: Tensor | None = None
) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Samples in chunks for `swept`: (which samples, their inputs [d_in, n], float64).

    Args:
        x: [samples, d_in]. Float64 stored channel by channel is not copied.
        n_functions: how many functions will be swept.
        rows: samples to take, all by default.

    The inputs are overwritten by the next chunk, so memory does not grow with the samples.
    """
    n, d_in = (len(x) if rows is None else len(rows)), x.shape[1]
    if not n:
        return
    size = math.ceil(n / math.ceil(n / max(1, _WIDTH // n_functions)))
    as_is = rows is None and x.dtype == torch.float64 and x.stride(0) == 1
    room = x.new_empty(0 if as_is else d_in * size, dtype=torch.float64)
    for start in range(0, n, size):
        part: slice | Tensor = slice(start, min(start + size, n))
        if as_is:
            yield part, x[part].t()
            continue
        if rows is not None:
            part = rows[part]
        chunk = x[part]
        columns = room[: d_in * len(chunk)].view(d_in, len(chunk))
        for first in range(0, len(chunk), _BLOCK):
            # Transposed in the narrow dtype, block by block, while the block is in cache.
            columns[:, first : first + _BLOCK] = chunk[first : first + _BLOCK].t().contiguous()
        yield part, columns


def swept(
    columns: Tensor, weight: Tensor, constant: Tensor, points: Breakpoints
) -> Iterator[Piece]:
    """f at every breakpoint, piece by piece from the last to alpha = 0.

    Neighbouring pieces share a breakpoint; behind the last one f is constant. With no gate that
    ever closes there is one piece, of alpha = 0 alone.

    Args:
        columns: inputs [d_in, n], float64.
        weight: [n_functions, d_in].
        constant: [n_functions, n] (or broadcastable to it).
        points: from `breakpoints`.
    """
    k, n = len(weight), columns.shape[1]
    rate = (weight[:, points.channels] * points.strength).t().contiguous()
    rates, only_rate = rate.unbind(0), rate[:, 0].tolist()
    gaps = points.alpha.diff().tolist()
    channels = columns.unbind(0)
    closing = [channels[j] for j in points.channels.tolist()]
    slope = columns.new_zeros(k, n)
    values = columns.new_empty(_SEGMENTS + 1, k, n)
    value = values.unbind(0)
    value[0].copy_(weight[:, points.never] @ columns[points.never] + constant)
    end = len(points.channels)
    if not end:
        yield Piece(points.alpha, values[:1])
    while end > 0:
        start = max(0, end - _SEGMENTS)
        value[end - start].copy_(value[0])
        for i in range(end - 1, start - 1, -1):
            if k == 1:  # cheaper than an outer product
                slope.add_(closing[i], alpha=only_rate[i])
            else:
                torch.addr(slope, rates[i], closing[i], out=slope)
            torch.add(value[i - start + 1], slope, alpha=gaps[i], out=value[i - start])
        yield Piece(points.alpha[start : end + 1], values[: end - start + 1])
        end = start


def roots_within(piece_alpha: Tensor, before: Tensor, after: Tensor, right: Tensor) -> Tensor:
    """Roots in the segments left of breakpoint `right`, for values `before` > 0 >= `after`.

    lerp is exact at both ends, so a root on a breakpoint is that breakpoint.
    """
    return torch.lerp(piece_alpha[right - 1], piece_alpha[right], before / (before - after))


def first_roots(columns: Tensor, weight: Tensor, constant: Tensor, points: Breakpoints) -> Tensor:
    """First alpha [n] at which one function (arguments as `swept`, n_functions = 1) is <= 0.

    The first value <= 0 is found, and its segment interpolated from the left neighbour. A
    search for a root strictly inside a segment would miss those that sit on a breakpoint.
    0 where f(0) <= 0, +inf where there is none.
    """
    roots = columns.new_full((columns.shape[1],), math.inf)
    for alpha, functions in swept(columns, weight, constant, points):
        values = functions[:, 0]
        falls = torch.nonzero((values[0] > 0) & (values.amin(0) <= 0)).squeeze(1)
        if len(falls):
            chosen = values.index_select(1, falls)
            right = (chosen <= 0).max(0).indices[None]  # max of booleans: the first True
            before, after = chosen.gather(0, right - 1)[0], chosen.gather(0, right)[0]
            # Earlier pieces come later and overwrite: what remains is the first root.
            roots[falls] = roots_within(alpha, before, after, right[0])
    # NaN compares false with everything, so it must not pass for "no root".
    return torch.where(values[0] <= 0, 0.0, torch.where(values[0].isfinite(), roots, math.nan))
