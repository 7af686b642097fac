from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from salve_lm.specificity.auroc import auroc_of_latents, weighted_auroc


def dense(seed: int, n: int, d: int) -> np.ndarray:
    # few distinct values, many zeros: ties of every kind
    return np.random.default_rng(seed).integers(0, 4, (n, d)) * 0.25


@given(seed=st.integers(0, 10_000))
def test_all_latents_at_once_equal_sklearn(seed: int) -> None:
    task, reference = dense(seed, 11, 6), dense(seed + 1, 17, 6)
    task[:, 2] = reference[:, 2] = 0
    entries = [(m.nonzero()[1], m[m.nonzero()]) for m in (task, reference)]
    found = auroc_of_latents(6, *entries, 11, 17)
    truth = np.repeat([1, 0], [11, 17])
    for latent in range(6):
        both = np.concatenate([task[:, latent], reference[:, latent]])
        assert found[latent] == pytest.approx(roc_auc_score(truth, both), abs=1e-12)
    assert found[2] == 0.5


@given(seed=st.integers(0, 10_000))
def test_weights_equal_sklearn_with_sample_weights(seed: int) -> None:
    generator = np.random.default_rng(seed)
    parts = []
    for n in (8, 9):  # documents of several tokens each
        tokens = generator.integers(1, 5, n)
        document = np.repeat(np.arange(n), tokens)
        value = generator.integers(0, 4, len(document)) * 0.5
        parts.append((tokens, document, value, generator.integers(0, 3, (4, n)).astype(float)))
    for _, _, _, w in parts:
        w[:, 0] += 1
    sparse = [(d[v > 0], v[v > 0]) for _, d, v, _ in parts]
    found = weighted_auroc(
        *sparse, parts[0][0].astype(float), parts[1][0].astype(float), parts[0][3], parts[1][3]
    )
    truth = np.repeat([1, 0], [len(p[1]) for p in parts])
    both = np.concatenate([p[2] for p in parts])
    for row in range(4):
        weight = np.concatenate([p[3][row, p[1]] for p in parts])
        expected = roc_auc_score(truth, both, sample_weight=weight)
        assert found[row] == pytest.approx(expected, abs=1e-12)


def test_a_resample_without_a_corpus_says_nothing() -> None:
    one = (np.array([0]), np.array([1.0]))
    found = weighted_auroc(one, one, np.ones(1), np.ones(1), np.zeros((1, 1)), np.ones((1, 1)))
    assert found.tolist() == [0.5]
