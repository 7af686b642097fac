"""Matrix products whose bits do not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread of this caller, others undisturbed; also usable as a decorator.

    Libraries split a product over threads, and round otherwise for another number of them: the
    writer's workers (one thread each) and a live edit would differ in the last bits.
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
