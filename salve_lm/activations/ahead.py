"""Items of an iterator, computed by a thread while the one before is in use."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection

Item = TypeVar("Item")
Stopped = Callable[[], bool]
"""Whether nobody waits for the work any more; long work asks now and then, and ends early."""


def never() -> bool:
    """For work that is waited for."""
    return False


class _Failed(NamedTuple):
    """What ended the thread."""

    error: BaseException


_END = object()


def ahead(
    produce: Callable[[Stopped], Generator[Item, None, None]], depth: int, device: torch.device
) -> Generator[Item, None, None]:
    """The items of `produce(stopped)`, up to `depth` of them computed while one is in use.

    An item may take over the memory of the item `depth + 1` before it: its computation starts when
    that one's successor is asked for. On CUDA the work runs in a stream of its own, is complete
    when it is handed over, and starts behind what was queued when its turn came.

    Nothing runs before the first item is asked for. Errors of the thread are raised here. Closing
    the iterator ends the thread, after at most the piece of work that is under way.

    Args:
        produce: makes the iterator, in the thread.
        depth: 0 computes each item when it is asked for, without a thread.
        device: where the items are used.
    """
    if depth == 0:
        yield from produce(never)
        return
    # Python waits for threads when it ends, also for those of iterators that nobody closed
    stop, main = threading.Event(), threading.main_thread()
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    turns, found = threading.Semaphore(depth + 1), SimpleQueue[Any]()

    def stopped() -> bool:
        return stop.is_set() or not main.is_alive()

    def work() -> None:
        try:
            with torch.cuda.stream(side), contextlib.closing(produce(stopped)) as items:
                for item in _in_turn(items, turns, stopped):
                    if side is not None:
                        side.synchronize()
                    found.put(item)
        except BaseException as e:
            found.put(_Failed(e))
        else:
            found.put(_END)

    thread = threading.Thread(target=work, name="salve-lm-ahead")
    try:
        _queue_behind(side, device)
        thread.start()
        while (item := found.get()) is not _END:
            if isinstance(item, _Failed):
                raise item.error
            if side is not None:
                _lend(item, torch.cuda.current_stream(device))
            yield item
            _queue_behind(side, device)
            turns.release()
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join()


def _in_turn(items: Iterator[Item], turns: threading.Semaphore, stopped: Stopped) -> Iterator[Item]:
    while True:
        while not turns.acquire(timeout=0.1):
            if stopped():
                return
        if stopped():
            return
        try:
            item = next(items)
        except StopIteration:
            return
        yield item


def _queue_behind(side: torch.cuda.Stream | None, device: torch.device) -> None:
    """Let later work of `side` wait for what the present stream was given until now."""
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(device))


def _lend(item: Any, stream: torch.cuda.Stream) -> None:
    """Tell the allocator that `stream` uses the item's tensors, which another stream made."""
    apply_to_collection(item, torch.Tensor, lambda t: t.record_stream(stream) if t.is_cuda else t)
