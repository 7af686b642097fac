"""Batch-top-k over any number of ranks, with ties: the same activations as in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.batchtopk_sae import BatchTopK
from torch import Tensor

from salve_lm.sae import ranks
from salve_lm.sae.global_topk import GlobalBatchTopK, _largest_values


class Ranks(threading.local):
    """Ranks as threads, that exchange tensors at a barrier."""

    def __init__(self, world: int) -> None:
        self.world, self.rank = world, 0

    def run(self, work: Callable[[int], Tensor]) -> list[Tensor]:
        """`work(rank)` of every rank."""
        barrier, box = threading.Barrier(self.world, timeout=10), [None] * self.world
        out: list[Any] = [None] * self.world

        def gather(tensor: Tensor) -> Tensor:
            box[self.rank] = tensor.clone()  # type: ignore[call-overload]
            barrier.wait()
            together = torch.cat(box)  # type: ignore[arg-type]
            barrier.wait()
            return together

        def one(rank: int) -> None:
            self.world, self.rank = world, rank
            try:
                out[rank] = work(rank)
            except BaseException:
                barrier.abort()
                raise

        world = self.world
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks, "world_size", lambda: self.world)
            patch.setattr(ranks, "rank", lambda: self.rank)
            patch.setattr(ranks, "gather_equal", gather)
            threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return out


def first_largest(acts: Tensor, keep: int) -> Tensor:
    """The oracle: a stable sort, so that of equal values the first ones are kept."""
    flat = acts.flatten()
    order = flat.argsort(descending=True, stable=True)[:keep]
    return torch.zeros_like(flat).scatter(0, order, flat[order]).view(acts.shape)


def activation(k: float, n_global: int, empty: bool = False) -> GlobalBatchTopK:
    made = GlobalBatchTopK(k)
    made.n_global, made.empty = n_global, empty
    return made


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 6),
    values=st.integers(1, 4),
    world=st.integers(1, 4),
    k=st.floats(0.1, 6),
    seed=st.integers(0, 2**16),
)
def test_ties_fall_alike_on_any_number_of_ranks(
    rows: int, width: int, values: int, world: int, k: float, seed: int
) -> None:
    k = min(k, width)
    draw = torch.Generator().manual_seed(seed)
    # few different values, so that the border runs through ties nearly always
    x = torch.randint(-1, values + 1, (rows, width), generator=draw).float()
    expected = first_largest(x.relu(), int(k * rows))

    def share(rank: int) -> Tensor:
        mine = x[rows * rank // world : rows * (rank + 1) // world]
        if not len(mine):
            # stand-in of a rank without rows: larger than all, and of no account
            return activation(k, rows, empty=True)(torch.full((1, width), 9.0))[:0]
        return activation(k, rows)(mine)

    assert torch.equal(activation(k, rows)(x), expected)
    assert torch.equal(torch.cat(Ranks(world).run(share)), expected)


def test_without_ties_it_is_saelens() -> None:
    x = torch.randn(33, 40, generator=torch.Generator().manual_seed(0))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = GlobalBatchTopK(3.3)(ours), BatchTopK(3.3)(theirs)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(a, b)
    assert torch.equal(ours.grad, theirs.grad)


def test_gradients_reach_the_kept_only() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    GlobalBatchTopK(1.0)(x).sum().backward()
    assert x.grad.tolist() == [[1, 1], [1, 0], [0, 0]]


def test_nan_is_not_hidden() -> None:
    x = torch.ones(3, 2)
    x[1, 1] = float("nan")
    assert GlobalBatchTopK(1.0)(x).isnan().any()


@pytest.mark.parametrize(("m", "n"), [(7, 7), (4_300_000, 5)])
def test_the_largest_of_many_are_found_in_parts(m: int, n: int) -> None:
    values = torch.rand(m, generator=torch.Generator().manual_seed(0))
    found = _largest_values(values, n).sort(descending=True).values
    assert torch.equal(found, torch.topk(values, n).values)
