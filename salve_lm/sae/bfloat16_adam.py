"""Adam for bfloat16 weights: its own moments in bfloat16 too, half the memory of float32.

bfloat16 has 8 significant bits. Rounded to the nearest, an update of less than a 512th of a weight
is lost, and so is each step's decay of the second moment (0.1 % of it), which could then only grow.
Here sums are made in float32 and rounded to one of the two bfloat16 neighbours at random, with the
probabilities that make the mean exact (stochastic rounding; Gupta et al. 2015, arXiv 1502.02551):
small updates arrive on average. The draw is a function of the seed, the step and the parameter, so
that a resumed run, and every process of a data-parallel one, rounds alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_CHUNK = 1 << 18
_LOW_BITS = 16


class BFloat16Adam(Optimizer):
    """Adam with float32 arithmetic and stochastic rounding of weights and moments.

    Parameters of other types are updated without rounding.

    Args:
        params: parameters, or groups of them; a group may have a `seed` of its own.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        seed: of the rounding.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, number, group)
        return loss

    def _update(self, parameter: Tensor, number: int, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        t, (beta1, beta2) = int(state["step"]), group["betas"]
        step_size = group["lr"] / (1 - beta1**t)
        correction = (1 - beta2**t) ** 0.5
        draw = torch.Generator(parameter.device)
        draw.manual_seed(((group["seed"] * 1_000_003 + t) * 31 + number) % (1 << 62))
        # in pieces: the float32 values of all at once would need more than the moments save
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        for weight, gradient, first, second in zip(*map(_pieces, tensors), strict=True):
            g = gradient.float()
            m = first.float().lerp_(g, 1 - beta1)
            v = second.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
            moved = weight.float().addcdiv_(
                m, v.sqrt().div_(correction).add_(group["eps"]), value=-step_size
            )
            for target, value in ((weight, moved), (first, m), (second, v)):
                target.copy_(rounded(value, draw) if target.dtype == torch.bfloat16 else value)


def rounded(x: Tensor, draw: torch.Generator) -> Tensor:
    """Each value of float32 `x` as one of its two bfloat16 neighbours, `x` on average.

    Values that bfloat16 has stay as they are.
    """
    # a bfloat16 is the upper half of a float32: what is added to the lower half carries into the
    # upper one in just the share of the cases that the lower half stands for
    noise = torch.randint(
        1 << _LOW_BITS, x.shape, dtype=torch.int32, device=x.device, generator=draw
    )
    bits = (x.view(torch.int32) + noise) >> _LOW_BITS << _LOW_BITS
    return bits.view(torch.float32).bfloat16()


def _pieces(tensor: Tensor | None) -> tuple[Tensor, ...]:
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if own is None:
        return ()
    return own.view(-1).split(_CHUNK)
