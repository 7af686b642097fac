"""How much of a task vector a projection keeps, against what chance would keep (METHODS 6).

All energies are squared norms as the residual stream sees them (gain-folded, see `projection`):
there a uniformly random k-dimensional subspace of d dimensions keeps k / d on average, exactly. In
the coordinates in which weights are stored it does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from salve_lm.language.residual import ResidualRole
from salve_lm.task_vectors.projection import (
    folded,
    orthonormal_basis,
    principal_basis,
    random_basis,
    seed_of,
)
from salve_lm.task_vectors.sources import TaskVectorSource
from salve_lm.task_vectors.variants import Projected, Variant, gain_of
from salve_lm.task_vectors.weights import Weights

SAMPLES = 200


class NamedChange(Protocol):
    """One tensor and what is done to it; `AddTaskVector` is one."""

    @property
    def name(self) -> str:
        """Full name of the tensor."""

    @property
    def source(self) -> TaskVectorSource:
        """The task vector."""

    @property
    def variant(self) -> Variant:
        """What of it is added."""


class Null(NamedTuple):
    """What subspaces drawn at random keep.

    Attributes:
        mean: of the retained share.
        sd: its standard deviation.
        low: 2.5 % quantile.
        high: 97.5 % quantile.
        as_low: share of draws that keep no more than the subspace in question, (n + 1) / (N + 1).
    """

    mean: float
    sd: float
    low: float
    high: float
    as_low: float


class RetainedEnergy(NamedTuple):
    """What one projection keeps.

    Attributes:
        name: of the tensor, or `layer N` for all of a layer's projected tensors together.
        rank: k, the numerical rank of the subspace.
        width: d, the width of the residual stream.
        energy: squared norm of tau.
        retained: of its projection.
        random_subspace: the same for uniformly random subspaces of rank k.
        random_latents: for the span of as many random live decoder rows; None without a decoder.
        principal_components: rho for the top k principal components of the activations; None
            without activations.
    """

    name: str
    rank: int
    width: int
    energy: float
    retained: float
    random_subspace: Null
    random_latents: Null | None = None
    principal_components: float | None = None

    @property
    def rho(self) -> float:
        """Retained share of the energy; 0 of nothing is 0."""
        return self.retained / self.energy if self.energy else 0.0

    @property
    def expected(self) -> float:
        """k / d, what a random subspace keeps on average."""
        return self.rank / self.width

    @property
    def ratio(self) -> float:
        """rho over k / d: below 1, the subspace keeps less than chance."""
        return self.rho / self.expected


def gram(tau: Tensor, role: ResidualRole, gain: Tensor) -> Tensor:
    """C = A^T A, float64 [d, d], of what the stream sees of a whole `tau`; trace C its energy."""
    a = folded(tau, gain, role.axis, role.centred)
    return a.T @ a


def retained_share(moments: Tensor, basis: Tensor) -> float:
    """rho = tr(Q^T C Q) / tr C for an orthonormal `basis` Q [d, k]; 0 where C is 0."""
    total = float(moments.trace())
    return float((basis * (moments @ basis)).sum()) / total if total else 0.0


def random_subspace_moments(moments: Tensor, k: int) -> tuple[float, float]:
    """Exact mean and standard deviation of rho over uniformly random k-dimensional subspaces.

    mean = k / d; variance = 2 k (d - k) / (d (d - 1) (d + 2)) * (tr C^2 / (tr C)^2 - 1 / d), from
    the second moments of the Haar measure.
    """
    d = len(moments)
    total = float(moments.trace())
    if total == 0 or d < 2:
        return k / d, 0.0
    spread = float(moments.square().sum()) / total**2 - 1 / d
    variance = 2 * k * (d - k) / (d * (d - 1) * (d + 2)) * max(spread, 0.0)
    return k / d, variance**0.5


def random_subspace_null(
    moments: Tensor, k: int, rho: float, samples: int = SAMPLES, seed: int = 0
) -> Null:
    """The distribution of rho over random subspaces: moments exact, quantiles from `samples`."""
    d = len(moments)
    drawn = [
        retained_share(moments, random_basis(d, k, seed_of("null", seed, i)))
        for i in range(samples)
    ]
    return _null(drawn, rho)._replace(
        **dict(zip(("mean", "sd"), random_subspace_moments(moments, k), strict=True))
    )


def random_latents_null(
    moments: Tensor, decoder: Tensor, n: int, rho: float, samples: int = SAMPLES, seed: int = 0
) -> Null:
    """The distribution of rho over spans of `n` random live rows of `decoder` [d_sae, d]."""
    live = decoder[decoder.norm(dim=1) > 0]
    generator = torch.Generator().manual_seed(seed_of("latents null", seed))
    drawn = []
    for _ in range(samples):
        rows = live[torch.randperm(len(live), generator=generator)[:n]]
        drawn.append(retained_share(moments, orthonormal_basis(rows)))
    return _null(drawn, rho)


def account(
    changes: Iterable[NamedChange],
    base: Weights,
    *,
    decoders: Mapping[int, Tensor] | None = None,
    second_moments: Mapping[int, Tensor] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> list[RetainedEnergy]:
    """Retained energy of every projected tensor, and of each layer, beside its nulls.

    Holds one tensor at a time, and two [d, d] matrices. Tensors that are not projected are left
    out. In models with LayerNorm the mean direction is taken out of C and the basis alike.

    Args:
        changes: the ops of a plan whose variant is a projection.
        base: the unedited weights.
        decoders: layer -> W_dec [d_sae, d], for random live latents.
        second_moments: layer -> E[x x^T] [d, d] of the activations, for principal components.
        samples: random subspaces (and sets of latents) drawn a tensor.
        seed: of the draws.
    """
    found: list[RetainedEnergy] = []
    layers: dict[int, list[tuple[NamedChange, Projected]]] = {}
    for change in changes:
        if isinstance(change.variant, Projected):
            number = _layer(change.name)
            layers.setdefault(number, []).append((change, change.variant))
    for number, members in layers.items():
        decoder, second = (decoders or {}).get(number), (second_moments or {}).get(number)
        width = len(members[0][1].subspace.basis)
        pooled = torch.zeros(width, width, dtype=torch.float64)
        kept, rank, n = 0.0, 0, 0
        for change, variant in members:
            source = change.source.with_base(base)
            shape = source.shape(change.name)
            tau = source.rows(change.name, 0, shape[0])
            delta = variant.delta(source, change.name, 1.0, base)
            moments = gram(tau, variant.role, gain_of(variant.role, base, width))
            energy, retained = delta.energies
            n = len(variant.subspace.origin.get("latents", ())) or variant.subspace.rank
            rank = max(rank, variant.subspace.rank)
            pooled += moments
            kept += retained
            found.append(
                _entry(change.name, delta.rank, moments, energy, retained, n, decoder, second,
                       samples, seed)
            )  # fmt: skip
        total = float(pooled.trace())
        found.append(
            _entry(f"layer {number}", rank, pooled, total, kept, n, decoder, second, samples, seed)
        )
    return found


def _entry(
    name: str,
    rank: int,
    moments: Tensor,
    energy: float,
    retained: float,
    n: int,
    decoder: Tensor | None,
    second: Tensor | None,
    samples: int,
    seed: int,
) -> RetainedEnergy:
    rho = retained / energy if energy else 0.0
    return RetainedEnergy(
        name, rank, len(moments), energy, retained,
        random_subspace_null(moments, rank, rho, samples, seed),
        None if decoder is None
        else random_latents_null(moments, decoder.double(), n, rho, samples, seed),
        None if second is None
        else retained_share(moments, principal_basis(second, None, rank)),
    )  # fmt: skip


def _null(drawn: list[float], rho: float) -> Null:
    values = torch.tensor(drawn, dtype=torch.float64)
    as_low = (int((values <= rho).sum()) + 1) / (len(values) + 1)
    low, high = (float(values.quantile(q)) for q in (0.025, 0.975))
    return Null(float(values.mean()), float(values.std(correction=0)), low, high, as_low)


def _layer(name: str) -> int:
    """The first number in a tensor's name, which is its layer's."""
    return next(int(part) for part in name.split(".") if part.isdigit())
