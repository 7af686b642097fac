"""The few collectives an autoencoder needs; each is the identity in a single process."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of this run, 1 outside `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 outside `torch.distributed`."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce(tensor: Tensor, op: Literal["sum", "min", "max"]) -> Tensor:
    """Reduce `tensor` over all ranks, in place, and return it."""
    if world_size() > 1:
        ops = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
        dist.all_reduce(tensor, op=ops[op])
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Give every rank the tensor of rank 0, in place, and return it."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def gather_equal(tensor: Tensor) -> Tensor:
    """Concatenate along axis 0 tensors of the same shape from all ranks, in order of rank."""
    world = world_size()
    if world == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate `rows` [n_rank, d] of all ranks, in order of rank; `n_rank` may differ or be 0.

    Ranks hold contiguous shares of a global batch, so the result has that batch's own order.
    """
    if world_size() == 1:
        return rows
    counts = gather_equal(torch.tensor([rows.shape[0]], device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: rows.shape[0]] = rows
    parts = gather_equal(padded).split(max(counts))
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
