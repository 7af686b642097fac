"""Tells the loss of another process of the run from errors of this one's own."""

from __future__ import annotations

import signal

import torch.distributed as dist
from lightning.pytorch import Trainer

from salve_lm.errors import LostRank

# of gloo, of NCCL, and of the store at which ranks meet
_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "remote process exited",
    "recvBytes",
    "wait timeout",
)


def lost_rank(error: BaseException) -> LostRank | None:
    """`error` in words, if it says that another process died or no longer answers."""
    if not isinstance(error, RuntimeError) or not (dist.is_available() and dist.is_initialized()):
        return None
    said = str(error)
    if not any(sign in said for sign in _SIGNS):
        return None
    return LostRank(said.splitlines()[0][:300])


def end_children(trainer: Trainer) -> None:
    """Kill the ranks that this process started: one that hangs would never end by itself."""
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(signal.SIGKILL)
