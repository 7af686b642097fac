from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from salve_lm.errors import BadConfig, NotFinite, ShapeMismatch
from salve_lm.specificity.documents import LEFT_OUT, DocumentSums
from tests.specificity.made import tokens_of


def brute(document: torch.Tensor, value: torch.Tensor, n: int) -> np.ndarray:
    out = np.zeros((n, value.shape[1]))
    for d, row in zip(document.tolist(), value.double().numpy(), strict=True):
        if d != LEFT_OUT:
            out[d] += row
    return out


@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 60), max_size=4))
def test_sums_equal_loops_however_the_tokens_are_cut(seed: int, cuts: list[int]) -> None:
    document, z = tokens_of(seed, 12, 5)
    document[::7] = LEFT_OUT
    order = torch.randperm(len(document), generator=torch.Generator().manual_seed(seed))
    ranks = [DocumentSums(12, 5, keep_tokens=True) for _ in range(2)]
    for i, part in enumerate(order.tensor_split(sorted(c for c in cuts if c <= len(order)))):
        d, x = document[part], z[part]
        ranks[i % 2].update(d, x, x > 0.2, x**2 * (x > 0))
    ranks[0].merge(ranks[1])
    found = ranks[0].result()
    np.testing.assert_allclose(found.activation.toarray(), brute(document, z, 12), rtol=1e-12)
    np.testing.assert_array_equal(found.firing.toarray(), brute(document, (z > 0.2).int(), 12))
    # squares are made in float32
    np.testing.assert_allclose(found.attribution.toarray(), brute(document, z**2, 12), rtol=1e-6)
    counted = document[document != LEFT_OUT]
    np.testing.assert_array_equal(found.tokens, torch.bincount(counted, minlength=12).numpy())
    assert found.by_token is not None
    assert len(found.by_token.value) == int((z[document != LEFT_OUT] > 0).sum())
    assert found.by_token.value.sum() == pytest.approx(found.activation.sum(), rel=1e-5)


def test_memory_is_that_of_the_active_pairs() -> None:
    document, z = tokens_of(0, 30, 50)
    sums = DocumentSums(30, 50)
    sums.update(document, z)
    pairs = sums.result().activation.nnz
    assert sums.nbytes == 30 * 8 + pairs * 16


def test_what_does_not_fit_is_refused() -> None:
    sums = DocumentSums(3, 4)
    with pytest.raises(ShapeMismatch, match=r"activation has shape \(2, 5\), not \(2, 4\)"):
        sums.update(torch.tensor([0, 1]), torch.rand(2, 5))
    with pytest.raises(BadConfig, match="document 3, but the corpus has 3"):
        sums.update(torch.tensor([3]), torch.rand(1, 4))
    with pytest.raises(NotFinite, match="document 2"):
        sums.update(torch.tensor([2]), torch.full((1, 4), torch.nan))
    sums.update(torch.tensor([0]), torch.rand(1, 4))
    with pytest.raises(BadConfig, match="Give firing with every batch"):
        sums.update(torch.tensor([0]), torch.rand(1, 4), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ShapeMismatch, match="cannot be merged"):
        sums.merge(DocumentSums(3, 5))
    sums.update(torch.empty(0, dtype=torch.int64), torch.empty(0, 4))
    assert sums.result().tokens.tolist() == [1, 0, 0]
