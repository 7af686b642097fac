"""The backward pass of one loss among several, taken as soon as its forward pass is done.

Several autoencoders in one training step, or several parts of one batch, would keep the latents of
all of them in memory until the sum of their losses is differentiated. Gradients are computed at
once instead, and handed over when autograd asks for them. The trainer, DDP's reduction and the
precision plugin see one ordinary loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
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


def differentiated_parts(losses: Iterable[Tensor], parameters: Iterable[Tensor]) -> Tensor:
    """The sum of `losses`, which may depend on the same parameters, each with its graph freed.

    Args:
        losses: made one at a time, each differentiated before the next is asked for.
        parameters: as for `differentiated`.
    """
    of = [p for p in parameters if p.requires_grad]
    sums: list[Tensor | None] = [None] * len(of)
    total: Tensor | None = None
    for loss in losses:
        _add_gradients(loss, of, sums)
        total = loss.detach() if total is None else total + loss.detach()
    if total is None:
        raise ValueError("differentiated_parts needs one or more losses.")
    value: Tensor = _Differentiated.apply(total, tuple(sums), *of)
    return value


def _add_gradients(loss: Tensor, of: list[Tensor], sums: list[Tensor | None]) -> None:
    # one by one as autograd makes them, so that a second gradient lives for one parameter at a time
    hooks = [p.register_hook(partial(_add, sums, i)) for i, p in enumerate(of)]
    try:
        with torch.autocast(loss.device.type, enabled=False):
            torch.autograd.grad(loss, of, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()


def _add(sums: list[Tensor | None], i: int, gradient: Tensor) -> Tensor:
    found = sums[i]
    if found is None:
        # a tensor of our own: autograd may hand out one gradient twice
        found = sums[i] = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
    found.add_(gradient)
    # autograd keeps what this returns until the end; it is asked for by nobody
    return gradient.new_zeros(()).expand_as(gradient)


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
