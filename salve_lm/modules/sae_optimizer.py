"""Adam and the learning rate's schedule, for one autoencoder or for many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import nn


class Trained(NamedTuple):
    """One autoencoder that the optimiser trains.

    Attributes:
        parameters: its own.
        settings: its hyper-parameters: lr, betas, dtype, seed and the schedule's.
        lr_factor: step -> factor on its learning rate.
    """

    parameters: list[nn.Parameter]
    settings: Any
    lr_factor: Callable[[int], float]


def configure_adam(trainer: Trainer, each: Sequence[Trained]) -> Any:
    """What `configure_optimizers` returns: one Adam, with a group and a schedule for each."""
    groups = [
        {"params": one.parameters, "lr": one.settings.lr, "betas": tuple(one.settings.betas)}
        for one in each
    ]
    optimizer: torch.optim.Optimizer
    if any(one.settings.dtype == "bfloat16" for one in each):
        from salve_lm.sae.bfloat16_adam import BFloat16Adam

        for group, one in zip(groups, each, strict=True):
            group["seed"] = one.settings.seed
        optimizer = BFloat16Adam(groups)
    else:
        # Lightning refuses to clip a fused optimiser's gradients under mixed precision
        mixed = "mixed" in str(trainer.precision)
        optimizer = torch.optim.Adam(groups, fused=not (mixed and trainer.gradient_clip_val))
    if not any(one.settings.lr_warm_up_steps or one.settings.lr_decay_steps for one in each):
        return optimizer
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [one.lr_factor for one in each])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
