"""Thresholds read off a real sweep of edited models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from salve_lm.errors import BadConfig, NotFinite


class Observed(NamedTuple):
    """Observed thresholds of one class: swept alphas, +inf where the sweep never gets there.

    half_accuracy: first alpha with class accuracy <= half of its baseline.
    below_chance: first alpha with class accuracy < chance.
    logit_below_zero: first alpha with the median target logit < 0.
    alphas, accuracy, median_logit: the whole curve, as given.
    """

    half_accuracy: float
    below_chance: float
    logit_below_zero: float
    alphas: tuple[float, ...]
    accuracy: tuple[float, ...]
    median_logit: tuple[float, ...]


def observed(
    alphas: Sequence[float],
    accuracy_curve: Sequence[float],
    median_logit_curve: Sequence[float],
    baseline: float,
    chance: float,
) -> Observed:
    """The three observed thresholds of a sweep (METHODS 4); nothing is interpolated.

    Args:
        alphas: swept strengths, ascending.
        accuracy_curve: accuracy on the class at each alpha, in [0, 1].
        median_logit_curve: median target logit of the class at each alpha.
        baseline: accuracy on the class of the unedited model.
        chance: accuracy of guessing (1 / n_classes, or the class's share).
    """
    at, accuracy, logit = (
        tuple(map(float, curve)) for curve in (alphas, accuracy_curve, median_logit_curve)
    )
    if not len(at) == len(accuracy) == len(logit):
        raise BadConfig(
            f"A sweep of {len(at)} alphas needs as many accuracies ({len(accuracy)}) and "
            f"logits ({len(logit)})."
        )
    for name, curve in (("alphas", at), ("accuracy", accuracy), ("median logit", logit)):
        if not all(map(math.isfinite, curve)):
            raise NotFinite(name, "a sweep", "Repeat the sweep.")
    if any(b <= a for a, b in pairwise(at)):
        raise BadConfig("The alphas of a sweep must be ascending; sort the curve by alpha.")
    return Observed(
        _first(at, [a <= baseline / 2 for a in accuracy]),
        _first(at, [a < chance for a in accuracy]),
        _first(at, [z < 0 for z in logit]),
        at,
        accuracy,
        logit,
    )


def _first(at: Sequence[float], reached: Sequence[bool]) -> float:
    return next((alpha for alpha, yes in zip(at, reached, strict=True) if yes), math.inf)
