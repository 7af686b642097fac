"""The training step of the top-k family: topk, batchtopk, matryoshka_batchtopk.

SAELens' own step decodes and differentiates with all latents, k of which are not zero, and waits
for the GPU (`int(dead.sum())`, `.any()`), which breaks a compiled graph as well. This one computes
the same loss: the encoder's product is dense, the others sparse where that pays off, and nothing is
waited for unless there are dead latents to revive.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor
from torch.nn import functional as F

from salve_lm.sae.global_topk import GlobalBatchTopK, GlobalBatchTopKTrainingSAE
from salve_lm.sae.sparse_products import (
    Sparse,
    SparseLatents,
    Weights,
    decoded,
    dense_encoded,
    encoded,
    make_entries,
    may_look,
    pays_off,
    preactivations,
    weights_of,
)
from salve_lm.sae.step_output import StepOutput, summed


class _Kept(NamedTuple):
    """The latents that a step keeps: `pre` [m] at (rows, latents) [m]; rows ascend."""

    rows: Tensor
    latents: Tensor
    pre: Tensor


class _Decoded(NamedTuple):
    """Reconstructions [n, n_levels, d_in] from ever more latents, and the latents [n, d_sae]."""

    x_hats: Tensor
    z: Tensor | SparseLatents


def takes_topk_step(sae: TrainingSAE[Any]) -> bool:
    """Whether `topk_step` computes this autoencoder's loss."""
    return (
        isinstance(sae, TopKTrainingSAE)
        and (
            isinstance(sae, GlobalBatchTopKTrainingSAE)
            # a class that somebody derived may choose its latents in another way
            or type(sae) is TopKTrainingSAE
        )
        and sae.cfg.normalize_activations not in ("layer_norm", "constant_norm_rescale")
        and not getattr(sae.cfg, "use_matryoshka_aux_loss", False)
    )


def topk_step(
    sae: Any, x: Tensor, *, dead: Tensor | None = None, sparse: Sparse = "auto"
) -> StepOutput:
    """Loss and latents of one batch.

    Args:
        sae: an autoencoder that `takes_topk_step`.
        x: activations [n, d_in].
        dead: latents [d_sae] to revive by the auxiliary loss; None for none.
        sparse: whether to take sparse products. SAELens' option `use_sparse_activations` asks for
            them too.
    """
    w = weights_of(sae)
    with torch.no_grad():
        pre = preactivations(x, w)
        norms = w.W_dec.norm(dim=1) if sae.cfg.rescale_acts_by_decoder_norm else None
        score = pre if norms is None else pre * norms
    if _is_sparse(sae, x, sparse):
        kept = _kept(sae, pre, score)
        shape = pre.shape
        del pre, score
        out = _sparse(sae, x, w, kept, norms, shape)
    else:
        out = _dense(sae, x, w, pre, score, norms)

    n = x.shape[0]
    errors = (out.x_hats - x[:, None]).square().sum((0, 2)) / n
    losses = {"mse_loss": errors[-1]}
    losses["auxiliary_reconstruction_loss"] = (
        errors.new_zeros(())
        if dead is None
        else _aux_loss(sae, x, out.x_hats[:, -1].detach(), w, norms, dead)
    )
    for width, error in zip(_widths(sae)[:-1], errors, strict=False):
        losses[f"inner_mse_loss_{width}"] = error
    if isinstance(sae, GlobalBatchTopKTrainingSAE):
        # a zero, which does not count, so that there is always a value
        values = out.z.values if isinstance(out.z, SparseLatents) else out.z.flatten()
        sae.update_topk_threshold(F.pad(values, (0, 1)))
    return summed(losses, out.z)


def _is_sparse(sae: Any, x: Tensor, sparse: Sparse) -> bool:
    if sparse != "auto":
        return sparse == "always"
    return sae.cfg.use_sparse_activations or pays_off(sae.cfg.k / sae.cfg.d_sae, x.device)


def _widths(sae: Any) -> list[int]:
    matryoshka = isinstance(sae, MatryoshkaBatchTopKTrainingSAE)
    return list(sae.cfg.matryoshka_widths) if matryoshka else [sae.cfg.d_sae]


@torch.no_grad()
def _kept(sae: Any, pre: Tensor, score: Tensor) -> _Kept:
    n, d_sae = score.shape
    activation = sae.activation_fn
    if not isinstance(activation, GlobalBatchTopK):
        latents = score.topk(activation.k, dim=1, sorted=False).indices
        rows = torch.arange(n, device=score.device).repeat_interleave(activation.k)
        return _Kept(rows, latents.flatten(), pre.gather(1, latents).flatten())
    acts = activation(score)
    if may_look(score.device):
        rows, latents = acts.nonzero().unbind(1)
        return _Kept(rows, latents, pre[rows, latents])
    # as many as can be kept, so that no number has to be read from the device
    most = min(int(activation.k * max(activation.n_global, n)), n * d_sae)
    at = torch.nonzero_static(acts, size=most, fill_value=-1)
    rows, latents = at.clamp(min=0).unbind(1)
    missing = at[:, 0] < 0
    rows = torch.where(missing, n - 1, rows)
    return _Kept(rows, latents, pre[rows, latents].masked_fill(missing, 0))


def _sparse(
    sae: Any, x: Tensor, w: Weights, kept: _Kept, norms: Tensor | None, shape: torch.Size
) -> _Decoded:
    (n, d_sae), widths = shape, _widths(sae)
    rows, latents, pre = kept
    bags = None
    if len(widths) > 1:
        ends = torch.tensor(widths[:-1], device=x.device)
        bags, order = (rows * len(widths) + torch.bucketize(latents, ends, right=True)).sort(
            stable=True
        )
        rows, latents, pre = rows[order], latents[order], pre[order]
    of = make_entries(rows, latents, n, d_sae, bags, n * len(widths))
    acts = F.relu(encoded(pre, x, w, of))
    parts = decoded(acts, w.W_dec, of).view(n, len(widths), -1)
    x_hats = (parts.cumsum(1) if len(widths) > 1 else parts) + w.b_dec
    z = acts.detach() if norms is None else acts.detach() * norms[latents]
    return _Decoded(x_hats, SparseLatents(rows, latents, z, shape))


def _dense(
    sae: Any, x: Tensor, w: Weights, pre: Tensor, score: Tensor, norms: Tensor | None
) -> _Decoded:
    # the norm by which SAELens multiplies and then divides has no gradient
    with torch.no_grad():
        z = sae.activation_fn(score)
        z = z.to_dense() if z.is_sparse else z
    acts = F.relu(dense_encoded(pre, x, w)) * (z != 0)
    parts, before = [], 0
    for width in _widths(sae):
        parts.append(acts[:, before:width] @ w.W_dec[before:width])
        before = width
    return _Decoded(torch.stack(parts, 1).cumsum(1) + w.b_dec, z)


def _aux_loss(
    sae: Any, x: Tensor, x_hat: Tensor, w: Weights, norms: Tensor | None, dead: Tensor
) -> Tensor:
    """How badly the dead latents reconstruct what is missing [] (Gao et al. 2024, appendix A.2)."""
    latents = dead.nonzero()[:, 0]
    n_dead, half = latents.numel(), max(1, x.shape[1] // 2)
    if n_dead == 0:
        return x_hat.new_zeros(())
    of_dead = w._replace(W_enc=w.W_enc[:, latents], b_enc=w.b_enc[latents], W_dec=w.W_dec[latents])
    acts = preactivations(x, of_dead)
    if n_dead > half:
        score = acts.detach() if norms is None else acts.detach() * norms[latents]
        chosen = score.topk(half, dim=1, sorted=False).indices
        acts = acts * torch.zeros_like(acts).scatter_(1, chosen, 1.0)
    error = (acts @ of_dead.W_dec - (x - x_hat)).square().sum() / x.shape[0]
    return sae.cfg.aux_loss_coefficient * min(n_dead / half, 1.0) * error
