"""What the report shows beyond `summary.json`: curves, controls, labels, provenance; checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from salve_lm.errors import CorruptFile, MissingFile
from salve_lm.hashing import hash_file

# folder -> command that wrote it, where the folder keeps its config.yaml
COMMANDS = {"features": "discover", "sweep": "sweep", "thresholds": "validate", "exported": "edit"}
# file -> format and version this package writes, and the command that makes it again
FORMATS = {
    "features/index.json": ("salve_lm.features", 1, "discover"),
    "exported/edit.json": ("salve_lm.edit", 1, "edit"),
}
REMOVAL = "sweep/removal.json"


class Curve(NamedTuple):
    """Accuracies of one edit, class and split, in order of alpha (0: unedited)."""

    alpha: list[float]
    target: list[float]
    others: list[float]


class Control(NamedTuple):
    """A comparator or control of the sweep."""

    kind: str  # class name of its spec
    direction: str


class Config(NamedTuple):
    """A config file kept in the run folder."""

    path: str  # below the run folder
    command: str  # subcommand that took it
    sha256: str
    text: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Material:
    """What a run folder holds beyond its summary.

    Attributes:
        run: the folder.
        curves: (edit, class, split) -> curve, for headline edits.
        side_effects: (edit, class) -> held-out accuracy per class at the chosen strength, in the
            order of the summary's classes.
        controls: name -> what kind of edit it is.
        thresholds: rows of `critical_thresholds.json`.
        removal: edit name ("suppress:three") -> entry of `removal.json`; empty without one.
        record: `edit.json`.
        features: `index.json` of the feature table.
        configs: in the order in which they were run.
    """

    run: Path
    curves: dict[tuple[str, str, str], Curve]
    side_effects: dict[tuple[str, str], list[float]]
    controls: dict[str, Control]
    thresholds: list[dict[str, Any]]
    removal: dict[str, dict[str, Any]]
    record: dict[str, Any]
    features: dict[str, Any]
    configs: list[Config]

    @property
    def name(self) -> str:
        """How the page calls the run: as the user did, but never by where it lies on a machine."""
        return self.run.name if self.run.is_absolute() else self.run.as_posix()


def check_versions(run: Path) -> None:
    """Refuse a run that another version wrote; files that are missing are not looked at.

    Raises:
        CorruptFile: another format or version, or no JSON; names the file and the cure.
    """
    for name, (form, version, command) in FORMATS.items():
        if (run / name).is_file():
            check_format(run / name, read_json(run / name), form, version, command)


def check_hashes(run: Path) -> None:
    """Refuse weights or features that are not those that the run's records speak of.

    Exported weights may have been moved elsewhere; a feature table belongs to its folder.

    Raises:
        CorruptFile: a file was changed after it was written.
        MissingFile: the feature table lacks a file that its index names.
    """
    for name, (_, _, command) in FORMATS.items():
        if not (run / name).is_file():
            continue
        for file, expected in (read_json(run / name).get("sha256") or {}).items():
            path = run / Path(name).parent / Path(file).name
            if path.is_file() and hash_file(path) != expected:
                why = f"it is not what {name} was written with: changed or cut off since"
                raise CorruptFile(path, why, f"Make it again ({command}).")
            if not path.is_file() and command == "discover":
                raise MissingFile(f"{run / name} names {file}, which is gone. Run {command} again.")


def check_format(path: Path, data: Any, form: str, version: int, command: str) -> None:
    """Raise CorruptFile unless `data` says that it is `form` in `version`."""
    cure = f"Make it again ({command}), or use the salve_lm that wrote it."
    if not isinstance(data, dict) or data.get("format") != form:
        raise CorruptFile(path, f"its format is not {form}", cure)
    if data.get("version") != version:
        why = f"written in version {data.get('version')} of {form}, this salve_lm reads {version}"
        raise CorruptFile(path, why, cure)


def read_material(run: Path, summary: Mapping[str, Any], classes: Sequence[str]) -> Material:
    """Read what the report shows of `classes`.

    Raises:
        CorruptFile: a file is damaged or not what the stages write.
    """
    edits = [e for e in summary["edits"] if e["target_class"] in set(classes)]
    try:
        curves, side_effects = _curves(run, edits)
        return Material(
            run=run,
            curves=curves,
            side_effects=side_effects,
            controls=_controls(run),
            thresholds=list(read_json(run / "thresholds/critical_thresholds.json")),
            removal=read_removal(run),
            record=read_json(run / "exported/edit.json"),
            features=read_json(run / "features/index.json"),
            configs=_configs(run),
        )
    except (KeyError, ValueError, TypeError) as e:
        if isinstance(e, CorruptFile):
            raise
        raise CorruptFile(run, f"not what the stages write ({e!r})", "Run the stages again.") from e


def read_removal(run: Path) -> dict[str, dict[str, Any]]:
    """Edit name -> what the edit did to the features (`sweep/removal.json`); empty without one.

    Raises:
        CorruptFile: not a list of entries with edit, target_class and label.
    """
    path = run / REMOVAL
    if not path.is_file():
        return {}
    entries = read_json(path)
    needed = {"edit", "target_class", "label"}
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and needed <= e.keys() for e in entries
    ):
        why = f"expected a list of entries with {', '.join(sorted(needed))}"
        raise CorruptFile(path, why, "Run its stage again.")
    return {f"{e['edit']}:{e['target_class']}": e for e in entries}


def labels(removal: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Edit name -> label, recoverability and runner-up share, as `summary.json` holds them."""
    keys = ("label", "recoverability", "runner_up_share")
    return {name: {k: entry.get(k) for k in keys} for name, entry in removal.items()}


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        CorruptFile: not readable as JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise CorruptFile(path, f"not readable as JSON ({e})", "Run its stage again.") from e


def _curves(
    run: Path, edits: Sequence[Mapping[str, Any]]
) -> tuple[dict[tuple[str, str, str], Curve], dict[tuple[str, str], list[float]]]:
    """Curves of `edits`, and the accuracies per class at their chosen strengths."""
    import pandas as pd

    path = run / "sweep/curves.parquet"
    # filtered while reading: with many classes the column of per-class accuracies is large
    wanted = [
        ("edit", "in", sorted({e["edit"] for e in edits}) or [""]),
        ("target_class", "in", sorted({e["target_class"] for e in edits}) or [""]),
    ]
    keys = ["edit", "target_class", "split", "alpha"]
    frame = pd.read_parquet(path, columns=[*keys, "target", "others"], filters=wanted)
    curves: dict[tuple[str, str, str], Curve] = {}
    for (edit, name, split), mine in frame.groupby(keys[:3], sort=False):
        mine = mine.sort_values("alpha")
        curves[str(edit), str(name), str(split)] = Curve(
            *(mine[k].tolist() for k in ("alpha", "target", "others"))
        )
    chosen = {(e["edit"], e["target_class"]): e["alpha"] for e in edits}
    at_chosen = [
        *wanted,
        ("split", "==", "val"),
        ("alpha", "in", sorted(set(chosen.values())) or [0.0]),
    ]
    frame = pd.read_parquet(path, columns=[*keys, "per_class"], filters=at_chosen)
    found = {
        (edit, name): list(map(float, per_class))
        for edit, name, alpha, per_class in zip(
            *(frame[k] for k in ("edit", "target_class", "alpha", "per_class")), strict=True
        )
        if chosen.get((edit, name)) == alpha
    }
    return curves, found


def _controls(run: Path) -> dict[str, Control]:
    import pandas as pd

    columns = ["edit", "kind", "control", "direction"]
    frame = pd.read_csv(run / "sweep/results.csv", usecols=columns)
    mine = frame[frame["control"]].drop_duplicates("edit")
    return {
        str(e): Control(str(k), str(d))
        for e, k, d in zip(mine["edit"], mine["kind"], mine["direction"], strict=True)
    }


def _configs(run: Path) -> list[Config]:
    """Configs of the run's folders: backbones, then autoencoders, then the later stages."""
    found = []
    for path in sorted(run.glob("*/config.yaml")):
        text = path.read_text(errors="replace")
        command = COMMANDS.get(path.parent.name, "fit")
        name = path.relative_to(run).as_posix()
        found.append(Config(name, command, hash_file(path), text, _yaml(path, text)))
    stages = ["fit", *COMMANDS.values()]
    return sorted(found, key=lambda c: (stages.index(c.command), "SAETraining" in c.text))


def _yaml(path: Path, text: str) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise CorruptFile(path, f"not readable as YAML ({e})", "Restore it, or remove it.") from e
    return data if isinstance(data, dict) else {}
