"""Edits of a model that lies in a folder, resolved without loading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from salve_lm.edits.add_task_vector import AddTaskVector
from salve_lm.edits.context import EditContext
from salve_lm.edits.lookup import ModelIndex
from salve_lm.edits.ops import Op
from salve_lm.edits.plan import NamedOps
from salve_lm.edits.resolve import EditPlan, PlainModel, plan_edits
from salve_lm.edits.spec import EditSpec
from salve_lm.errors import UnsupportedEdit
from salve_lm.task_vectors.changing import NamedDeltas
from salve_lm.task_vectors.replacing import EditedLayer, Replacement
from salve_lm.task_vectors.weights import FolderWeights, StoredTensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

HEAD = "lm_head"


class FolderPlan(NamedTuple):
    """What edits mean for the model in a folder.

    Attributes:
        plans: one an edit, in order.
        tied: other names in memory of tensors that change -> the name that is edited.
    """

    plans: list[EditPlan]
    tied: dict[str, str]


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that `AutoModelForCausalLM` makes of `config`, with names and shapes only."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


class FolderChanges(NamedTuple):
    """What there is to write.

    Attributes:
        deltas: one an edit, in order: changes of tensors that only task vectors are added to, which
            go from file to file by rows.
        replaced: all other tensors that change, by name on disk.
    """

    deltas: list[NamedDeltas]
    replaced: dict[str, Replacement]


def plan_folder(
    base: FolderWeights,
    edits: Sequence[EditSpec],
    context: EditContext | None = None,
    loaded: PreTrainedModel | None = None,
) -> FolderPlan:
    """Resolve edits against the model in a folder.

    Args:
        base: the folder.
        edits: in order.
        context: cache of SAEs and task vectors.
        loaded: the model itself, for edits that look at its weights to say what they do; one
            without values where None.

    Raises:
        UnsupportedEdit: an edit that needs the values of the weights, and `loaded` is None.
        SalveError: whatever is wrong with an edit.
    """
    config = base.config
    if config is None:
        raise UnsupportedEdit(f"{base.where} has no config.json. Give a Hugging Face folder.")
    model = empty_model(config) if loaded is None else loaded
    index = ModelIndex(model)
    plans = plan_edits(edits, PlainModel(model, HEAD), context, None, index)
    changed = dict.fromkeys(name for plan in plans for name in plan.tensors)
    return FolderPlan(plans, index.tied_names(changed))


def folder_changes(
    edits: Sequence[tuple[str, Sequence[Op]]],
    tied: Mapping[str, str],
    base: FolderWeights,
    dtype: torch.dtype | None = None,
) -> FolderChanges:
    """What edits change in the folder `base`, nothing of it computed yet.

    Layers that only get task vectors are changed by rows. All others are edited whole, by the same
    function, on the same blocks, as a live edit: so the bits are the same.

    Args:
        edits: title and ops of each.
        tied: from `FolderPlan`.
        base: the unedited weights.
        dtype: of the changed tensors; that of the base where None.

    Raises:
        SalveError: a task vector that does not fit.
    """
    whole = {op.module for _, ops in edits for op in ops if not isinstance(op, AddTaskVector)}
    by_rows = [(title, [op for op in ops if op.module not in whole]) for title, ops in edits]
    named = [NamedOps(title, ops) for title, ops in edits]
    tensors = StoredTensors(base, dtype)
    replaced: dict[str, Replacement] = {}
    for module in sorted(whole):
        layer = EditedLayer(module, tensors, named)
        ops = [op for edit in named for op in edit.ops if op.module == module]
        for name in dict.fromkeys(f"{module}.{key}" for op in ops for key in op.touches):
            for disk_name in _disk_names(name, tied, base):
                replaced[disk_name] = layer.replacement(name)
    return FolderChanges(named_deltas(by_rows, tied, base), replaced)


def named_deltas(
    edits: Sequence[tuple[str, Sequence[Op]]], tied: Mapping[str, str], base: FolderWeights
) -> list[NamedDeltas]:
    """The changes of each edit, by name on disk, bound to the unedited weights of `base`.

    A tied tensor that the folder stores under both names changes under both.

    Raises:
        SalveError: a task vector that does not fit.
    """
    found = []
    for title, ops in edits:
        deltas = {}
        for op in ops:
            adding = _task_vector_op(op, title)
            source = adding.source.with_base(base)
            for disk_name in _disk_names(adding.name, tied, base):
                # one for each name: a delta keeps its last block, and is no one else's
                deltas[disk_name] = adding.variant.delta(source, adding.name, adding.alpha, base)
        found.append(NamedDeltas(title, deltas))
    return found


def _disk_names(name: str, tied: Mapping[str, str], base: FolderWeights) -> list[str]:
    """What the folder calls the tensor `name`: all names under which it stores it."""
    aliases = [other for other, edited in tied.items() if edited == name]
    return list(dict.fromkeys(base.disk_name(n) for n in (name, *aliases) if n in base))


def _task_vector_op(op: Op, title: str) -> AddTaskVector:
    if isinstance(op, AddTaskVector):
        return op
    raise UnsupportedEdit(
        f"Edit {title!r} is a {type(op).__name__}, which does not go by rows; only task vectors do."
    )
