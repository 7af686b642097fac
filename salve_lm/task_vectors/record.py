"""`edit.json` of an edited model folder, and the folder made again from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import salve_lm
from salve_lm.edits.context import EditContext
from salve_lm.edits.records import op_from_dict, op_to_dict
from salve_lm.edits.spec import spec_to_dict
from salve_lm.errors import CorruptFile, MissingFile, StaleStore
from salve_lm.hashing import hash_file
from salve_lm.task_vectors.carried import RECORD
from salve_lm.task_vectors.digests import file_entries
from salve_lm.task_vectors.folder_plan import FolderPlan, folder_changes
from salve_lm.task_vectors.safetensors_header import CODES, Header, TensorInfo
from salve_lm.task_vectors.tensor_files import TensorFiles
from salve_lm.task_vectors.weights import FolderWeights
from salve_lm.task_vectors.writer import Written, write_edited

FORMAT = "salve_lm.edited_folder"
VERSION = 1
_AGAIN = "Export again."
_KEYS = {"base", "result", "dtype", "edits", "tied", "versions"}


def plans_to_dicts(plan: FolderPlan, context: EditContext) -> list[dict[str, Any]]:
    """The edits as plain data, with paths and hashes of what they read.

    Hashing reads the chosen tensors of the fine-tuned model once more, from the page cache if this
    is done after the writing; two at a time.
    """
    with ThreadPoolExecutor(2) as pool:
        return [
            {
                "spec": spec_to_dict(p.spec),
                "title": p.spec.title,
                "features": list(p.features),
                "modules": list(p.modules),
                "sources": p.spec.sources(context),
                "ops": list(pool.map(op_to_dict, p.ops)),
            }
            for p in plan.plans
        ]


def make_record(
    base: TensorFiles,
    written: Written,
    edits: Sequence[Mapping[str, Any]],
    tied: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    model: Mapping[str, Any] | None = None,
    file_digests_in: Path | None = None,
) -> dict[str, Any]:
    """What `edit.json` holds; see `docs/formats/edited-folder.md`.

    Args:
        base: the unedited weights.
        written: what `write_edited` reports.
        edits: from `plans_to_dicts`.
        tied: from `FolderPlan`.
        dtype: as given to `write_edited`.
        model: how to build the network again.
        file_digests_in: the folder in which the new files are at present, to record the plain
            SHA-256 of every file too. Reads everything once more.
    """
    base_files = file_entries(base.headers)
    files = file_entries(written.headers)
    if file_digests_in is not None:
        for entries, folder in ((base_files, base.folder), (files, file_digests_in)):
            for entry in entries:
                entry["sha256"] = hash_file(folder / entry["name"])
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": dict(model or {}),
        "base": {
            "path": str(base.folder),
            "sha256": written.base_sha256,
            "tensors": len(base.names),
            "files": base_files,
        },
        "result": {"sha256": written.result_sha256, "files": files},
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "edits": list(edits),
        "changed": [_changed(name, written) for name in written.changes],
        "tied": dict(tied),
        "left_out": list(written.left_out),
        "bytes": {"read": written.bytes_read, "written": written.bytes_written},
        "versions": _versions(),
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `edit.json` into `folder`."""
    (folder / RECORD).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def rebuild_folder(record: str | Path, base: str | Path, out: str | Path) -> Written:
    """Make an edited folder again from its `edit.json`, the base and the sources of the edits.

    Args:
        record: an `edit.json`, or the folder that holds it.
        base: the unedited model folder.
        out: must not exist.

    Returns:
        What was written: the weights are, byte for byte, those that the record tells of.

    Raises:
        StaleStore: `base` or a source is not what the edit was made from.
        CorruptFile: the record is damaged, or the result differs from the recorded one.
        MissingFile: there is no record, or a source is gone.
    """
    path = Path(record)
    path = path / RECORD if path.is_dir() else path
    data = read_record(path)
    weights = FolderWeights(base)
    context = EditContext()
    try:
        edits = [
            (e["title"], [op_from_dict(op, path, context) for op in e["ops"]])
            for e in data["edits"]
        ]
        expected, recorded = data["result"], data["base"]["sha256"]
        dtype = None if data["dtype"] is None else getattr(torch, data["dtype"])
        tied = dict(data["tied"])
    except (KeyError, TypeError, AttributeError) as e:
        raise CorruptFile(path, f"damaged edits ({e!r})", _AGAIN) from e

    def finish(folder: Path, written: Written) -> None:
        if written.base_sha256 != recorded:
            raise StaleStore(
                f"The weights in {base} ({written.base_sha256[:12]}) are not those that {path} was "
                f"made from ({recorded[:12]}). Give the folder that the edit was applied to."
            )
        if _differs(written, expected):
            raise CorruptFile(
                path, "the rebuilt weights differ from the recorded ones",
                f"Use the versions it was made with: {data['versions']}.",
            )  # fmt: skip
        write_record(folder, data)

    changes = folder_changes(edits, tied, weights, dtype)
    return write_edited(
        weights.files, changes.deltas, out, replaced=changes.replaced, dtype=dtype, finish=finish
    )


def read_record(path: Path) -> dict[str, Any]:
    """An `edit.json` of an edited folder.

    Raises:
        MissingFile: there is none.
        CorruptFile: it is damaged, or of another kind or version.
    """
    if not path.is_file():
        raise MissingFile(f"No {RECORD} at {path}. Give the folder that `salve-lm edit` wrote.")
    try:
        data = json.loads(path.read_text())
    except ValueError as e:
        raise CorruptFile(path, f"not readable as JSON ({e})", _AGAIN) from e
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CorruptFile(path, f"not a {FORMAT} record", "Give an edited folder's edit.json.")
    if data.get("version") != VERSION:
        why = f"format version {data.get('version')}, this salve_lm reads {VERSION}"
        raise CorruptFile(path, why, "Use the version that wrote it.")
    missing = _KEYS - set(data)
    if missing:
        raise CorruptFile(path, f"{sorted(missing)} missing", _AGAIN)
    return data


def _differs(written: Written, expected: Mapping[str, Any]) -> bool:
    keys = ("name", "bytes", "header")
    recorded = [{k: f.get(k) for k in keys} for f in expected["files"]]
    return written.result_sha256 != expected["sha256"] or file_entries(written.headers) != recorded


def _changed(name: str, written: Written) -> dict[str, Any]:
    change, info = written.changes[name], _info(name, written.headers)
    relative = change.relative
    before, after = written.sha256[name]
    return {
        "name": name,
        "dtype": CODES[info.dtype],
        "shape": list(info.shape),
        "norm_before": change.norm_before,
        "norm_after": change.norm_after,
        "relative_change": relative if math.isfinite(relative) else None,
        "requested": change.requested,
        "applied": change.applied,
        "applied_energy": change.applied_energy,
        "cosine": change.cosine,
        "sha256_before": before,
        "sha256": after,
    }


def _info(name: str, headers: Mapping[str, Header]) -> TensorInfo:
    return next(h.tensors[name] for h in headers.values() if name in h.tensors)


def _versions() -> dict[str, str]:
    return {
        "salve_lm": salve_lm.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
