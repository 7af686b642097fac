"""Comparison at equal suppression, from made-up curves."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest

from salve_lm.commands.equal_suppression import LEVELS, equal_suppression
from salve_lm.commands.swept import Swept
from salve_lm.edits import DecoderGuided, LowerClassBias
from salve_lm.strength import Outcome


class Plan:
    """All that is read of a plan."""

    def __init__(self, spec: Any) -> None:
        self.spec, self.features = spec, ()


def swept(
    edit: str, train: list[float], val: list[tuple[float, float]], direction: str = "suppress"
) -> Swept:
    spec: Any = LowerClassBias() if edit == "bias" else DecoderGuided(direction=direction)  # type: ignore[arg-type]
    whole = Outcome(1.0, 0.9, 0.0, [])
    curves = {
        # the others' training accuracy is of no account
        "train": [Outcome(t, 0.0, 0.0, []) for t in train],
        "val": [Outcome(t, o, 0.0, []) for t, o in val],
    }
    before = {"train": whole, "val": whole}
    alphas = [float(i) for i in range(len(train))]
    return Swept(edit, cast(Any, Plan(spec)), 0, alphas, curves, before, before, math.nan)


def test_each_at_the_first_strength_that_reaches_the_level() -> None:
    rows = equal_suppression(
        [
            swept("bias", [0.6, 0.04, 0.0], [(0.7, 0.9), (0.1, 0.88), (0.0, 0.5)]),
            swept("bias", [0.5, 0.3, 0.03], [(0.6, 0.9), (0.4, 0.9), (0.2, 0.7)]),
            swept("guided", [0.9, 0.8, 0.7], [(0.9, 0.9)] * 3),
            swept("stronger", [1.0], [(1.0, 0.9)], "enhance"),
        ],
        [0.5, 0.05],
    )
    assert [(r.edit, r.level, r.reached, r.classes) for r in rows] == [
        ("bias", 0.5, 2, 2), ("bias", 0.05, 2, 2), ("guided", 0.5, 0, 1), ("guided", 0.05, 0, 1)
    ]  # fmt: skip
    half, low, *none = rows
    assert half.target == pytest.approx((0.1 + 0.6) / 2)
    assert half.others == pytest.approx((0.88 + 0.9) / 2)
    assert (low.target, low.worst_target) == (pytest.approx(0.15), 0.2)
    assert low.others_lost == pytest.approx((0.02 + 0.2) / 2)
    assert low.worst_others_lost == pytest.approx(0.2)
    assert all(math.isnan(v) for r in none for v in (r.target, r.others, r.others_lost))


def test_all_levels_by_default() -> None:
    rows = equal_suppression([swept("bias", [0.0], [(0.0, 0.9)])])
    assert [r.level for r in rows] == list(LEVELS)
    assert all(r.reached == 1 for r in rows)
