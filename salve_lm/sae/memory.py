"""How much memory training an autoencoder takes, before anything of it is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

KEPT = {"batchtopk": 4, "matryoshka_batchtopk": 4, "jumprelu": 7, "gated": 9}
"""Tensors of the size of the latents [rows, d_sae] that a training step holds at its peak, where
they are not 3 (benchmarks/sae_memory.py; jumprelu holds fewer once few of its latents act)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a training step.

    Float32 weights, their gradients and Adam's two moments are 32 d_in d_sae bytes; the latents
    about 3 rows d_sae values.

    Attributes:
        weights: the parameters that stay on the device.
        gradients: theirs.
        optimizer: Adam's two moments.
        copies: whole weights and gradients of a step where they are sharded; second copies of
            the gradients; the weights that autocast casts.
        latents: of the rows that are in work at a time.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    latents: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.latents

    def __add__(self, other: MemoryEstimate) -> MemoryEstimate:
        """Both trained side by side, of which one at a time has its latents in memory."""
        return MemoryEstimate(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.copies + other.copies,
            max(self.latents, other.latents),
        )


def training_memory(
    architecture: str,
    parameters: int,
    d_sae: int,
    rows: int,
    *,
    value_bytes: int = 4,
    shards: int = 1,
    second_gradients: int = 0,
    cast_bytes: int = 0,
) -> MemoryEstimate:
    """The peak of a training step with Adam.

    Args:
        architecture: which tensors of the size of the latents a step needs depends on it.
        parameters: number of parameters, about 2 d_in d_sae.
        d_sae: number of latents.
        rows: activations that are in work at a time on one device; 0 where it is not known.
        value_bytes: size of a parameter, a gradient, a moment and a latent.
        shards: devices that share the parameters, their gradients and moments (FSDP2). The step
            itself needs them whole: the weights, and later their gradients.
        second_gradients: copies of the gradients beside those that are handed to Adam: DDP's
            buckets, and those of a part that are added to those of the parts before.
        cast_bytes: size of the values that autocast makes of the weights; 0 without.
    """
    whole = parameters * value_bytes
    own = -(-whole // shards)
    gathered = 2 * whole if shards > 1 else 0
    copies = gathered + second_gradients * whole + parameters * cast_bytes
    return MemoryEstimate(
        own,
        own,
        2 * own,
        copies,
        KEPT.get(architecture, 3) * rows * d_sae * (cast_bytes or value_bytes),
    )


def parameter_count(module: nn.Module) -> int:
    """Number of parameters; `module` may be on the `meta` device, where it takes no memory."""
    return sum(p.numel() for p in module.parameters())


def largest_that_fits(limit: int, needed: Any, most: int) -> int:
    """The largest n of 1, 2, 4, ... below `most` with `needed(n)` bytes <= `limit`; 0 for none."""
    n, found = 1, 0
    while n < most and needed(n) <= limit:
        n, found = 2 * n, n
    return found
