"""The peak of a stretch of work, also when it is over and lower than an earlier one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from salve_lm.task_vectors.resident import ResidentGrowth

MB = 10**6


def take(megabytes: int) -> None:
    """Touch so much memory, and give it back."""
    np.ones(megabytes * MB, np.uint8).sum()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets peaks")
def test_a_peak_is_seen_though_an_earlier_one_was_higher() -> None:
    take(240)
    growth = ResidentGrowth()
    take(120)
    assert 100 < growth.peak_mb() < 200


def test_nothing_is_nothing() -> None:
    assert ResidentGrowth().peak_mb() < 20
