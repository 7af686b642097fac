"""From scores to chosen layers: intervals, contrast with the mean layer, and the rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from salve_lm.errors import BadConfig
from salve_lm.specificity.bootstrap import (
    Bootstrap,
    Interval,
    check_enough_documents,
    contrast_to_mean,
    interval,
    resampled_weights,
)
from salve_lm.specificity.latents import LayerSums
from salve_lm.specificity.scores import LayerScore, point_scores

Array = NDArray[Any]
Rule = Literal["top_n", "above_mean", "threshold"]


@dataclass(frozen=True)
class LayerRanking:
    """One score of all layers.

    Attributes:
        name: of the score.
        layers: their numbers, ascending.
        scores: score of each, with its interval.
        contrasts: score minus the mean over the layers, with its interval from the same resamples
            of the documents for all layers.
    """

    name: str
    layers: tuple[int, ...]
    scores: tuple[Interval, ...]
    contrasts: tuple[Interval, ...]

    def ranked(self) -> list[int]:
        """Layers from the highest score to the lowest; of equal ones, the lower layer first."""
        estimate = {n: i.estimate for n, i in zip(self.layers, self.scores, strict=True)}
        return sorted(self.layers, key=lambda n: (-estimate[n], n))


@dataclass(frozen=True)
class LayerChoice:
    """Which layers to choose by their score.

    Args:
        rule: `top_n` the `n` highest; `above_mean` those whose contrast with the mean layer has an
            interval above 0 (layers are not corrected for being many); `threshold` those that
            score at least `threshold`.
        n: How many, for `top_n` alone.
        threshold: The bound, for `threshold` alone.
    """

    rule: Rule = "above_mean"
    n: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        for option, rule in (("n", "top_n"), ("threshold", "threshold")):
            given = getattr(self, option) is not None
            if given != (self.rule == rule):
                cure = f"Remove {option}" if given else f"Give {option}"
                raise BadConfig(f"{cure}, or use another rule than {self.rule!r} to choose layers.")
        if self.n is not None and self.n < 1:
            raise BadConfig(f"n is {self.n}; choose at least one layer.")

    def apply(self, ranking: LayerRanking) -> tuple[int, ...]:
        """The chosen layers, ascending; none where the rule finds none.

        Raises:
            BadConfig: fewer layers than `n`.
        """
        if self.rule == "top_n":
            n = self.n or 0
            if n >= len(ranking.layers):
                raise BadConfig(
                    f"{n} of {len(ranking.layers)} layers is no choice. Lower n, or measure more "
                    "layers."
                )
            return tuple(sorted(ranking.ranked()[:n]))
        if self.rule == "above_mean":
            kept = [c.low > 0 for c in ranking.contrasts]
        else:
            bound = self.threshold if self.threshold is not None else np.inf
            kept = [s.estimate >= bound for s in ranking.scores]
        return tuple(n for n, keep in zip(ranking.layers, kept, strict=True) if keep)


def rank_layers(
    scores: Sequence[LayerScore], layers: Sequence[LayerSums], bootstrap: Bootstrap
) -> list[LayerRanking]:
    """Every score of every layer, with intervals.

    Args:
        scores: what to compute, each under a name of its own.
        layers: what was measured; all over the same documents.
        bootstrap: how to make the intervals.

    Raises:
        BadConfig: too few documents; two scores of one name; something a score needs was not
            measured; a corpus without a counted token.
    """
    names = [score.name for score in scores]
    if len(set(names)) < len(names):
        raise BadConfig(f"Scores of one name twice: {', '.join(names)}. Leave one of them out.")
    layers = sorted(layers, key=lambda at: at.layer)
    for which in ("task", "reference"):
        sizes = {getattr(at, which).n_documents for at in layers}
        if len(sizes) != 1:
            raise BadConfig(f"The layers were measured over different {which} documents.")
        check_enough_documents(sizes.pop(), which, bootstrap.confidence)
        if getattr(layers[0], which).tokens.sum() == 0:
            raise BadConfig(f"No token of the {which} corpus counts: its documents are empty.")
    task, reference = (
        resampled_weights(n, bootstrap.resamples, bootstrap.seed, stream)
        for stream, n in enumerate((layers[0].task.n_documents, layers[0].reference.n_documents))
    )
    numbers = tuple(at.layer for at in layers)
    found = []
    for score in scores:
        estimate = point_scores(score, layers)
        replicates = score.evaluate(layers, task, reference)
        found.append(
            LayerRanking(
                score.name,
                numbers,
                _intervals(estimate, replicates, bootstrap.confidence),
                _intervals(
                    contrast_to_mean(estimate), contrast_to_mean(replicates), bootstrap.confidence
                ),
            )
        )
    return found


def _intervals(estimate: Array, replicates: Array, confidence: float) -> tuple[Interval, ...]:
    columns = zip(estimate, replicates.T, strict=True)
    return tuple(interval(float(value), column, confidence) for value, column in columns)
