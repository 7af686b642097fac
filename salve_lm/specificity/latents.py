"""How specific to the task each latent of a layer is (METHODS 6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from salve_lm.errors import BadConfig, ShapeMismatch
from salve_lm.specificity.documents import CorpusSums

Array = NDArray[Any]
Measure = Literal["activation", "firing"]
_BLOCK_BYTES = 1 << 26


@dataclass(frozen=True)
class LayerSums:
    """Everything that was measured at one layer.

    Attributes:
        layer: its number.
        task: the task corpus.
        reference: the reference corpus, under the same autoencoder.
        shift: how fine-tuning moves the latents; None without a fine-tuned model.
    """

    layer: int
    task: CorpusSums
    reference: CorpusSums
    shift: ShiftSums | None = None

    def __post_init__(self) -> None:
        if self.task.d_sae != self.reference.d_sae:
            raise ShapeMismatch(
                f"Layer {self.layer}: {self.task.d_sae} latents of the task corpus and "
                f"{self.reference.d_sae} of the reference. Encode both with one autoencoder."
            )


@dataclass(frozen=True)
class ShiftSums:
    """How far fine-tuning moves a layer's latents on the task's tokens.

    a and b are a token's latents before and after.

    Attributes:
        distance: sum over a document's tokens of |b - a|_1, float64 [n_documents].
        mass: sum over them of |a|_1 + |b|_1, float64 [n_documents].
    """

    distance: Array
    mass: Array


def specificity(task_mean: Array, reference_mean: Array) -> Array:
    """s = (m_T - m_R) / (m_T + m_R), elementwise, in [-1, 1]; 0/0 counts as 0.

    Args:
        task_mean: mean activation (or firing rate) per token in the task corpus, at least 0.
        reference_mean: the same in the reference corpus.
    """
    total = task_mean + reference_mean
    safe = np.where(total > 0, total, 1.0)
    return np.where(total > 0, (task_mean - reference_mean) / safe, 0.0)


def mean_per_token(corpus: CorpusSums, weights: Array, measure: Measure) -> Array:
    """Mean of every latent per token, under weights of the documents.

    Args:
        corpus: the sums.
        weights: [n_weightings, n_documents], at least 0.
        measure: mean activation, or share of tokens that fire the latent.

    Returns:
        float64 [n_weightings, d_sae]; 0 where no token has weight.

    Raises:
        BadConfig: firing rates of a corpus whose firings were not counted.
    """
    sums = corpus.activation if measure == "activation" else corpus.firing
    if sums is None:
        raise BadConfig("Firings were not counted. Collect the sums with firings, or use means.")
    tokens = (weights @ corpus.tokens)[:, None]
    return np.asarray((sums.T @ weights.T).T / np.where(tokens > 0, tokens, 1.0))


def blocks(n_weightings: int, d_sae: int) -> Iterator[slice]:
    """Slices of weightings whose latents fit into 64 MiB each."""
    step = max(1, _BLOCK_BYTES // (8 * d_sae))
    for start in range(0, n_weightings, step):
        yield slice(start, min(start + step, n_weightings))


def unit_weights(corpus: CorpusSums) -> Array:
    """Weight 1 for each document: the corpus itself, [1, n_documents]."""
    return np.ones((1, corpus.n_documents))
