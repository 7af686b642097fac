"""Dead latents, given a new start at inputs that the autoencoder reconstructs badly."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor
from torch.optim import Optimizer

from salve_lm.sae.inference import to_inference

ENCODER_SHARE = 0.2
"""Norm of a new encoder column, relative to the mean of the live ones (Bricken et al. 2023)."""

_ZEROED = ("b_enc", "b_gate", "b_mag", "r_mag")


@torch.no_grad()
def resample_dead(
    sae: TrainingSAE[Any],
    optimizer: Optimizer,
    x: Tensor,
    dead: Tensor,
    *,
    seed: int,
    step: int,
) -> Tensor:
    """Reinitialise dead latents, in place, and forget what Adam knows of them.

    After Bricken et al. 2023, "Towards Monosemanticity": inputs are drawn without replacement with
    probability proportional to their squared reconstruction loss. A latent's decoder row becomes
    such an input's direction (from b_dec) at the live rows' mean norm; its encoder column the same
    direction at 0.2 times the live columns' mean norm (1 for the top-k family, where a small
    latent would not be kept); its biases zero and its threshold the initial one.

    Args:
        sae: the autoencoder in training.
        optimizer: the optimiser of its parameters.
        x: the global batch [n, d_in], scaled as inputs are, the same on all ranks.
        dead: which latents are dead [d_sae], bool, the same on all ranks.
        seed: of the run.
        step: of the optimiser; with `seed` it determines the draw.

    Returns:
        Indices of the latents that were reinitialised; fewer than the dead where n is smaller.
    """
    badness = _squared_losses(sae, x)
    latents = dead.nonzero().flatten()
    n_new = min(latents.numel(), int((badness > 0).sum()))
    if n_new == 0:
        return latents[:0]
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows = torch.multinomial(badness, n_new, generator=draw).to(x.device)
    latents = latents[:n_new]

    direction = x[rows].to(sae.W_dec.dtype) - sae.b_dec
    direction /= direction.norm(dim=1, keepdim=True).clamp(min=1e-12)
    live = ~dead if not bool(dead.all()) else torch.ones_like(dead)
    decoder_norm = sae.W_dec[live].norm(dim=1).mean()
    encoder_norm = sae.W_enc[:, live].norm(dim=0).mean()
    share = 1.0 if hasattr(sae.cfg, "k") else ENCODER_SHARE
    sae.W_dec[latents] = direction * decoder_norm
    sae.W_enc[:, latents] = direction.t() * (encoder_norm * share)
    for name, parameter in sae.named_parameters():
        if name in _ZEROED:
            parameter[latents] = 0.0
        elif name == "threshold":
            parameter[latents] = sae.cfg.jumprelu_init_threshold
        if name != "b_dec":
            _forget(optimizer, parameter, latents, axis=1 if name == "W_enc" else 0)
    return latents


def _squared_losses(sae: TrainingSAE[Any], x: Tensor) -> Tensor:
    # by the inference form: the activation of batch-top-k in training is a collective
    inference = to_inference(sae)
    parts = [(inference(chunk).float() - chunk.float()).square().sum(1) for chunk in x.split(4096)]
    return torch.cat(parts).square().double().cpu()


def _forget(optimizer: Optimizer, parameter: Tensor, latents: Tensor, axis: int) -> None:
    for name, moment in optimizer.state.get(parameter, {}).items():
        if name != "step" and torch.is_tensor(moment) and moment.shape == parameter.shape:
            moment.index_fill_(axis, latents, 0.0)
