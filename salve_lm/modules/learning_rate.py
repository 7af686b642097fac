"""Warm-up and decay of the learning rate over the optimiser steps of a fit."""

from __future__ import annotations

import math
from typing import Literal

from lightning.pytorch import Trainer

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_factor(
    step: int, warmup: int, total: float, schedule: Schedule, floor: float = 0.0
) -> float:
    """Share of the full learning rate in optimiser step `step`, counted from 0.

    A linear rise over `warmup` steps, (step + 1) / (warmup + 1); then from 1 down to `floor` at
    step `total`, along half a cosine or a line; or constantly 1.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return floor + (1 - floor) * left


def total_steps(trainer: Trainer, n_batches: int) -> float:
    """Optimiser steps of the whole fit, infinite where it has no end.

    What `trainer.estimated_stepping_batches` gives; but asking that makes Lightning create the
    train loader before the loader's place in a checkpoint is restored, and a run that is resumed
    within an epoch would start that epoch anew.

    Args:
        trainer: the trainer of the fit.
        n_batches: global batches in an epoch.
    """
    limit = trainer.limit_train_batches
    limited = min(limit, n_batches) if isinstance(limit, int) else int(n_batches * (limit or 0))
    accumulated = math.ceil(limited / trainer.accumulate_grad_batches)
    epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
    steps = trainer.max_steps if trainer.max_steps != -1 else math.inf
    return min(accumulated * epochs, steps) if accumulated else 0
