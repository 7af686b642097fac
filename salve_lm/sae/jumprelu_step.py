"""The training step of jumprelu: one large product less than SAELens', or sparse products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import JumpReLU, JumpReLUTrainingSAE, Step
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from torch import Tensor

from salve_lm.sae.sparse_products import (
    Sparse,
    SparseLatents,
    decoded,
    dense_encoded,
    encoded,
    make_entries,
    preactivations,
    sparse_by_count,
    weights_of,
)
from salve_lm.sae.step_output import StepOutput, summed


def takes_jumprelu_step(sae: TrainingSAE[Any]) -> bool:
    """Whether `jumprelu_step` computes this autoencoder's loss."""
    plain = sae.cfg.normalize_activations not in ("layer_norm", "constant_norm_rescale")
    return type(sae) is JumpReLUTrainingSAE and plain


def jumprelu_step(
    sae: Any,
    x: Tensor,
    coefficients: Mapping[str, float],
    *,
    dead: Tensor | None = None,
    sparse: Sparse = "auto",
) -> StepOutput:
    """Loss and latents of one batch.

    Args:
        sae: an autoencoder that `takes_jumprelu_step`.
        x: activations [n, d_in].
        coefficients: weight `l0` of the penalty.
        dead: latents [d_sae] that the option `pre_act_loss_coefficient` revives.
        sparse: whether to take sparse products; the loss on dead latents' pre-activations, where
            there is one, is dense.
    """
    w = weights_of(sae)
    with torch.no_grad():
        # SAELens' projection, without which the gate would let negative values through
        sae.threshold.clamp_(min=0.0)
        pre = preactivations(x, w)
        # a latent has a gradient from half a bandwidth below its threshold on; a little more,
        # because of rounding, and negated, so that NaN is not left out
        touched = ~(pre <= sae.threshold.to(pre.dtype) - 0.51 * sae.bandwidth)
    dense_loss = dead is not None and sae.cfg.pre_act_loss_coefficient is not None
    if dense_loss or not sparse_by_count(touched, sparse):
        return _dense(sae, x, pre, coefficients, dead)

    rows, latents = touched.nonzero().unbind(1)
    of = make_entries(rows, latents, *pre.shape)
    hidden = encoded(pre[rows, latents], x, w, of)
    gate = (sae.threshold.to(hidden.dtype)[latents], sae.bandwidth, sae.cfg.jumprelu_ste_to_input)
    # SAELens sums the threshold's gradient over an axis of rows
    acts = JumpReLU.apply(hidden[None], *gate)[0]
    n = x.shape[0]
    mse = (decoded(acts, w.W_dec, of) + w.b_dec - x).square().sum() / n
    mode = sae.cfg.jumprelu_sparsity_loss_mode
    if mode == "tanh":
        norms = w.W_dec.norm(dim=1)[latents]
        penalty = torch.tanh(sae.cfg.jumprelu_tanh_scale * acts * norms).sum()
    else:
        l0 = acts.new_zeros(n).index_add(0, rows, Step.apply(hidden[None], *gate)[0])
        target = sae.cfg.target_l0
        penalty = (2 / target * (l0 - target) ** 2 if mode == "quadratic" else l0).sum()
    losses = {"mse_loss": mse, "l0_loss": coefficients["l0"] * penalty / n}
    if sae.cfg.pre_act_loss_coefficient is not None:
        losses["pre_act_loss"] = mse.new_zeros(())
    return summed(losses, SparseLatents(rows, latents, acts.detach(), pre.shape))


def _dense(
    sae: Any, x: Tensor, pre: Tensor, coefficients: Mapping[str, float], dead: Tensor | None
) -> StepOutput:
    hidden = dense_encoded(pre, x, weights_of(sae))
    threshold = sae.threshold.to(hidden.dtype)
    acts = JumpReLU.apply(hidden, threshold, sae.bandwidth, sae.cfg.jumprelu_ste_to_input)
    x_hat = sae.decode(acts)
    given = TrainStepInput(x, dict(coefficients), dead, 0, False)
    mse = (x_hat - x).square().sum() / x.shape[0]
    return summed({"mse_loss": mse, **sae.calculate_aux_loss(given, acts, hidden, x_hat)}, acts)
