"""Sparse autoencoders: SALVE's `linear_l1` and SAELens' own, in SAELens' folder format.

Importing this package imports SAELens (5-10 s) and registers `linear_l1` with it, after which
`sae_lens.SAE.load_from_disk` reads such folders. Import it where it is used, not at module level.
"""

from __future__ import annotations

from salve_lm.sae.build import (
    ARCHITECTURES,
    Traits,
    architecture_traits,
    build_training_sae,
    option_defaults,
)
from salve_lm.sae.folder import METRICS_FILENAME, hash_sae, load_sae, read_metadata, save_sae
from salve_lm.sae.inference import (
    contributions,
    fold_norm,
    to_inference,
    to_inference_on_first,
)
from salve_lm.sae.linear_l1 import (
    LinearL1,
    LinearL1Config,
    LinearL1Training,
    LinearL1TrainingConfig,
)

__all__ = [
    "ARCHITECTURES",
    "METRICS_FILENAME",
    "LinearL1",
    "LinearL1Config",
    "LinearL1Training",
    "LinearL1TrainingConfig",
    "Traits",
    "architecture_traits",
    "build_training_sae",
    "contributions",
    "fold_norm",
    "hash_sae",
    "load_sae",
    "option_defaults",
    "read_metadata",
    "save_sae",
    "to_inference",
    "to_inference_on_first",
]
