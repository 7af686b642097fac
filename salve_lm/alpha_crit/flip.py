"""Class-flip thresholds: the alpha at which a class stops being the arg max (the primary one)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from salve_lm.alpha_crit.breakpoints import (
    Breakpoints,
    breakpoints,
    column_chunks,
    roots_within,
    swept,
)
from salve_lm.alpha_crit.inputs import Rows, gating_strength, head, matrix, row_numbers, wide_blocks
from salve_lm.errors import BadConfig, NotFinite, ShapeMismatch


class ClassFlip(NamedTuple):
    """Class-flip thresholds of n samples.

    alpha: [n] float64; +inf where the class is never lost, NaN for samples left out.
    counted: [n] bool; the unedited model assigns the sample to the class.
    returns: [n] bool; the sample is assigned to the class again at some larger alpha.
    left_out_share: share of samples that are not counted.
    re_entry_share: share of the counted samples that return (NaN if none is counted). Where it
        is not 0, accuracy(alpha) is not one minus the distribution of `alpha`.
    """

    alpha: Tensor
    counted: Tensor
    returns: Tensor
    left_out_share: float
    re_entry_share: float


class _Margins(NamedTuple):
    """Target minus rival, as functions of alpha: edited weights, and what stays constant."""

    weight: Tensor  # [n_functions, d_in]: target's row, if edited, minus rival's, if edited
    bias: Tensor  # [n_functions], likewise
    target_edited: bool
    unedited: list[int]  # rivals that together are the last function (empty: there is none)


def class_flip(
    x: Tensor, W: Tensor, b: Tensor | None, c: Tensor, target: int, rows: Rows = "class"
) -> ClassFlip:
    """Smallest alpha at which some `z_k(alpha) >= z_i(alpha)`, in closed form (METHODS 4).

    Edited rows are gated by max(0, 1 - alpha c_j), the others are constant. Adding one vector to
    all rows of the head changes nothing with `rows="all"`, unlike the zero-logit threshold.

    Args:
        x: head inputs [n, d_in] (pooled for a 1x1 convolution with average pooling).
        W: [n_classes, d_in].
        b: [n_classes] or None.
        c: non-negative strengths [d_in].
        target: row of the class i.
        rows: edited rows: "class", "all" or a list.
    """
    x = matrix(x, "x")
    n, d_in = x.shape
    W, b = (t.to(x.device) for t in head(W, b, d_in))
    _require_rivals(W)
    points = breakpoints(gating_strength(c, d_in).to(x.device))
    margins = _margins(W, b, target, row_numbers(rows, target, len(W)))
    counted = _assigned(x, W, b, target)
    alpha = torch.full((n,), math.nan, dtype=torch.float64, device=x.device)
    returns = torch.zeros(n, dtype=torch.bool, device=x.device)

    chosen = torch.nonzero(counted).squeeze(1)
    for part, columns in column_chunks(x, len(margins.weight), chosen):
        constant = _constants(W @ columns + b[:, None], margins, target)
        alpha[part], returns[part] = _first_flips(columns, margins.weight, constant, points)
    return summarised(alpha, counted, returns)


def lce_flip(z: Tensor, W: Tensor, v: Tensor, s: Tensor, target: int) -> ClassFlip:
    """Class-flip threshold of latent-contrast erasure, exact and linear (METHODS 3b).

    T(x) = x - alpha s(x) v moves logit k by -alpha s(x) w_k . v, so the flip is the smallest
    (z_i - z_k) / (s(x) (w_i - w_k) . v) over the rivals with a positive denominator. What falls
    in a straight line never returns.

    Args:
        z: unedited logits [n, n_classes].
        W: [n_classes, d_in].
        v: direction removed [d_in].
        s: its strength in each sample [n].
        target: row of the class i.
    """
    z = matrix(z, "z").to(torch.float64)
    W, _ = head(W, None, len(v))
    if z.shape[1] != len(W) or s.shape != z.shape[:1]:
        raise ShapeMismatch(
            f"z {tuple(z.shape)}, W {tuple(W.shape)} and s {tuple(s.shape)} do not agree; "
            "they must be [n, n_classes], [n_classes, d_in] and [n]."
        )
    _require_rivals(W)
    row_numbers("class", target, len(W))
    v, s = v.detach().to(z), s.detach().to(z)
    for name, tensor in (("z", z), ("s", s), ("v", v), ("W", W)):
        if not torch.isfinite(tensor).all():
            raise NotFinite(name, "a class-flip threshold")
    along = W.to(z) @ v
    rate = s[:, None] * (along[target] - along)
    alpha = torch.where(rate > 0, (z[:, target, None] - z) / rate, math.inf)
    alpha[:, target] = math.inf
    counted = z.argmax(1) == target
    first = torch.where(counted, alpha.amin(1), math.nan)
    return summarised(first, counted, torch.zeros_like(counted))


def _margins(W: Tensor, b: Tensor, target: int, edited: list[int]) -> _Margins:
    rivals = [k for k in edited if k != target]
    unedited = sorted(set(range(len(W))) - {*edited, target})
    is_edited = target in edited
    own, own_bias = W[target, None] * is_edited, b[target, None] * is_edited
    weight, bias = own - W[rivals], own_bias - b[rivals]
    if unedited:
        # They share the gated part, so only the largest of them can be the first.
        weight, bias = torch.cat([weight, own]), torch.cat([bias, own_bias])
    return _Margins(weight, bias, is_edited, unedited)


def _constants(logits: Tensor, margins: _Margins, target: int) -> Tensor:
    """The part of each margin that the edit leaves alone: [n_functions, n]."""
    constant = margins.bias[:, None].repeat(1, logits.shape[1])
    if not margins.target_edited:
        constant += logits[target]
    if margins.unedited:
        constant[-1] -= logits[margins.unedited].amax(0)
    return constant


def _assigned(x: Tensor, W: Tensor, b: Tensor, target: int) -> Tensor:
    """[n] bool: the unedited head's arg max is the target."""
    assigned = torch.empty(len(x), dtype=torch.bool, device=x.device)
    for part, wide in wide_blocks(x):
        logits = wide @ W.t() + b
        if not torch.isfinite(logits).all():
            raise NotFinite("logits", "x @ W.T + b", "Check x, W and b for NaN or infinity.")
        assigned[part] = logits.argmax(1) == target
    return assigned


def _first_flips(
    columns: Tensor, weight: Tensor, constant: Tensor, points: Breakpoints
) -> tuple[Tensor, Tensor]:
    """First alpha at which any margin is <= 0, and whether all are positive again behind it.

    Arguments as `swept`; returns [n] float64 and [n] bool.
    """
    n = columns.shape[1]
    flips = columns.new_full((n,), math.inf)
    returns = torch.zeros(n, dtype=torch.bool, device=columns.device)
    seen = torch.zeros_like(returns)  # the class wins somewhere in the pieces swept so far
    for alpha, values in swept(columns, weight, constant, points):
        positive = values > 0
        wins = positive.all(1)
        lost = torch.nonzero(wins[0] & ~wins.all(0)).squeeze(1)
        wins_right = wins[1:] | _wins_inside(values, positive, wins)
        if len(lost):
            right = (~wins[:, lost]).max(0).indices  # max of booleans: the first True
            before, after = values[right - 1, :, lost], values[right, :, lost]
            roots = roots_within(alpha, before, after, right[:, None])
            flips[lost] = torch.where(after <= 0, roots, math.inf).amin(1)
            # In the segment of the flip, the margin that fell keeps falling: look behind it.
            behind = torch.arange(len(wins_right), device=right.device)[:, None] >= right
            returns[lost] = seen[lost] | (wins_right[:, lost] & behind).any(0)
        seen |= wins_right.any(0)
    flips = torch.where(wins[0], flips, 0.0)
    return flips, torch.where(wins[0], returns, seen)


def _wins_inside(values: Tensor, positive: Tensor, wins: Tensor) -> Tensor:
    """[k, n] bool: all margins positive strictly inside a segment though not at its ends.

    Margins are linear there, so the alphas where all are positive form an interval: behind the
    last upward crossing and before the first downward one.
    """
    possible = (positive[:-1] | positive[1:]).all(1) & ~(wins[:-1] | wins[1:])
    inside = torch.zeros_like(possible)
    left, sample = torch.nonzero(possible, as_tuple=True)
    start, end = values[left, :, sample], values[left + 1, :, sample]
    crossing = start / (start - end)
    opens = torch.where(start > 0, 0.0, crossing).amax(1)
    closes = torch.where(end > 0, 1.0, crossing).amin(1)
    inside[left, sample] = opens < closes
    return inside


def summarised(alpha: Tensor, counted: Tensor, returns: Tensor) -> ClassFlip:
    """Thresholds of samples, [n] each as in `ClassFlip`, with their shares."""
    left_out = float((~counted).double().mean()) if len(counted) else math.nan
    return ClassFlip(alpha, counted, returns, left_out, float(returns[counted].double().mean()))


def _require_rivals(W: Tensor) -> None:
    if len(W) < 2:
        raise BadConfig("A class flip needs a head with at least two rows.")
