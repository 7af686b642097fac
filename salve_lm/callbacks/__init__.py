"""Lightning callbacks: edited weights, steering, thresholds and comparisons during evaluation."""

from salve_lm.callbacks.compare_edits import CompareEdits
from salve_lm.callbacks.critical_threshold import CriticalThreshold
from salve_lm.callbacks.problem_results import ProblemResults
from salve_lm.callbacks.steering import ActivationSteering
from salve_lm.callbacks.weight_editing import WeightEditing

__all__ = [
    "ActivationSteering",
    "CompareEdits",
    "CriticalThreshold",
    "ProblemResults",
    "WeightEditing",
]
