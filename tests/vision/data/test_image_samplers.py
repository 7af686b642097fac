"""Orders: each sample once over all ranks, nothing twice; pure in (seed, epoch)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vision.data.images import split_by_class
from vision.data.samplers import EachOnce, ShuffledDraws


@given(st.integers(1, 60), st.integers(1, 5))
def test_each_once_covers_without_duplicates(n: int, world: int) -> None:
    ranks = [list(EachOnce(range(n), rank, world)) for rank in range(world)]
    assert sorted(i for own in ranks for i in own) == list(range(n))
    assert [len(own) for own in ranks] == [len(EachOnce(range(n), r, world)) for r in range(world)]
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 9), st.integers(0, 9))
def test_shuffled_draws_are_disjoint_and_equally_many(
    n: int, world: int, seed: int, epoch: int
) -> None:
    ranks = []
    for rank in range(world):
        sampler = ShuffledDraws(range(n), seed, rank, world)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) == n // world
    indices = [i for own in ranks for i, _ in own]
    assert len(indices) == len(set(indices))
    # two processes see together what one process sees, up to what the division leaves over
    one = ShuffledDraws(range(n), seed)
    one.set_epoch(epoch)
    assert [pair for step in zip(*ranks, strict=True) for pair in step] == list(one)[: len(indices)]


def test_epochs_and_seeds_differ() -> None:
    orders = set()
    for seed in range(3):
        for epoch in range(3):
            sampler = ShuffledDraws(range(20), seed)
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 9


@given(
    st.lists(st.integers(0, 4), min_size=10, max_size=80),
    st.floats(0.05, 0.95),
    st.integers(0, 3),
)
def test_split_by_class(labels: list[int], fraction: float, seed: int) -> None:
    kept, held = split_by_class(labels, fraction, seed)
    assert sorted(kept + held) == list(range(len(labels)))
    assert (kept, held) == (sorted(kept), sorted(held))
    for label in set(labels):
        own = labels.count(label)
        out = sum(labels[i] == label for i in held)
        assert abs(out - fraction * own) <= 1
        if own > 1:
            assert 1 <= out < own
