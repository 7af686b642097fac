"""What `measure` found about edits: change in the task's loss against change in general loss."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from salve_lm.commands.injection_variants import BASE
from salve_lm.commands.measure import FORMAT, RECORD, VERSION
from salve_lm.errors import CorruptFile, MissingFile, StaleStore
from salve_lm.report.markup import finite
from salve_lm.report.material import check_format, read_json
from salve_lm.tasks.compare import ALL
from salve_lm.tasks.results import read_results

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "edits"
COMPARISON = "compare/compare.parquet"
_LAYER = re.compile(r"\.(\d+)\.")
# guides that stand for chance
_CONTROL_GUIDES = ("permuted",)


class Change(NamedTuple):
    """Paired difference from the unedited model, with its bootstrap interval."""

    difference: float
    low: float
    high: float
    p: float | None


class MeasuredEdit(NamedTuple):
    """One edit at one strength.

    name: of the variant.
    edit: the name that its strengths share.
    kind: class of the edit.
    alpha: strength.
    control: it stands for chance, as one with shuffled channels does.
    task: change of the task's loss, nats; None where none was measured.
    general: change of the loss on general text.
    """

    name: str
    edit: str
    kind: str
    alpha: float
    control: bool
    task: Change | None
    general: Change | None

    @property
    def ratio(self) -> tuple[float, float, float] | None:
        """Change of the task's loss by that of general loss, and the ends of what it may be.

        The ends are those of the two intervals, so they are wider than an interval of the ratio.
        None where general loss did not surely rise.
        """
        if self.task is None or self.general is None or not self.general.low > 0:
            return None
        ends = [t / g for t in self.task[1:3] for g in self.general[1:3]]
        return self.task.difference / self.general.difference, min(ends), max(ends)


@dataclass(frozen=True)
class Measured:
    """`measured.json` and what lies beside it.

    Attributes:
        record: the file.
        tasks: name -> entry of the base model's `results.json`.
        comparison: paired tests of every variant against the unedited model.
        weights: SHA-256 of the model's weights.
    """

    record: Mapping[str, Any]
    tasks: Mapping[str, Any]
    comparison: pd.DataFrame
    weights: str | None

    @property
    def task(self) -> str | None:
        """`TASK/METRIC` of what the edits are about: the first loss that is not of plain text."""
        return self._loss(general=False)

    @property
    def general(self) -> str | None:
        """`TASK/METRIC` of the loss on text that has nothing to do with the task."""
        return self._loss(general=True)

    def edits(self) -> list[MeasuredEdit]:
        """Every edit at every strength, in the order of the run."""
        found = []
        for name, variant in self.record["variants"].items():
            if name == BASE:
                continue
            spec = variant["spec"]
            options = spec["init_args"]
            found.append(
                MeasuredEdit(
                    name=name,
                    edit=variant["edit"],
                    kind=spec["class_path"].rsplit(".", 1)[-1],
                    alpha=float(options["alpha"]),
                    control=options.get("guide") in _CONTROL_GUIDES,
                    task=self._change(name, self.task),
                    general=self._change(name, self.general),
                )
            )
        return found

    def _loss(self, general: bool) -> str | None:
        for name, about in self.tasks.items():
            plain = str(about["config"].get("class_path", "")).endswith(".TextLoss")
            if plain == general and (general or "loss" in about["metrics"]):
                return f"{name}/loss"
        return None

    def _change(self, variant: str, metric: str | None) -> Change | None:
        if metric is None:
            return None
        task, name = metric.rsplit("/", 1)
        t = self.comparison
        mine = t[
            (t["task"] == task)
            & (t["metric"] == name)
            & (t["other"] == variant)
            & (t["subject"] == ALL)
        ]
        if not len(mine):
            return None
        row = mine.iloc[0]
        difference, low, high = (float(row[k]) for k in ("difference", "low", "high"))
        return Change(difference, low, high, finite(float(row["p"])))


def read_measured(run: Path, weights: object, layers: Sequence[int]) -> Measured | None:
    """The run's measured edits; None where `measure` was not run into it.

    Args:
        run: the run folder.
        weights: SHA-256 of the model that the run is about.
        layers: the chosen ones.

    Raises:
        MissingFile: `measure` was stopped before its end.
        CorruptFile: a file is damaged, or of another format or version.
        StaleStore: they are of another model, or of layers chosen before.
    """
    import pandas as pd
    import pyarrow as pa

    folder = run / FOLDER
    if not folder.is_dir():
        return None
    missing = [n for n in (RECORD, COMPARISON) if not (folder / n).is_file()]
    if missing:
        raise MissingFile(
            f"{folder} is incomplete: no {', '.join(missing)}. Run measure again (with out: "
            f"{folder}), or remove the folder."
        )
    record = read_json(folder / RECORD)
    check_format(folder / RECORD, record, FORMAT, VERSION, "measure")
    base = read_results(folder / "results" / BASE).info
    try:
        comparison = pd.read_parquet(folder / COMPARISON)
    except (pa.ArrowException, OSError) as e:
        raise CorruptFile(folder / COMPARISON, f"no parquet ({e})", "Run measure again.") from e
    found = Measured(record, base["tasks"], comparison, base["model"].get("weights_sha256"))
    again = f"Run measure again, into an empty {folder}."
    if None not in (found.weights, weights) and found.weights != weights:
        raise StaleStore(
            f"{folder} measured edits of a model with other weights ({str(found.weights)[:12]}) "
            f"than the run's ({str(weights)[:12]}). {again}"
        )
    for name, variant in record["variants"].items():
        edited = _edited_layers(variant)
        if edited and edited != sorted(layers):
            raise StaleStore(
                f"{run}/layers chose layers {sorted(layers)}, but {name} in {folder} edited layers "
                f"{edited}. {again}"
            )
    return found


def _edited_layers(variant: Mapping[str, Any]) -> list[int]:
    """Layers of an edit that took them from a selection file; empty for any other."""
    spec = variant["spec"]
    if spec is None or not isinstance(spec["init_args"].get("layers"), str):
        return []
    numbers = {int(m[1]) for m in map(_LAYER.search, variant["changes"]) if m}
    return sorted(numbers)
