"""Results of an evaluation on disk: one row a problem, so that any two runs compare later.

Layout of the folder:

    results.json       format, model, edits and how far they moved each tensor, versions; per task
                       its config, metrics, number of rows, summary and file
    TASK.parquet       one row a sample

`docs/guides/evaluate.md` describes the columns.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from salve_lm.atomic import atomic_folder
from salve_lm.errors import BadConfig, CorruptFile, MissingFile
from salve_lm.tasks.base import EvaluationTask, Row

if TYPE_CHECKING:
    import pandas as pd

FORMAT, VERSION = "salve-lm problem results", 1
FILE = "results.json"
# of tasks that name no metrics of their own
_USUAL_METRICS = ("exact_match", "math_verify", "loss")
_PACKAGES = ("salve-lm", "torch", "transformers", "math-verify", "sympy")


class Results(NamedTuple):
    """A folder of results, read.

    folder: where it lies.
    info: `results.json`.
    tables: task name -> one row a sample.
    """

    folder: Path
    info: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]

    def metrics(self, task: str) -> tuple[str, ...]:
        """Columns of `task` that say how good an answer is."""
        return tuple(self.info["tasks"][task]["metrics"])

    def options(self, task: str) -> dict[str, Any]:
        """Options of `task`, those of its problems and prompt among them, as `prompt.shots`."""
        return dict(_flat(self.info["tasks"][task]["config"], ""))


def write_results(
    folder: str | Path,
    tasks: Sequence[EvaluationTask],
    results: Mapping[str, Sequence[Row]],
    *,
    model: Mapping[str, Any],
    edits: Sequence[Mapping[str, Any]] = (),
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write the layout above; it appears whole or not at all.

    Args:
        folder: must not exist yet.
        tasks: that were run; each has rows in `results` under its name.
        results: task name -> rows.
        model: what identifies the model, as plain values: source, hash of the weights, dtype.
        edits: specs of the edits that were on, as plain values.
        changes: how far each edited tensor moved, by name.

    Raises:
        OutputExists, OutputUnwritable: see `atomic_folder`.
        BadConfig: two tasks whose names give one file, or a task without rows.
    """
    import pandas as pd

    described: dict[str, Any] = {}
    tables: dict[str, list[Row]] = {}
    files: dict[str, str] = {}
    for task in tasks:
        file = re.sub(r"[^A-Za-z0-9._-]+", "_", task.name) + ".parquet"
        if file in files:
            raise BadConfig(f"Tasks {files[file]!r} and {task.name!r} would both write {file}.")
        files[file] = task.name
        rows = results.get(task.name)
        if not rows:
            raise BadConfig(f"Task {task.name!r} has no rows to write.")
        tables[task.name] = [_with_loss(row) for row in rows]
        columns = tables[task.name][0]
        metrics = [m for m in getattr(task, "metrics", _USUAL_METRICS) if m in columns]
        described[task.name] = {
            "file": file,
            "n": len(rows),
            "metrics": metrics,
            "summary": task.summary(rows),
            "config": config_of(task),
        }
    info = {
        "format": FORMAT,
        "version": VERSION,
        "model": dict(model),
        "edits": [dict(edit) for edit in edits],
        "changes": {name: dict(change) for name, change in (changes or {}).items()},
        "tasks": described,
        "versions": {p: v for p in _PACKAGES if (v := _installed(p)) is not None},
    }
    text = json.dumps(info, indent=1) + "\n"
    with atomic_folder(folder) as partial:
        for name, task_info in described.items():
            pd.DataFrame(tables[name]).to_parquet(partial / task_info["file"], index=False)
        (partial / FILE).write_text(text, encoding="utf-8")
    return Path(folder)


def read_results(folder: str | Path) -> Results:
    """Read what `write_results` wrote.

    Raises:
        MissingFile: no such folder, or no results in it.
        CorruptFile: a file that is damaged, foreign, or of another version of the format.
    """
    import pandas as pd
    import pyarrow as pa

    folder = Path(folder)
    path = folder / FILE
    if not path.is_file():
        raise MissingFile(
            f"No {FILE} in {folder}. Give a folder that the callback ProblemResults wrote."
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CorruptFile(path, f"no JSON ({e})", "Run the task again.") from e
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise CorruptFile(path, f"not {FORMAT!r}", "Give what ProblemResults or inject wrote.")
    if info.get("version") != VERSION:
        raise CorruptFile(
            path, f"version {info.get('version')} of the format; this is {VERSION}",
            "Read it with the version of salve-lm that it names.",
        )  # fmt: skip
    tables = {}
    for name, task in info["tasks"].items():
        file = folder / task["file"]
        if not file.is_file():
            raise MissingFile(f"{file} is missing, though {path} lists it. Run the task again.")
        try:
            tables[name] = pd.read_parquet(file)
        except (pa.ArrowException, OSError) as e:
            raise CorruptFile(file, f"no parquet ({e})", "Run the task again.") from e
        if len(tables[name]) != task["n"]:
            raise CorruptFile(file, f"{len(tables[name])} rows, where {task['n']} were written")
    return Results(folder, info, tables)


def config_of(value: object) -> Any:
    """`value` as a config would have it: objects as class_path and init_args, the rest as it is.

    Reads the attributes that bear the names of init arguments.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): config_of(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [config_of(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    kind = type(value)
    arguments = {
        name: config_of(getattr(value, name))
        for name in inspect.signature(kind).parameters
        if hasattr(value, name)
    }
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        step = "" if key == "init_args" else f".{key}"
        yield from _flat(inner, f"{name}{step}".lstrip("."))


def _with_loss(row: Row) -> Row:
    """`row` with the loss per token, where it has the sum and the number of tokens only."""
    if "loss" in row or not {"nll", "tokens"} <= set(row):
        return row
    return {**row, "loss": row["nll"] / row["tokens"]}


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
