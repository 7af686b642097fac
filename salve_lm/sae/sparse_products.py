"""The matrix products of a training step over the latents that act, and no others.

Where few latents act, only the product that finds them has to be dense. The others touch one
decoder row and one encoder column for each latent that acts in a sample: the reconstruction, the
gradient of the latents, and the gradients of both weights. The results are those of the dense
products up to rounding; every sum has a fixed order, so that a repeated step repeats its bits.

Gradients stay dense tensors, zero where nothing acted, and so does Adam's step.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Sparse = Literal["auto", "always", "never"]
"""Sparse products where they pay off, wherever an architecture has zeros to leave out, or never."""

CROSSOVER_CPU = 1 / 16
"""Share of the latents that act in a sample up to which sparse products are faster on a CPU
(benchmarks/sae_step_sparse.py; docs/performance.md)."""

CROSSOVER_ELSEWHERE = 1 / 512
"""The same on other devices: arithmetic, not a measurement. Reading a decoder row of 4 d_in bytes
at 3 TB/s takes as long as the 2 d_in operations of each of 400 latents at 600 TFLOP/s."""


class Entries(NamedTuple):
    """Which latents act in which samples; their values are kept apart.

    Attributes:
        rows: the sample of each entry [m].
        bags: what its decoder row is summed into [m], ascending: the sample, or one of several
            partial reconstructions of it.
        latents: its latent [m].
        offsets: where each bag begins, and m at the end [n_bags + 1].
        order: a stable order of the entries by latent [m].
        latent_offsets: where each latent begins in that order, and m at the end [d_sae + 1].
    """

    rows: Tensor
    bags: Tensor
    latents: Tensor
    offsets: Tensor
    order: Tensor
    latent_offsets: Tensor


class SparseLatents(NamedTuple):
    """Latents of a batch [n, d_sae], detached, of which only the entries may be other than 0.

    Not a sparse tensor: a compiled graph cannot make one.
    """

    rows: Tensor
    latents: Tensor
    values: Tensor
    shape: torch.Size

    @property
    def is_sparse(self) -> bool:
        """True, as of a sparse tensor."""
        return True

    def to_dense(self) -> Tensor:
        """The latents as a tensor [n, d_sae]."""
        z = self.values.new_zeros(self.shape)
        return z.index_put_((self.rows, self.latents), self.values, accumulate=True)


class Weights(NamedTuple):
    """The four tensors that all architectures have.

    Attributes:
        W_enc: [d_in, d_sae].
        b_enc: [d_sae].
        W_dec: [d_sae, d_in].
        b_dec: [d_in].
        subtract_b_dec: encode x - b_dec instead of x.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    subtract_b_dec: bool


def weights_of(sae: Any) -> Weights:
    """The weights of an autoencoder in training."""
    return Weights(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.cfg.apply_b_dec_to_input)


def pays_off(share: float, device: torch.device) -> bool:
    """Whether sparse products are faster where this share of the latents acts in a sample."""
    return share <= (CROSSOVER_CPU if device.type == "cpu" else CROSSOVER_ELSEWHERE)


def may_look(device: torch.device) -> bool:
    """Whether a step may look at a value, or let one decide a shape.

    A GPU would have to be waited for, and a compiled graph breaks there.
    """
    return device.type == "cpu" and not torch.compiler.is_compiling()


def may_count(device: torch.device, sparse: Sparse) -> bool:
    """Whether a step's latents are to be counted before its products are chosen."""
    return sparse == "always" or (sparse == "auto" and may_look(device))


def sparse_by_count(z: Tensor, sparse: Sparse) -> bool:
    """Whether to take sparse products, by the share of z [n, d_sae] that is not zero."""
    if sparse != "auto" or not may_count(z.device, sparse):
        return sparse == "always"
    return pays_off(int(torch.count_nonzero(z)) / max(z.numel(), 1), z.device)


def make_entries(
    rows: Tensor,
    latents: Tensor,
    n: int,
    d_sae: int,
    bags: Tensor | None = None,
    n_bags: int = 0,
) -> Entries:
    """Entries of `n` samples from their rows and latents [m]; without `bags` rows must ascend."""
    # columns of `nonzero` are not contiguous, which embedding_bag refuses in a compiled graph
    rows, latents = rows.contiguous(), latents.contiguous()
    if bags is None:
        bags, n_bags = rows, n
    order = torch.sort(latents, stable=True).indices
    return Entries(rows, bags, latents, _starts(bags, n_bags), order, _starts(latents, d_sae))


def _starts(groups: Tensor, n: int) -> Tensor:
    # not bincount, which waits for a GPU to find the largest group
    counts = torch.zeros(n + 1, dtype=torch.int64, device=groups.device)
    return counts.scatter_add_(0, groups + 1, torch.ones_like(groups)).cumsum(0)


def preactivations(x: Tensor, w: Weights) -> Tensor:
    """(x - b_dec) W_enc + b_enc [n, d_sae], by one large product (see `five_products`)."""
    bias = w.b_enc - w.b_dec @ w.W_enc if w.subtract_b_dec else w.b_enc
    return torch.addmm(bias, x, w.W_enc)


def dense_encoded(pre: Tensor, x: Tensor, w: Weights) -> Tensor:
    """`preactivations`, computed already without a graph, as a function of the weights."""
    out: Tensor = _DenseEncoded.apply(pre, x, w.W_enc, w.b_enc, w.b_dec, w.subtract_b_dec)
    return out


def encoded(values: Tensor, x: Tensor, w: Weights, of: Entries) -> Tensor:
    """The entries `values` [m] of `preactivations` as a function of the weights.

    No gradient is computed for x.
    """
    out: Tensor = _Encoded.apply(values, x, w.W_enc, w.b_enc, w.b_dec, w.subtract_b_dec, of)
    return out


def decoded(values: Tensor, W_dec: Tensor, of: Entries) -> Tensor:
    """For each bag the sum of decoder rows [d_sae, d_in] times `values` [m]: [n_bags, d_in]."""
    out: Tensor = _Decoded.apply(values, W_dec, of)
    return out


class _DenseEncoded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pre: Tensor,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        subtract_b_dec: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec)
        ctx.subtract_b_dec = subtract_b_dec
        return pre.view_as(pre)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec = ctx.saved_tensors
        g = grads[0].to(W_enc.dtype)
        g_b_enc = g.sum(0)
        g_b_dec = None
        if ctx.subtract_b_dec:
            x, g_b_dec = x - b_dec, -(W_enc @ g_b_enc)
        return None, None, x.t() @ g, g_b_enc, g_b_dec, None


class _Encoded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        subtract_b_dec: bool,
        of: Entries,
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec, of.rows, of.order, of.latent_offsets)
        ctx.subtract_b_dec = subtract_b_dec
        return values.to(W_enc.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec, rows, order, offsets = ctx.saved_tensors
        g_W_enc, g_b_enc, g_b_dec = encoder_gradients(
            grads[0][order], rows[order], offsets, x, W_enc, b_dec, ctx.subtract_b_dec
        )
        return None, None, g_W_enc, g_b_enc, g_b_dec, None, None


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, of: Entries) -> Tensor:
        ctx.save_for_backward(
            values, W_dec, of.bags, of.latents, of.offsets, of.order, of.latent_offsets
        )
        return bag_sums(W_dec.detach(), of.latents, values, of.offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec, bags, latents, offsets, order, latent_offsets = ctx.saved_tensors
        g = grads[0].contiguous()
        g_values = inner_products(g, W_dec, bags, latents, offsets)
        return g_values, bag_sums(g, bags[order], values[order], latent_offsets), None


def encoder_gradients(
    g: Tensor,
    rows: Tensor,
    latent_offsets: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor,
    subtract_b_dec: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of W_enc, b_enc and b_dec, given those of the entries, in order of latent."""
    g_b_enc = bag_sums(x.new_ones(x.shape[0], 1), rows, g, latent_offsets)[:, 0]
    g_b_dec = None
    if subtract_b_dec:
        x, g_b_dec = x - b_dec, -(W_enc @ g_b_enc)
    return bag_sums(x, rows, g, latent_offsets).t().contiguous(), g_b_enc, g_b_dec


def bag_sums(table: Tensor, index: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """For each bag the sum over its entries of weights [m] times rows of `table` [rows, d]."""
    return F.embedding_bag(
        index, table, offsets, per_sample_weights=weights, mode="sum", include_last_offset=True
    )


def inner_products(
    g: Tensor, W_dec: Tensor, bags: Tensor, latents: Tensor, offsets: Tensor
) -> Tensor:
    """<g[bag], W_dec[latent]> of each entry [m]."""
    # what PyTorch's own embedding_bag calls in its backward pass; mode 0 is the sum
    out: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g, W_dec, latents, offsets, bags, 0
    )
    return out
