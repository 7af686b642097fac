"""Suppressed, linearly erased or removed: what an edit of a classifier left behind (METHODS 3c).

An edited head can hide a class that the features still hold. These figures tell the cases apart.
"""

from salve_lm.removal.assess import (
    Label,
    RemovalReport,
    Thresholds,
    assess,
    judge,
    runner_up_share,
)
from salve_lm.removal.feature_map import FeatureMap, feature_map
from salve_lm.removal.probes import FeatureFigures, ProbeSettings, measure_features
from salve_lm.removal.proportion import Proportion

__all__ = [
    "FeatureFigures",
    "FeatureMap",
    "Label",
    "ProbeSettings",
    "Proportion",
    "RemovalReport",
    "Thresholds",
    "assess",
    "feature_map",
    "judge",
    "measure_features",
    "runner_up_share",
]
