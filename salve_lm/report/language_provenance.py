"""How to repeat a language run: commands, configs, versions, hashes."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import salve_lm
from salve_lm.report.language_run import LanguageRun, without_place
from salve_lm.report.limits import CONFIG_BYTES, MAX_CONFIGS
from salve_lm.report.markup import left_out, row, section, table, text


def repeat_section(found: LanguageRun, summary: Mapping[str, Any]) -> str:
    """Everything needed to repeat the run."""
    shown = found.configs[:MAX_CONFIGS]
    return section(
        "repeat",
        "Repeat this run",
        "Every stage is one command. The configs that the run folder keeps are at the end of this "
        "page in full (on the screen; not in print).",
        f'<pre class="commands">{text(_commands(found), 10**6)}</pre>',
        '<div class="split even"><div>',
        _versions(found),
        "</div><div>",
        _hashes(found, summary),
        "</div></div>",
        _details("exported edits", _exported_edits(found)),
        *(_details(c.path, c.text) for c in shown),
        left_out(len(shown), len(found.configs), "configs", "in the order of the stages"),
    )


def _commands(found: LanguageRun) -> str:
    run, lines = found.name, []
    kept = {c.command: c.path for c in found.configs if c.command != "fit"}
    fits = [c for c in found.configs if c.command == "fit"]
    lines += [f"python -m salve_lm fit --config {run}/{c.path}" for c in fits]
    if not fits:
        lines.append("# the run folder keeps no config of a training")
    stages = (("select_layers", "layers"), ("inject", "inject"), ("edit", "exported"))
    for command, folder in stages:
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


def _versions(found: LanguageRun) -> str:
    versions = {
        "salve_lm (this report)": salve_lm.__version__,
        "python (this report)": platform.python_version(),
    }
    for source in (found.base, found.selection.record, found.exported):
        versions |= {str(k): str(v) for k, v in (source.get("versions") or {}).items()}
    first = next((c.text.splitlines()[0] for c in found.configs if c.text), "")
    if first.startswith("# lightning") and "==" in first:
        versions["lightning"] = first.rsplit("==", 1)[1]
    rows = [row(text(k), f"<code>{text(v)}</code>") for k, v in sorted(versions.items())]
    return table(["version of", ""], rows, "plain")


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


def _details(name: str, content: str) -> str:
    whole = content.encode()
    shown = whole[:CONFIG_BYTES].decode(errors="ignore")
    cut = len(whole) - CONFIG_BYTES
    note = f"\n# ... {cut:,} bytes left out" if cut > 0 else ""
    return (
        f"<details><summary><code>{text(name, 200)}</code> "
        f"({len(content.splitlines())} lines)</summary>"
        f"<pre>{text(shown + note, 10**9)}</pre></details>"
    )
