"""How alike the features of two autoencoders are, whatever the order of their latents."""

from __future__ import annotations

import torch
from torch import Tensor

from salve_lm.errors import ShapeMismatch

# rows compared at once: bounds the table of cosines to 64 MiB of float32 at 16k latents
_ROWS = 1024


def mean_max_cosine(first: Tensor, second: Tensor, signed: bool = False) -> float:
    """Mean, over the rows of `first`, of the cosine with the most similar row of `second`.

    Not symmetric: it asks whether `second` has the directions of `first`. Between unrelated
    directions it is not 0, and grows with the number of rows: compare it with that of random ones
    (`random_directions`).

    Args:
        first: decoder rows [n, d], none of them zero.
        second: decoder rows [m, d], likewise.
        signed: a direction and its opposite are one, as for latents of both signs (LinearL1).

    Raises:
        ShapeMismatch: directions of different widths, or none.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ShapeMismatch(
            f"Decoder rows {tuple(first.shape)} and {tuple(second.shape)} do not compare: both "
            "must be [n_latents, d_in] of one width."
        )
    if not len(first) or not len(second):
        raise ShapeMismatch("An autoencoder without live latents has no directions to compare.")
    a, b = (torch.nn.functional.normalize(t.float(), dim=1) for t in (first, second))
    best = []
    for part in a.split(_ROWS):
        cosine = part @ b.T
        best.append((cosine.abs() if signed else cosine).amax(1))
    return float(torch.cat(best).double().mean())


def random_directions(n: int, d: int, seed: int) -> Tensor:
    """`n` uniformly random directions of `d` dimensions, float32 [n, d]."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def guide_cosine(first: Tensor, second: Tensor) -> float:
    """Cosine of |first| and |second| [d]: whether two latents' edits scale the same channels.

    The guide of SALVE's edit is the absolute decoder row, so even unrelated ones have a cosine of
    about 2 / pi: compare with other classes' features or random latents.
    """
    a, b = first.double().abs(), second.double().abs()
    return float(a @ b / (a.norm() * b.norm()))
