"""`report`: what a finished run found, in one table and one `summary.json`.

A run folder holds what the stages wrote: `sae/`, `features/`, `sweep/`, `thresholds/`, `exported/`
(see `docs/formats/run.md`). The run of a language model holds `saes/`, `layers/`, `inject/` and
`exported/` (`salve_lm.report.language_run`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salve_lm.alpha_crit.observed import observed
from salve_lm.atomic import atomic_file
from salve_lm.errors import CorruptFile, MissingFile
from salve_lm.report.html import REPORT, render_report
from salve_lm.report.language_run import is_language_run
from salve_lm.report.material import check_hashes, check_versions, labels, read_removal
from salve_lm.report.tables import print_summary

if TYPE_CHECKING:
    import pandas as pd

# file a stage leaves -> the command that makes it
NEEDED = {
    "sae/cfg.json": "fit (an autoencoder, with out: RUN/sae)",
    "sae/metrics.json": "fit (an autoencoder, with out: RUN/sae)",
    "features/index.json": "discover (with out: RUN/features)",
    "sweep/results.csv": "sweep (with out: RUN/sweep)",
    "sweep/curves.parquet": "sweep (with out: RUN/sweep)",
    "sweep/baseline.json": "sweep (with out: RUN/sweep)",
    "thresholds/critical_thresholds.json": "validate with the CriticalThreshold callback "
    "(out: RUN/thresholds)",
    "exported/edit.json": "edit (with out: RUN/exported)",
}


def report(run: str | Path) -> dict[str, Any]:
    """Collect `run` into `run/summary.json` and `run/report.html`, and print its closing table.

    Raises:
        MissingFile: no such folder, or a stage is missing; names the stages and their commands.
            Or an image that `cards/cards.json` names is missing.
        CorruptFile: one of the files cannot be read, or another version wrote it.
    """
    run = Path(run)
    if is_language_run(run):
        from salve_lm.report.language_html import report_language_run

        return report_language_run(run)
    check_versions(run)
    check_hashes(run)
    summary = summarise_run(run)
    summary["labels"] = labels(read_removal(run))
    summary["report"] = str(run / REPORT)
    page = render_report(run, summary)
    with atomic_file(run / REPORT) as path:
        path.write_text(page, encoding="utf-8")
    with atomic_file(run / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    print_summary(summary, run / "summary.json")
    return summary


def summarise_run(run: str | Path) -> dict[str, Any]:
    """The contents of `summary.json`; infinity becomes "inf", NaN becomes null."""
    import pandas as pd

    run = Path(run)
    _check_complete(run)
    try:
        baseline = _json(run / "sweep/baseline.json")["val"]
        results = pd.read_csv(run / "sweep/results.csv", dtype={"target_class": str})
        curves = pd.read_parquet(run / "sweep/curves.parquet")
        classes = list(baseline["per_class"])
        summary = {
            "baseline": baseline,
            "sae": _sae(run),
            "edits": [_edit(r) for r in _records(results[~results["control"]])],
            "controls": _controls(results[results["control"]]),
            "floor": {
                r["target_class"]: r["floor"]
                for r in _records(results[~results["control"] & results["floor"].notna()])
            },
            "alpha_crit": {
                row["class"]: _thresholds(row, results, curves, len(classes))
                for row in _json(run / "thresholds/critical_thresholds.json")
            },
            "exported": _exported(run),
        }
    except (KeyError, ValueError, TypeError) as e:
        raise CorruptFile(run, f"not what the stages write ({e!r})", "Run the stages again.") from e
    return _plain(summary)


def _check_complete(run: Path) -> None:
    if not run.is_dir():
        raise MissingFile(f"No run folder at {run}.")
    missing = [name for name in NEEDED if not (run / name).is_file()]
    if missing:
        stages = "; ".join(dict.fromkeys(NEEDED[m] for m in missing))
        raise MissingFile(f"{run} is incomplete: no {', '.join(missing)}. Run first: {stages}.")


def _sae(run: Path) -> dict[str, Any]:
    metrics = _json(run / "sae/metrics.json")
    return {
        "architecture": _json(run / "sae/cfg.json")["architecture"],
        **{k: metrics[k] for k in ("explained_variance", "l0", "dead_fraction")},
        "participation_ratio": metrics.get("participation_ratio"),
        "fire_threshold": metrics.get("fire_threshold"),
        "path": str(run / "sae"),
    }


def _edit(row: dict[str, Any]) -> dict[str, Any]:
    features = [int(f) for f in str(row["features"]).split()] if _given(row["features"]) else []
    return {
        "name": f"{row['edit']}:{row['target_class']}",
        "edit": row["edit"],
        "kind": row["kind"],
        "direction": row["direction"],
        "target_class": row["target_class"],
        "feature": features[0] if len(features) == 1 else features,
        "alpha": row["alpha"],
        "raised_on_training": _raised(row),
        "rows": row["rows"] if _given(row["rows"]) else "all",
        "target_accuracy_before": row["val_target_before"],
        "target_accuracy_after": row["val_target_after"],
        "other_accuracy_before": row["val_others_before"],
        "other_accuracy_after": row["val_others_after"],
    }


def _raised(row: dict[str, Any]) -> bool | None:
    """Whether an enhancement gained anything on the data its strength was chosen on."""
    if row["direction"] != "enhance":
        return None
    return bool(row["alpha"] and row["train_target_after"] > row["train_target_before"])


def _controls(results: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Mean over classes, and the worst class, of every comparator and control."""
    return {
        str(name): {
            "target_accuracy_after": float(mine["val_target_after"].mean()),
            "other_accuracy_after": float(mine["val_others_after"].mean()),
            "worst_target_accuracy_after": float(mine["val_target_after"].max()),
        }
        for name, mine in results.groupby("edit", sort=False)
    }


def _thresholds(
    row: dict[str, Any], results: pd.DataFrame, curves: pd.DataFrame, n_classes: int
) -> dict[str, Any]:
    """Thresholds of one class: in closed form, and seen in the sweep of the paper's edit."""
    found = {
        "feature": int(row["feature"]),
        "linear_median": row["linear_median"],
        "exact_median": row["exact_median"],
        "flip_median": row["flip_median"],
        "no_root_share": row["flip_no_root_share"],
        "exact_centred_median": row.get("exact_centred_median"),
        "exact_no_root_share": row["exact_no_root_share"],
        "linear_is_lower_bound_share": row.get("linear_is_lower_bound_share"),
        "re_entry_share": row["re_entry_share"],
        "left_out_share": row["left_out_share"],
        "observed": None,
    }
    swept = results[
        (results["kind"] == "DecoderGuided")
        & (results["direction"] == "suppress")
        & (results["rows"] == "class")
        & (results["features"].astype(str) == str(row["feature"]))
        & (results["target_class"] == row["class"])
        & ~results["control"]
    ]
    if len(swept):
        curve = curves[
            (curves["edit"] == swept.iloc[0]["edit"])
            & (curves["target_class"] == row["class"])
            & (curves["split"] == "val")
        ].sort_values("alpha")
        seen = observed(
            curve["alpha"].tolist(), curve["target"].tolist(), curve["target_logit"].tolist(),
            baseline=float(curve["target"].iloc[0]), chance=1 / n_classes,
        )  # fmt: skip
        found["observed"] = {
            k: getattr(seen, k) for k in ("half_accuracy", "below_chance", "logit_below_zero")
        }
    return found


def _exported(run: Path) -> dict[str, Any]:
    record = _json(run / "exported/edit.json")
    return {
        "path": str(run / "exported/model.safetensors"),
        "sha256": record["sha256"]["model.safetensors"],
        "matches_live": record["check"]["matches_live"],
        "checked_on": record["check"]["checked_on"],
    }


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise CorruptFile(path, f"not readable as JSON ({e})", "Run its stage again.") from e


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return frame.to_dict("records")


def _given(value: Any) -> bool:
    return value is not None and value == value and value != ""


def _plain(value: Any) -> Any:
    """`value` without infinities and NaN, which JSON cannot hold."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value
