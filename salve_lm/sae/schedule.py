"""Schedules as pure functions of the optimiser step, so that a resumed run continues them."""

from __future__ import annotations

from typing import Any

from sae_lens.saes.sae import TrainCoefficientConfig, TrainingSAE


def coefficients_at(sae: TrainingSAE[Any], step: int) -> dict[str, float]:
    """Weights of the penalties at optimiser step `step`, counted from 0.

    SAELens' own scheduler has the same values: 0 at the first step of a warm-up of n, and (n-1)/n
    of the full weight at its last.
    """
    weights: dict[str, float] = {}
    for name, value in sae.get_coefficients().items():
        if isinstance(value, TrainCoefficientConfig):
            share = min(1.0, step / value.warm_up_steps) if value.warm_up_steps > 0 else 1.0
            weights[name] = value.value * share
        else:
            weights[name] = value
    return weights


def lr_factor(step: int, warm_up_steps: int, decay_steps: int, total_steps: float) -> float:
    """Factor on the learning rate at optimiser step `step`, counted from 0.

    Linear from 1/warm_up_steps to 1, then 1, then linear to 1/decay_steps at the last step; the
    values of SAELens' "constant" schedule.
    """
    if step < warm_up_steps:
        return (step + 1) / warm_up_steps
    into_decay = step - (total_steps - decay_steps)
    if decay_steps > 0 and into_decay > 0:
        return max(0.0, 1.0 - into_decay / decay_steps)
    return 1.0
