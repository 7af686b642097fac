"""Thresholds by search through any function of alpha, such as a real edited network."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from salve_lm.alpha_crit.inputs import gating_strength
from salve_lm.errors import BadConfig, NotFinite, ShapeMismatch

MarginFn = Callable[[Tensor], Tensor]
"""Margins [n] at one alpha per sample [n]; the threshold is where the margin first is <= 0."""


def search_grid(c: Tensor, points: int = 64) -> Tensor:
    """Alphas on which to look for the first sign change of an edit with strengths `c` [d_in].

    A quarter of the points lie evenly where no gate is closed, the rest geometrically between
    the first gate's closing (1 / max c) and the last one's, behind which nothing changes.

    Returns:
        [points + 1] float64, ascending from 0 (fewer where all strengths are equal).
    """
    if points < 4:
        raise BadConfig(f"A search grid of {points} points is too coarse; use at least 4.")
    strength = gating_strength(c, len(c))
    strength = strength[strength >= torch.finfo(torch.float64).tiny]
    if not len(strength):
        raise BadConfig("All strengths c are zero: the edit changes nothing at any alpha.")
    first, last = float(1 / strength.max()), float(1 / strength.min())
    even = torch.linspace(0, first, points // 4 + 1, dtype=torch.float64)
    rest = torch.linspace(
        math.log(first), math.log(last), points - points // 4 + 1, dtype=torch.float64
    ).exp()
    # exp(log(x)) may fall short of x, and the last point must not lie before the last gate.
    rest[-1] = last
    return torch.cat([even, rest[1:]]).unique()


def searched(
    margin_fn: MarginFn, n: int, grid: Tensor, rtol: float = 1e-6, max_iterations: int = 100
) -> Tensor:
    """First root of each sample's margin: bracketed on a grid, then refined.

    For edits without a closed form (METHODS 4). Two roots between neighbouring grid points go
    unseen, so a finer grid is the safer one; `exact` is free of that. Values are compared with
    zero as the network computes them: float32 logits limit the precision.

    Args:
        margin_fn: margins [n] at alphas [n] (float64); see `gated_margin` for a real network.
        n: number of samples.
        grid: alphas to look at, ascending from 0 (`search_grid`).
        rtol: relative precision of the root.
        max_iterations: of the refinement; BadConfig if it does not suffice.

    Returns:
        [n] float64: 0 where the margin is <= 0 at alpha 0, +inf where no grid point has one.
    """
    grid = _checked_grid(grid)
    low = torch.full((n,), math.nan, dtype=torch.float64)
    high = torch.full((n,), math.inf, dtype=torch.float64)
    for k, alpha in enumerate(grid.tolist()):
        pending = high.isinf()
        if not pending.any():
            break
        below = pending & (_margins(margin_fn, torch.full((n,), alpha).double()) <= 0)
        high[below] = alpha
        low[below] = grid[max(k - 1, 0)]
    bracketed = torch.nonzero(high.isfinite() & (high > 0)).squeeze(1)
    roots = high.clone()
    if len(bracketed):
        roots[bracketed] = _refined(margin_fn, low, high, bracketed, rtol, max_iterations)
    return roots


def _refined(
    margin_fn: MarginFn,
    low: Tensor,
    high: Tensor,
    samples: Tensor,
    rtol: float,
    max_iterations: int,
) -> Tensor:
    """Roots of `samples` within [low, high]; the others are evaluated along at high, unread."""
    from scipy.optimize import elementwise

    everyone = torch.where(high.isfinite(), high, 0.0)

    def some(alpha, which):  # type: ignore[no-untyped-def]  # numpy in, numpy out
        full = everyone.clone()
        index = torch.from_numpy(which.reshape(-1)).long()
        full[index] = torch.from_numpy(alpha.reshape(-1)).to(torch.float64)
        return _margins(margin_fn, full)[index].numpy().reshape(alpha.shape)

    found = elementwise.find_root(
        some,
        (low[samples].numpy(), high[samples].numpy()),
        args=(samples.numpy(),),
        tolerances={"xrtol": rtol, "xatol": 0.0},
        maxiter=max_iterations,
    )
    if not found.success.all():
        raise BadConfig(
            f"{int((~found.success).sum())} thresholds did not reach rtol {rtol} in "
            f"{max_iterations} iterations. Raise max_iterations or rtol."
        )
    return torch.from_numpy(found.x).to(torch.float64)


def _checked_grid(grid: Tensor) -> Tensor:
    grid = torch.as_tensor(grid).detach().to("cpu", torch.float64)
    ascending = grid.ndim == 1 and len(grid) > 1 and bool((grid.diff() > 0).all())
    if not ascending or grid[0] != 0 or not torch.isfinite(grid).all():
        raise BadConfig("The search grid must be ascending from 0 and finite; see search_grid.")
    return grid


def _margins(margin_fn: MarginFn, alpha: Tensor) -> Tensor:
    margins = margin_fn(alpha).detach().to("cpu", torch.float64)
    if margins.shape != alpha.shape:
        raise ShapeMismatch(
            f"margin_fn returned {tuple(margins.shape)} for {len(alpha)} samples; "
            "it must return one margin per sample."
        )
    if not torch.isfinite(margins).all():
        raise NotFinite("margins", "a searched threshold", "Check the network's outputs.")
    return margins
