"""The L1 training step in five large matrix products instead of six.

SAELens encodes `(x - b_dec) @ W_enc`, so autograd computes the gradient of the subtracted input
only to sum it into the gradient of b_dec: one product of the size of a whole layer.
`x @ W_enc + (b_enc - b_dec @ W_enc)` is the same function, and its gradient of b_dec costs a
vector-matrix product (METHODS 1). Two passes over [n, d_sae] are saved as well: the column sums of
|z| serve both the penalty and the record of which latents fired, and the penalty's gradient
enters the backward product as its bias.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from salve_lm.sae.sparse_products import Weights, dense_encoded, preactivations

_PART = 1 << 23


class L1Terms(NamedTuple):
    """The two terms of an L1 objective, and what the step has at hand anyway.

    Attributes:
        mse: mean over the batch of the summed squared error [], differentiable.
        sparsity: mean over the batch of sum_l w_l |z_l| [], differentiable.
        z: latents [n, d_sae], detached.
    """

    mse: Tensor
    sparsity: Tensor
    z: Tensor


def l1_terms(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    relu: bool,
    subtract_b_dec: bool,
    weight_by_norm: bool,
    z: Tensor | None = None,
) -> L1Terms:
    """Encode, decode and measure one batch.

    Args:
        x: activations [n, d_in]; no gradient is computed for them.
        W_enc: [d_in, d_sae].
        b_enc: [d_sae].
        W_dec: [d_sae, d_in].
        b_dec: [d_in].
        relu: rectify z (SAELens' standard) or leave it linear (linear_l1).
        subtract_b_dec: encode x - b_dec instead of x.
        weight_by_norm: w_l is the norm of decoder row l instead of 1.
        z: the latents, where they were computed already.
    """
    if torch.is_autocast_enabled(x.device.type):
        # the hand-written backward pass would run outside autocast, in mixed types
        return _by_autograd(x, W_enc, b_enc, W_dec, b_dec, relu, subtract_b_dec, weight_by_norm, z)
    flags = (relu, subtract_b_dec, weight_by_norm)
    return L1Terms(*_FiveProducts.apply(x, W_enc, b_enc, W_dec, b_dec, *flags, z))


def _by_autograd(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    relu: bool,
    subtract_b_dec: bool,
    weight_by_norm: bool,
    z: Tensor | None = None,
) -> L1Terms:
    """The same terms with PyTorch's own backward pass; three more passes over [n, d_sae]."""
    w = Weights(W_enc, b_enc, W_dec, b_dec, subtract_b_dec)
    z = preactivations(x, w) if z is None else dense_encoded(z, x, w)
    z = F.relu(z) if relu else z
    error = (torch.addmm(b_dec, z, W_dec) - x).float()
    weight = W_dec.norm(dim=1) if weight_by_norm else z.new_ones(z.shape[1])
    sparsity = (z.abs().float().sum(0) @ weight.float()) / x.shape[0]
    return L1Terms(error.square().sum() / x.shape[0], sparsity, z.detach())


class _FiveProducts(torch.autograd.Function):
    """`_by_autograd` with fewer passes over [n, d_sae] and one such tensor less in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        relu: bool,
        subtract_b_dec: bool,
        weight_by_norm: bool,
        z: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if z is None:
            z = torch.addmm(b_enc - b_dec @ W_enc if subtract_b_dec else b_enc, x, W_enc)
            if relu:
                F.relu_(z)
        else:
            # an input must not be handed out as an output
            z = z.detach()
        error = torch.addmm(b_dec, z, W_dec).sub_(x)
        column = z.sum(0) if relu else torch.linalg.vector_norm(z, ord=1, dim=0)
        norms = W_dec.norm(dim=1) if weight_by_norm else torch.ones_like(column)
        ctx.save_for_backward(x, W_enc, W_dec, b_dec, z, error, column, norms)
        ctx.flags = relu, subtract_b_dec, weight_by_norm
        ctx.mark_non_differentiable(z)
        # or autograd would make zeros of the size of z for the gradient that z has not
        ctx.set_materialize_grads(False)
        flat = error.reshape(-1)
        return torch.dot(flat, flat) / x.shape[0], (column @ norms) / x.shape[0], z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, W_dec, b_dec, z, error, column, norms = ctx.saved_tensors
        relu, subtract_b_dec, weight_by_norm = ctx.flags
        g_mse, g_sparsity = (0.0 if g is None else g for g in grads[:2])
        g_sparsity = g_sparsity / x.shape[0]

        g_out = error * (2 * g_mse / x.shape[0])
        g_W_dec = z.t() @ g_out
        if weight_by_norm:
            # d|row|/d row is the unit row; at a zero row PyTorch's norm takes 0, and so do we
            per_row = torch.where(norms > 0, column / norms, 0.0) * g_sparsity
            g_W_dec.addcmul_(W_dec, per_row[:, None])
        g_b_dec = g_out.sum(0)

        if relu:
            g_z = torch.addmm(g_sparsity * norms, g_out, W_dec.t())
            torch.ops.aten.threshold_backward.grad_input(g_z, z, 0, grad_input=g_z)
        else:
            g_z, weight = g_out @ W_dec.t(), g_sparsity * norms
            # in parts, so that the signs do not need the memory of all latents
            n_rows = max(1, _PART // z.shape[1])
            for part, of in zip(g_z.split(n_rows), z.split(n_rows), strict=True):
                part.addcmul_(of.sign(), weight)
        g_b_enc = g_z.sum(0)
        g_W_enc = x.t() @ g_z
        if subtract_b_dec:
            g_W_enc.addr_(b_dec, g_b_enc, alpha=-1)
            g_b_dec -= W_enc @ g_b_enc
        return None, g_W_enc, g_b_enc, g_W_dec, g_b_dec, None, None, None, None
