"""Whole copies of parameters that may be shared out over devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_lens.saes.sae import TrainingSAE
from torch import Tensor
from torch.distributed.tensor import DTensor

from salve_lm.sae import ranks


def is_sharded(sae: TrainingSAE[Any]) -> bool:
    """Whether the parameters of `sae` are shared out over devices (`shards.build_sharded`)."""
    return isinstance(sae.W_enc, DTensor)


def gathered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies of all tensors; where they are sharded, all processes must ask for them."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for name, value in state.items()
    }


def gathered_on_first(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`gathered` in the first process, in host memory, and nothing in the others.

    Tensor by tensor: no device holds more than one whole tensor at a time.
    """
    kept: dict[str, Tensor] = {}
    for name, value in state.items():
        whole = gathered({name: value})[name]
        if ranks.rank() == 0:
            kept[name] = whole.cpu()
    return kept
