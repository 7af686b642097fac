"""Ranges of stores read from disk, and large splits shuffled a buffer at a time."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salve_lm.activations import ActivationData, ActivationStore, rows
from salve_lm.activations.columns import Column, Piece
from salve_lm.activations.harvest import harvest
from salve_lm.activations.rows import RowBuffer, blocks_of
from salve_lm.activations.shuffle import ShuffledRows
from salve_lm.errors import CorruptFile
from salve_lm.ranges import runs
from tests.activations.tiny import D_IN, TinyData, TinyStudied

N = 97
NEVER = bool


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "store"
    data = TinyData(n_train=N, n_val=37)
    data.setup("fit")
    harvest(TinyStudied(), data, "pooled", path, shard_rows=10, progress=False)
    return path


@given(st.lists(st.integers(0, 9), max_size=20))
def test_runs_are_the_numbers(numbers: list[int]) -> None:
    found = list(runs(torch.tensor(numbers, dtype=torch.int64).numpy()))
    assert [n for first, last in found for n in range(first, last + 1)] == numbers
    for (_, last), (first, _) in pairwise(found):
        assert first != last + 1


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_column_over_any_files(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    folder, whole = tmp_path_factory.mktemp("column"), torch.arange(2 * sum(sizes)).view(-1, 2)
    pieces = []
    for i, part in enumerate(whole.split(sizes)):
        file = folder / str(i)
        file.write_bytes(b"head" + part.numpy().tobytes())
        pieces.append(Piece(file, 4, len(part)))
    column = Column(pieces, (2,), torch.int64)
    assert len(column) == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    column.will_need(start, stop)
    assert torch.equal(column.read(start, stop), whole[start:stop])
    other = torch.empty(stop - start, 2, dtype=torch.float64)
    column.read_into(start, other)
    assert torch.equal(other, whole[start:stop].double())
    with pytest.raises(IndexError):
        column.read(start, len(whole) + 1)


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(15))
    column = Column([Piece(tmp_path / "x", 0, 2)], (), torch.int64)
    assert int(column.read(0, 1)) == 0
    with pytest.raises(CorruptFile, match="became shorter"):
        column.read(0, 2)


def test_blocks_hold_every_row_and_none_lies_in_two_files(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "BLOCK_BYTES", 4 * 4 * D_IN)
    opened = ActivationStore(store)
    blocks = blocks_of(opened, "train")
    assert blocks.counts.tolist() == [4, 4, 2] * 9 + [4, 3]
    room = RowBuffer(
        {"x": torch.empty(N, D_IN)},
        {name: torch.empty(N, dtype=torch.int64) for name in blocks.ids},
    )
    blocks.fill(room, torch.arange(len(blocks.counts)), 0, NEVER)
    whole = opened.gather("train", torch.arange(N))
    assert torch.equal(room.x["x"], whole.x)
    assert torch.equal(room.ids["sample"], whole.sample)
    assert torch.equal(room.ids["label"], whole.label)


@given(
    batch_size=st.integers(1, 40),
    batches_in_buffer=st.integers(1, 4),
    world=st.integers(1, 3),
    block=st.integers(1, 12),
    prefetch=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_ranks_together_read_each_row_of_a_large_split_once(
    store: Path, batch_size: int, batches_in_buffer: int, world: int, block: int, prefetch: bool
) -> None:
    buffer_rows = min(batch_size * batches_in_buffer, N - 1)
    if buffer_rows < batch_size:
        return
    whole = ActivationStore(store).gather("train", torch.arange(N))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK_BYTES", block * 4 * D_IN)
        of_rank = []
        for rank in range(world):
            data = ActivationData(
                store=str(store), batch_size=batch_size, buffer_rows=buffer_rows, seed=5,
                prefetch=prefetch,
            )  # fmt: skip
            data._place = lambda rank=rank: (rank, world)  # type: ignore[method-assign]
            data.setup("fit")
            loader = data.train_dataloader()
            assert isinstance(loader.sampler, ShuffledRows)
            of_rank.append([list(loader), list(loader)])
    epochs = []
    for epoch in range(2):
        seen = [torch.cat([b.sample for b in batches[epoch]]) for batches in of_rank]
        assert sorted(torch.cat(seen).tolist()) == list(range(N))
        for step in zip(*(batches[epoch] for batches in of_rank), strict=True):
            assert {b.n_global for b in step} == {sum(len(b.x) for b in step)}
            for b in step:
                assert torch.equal(b.x, whole.x[b.sample])
                assert torch.equal(b.label, whole.label[b.sample])
        epochs.append(torch.cat([b.sample for b in of_rank[0][epoch]]).tolist())
    if world == 1 and batch_size > 8:
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("buffer_rows", [32, 1000])
@pytest.mark.parametrize("split", ["train", "val"])
def test_prefetching_changes_nothing(store: Path, split: str, buffer_rows: int) -> None:
    def batches(prefetch: bool) -> list[torch.Tensor]:
        data = ActivationData(
            store=str(store), batch_size=16, buffer_rows=buffer_rows, prefetch=prefetch
        )
        data.setup("fit")
        loader = data.train_dataloader() if split == "train" else data.val_dataloader()
        return [part for batch in (*loader, *loader) for part in batch[:3]]

    for a, b in zip(batches(True), batches(False), strict=True):
        assert torch.equal(a, b)


def test_the_position_is_that_of_what_was_handed_out(store: Path) -> None:
    """Whatever the threads had made ready, a resumed run goes on with the next batch."""

    def loader() -> object:
        data = ActivationData(store=str(store), batch_size=8, buffer_rows=24)
        data.setup("fit")
        return data.train_dataloader()

    whole = [b.sample.tolist() for b in loader()]  # type: ignore[attr-defined]
    for stop in range(1, len(whole)):
        first, second = loader(), loader()
        batches = iter(first)  # type: ignore[call-overload]
        seen = [next(batches).sample.tolist() for _ in range(stop)]
        second.load_state_dict(first.state_dict())  # type: ignore[attr-defined]
        batches.close()
        second.sampler.set_epoch(0)  # type: ignore[attr-defined]
        seen += [b.sample.tolist() for b in second]  # type: ignore[attr-defined]
        assert seen == whole


def test_buffers_are_no_larger_than_announced(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    empty = torch.empty

    def counted(*size: int, **options: object) -> torch.Tensor:
        tensor = empty(*size, **options)  # type: ignore[arg-type]
        made.append(tensor.numel() * tensor.itemsize)
        return tensor

    data = ActivationData(store=str(store), batch_size=8, buffer_rows=24)
    data.setup("fit")
    loader = data.train_dataloader()
    monkeypatch.setattr(torch, "empty", counted)
    assert sum(len(b.x) for b in loader) == N
    assert sum(made) == loader.buffer_bytes == 2 * 24 * (4 * D_IN + 16)  # type: ignore[attr-defined]
