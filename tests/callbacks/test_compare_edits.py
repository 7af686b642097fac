from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from salve_lm.callbacks import CompareEdits, WeightEditing
from salve_lm.edits import (
    DecoderGuided,
    DirectionalAblation,
    EditContext,
    EditSpec,
    LatentContrastErasure,
    LowerClassBias,
    ShrinkClassRow,
    apply,
    plan_edit,
)
from salve_lm.errors import BadConfig
from tests.callbacks.tiny import Studied, parts, trainer
from tests.edits.tiny import NAMES, Fixture, state


def table_of(
    tiny: Fixture, edits: list[EditSpec], first: bool = False, **options: Any
) -> tuple[list[dict[str, Any]], Studied]:
    comparing = CompareEdits(**options)
    editing = WeightEditing(edits)
    studied, data = parts(tiny)
    order = (comparing, editing) if first else (editing, comparing)
    before = state(studied.model)
    trainer(*order).validate(studied, data, verbose=False)
    assert all(torch.equal(t, before[n]) for n, t in studied.model.state_dict().items())
    return comparing.table, studied


def accuracies(tiny: Fixture, logits: Tensor, k: int) -> tuple[float, float]:
    right = (logits.argmax(1) == tiny.label).double()
    own = tiny.label == k
    return float(right[own].mean()), float(right[~own].mean())


def after(tiny: Fixture, spec: EditSpec, k: int) -> tuple[float, float]:
    """Target and other accuracy of the model that really has these weights."""
    studied, _ = parts(tiny)
    plan = plan_edit(spec, studied, EditContext(), NAMES)
    studied.model.load_state_dict(state(studied.model) | apply(state(studied.model), plan.ops))
    with torch.no_grad():
        return accuracies(tiny, studied.model(tiny.x), k)


@pytest.mark.parametrize("first", [True, False])
def test_every_row_is_what_the_edited_model_does(tiny: Fixture, first: bool) -> None:
    edit = DecoderGuided(feature="dominant:tower", alpha=4.0, **tiny.paths)
    table, studied = table_of(tiny, [edit], first)
    assert [r["edit"] for r in table] == [
        edit.title, "permuted", "head_row", "class_mean", "bias lowered", "row zeroed",
        "all edits together",
    ]  # fmt: skip
    assert [r["kind"] for r in table] == ["edit", *["control"] * 5, "all"]
    assert {r["class"] for r in table} == {"tower"}
    with torch.no_grad():
        unedited = studied.model(tiny.x)
    before = accuracies(tiny, unedited, 2)
    common: dict[str, Any] = {"target_class": 2, "alpha": 4.0, **tiny.paths}
    plan = plan_edit(edit, studied, EditContext())
    weight = apply(state(studied.model), plan.ops)["fc.weight"]
    with torch.no_grad():
        edited = torch.nn.functional.linear(tiny.x, weight, studied.model.fc.bias)
    own = tiny.label == 2
    fall = float((unedited[own, 2] - edited[own, 2]).mean())
    specs: dict[str, EditSpec] = {
        edit.title: edit,
        "permuted": DecoderGuided(feature="dominant", guide="permuted", **common),
        "head_row": DecoderGuided(guide="head_row", **common),
        "class_mean": DecoderGuided(guide="class_mean", **common),
        "bias lowered": LowerClassBias(target_class=2, alpha=fall),
        "row zeroed": ShrinkClassRow(target_class=2),
        "all edits together": edit,
    }
    for row in table:
        assert (row["target_before"], row["others_before"]) == pytest.approx(before, abs=1e-6)
        wanted = after(tiny, specs[row["edit"]], 2)
        assert (row["target_after"], row["others_after"]) == pytest.approx(wanted, abs=1e-6)
        assert row["control_of"] == (edit.title if row["kind"] == "control" else "")
    assert table[1]["alpha"] == 4.0
    assert table[4]["alpha"] == pytest.approx(fall, rel=1e-5)


def test_several_edits_stand_alone_and_together(tiny: Fixture) -> None:
    edits: list[EditSpec] = [
        LatentContrastErasure(name="erase", target_class="church", top_k=3, **tiny.paths),
        LowerClassBias(name="raise", target_class=1, alpha=-2.0),
    ]
    table, studied = table_of(tiny, edits)
    controls = [(r["control_of"], r["edit"]) for r in table if r["kind"] == "control"]
    # raising a logit is not imitated by zeroing its row
    assert controls == [
        ("erase", "bias lowered"), ("erase", "row zeroed"), ("raise", "bias raised"),
    ]  # fmt: skip
    for k, spec in enumerate(edits):
        row = next(r for r in table if r["edit"] == spec.name)
        assert (row["target_after"], row["others_after"]) == pytest.approx(after(tiny, spec, k))
    together = [r for r in table if r["kind"] == "all"]
    assert [r["class"] for r in together] == ["church", "golf ball"]
    for k, row in enumerate(together):
        live = accuracies(tiny, torch.cat(studied.logits), k)
        assert (row["target_after"], row["others_after"]) == pytest.approx(live, abs=1e-6)


def test_edits_before_the_head_are_compared_with_a_second_pass(tiny: Fixture) -> None:
    edit = DirectionalAblation(module="hidden", feature="selective:tower", alpha=2.0, **tiny.paths)
    table, studied = table_of(tiny, [edit])
    (row,) = table
    assert row["kind"] == "all"
    with torch.no_grad():
        before = accuracies(tiny, studied.model(tiny.x), 2)
    assert (row["target_before"], row["others_before"]) == pytest.approx(before, abs=1e-6)
    live = accuracies(tiny, torch.cat(studied.logits), 2)
    assert (row["target_after"], row["others_after"]) == pytest.approx(live, abs=1e-6)
    assert live != pytest.approx(before)


def test_own_controls(tiny: Fixture) -> None:
    edit = DecoderGuided(feature="dominant:tower", alpha=4.0, **tiny.paths)
    controls: list[EditSpec] = [
        LowerClassBias(name="mine", alpha=3.0),
        DecoderGuided(target_class=1, guide="head_row", alpha=7.0),
    ]
    table, _ = table_of(tiny, [edit], controls=controls)
    assert [r["edit"] for r in table] == [edit.title, "mine", "DecoderGuided", "all edits together"]
    wanted = after(tiny, LowerClassBias(target_class=2, alpha=3.0), 2)
    assert (table[1]["target_after"], table[1]["others_after"]) == pytest.approx(wanted)
    assert [r["alpha"] for r in table] == [4.0, 3.0, 7.0, None]


def test_controls_that_cannot_be_made_are_left_out(
    tiny: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    edit = DecoderGuided(feature=tiny.table.dominant(2), target_class=2, sae=tiny.sae)
    with caplog.at_level(logging.WARNING):
        table, _ = table_of(tiny, [edit])
    assert "class_mean" not in [r["edit"] for r in table]
    assert "Control class_mean of" in caplog.text


def test_an_edit_about_no_class(tiny: Fixture) -> None:
    table, _ = table_of(tiny, [DecoderGuided(feature=1, alpha=4.0, sae=tiny.sae)])
    assert [r["kind"] for r in table] == ["edit", "all"]
    assert table[0]["class"] == ""
    assert table[0]["target_after"] != table[0]["target_after"]  # NaN
    assert 0 <= table[0]["others_after"] <= 1


def test_printed_and_written(
    tiny: Fixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit = DecoderGuided(name="cut", feature="dominant:tower", alpha=4.0, **tiny.paths)
    table, _ = table_of(tiny, [edit], out=str(tmp_path))
    shown = capsys.readouterr().out
    assert "Edits and their controls" in shown
    assert "row zeroed" in shown
    with (tmp_path / "compare_edits.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["edit"] for r in rows] == [r["edit"] for r in table]
    assert json.loads((tmp_path / "compare_edits.json").read_text()) == table


def test_needs_edits(tiny: Fixture) -> None:
    studied, data = parts(tiny)
    with pytest.raises(BadConfig, match="WeightEditing"):
        trainer(CompareEdits()).validate(studied, data)
