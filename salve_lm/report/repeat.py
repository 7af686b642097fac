"""The section that says how to repeat a run, whatever kind of run it was."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import salve_lm
from salve_lm.report.limits import CONFIG_BYTES, MAX_CONFIGS
from salve_lm.report.markup import left_out, row, section, table, text


class KeptConfig(Protocol):
    """A config that the run folder keeps."""

    @property
    def path(self) -> str:
        """In the run folder."""
        ...

    @property
    def text(self) -> str:
        """As it stands there."""
        ...


def repeat_section(
    commands: str, versions: str, hashes: str, edits: str, configs: Sequence[KeptConfig]
) -> str:
    """Commands, versions and hashes; below them the exported edits and the configs in full.

    Args:
        commands: one a line.
        versions: a table, see `version_table`.
        hashes: a table.
        edits: the exported edits as a config for `edit`.
        configs: in the order of the stages.
    """
    shown = configs[:MAX_CONFIGS]
    return section(
        "repeat",
        "Repeat this run",
        "Every stage is one command. The configs that the run folder keeps and the exported edits "
        "are at the end of this page in full (on the screen; not in print).",
        f'<pre class="commands">{text(commands, 10**6)}</pre>',
        '<div class="split even"><div>',
        versions,
        "</div><div>",
        hashes,
        "</div></div>",
        _details("exported edits", edits),
        *(_details(c.path, c.text) for c in shown),
        left_out(len(shown), len(configs), "configs", "in the order of the stages"),
    )


def version_table(sources: Iterable[Mapping[str, Any]], configs: Sequence[KeptConfig]) -> str:
    """What the records of a run (those with `versions`) and its configs were written with."""
    found = {
        "salve_lm (this report)": salve_lm.__version__,
        "python (this report)": platform.python_version(),
    }
    for source in sources:
        found |= {str(k): str(v) for k, v in (source.get("versions") or {}).items()}
    first = next((c.text.splitlines()[0] for c in configs if c.text), "")
    if first.startswith("# lightning") and "==" in first:
        found["lightning"] = first.rsplit("==", 1)[1]
    rows = [row(text(k), f"<code>{text(v)}</code>") for k, v in sorted(found.items())]
    return table(["version of", ""], rows, "plain")


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
