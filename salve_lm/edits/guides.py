"""Guides: the non-negative vectors c that say which channels an edit scales."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from salve_lm.errors import UnsupportedEdit
from salve_lm.features import FeatureTable

DecoderNorm = Literal["unit", "raw", "max"]


def normalise(c: Tensor, how: DecoderNorm, source: str) -> Tensor:
    """Scale a guide `c` [d]: `unit` length, `raw` as it is, or `max` 1.

    With `max`, alpha = 1 is the first strength at which a channel is cut off entirely.

    Raises:
        UnsupportedEdit: `c` is zero everywhere; `source` says where it comes from.
    """
    if not c.any():
        raise UnsupportedEdit(
            f"The guide from {source} is zero everywhere: there is no channel to scale. Choose "
            "another feature or class."
        )
    if how == "raw":
        return c
    return c / (c.norm() if how == "unit" else c.max())


def permuted(c: Tensor, seed: int) -> Tensor:
    """`c` with its channels shuffled by `seed`, equally on every machine."""
    order = torch.randperm(len(c), generator=torch.Generator().manual_seed(seed))
    return c[order]


def contrast_ranking(rows: Tensor, target: int, decoder: Tensor, contrast: Tensor) -> Tensor:
    """Latents by how much of the class logit's contrast runs through them, best first.

    Score ((w_i - mean row) . W_dec[l]) * (mu_i[l] - mu_rest[l]) (METHODS 3b, ours): the first
    factor is what the latent's direction does to the logit, the second how much more of it the
    class has.

    Args:
        rows: class rows W [n_classes, d_in].
        target: i.
        decoder: W_dec [d_sae, d_in].
        contrast: mu_i - mu_rest [d_sae].
    """
    scores = (decoder @ (rows[target] - rows.mean(0))) * contrast
    return scores.argsort(descending=True, stable=True)


def require_non_negative(table: FeatureTable, what: str) -> None:
    """Raise `UnsupportedEdit` where an activation was ever negative."""
    lowest = float(table.x_min.min())
    if lowest < 0:
        raise UnsupportedEdit(
            f"{what} needs activations that are never negative (after a ReLU); here channel "
            f"{int(table.x_min.argmin())} falls to {lowest:.3g}. Use `guide: decoder_abs` or "
            "LatentContrastErasure."
        )
