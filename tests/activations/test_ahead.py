from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Generator

import pytest
import torch

from salve_lm.activations.ahead import Stopped, ahead

CPU = torch.device("cpu")


def count(stopped: Stopped, n: int = 7) -> Generator[int, None, None]:
    yield from range(n)


@pytest.mark.parametrize("depth", [0, 1, 3, 20])
def test_the_same_items_in_order(depth: int) -> None:
    assert list(ahead(count, depth, CPU)) == list(range(7))


def test_items_are_computed_while_one_is_in_use_and_no_more_than_told() -> None:
    made: list[int] = []
    third = threading.Event()

    def produce(stopped: Stopped) -> Generator[int, None, None]:
        for i in range(10):
            made.append(i)
            if i == 2:
                third.set()
            yield i

    items = ahead(produce, 2, CPU)
    assert not made
    assert next(items) == 0
    # nobody asks, and yet it comes
    assert third.wait(10)
    assert made == [0, 1, 2]
    assert next(items) == 1
    items.close()
    assert len(made) <= 4


def test_memory_of_an_item_is_taken_over_only_when_it_is_done_with() -> None:
    rooms = [torch.zeros(1), torch.zeros(1)]

    def produce(stopped: Stopped) -> Generator[torch.Tensor, None, None]:
        for i in range(200):
            yield rooms[i % 2].fill_(i)

    for i, item in enumerate(ahead(produce, 1, CPU)):
        assert float(item) == i


def test_errors_reach_the_reader() -> None:
    def produce(stopped: Stopped) -> Generator[int, None, None]:
        yield 1
        raise KeyError("gone")

    items = ahead(produce, 3, CPU)
    assert next(items) == 1
    with pytest.raises(KeyError, match="gone"):
        next(items)


def test_closing_ends_the_thread_and_the_work() -> None:
    ended = threading.Event()

    def produce(stopped: Stopped) -> Generator[int, None, None]:
        try:
            yield 0
            while not stopped():
                pass
            yield 1
        finally:
            ended.set()

    items = ahead(produce, 1, CPU)
    assert next(items) == 0
    items.close()
    assert ended.is_set()
    assert not [t for t in threading.enumerate() if t.name == "salve-lm-ahead"]


def test_tensors_made_in_inference_mode_stay_writable() -> None:
    """Validation runs in inference mode, and the thread does not."""
    with torch.inference_mode():
        items = [x.clone() for x in ahead(lambda s: iter_tensors(), 1, CPU)]
    assert [int(x) for x in items] == [0, 1, 2]


def iter_tensors() -> Generator[torch.Tensor, None, None]:
    room = torch.zeros(())
    for i in range(3):
        yield room.fill_(i).clone()


def forget() -> None:
    torch.set_num_threads(1)
    globals()["kept"] = items = ahead(count, 2, CPU)
    next(items)


def test_a_program_that_forgets_it_can_end() -> None:
    process = multiprocessing.get_context("fork").Process(target=forget)
    process.start()
    process.join(60)
    assert process.exitcode == 0
