"""How strongly a class must be enhanced before it wins. Enhancement never clamps: all is linear."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from salve_lm.alpha_crit.inputs import gating_strength, head, matrix, row_numbers, wide_blocks
from salve_lm.errors import BadConfig, NotFinite


class GainInterval(NamedTuple):
    """The alphas >= 0 at which a class wins.

    low, high: [n] float64, both NaN where no alpha wins; high may be +inf.
    empty: [n] bool.
    """

    low: Tensor
    high: Tensor
    empty: Tensor


class _Lines(NamedTuple):
    """Logits z + alpha R, both [n, n_classes]."""

    z: Tensor
    R: Tensor


def alpha_gain(x: Tensor, W: Tensor, b: Tensor | None, c: Tensor, target: int) -> Tensor:
    """`rows: class`: (max of the others - z_i) / R_i, R_i = sum_j w_ij c_j a_j (METHODS 4).

    Args:
        x: head inputs [n, d_in].
        W: [n_classes, d_in].
        b: [n_classes] or None.
        c: non-negative strengths [d_in].
        target: row of the class i.

    Returns:
        [n] float64: 0 where the class wins (or ties) already, +inf where R_i <= 0.
    """
    lines = _lines(x, W, b, c, target)
    others = lines.z.clone()
    others[:, target] = -math.inf
    missing = others.amax(1) - lines.z[:, target]
    rate = lines.R[:, target]
    alpha = torch.where(rate > 0, missing / rate, math.inf)
    return torch.where(missing <= 0, 0.0, alpha)


def gain_interval(x: Tensor, W: Tensor, b: Tensor | None, c: Tensor, target: int) -> GainInterval:
    """`rows: all`: the alphas with alpha (R_i - R_k) >= z_k - z_i for all k (METHODS 4).

    Arguments as `alpha_gain`.
    """
    lines = _lines(x, W, b, c, target)
    rivals = [k for k in range(lines.z.shape[1]) if k != target]
    missing = lines.z[:, rivals] - lines.z[:, target, None]
    rate = lines.R[:, target, None] - lines.R[:, rivals]
    at = missing / rate
    low = torch.where(rate > 0, at, 0.0).amax(1).clamp(min=0)
    high = torch.where(rate < 0, at, math.inf).amin(1)
    empty = (low > high) | ((rate == 0) & (missing > 0)).any(1)
    return GainInterval(
        torch.where(empty, math.nan, low), torch.where(empty, math.nan, high), empty
    )


def _lines(x: Tensor, W: Tensor, b: Tensor | None, c: Tensor, target: int) -> _Lines:
    x = matrix(x, "x")
    W, b = (t.to(x.device) for t in head(W, b, x.shape[1]))
    if len(W) < 2:
        raise BadConfig("To win, a class needs a rival: the head has fewer than two rows.")
    row_numbers("class", target, len(W))
    c = gating_strength(c, x.shape[1]).to(x.device)
    both = torch.cat([W, W * c]).t()
    lines = torch.empty(len(x), both.shape[1], dtype=torch.float64, device=x.device)
    for part, wide in wide_blocks(x):
        lines[part] = wide @ both
    z, R = lines.chunk(2, 1)
    z += b
    if not torch.isfinite(z).all():
        raise NotFinite("logits", "x @ W.T + b", "Check x, W and b for NaN or infinity.")
    return _Lines(z, R)
