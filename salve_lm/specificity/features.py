"""The latents of a layer that are most specific to the task."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from salve_lm.specificity.latents import (
    LayerSums,
    Measure,
    mean_per_token,
    specificity,
    unit_weights,
)


class TaskLatent(NamedTuple):
    """One latent.

    Attributes:
        latent: its index.
        specificity: s_f.
        specific: whether s_f reaches the bound.
        mass_share: its share of the layer's task activation mass.
        task_mean: mean per token in the task corpus.
        reference_mean: mean per token in the reference corpus.
    """

    latent: int
    specificity: float
    specific: bool
    mass_share: float
    task_mean: float
    reference_mean: float


def task_latents(
    layer: LayerSums, n: int, at_least: float = 0.5, measure: Measure = "activation"
) -> list[TaskLatent]:
    """Up to `n` latents that are active on the task: first the specific ones, by their mass.

    Where fewer than `n` are specific, those of the highest specificity follow.

    Args:
        layer: what was measured.
        n: how many.
        at_least: bound of s_f from which a latent counts as specific.
        measure: what specificity compares.
    """
    weights = unit_weights(layer.task), unit_weights(layer.reference)
    task = mean_per_token(layer.task, weights[0], measure)[0]
    reference = mean_per_token(layer.reference, weights[1], measure)[0]
    s = specificity(task, reference)
    mass = np.asarray(layer.task.activation.sum(0)).ravel()
    share = mass / mass.sum() if mass.sum() > 0 else mass
    specific = s >= at_least
    # lexsort: the last key counts first
    order = np.lexsort((np.arange(len(s)), np.where(specific, -share, -s), ~specific))
    return [
        TaskLatent(
            int(f), float(s[f]), bool(specific[f]), float(share[f]),
            float(task[f]), float(reference[f]),
        )
        for f in order[mass[order] > 0][:n]
    ]  # fmt: skip
