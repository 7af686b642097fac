"""Explained variance, L0 and dead fraction of an autoencoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from torch import Tensor
from torchmetrics import Metric

from salve_lm.metrics import L0, DeadFraction, ExplainedVariance, ParticipationRatio
from salve_lm.sae.inference import contributions

_PART = 1 << 23
"""Latents that are in memory at a time."""


class Evaluation:
    """The metrics of one pass over activations; `compute` pools all ranks.

    Args:
        sae: for inference.
        threshold: a latent is active where its `contributions` exceed it.
    """

    def __init__(self, sae: SAE[Any], threshold: float) -> None:
        self.sae = sae
        self._explained = ExplainedVariance(sae.cfg.d_in)
        self._of_latents: dict[str, Metric] = {
            "l0": L0(threshold),
            "dead_fraction": DeadFraction(sae.cfg.d_sae, threshold),
        }
        if sae.cfg.architecture() == "linear_l1":
            self._of_latents["participation_ratio"] = ParticipationRatio()
        for metric in (self._explained, *self._of_latents.values()):
            metric.to(sae.W_enc.device)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add activations [n, d_in]; n may be 0."""
        # in parts: wide dictionaries have more latents for a batch than fit beside the training
        for rows in x.split(max(1, _PART // self.sae.cfg.d_sae)):
            self._update(rows.to(self.sae.W_enc.dtype))

    def _update(self, x: Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False):
            z = self.sae.encode(x)
            self._explained.update(x, self.sae.decode(z))
        active = contributions(self.sae, z)
        for metric in self._of_latents.values():
            metric.update(active)

    def compute(self) -> dict[str, float]:
        """explained_variance, l0, dead_fraction, and participation_ratio for linear_l1."""
        values = {"explained_variance": self._explained.compute()}
        values |= {name: metric.compute() for name, metric in self._of_latents.items()}
        return {name: float(value) for name, value in values.items()}


def plain(values: dict[str, float]) -> dict[str, float | None]:
    """`values` for JSON, which has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
