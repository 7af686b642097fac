"""Thresholds of a class in a few numbers, and whether definitions rank samples alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from salve_lm.errors import BadConfig, ShapeMismatch


class ThresholdSummary(NamedTuple):
    """Distribution of the thresholds of one class.

    median, q25, q75: over counted samples; +inf where that many have no root, NaN without any.
    no_root_share: share of the counted samples with +inf.
    left_out_share: share of all samples with NaN (another class before the edit).
    n: number of counted samples.
    """

    median: float
    q25: float
    q75: float
    no_root_share: float
    left_out_share: float
    n: int


def summarise(alpha: Tensor) -> ThresholdSummary:
    """Summary of thresholds [n] (or one column of them): +inf is no root, NaN is left out."""
    if alpha.ndim != 1:
        raise ShapeMismatch(f"Thresholds of shape {tuple(alpha.shape)}; pass one class at a time.")
    counted = alpha[~alpha.isnan()].double().sort().values
    n = len(counted)
    if not n:
        nan = math.nan
        return ThresholdSummary(nan, nan, nan, nan, 1.0 if len(alpha) else nan, 0)
    return ThresholdSummary(
        _quantile(counted, 0.5),
        _quantile(counted, 0.25),
        _quantile(counted, 0.75),
        float(counted.isinf().double().mean()),
        1 - n / len(alpha),
        n,
    )


def summarise_by_class(
    alpha: Tensor, label: Tensor, class_names: list[str]
) -> dict[str, ThresholdSummary]:
    """Summaries of thresholds [n], each of its own class, by label [n] (index in class_names)."""
    if alpha.shape != label.shape:
        raise ShapeMismatch(f"{tuple(alpha.shape)} thresholds for {tuple(label.shape)} labels.")
    if len(label) and (int(label.min()) < 0 or int(label.max()) >= len(class_names)):
        raise BadConfig(f"Labels leave the {len(class_names)} class names; check the class list.")
    return {name: summarise(alpha[label == i]) for i, name in enumerate(class_names)}


def rank_agreement(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two definitions over the samples that both count.

    Samples without a root are tied at the top. NaN with fewer than two samples, or where one
    definition gives all the same value.
    """
    if first.shape != second.shape or first.ndim != 1:
        raise ShapeMismatch(
            f"{tuple(first.shape)} against {tuple(second.shape)} thresholds; "
            "pass those of the same samples [n]."
        )
    from scipy.stats import rankdata

    both = ~(first.isnan() | second.isnan())
    ranks = torch.stack(
        [torch.from_numpy(rankdata(t[both].double().cpu().numpy())) for t in (first, second)]
    ).double()
    centred = ranks - ranks.mean(1, keepdim=True)
    norm = centred.norm(dim=1).prod()
    return float((centred[0] @ centred[1]) / norm) if norm > 0 else math.nan


def rank_agreements(thresholds: Mapping[str, Tensor]) -> dict[tuple[str, str], float]:
    """`rank_agreement` of every pair of definitions, by their names."""
    return {
        (a, b): rank_agreement(thresholds[a], thresholds[b]) for a, b in combinations(thresholds, 2)
    }


def _quantile(ascending: Tensor, q: float) -> float:
    """Linear quantile that is +inf, not NaN, between two infinities or next to one."""
    place = q * (len(ascending) - 1)
    low, high = float(ascending[math.floor(place)]), float(ascending[math.ceil(place)])
    share = place - math.floor(place)
    return low if share == 0 or low == high else low + share * (high - low)
