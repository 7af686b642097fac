"""One step function for each peer, on the same initial weights as ours: used by sae_step.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Weights = Callable[[], dict[str, Tensor]]
"""The weights as they are now, by SAELens' names."""

Peer = tuple[Weights, Callable[[Tensor], None]]

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def sae_lens(start: dict[str, Tensor], args: argparse.Namespace, spread: float) -> Peer:
    """SAELens' own trainer."""
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class

    sae_class, config_class = get_sae_training_class(args.architecture)
    sae = sae_class(config_class(d_in=args.d_in, d_sae=args.d_sae, **options(args)))
    sae.load_state_dict(start)
    total = args.batch * args.chunk * (args.rounds + 1)
    config = SAETrainerConfig(
        total_training_samples=total, train_batch_size_samples=args.batch, lr=args.lr,
        lr_end=args.lr / 10,
    )  # fmt: skip
    trainer: Any = SAETrainer(config, sae, iter(()))

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return sae.state_dict, step


def bare_torch(start: dict[str, Tensor], args: argparse.Namespace, spread: float) -> Peer:
    """The dense products of the step, autograd and fused Adam, and nothing else."""
    W_enc, b_enc, W_dec, b_dec = parameters = [nn.Parameter(start[n].clone()) for n in NAMES]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, fused=True)

    def step(x: Tensor) -> None:
        z = x @ W_enc + (b_enc - b_dec @ W_enc)
        if args.architecture == "topk":
            values, latents = z.topk(args.k, sorted=False)
            z = torch.zeros_like(z).scatter(1, latents, values.relu())
            penalty: Tensor | float = 0.0
        else:
            z = z.relu()
            penalty = args.l1 * (z * W_dec.norm(dim=1)).sum(-1).mean()
        error = z @ W_dec + b_dec - x
        (error.pow(2).sum(-1).mean() + penalty).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return lambda: dict(zip(NAMES, parameters, strict=True)), step


def sparsify(start: dict[str, Tensor], args: argparse.Namespace, spread: float) -> Peer:
    """eai-sparsify's coder, its loss scaled from shares of variance to squared errors."""
    # a Triton kernel for GPUs, which it would take here as well
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=args.d_sae, k=args.k, normalize_decoder=False)
    coder: Any = SparseCoder(args.d_in, config)
    with torch.no_grad():
        coder.encoder.weight.copy_(start["W_enc"].t())
        coder.encoder.bias.copy_(start["b_enc"])
        coder.W_dec.copy_(start["W_dec"])
        coder.b_dec.copy_(start["b_dec"])
    parameters = list(coder.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.lr, fused=True)

    def step(x: Tensor) -> None:
        (coder(x).fvu * spread).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def weights() -> dict[str, Tensor]:
        encoder = coder.encoder
        return dict(
            zip(NAMES, (encoder.weight.t(), encoder.bias, coder.W_dec, coder.b_dec), strict=True)
        )

    return weights, step


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The architecture's options by SAELens' names, the same for all that take them."""
    if args.architecture == "standard":
        return {"l1_coefficient": args.l1}
    return {"k": args.k, "rescale_acts_by_decoder_norm": args.rescale}


@torch.no_grad()
def quality(weights: dict[str, Tensor], x: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Explained variance from the mean, and L0, on held-out rows."""
    z = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    if args.architecture == "topk":
        score = z * weights["W_dec"].norm(dim=1) if args.rescale else z
        kept = torch.zeros_like(z).scatter_(1, score.topk(args.k).indices, 1.0)
        z = z * kept
    z = F.relu(z)
    sse = (z @ weights["W_dec"] + weights["b_dec"] - x).square().sum()
    explained = 1 - sse / (x - x.mean(0)).square().sum()
    return {"explained_variance": float(explained), "l0": float((z > 0).sum(1).float().mean())}
