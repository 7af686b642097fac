"""Variants of one language model, each validated with its edit on: results, table, comparison."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from salve_lm.callbacks.problem_results import ProblemResults
from salve_lm.callbacks.steering import ActivationSteering
from salve_lm.callbacks.weight_editing import WeightEditing
from salve_lm.commands.injection_variants import BASE, InjectionVariant
from salve_lm.edits.spec import EditSpec, spec_to_dict
from salve_lm.edits.steering import Steering
from salve_lm.errors import BadConfig, OutputExists, StaleStore
from salve_lm.modules.language_evaluation import LanguageEvaluation
from salve_lm.tasks.results import read_results

if TYPE_CHECKING:
    import pandas as pd


class EditVariant(NamedTuple):
    """One evaluation: no edit (`base`), or one.

    name: of its results.
    kind: `base`, or the name that the strengths of one edit share.
    layers: that were chosen for it, where it says so.
    edit: None for `base`.
    """

    name: str
    kind: str
    layers: tuple[int, ...]
    edit: EditSpec | None


Variant = EditVariant | InjectionVariant
V = TypeVar("V", EditVariant, InjectionVariant)


class Evaluated(NamedTuple):
    """One variant, its tasks' summaries, and how far its tensors moved."""

    variant: Variant
    summary: dict[str, float]
    changes: Mapping[str, Mapping[str, float]]


def check_measurable(
    model: LightningModule, datamodule: LightningDataModule, out: str, record: str, command: str
) -> LanguageEvaluation:
    """`model`, if it can be measured on the tasks of `datamodule` and `out` is not finished.

    Raises:
        BadConfig: no language model, or no tasks.
        OutputExists: `out` holds `record`, the last file that a run writes.
    """
    if not isinstance(model, LanguageEvaluation):
        raise BadConfig(f"`{command}` needs a LanguageModel, not a {type(model).__name__}.")
    if not getattr(datamodule, "tasks", None):
        raise BadConfig("Nothing to measure: give LanguageData one or more `tasks`.")
    if (Path(out) / record).exists():
        raise OutputExists(out)
    return model


def evaluate_all(
    trainer: Trainer,
    model: LanguageEvaluation,
    datamodule: LightningDataModule,
    variants: Sequence[V],
    folder: Path,
) -> list[Evaluated]:
    """Validate every variant, one result folder each; what an earlier run left is taken as it is.

    Returns:
        The variants on rank zero, nothing on the others.

    Raises:
        StaleStore: results of a stopped run with other options, before anything more is computed.
    """
    source = source_of(model)
    folders = {v.name: folder / "results" / v.name for v in variants}
    # on every rank, so that all of them stop; nobody writes before all have joined a validation
    left = {
        v.name: read_evaluated(v, folders[v.name], source)
        for v in variants
        if folders[v.name].is_dir()
    }
    found = []
    for variant in tracked(variants, trainer.is_global_zero):
        path = folders[variant.name]
        if variant.name not in left:
            _evaluate(trainer, model, datamodule, variant, path)
        if trainer.is_global_zero:
            found.append(left.get(variant.name) or read_evaluated(variant, path, source))
    return found


def _evaluate(
    trainer: Trainer,
    model: LanguageEvaluation,
    datamodule: LightningDataModule,
    variant: Variant,
    folder: Path,
) -> None:
    """Validate with the variant's edit on, and write its results."""
    kept: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    own: list[Any] = [ProblemResults(str(folder), hash_weights=variant.name == BASE)]
    if variant.edit is not None:
        own.insert(0, _callback(variant.edit))
    # one bar over the variants in place of one for each
    others = [c for c in kept if not isinstance(c, ProgressBar)]
    trainer.callbacks = [*others, *own]  # type: ignore[attr-defined]
    try:
        trainer.validate(model, datamodule=datamodule, verbose=False)
    finally:
        trainer.callbacks = kept  # type: ignore[attr-defined]


def _callback(edit: EditSpec) -> Callback:
    """What puts an edit on; a shift of the residual stream has no bias to go into."""
    if isinstance(edit, Steering):
        return ActivationSteering.of(edit)
    return WeightEditing([edit])


def read_evaluated(variant: Variant, folder: Path, source: object) -> Evaluated:
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


def compare_with_base(
    folder: Path, evaluated: Sequence[Evaluated], resamples: int, seed: int
) -> None:
    """Every variant against the base model, paired, as `compare` does it for two runs."""
    from salve_lm.commands.compare import write_comparison

    names = [e.variant.name for e in evaluated if e.variant.name != BASE]
    # that of a run which was stopped behind it; made of the same results
    shutil.rmtree(folder / "compare", ignore_errors=True)
    write_comparison(
        folder / "results" / BASE,
        {name: folder / "results" / name for name in names},
        folder / "compare",
        resamples=resamples,
        seed=seed,
    )


def source_of(model: LightningModule) -> object:
    """Where the model came from, as its results name it: with variables expanded."""
    described: dict[str, Any] = getattr(model, "describe", dict)()
    return described.get("source")


def tracked(variants: Sequence[V], visible: bool) -> Iterator[V]:
    """The variants, with one progress bar over all of them."""
    from rich.progress import track

    yield from track(variants, description="Evaluating variants", disable=not visible)


def show(table: pd.DataFrame, title: str) -> None:
    """Print a table of variants; `variants.csv` has the columns that say little here.

    Left out: what is empty or the same in every row, and metrics of single subjects.
    """
    from pandas.api.types import is_numeric_dtype
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title)
    varying = [c for c in table.columns if table[c].nunique() > 1 and c.count("/") <= 1]
    columns = [c for c in varying if c not in ("kind", "norm")] or ["variant"]
    for name in columns:
        number = is_numeric_dtype(table[name])
        # headers break at the slash, values never
        header = name.replace("/", "/\n").replace("_", "_\n" if number else "_")
        shown.add_column(header, justify="right" if number else "left", no_wrap=True)
    for row in table[columns].itertuples(index=False):
        shown.add_row(*(_cell(value) for value in row))
    Console().print(shown)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return str(value)
