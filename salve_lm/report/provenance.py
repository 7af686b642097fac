"""The section that says how to repeat the run: commands, configs, versions, hashes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from salve_lm.commands.sweep_files import file_name
from salve_lm.report.markup import row, table, text
from salve_lm.report.material import Material
from salve_lm.report.repeat import repeat_section, version_table


def model_name(material: Material) -> str:
    """The model in a word or two."""
    model = material.record.get("model") or {}
    name = model.get("name")
    return str(name) if name else "a network"


def data_name(material: Material) -> str:
    """The data in a word or two, from the run's configs; empty where none is kept."""
    for config in material.configs:
        args = (config.data.get("data") or {}) if isinstance(config.data.get("data"), dict) else {}
        source = (args.get("init_args") or {}).get("source")
        for entry in (source, args):
            if isinstance(entry, dict) and entry.get("class_path"):
                return str(entry["class_path"]).rsplit(".", 1)[-1]
    return ""


def provenance_section(material: Material, summary: Mapping[str, Any]) -> str:
    """Everything needed to repeat the run."""
    return repeat_section(
        _commands(material),
        version_table((material.features, material.record), material.configs),
        _hashes(material, summary),
        _specs(material),
        material.configs,
    )


def _commands(material: Material) -> str:
    run, lines = material.name, []
    kept = {c.command for c in material.configs}
    stages = (("discover", "features"), ("sweep", "sweep"), ("validate", "thresholds"))
    for c in material.configs:
        if c.command == "fit":
            lines.append(f"python -m salve_lm fit --config {run}/{c.path}")
    for command, folder in stages:
        if command in kept:
            lines.append(f"python -m salve_lm {command} --config {run}/{folder}/config.yaml")
        else:
            extra = " with the CriticalThreshold callback" if command == "validate" else ""
            lines.append(
                f"python -m salve_lm {command} --config ...  # wrote {run}/{folder}{extra}; "
                "the run folder keeps no config of this stage"
            )
    edit = "python -m salve_lm edit --config "
    if "edit" in kept:
        lines.append(f"{edit}{run}/exported/config.yaml")
    else:
        ready = [c for c in map(_ready_config, material.record.get("edits", [])) if c]
        there = [c for c in ready if (material.run / c).is_file()]
        lines.append(" ".join([f"{edit}...", *(f"--config {run}/{c}" for c in there)])
                     + f"  # wrote {run}/exported")  # fmt: skip
    lines += [
        "# the exported weights again, from the unedited ones and the record alone",
        'python -c "from salve_lm.edits.export import rebuild; '
        f"rebuild('{run}/exported/edit.json', 'UNEDITED.safetensors', 'rebuilt')\"",
        f"python -m salve_lm report {run}",
    ]
    return "\n".join(lines)


def _hashes(material: Material, summary: Mapping[str, Any]) -> str:
    provenance = material.features.get("provenance") or {}
    known = {
        "unedited weights": (material.record.get("base") or {}).get("sha256"),
        "exported model.safetensors": summary["exported"]["sha256"],
        "data": provenance.get("data"),
        "autoencoder": provenance.get("sae"),
        "backbone of the features": provenance.get("backbone"),
        "features.safetensors": (material.features.get("sha256") or {}).get("features.safetensors"),
    }
    rows = [row(text(k), _hash(v)) for k, v in known.items() if v]
    rows += [row(text(c.path), _hash(c.sha256)) for c in material.configs]
    rows += [
        row(text(k), text(provenance[k]))
        for k in ("site", "split", "firing_threshold")
        if k in provenance
    ]
    return table(["SHA-256 of", ""], rows, "plain hashes")


def _hash(value: Any) -> str:
    return f"<code>{text(value, 80)}</code>"


def _ready_config(edit: Mapping[str, Any]) -> str:
    """Where the sweep left the config of an exported edit, by the edit's name."""
    name, _, target = str(edit.get("title", "")).partition(":")
    return f"sweep/edits/{file_name(name)}_{file_name(target)}.yaml"


def _specs(material: Material) -> str:
    """The exported edits as a config for `edit`."""
    import yaml

    specs = [e["spec"] for e in material.record.get("edits", []) if "spec" in e]
    return str(yaml.safe_dump({"edits": specs}, sort_keys=False))
