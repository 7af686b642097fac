"""Per-channel contributions `u_j` to a logit: what the threshold functions work on."""

from __future__ import annotations

import torch
from torch import Tensor

from salve_lm.alpha_crit.inputs import matrix
from salve_lm.errors import ShapeMismatch

_BLOCK = 2048


def linear_contributions(x: Tensor, w_row: Tensor) -> Tensor:
    """`u_j = w_ij a_j` of a linear head (METHODS 4).

    Args:
        x: head inputs [n, d_in].
        w_row: the target's row of the head [d_in].

    Returns:
        u [n, d_in], float64, stored channel by channel: the order in which the threshold
        functions read it, and no dearer to write than row by row.
    """
    x = matrix(x, "x")
    n, d_in = x.shape
    if w_row.shape != (d_in,):
        raise ShapeMismatch(
            f"w_row has shape {tuple(w_row.shape)}, but x has {d_in} channels; pass one row of W."
        )
    w = w_row.detach().to(x.device, torch.float64)[:, None]
    u = torch.empty(d_in, n, dtype=torch.float64, device=x.device)
    for start in range(0, n, _BLOCK):
        # Transposed in the narrow dtype, block by block, while the block is in cache.
        block = x[start : start + _BLOCK].t().contiguous()
        torch.mul(block, w, out=u[:, start : start + _BLOCK])
    return u.t()


def pooled_contributions(a: Tensor, w_row: Tensor) -> Tensor:
    """`u_j = mean over positions of w_ij a_j`: a 1x1 convolution followed by average pooling.

    Not valid with a nonlinearity between the convolution and the pool: use `searched` there.

    Args:
        a: inputs of the convolution [n, d_in, *positions].
        w_row: the target's kernel [d_in] or [d_in, 1, ...].

    Returns:
        u [n, d_in], float64.
    """
    if a.ndim < 3:
        raise ShapeMismatch(
            f"a has shape {tuple(a.shape)}; pooled_contributions needs [n, d_in, positions...]. "
            "Use linear_contributions for [n, d_in]."
        )
    if w_row.numel() != a.shape[1] or w_row.shape[0] != a.shape[1]:
        raise ShapeMismatch(
            f"w_row has shape {tuple(w_row.shape)}, but a has {a.shape[1]} channels. "
            "Only 1x1 kernels have per-channel contributions; use `searched` for larger ones."
        )
    pooled = a.detach().flatten(2).mean(2, dtype=torch.float64)
    return linear_contributions(pooled, w_row.reshape(-1))
