"""What a training step yields."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from salve_lm.sae.sparse_products import SparseLatents


class StepOutput(NamedTuple):
    """What a training step yields; means are over the rows at hand.

    Attributes:
        loss: the objective [], differentiable.
        losses: its terms by SAELens' names, already weighted, detached.
        z: latents [n, d_sae], detached; may be sparse.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    z: Tensor | SparseLatents


def summed(losses: dict[str, Tensor], z: Tensor | SparseLatents) -> StepOutput:
    """A step whose objective is the sum of `losses`."""
    loss, *others = losses.values()
    for other in others:
        loss = loss + other
    z = z.detach() if isinstance(z, Tensor) else z
    return StepOutput(loss, {name: value.detach() for name, value in losses.items()}, z)
