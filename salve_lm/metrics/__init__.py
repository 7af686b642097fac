"""torchmetrics classes that add up over batches and ranks."""

from __future__ import annotations

from salve_lm.metrics.accuracy import PerClassAccuracy, SpilloverAccuracy, predicted_classes
from salve_lm.metrics.explained_variance import ExplainedVariance
from salve_lm.metrics.sparsity import L0, DeadFraction, ParticipationRatio, participation_ratio

__all__ = [
    "L0",
    "DeadFraction",
    "ExplainedVariance",
    "ParticipationRatio",
    "PerClassAccuracy",
    "SpilloverAccuracy",
    "participation_ratio",
    "predicted_classes",
]
