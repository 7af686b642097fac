"""An autoencoder whose parameters are shared out over devices (PyTorch's FSDP2).

Each device keeps a part of every parameter, of its gradient and of Adam's moments. For a step the
whole weights are gathered, and the gradients summed and shared out again; a batch's rows are shared
out as under DDP.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast

import torch
from sae_lens.saes.sae import TrainingSAE
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from salve_lm.sae import ranks
from salve_lm.sae.gathering import is_sharded
from salve_lm.sae.measured_step import MeasuredStep, measured_step

_STEP = "measured_step"


def build_sharded(
    make: Callable[[str], TrainingSAE[Any]], mesh: DeviceMesh, device: torch.device
) -> TrainingSAE[Any]:
    """An autoencoder that no device ever holds whole outside of a step.

    Args:
        make: builds it on the device of that name.
        mesh: the processes that share it, in one dimension.
        device: of this process.

    Returns:
        The autoencoder with its parameters sharded, with the values that one process would have
        drawn: the first process draws them in host memory.
    """
    sae = make("meta")
    fully_shard(sae, mesh=mesh)
    sae.to_empty(device=device)
    drawn = dict(make("cpu").state_dict()) if ranks.rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(sae, drawn, options=options)
    # FSDP gathers whole weights around methods that it knows of; SAELens' `forward` is not used
    setattr(sae, _STEP, types.MethodType(measured_step, sae))
    register_fsdp_forward_method(sae, _STEP)
    sae.device = device
    return sae


def take_step(sae: TrainingSAE[Any], *args: Any, **kwargs: Any) -> MeasuredStep:
    """`measured_step` of an autoencoder that may be sharded."""
    if is_sharded(sae):
        return cast(MeasuredStep, getattr(sae, _STEP)(*args, **kwargs))
    return measured_step(sae, *args, **kwargs)
