"""Class statistics of latents and activations in one pass, batch by batch and rank by rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salve_lm.errors import BadConfig, EmptyClass, NotFinite, ShapeMismatch
from salve_lm.features.table import FeatureTable


class StreamingFeatureStatistics:
    """Collects a `FeatureTable` batch by batch, in float64, in one pass.

    Means and sums of squared deviations are merged pairwise (Chan, Golub & LeVeque 1983), so no
    precision is lost where a mean is large against its spread. Instances can be pickled and merged,
    which is how several ranks share the work.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        n_classes: K.
        firing_threshold: |z| n_l above it counts as firing. LinearL1 has no exact zeros: give one.
        decoder_norm: n_l, norms of the decoder rows [d_sae]; ones where absent.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        n_classes: int,
        firing_threshold: float = 0.0,
        decoder_norm: Tensor | None = None,
    ) -> None:
        self.d_in, self.d_sae, self.n_classes = d_in, d_sae, n_classes
        self.firing_threshold = firing_threshold
        self._norm = torch.ones(1) if decoder_norm is None else decoder_norm.detach().cpu()
        self._z = _ClassMoments.zeros(n_classes, d_sae)
        self._x_mean = torch.zeros(n_classes, d_in, dtype=torch.float64)
        self._x_scatter = torch.zeros(d_in, d_in, dtype=torch.float64)
        self._x_min = torch.full((d_in,), float("inf"), dtype=torch.float64)
        self._z_sum = torch.zeros(d_sae, dtype=torch.float64)
        self._fired = torch.zeros(d_sae, dtype=torch.int64)
        self._n_all = 0

    @property
    def counts(self) -> Tensor:
        """Samples seen of each class, int64 [K]."""
        return self._z.count.long()

    def update(self, x: Tensor, z: Tensor, label: Tensor) -> None:
        """Take in activations `x` [n, d_in], their latents `z` [n, d_sae] and classes `label` [n].

        Rows of unknown class (label -1) count for the corpus statistics only.

        Raises:
            ShapeMismatch: widths other than announced, or unequal numbers of rows.
            NotFinite: NaN or infinity in `x` or `z`.
            BadConfig: a label beyond the number of classes.
        """
        self._check(x, z, label)
        rows = max(1, (1 << 23) // self.d_sae)  # bounds the float64 copies to 64 MiB
        for part in zip(x.split(rows), z.split(rows), label.split(rows), strict=True):
            self._take(*(t.detach().cpu() for t in part))

    def merge(self, other: StreamingFeatureStatistics) -> None:
        """Take in everything another instance (another rank) has seen."""
        if (self.d_in, self.d_sae, self.n_classes, self.firing_threshold) != (
            other.d_in, other.d_sae, other.n_classes, other.firing_threshold,
        ):  # fmt: skip
            raise ShapeMismatch("Only statistics of the same widths, classes and threshold merge.")
        self._merge_x(other.counts.double(), other._x_mean, other._x_scatter, slice(None))
        self._z.merge(other._z, slice(None))
        self._x_min = torch.minimum(self._x_min, other._x_min)
        self._z_sum += other._z_sum
        self._fired += other._fired
        self._n_all += other._n_all

    def finalize(
        self,
        class_names: list[str],
        decoder_norm: Tensor,
        provenance: Mapping[str, Any] | None = None,
        where: str = "the data given",
    ) -> FeatureTable:
        """The table of everything seen so far.

        Args:
            class_names: one name a class.
            decoder_norm: norms of the SAE's decoder rows, [d_sae].
            provenance: see `FeatureTable`.
            where: what was read, for messages.

        Raises:
            EmptyClass: a class without samples.
            ShapeMismatch: another number of names or norms than announced.
        """
        if len(class_names) != self.n_classes:
            raise ShapeMismatch(
                f"{len(class_names)} class names for statistics of {self.n_classes} classes."
            )
        for name, count in zip(class_names, self.counts.tolist(), strict=True):
            if count == 0:
                raise EmptyClass(name, where)
        return FeatureTable(
            class_names=list(class_names),
            counts=self.counts,
            mean=self._z.mean.clone(),
            std=(self._z.m2 / self._z.count[:, None]).sqrt(),
            x_mean=self._x_mean.clone(),
            x_within_cov=self._x_scatter / self._z.count.sum(),
            x_min=self._x_min.clone(),
            firing_rate=self._fired.double() / self._n_all,
            decoder_norm=decoder_norm.detach().cpu().double(),
            mean_all=self._z_sum / self._n_all,
            provenance={**(provenance or {}), "firing_threshold": self.firing_threshold},
        )

    def _take(self, x: Tensor, z: Tensor, label: Tensor) -> None:
        if len(x) == 0:
            return
        x, z, label = x.double(), z.double(), label.long()
        self._n_all += len(x)
        self._x_min = torch.minimum(self._x_min, x.amin(0))
        self._z_sum += z.sum(0)
        self._fired += (z.abs() * self._norm > self.firing_threshold).sum(0)
        known = label >= 0
        if not known.all():
            x, z, label = x[known], z[known], label[known]
        if len(x) == 0:
            return
        present, group = label.unique(return_inverse=True)
        moments = _ClassMoments.of(z, group, len(present))
        x_mean = _class_means(x, group, moments.count)
        centred = x - x_mean[group]
        self._merge_x(moments.count, x_mean, centred.T @ centred, present)
        self._z.merge(moments, present)

    def _merge_x(self, count: Tensor, mean: Tensor, scatter: Tensor, at: Tensor | slice) -> None:
        """Must run before the latents are merged: it reads the counts from before."""
        before = self._z.count[at]
        total = before + count
        share = torch.where(total > 0, count / total, 0.0)
        difference = mean - self._x_mean[at]
        self._x_scatter += scatter + (difference * (before * share)[:, None]).T @ difference
        self._x_mean[at] += difference * share[:, None]

    def _check(self, x: Tensor, z: Tensor, label: Tensor) -> None:
        wanted = (len(label), self.d_in), (len(label), self.d_sae)
        if (tuple(x.shape), tuple(z.shape)) != wanted:
            raise ShapeMismatch(
                f"x {tuple(x.shape)} and z {tuple(z.shape)} should be {wanted[0]} and {wanted[1]}."
            )
        for name, tensor in (("x", x), ("z", z)):
            if not torch.isfinite(tensor).all():
                raise NotFinite(name, "feature statistics", "Look for it in the activations.")
        if len(label) and not -1 <= int(label.min()) <= int(label.max()) < self.n_classes:
            raise BadConfig(
                f"Labels run from {int(label.min())} to {int(label.max())}, but there are "
                f"{self.n_classes} classes. Give every class a name."
            )


@dataclass(eq=False)
class _ClassMoments:
    """Count [K], mean and sum of squared deviations [K, d] of each class, float64."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def zeros(cls, k: int, d: int) -> _ClassMoments:
        return cls(*(torch.zeros(s, dtype=torch.float64) for s in ((k,), (k, d), (k, d))))

    @classmethod
    def of(cls, values: Tensor, group: Tensor, k: int) -> _ClassMoments:
        count = torch.bincount(group, minlength=k).double()
        mean = _class_means(values, group, count)
        m2 = torch.zeros_like(mean).index_add_(0, group, (values - mean[group]).square())
        return cls(count, mean, m2)

    def merge(self, other: _ClassMoments, at: Tensor | slice) -> None:
        before = self.count[at]
        total = before + other.count
        share = torch.where(total > 0, other.count / total, 0.0)
        difference = other.mean - self.mean[at]
        self.m2[at] += other.m2 + difference.square() * (before * share)[:, None]
        self.mean[at] += difference * share[:, None]
        self.count[at] = total


def _class_means(values: Tensor, group: Tensor, count: Tensor) -> Tensor:
    sums = torch.zeros(len(count), values.shape[1], dtype=torch.float64)
    return sums.index_add_(0, group, values) / count[:, None]
