"""Suppression thresholds of one logit: the alpha at which it reaches zero (the paper's)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from salve_lm.alpha_crit.breakpoints import breakpoints, column_chunks, first_roots
from salve_lm.alpha_crit.inputs import gating_strength, head, matrix, wide_blocks
from salve_lm.errors import NotFinite, ShapeMismatch

_CURE = "Harvest the activations again, or drop the samples."


class Head(NamedTuple):
    """A linear head: W [n_classes, d_in], b [n_classes]."""

    W: Tensor
    b: Tensor


def linear(u: Tensor, bias: Tensor | float, c: Tensor) -> Tensor:
    """`z_i / R_i`, the paper's analytic threshold (METHODS 4).

    Exact as long as alpha * max(c) <= 1. Elsewhere the paper calls it a lower bound; see
    `lower_bound_share` for how often it is one.

    Args:
        u: contributions [n, d_in] of the channels to the target logit.
        bias: b_i, a number or [n].
        c: non-negative strengths [d_in].

    Returns:
        [n] float64: 0 where z_i <= 0 already, z_i / R_i where R_i > 0, +inf elsewhere.
    """
    u = matrix(u, "u")
    c = gating_strength(c, u.shape[1]).to(u.device)
    start = _bias(bias, u).clone()
    rate = torch.empty_like(start)
    for part, wide in wide_blocks(u):
        start[part] += wide.sum(1)
        rate[part] = wide @ c
    if not torch.isfinite(start).all():
        raise NotFinite("u", "contributions to a logit", _CURE)
    alpha = torch.where(rate > 0, start / rate, math.inf)
    return torch.where(start <= 0, 0.0, alpha)


def exact(u: Tensor, bias: Tensor | float, c: Tensor) -> Tensor:
    """First root of `z_i(alpha) = b_i + sum_j u_j max(0, 1 - alpha c_j)` in closed form.

    Finds the first root also where z_i is not monotone. O(n * d_in) after one sort; fastest on
    contributions stored channel by channel, as `linear_contributions` returns them.

    Args:
        u: contributions [n, d_in] of the channels to the target logit.
        bias: b_i, a number or [n].
        c: non-negative strengths [d_in].

    Returns:
        [n] float64: 0 where z_i <= 0 already, +inf where there is no root.
    """
    u = matrix(u, "u")
    n, d_in = u.shape
    c = gating_strength(c, d_in).to(u.device)
    points = breakpoints(c)
    constant = _bias(bias, u)
    weight = u.new_ones(1, d_in, dtype=torch.float64)
    alpha = torch.empty(n, dtype=torch.float64, device=u.device)
    for part, columns in column_chunks(u, 1):
        alpha[part] = first_roots(columns, weight, constant[part], points)
    if alpha.isnan().any():
        raise NotFinite("u", "contributions to a logit", _CURE)
    return alpha


def row_centred(W: Tensor, b: Tensor | None) -> Head:
    """The head minus its mean row, and its bias minus the mean bias.

    The same predictions, but a zero-logit threshold that does not depend on a vector somebody
    could add to all rows (METHODS 4): take the target's row and bias from here.
    """
    W, b = head(W, b, W.shape[-1])
    return Head(W - W.mean(0), b - b.mean())


def lower_bound_share(linear_alpha: Tensor, exact_alpha: Tensor, rtol: float = 1e-9) -> float:
    """Share of samples whose linear threshold is <= the exact one (to `rtol`).

    Samples that say nothing are not counted: 0 in both (the logit starts at or below zero), no
    root in both, NaN. NaN where none is left.
    """
    if linear_alpha.shape != exact_alpha.shape:
        raise ShapeMismatch(
            f"{tuple(linear_alpha.shape)} linear against {tuple(exact_alpha.shape)} exact "
            "thresholds; pass those of the same samples."
        )
    same = (linear_alpha == exact_alpha) & ((exact_alpha == 0) | exact_alpha.isinf())
    counted = ~(same | linear_alpha.isnan() | exact_alpha.isnan())
    below = linear_alpha <= exact_alpha * (1 + rtol)
    return float(below[counted].double().mean())


def _bias(bias: Tensor | float, u: Tensor) -> Tensor:
    """The bias of each sample: [n] float64."""
    value = torch.as_tensor(bias, dtype=torch.float64, device=u.device).detach()
    if value.shape not in ((), (len(u),)):
        raise ShapeMismatch(
            f"bias has shape {tuple(value.shape)}; pass one number or one per sample ({len(u)})."
        )
    if not torch.isfinite(value).all():
        raise NotFinite("bias", "the bias of a logit", "Load the head again.")
    return value.expand(len(u))
