"""Permanent edits: a new folder with the edited weights and the record that rebuilds them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import salve_lm
from salve_lm.atomic import atomic_folder, check_writable_target
from salve_lm.edits.context import EditContext
from salve_lm.edits.lookup import ModelIndex, plain_name
from salve_lm.edits.plan import NamedOps, TensorChange, apply_named
from salve_lm.edits.records import op_from_dict
from salve_lm.edits.resolve import EditPlan, Studied, plan_edits
from salve_lm.edits.spec import EditSpec
from salve_lm.errors import (
    BadConfig,
    CorruptFile,
    EditConflict,
    MissingFile,
    StaleStore,
    UnsupportedEdit,
)
from salve_lm.hashing import hash_file, hash_tensors

FORMAT = "salve_lm.edit"
VERSION = 1
WEIGHTS = "model.safetensors"
RECORD = "edit.json"


class Exported(NamedTuple):
    """A finished export."""

    path: Path
    sha256: str  # of model.safetensors
    plans: list[EditPlan]
    changes: dict[str, TensorChange]


def export(
    studied: Studied,
    edits: Sequence[EditSpec],
    out: str | Path,
    *,
    context: EditContext | None = None,
    class_names: Sequence[str] | None = None,
    info: Mapping[str, Any] | None = None,
    check: Callable[[Path, Mapping[str, Tensor]], Mapping[str, Any]] | None = None,
) -> Exported:
    """Write the permanently edited model to the new folder `out`; the model itself is not touched.

    `out` holds `model.safetensors`, under the names of `studied.model.state_dict()`, so that
    `model.load_state_dict(load_file(...))` opens it without this package, and `edit.json`
    (`docs/formats/edit.md`). Both appear together or not at all.

    Args:
        studied: model and head name.
        edits: applied in order.
        out: must not exist.
        context: cache of SAEs and feature tables.
        class_names: names of the classes, for specs without a feature table.
        info: how to build the model again (library, name); kept as `model` in the record.
        check: compares the written file with the edited state dict in memory before anything gets
            its final name; its result is kept as `check` in the record.

    Raises:
        BadConfig: no edits.
        EditConflict: the model holds live edits.
        OutputExists, OutputUnwritable: see `salve_lm.atomic`.
        SalveError: whatever is wrong with an edit.
    """
    if not edits:
        raise BadConfig("Nothing to export: give at least one edit.")
    check_writable_target(out)
    context = context or EditContext()
    index = ModelIndex(studied.model)
    base = state_of(studied.model)
    _refuse_edited(index, base)
    plans = plan_edits(edits, studied, context, class_names, index)
    applied = apply_named(base, [plan.named for plan in plans])
    tied = index.tied_names(applied.tensors)
    result = base | applied.tensors | {n: applied.tensors[source] for n, source in tied.items()}
    sources = [spec.sources(context) for spec in edits]
    record = {
        "format": FORMAT,
        "version": VERSION,
        "model": dict(info or {}),
        "base": {"sha256": hash_tensors(base), "tensors": len(base)},
        "result": {"sha256": hash_tensors(result)},
        "edits": [p.to_dict() | {"sources": s} for p, s in zip(plans, sources, strict=True)],
        "changed": [_changed(n, t, applied.changes) for n, t in applied.tensors.items()],
        "tied": tied,
        "versions": _versions(),
    }
    sha256 = _write(Path(out), result, record, check)
    return Exported(Path(out), sha256, plans, applied.changes)


def rebuild(record: str | Path, base: str | Path | Mapping[str, Tensor], out: str | Path) -> str:
    """Make the exported folder again from `edit.json` and the unedited weights alone.

    Args:
        record: an `edit.json`, or the folder that holds it.
        base: the unedited weights: a state dict, a `.safetensors` file or a folder with a
            `model.safetensors`.
        out: must not exist.

    Returns:
        SHA-256 of the new `model.safetensors`, equal to the recorded one.

    Raises:
        StaleStore: `base` is not what the edit was made from.
        CorruptFile: the record is damaged, or the rebuilt file differs from the recorded one.
    """
    path = Path(record)
    path = path / RECORD if path.is_dir() else path
    data = _read_record(path)
    check_writable_target(out)
    tensors = {plain_name(n): t for n, t in _read_base(base).items()}
    found = hash_tensors(tensors)
    if found != data["base"]["sha256"]:
        raise StaleStore(
            f"These base weights ({found[:12]}) are not those that {path} was made from "
            f"({data['base']['sha256'][:12]}). Give the weights that the edit was applied to."
        )
    context = EditContext()
    try:
        edits = [
            NamedOps(e["title"], [op_from_dict(op, path, context) for op in e["ops"]])
            for e in data["edits"]
        ]
        replaced = apply_named(tensors, edits).tensors
        result = tensors | replaced | {n: replaced[source] for n, source in data["tied"].items()}
    except (KeyError, TypeError) as e:
        raise CorruptFile(path, f"damaged edits ({e!r})", "Export again.") from e
    if hash_tensors(result) != data["result"]["sha256"]:
        raise CorruptFile(
            path, "the rebuilt weights differ from the recorded ones",
            f"Use the versions it was made with: {data['versions']}.",
        )  # fmt: skip
    return _write(Path(out), result, {k: v for k, v in data.items() if k != "sha256"})


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of `model` under plain names, without copies.

    Raises:
        UnsupportedEdit: something in it is not a tensor.
    """
    state = {plain_name(n): t for n, t in model.state_dict().items()}
    odd = next((n for n, t in state.items() if not isinstance(t, Tensor)), None)
    if odd is not None:
        raise UnsupportedEdit(
            f"{odd!r} in the model's state dict is a {type(state[odd]).__name__}, which a "
            "safetensors file cannot hold. Leave out the module's extra state."
        )
    return state


def _write(
    out: Path,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    check: Callable[[Path, Mapping[str, Tensor]], Mapping[str, Any]] | None = None,
) -> str:
    from safetensors.torch import save_file

    with atomic_folder(out) as folder:
        # one metadata key only: safetensors writes several in no fixed order
        save_file(_unshared(tensors), folder / WEIGHTS, {"format": "pt"})
        sha256 = hash_file(folder / WEIGHTS)
        if check is not None:
            record = {**record, "check": dict(check(folder / WEIGHTS, tensors))}
        text = json.dumps({**record, "sha256": {WEIGHTS: sha256}}, indent=1, allow_nan=False)
        (folder / RECORD).write_text(text + "\n")
    return sha256


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU with memory of their own, which is what safetensors takes."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        own[name] = plain
    return own


def _refuse_edited(index: ModelIndex, base: Mapping[str, Tensor]) -> None:
    """A live edit shows the originals in the state dict, but specs would read edited weights."""
    for name, tensor in base.items():
        live = index.tensors[name].tensor if name in index.tensors else tensor
        if live.data_ptr() != tensor.data_ptr() and not torch.equal(live, tensor):
            raise EditConflict(
                f"{name!r} is edited at this moment by a WeightEditing callback. Export outside of "
                "validation, or inside the callback's `suspended()`."
            )


def _changed(name: str, new: Tensor, changes: Mapping[str, TensorChange]) -> dict[str, Any]:
    change = changes[name]
    relative = change.relative
    return {
        "name": name,
        "dtype": str(new.dtype).removeprefix("torch."),
        "shape": list(new.shape),
        "norm_before": change.norm_before,
        "norm_after": change.norm_after,
        "relative_change": relative if math.isfinite(relative) else None,
        "applied_energy": change.applied_energy,
        "cosine": change.cosine,
    }


def _versions() -> dict[str, str]:
    from safetensors import __version__ as safetensors_version

    return {
        "salve_lm": salve_lm.__version__,
        "torch": torch.__version__,
        "safetensors": safetensors_version,
    }


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingFile(f"No {RECORD} at {path}. Give the folder that `salve-lm edit` wrote.")
    try:
        data = json.loads(path.read_text())
    except ValueError as e:
        raise CorruptFile(path, f"not readable as JSON ({e})", "Export again.") from e
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CorruptFile(path, f"not a {FORMAT} record", "Give an export's edit.json.")
    if data.get("version") != VERSION:
        why = f"format version {data.get('version')}, this salve_lm reads {VERSION}"
        raise CorruptFile(path, why, "Use the version that wrote it.")
    missing = {"base", "result", "edits", "tied", "versions"} - set(data)
    if missing:
        raise CorruptFile(path, f"{sorted(missing)} missing", "Export again.")
    return data


def _read_base(base: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(base, Mapping):
        return base
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(base)
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise MissingFile(f"No weights at {path}. Give a .safetensors file or a state dict.")
    try:
        return load_file(path)
    except SafetensorError as e:
        raise CorruptFile(path, str(e), "Give the unedited weights as .safetensors.") from e
