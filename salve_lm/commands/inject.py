"""`inject`: a task vector at several strengths and beside its controls, problem by problem."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from salve_lm.atomic import atomic_file
from salve_lm.callbacks.problem_results import ProblemResults
from salve_lm.callbacks.weight_editing import WeightEditing
from salve_lm.commands.injection_variants import (
    BASE,
    SELECTED,
    Control,
    InjectionVariant,
    injection_variants,
)
from salve_lm.commands.projection_energy import FILE as PROJECTION
from salve_lm.commands.projection_energy import projection_energies
from salve_lm.edits.resolve import plan_edit
from salve_lm.edits.spec import EditSpec, spec_to_dict
from salve_lm.edits.task_vector import TaskVectorInjection
from salve_lm.errors import BadConfig, NameNotFound, OutputExists, StaleStore
from salve_lm.modules.language_evaluation import LanguageEvaluation
from salve_lm.specificity.controls import ControlLayers, judge_choice
from salve_lm.tasks.results import read_results

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

FORMAT, VERSION = "salve-lm injection", 1
RECORD = "injection.json"
# metrics of which less is better
LOSSES = ("loss", "perplexity", "nats")


class Evaluated(NamedTuple):
    """One variant, its tasks' summaries, and how far its tensors moved."""

    variant: InjectionVariant
    summary: dict[str, float]
    changes: Mapping[str, Mapping[str, float]]


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
    if not isinstance(model, LanguageEvaluation):
        raise BadConfig(f"`inject` needs a LanguageModel, not a {type(model).__name__}.")
    if not isinstance(edit, TaskVectorInjection):
        raise BadConfig(f"`inject` needs a TaskVectorInjection, not a {type(edit).__name__}.")
    if not getattr(datamodule, "tasks", None):
        raise BadConfig("Nothing to measure: give LanguageData one or more `tasks`.")
    folder = Path(out)
    if (folder / RECORD).exists():
        raise OutputExists(out)
    # resolved once as it stands: whatever is wrong with it shows before hours are spent
    plan_edit(edit, model)
    variants, sets = injection_variants(
        edit, model.model.config, alphas, controls or [],
        window=window, at_most=at_most, seeds=seeds, seed=seed,
    )  # fmt: skip
    for variant in _tracked(variants, trainer.is_global_zero):
        _evaluate(trainer, model, datamodule, variant, folder / "results" / variant.name)
    if not trainer.is_global_zero:
        return
    source = model.hparams.get("source")
    evaluated = [_read(v, folder / "results" / v.name, source) for v in variants]
    record = _record(edit, evaluated)
    record["verdicts"] = [_verdict(evaluated, sets, name) for name in judge or []] if sets else []
    table = summary_table(evaluated)
    table.to_csv(folder / "variants.csv", index=False)
    _compare(folder, evaluated, resamples, seed)
    projected = next((v.edit for v in variants if v.kind.startswith("projected")), None)
    if projected is not None:
        task = datamodule.tasks[0]  # type: ignore[attr-defined]
        energies = projection_energies(
            model.model, model.tokenizer, projected, task,
            device=trainer.strategy.root_device, seed=seed,
        )  # fmt: skip
        with atomic_file(folder / PROJECTION) as path:
            path.write_text(json.dumps(energies, indent=1) + "\n", encoding="utf-8")
    with atomic_file(folder / RECORD) as path:  # the last file: its presence says finished
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _show(table, record["verdicts"], out)


def _evaluate(
    trainer: Trainer,
    model: LanguageEvaluation,
    datamodule: LightningDataModule,
    variant: InjectionVariant,
    folder: Path,
) -> None:
    """Validate with the variant's edit on, and write its results, unless they are there."""
    if folder.is_dir():  # of an earlier run that was stopped; `_read` checks what they are
        return
    kept: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    own: list[Any] = [ProblemResults(str(folder), hash_weights=variant.name == BASE)]
    if variant.edit is not None:
        own.insert(0, WeightEditing([variant.edit]))
    # one bar over the variants in place of one for each
    others = [c for c in kept if not isinstance(c, ProgressBar)]
    trainer.callbacks = [*others, *own]  # type: ignore[attr-defined]
    try:
        trainer.validate(model, datamodule=datamodule, verbose=False)
    finally:
        trainer.callbacks = kept  # type: ignore[attr-defined]


def _read(variant: InjectionVariant, folder: Path, source: object) -> Evaluated:
    """What the results of a variant say; they must be of this model and this edit.

    Raises:
        StaleStore: an earlier run with other options left them.
    """
    info = read_results(folder).info
    expected = [] if variant.edit is None else [spec_to_dict(variant.edit)]
    expected = json.loads(json.dumps(expected))
    if info["edits"] != expected or info["model"].get("source") != source:
        raise StaleStore(
            f"{folder} holds results of an unfinished run with another model or other options. "
            "Remove the folder that it lies in, or choose another `out`."
        )
    summary = {
        f"{task}/{key}": float(value)
        for task, about in info["tasks"].items()
        for key, value in about["summary"].items()
    }
    return Evaluated(variant, summary, info["changes"])


def summary_table(evaluated: Sequence[Evaluated]) -> pd.DataFrame:
    """One row a variant: kind, layers, strength, energies, and every metric."""
    import pandas as pd

    return pd.DataFrame([_plain(e) for e in evaluated])


def _plain(e: Evaluated) -> dict[str, Any]:
    requested = sum(c["requested"] for c in e.changes.values())
    applied = sum(c["applied"] for c in e.changes.values())
    return {
        "variant": e.variant.name,
        "kind": e.variant.kind,
        "layers": " ".join(map(str, e.variant.layers)),
        "alpha": None if e.variant.edit is None else e.variant.edit.alpha,
        "norm": requested**0.5,
        "applied_energy": applied / requested if requested else None,
        **e.summary,
    }


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
    if not gains:
        raise BadConfig("`judge` compares with random layers: add `random_layers` to `controls`.")
    gain = sign * (summaries[SELECTED][metric] - before)
    verdict = judge_choice(sets.chosen, gain, gains, exhaustive=sets.exhaustive, unit=metric)
    return {
        "metric": metric, "gain": gain, "rank": verdict.rank, "compared": verdict.compared,
        "p": verdict.p, "smallest_p": verdict.smallest_p, "beats_random": verdict.beats_random,
        "words": verdict.words,
    }  # fmt: skip


def _compare(folder: Path, evaluated: Sequence[Evaluated], resamples: int, seed: int) -> None:
    """Every variant against the base model, paired, as `compare` does it for two runs."""
    from salve_lm.commands.compare import write_comparison

    names = [e.variant.name for e in evaluated if e.variant.name != BASE]
    write_comparison(
        folder / "results" / BASE,
        {name: folder / "results" / name for name in names},
        folder / "compare",
        resamples=resamples,
        seed=seed,
    )


def _tracked(variants: list[InjectionVariant], visible: bool) -> Iterator[InjectionVariant]:
    from rich.progress import track

    yield from track(variants, description="Evaluating variants", disable=not visible)


def _show(table: pd.DataFrame, verdicts: Sequence[Mapping[str, Any]], out: str) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="Task vector: strengths and controls")
    columns = [c for c in table.columns if table[c].notna().any()]
    for name in columns:
        shown.add_column(name, justify="left" if table[name].dtype == object else "right")
    for row in table[columns].itertuples(index=False):
        shown.add_row(*(_cell(value) for value in row))
    console = Console()
    console.print(shown)
    for verdict in verdicts:
        console.print(f"{verdict['metric']}: {verdict['words']}", markup=False, highlight=False)
    console.print(f"Written to {out}", markup=False)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return str(value)
