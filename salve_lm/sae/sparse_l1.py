"""The L1 objective of a ReLU autoencoder by sparse products, once its latents are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from salve_lm.sae.sparse_products import (
    Entries,
    SparseLatents,
    Weights,
    bag_sums,
    encoder_gradients,
    inner_products,
    make_entries,
)


def sparse_l1_terms(
    x: Tensor, z: Tensor, w: Weights, *, weight_by_norm: bool
) -> tuple[Tensor, Tensor, SparseLatents]:
    """The terms of `five_products.l1_terms` with relu, by one dense product and four sparse ones.

    Args:
        x: activations [n, d_in]; no gradient is computed for them.
        z: rectified `preactivations` [n, d_sae], computed without a graph.
        w: the weights.
        weight_by_norm: weight latent l by the norm of its decoder row.

    Returns:
        The mean over the batch of the summed squared error [] and of sum_l w_l z_l [], and z.
    """
    at = z.nonzero()
    of = make_entries(at[:, 0], at[:, 1], z.shape[0], z.shape[1])
    values = z[of.rows, of.latents].to(x.dtype)
    mse, sparsity = _SparseL1.apply(values, x, *w, weight_by_norm, of)
    return mse, sparsity, SparseLatents(of.rows, of.latents, values, z.shape)


class _SparseL1(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        subtract_b_dec: bool,
        weight_by_norm: bool,
        of: Entries,
    ) -> tuple[Tensor, Tensor]:
        error = bag_sums(W_dec.detach(), of.latents, values, of.offsets).add_(b_dec).sub_(x)
        rows, sorted_values = of.rows[of.order], values[of.order]
        ones = x.new_ones(x.shape[0], 1)
        column = bag_sums(ones, rows, sorted_values, of.latent_offsets)[:, 0]
        norms = W_dec.norm(dim=1) if weight_by_norm else torch.ones_like(column)
        ctx.save_for_backward(x, W_enc, W_dec, b_dec, error, column, norms, rows, sorted_values)
        ctx.of, ctx.flags = of, (subtract_b_dec, weight_by_norm)
        return error.square().sum() / x.shape[0], (column * norms).sum() / x.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, W_dec, b_dec, error, column, norms, rows, values = ctx.saved_tensors
        subtract_b_dec, weight_by_norm = ctx.flags
        of: Entries = ctx.of
        g_mse, g_sparsity = grads[0], grads[1] / x.shape[0]

        g_out = error * (2 * g_mse / x.shape[0])
        g_W_dec = bag_sums(g_out, rows, values, of.latent_offsets)
        if weight_by_norm:
            # as in `five_products`: at a zero row the norm's gradient is taken to be 0
            per_row = torch.where(norms > 0, column / norms, 0.0) * g_sparsity
            g_W_dec.addcmul_(W_dec, per_row[:, None])
        g_z = inner_products(g_out, W_dec, of.bags, of.latents, of.offsets)
        g_z += (g_sparsity * norms)[of.latents]
        g_W_enc, g_b_enc, g_x = encoder_gradients(
            g_z[of.order], rows, of.latent_offsets, x, W_enc, b_dec, subtract_b_dec
        )
        g_b_dec = g_out.sum(0) if g_x is None else g_out.sum(0) + g_x
        return None, None, g_W_enc, g_b_enc, g_W_dec, g_b_dec, None, None, None
