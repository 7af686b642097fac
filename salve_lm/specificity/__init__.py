"""Which layers are specific to a task (METHODS 6), and whether choosing them is worth it.

Light to import: scipy, SAELens and transformers are loaded where they are used.
"""

from __future__ import annotations

from salve_lm.specificity.bootstrap import Bootstrap, documents_needed
from salve_lm.specificity.controls import ControlLayers, Verdict, control_layers, judge_choice
from salve_lm.specificity.judge import RankCorrelation, rank_correlations
from salve_lm.specificity.scores import (
    Attribution,
    LatentShift,
    LayerScore,
    MassShare,
    MeanSpecificity,
    SingleLatentAUROC,
    TopMean,
)
from salve_lm.specificity.selection import LayerChoice, LayerRanking, rank_layers
from salve_lm.specificity.selection_file import LayerSelection, check_model, read_selection

__all__ = [
    "Attribution",
    "Bootstrap",
    "ControlLayers",
    "LatentShift",
    "LayerChoice",
    "LayerRanking",
    "LayerScore",
    "LayerSelection",
    "MassShare",
    "MeanSpecificity",
    "RankCorrelation",
    "SingleLatentAUROC",
    "TopMean",
    "Verdict",
    "check_model",
    "control_layers",
    "documents_needed",
    "judge_choice",
    "rank_correlations",
    "rank_layers",
    "read_selection",
]
