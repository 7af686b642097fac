"""Curves of accuracy against the strength of an edit, and the choice of a strength.

The choice is a pure function of a *training* curve; the held-out split only ever sees the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

Direction = Literal["suppress", "enhance"]


class Outcome(NamedTuple):
    """What a classifier does on one split, seen from one target class."""

    target: float  # share of the target class's samples that are still called so
    others: float  # accuracy over the samples of all other classes
    target_logit: float  # median logit of the target class over its own samples
    per_class: list[float]  # accuracy of every class; NaN where a class has no samples


def outcome(logits: Tensor, label: Tensor, target: int) -> Outcome:
    """Measure `logits` [n, n_classes] against `label` [n] for class index `target`."""
    right = logits.argmax(1) == label
    own = label == target
    per_class = [
        right[label == k].float().mean().item() if bool((label == k).any()) else float("nan")
        for k in range(logits.shape[1])
    ]
    return Outcome(
        target=right[own].float().mean().item(),
        others=right[~own].float().mean().item(),
        target_logit=logits[own, target].median().item(),
        per_class=per_class,
    )


def choose_strength(
    alphas: Sequence[float],
    curve: Sequence[Outcome],
    unedited: Outcome,
    direction: Direction,
    target_at_most: float = 0.0,
    others_drop: float = 0.01,
    margin: float = 1.5,
) -> float:
    """The strength to use, from a curve measured on training data.

    Suppression: among the strengths that lower the others by at most `others_drop`, the smallest
    with target accuracy <= `target_at_most`, or rather the smallest of at least `margin` times
    that, if it does too: what just suffices on training samples leaves a few held-out ones. Where
    none gets there, the one of lowest target accuracy (the smallest of equals). Enhancement: the
    smallest of highest target accuracy.

    Returns:
        One of `alphas`, or 0.0 (leave the model alone) where every strength harms the others more
        than allowed, or no suppression lowers the target.
    """
    allowed = [
        (a, o)
        for a, o in sorted(zip(alphas, curve, strict=True), key=lambda pair: pair[0])
        if o.others >= unedited.others - others_drop - 1e-9
    ]
    if direction == "enhance":
        best = max((o.target for _, o in allowed), default=-1.0)
        return next((a for a, o in allowed if o.target == best), 0.0) if best >= 0 else 0.0
    reached = [a for a, o in allowed if o.target <= target_at_most + 1e-9]
    if reached:
        return next((a for a in reached if a >= margin * reached[0]), reached[0])
    best = min((o.target for _, o in allowed), default=float("inf"))
    if best >= unedited.target:
        return 0.0
    return next(a for a, o in allowed if o.target == best)


def best_variant(
    chosen: Sequence[Outcome],
    direction: Direction,
    target_at_most: float = 0.0,
) -> int:
    """Which of several variants of an edit to use, each at its chosen strength on training data.

    Suppression: the lowest target accuracy (everything up to `target_at_most` is as good), then the
    highest accuracy of the others, then the first. Enhancement: the highest target accuracy first.

    Returns:
        Its place in `chosen`.
    """

    def badness(i: int) -> tuple[float, float]:
        o = chosen[i]
        target = -o.target if direction == "enhance" else max(o.target, target_at_most)
        return target, -o.others

    return min(range(len(chosen)), key=badness)
