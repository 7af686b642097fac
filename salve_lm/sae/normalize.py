"""Scaling of the inputs, estimated once on training data and folded into the weights at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor, nn

from salve_lm.errors import BadConfig, NotFinite
from salve_lm.sae import ranks

Folded = Literal["expected_average_only_in", "covariance_whitening"]
"""Scalings that can be folded into the weights; the names are SAELens'."""

FOLDED: tuple[str, ...] = get_args(Folded)

WHITENING_EPS = 1e-3
"""Added to the covariance's eigenvalues, as in SAELens."""


class Moments:
    """Sums over activations, in float64.

    Args:
        d_in: width of the activations.
        second: sum their outer products as well.
        device: where to sum.
    """

    def __init__(self, d_in: int, second: bool, device: torch.device) -> None:
        self._second = second
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self._count, self._norm = torch.zeros((), **options), torch.zeros((), **options)
        self._total = torch.zeros(d_in, **options)
        self._outer = torch.zeros((d_in, d_in) if second else (), **options)

    @torch.no_grad()
    def add(self, batch: Tensor) -> None:
        """Count in activations [n, d_in]."""
        x = batch.to(self._total.device, torch.float64)
        self._count += x.shape[0]
        self._norm += x.norm(dim=1).sum()
        if self._second:
            self._total += x.sum(0)
            self._outer += x.t() @ x

    def reduced(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Number of rows, sum of their norms, their sum and that of outer products; all ranks'."""
        sums = self._count, self._norm, self._total, self._outer
        for moment in sums:
            ranks.all_reduce(moment, "sum")
        return sums


class InputNormalizer(nn.Module):
    """x -> (x - mean) M; M is a number for the average norm, a matrix for whitening.

    Buffers are float64, so that folding is exact, and belong to the checkpoint, so that a resumed
    run keeps the scaling its weights were trained with.
    """

    mean: Tensor
    forward_map: Tensor
    inverse_map: Tensor
    ready: Tensor

    def __init__(self, mode: Folded, d_in: int) -> None:
        super().__init__()
        self.mode, self.d_in = mode, d_in
        shape = () if mode == "expected_average_only_in" else (d_in, d_in)
        self.register_buffer("mean", torch.zeros(d_in, dtype=torch.float64))
        self.register_buffer("forward_map", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("inverse_map", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("ready", torch.tensor(False))

    @torch.no_grad()
    def estimate(self, batches: Iterable[Tensor]) -> None:
        """Measure the scaling on this rank's batches [n, d_in] and those of all other ranks.

        expected_average_only_in: sqrt(d_in) / mean of |x| (Anthropic, April 2024).
        covariance_whitening: M = E (lambda + eps)^(-1/2) of the covariance E lambda E^T
        (arXiv 2511.13981).

        Raises:
            NotFinite: NaN or infinity in the activations.
            BadConfig: no activations, or all of them zero.
        """
        moments = self.moments()
        for batch in batches:
            moments.add(batch)
        self.settle(moments)

    def moments(self) -> Moments:
        """An empty sum, for whoever goes through the batches once for several autoencoders."""
        return Moments(self.d_in, self.mode == "covariance_whitening", self.mean.device)

    @torch.no_grad()
    def settle(self, moments: Moments) -> None:
        """Take the scaling from this rank's sums and those of all other ranks; see `estimate`."""
        count, norm, total, outer = moments.reduced()
        if not norm.isfinite():
            raise NotFinite(
                "x", "training activations, while measuring normalize_input", "Harvest them again."
            )
        if norm == 0:
            raise BadConfig(
                "normalize_input needs training activations that are not all zero; "
                f"found {int(count)} rows. Check the site, or set normalize_input to 'none'."
            )
        if self.mode == "expected_average_only_in":
            self.forward_map.copy_(self.d_in**0.5 * count / norm)
            self.inverse_map.copy_(1 / self.forward_map)
        else:
            self._whiten(count, total, outer)
        self.ready.fill_(True)

    def _whiten(self, count: Tensor, total: Tensor, outer: Tensor) -> None:
        mean = total / count
        covariance = (outer - count * torch.outer(mean, mean)) / (count - 1).clamp(min=1)
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        root = (eigenvalues.clamp(min=0) + WHITENING_EPS).sqrt()
        self.mean.copy_(mean)
        self.forward_map.copy_(vectors / root)
        self.inverse_map.copy_(root[:, None] * vectors.t())
        # the signs of eigenvectors are arbitrary: ranks must not choose them apart
        for buffer in (self.mean, self.forward_map, self.inverse_map):
            ranks.broadcast(buffer)

    def forward(self, x: Tensor) -> Tensor:
        """Scaled activations [n, d_in], in the type of `x`."""
        if self.mode == "expected_average_only_in":
            return x * self.forward_map.to(x.dtype)
        return (x - self.mean.to(x.dtype)) @ self.forward_map.to(x.dtype)

    def fold(self, sae: TrainingSAE[Any]) -> None:
        """Change `sae`, in place, to take raw activations; by SAELens' own folds."""
        if self.mode == "expected_average_only_in":
            sae.fold_activation_norm_scaling_factor(float(self.forward_map))
        else:
            sae.fold_activation_whitening(self.mean, self.forward_map, self.inverse_map)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        out = super()._apply(*args, **kwargs)
        for name in ("mean", "forward_map", "inverse_map"):
            buffer = getattr(self, name)
            buffer.data = buffer.data.double()
        return out
