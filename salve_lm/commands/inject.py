"""`inject`: a task vector at several strengths and beside its controls, problem by problem."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from salve_lm.atomic import atomic_file
from salve_lm.commands.injection_variants import (
    BASE,
    SELECTED,
    Control,
    injection_variants,
)
from salve_lm.commands.projection_energy import FILE as PROJECTION
from salve_lm.commands.projection_energy import projection_energies
from salve_lm.commands.variant_results import (
    Evaluated,
    check_measurable,
    compare_with_base,
    evaluate_all,
    show,
    summary_table,
)
from salve_lm.edits.context import EditContext
from salve_lm.edits.resolve import plan_edit
from salve_lm.edits.spec import EditSpec, spec_to_dict
from salve_lm.edits.task_vector import TaskVectorInjection
from salve_lm.errors import BadConfig, NameNotFound
from salve_lm.specificity.controls import ControlLayers, judge_choice

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

FORMAT, VERSION = "salve-lm injection", 1
RECORD = "injection.json"
# metrics of which less is better
LOSSES = ("loss", "perplexity", "nats")


def inject(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule,
    edit: EditSpec,
    out: str,
    alphas: list[float] | None = None,
    controls: list[Control] | None = None,
    judge: list[str] | None = None,
    window: int = 2,
    at_most: int = 50,
    seeds: int = 1,
    seed: int = 0,
    resamples: int = 10_000,
) -> None:
    """Run `SalveTrainer.inject`; see there."""
    studied = check_measurable(model, datamodule, out, RECORD, "inject")
    if not isinstance(edit, TaskVectorInjection):
        raise BadConfig(f"`inject` needs a TaskVectorInjection, not a {type(edit).__name__}.")
    if judge and "random_layers" not in (controls or []):
        raise BadConfig("`judge` compares with random layers: add `random_layers` to `controls`.")
    folder = Path(out)
    context = EditContext()
    plan_edit(edit, studied, context)
    variants, sets = injection_variants(
        edit, studied.model.config, alphas, controls or [],
        window=window, at_most=at_most, seeds=seeds, seed=seed,
    )  # fmt: skip
    # one of each kind is resolved: whatever is wrong with it shows before hours are spent
    for variant in {v.kind: v for v in variants if v.edit is not None}.values():
        plan_edit(variant.edit, studied, context)  # type: ignore[arg-type]
    evaluated = evaluate_all(trainer, studied, datamodule, variants, folder)
    if not trainer.is_global_zero:
        return
    record = _record(edit, evaluated)
    record["verdicts"] = [_verdict(evaluated, sets, name) for name in judge or []] if sets else []
    table = summary_table(evaluated)
    table.to_csv(folder / "variants.csv", index=False)
    compare_with_base(folder, evaluated, resamples, seed)
    projected = next((v.edit for v in variants if v.kind.startswith("projected")), None)
    if projected is not None:
        task = datamodule.tasks[0]  # type: ignore[attr-defined]
        energies = projection_energies(
            studied.model, studied.tokenizer, projected, task,
            device=trainer.strategy.root_device, seed=seed,
        )  # fmt: skip
        with atomic_file(folder / PROJECTION) as path:
            path.write_text(json.dumps(energies, indent=1) + "\n", encoding="utf-8")
    with atomic_file(folder / RECORD) as path:  # the last file: its presence says finished
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _show(table, record["verdicts"], out)


def _record(edit: TaskVectorInjection, evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "edit": spec_to_dict(edit),
        "variants": {
            e.variant.name: {
                "kind": e.variant.kind,
                "layers": list(e.variant.layers),
                "spec": None if e.variant.edit is None else spec_to_dict(e.variant.edit),
                "summary": e.summary,
                "changes": dict(e.changes),
            }
            for e in evaluated
        },
    }


def _verdict(evaluated: Sequence[Evaluated], sets: ControlLayers, metric: str) -> dict[str, Any]:
    """Whether the chosen layers beat the other subsets of their size, by one metric."""
    summaries = {e.variant.name: e.summary for e in evaluated}
    if metric not in summaries[BASE]:
        raise NameNotFound("metric", metric, summaries[BASE])
    sign = -1.0 if metric.rsplit("/", 1)[-1].startswith(LOSSES) else 1.0
    before = summaries[BASE][metric]
    gains = {
        e.variant.layers: sign * (e.summary[metric] - before)
        for e in evaluated
        if e.variant.kind == "random_layers"
    }
    gain = sign * (summaries[SELECTED][metric] - before)
    verdict = judge_choice(sets.chosen, gain, gains, exhaustive=sets.exhaustive, unit=metric)
    return {
        "metric": metric, "gain": gain, "rank": verdict.rank, "compared": verdict.compared,
        "p": verdict.p, "smallest_p": verdict.smallest_p, "beats_random": verdict.beats_random,
        "words": verdict.words,
    }  # fmt: skip


def _show(table: pd.DataFrame, verdicts: Sequence[Mapping[str, Any]], out: str) -> None:
    from rich.console import Console

    show(table, "Task vector: strengths and controls")
    console = Console()
    for verdict in verdicts:
        console.print(f"{verdict['metric']}: {verdict['words']}", markup=False, highlight=False)
    console.print(f"Written to {out}", markup=False)
