"""Projecting a change of weights on a subspace of the residual stream (METHODS 6).

In gain-folded coordinates: with g the gain of the norm between a tensor and the stream (ones where
there is none), the stream sees A = diag(g) tau along the tensor's residual axis. Its projection is
put back as diag(1/g) Q Q^T A, so that what the stream sees of the result lies in the subspace.
Where g is 0 the tensor has no effect, and its projection is 0.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from salve_lm.errors import BadConfig, UnsupportedEdit
from salve_lm.task_vectors.one_thread import one_thread


@one_thread()
def orthonormal_basis(rows: Tensor) -> Tensor:
    """Basis of the span of `rows`, float64 [d, k], k the numerical rank.

    Rows are brought to length 1 first, so that a short decoder row counts as much as a long one;
    singular values below max(n, d) * eps(float32) times the largest do not count, since the rows
    come from float32.

    Args:
        rows: [n, d].

    Raises:
        UnsupportedEdit: a row is zero (a dead latent writes nothing).
    """
    rows = rows.double()
    norms = rows.norm(dim=1)
    if not norms.all():
        dead = [int(i) for i in (norms == 0).nonzero()[:, 0]]
        raise UnsupportedEdit(
            f"Selected decoder rows {dead[:5]} are zero: dead latents span nothing. Leave them out."
        )
    _, s, v = torch.linalg.svd(rows / norms[:, None], full_matrices=False)
    k = int((s > max(rows.shape) * torch.finfo(torch.float32).eps * s[0]).sum())
    return v[:k].T.contiguous()


@one_thread()
def random_basis(d: int, k: int, seed: int) -> Tensor:
    """Basis of a uniformly (Haar) random k-dimensional subspace, float64 [d, k].

    Raises:
        BadConfig: k is not between 1 and d.
    """
    if not 1 <= k <= d:
        raise BadConfig(f"A subspace of rank {k} does not fit into {d} dimensions.")
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q


def centred_basis(basis: Tensor) -> Tensor:
    """Basis of the subspace as a LayerNorm sees it, without the direction of all ones."""
    centred = basis - basis.mean(dim=0)
    kept = centred[:, centred.norm(dim=0) > 1e-6]
    if not kept.shape[1]:
        raise UnsupportedEdit(
            "The subspace is the direction of all ones, which a LayerNorm never shows. Choose "
            "other latents."
        )
    return orthonormal_basis(kept.T)


def principal_basis(second_moment: Tensor, mean: Tensor | None, k: int) -> Tensor:
    """Basis of the top k principal components of activations, float64 [d, k].

    Args:
        second_moment: mean of x x^T, [d, d].
        mean: of x, [d]; None to leave it in.
        k: number of components.
    """
    d = len(second_moment)
    if not 1 <= k <= d:
        raise BadConfig(f"A subspace of rank {k} does not fit into {d} dimensions.")
    covariance = second_moment.double()
    if mean is not None:
        covariance = covariance - torch.outer(mean.double(), mean.double())
    return torch.linalg.eigh(covariance).eigenvectors[:, -k:].flip(1).contiguous()


def folded(tau: Tensor, gain: Tensor, axis: int, centred: bool = False) -> Tensor:
    """What the residual stream sees of `tau`: float64, the residual axis last, [n, d].

    Args:
        tau: a matrix, or a vector over the stream.
        gain: [d].
        axis: dimension of `tau` that runs over the stream.
        centred: take away the mean over the stream (a LayerNorm's reading).
    """
    a = tau.double().reshape(len(tau), -1).movedim(axis, -1) * gain.double()
    return a - a.mean(dim=-1, keepdim=True) if centred else a


def project(
    tau: Tensor, basis: Tensor, axis: int, gain: Tensor | None = None, centred: bool = False
) -> Tensor:
    """The projection of a whole `tau`, of its shape, float64; the formula that blocks follow.

    Args:
        tau: a matrix, or a vector over the stream.
        basis: orthonormal, [d, k].
        axis: dimension of `tau` that runs over the stream.
        gain: [d]; ones where None.
        centred: see `folded`; the basis is centred too.
    """
    gain = torch.ones(tau.shape[axis], dtype=torch.float64) if gain is None else gain.double()
    q = centred_basis(basis.double()) if centred else basis.double()
    kept = folded(tau, gain, axis, centred) @ q @ q.T
    return (kept * inverse(gain)).movedim(-1, axis).reshape(tau.shape)


def inverse(gain: Tensor) -> Tensor:
    """1 / gain, and 0 where the gain is 0."""
    return torch.where(gain == 0, 0.0, 1 / torch.where(gain == 0, 1.0, gain))


def seed_of(*parts: object) -> int:
    """A seed that depends on all `parts`, equal on every machine."""
    text = "|".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
