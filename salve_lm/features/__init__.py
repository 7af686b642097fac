"""What each latent does for each class: statistics, rankings, and the tables they are kept in.

Notation: activations `x` [n, d_in], latents `z` [n, d_sae], classes k = 0 .. K-1, class means
`mu_k`. "The others" of class k always means the plain mean of the other class means, so that a
frequent class does not outweigh a rare one.
"""

from salve_lm.features.streaming import StreamingFeatureStatistics
from salve_lm.features.table import FeatureName, FeatureTable, check_latent, class_index

__all__ = [
    "FeatureName",
    "FeatureTable",
    "StreamingFeatureStatistics",
    "check_latent",
    "class_index",
]
