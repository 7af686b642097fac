"""From a spec and a model to a plan: which tensors change, by which ops."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import nn

from salve_lm.edits.context import EditContext
from salve_lm.edits.lookup import HEAD, ModelIndex
from salve_lm.edits.ops import Op
from salve_lm.edits.plan import NamedOps
from salve_lm.edits.records import op_to_dict
from salve_lm.edits.scope import Scope
from salve_lm.edits.spec import EditSpec, spec_to_dict
from salve_lm.errors import BadConfig

__all__ = ["EditContext", "EditPlan", "PlainModel", "Studied", "plan_edit", "plan_edits"]

logger = logging.getLogger(__name__)


class Studied(Protocol):
    """A model and the name of its final layer; every `StudiedModel` is one."""

    @property
    def model(self) -> nn.Module:
        """The network."""

    @property
    def head_name(self) -> str | None:
        """Name of its final linear layer, where it has one."""


class PlainModel(NamedTuple):
    """A bare network, for use without a `StudiedModel`."""

    model: nn.Module
    head_name: str | None = None


@dataclass(frozen=True, eq=False)
class EditPlan:
    """A spec resolved against one model.

    Attributes:
        spec: what was asked for.
        ops: what it amounts to, in order.
        features: the latents it uses.
        target: index of the class it is about, or None.
        modules: full names of the layers it changes.
    """

    spec: EditSpec
    ops: tuple[Op, ...]
    features: tuple[int, ...]
    target: int | None
    modules: tuple[str, ...]

    @property
    def named(self) -> NamedOps:
        """The ops under the edit's title, for `apply_named`."""
        return NamedOps(self.spec.title, self.ops)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Full names of the tensors it changes."""
        names = (f"{op.module}.{key}" for op in self.ops for key in op.touches)
        return tuple(dict.fromkeys(names))

    def with_alpha(self, alpha: float) -> EditPlan:
        """The same plan at another strength; nothing is loaded or computed again."""
        return dataclasses.replace(
            self,
            spec=dataclasses.replace(self.spec, alpha=alpha),
            ops=tuple(dataclasses.replace(op, alpha=alpha) for op in self.ops),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data, arrays included: enough to apply it again to the same weights."""
        return {
            "spec": spec_to_dict(self.spec),
            "title": self.spec.title,
            "features": list(self.features),
            "target": self.target,
            "modules": list(self.modules),
            "ops": [op_to_dict(op) for op in self.ops],
        }


def plan_edit(
    spec: EditSpec,
    studied: Studied,
    context: EditContext | None = None,
    class_names: Sequence[str] | None = None,
) -> EditPlan:
    """Resolve `spec` against the present weights of `studied`, which are left as they are.

    Args:
        spec: the edit.
        studied: model and head name; a `StudiedModel`, or a `PlainModel`.
        context: cache of SAEs and feature tables.
        class_names: names of the classes, for specs that name one and have no feature table.

    Raises:
        SalveError: whatever is wrong with the spec; each subclass names the cure.
    """
    return plan_edits([spec], studied, context, class_names)[0]


def plan_edits(
    specs: Sequence[EditSpec],
    studied: Studied,
    context: EditContext | None = None,
    class_names: Sequence[str] | None = None,
    index: ModelIndex | None = None,
) -> list[EditPlan]:
    """Resolve several edits, in order, each against the unedited model; see `plan_edit`.

    `index` is that of `studied.model`, where the caller has one.
    """
    context, index = context or EditContext(), index or ModelIndex(studied.model)
    return [_plan(spec, studied, context, class_names, index) for spec in specs]


def _plan(
    spec: EditSpec,
    studied: Studied,
    context: EditContext,
    class_names: Sequence[str] | None,
    index: ModelIndex,
) -> EditPlan:
    whole = spec.resolve_model(studied.model, index, context)
    if whole is not None:
        plan = EditPlan(
            spec,
            whole.ops,
            whole.features,
            None,
            tuple(dict.fromkeys(op.module for op in whole.ops)),
        )
        for name in plan.tensors if not spec.allow_tied else ():
            index.refuse_tied(name)
        return _logged(plan)
    ops: list[Op] = []
    features: dict[int, None] = {}
    target: int | None = None
    found = index.find(spec.module, studied.head_name)
    head = studied.head_name if studied.head_name is not None else HEAD
    for name, module in found.items():
        scope = Scope(name, module, studied.model, name == head, context, class_names)
        resolved = spec.resolve(scope)
        ops += resolved.ops
        features |= dict.fromkeys(resolved.features)
        target = _target(spec, scope)
        for key in dict.fromkeys(k for op in resolved.ops for k in op.touches):
            if f"{name}.{key}" in index.tensors and not spec.allow_tied:
                index.refuse_tied(f"{name}.{key}")
    return _logged(EditPlan(spec, tuple(ops), tuple(features), target, tuple(found)))


def _logged(plan: EditPlan) -> EditPlan:
    tensors = list(plan.tensors)
    logger.info("%s: latents %s, tensors %s", plan.spec.title, list(plan.features), tensors)
    return plan


def _target(spec: EditSpec, scope: Scope) -> int | None:
    named = spec.class_named(scope)
    if named is None:
        return None
    path = getattr(spec, "features", None)
    table = scope.context.table(path) if scope.context.has_features(path) else None
    try:
        return scope.target(named, table)
    except BadConfig:
        if scope.is_head:
            raise
        return None  # outside the head a class is only a label, and no names are known
