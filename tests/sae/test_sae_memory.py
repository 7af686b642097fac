"""The estimate of a training run's memory, and the refusal of one that cannot fit."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from salve_lm.errors import NotEnoughMemory
from salve_lm.free_memory import free_memory, free_ram
from salve_lm.modules import sae_memory
from salve_lm.modules.sae import SAETraining
from salve_lm.modules.sae_group import SAEGroupTraining
from salve_lm.sae.memory import training_memory

Make = Callable[..., Any]
MIB = 1 << 20


def test_the_formula() -> None:
    """32 d_in d_sae bytes for float32 Adam, 3 rows d_sae values for the latents."""
    d_in, d_sae, rows = 256, 1 << 20, 4096
    found = training_memory("topk", 2 * d_in * d_sae, d_sae, rows)
    assert found.total - found.latents == 32 * d_in * d_sae
    assert found.latents == 3 * rows * d_sae * 4
    half = training_memory("topk", 2 * d_in * d_sae, d_sae, rows, value_bytes=2)
    assert half.total == found.total / 2
    # eight devices: an eighth of all that lasts, and whole weights and gradients for a step
    shared = training_memory("topk", 2 * d_in * d_sae, d_sae, rows // 8, shards=8)
    assert shared.total - shared.latents == (32 // 8 + 16) * d_in * d_sae


def limit(monkeypatch: pytest.MonkeyPatch, mib: float) -> None:
    monkeypatch.setattr(sae_memory, "free_memory", lambda device: int(mib * MIB))


def test_it_is_told_before_training(
    data: Any, make_trainer: Make, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    limit(monkeypatch, 3)
    # a CLI run before this one may have silenced Lightning
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(max_steps=1).fit(SAETraining("standard", 1024), datamodule=data)
    # 32 * 12 * 1024 and biases; 3 * 32 rows * 1024 latents * 4 bytes
    (told,) = [r.message for r in caplog.records if "Memory of training" in r.message]
    assert "Adam 200.1 KiB" in told
    assert "latents of the rows in work 384.0 KiB" in told
    assert "3.0 MiB are free on cpu" in told


@pytest.mark.parametrize("group", [False, True])
def test_a_million_latents_are_refused_before_anything_is_allocated(
    data: Any, make_trainer: Make, monkeypatch: Any, group: bool
) -> None:
    limit(monkeypatch, 1024)

    def never(*args: Any) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr(SAETraining, "configure_model", never)
    module = SAEGroupTraining if group else SAETraining
    data.site = "pooled"
    with pytest.raises(NotEnoughMemory, match="Training takes about") as caught:
        make_trainer().fit(module(architecture="topk", d_sae=1 << 24), datamodule=data)
    # 32 * 12 * 2^24, and biases; 3 * 32 rows * 2^24 latents * 4 bytes
    assert caught.value.needed == pytest.approx((32 * 12 + 16 + 3 * 32 * 4) * 2**24, rel=1e-6)
    assert caught.value.free == 1024 * MIB


def cures(data: Any, make_trainer: Make, **options: Any) -> str:
    with pytest.raises(NotEnoughMemory) as caught:
        make_trainer().fit(SAETraining(**options), datamodule=data)
    return str(caught.value)


def test_each_cure_that_is_named_with_a_number_is_one(
    data: Any, make_trainer: Make, monkeypatch: Any
) -> None:
    limit(monkeypatch, 1.5)
    data.batch_size, module = 400, {"architecture": "topk", "d_sae": 1024, "options": {"k": 4}}
    said = cures(data, make_trainer, **module)
    for name in ("chunk_rows: 64", "a batch_size of 64", "dtype: bfloat16", "over 4 such devices"):
        assert name in said
    make_trainer(max_steps=1).fit(SAETraining(**module, chunk_rows=64), datamodule=data)
    assert "with 128 rows at a time" in said
    halves = {**module, "dtype": "bfloat16", "chunk_rows": 128}
    make_trainer(max_steps=1).fit(SAETraining(**halves), datamodule=data)
    with pytest.raises(NotEnoughMemory):
        make_trainer().fit(SAETraining(**module, chunk_rows=128), datamodule=data)
    data.batch_size = 64
    make_trainer(max_steps=1).fit(SAETraining(**module), datamodule=data)


def test_no_cure_is_named_that_would_not_fit(
    data: Any, make_trainer: Make, monkeypatch: Any
) -> None:
    limit(monkeypatch, 0.05)
    said = cures(data, make_trainer, architecture="batchtopk", d_sae=1024, options={"k": 4})
    assert not re.search(r"chunk_rows: \d|batch_size of|such devices", said)
    assert "a smaller d_sae" in said


def test_free_ram_is_bound_by_the_control_group(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    assert free_ram(proc, cgroups) is None
    (proc / "meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable:  500000 kB\n")
    assert free_ram(proc, cgroups) == 500_000 * 1024
    for version, name, files in (
        ("0::/job/step", "job/step", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:memory:/job/step",
            "memory/job/step",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ):
        (proc / "self" / "cgroup").write_text(f"9:cpu:/\n{version}\n")
        step = cgroups / name
        step.mkdir(parents=True)
        most, usage, cache = files
        (step / most).write_text("max\n" if most == "memory.max" else f"{2**63 - 4096}\n")
        (step / usage).write_text("1000\n")
        assert free_ram(proc, cgroups) == 500_000 * 1024
        # the limit is that of the job, in which the step lies
        (step.parent / most).write_text("100000000\n")
        (step.parent / usage).write_text("60000000\n")
        (step.parent / "memory.stat").write_text(f"anon 1\n{cache} 20000000\n")
        assert free_ram(proc, cgroups) == 60_000_000
        (step.parent / most).write_text(f"{2**62}\n")


def test_free_memory_of_this_machine() -> None:
    found = free_memory(torch.device("cpu"))
    assert found is None or found > 64 * MIB
    assert free_memory(torch.device("meta")) is None
