"""The training step with what the loop must know of it, on a whole batch or on parts of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from salve_lm.errors import BadConfig
from salve_lm.sae.early_backward import differentiated_parts
from salve_lm.sae.global_topk import GlobalBatchTopK
from salve_lm.sae.inference import contributions
from salve_lm.sae.sparse_products import Sparse, SparseLatents
from salve_lm.sae.step import compiled_training_step, fired, training_step

_PART = 1 << 23


class MeasuredStep(NamedTuple):
    """A training step, without its latents; means are over the rows at hand.

    Attributes:
        loss: the objective [], differentiable.
        losses: its terms by SAELens' names, already weighted, detached.
        fired: which latents fired [d_sae], bool.
        l0: mean number of active latents of a row [], where it was asked for.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    fired: Tensor
    l0: Tensor | None


def measured_step(
    sae: TrainingSAE[Any],
    x: Tensor,
    coefficients: Mapping[str, float],
    *,
    fire_threshold: float,
    with_l0: bool = False,
    chunk_rows: int | None = None,
    dead: Tensor | None = None,
    step: int = 0,
    n_global: int = 0,
    empty: bool = False,
    sparse: Sparse = "auto",
    compiled: bool = False,
) -> MeasuredStep:
    """`training_step` and which latents fired in it.

    With `chunk_rows`, the batch is processed in parts of so many rows, each forwards and backwards,
    so that only one part's latents are in memory. All terms are means over rows: the gradient is
    that of the whole batch, up to rounding.

    Args:
        sae: the autoencoder in training.
        x: activations [n, d_in].
        coefficients: weights of the penalties.
        fire_threshold: a latent is active above this.
        with_l0: count active latents, which costs a pass over them.
        chunk_rows: rows of a part; None for the whole batch in one.
        dead: see `training_step`, also for all that follow.
        step: the optimiser step.
        n_global: rows in the global batch.
        empty: x is a stand-in row of a rank without data.
        sparse: leave zeros out of the products.
        compiled: by torch.compile.
    """
    take_step = compiled_training_step() if compiled else training_step

    def of(rows: Tensor) -> MeasuredStep:
        out = take_step(
            sae,
            rows,
            coefficients,
            dead=dead,
            step=step,
            n_global=n_global,
            empty=empty,
            sparse=sparse,
        )
        with torch.no_grad():
            n_active = _count_active(sae, out.z, fire_threshold) if with_l0 else None
            l0 = None if n_active is None else n_active / rows.shape[0]
            return MeasuredStep(out.loss, out.losses, fired(sae, out.z, fire_threshold), l0)

    if chunk_rows is None or x.shape[0] <= chunk_rows:
        return of(x)
    parts: list[MeasuredStep] = []
    n = x.shape[0]

    def losses() -> Any:
        for rows in x.split(chunk_rows):
            part = of(rows)
            share = rows.shape[0] / n
            parts.append(_scaled(part, share))
            yield part.loss * share

    loss = differentiated_parts(losses(), sae.parameters())
    first, *others = parts
    for other in others:
        first = _added(first, other)
    return first._replace(loss=loss)


def _count_active(sae: TrainingSAE[Any], z: Tensor | SparseLatents, threshold: float) -> Tensor:
    if isinstance(z, SparseLatents):
        # what is left out is zero, and only latents that may be negative weigh by a norm
        return torch.count_nonzero(z.values > threshold)
    # in parts, and not by a sum: either would take a copy of all latents
    parts = z.split(max(1, _PART // z.shape[1]))
    counts = [torch.count_nonzero(contributions(sae, part) > threshold) for part in parts]
    return torch.stack(counts).sum()


def is_chunkable(sae: TrainingSAE[Any]) -> bool:
    """Whether the loss of a batch is a mean over its rows."""
    return not isinstance(sae.activation_fn, GlobalBatchTopK)


def check_chunkable(sae: TrainingSAE[Any]) -> None:
    """Raise BadConfig for an architecture whose step needs the whole batch at once."""
    if not is_chunkable(sae):
        raise BadConfig(
            f"chunk_rows does not suit {sae.cfg.architecture()}: which latents it keeps is settled "
            "over the whole batch, so parts of it would train another autoencoder. Remove "
            "chunk_rows; use a smaller batch_size with the trainer's accumulate_grad_batches (k is "
            "then that of each of these batches), or architecture: topk."
        )


def _scaled(part: MeasuredStep, share: float) -> MeasuredStep:
    return MeasuredStep(
        part.loss.detach(),
        {name: value * share for name, value in part.losses.items()},
        part.fired,
        None if part.l0 is None else part.l0 * share,
    )


def _added(a: MeasuredStep, b: MeasuredStep) -> MeasuredStep:
    return MeasuredStep(
        a.loss,
        {name: value + b.losses[name] for name, value in a.losses.items()},
        a.fired | b.fired,
        None if a.l0 is None or b.l0 is None else a.l0 + b.l0,
    )
