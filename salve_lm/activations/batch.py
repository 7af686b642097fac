"""What activation loaders yield."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ActivationBatch(NamedTuple):
    """One rank's share of a global batch of activations.

    Attributes:
        x: activations [n, d_in], float32.
        label: class of each row, int64 [n]; -1 where it is unknown.
        sample: index of the row's sample in its split, int64 [n]. Several rows share a sample where
            a site reduces by `positions`.
        n_global: rows in the global batch, summed over all ranks. A mean over the global batch is
            `sum over n / n_global`, summed over ranks, however unevenly the last batch is shared;
            `n` may be 0 on some ranks.
    """

    x: Tensor
    label: Tensor
    sample: Tensor
    n_global: int

    @classmethod
    def of(cls, x: dict[str, Tensor], ids: dict[str, Tensor], n_global: int) -> ActivationBatch:
        """From the columns `x`, and `label` and `sample`, of a buffer."""
        return cls(x["x"], ids["label"], ids["sample"], n_global)


class SitesBatch(NamedTuple):
    """One rank's share of a global batch of activations of several sites: the same rows at each.

    Attributes:
        x: site -> activations [n, d_in of the site].
        sample: index of each row's document in its split, int64 [n].
        position: place of each row's token in the packed text, int64 [n]: its window times
            `context`, plus its column.
        n_global: rows in the global batch, summed over all ranks; see `ActivationBatch`.
    """

    x: dict[str, Tensor]
    sample: Tensor
    position: Tensor
    n_global: int

    @classmethod
    def of(cls, x: dict[str, Tensor], ids: dict[str, Tensor], n_global: int) -> SitesBatch:
        """From the sites, and the columns `sample` and `position`, of a buffer."""
        return cls(x, ids["sample"], ids["position"], n_global)

    def at(self, site: str) -> ActivationBatch:
        """The batch of one site; its labels are unknown."""
        unknown = torch.full_like(self.sample, -1)
        return ActivationBatch(self.x[site], unknown, self.sample, self.n_global)
