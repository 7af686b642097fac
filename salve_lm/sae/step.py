"""One training step of any architecture: its loss, and which latents fired."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE
from torch import Tensor

from salve_lm.errors import BadConfig
from salve_lm.sae.five_products import l1_terms
from salve_lm.sae.global_topk import GlobalBatchTopK
from salve_lm.sae.jumprelu_step import jumprelu_step, takes_jumprelu_step
from salve_lm.sae.linear_l1 import LinearL1Training
from salve_lm.sae.sparse_l1 import sparse_l1_terms
from salve_lm.sae.sparse_products import (
    Sparse,
    SparseLatents,
    may_count,
    preactivations,
    sparse_by_count,
    weights_of,
)
from salve_lm.sae.step_output import StepOutput, summed
from salve_lm.sae.topk_step import takes_topk_step, topk_step

__all__ = [
    "StepOutput",
    "check_sparse",
    "compiled_training_step",
    "fired",
    "takes_five_products",
    "training_step",
]


def training_step(
    sae: TrainingSAE[Any],
    x: Tensor,
    coefficients: Mapping[str, float],
    *,
    dead: Tensor | None = None,
    step: int = 0,
    n_global: int = 0,
    empty: bool = False,
    sparse: Sparse = "auto",
) -> StepOutput:
    """Loss of one batch, as SAELens defines it, in five large products or one and sparse ones.

    gated, p-norms other than L1 and scaling of each sample take SAELens' own step.

    Args:
        sae: the autoencoder in training.
        x: activations [n, d_in].
        coefficients: weights of the penalties, as `schedule.coefficients_at` gives them.
        dead: latents [d_sae] for SAELens' auxiliary loss to revive; None for none.
        step: the optimiser step.
        n_global: rows in the global batch; 0 for the rows at hand.
        empty: x is a stand-in row of a rank without data.
        sparse: leave zeros out of the products: `auto` where few enough latents act in this batch
            that it is faster, `always` where there are exact zeros at all, `never`.
    """
    if takes_five_products(sae):
        return _l1_step(sae, x.to(sae.dtype), coefficients["l1"], sparse)
    if takes_jumprelu_step(sae):
        return jumprelu_step(sae, x.to(sae.dtype), coefficients, dead=dead, sparse=sparse)
    if isinstance(sae.activation_fn, GlobalBatchTopK):
        sae.activation_fn.n_global, sae.activation_fn.empty = n_global, empty
    if takes_topk_step(sae):
        return topk_step(sae, x.to(sae.dtype), dead=dead, sparse=sparse)
    out = sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients=dict(coefficients),
            dead_neuron_mask=dead,
            n_training_steps=step,
            is_logging_step=False,
        )
    )
    losses = {name: value.detach() for name, value in out.losses.items()}
    return StepOutput(out.loss, losses, out.feature_acts.detach())


@functools.cache
def compiled_training_step() -> Callable[..., StepOutput]:
    """`training_step` by torch.compile: one graph forwards, one backwards, the same results.

    The graph breaks only where dead latents are revived by an auxiliary loss. Steps of standard and
    jumprelu, whose latents are not counted then, are dense.
    """
    return torch.compile(training_step)


def check_sparse(sae: TrainingSAE[Any]) -> None:
    """Raise BadConfig for an autoencoder whose step has no sparse form."""
    rectified = takes_five_products(sae) and not isinstance(sae, LinearL1Training)
    if not (rectified or takes_topk_step(sae) or takes_jumprelu_step(sae)):
        raise BadConfig(
            f"sparse: always cannot be had for {sae.cfg.architecture()} with these options: its "
            "latents are not zero, or it takes SAELens' own step (gated, lp_norm, "
            "use_matryoshka_aux_loss, scaling of each sample). Set sparse to auto."
        )


def takes_five_products(sae: TrainingSAE[Any]) -> bool:
    """Whether the step's maths is that of `five_products` (and not merely close to it)."""
    plain = sae.cfg.normalize_activations not in ("layer_norm", "constant_norm_rescale")
    l1 = isinstance(sae, LinearL1Training) or (
        isinstance(sae, StandardTrainingSAE) and sae.cfg.lp_norm == 1
    )
    return plain and l1


def _l1_step(sae: TrainingSAE[Any], x: Tensor, l1: float, sparse: Sparse) -> StepOutput:
    linear = isinstance(sae, LinearL1Training)
    w = weights_of(sae)
    z = None
    if not linear and may_count(x.device, sparse):
        with torch.no_grad():
            z = preactivations(x, w).relu_()
        if sparse_by_count(z, sparse):
            mse, sparsity, latents = sparse_l1_terms(x, z, w, weight_by_norm=True)
            return summed({"mse_loss": mse, "l1_loss": l1 * sparsity}, latents)
    terms = l1_terms(
        x,
        *w[:4],
        relu=not linear,
        subtract_b_dec=w.subtract_b_dec,
        weight_by_norm=not linear,
        z=z,
    )
    return summed({"mse_loss": terms.mse, "l1_loss": l1 * terms.sparsity}, terms.z)


@torch.no_grad()
def fired(sae: TrainingSAE[Any], z: Tensor | SparseLatents, threshold: float) -> Tensor:
    """Which latents fired in the batch [d_sae], bool: some `contributions` above `threshold`."""
    if isinstance(z, SparseLatents):
        # without a pass over [n, d_sae]; the others are 0
        largest = z.values.new_zeros(z.shape[1])
        return largest.scatter_reduce_(0, z.latents, z.values, "amax") > threshold
    if isinstance(sae, LinearL1Training):
        # one pass that allocates nothing of the size of z
        return torch.linalg.vector_norm(z, ord=torch.inf, dim=0) * sae.W_dec.norm(dim=1) > threshold
    return z.amax(0) > threshold
