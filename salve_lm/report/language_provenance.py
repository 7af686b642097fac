"""How to repeat a language run: commands, configs, versions, hashes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from salve_lm.report.language_run import COMMANDS, LanguageRun, without_place
from salve_lm.report.markup import row, table, text
from salve_lm.report.repeat import repeat_section, version_table


def provenance_section(found: LanguageRun, summary: Mapping[str, Any]) -> str:
    """Everything needed to repeat the run."""
    return repeat_section(
        _commands(found),
        version_table((found.base, found.selection.record, found.exported), found.configs),
        _hashes(found, summary),
        _exported_edits(found),
        found.configs,
    )


def _commands(found: LanguageRun) -> str:
    run, lines = found.name, []
    kept = {c.command: c.path for c in found.configs if c.command != "fit"}
    fits = [c for c in found.configs if c.command == "fit"]
    lines += [f"python -m salve_lm fit --config {run}/{c.path}" for c in fits]
    if not fits:
        lines.append("# the run folder keeps no config of a training")
    for folder, command in COMMANDS.items():
        if not (found.run / folder).is_dir():
            continue  # a stage that a run need not have
        if command in kept:
            lines.append(f"python -m salve_lm {command} --config {run}/{kept[command]}")
        else:
            lines.append(
                f"python -m salve_lm {command} --config ...  # wrote {run}/{folder}; the run "
                "folder keeps no config of this stage"
            )
    lines += [
        "# the exported weights again, from the unedited ones and the record alone",
        'python -c "from salve_lm.task_vectors.record import rebuild_folder; '
        f"rebuild_folder('{run}/exported/edit.json', 'UNEDITED', 'rebuilt')\"",
        f"python -m salve_lm report {run}",
    ]
    return "\n".join(lines)


def _hashes(found: LanguageRun, summary: Mapping[str, Any]) -> str:
    record, model = found.selection.record, found.base["model"]
    known: dict[str, Any] = {
        "model the layers were chosen for": found.selection.model.get("weights"),
        "model injected into": model.get("weights_sha256"),
        "exported weights": summary["exported"]["sha256"],
        "base of the exported weights": found.exported["base"]["sha256"],
        **{f"{name} corpus": about["sha256"] for name, about in record["corpora"].items()},
        **{f"SAE of layer {n}": about["sha256"] for n, about in record["saes"].items()},
        **{c.path: c.sha256 for c in found.configs},
    }
    rows = [row(text(k), f"<code>{text(v, 80)}</code>") for k, v in known.items() if v]
    public = {n: a["source"] for n, a in record["saes"].items() if a["sha256"] is None}
    rows += [
        row(f"SAE of layer {n}", text(without_place(str(source), found.run), 80))
        for n, source in public.items()
    ]
    for name, about in record["corpora"].items():
        size = f"{about['documents']:,} documents, {about['tokens']:,} tokens counted"
        rows.append(row(f"{text(name)} corpus, size", size))
    return table(["SHA-256 of", ""], rows, "plain hashes")


def _exported_edits(found: LanguageRun) -> str:
    """The exported edits as a config for `edit`."""
    import yaml

    specs = [e["spec"] for e in found.exported["edits"]]
    return without_place(str(yaml.safe_dump({"edits": specs}, sort_keys=False)), found.run)
