"""What an activation loader yields."""

from __future__ import annotations

from typing import NamedTuple

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
