"""How alike two dictionaries are: against brute force, and what must not matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from salve_lm.errors import ShapeMismatch
from salve_lm.features.similarity import guide_cosine, mean_max_cosine, random_directions


def test_against_numpy() -> None:
    a, b = random_directions(1500, 7, 0), random_directions(40, 7, 1)
    rows = [r / np.linalg.norm(r) for r in a.double().numpy()]
    columns = [r / np.linalg.norm(r) for r in b.double().numpy()]
    table = np.array([[float(r @ c) for c in columns] for r in rows])
    assert mean_max_cosine(a, b) == pytest.approx(table.max(1).mean(), abs=1e-6)
    assert mean_max_cosine(a, b, signed=True) == pytest.approx(
        np.abs(table).max(1).mean(), abs=1e-6
    )
    assert mean_max_cosine(a, b) != pytest.approx(mean_max_cosine(b, a), abs=1e-3)


def test_order_and_length_of_latents_do_not_matter() -> None:
    a = random_directions(20, 6, 0)
    b = a[torch.randperm(20)] * torch.rand(20, 1).add(0.1)
    assert mean_max_cosine(a, b) == pytest.approx(1.0, abs=1e-6)
    # nor does the sign, where latents have both
    assert mean_max_cosine(a, -b, signed=True) == pytest.approx(1.0, abs=1e-6)
    assert mean_max_cosine(a, -b) < 0.99


def test_unrelated_directions_have_none() -> None:
    eye = torch.eye(6)
    assert mean_max_cosine(eye[:3], eye[3:]) == 0
    # the absolute values of unrelated normal rows still have 2 / pi
    a, b = random_directions(2, 100_000, 3)
    assert guide_cosine(a, b) == pytest.approx(2 / math.pi, abs=0.01)
    assert guide_cosine(a, -3 * a) == pytest.approx(1.0)


def test_what_does_not_compare_is_refused() -> None:
    with pytest.raises(ShapeMismatch, match="one width"):
        mean_max_cosine(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(ShapeMismatch, match="without live latents"):
        mean_max_cosine(torch.ones(3, 4), torch.ones(0, 4))
