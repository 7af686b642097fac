"""Ops as plain data, for `edit.json`, and back."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from salve_lm.edits.ablation_ops import AblateRead, AblateWrite
from salve_lm.edits.add_task_vector import AddTaskVector
from salve_lm.edits.context import EditContext
from salve_lm.edits.ops import FoldInput, Op, RankOneUpdate, ScaleChannels, ShiftBias
from salve_lm.errors import CorruptFile

KINDS: dict[str, type[Op]] = {
    kind.__name__: kind
    for kind in (
        ScaleChannels, FoldInput, RankOneUpdate, ShiftBias, AddTaskVector, AblateRead, AblateWrite,
    )
}  # fmt: skip


def op_to_dict(op: Op) -> dict[str, Any]:
    """`op` as plain data; arrays as little-endian float64 in base64, task vectors by reference."""
    if isinstance(op, AddTaskVector):
        return {"op": type(op).__name__, **op.to_dict()}
    values = {f.name: getattr(op, f.name) for f in fields(op)}
    packed = {n: _pack(v) if isinstance(v, Tensor) else v for n, v in values.items()}
    return {"op": type(op).__name__, **packed}


def op_from_dict(
    data: Mapping[str, Any], source: object = "edit.json", context: EditContext | None = None
) -> Op:
    """Rebuild what `op_to_dict` wrote.

    Args:
        data: the record.
        source: where it stands, for messages.
        context: holds the files that ops refer to, each opened once.

    Raises:
        CorruptFile: an unknown op, or fields that do not belong to it; names `source`.
        StaleStore, MissingFile: what the op refers to is not what or where it was.
    """
    values = dict(data)
    kind = KINDS.get(str(values.pop("op", None)))
    if kind is None:
        raise CorruptFile(
            source, f"unknown op {data.get('op')!r}", "Use the version that wrote it."
        )
    try:
        if kind is AddTaskVector:
            return AddTaskVector.from_dict(values, context or EditContext())
        restored: dict[str, Any] = {
            n: _unpack(v) if isinstance(v, dict) else v for n, v in values.items()
        }
        if restored.get("rows") is not None:
            restored["rows"] = tuple(int(r) for r in restored["rows"])
        return kind(**restored)
    except CorruptFile:
        raise
    except (TypeError, ValueError, KeyError) as e:
        raise CorruptFile(source, f"a damaged {kind.__name__} ({e})", "Export again.") from e


def _pack(tensor: Tensor) -> dict[str, Any]:
    raw = tensor.detach().cpu().double().contiguous().numpy().astype("<f8").tobytes()
    return {"shape": list(tensor.shape), "float64": base64.b64encode(raw).decode("ascii")}


def _unpack(packed: Mapping[str, Any]) -> Tensor:
    raw = np.frombuffer(base64.b64decode(packed["float64"], validate=True), dtype="<f8")
    return torch.from_numpy(raw.astype(np.float64)).reshape(packed["shape"])
