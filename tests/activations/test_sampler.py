from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salve_lm.activations.sampler import GlobalBatches
from salve_lm.errors import BadConfig


def epoch_of(sampler: GlobalBatches) -> list[list[int]]:
    return [rows.tolist() for rows in sampler]


sizes = st.integers(1, 60)
worlds = st.integers(1, 7)


@given(n=sizes, batch_size=sizes, world=worlds, seed=st.integers(0, 2**40), shuffle=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_world_walks_through_the_same_global_batches(
    n: int, batch_size: int, world: int, seed: int, shuffle: bool
) -> None:
    alone = GlobalBatches(n, batch_size, seed, shuffle=shuffle)
    ranks = [GlobalBatches(n, batch_size, seed, r, world, shuffle) for r in range(world)]
    for epoch in range(2):
        for s in (alone, *ranks):
            s.set_epoch(epoch)
        whole = epoch_of(alone)
        shares = [epoch_of(s) for s in ranks]
        assert sorted(chain(*whole)) == list(range(n))
        assert {len(s) for s in shares} == {len(alone)} == {len(whole)}
        for number, batch in enumerate(whole):
            parts = [share[number] for share in shares]
            assert list(chain(*parts)) == batch
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert len(batch) == alone.global_size(number)


@given(
    n=sizes,
    batch_size=sizes,
    before=st.integers(1, 200),
    seed=st.integers(0, 99),
    old_world=worlds,
    new_world=worlds,
)
@settings(max_examples=150, deadline=None)
def test_goes_on_exactly_where_it_was(
    n: int, batch_size: int, before: int, seed: int, old_world: int, new_world: int
) -> None:
    def walk(sampler: GlobalBatches, batches: int) -> list[list[int]]:
        drawn: list[list[int]] = []
        while len(drawn) < batches:
            for rows in sampler:
                drawn.append(rows.tolist())
                if len(drawn) == batches:
                    break
        return drawn

    whole = walk(GlobalBatches(n, batch_size, seed), before + 9)
    first = GlobalBatches(n, batch_size, seed, 0, old_world)
    walk(first, before)
    ranks = [GlobalBatches(n, batch_size, seed, r, new_world) for r in range(new_world)]
    for sampler in ranks:
        sampler.load_state_dict(first.state_dict())
    parts = [walk(sampler, 9) for sampler in ranks]
    assert [list(chain(*step)) for step in zip(*parts, strict=True)] == whole[before:]


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = GlobalBatches(50, 50, seed)
        torch.manual_seed(int(torch.seed()) % 1000)
        sampler.set_epoch(epoch)
        return epoch_of(sampler)

    assert order(3, 5) == order(3, 5)
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({str(o) for o in orders}) == 9  # seed 0 epoch 1 is not seed 1 epoch 0


def test_does_not_touch_the_global_random_state() -> None:
    before = torch.get_rng_state()
    epoch_of(GlobalBatches(9, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_each_pass_is_a_new_epoch_without_set_epoch() -> None:
    sampler = GlobalBatches(20, 6, seed=1)
    first, second = epoch_of(sampler), epoch_of(sampler)
    assert first != second
    next(iter(sampler))  # an abandoned pass
    fourth = epoch_of(sampler)
    sampler.set_epoch(3)
    assert epoch_of(sampler) == fourth
    sampler.set_epoch(0)
    assert epoch_of(sampler) == first


def test_an_epoch_is_fixed_at_its_first_batch() -> None:
    sampler = GlobalBatches(20, 6)
    early = iter(sampler)  # as Lightning does on resume
    sampler.set_epoch(4)
    other = GlobalBatches(20, 6)
    other.set_epoch(4)
    assert [r.tolist() for r in early] == epoch_of(other)


def test_an_epoch_resumed_at_its_end_has_nothing_left() -> None:
    sampler, resumed = GlobalBatches(7, 3), GlobalBatches(7, 3)
    epoch_of(sampler)
    resumed.load_state_dict(sampler.state_dict())
    resumed.set_epoch(0)
    assert epoch_of(resumed) == []
    resumed.set_epoch(1)
    assert epoch_of(resumed) == epoch_of(sampler)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"n": 8}, r"n \(was 7, is 8\)"),
        ({"batch_size": 4}, r"batch_size \(was 3, is 4\)"),
        ({"seed": 1}, r"seed \(was 0, is 1\)"),
        ({"shuffle": False}, r"shuffle \(was True, is False\)"),
    ],
)
def test_a_checkpoint_of_another_order_is_refused(options: dict[str, object], part: str) -> None:
    state = GlobalBatches(7, 3).state_dict()
    with pytest.raises(BadConfig, match=part):
        GlobalBatches(**{"n": 7, "batch_size": 3, **options}).load_state_dict(state)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [(0, 1, 0, 1), (1, 0, 0, 1), (1, 1, 2, 2), (1, 1, -1, 2)])
def test_impossible_sizes(bad: tuple[int, int, int, int]) -> None:
    n, batch_size, rank, world = bad
    with pytest.raises(BadConfig, match="Cannot draw batches"):
        GlobalBatches(n, batch_size, 0, rank, world)
