"""How well one latent tells the documents (or tokens) of two corpora apart.

AUROC = P(value in the task corpus > value in the reference) + P(equal) / 2 (Mann-Whitney), from
sparse values: whatever is not listed is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def auroc_of_latents(
    d_sae: int,
    task: tuple[Array, Array],
    reference: tuple[Array, Array],
    n_task: float,
    n_reference: float,
) -> Array:
    """AUROC of every latent, float64 [d_sae]; 0.5 for one that is never active.

    Args:
        d_sae: number of latents.
        task: `(latent, value)` [n] of the entries above 0, in any order.
        reference: the same of the reference corpus.
        n_task: number of task samples, those without an entry included.
        n_reference: number of reference samples.
    """
    latent = np.concatenate([task[0], reference[0]]).astype(np.int64)
    value = np.concatenate([task[1], reference[1]])
    is_task = np.repeat([1.0, 0.0], [len(task[0]), len(reference[0])])
    order = np.lexsort((value, latent))
    latent, value, is_task = latent[order], value[order], is_task[order]
    zero_task = n_task - np.bincount(latent, is_task, d_sae)
    zero_reference = n_reference - np.bincount(latent, 1 - is_task, d_sae)
    # pairs of two zeros are ties
    wins = zero_task * zero_reference / 2
    if len(latent):
        new = np.r_[True, (np.diff(latent) != 0) | (np.diff(value) != 0)]
        starts = new.nonzero()[0]
        of_task = np.add.reduceat(is_task, starts)
        of_reference = np.add.reduceat(1 - is_task, starts)
        group = latent[starts]
        below = np.cumsum(of_reference) - of_reference
        # within its own latent only
        first = np.r_[True, np.diff(group) != 0].nonzero()[0]
        below -= np.repeat(below[first], np.diff(np.r_[first, len(group)]))
        won = of_task * (zero_reference[group] + below + of_reference / 2)
        wins += np.bincount(group, won, d_sae)
    return np.asarray(wins / (n_task * n_reference))


def weighted_auroc(
    task: tuple[Array, Array],
    reference: tuple[Array, Array],
    task_samples: Array,
    reference_samples: Array,
    task_weights: Array,
    reference_weights: Array,
) -> Array:
    """AUROC of one latent under weights of the documents, float64 [n_weightings].

    Args:
        task: `(document, value)` [n] of the entries above 0.
        reference: the same of the reference corpus.
        task_samples: samples (tokens, or 1) of each task document [n_documents].
        reference_samples: of each reference document.
        task_weights: weight of each task document [n_weightings, n_documents].
        reference_weights: of each reference document.
    """
    n_task = task_weights @ task_samples
    n_reference = reference_weights @ reference_samples
    values, group = np.unique(np.concatenate([task[1], reference[1]]), return_inverse=True)
    cut = len(task[0])
    of_task = _grouped(task_weights, task[0], group[:cut], len(values))
    of_reference = _grouped(reference_weights, reference[0], group[cut:], len(values))
    zero_task = n_task - of_task.sum(1)
    zero_reference = n_reference - of_reference.sum(1)
    below = np.cumsum(of_reference, axis=1) - of_reference + zero_reference[:, None]
    wins = zero_task * zero_reference / 2 + (of_task * (below + of_reference / 2)).sum(1)
    with np.errstate(invalid="ignore"):
        found = wins / (n_task * n_reference)
    # a resample without any sample of one corpus says nothing
    return np.where(np.isfinite(found), found, 0.5)


def _grouped(weights: Array, document: Array, group: Array, n_groups: int) -> Array:
    """Sum of the weights of the entries in each group [n_weightings, n_groups]."""
    from scipy.sparse import coo_array

    shape = (weights.shape[1], n_groups)
    counts = coo_array((np.ones(len(group)), (document, group)), shape=shape).tocsr()
    return np.asarray((counts.T @ weights.T).T)
