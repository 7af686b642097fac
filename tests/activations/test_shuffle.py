from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from salve_lm.activations.shuffle import ShuffledRows
from salve_lm.errors import BadConfig


def read(order: ShuffledRows, batch: int) -> Tensor:
    """(unit, row within the unit) of every row of this rank's share of a batch."""
    units, skip, rows = order.chunk(order.chunk_of(batch))
    pairs = [(int(u), r) for u in units for r in range(int(order.counts[u]))]
    return torch.tensor(pairs[skip : skip + rows]).reshape(-1, 2)[order.rows(batch)]


def epoch(order: ShuffledRows) -> list[Tensor]:
    order.begin()
    batches = []
    for number in range(len(order)):
        batches.append(read(order, number))
        order.drawn(number)
    return batches


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=30).filter(lambda c: sum(c) > 0),
    batch_size=st.integers(1, 9),
    batches_in_buffer=st.integers(1, 5),
    world=st.integers(1, 3),
    shuffle=st.booleans(),
)
def test_every_row_once_an_epoch_on_any_number_of_ranks(
    counts: list[int], batch_size: int, batches_in_buffer: int, world: int, shuffle: bool
) -> None:
    def ranks() -> list[ShuffledRows]:
        return [
            ShuffledRows(
                torch.tensor(counts), batch_size, batch_size * batches_in_buffer, 3, rank, world,
                shuffle,
            )
            for rank in range(world)
        ]  # fmt: skip

    one = ShuffledRows(
        torch.tensor(counts), batch_size, batch_size * batches_in_buffer, 3, shuffle=shuffle
    )
    alone = epoch(one)
    rows = sorted(map(tuple, torch.cat(alone).tolist()))
    assert rows == [(u, r) for u, n in enumerate(counts) for r in range(n)]
    assert [len(b) for b in alone[:-1]] == [batch_size] * (len(alone) - 1)
    shares = [epoch(order) for order in ranks()]
    for number, batch in enumerate(alone):
        assert torch.equal(torch.cat([share[number] for share in shares]), batch)
        assert one.global_size(number) == len(batch)
    for order in ranks():
        for number in range(len(order)):
            # no rank holds more than its part of the buffer
            assert order.chunk(order.chunk_of(number)).rows <= -(
                -batch_size * batches_in_buffer // world
            )


def test_an_order_is_a_function_of_seed_and_epoch() -> None:
    counts = torch.full((40,), 8)

    def order(seed: int) -> ShuffledRows:
        return ShuffledRows(counts, 16, 64, seed)

    a, b = order(0), order(0)
    first, second = torch.cat(epoch(a)), torch.cat(epoch(a))
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat(epoch(b)), first)
    assert torch.equal(torch.cat(epoch(b)), second)
    assert not torch.equal(torch.cat(epoch(order(1))), first)


def test_rows_of_a_batch_come_from_all_over_the_buffer() -> None:
    order = ShuffledRows(torch.full((100,), 10), 50, 500, 0)
    order.begin()
    units = [len(set(read(order, n)[:, 0].tolist())) for n in range(len(order))]
    # of 50 units in the buffer, 50 draws hit some 32
    assert min(units) > 22


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 9])
def test_goes_on_where_it_was(stop: int) -> None:
    def order() -> ShuffledRows:
        return ShuffledRows(torch.full((10,), 9), 9, 27, 5)

    whole = order()
    expected = [*epoch(whole), *epoch(whole)]
    first = order()
    first.begin()
    for number in range(stop):
        first.drawn(number)
    resumed = order()
    resumed.load_state_dict(first.state_dict())
    resumed.begin()
    rest = []
    for number in range(resumed.position, len(resumed)):
        rest.append(read(resumed, number))
        resumed.drawn(number)
    rest += epoch(resumed)
    assert len(rest) == 20 - stop
    for a, b in zip(rest, expected[stop:], strict=True):
        assert torch.equal(a, b)


def test_another_buffer_or_text_is_refused() -> None:
    state = ShuffledRows(torch.full((10,), 9), 9, 27, 5).state_dict()
    with pytest.raises(BadConfig, match=r"buffer_rows \(was 27, is 36\).*--ckpt_path"):
        ShuffledRows(torch.full((10,), 9), 9, 36, 5).load_state_dict(state)
    with pytest.raises(BadConfig, match=r"units \(was 10, is 9\)"):
        ShuffledRows(torch.full((9,), 10), 9, 27, 5).load_state_dict(state)


def test_a_buffer_smaller_than_a_batch() -> None:
    with pytest.raises(BadConfig, match=r"cannot hold a batch of 9.*Raise buffer_rows"):
        ShuffledRows(torch.full((10,), 9), 9, 8, 5)
