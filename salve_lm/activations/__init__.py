"""Activations of a network: reading them at a site, storing them, and loading them for training."""

from __future__ import annotations

from salve_lm.activations.batch import ActivationBatch
from salve_lm.activations.datamodule import ActivationData
from salve_lm.activations.store import ActivationStore

__all__ = ["ActivationBatch", "ActivationData", "ActivationStore"]
