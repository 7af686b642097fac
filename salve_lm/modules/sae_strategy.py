"""Which of Lightning's strategies train an autoencoder exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch.distributed.device_mesh import DeviceMesh

from salve_lm.errors import BadConfig, UnsupportedStrategy

if TYPE_CHECKING:
    # SAELens takes seconds to import: everything of salve_lm.sae is imported where it is used
    from salve_lm.sae.resolve import Plan


def check_strategy(trainer: Trainer, plan: Plan, dtype: str, chunk_rows: int | None) -> None:
    """Refuse what would not be exact under the trainer's strategy and precision.

    Raises:
        UnsupportedStrategy: another strategy than a single device's, DDP and model parallel
            (FSDP2), or something that needs whole weights under the latter.
        BadConfig: a precision that contradicts the options.
    """
    strategy, precision = trainer.strategy, str(trainer.precision)
    if dtype == "bfloat16" and precision != "32-true":
        raise BadConfig(
            f"dtype: bfloat16 computes in bfloat16 by itself, and the trainer's precision is "
            f"{precision!r}. Remove one of them."
        )
    if chunk_rows is not None and precision == "16-mixed":
        raise BadConfig(
            "chunk_rows computes gradients before the trainer's precision '16-mixed' scales the "
            "loss: they would underflow. Use precision bf16-mixed."
        )
    if isinstance(strategy, ModelParallelStrategy):
        _check_sharding(strategy, plan, precision, chunk_rows)
    elif not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise UnsupportedStrategy(
            f"SAETraining under {type(strategy).__name__}: firing counts, resampling and folding "
            "need whole weights. Use strategy 'auto' or 'ddp', or lightning.pytorch.strategies."
            "ModelParallelStrategy where one device cannot hold the autoencoder."
        )


def sharding_mesh(trainer: Trainer) -> DeviceMesh | None:
    """The processes that share the parameters; None where each has its own."""
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    return strategy.device_mesh["data_parallel"]


def _check_sharding(
    strategy: ModelParallelStrategy, plan: Plan, precision: str, chunk_rows: int | None
) -> None:
    shared = "shares the weights out over devices"
    if strategy.device_mesh["tensor_parallel"].size() != 1:
        n = torch.distributed.get_world_size()
        raise UnsupportedStrategy(
            "ModelParallelStrategy splits the processes into a tensor-parallel group, but the "
            f"autoencoder is sharded over all of them. Set its data_parallel_size to {n} and its "
            "tensor_parallel_size to 1."
        )
    if plan.handling == "resample":
        raise UnsupportedStrategy(
            f"ModelParallelStrategy {shared}, and resampling rewrites whole ones. Set "
            "dead_feature_handling to 'aux' (the top-k family has that loss) or 'none'."
        )
    if chunk_rows is not None:
        raise UnsupportedStrategy(
            f"ModelParallelStrategy {shared} and gathers them for each part of a batch anyway. "
            "Replace chunk_rows by a smaller batch_size with the trainer's "
            "accumulate_grad_batches, which costs the same."
        )
    if precision not in ("32-true", "bf16-mixed"):
        raise UnsupportedStrategy(
            f"ModelParallelStrategy is tested with the trainer's precision 32-true and bf16-mixed, "
            f"not with {precision}. Choose one of them, or dtype: bfloat16."
        )
