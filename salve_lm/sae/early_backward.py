"""The backward pass of one loss among several, taken as soon as its forward pass is done.

Several autoencoders in one training step would keep the latents of all of them in memory until the
sum of their losses is differentiated. Their parameters are disjoint: each one's gradients can be
computed at once, and handed over when autograd asks for them. The trainer, DDP's reduction and the
precision plugin see one ordinary loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def differentiated(loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """`loss` with its graph freed: its gradients for `parameters` are computed already.

    Differentiating the result by `parameters` gives the gradients that differentiating `loss` would
    have given, to the bit for a weight of one (and for other weights up to rounding). Parameters
    that `loss` does not depend on get no gradient.
    """
    of = [p for p in parameters if p.requires_grad]
    # as in a backward pass of its own, which runs outside of autocast
    with torch.autocast(loss.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, of, allow_unused=True)
    value: Tensor = _Differentiated.apply(loss.detach(), gradients, *of)
    return value


class _Differentiated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradients: tuple[Tensor | None, ...], *of: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        (weight,) = weights
        # on a CPU looking is free, and the usual weight is one
        if weight.device.type != "cpu" or float(weight) != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(weight)
        return (None, None, *gradients)
