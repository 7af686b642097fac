"""One training step of any architecture: its loss, and which latents fired."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE
from torch import Tensor

from salve_lm.sae.five_products import l1_terms
from salve_lm.sae.global_topk import GlobalBatchTopK
from salve_lm.sae.linear_l1 import LinearL1Training


class StepOutput(NamedTuple):
    """What a training step yields; means are over the rows at hand.

    Attributes:
        loss: the objective [], differentiable.
        losses: its terms by SAELens' names, already weighted, detached.
        z: latents [n, d_sae], detached; may be sparse.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    z: Tensor


def training_step(
    sae: TrainingSAE[Any],
    x: Tensor,
    coefficients: Mapping[str, float],
    *,
    dead: Tensor | None = None,
    step: int = 0,
    n_global: int = 0,
    empty: bool = False,
) -> StepOutput:
    """Loss of one batch; linear_l1 and standard take five products, the others SAELens' own step.

    Args:
        sae: the autoencoder in training.
        x: activations [n, d_in].
        coefficients: weights of the penalties, as `schedule.coefficients_at` gives them.
        dead: latents [d_sae] for SAELens' auxiliary loss to revive; None for none.
        step: the optimiser step.
        n_global: rows in the global batch; 0 for the rows at hand.
        empty: x is a stand-in row of a rank without data.
    """
    if takes_five_products(sae):
        return _l1_step(sae, x.to(sae.dtype), coefficients["l1"])
    if isinstance(sae.activation_fn, GlobalBatchTopK):
        sae.activation_fn.n_global, sae.activation_fn.empty = n_global, empty
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


def takes_five_products(sae: TrainingSAE[Any]) -> bool:
    """Whether the step's maths is that of `five_products` (and not merely close to it)."""
    plain = sae.cfg.normalize_activations not in ("layer_norm", "constant_norm_rescale")
    l1 = isinstance(sae, LinearL1Training) or (
        isinstance(sae, StandardTrainingSAE) and sae.cfg.lp_norm == 1
    )
    return plain and l1


def _l1_step(sae: TrainingSAE[Any], x: Tensor, l1: float) -> StepOutput:
    linear = isinstance(sae, LinearL1Training)
    terms = l1_terms(
        x,
        sae.W_enc,
        sae.b_enc,
        sae.W_dec,
        sae.b_dec,
        relu=not linear,
        subtract_b_dec=sae.cfg.apply_b_dec_to_input,
        weight_by_norm=not linear,
    )
    penalty = l1 * terms.sparsity
    losses = {"mse_loss": terms.mse.detach(), "l1_loss": penalty.detach()}
    return StepOutput(terms.mse + penalty, losses, terms.z)


@torch.no_grad()
def fired(sae: TrainingSAE[Any], z: Tensor, threshold: float) -> Tensor:
    """Which latents fired in the batch [d_sae], bool: some `contributions` above `threshold`."""
    if z.is_sparse:
        z = z.to_dense()
    if isinstance(sae, LinearL1Training):
        # one pass that allocates nothing of the size of z
        return torch.linalg.vector_norm(z, ord=torch.inf, dim=0) * sae.W_dec.norm(dim=1) > threshold
    return z.amax(0) > threshold
