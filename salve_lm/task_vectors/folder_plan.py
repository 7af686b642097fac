"""Edits of a model that lies in a folder, resolved without its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from salve_lm.edits.add_task_vector import AddTaskVector
from salve_lm.edits.context import EditContext
from salve_lm.edits.lookup import ModelIndex
from salve_lm.edits.ops import Op
from salve_lm.edits.resolve import EditPlan, PlainModel, plan_edits
from salve_lm.edits.spec import EditSpec
from salve_lm.errors import UnsupportedEdit
from salve_lm.task_vectors.changing import NamedDeltas
from salve_lm.task_vectors.weights import FolderWeights

if TYPE_CHECKING:
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


def plan_folder(
    base: FolderWeights, edits: Sequence[EditSpec], context: EditContext | None = None
) -> FolderPlan:
    """Resolve edits against the model in a folder, by a model without values.

    Raises:
        UnsupportedEdit: an edit that needs the values of the weights, or another op than adding a
            task vector.
        SalveError: whatever is wrong with an edit.
    """
    config = base.config
    if config is None:
        raise UnsupportedEdit(f"{base.where} has no config.json. Give a Hugging Face folder.")
    model = empty_model(config)
    index = ModelIndex(model)
    plans = plan_edits(edits, PlainModel(model, HEAD), context, None, index)
    for plan in plans:
        for op in plan.ops:
            _task_vector_op(op, plan.spec.title)
    changed = dict.fromkeys(name for plan in plans for name in plan.tensors)
    return FolderPlan(plans, index.tied_names(changed))


def streams(edits: Sequence[EditSpec]) -> bool:
    """Whether all of `edits` can be written from file to file."""
    from salve_lm.edits.task_vector import TaskVectorInjection

    return all(isinstance(spec, TaskVectorInjection) for spec in edits)


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
            aliases = [other for other, name in tied.items() if name == adding.name]
            source = adding.source.with_base(base)
            for disk_name in dict.fromkeys(
                base.disk_name(n) for n in (adding.name, *aliases) if n in base
            ):
                # one for each name: a delta keeps its last block, and is no one else's
                deltas[disk_name] = adding.variant.delta(source, adding.name, adding.alpha, base)
        found.append(NamedDeltas(title, deltas))
    return found


def _task_vector_op(op: Op, title: str) -> AddTaskVector:
    if isinstance(op, AddTaskVector):
        return op
    raise UnsupportedEdit(
        f"Edit {title!r} is a {type(op).__name__}, which needs the model in memory; only task "
        "vectors are written from file to file. Edit and export the loaded model."
    )
