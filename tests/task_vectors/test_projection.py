"""Projection and its energies against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import salve_lm.task_vectors.blocks as blocks
from salve_lm.errors import BadConfig, UnsupportedEdit
from salve_lm.language.residual import ResidualRole
from salve_lm.task_vectors.delta import ProjectedDelta, RandomDirectionDelta, RawDelta
from salve_lm.task_vectors.energy import (
    gram,
    random_latents_null,
    random_subspace_moments,
    random_subspace_null,
    retained_share,
)
from salve_lm.task_vectors.projection import (
    centred_basis,
    folded,
    orthonormal_basis,
    principal_basis,
    project,
    random_basis,
    seed_of,
)
from salve_lm.task_vectors.sources import Difference
from salve_lm.task_vectors.weights import GivenWeights

D, N = 9, 6


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def source(tau: Tensor) -> Difference:
    return Difference(
        finetuned="tau", base=GivenWeights({"w": torch.zeros_like(tau)}),
        tuned=GivenWeights({"w": tau}),
    )  # fmt: skip


def test_basis_has_the_numerical_rank() -> None:
    rows = randn(3, D)
    twice = torch.cat([rows, 1e-4 * rows[:1], rows[1:2] + rows[2:3]])
    q = orthonormal_basis(twice.float())
    assert q.shape == (D, 3)
    assert torch.allclose(q.T @ q, torch.eye(3).double(), atol=1e-12)
    assert torch.allclose(q @ q.T @ rows.T, rows.T, atol=1e-6)
    with pytest.raises(UnsupportedEdit, match=r"rows \[1\] are zero"):
        orthonormal_basis(torch.stack([rows[0], torch.zeros(D)]))
    with pytest.raises(BadConfig, match="does not fit"):
        random_basis(4, 5, 0)


@settings(max_examples=30)
@given(st.integers(0, 3), st.booleans(), st.booleans(), st.integers(1, D - 2))
def test_projection_against_brute_force(axis_norm: int, centred: bool, reads: bool, k: int) -> None:
    """What the stream sees of the result is P of what it sees of tau; W (I - G d d^T G^-1)."""
    axis, with_gain = axis_norm % 2, axis_norm > 1
    tau = randn(*((D, N) if axis == 0 else (N, D)), seed=k)
    gain = 1 + 0.5 * randn(D, seed=k + 1) if with_gain else torch.ones(D).double()
    basis = random_basis(D, k, seed=k)
    q = centred_basis(basis) if centred else basis
    got = project(tau, basis, axis, gain, centred)
    matrix = tau if axis == 1 else tau.T  # [n, d]
    centring = torch.eye(D).double() - centred / D
    seen = matrix @ torch.diag(gain) @ centring
    expected = seen @ q @ q.T @ torch.diag(1 / gain)
    assert torch.allclose(got if axis == 1 else got.T, expected, atol=1e-10)
    again = project(got, basis, axis, gain, centred)
    assert torch.allclose(again, got, atol=1e-9)  # idempotent
    inside = folded(got, gain, axis, centred)
    assert torch.allclose(inside @ q @ q.T, inside, atol=1e-9)


@pytest.mark.parametrize("block", [4, 13, 1 << 18])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
def test_streamed_projection(
    axis: int, centred: bool, rescale: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    tau = randn(*((D, N) if axis == 0 else (N, D))).float()
    gain, basis = 1 + 0.3 * randn(D, seed=1), random_basis(D, 3, 2)
    role = ResidualRole(True, axis, None, centred=centred)
    delta = ProjectedDelta(source(tau), "w", -0.5, role, gain, basis, rescale)
    expected = project(tau, basis, axis, gain, centred)
    raw = folded(tau, gain, axis, centred).square().sum()
    kept = folded(expected, gain, axis, centred).square().sum()
    assert delta.energies == pytest.approx((float(raw), float(kept)))
    factor = (raw / kept) ** 0.5 if rescale else 1.0
    whole = delta.rows(0, len(tau))
    assert torch.allclose(whole.double(), -0.5 * factor * expected, atol=1e-6)
    if rescale:
        assert float(folded(whole, gain, axis, centred).norm()) == pytest.approx(
            0.5 * float(raw) ** 0.5, rel=1e-5
        )
    # any rows, any order: the same bits
    for start, stop in ((1, 4), (0, 2), (3, len(tau)), (2, 2)):
        assert torch.equal(delta.rows(start, stop), whole[start:stop])
        assert torch.equal(delta.columns(start, stop), whole[:, start:stop].T)


@pytest.mark.parametrize("axis", [0, 1])
def test_threads_do_not_change_a_bit(axis: int) -> None:
    tau = randn(600, 300).float()
    before, found = torch.get_num_threads(), []
    role = ResidualRole(True, axis, None)
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            basis = random_basis(tau.shape[axis], 77, 2)
            delta = ProjectedDelta(
                source(tau), "w", 1.0, role, torch.ones(tau.shape[axis]), basis, True
            )
            found.append(delta.rows(0, 600))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_vectors_and_dead_channels() -> None:
    bias = randn(D).float()
    basis = random_basis(D, 2, 0)
    delta = ProjectedDelta(
        source(bias), "w", 1.0, ResidualRole(False, 0, None), torch.ones(D), basis, False
    )
    assert torch.allclose(delta.rows(0, D).double(), basis @ basis.T @ bias.double(), atol=1e-6)
    gain = torch.ones(D).double()
    gain[2] = 0
    assert not project(randn(N, D), basis, 1, gain)[:, 2].any()


def test_random_direction_has_the_norm_of_tau(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 2 * D)
    tau = randn(N, D).float()
    delta = RandomDirectionDelta(source(tau), "w", 2.0, seed=3)
    whole = delta.rows(0, N)
    assert float(whole.norm()) == pytest.approx(2 * float(tau.norm()), rel=1e-5)
    assert torch.equal(delta.rows(1, 5), whole[1:5])
    assert not torch.equal(RandomDirectionDelta(source(tau), "w", 2.0, 4).rows(0, N), whole)
    assert abs(float((whole * tau).sum() / whole.norm() / tau.norm())) < 0.5
    assert not RandomDirectionDelta(source(torch.zeros(N, D)), "w", 1.0, 0).rows(0, N).any()
    raw = RawDelta(source(tau), "w", 1.0)
    assert torch.equal(raw.rows(2, 5), tau[2:5])


@settings(max_examples=8)
@given(st.integers(1, D), st.integers(0, 5))
def test_null_moments_are_exact(k: int, seed: int) -> None:
    moments = gram(randn(N, D, seed=seed), ResidualRole(True, 1, None), 1 + torch.rand(D))
    drawn = torch.tensor(
        [retained_share(moments, random_basis(D, k, seed_of(seed, i))) for i in range(400)]
    )
    mean, sd = random_subspace_moments(moments, k)
    assert mean == pytest.approx(k / D)
    assert float(drawn.mean()) == pytest.approx(mean, abs=5 * sd / 20 + 1e-9)
    assert float(drawn.std()) == pytest.approx(sd, rel=0.2, abs=1e-6)


def test_retained_share_is_that_of_the_projection() -> None:
    tau, gain = randn(N, D), 1 + 0.2 * randn(D, seed=4)
    basis = random_basis(D, 3, 1)
    moments = gram(tau, ResidualRole(True, 1, None), gain)
    kept = folded(project(tau, basis, 1, gain), gain, 1).square().sum()
    assert retained_share(moments, basis) == pytest.approx(
        float(kept / folded(tau, gain, 1).square().sum())
    )
    null = random_subspace_null(moments, 3, 1.0, samples=40)
    assert null.low < null.mean < null.high
    assert null.as_low == 1
    assert random_subspace_null(moments, 3, 0.0, samples=40).as_low == pytest.approx(1 / 41)
    decoder = torch.cat([randn(20, D, seed=5), torch.zeros(2, D)])
    assert 0 < random_latents_null(moments, decoder, 3, 0.5, samples=10).mean < 1


def test_gain_folding_matters() -> None:
    """k / d holds for what the stream sees, not for weights as they are stored."""
    tau, gain = randn(N, D), torch.ones(D).double()
    gain[0] = 0.01
    shares = {"seen": [], "stored": []}
    for i in range(200):
        got = project(tau, random_basis(D, 2, i), 1, gain)
        kept = folded(got, gain, 1).square().sum() / folded(tau, gain, 1).square().sum()
        shares["seen"].append(float(kept))
        shares["stored"].append(float(got.square().sum() / tau.square().sum()))
    means = {n: sum(v) / len(v) for n, v in shares.items()}
    assert means["seen"] == pytest.approx(2 / D, rel=0.1)
    assert means["stored"] > 10 * 2 / D


def test_principal_components() -> None:
    x = randn(200, D) * torch.arange(1.0, D + 1) + 3
    q = principal_basis(x.T @ x / 200, x.mean(0), 2)
    u = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2]
    assert torch.allclose((u @ q).abs(), torch.eye(2).double(), atol=1e-8)
    assert principal_basis(x.T @ x / 200, None, 1).shape == (D, 1)
    with pytest.raises(BadConfig):
        principal_basis(x.T @ x, None, D + 1)
