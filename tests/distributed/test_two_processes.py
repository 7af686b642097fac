"""Two processes train the same autoencoder as one: same batches, losses, metrics and weights."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from salve_lm.sae import ARCHITECTURES
from tests.activations.tiny import TinyData
from tests.distributed.ranks import TWO_MACHINES, run_ranks
from tests.distributed.training import (
    BATCH_SIZE,
    EPOCHS,
    SOURCE,
    STEPS_PER_EPOCH,
    Run,
    activation_data,
    fit,
    read_run,
)

TWO = {"strategy": "ddp_fork", "devices": 2}
TOP_K: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "batchtopk": {"k": 3},
    "matryoshka_batchtopk": {"k": 3, "matryoshka_widths": [4, 12]},
}


def one_and_two(store: Path, tmp_path: Path, **options: Any) -> tuple[Run, Run]:
    on_the_fly = options.pop("on_the_fly", False)
    fit(activation_data(store, on_the_fly), tmp_path / "one", **options)
    fit(activation_data(store, on_the_fly), tmp_path / "two", **options, **TWO)
    return read_run(tmp_path / "one"), read_run(tmp_path / "two", world=2)


def check_equal(one: Run, two: Run) -> None:
    assert one.losses.keys() == two.losses.keys()
    assert len(one.losses) == EPOCHS * STEPS_PER_EPOCH
    for step, loss in one.losses.items():
        assert two.losses[step] == pytest.approx(loss, rel=1e-5, abs=1e-6), f"step {step}"
    assert one.metrics.keys() == two.metrics.keys()
    for name, value in one.metrics.items():
        assert two.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    for name, weight in one.weights.items():
        torch.testing.assert_close(two.weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_one_process(store: Path, tmp_path: Path, architecture: str) -> None:
    module: dict[str, Any] = {}
    if architecture in TOP_K:
        module = {"options": TOP_K[architecture], "l1_warm_up_steps": 0}
    one, two = one_and_two(store, tmp_path, architecture=architecture, module=module)
    check_equal(one, two)
    assert len(set(one.losses.values())) == len(one.losses)  # it did train


@pytest.mark.parametrize(
    "module",
    [
        {"dead_feature_handling": "resample"},
        {"normalize_input": "expected_average_only_in", "fold_decoder_norm": True},
    ],
)
def test_resampling_and_input_scaling_equal_one_process(
    store: Path, tmp_path: Path, module: dict[str, Any]
) -> None:
    check_equal(*one_and_two(store, tmp_path, architecture="standard", module=module))


def test_on_the_fly_equals_one_process_and_the_store(store: Path, tmp_path: Path) -> None:
    one, two = one_and_two(store, tmp_path, on_the_fly=True)
    check_equal(one, two)
    fit(activation_data(store), tmp_path / "stored")
    check_equal(one, read_run(tmp_path / "stored"))


def test_no_sample_twice_or_dropped(store: Path, tmp_path: Path) -> None:
    one, two = one_and_two(store, tmp_path)
    for stage, n in (("train", SOURCE["n_train"]), ("val", SOURCE["n_val"])):
        steps = -(-n // BATCH_SIZE)
        # step by step the ranks' shares, side by side, are the batch of the single process
        assert [list(chain(*ranks)) for ranks in two.samples[stage]] == [
            share for (share,) in one.samples[stage]
        ]
        for epoch in range(EPOCHS):
            ranks = two.samples[stage][epoch * steps : (epoch + 1) * steps]
            assert sorted(chain(*chain(*ranks))) == list(range(n))
    last_batch = two.samples["train"][STEPS_PER_EPOCH - 1]
    assert sorted(map(len, last_batch)) == [0, 1]  # the hard case was really there


def test_lightnings_own_sampler_is_not_injected(store: Path, tmp_path: Path) -> None:
    fit(activation_data(store), tmp_path / "default", **TWO, use_distributed_sampler=True)
    fit(activation_data(store), tmp_path / "off", **TWO, use_distributed_sampler=False)
    default, off = (read_run(tmp_path / name, world=2) for name in ("default", "off"))
    assert default.samples == off.samples


def test_one_rank_harvests_for_all(tmp_path: Path) -> None:
    fit(activation_data(tmp_path), tmp_path / "two", **TWO)
    fit(activation_data(tmp_path), tmp_path / "one")
    check_equal(read_run(tmp_path / "one"), read_run(tmp_path / "two", world=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "store", "two"]


def test_two_machines_harvest_at_once_on_a_shared_disk(tmp_path: Path) -> None:
    """One of them is first; both train on what it wrote."""
    assert run_ranks(
        lambda _: fit(activation_data(tmp_path), tmp_path / "two", **TWO_MACHINES), machines=True
    ) == [0, 0]
    fit(activation_data(tmp_path), tmp_path / "one")
    check_equal(read_run(tmp_path / "one"), read_run(tmp_path / "two", world=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "store", "two"]


def test_a_harvest_that_fails_ends_both_ranks(tmp_path: Path) -> None:
    data = activation_data(tmp_path)
    data.source = TinyData(n_val=2)
    with pytest.raises(Exception, match=r"EmptyClass|MissingStore"):
        fit(data, tmp_path / "two", **TWO)
