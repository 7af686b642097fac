"""Two ranks of a `ddp` run, as Lightning's launcher, torchrun and srun start them, but forked."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable

import torch

import salve_lm.sae  # noqa: F401  # takes seconds: here, and not in each fork

TWO = {"strategy": "ddp", "devices": 2}
TWO_MACHINES = {"strategy": "ddp", "devices": 1, "num_nodes": 2}


def run_ranks(
    work: Callable[[int], object], world: int = 2, seconds: float = 180, machines: bool = False
) -> list[int]:
    """Run `work(rank)` in a process for each rank; with `machines`, as the only one of a machine.

    `ddp_fork` would do, but for what happens around a rank that ends in any other way than by
    returning: its children are not run as those of `ddp` are.

    Returns:
        The exit codes, by rank.

    Raises:
        TimeoutError: some ranks were not done in time; they are killed.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def one(rank: int) -> None:
        # the OpenMP threads of the parent are not in the fork; Lightning too reads the variable
        torch.set_num_threads(1)
        os.environ |= {
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
            "NODE_RANK": str(rank if machines else 0), "LOCAL_RANK": str(0 if machines else rank),
        }  # fmt: skip
        work(rank)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=one, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    if late:
        raise TimeoutError(f"ranks {late} were not done after {seconds} s")
    return [int(process.exitcode or 0) for process in processes]
