"""What a run of a language model left in its folder: SAEs, layer choice, injections, export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salve_lm.commands.inject import FORMAT as INJECTION
from salve_lm.commands.inject import RECORD
from salve_lm.commands.inject import VERSION as INJECTION_VERSION
from salve_lm.commands.projection_energy import FILE as PROJECTION_FILE
from salve_lm.commands.projection_energy import FORMAT as PROJECTION
from salve_lm.commands.projection_energy import VERSION as PROJECTION_VERSION
from salve_lm.errors import CorruptFile, MissingFile, StaleStore
from salve_lm.hashing import hash_file
from salve_lm.report.language_measured import FOLDER as EDITS
from salve_lm.report.language_measured import Measured, read_measured
from salve_lm.report.material import Config, check_format, read_json
from salve_lm.specificity.selection_file import LayerSelection, check_model, read_selection
from salve_lm.task_vectors.record import read_record
from salve_lm.tasks.results import read_results

if TYPE_CHECKING:
    import pandas as pd

# folders that only runs of language models have
STAGES = ("saes", "layers", "inject")
# file a stage leaves -> the command that makes it
NEEDED = {
    "layers/layers.json": "select_layers (with out: RUN/layers)",
    "layers/features.parquet": "select_layers (with out: RUN/layers)",
    f"inject/{RECORD}": "inject (with out: RUN/inject)",
    "inject/compare/compare.parquet": "inject (with out: RUN/inject)",
    "exported/edit.json": "edit (a task vector on a --source folder, with out: RUN/exported)",
}
SAES = "fit (SAEGroupTraining, with out: RUN/saes)"
COMMANDS = {"layers": "select_layers", "inject": "inject", EDITS: "measure", "exported": "edit"}


@dataclass(frozen=True)
class LanguageRun:
    """What a run folder holds.

    Attributes:
        run: the folder.
        selection: the chosen layers, and every score of every layer.
        features: latents with texts, a row a window.
        injection: `inject/injection.json`.
        tasks: name -> entry of the base model's `results.json`: config, metrics, n.
        base: that file's `model`, and `versions`.
        comparison: paired tests of every variant against the base model.
        projection: `inject/projection.json`; None where no projection was injected.
        exported: `exported/edit.json`.
        measured: what `measure` found about other edits; None where it was not run.
        saes: SAE folder name -> its `cfg.json` and `metrics.json`, merged; empty for public ones.
        configs: in the order in which they were run.
    """

    run: Path
    selection: LayerSelection
    features: pd.DataFrame
    injection: dict[str, Any]
    tasks: Mapping[str, Any]
    base: dict[str, Any]
    comparison: pd.DataFrame
    projection: dict[str, Any] | None
    exported: dict[str, Any]
    measured: Measured | None
    saes: dict[str, dict[str, Any]]
    configs: list[Config]

    @property
    def name(self) -> str:
        """As the user calls the run, but never by where it lies on a machine."""
        return self.run.name if self.run.is_absolute() else self.run.as_posix()

    @property
    def variants(self) -> Mapping[str, Mapping[str, Any]]:
        """Variant -> kind, layers, spec, summary, changes."""
        found: Mapping[str, Mapping[str, Any]] = self.injection["variants"]
        return found


def is_language_run(run: Path) -> bool:
    """Whether `run` holds stages of a language model."""
    return any((run / name).is_dir() for name in STAGES)


def read_language_run(run: Path) -> LanguageRun:
    """Read and check all of it.

    Raises:
        MissingFile: a stage is missing; names the commands.
        CorruptFile: a file is damaged, or of another format or version.
        StaleStore: injection or edits were made with other layers than `layers/` chose, or with
            another model.
    """
    import pandas as pd

    missing = [name for name in NEEDED if not (run / name).is_file()]
    if missing:
        stages = "; ".join(dict.fromkeys(NEEDED[m] for m in missing))
        raise MissingFile(f"{run} is incomplete: no {', '.join(missing)}. Run first: {stages}.")
    selection = read_selection(run / "layers")
    injection = read_json(run / "inject" / RECORD)
    check_format(run / "inject" / RECORD, injection, INJECTION, INJECTION_VERSION, "inject")
    try:
        results = read_results(run / "inject/results/base").info
        found = LanguageRun(
            run=run,
            selection=selection,
            features=_parquet(run / "layers/features.parquet", "select_layers", pd),
            injection=injection,
            tasks=results["tasks"],
            base={"model": results["model"], "versions": results["versions"]},
            comparison=_parquet(run / "inject/compare/compare.parquet", "inject", pd),
            projection=_projection(run, injection),
            exported=_exported(run),
            measured=None,
            saes=_saes(run, selection),
            configs=_configs(run),
        )
        _check_layers(found)
        weights = results["model"].get("weights_sha256")
        found = replace(found, measured=read_measured(run, weights, selection.layers))
    except (KeyError, TypeError, AttributeError) as e:
        raise CorruptFile(run, f"not what the stages write ({e!r})", "Run the stages again.") from e
    return found


def _check_layers(found: LanguageRun) -> None:
    check_model(found.selection, {"weights": found.base["model"].get("weights_sha256")})
    injected = tuple(found.variants["selected"]["layers"])
    if injected != found.selection.layers:
        raise StaleStore(
            f"{found.run}/layers chose layers {list(found.selection.layers)}, but inject was run "
            f"with layers {list(injected)}. Run inject again, with layers: "
            f"{found.name}/layers/layers.json, into an empty {found.name}/inject."
        )


def _projection(run: Path, injection: Mapping[str, Any]) -> dict[str, Any] | None:
    path = run / "inject" / PROJECTION_FILE
    if not any(v["kind"].startswith("projected") for v in injection["variants"].values()):
        return None
    if not path.is_file():
        raise MissingFile(f"{path} is missing. Run first: {NEEDED[f'inject/{RECORD}']}.")
    data: dict[str, Any] = read_json(path)
    check_format(path, data, PROJECTION, PROJECTION_VERSION, "inject")
    return data


def _saes(run: Path, selection: LayerSelection) -> dict[str, dict[str, Any]]:
    """The run's own SAEs, in order of their layers."""
    found = {}
    for layer, about in sorted(selection.record["saes"].items(), key=lambda kv: int(kv[0])):
        source = str(about["source"])
        parts = Path(source).parts
        if about["sha256"] is None or parts[-2:-1] != ("saes",):
            continue  # a public release, or SAEs of another run
        folder = run / "saes" / parts[-1]
        if not (folder / "cfg.json").is_file():
            raise MissingFile(f"{run} is incomplete: no {folder / 'cfg.json'}. Run first: {SAES}.")
        metrics = folder / "metrics.json"
        config = read_json(folder / "cfg.json")
        measured = read_json(metrics) if metrics.is_file() else {}
        found[parts[-1]] = {**config, **measured, "layer": int(layer), "sha256": about["sha256"]}
    return found


def _exported(run: Path) -> dict[str, Any]:
    """`edit.json`; the weights beside it, where it has their hashes, must be those it tells of."""
    record = read_record(run / "exported/edit.json")
    for entry in record["result"]["files"]:
        path = run / "exported" / Path(entry["name"]).name
        if entry.get("sha256") and path.is_file() and hash_file(path) != entry["sha256"]:
            why = "it is not what exported/edit.json was written with: changed or cut off since"
            raise CorruptFile(path, why, "Make it again (edit).")
    return record


def _parquet(path: Path, command: str, pd: Any) -> pd.DataFrame:
    import pyarrow as pa

    try:
        return pd.read_parquet(path)
    except (pa.ArrowException, OSError) as e:
        raise CorruptFile(path, f"no parquet ({e})", f"Run {command} again.") from e


def _configs(run: Path) -> list[Config]:
    """Configs of the run's folders: trainings first, then the later stages."""
    import yaml

    found = []
    for path in sorted(run.glob("*/config.yaml")):
        text = path.read_text(errors="replace")
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise CorruptFile(path, f"not readable as YAML ({e})", "Restore or remove it.") from e
        command = COMMANDS.get(path.parent.name, "fit")
        shown = without_place(text, run)
        name = path.relative_to(run).as_posix()
        data = data if isinstance(data, dict) else {}
        found.append(Config(name, command, hash_file(path), shown, data))
    order = ["fit", *COMMANDS.values()]
    return sorted(found, key=lambda c: order.index(c.command))


def without_place(text: str, run: Path) -> str:
    """`text` with paths from the folder in which the run lies, and not from the machine's root."""
    where = run.resolve().parent.as_posix()
    return text.replace(f"{where}/", "") if len(where) > 1 else text
