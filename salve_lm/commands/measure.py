"""`measure`: edits of a language model, each at several strengths, side by side on all tasks."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from salve_lm.atomic import atomic_file
from salve_lm.commands.injection_variants import BASE
from salve_lm.commands.variant_results import (
    EditVariant,
    Evaluated,
    check_measurable,
    compare_with_base,
    evaluate_all,
    show,
    summary_table,
)
from salve_lm.edits.resolve import plan_edit
from salve_lm.edits.spec import EditSpec, spec_to_dict
from salve_lm.edits.steering import Steering
from salve_lm.errors import BadConfig, NameNotFound
from salve_lm.modules.language_evaluation import LanguageEvaluation

if TYPE_CHECKING:
    import pandas as pd

FORMAT, VERSION = "salve-lm measured edits", 1
RECORD = "measured.json"
CHANGE = "change:"


def measure(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule,
    edits: list[EditSpec],
    out: str,
    alphas: dict[str, list[float]] | list[float] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> None:
    """Run `SalveTrainer.measure`; see there."""
    studied = check_measurable(model, datamodule, out, RECORD, "measure")
    folder = Path(out)
    variants = edit_variants(edits, alphas)
    for edit in edits:
        _check(edit, studied)
    evaluated = evaluate_all(trainer, studied, datamodule, variants, folder)
    if not trainer.is_global_zero:
        return
    table = with_changes(summary_table(evaluated))
    table.to_csv(folder / "edits.csv", index=False)
    compare_with_base(folder, evaluated, resamples, seed)
    with atomic_file(folder / RECORD) as path:  # the last file: its presence says finished
        path.write_text(json.dumps(_record(evaluated), indent=1) + "\n", encoding="utf-8")
    # without subjects, which would not fit on a screen
    overall = [c for c in table.columns if c.startswith(CHANGE) and c.count("/") == 1]
    shown = table[["variant", "alpha", *overall]]
    show(
        shown.rename(columns={c: c.removeprefix(CHANGE) for c in overall}),
        "Change against the unedited model",
    )


def edit_variants(
    edits: Sequence[EditSpec], alphas: Mapping[str, Sequence[float]] | Sequence[float] | None
) -> list[EditVariant]:
    """The unedited model, and every edit at every strength.

    An edit is called by its `name`, or by its class and its place in the list.

    Args:
        edits: what to measure.
        alphas: strengths for all edits, or edit -> strengths; an edit's own where there are none.

    Raises:
        BadConfig: no edits, or two of one name.
        NameNotFound: strengths for an edit that is not in the list.
    """
    if not edits:
        raise BadConfig("Nothing to measure: give at least one edit.")
    named = {_name(edit, i): edit for i, edit in enumerate(edits)}
    if len(named) < len(edits) or BASE in named:
        raise BadConfig(f"Every edit needs a `name` of its own, other than {BASE!r}.")
    if isinstance(alphas, Mapping):
        for name in alphas:
            if name not in named:
                raise NameNotFound("edit", name, list(named))
    found = [EditVariant(BASE, BASE, (), None)]
    for name, edit in named.items():
        given = alphas.get(name) if isinstance(alphas, Mapping) else alphas
        strengths = tuple(dict.fromkeys(given or [edit.alpha]))
        for alpha in strengths:
            title = name if len(strengths) == 1 else f"{name}_alpha_{alpha:g}"
            changed = dataclasses.replace(edit, name=title, alpha=alpha)
            found.append(EditVariant(title, name, (), changed))
    return found


def with_changes(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with a column `change:METRIC` for every metric: the variant's minus the base's."""
    metrics = [c for c in table.columns if "/" in c]
    base = table.loc[table["variant"] == BASE, metrics].iloc[0]
    return table.assign(**{f"{CHANGE}{m}": table[m] - base[m] for m in metrics})


def _name(edit: EditSpec, place: int) -> str:
    name = edit.name or f"{type(edit).__name__}_{place}"
    return re.sub(r"[^\w.+-]+", "_", name)  # it becomes a folder


def _check(edit: EditSpec, model: LanguageEvaluation) -> None:
    """Whatever is wrong with an edit shows before hours are spent."""
    if not isinstance(edit, Steering):
        plan_edit(edit, model)
    elif edit.module not in model.sites:
        cure = "Steering of a language model takes place at a site of its residual stream."
        raise NameNotFound("site", edit.module, list(model.sites), cure)


def _record(evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "variants": {
            e.variant.name: {
                "edit": e.variant.kind,
                "spec": None if e.variant.edit is None else spec_to_dict(e.variant.edit),
                "summary": e.summary,
                "changes": dict(e.changes),
            }
            for e in evaluated
        },
    }
