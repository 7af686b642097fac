"""The memory that a training run will take: told before it starts, refused where it cannot fit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info

from salve_lm.errors import NotEnoughMemory
from salve_lm.free_memory import free_memory

if TYPE_CHECKING:
    # SAELens takes seconds to import: everything of salve_lm.sae is imported where it is used
    from salve_lm.sae.memory import MemoryEstimate


class Demand(NamedTuple):
    """One autoencoder that is to be trained.

    Attributes:
        architecture: its name.
        parameters: number of its parameters.
        d_sae: number of its latents.
        dtype: of its parameters.
        chunk_rows: rows that are in work at a time; None for the whole batch.
        chunkable: whether its batches can be split.
    """

    architecture: str
    parameters: int
    d_sae: int
    dtype: str
    chunk_rows: int | None
    chunkable: bool


def check_memory(trainer: Trainer, demands: Sequence[Demand], batch_size: int | None) -> None:
    """Log what training takes on each device.

    Args:
        trainer: whose strategy and device it is.
        demands: the autoencoders that are trained side by side.
        batch_size: rows of a global batch, where they are known.

    Raises:
        NotEnoughMemory: it cannot fit; nothing was allocated.
    """
    device = trainer.strategy.root_device
    rows = -(-(batch_size or 0) // trainer.world_size)
    found = _together(trainer, demands, rows)
    free = free_memory(device)
    if free is not None and device.type == "cpu":
        # the processes of a machine share its RAM
        free //= trainer.num_devices
    told = _described(found, rows if batch_size else None)
    each = " on each device" if trainer.world_size > 1 else ""
    rank_zero_info(
        f"Memory of training{each}: {told}"
        + (f"; {_gib(free)} are free on {device}." if free is not None else ".")
    )
    if free is None or found.total <= free:
        return
    raise NotEnoughMemory(
        found.total,
        free,
        f"Training takes about {_gib(found.total)}{each} ({told}), and {_gib(free)} are free on "
        f"{device}{' for each process' if device.type == 'cpu' and each else ''}. "
        f"{_cures(trainer, demands, rows, free)}",
    )


def _together(trainer: Trainer, demands: Sequence[Demand], rows: int) -> MemoryEstimate:
    return reduce(add, (_estimate(trainer, demand, rows) for demand in demands))


def _estimate(
    trainer: Trainer, demand: Demand, rows: int, shards: int | None = None
) -> MemoryEstimate:
    from salve_lm.sae.memory import training_memory

    strategy, precision = trainer.strategy, str(trainer.precision)
    if shards is None:
        shards = trainer.world_size if isinstance(strategy, ModelParallelStrategy) else 1
    half = demand.dtype == "bfloat16" or precision in ("bf16-true", "16-true")
    chunked = demand.chunk_rows is not None and demand.chunk_rows < rows
    accumulated = trainer.accumulate_grad_batches > 1
    bucketed = shards == 1 and isinstance(strategy, DDPStrategy)
    if bucketed and isinstance(strategy, DDPStrategy):
        bucketed = not strategy._ddp_kwargs.get("gradient_as_bucket_view", False)
    return training_memory(
        demand.architecture,
        demand.parameters,
        demand.d_sae,
        min(rows, demand.chunk_rows or rows),
        value_bytes=2 if half else 8 if precision == "64-true" else 4,
        shards=shards,
        second_gradients=(chunked or accumulated) + bucketed,
        cast_bytes=2 if "mixed" in precision else 0,
    )


def _cures(trainer: Trainer, demands: Sequence[Demand], rows: int, free: int) -> str:
    from salve_lm.sae.memory import largest_that_fits

    def needed(
        rows: int, shards: int | None = None, dtype: str | None = None, chunk: int | None = None
    ) -> int:
        changed = [
            d._replace(dtype=dtype or d.dtype, chunk_rows=chunk or d.chunk_rows) for d in demands
        ]
        return reduce(add, (_estimate(trainer, d, rows, shards) for d in changed)).total

    cures = []
    if all(demand.chunkable for demand in demands):
        n = largest_that_fits(free, lambda n: needed(rows, chunk=n), rows)
        if n:
            cures.append(f"chunk_rows: {n} (the same training, {_gib(needed(rows, chunk=n))})")
    n = largest_that_fits(free, needed, rows)
    if n:
        cures.append(f"a batch_size of {n * trainer.world_size} ({_gib(needed(n))})")
    if any(demand.dtype != "bfloat16" for demand in demands):
        half = needed(rows, dtype="bfloat16")
        fewer = largest_that_fits(free, lambda n: needed(n, dtype="bfloat16"), rows)
        also = f", or {_gib(needed(fewer, dtype='bfloat16'))} with {fewer} rows at a time"
        cures.append(f"dtype: bfloat16 ({_gib(half)}{also if half > free and fewer else ''})")
    if len(demands) == 1:
        world = trainer.world_size
        for shards in (2 * world, 4 * world, 8 * world, 16 * world):
            # twice the devices have half the rows each
            sharded = needed(-(-rows * world // shards), shards)
            if sharded <= free:
                cures.append(
                    f"ModelParallelStrategy (FSDP2) over {shards} such devices ({_gib(sharded)} "
                    "each)"
                )
                break
    else:
        cures.append("fewer members at a time")
    cures.append("a device with more memory, or a smaller d_sae")
    return f"Use {'; '.join(cures)}."


def _described(found: MemoryEstimate, rows: int | None) -> str:
    of_rows = "" if rows is None else f"latents of the rows in work {_gib(found.latents)}, "
    copies = f"copies {_gib(found.copies)}, " if found.copies else ""
    return (
        f"weights {_gib(found.weights)}, gradients {_gib(found.gradients)}, Adam "
        f"{_gib(found.optimizer)}, {copies}{of_rows}together {_gib(found.total)}"
    )


def _gib(n: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 1024:.1f} KiB"
