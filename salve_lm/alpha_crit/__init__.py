"""Critical thresholds of decoder-guided edits (METHODS 4): pure functions, float64 inside.

A threshold is the smallest alpha at which an edit takes effect on one sample: a class's logit
reaches zero (`linear`, `exact`), the class stops being the arg max (`class_flip`, the primary
one; `lce_flip`), or starts to be it (`alpha_gain`, `gain_interval`). `searched` finds the first
two through a real network, `observed` reads them off a sweep, `summarise` reports them.
0 means reached before the edit, +inf never reached, NaN a sample that is left out.
"""

from salve_lm.alpha_crit.contributions import linear_contributions, pooled_contributions
from salve_lm.alpha_crit.enhancement import GainInterval, alpha_gain, gain_interval
from salve_lm.alpha_crit.flip import ClassFlip, class_flip, lce_flip
from salve_lm.alpha_crit.gated import gated_margin
from salve_lm.alpha_crit.inputs import Rows
from salve_lm.alpha_crit.observed import Observed, observed
from salve_lm.alpha_crit.searched import search_grid, searched
from salve_lm.alpha_crit.summary import (
    ThresholdSummary,
    rank_agreement,
    rank_agreements,
    summarise,
    summarise_by_class,
)
from salve_lm.alpha_crit.zero_logit import Head, exact, linear, lower_bound_share, row_centred

__all__ = [
    "ClassFlip",
    "GainInterval",
    "Head",
    "Observed",
    "Rows",
    "ThresholdSummary",
    "alpha_gain",
    "class_flip",
    "exact",
    "gain_interval",
    "gated_margin",
    "lce_flip",
    "linear",
    "linear_contributions",
    "lower_bound_share",
    "observed",
    "pooled_contributions",
    "rank_agreement",
    "rank_agreements",
    "row_centred",
    "search_grid",
    "searched",
    "summarise",
    "summarise_by_class",
]
