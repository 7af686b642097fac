"""The feature table: class statistics of an SAE and the rankings that name its features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from salve_lm.errors import BadConfig, NameNotFound, NotFinite, ShapeMismatch, StaleStore

if TYPE_CHECKING:
    import pandas as pd

Ranking = Literal["dominant", "selective"]
RANKINGS: tuple[Ranking, ...] = ("dominant", "selective")


class FeatureName(NamedTuple):
    """A feature named by its place in a class's ranking, as in `dominant:church/1`."""

    ranking: Ranking
    label: int
    rank: int


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Class-conditional and corpus statistics of an SAE's latents and inputs, all float64.

    Attributes:
        class_names: one name a class; K in all.
        counts: samples of each class, int64 [K].
        mean: class means of the latents, mu_k, [K, d_sae].
        std: class standard deviations of the latents (1/n), [K, d_sae].
        x_mean: class means of the activations, [K, d_in].
        x_within_cov: pooled within-class covariance of the activations (1/N), [d_in, d_in].
        x_min: smallest value seen of each activation, [d_in]; all >= 0 after a ReLU.
        firing_rate: share of samples with |z| above the firing threshold, [d_sae].
        decoder_norm: n_l, the norm of each decoder row, [d_sae].
        mean_all: mean latents over all samples, [d_sae].
        provenance: where it comes from. Hashes under `sae` and `backbone`, and `site`, `data`,
            `split`; `firing_threshold` is added by `finalize`.
    """

    class_names: list[str]
    counts: Tensor
    mean: Tensor
    std: Tensor
    x_mean: Tensor
    x_within_cov: Tensor
    x_min: Tensor
    firing_rate: Tensor
    decoder_norm: Tensor
    mean_all: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        k, d_in, d_sae = self.n_classes, self.d_in, self.d_sae
        wanted = {
            "counts": (k,), "mean": (k, d_sae), "std": (k, d_sae), "x_mean": (k, d_in),
            "x_within_cov": (d_in, d_in), "x_min": (d_in,), "firing_rate": (d_sae,),
            "decoder_norm": (d_sae,), "mean_all": (d_sae,),
        }  # fmt: skip
        if k < 2:
            raise BadConfig(f"A feature table compares classes, so it needs two; it has {k}.")
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise ShapeMismatch(
                    f"{name!r} of the feature table is {tuple(tensor.shape)}, not {shape}."
                )
            if not torch.isfinite(tensor).all():
                raise NotFinite(name, "feature table", "Make the table again from clean data.")

    @property
    def n_classes(self) -> int:
        """K, the number of classes."""
        return len(self.class_names)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.x_mean.shape[-1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.mean.shape[-1]

    @property
    def pooled_std(self) -> Tensor:
        """Within-class standard deviation of each latent, pooled over classes, [d_sae]."""
        n = self.counts.double()
        return ((n[:, None] * self.std.square()).sum(0) / n.sum()).sqrt()

    @property
    def x_second_moment(self) -> Tensor:
        """E[x x^T] over all samples, [d_in, d_in]: within-class covariance plus class means."""
        weights = self.counts.double() / self.counts.sum()
        return self.x_within_cov + (self.x_mean * weights[:, None]).T @ self.x_mean

    def class_index(self, label: str | int) -> int:
        """Index of a class given by name or by index; names win over digits.

        Raises:
            NameNotFound: there is no such class.
        """
        return class_index(label, self.class_names)

    def mean_contrast(self, label: str | int) -> Tensor:
        """mu_k minus the mean of the other mu, [d_sae]."""
        return _contrast(self.mean, self.class_index(label))

    def x_mean_rest(self, label: str | int) -> Tensor:
        """Mean of the other classes' mean activations, [d_in]."""
        k = self.class_index(label)
        return (self.x_mean.sum(0) - self.x_mean[k]) / (self.n_classes - 1)

    def x_contrast(self, label: str | int) -> Tensor:
        """Mean activation of the class minus that of the others, [d_in]."""
        return _contrast(self.x_mean, self.class_index(label))

    def scores(self, label: str | int, ranking: Ranking = "dominant") -> Tensor:
        """How strongly each latent belongs to a class, [d_sae]; the largest ranks first.

        `dominant` (SALVE): n_l |mu_k[l]|, with the decoder norm n_l so that latents compare.
        `selective` (ours): |mu_k - mean of the other mu| / pooled standard deviation, which a
        latent that is always on cannot win.
        """
        k = self.class_index(label)
        if ranking == "dominant":
            return self.decoder_norm * self.mean[k].abs()
        difference = _contrast(self.mean, k).abs()
        # a latent that never varies and differs separates perfectly; one that is dead does nothing
        return torch.where(difference > 0, difference / self.pooled_std, 0.0)

    def ranked(self, label: str | int, ranking: Ranking = "dominant") -> Tensor:
        """Latents from the highest score of the class to the lowest, int64 [d_sae]."""
        return self.scores(label, ranking).argsort(descending=True, stable=True)

    def dominant(self, label: str | int, rank: int = 0) -> int:
        """The latent of the given rank (0 first) by n_l |mu_k[l]|."""
        return self._at(FeatureName("dominant", self.class_index(label), rank))

    def selective(self, label: str | int, rank: int = 0) -> int:
        """The latent of the given rank (0 first) by |mu_k - other mu| / pooled std."""
        return self._at(FeatureName("selective", self.class_index(label), rank))

    def sign(self, label: str | int, latent: int) -> int:
        """+1 where more of the latent means more of the class, -1 where it means less.

        The sign of mu_k - mean of the other mu: not of mu_k itself, which is the same for every
        class of a LinearL1 latent that is always on.
        """
        return -1 if self.mean_contrast(label)[self._checked(latent)] < 0 else 1

    def parse(self, text: str, target_class: str | int | None = None) -> FeatureName:
        """Read `RANKING:CLASS`, `RANKING:CLASS/RANK` or, with `target_class`, a bare `RANKING`.

        Raises:
            NameNotFound: unknown ranking or class.
            BadConfig: no class in the text and none given.
        """
        ranking, _, named = text.partition(":")
        if ranking not in RANKINGS:
            cure = "A feature is an index, or RANKING:CLASS such as dominant:church."
            raise NameNotFound("feature ranking", ranking, RANKINGS, cure)
        label: str | int | None = named or target_class
        if label is None:
            raise BadConfig(f"Feature {text!r} names no class: write {ranking}:CLASS.")
        rank = 0
        if named and named not in self.class_names:  # a class name may itself end in /1
            body, slash, tail = named.rpartition("/")
            if slash and tail.isdigit():
                label, rank = body, int(tail)
        return FeatureName(ranking, self.class_index(label), rank)

    def resolve(self, feature: str | int, target_class: str | int | None = None) -> int:
        """Index of a feature given as 17, "17", "dominant:church" or "selective:church/1".

        Ranks count from 0. A bare "dominant" or "selective" is that of `target_class`.
        """
        if isinstance(feature, str) and not feature.lstrip("-").isdigit():
            return self._at(self.parse(feature, target_class))
        return self._checked(int(feature))

    def check_sae(self, sha256: str, path: object) -> None:
        """Raise `StaleStore` unless this table was made with the SAE of hash `sha256`."""
        made_with = self.provenance.get("sae")
        if made_with is not None and made_with != sha256:
            raise StaleStore(
                f"The feature table was made with another SAE ({str(made_with)[:12]}) than {path} "
                f"({sha256[:12]}). Run discover again with this SAE, or give the SAE it belongs to."
            )

    def save(
        self, folder: str | Path, extra_tables: Mapping[str, pd.DataFrame] | None = None
    ) -> Path:
        """Write the folder described in `docs/formats/features.md`, whole or not at all.

        Args:
            folder: must not exist.
            extra_tables: further tables, written as NAME.parquet beside the others.

        Raises:
            OutputExists, OutputUnwritable: see `salve_lm.atomic`.
        """
        from salve_lm.features.files import save

        return save(self, folder, extra_tables)

    @classmethod
    def load(cls, folder: str | Path) -> FeatureTable:
        """Read a folder written by `save`.

        Raises:
            MissingFile: no such folder, or one without `index.json`.
            CorruptFile: truncated, changed after it was written, or something else.
        """
        from salve_lm.features.files import load

        return load(folder)

    def _at(self, name: FeatureName) -> int:
        if name.rank >= self.d_sae:
            raise NameNotFound(
                "feature", f"{name.ranking}:{self.class_names[name.label]}/{name.rank}", [],
                f"Ranks count from 0 and the table has {self.d_sae} latents.",
            )  # fmt: skip
        return int(self.ranked(name.label, name.ranking)[name.rank])

    def _checked(self, latent: int) -> int:
        return check_latent(latent, self.d_sae)


def class_index(label: str | int, class_names: list[str]) -> int:
    """Index of a class given by name or by index; names win over digits.

    Raises:
        NameNotFound: there is no such class.
    """
    if isinstance(label, str):
        if label in class_names:
            return class_names.index(label)
        if not label.isdigit():
            raise NameNotFound("class", label, class_names)
    index = int(label)
    if not 0 <= index < len(class_names):
        cure = f"There are {len(class_names)} classes, counted from 0."
        raise NameNotFound("class", str(label), [], cure)
    return index


def check_latent(latent: int, d_sae: int) -> int:
    """`latent`, if an SAE with `d_sae` latents has it; otherwise `NameNotFound`."""
    if not 0 <= latent < d_sae:
        raise NameNotFound("feature", str(latent), [], f"The latents are 0 to {d_sae - 1}.")
    return latent


def _contrast(means: Tensor, k: int) -> Tensor:
    return means[k] - (means.sum(0) - means[k]) / (len(means) - 1)
