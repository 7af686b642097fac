"""What a sweep leaves behind: tables other tools open, ready configs, and a table on the screen.

Layout of the folder:

    results.csv               one row an (edit, class): chosen strength, before and after
    curves.parquet            one row an (edit, class, split, strength)
    equal_suppression.csv     one row an (edit, level): strengths that suppress alike, compared
    baseline.json             the unedited model
    removal.json              suppressed, erased or removed: the figures of every suppressing edit
    edits/EDIT_CLASS.yaml     a chosen headline edit, as a config for `edit`
    validate/EDIT_CLASS.yaml  the same with its controls, as a config for `validate`
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from salve_lm.commands.equal_suppression import equal_suppression, table_of
from salve_lm.edits.spec import spec_to_dict
from salve_lm.strength import Outcome

if TYPE_CHECKING:
    from salve_lm.commands.swept import Swept


def write_sweep(
    folder: Path,
    swept: Sequence[Swept],
    headline: Sequence[str],
    class_names: Sequence[str],
    baseline: Mapping[str, Outcome],
    accuracy: Mapping[str, float],
    labels: Sequence[Mapping[str, Any]],
    sae: str | None,
    features: str | None,
) -> None:
    """Write the layout above into `folder`."""
    import pandas as pd
    import yaml

    pd.DataFrame([_result(s, headline, class_names) for s in swept]).to_csv(
        folder / "results.csv", index=False
    )
    pd.DataFrame([p for s in swept for p in _points(s, class_names)]).to_parquet(
        folder / "curves.parquet", index=False
    )
    pd.DataFrame(equal_suppression(swept)).to_csv(folder / "equal_suppression.csv", index=False)
    unedited = {
        split: {
            "accuracy": accuracy[split],
            "per_class": dict(zip(class_names, o.per_class, strict=True)),
        }
        for split, o in baseline.items()
    }
    (folder / "baseline.json").write_text(json.dumps(unedited, indent=2) + "\n")
    text = json.dumps(list(labels), indent=1, allow_nan=False)
    (folder / "removal.json").write_text(text + "\n")
    for kind in ("edits", "validate"):
        (folder / kind).mkdir()
    for s in swept:
        if s.edit in headline and s.spec.alpha > 0:
            name = f"{file_name(s.edit)}_{file_name(class_names[s.target])}.yaml"
            edits = [_ready(s, class_names, sae, features)]
            callbacks = [
                {"class_path": "salve_lm.callbacks.WeightEditing", "init_args": {"edits": edits}},
                {"class_path": "salve_lm.callbacks.CompareEdits"},
            ]
            for kind, config in (
                ("edits", {"edits": edits}),
                ("validate", {"trainer": {"callbacks": callbacks}}),
            ):
                (folder / kind / name).write_text(yaml.safe_dump(config, sort_keys=False))


def file_name(text: str) -> str:
    """`text` with everything but letters, digits, dot and dash replaced by an underscore."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text)


def _ready(
    s: Swept, class_names: Sequence[str], sae: str | None, features: str | None
) -> dict[str, Any]:
    """The chosen edit as a config entry that stands on its own."""
    entry = spec_to_dict(s.spec)
    args = entry["init_args"]
    for key, default in (("sae", sae), ("features", features)):
        if key in args and args[key] is None:
            args[key] = default
    args["name"] = f"{s.edit}:{class_names[s.target]}"
    entry["init_args"] = {k: v for k, v in args.items() if v is not None}
    return entry


def _result(s: Swept, headline: Sequence[str], class_names: Sequence[str]) -> dict[str, Any]:
    row = {
        "edit": s.edit,
        "kind": type(s.spec).__name__,
        "control": s.edit not in headline,
        "direction": s.direction,
        "target_class": class_names[s.target],
        "features": " ".join(map(str, s.plan.features)),
        "rows": str(getattr(s.spec, "rows", "")),
        "alpha": s.spec.alpha,
        "floor": s.floor,
    }
    for split in s.before:
        row |= {
            f"{split}_target_before": s.before[split].target,
            f"{split}_target_after": s.after[split].target,
            f"{split}_others_before": s.before[split].others,
            f"{split}_others_after": s.after[split].others,
        }
    return row


def _points(s: Swept, class_names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "edit": s.edit,
            "target_class": class_names[s.target],
            "direction": s.direction,
            "split": split,
            "alpha": alpha,
            "target": o.target,
            "others": o.others,
            "target_logit": o.target_logit,
            "per_class": o.per_class,
        }
        for split, curve in s.curves.items()
        for alpha, o in zip([0.0, *s.alphas], [s.before[split], *curve], strict=True)
    ]


def print_tables(
    swept: Sequence[Swept],
    headline: Sequence[str],
    class_names: Sequence[str],
    accuracy: float,
    labels: Sequence[Mapping[str, Any]],
    out: str,
) -> None:
    """The headline edits class by class, and every edit and control averaged over classes."""
    found = {(r["edit"], r["target_class"]): r for r in labels}
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name in headline:
        mine = [s for s in swept if s.edit == name]
        if not mine:
            continue
        table = Table(
            title=f"{name}: held-out accuracy in %, unedited {100 * accuracy:.1f}  ({out})",
            title_justify="left",
        )
        for column in ("class", "latent", "alpha", "target", "others", "floor", "label"):
            table.add_column(column, justify="left" if column == "class" else "right")
        for s in mine:
            label = found.get((name, class_names[s.target]), {})
            latents = s.plan.features
            table.add_row(
                class_names[s.target],
                " ".join(map(str, latents[:3])) + (" ..." if len(latents) > 3 else ""),
                _strength(s),
                f"{_pct(s.before['val'].target)} → {_pct(s.after['val'].target)}",
                f"{_pct(s.before['val'].others)} → {_pct(s.after['val'].others)}",
                _pct(s.floor),
                str(label.get("label", "")),
            )
        console.print(table)
    console.print(_averages(swept, headline))
    equal = equal_suppression(swept)
    if equal:
        console.print(table_of(equal))


def _strength(s: Swept) -> str:
    if not s.spec.alpha:
        return "none"
    idle = s.direction == "enhance" and s.after["train"].target <= s.before["train"].target
    # the smallest of strengths that all do nothing: say so rather than let it look like a choice
    return f"{s.spec.alpha:g}" + " (no gain in training)" * idle


def _averages(swept: Sequence[Swept], headline: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(
        title="All edits and controls, mean over the classes edited (worst class)",
        title_justify="left",
    )
    for column in ("edit", "", "target", "others"):
        table.add_column(column, justify="right" if column in ("target", "others") else "left")
    for name in dict.fromkeys(s.edit for s in swept):
        mine = [s for s in swept if s.edit == name]
        target = [s.after["val"].target for s in mine]
        others = [s.after["val"].others for s in mine]
        worst = min(target) if mine[0].direction == "enhance" else max(target)
        table.add_row(
            name,
            mine[0].direction if name in headline else "control",
            f"{_pct(fmean(target))} ({_pct(worst)})",
            f"{_pct(fmean(others))} ({_pct(min(others))})",
        )
    return table


def _pct(share: float) -> str:
    return "" if share != share else f"{100 * share:.1f}"
