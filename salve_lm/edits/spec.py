"""What an edit is: a small frozen record of plain values."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from salve_lm.errors import BadConfig

if TYPE_CHECKING:
    from torch import nn

    from salve_lm.edits.context import EditContext
    from salve_lm.edits.lookup import ModelIndex
    from salve_lm.edits.ops import Op
    from salve_lm.edits.scope import Scope

Direction = Literal["suppress", "enhance"]
SIGN: dict[str, int] = {"suppress": -1, "enhance": 1}


class Resolved(NamedTuple):
    """What a spec means for one layer: elementary ops, and the latents they come from."""

    ops: tuple[Op, ...]
    features: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EditSpec(ABC):
    """What to edit, where, and how much. Derive from it to add an edit.

    Args:
        name: Name in tables and messages; made from the other values when absent.
        module: Full name of the layer inside the model, a pattern with `*`, `head`, or
            `final_norm`, the norm before a language model's head.
        target_class: Class the edit is about, by name or index.
        alpha: Strength.
        allow_tied: Edit a tensor although other layers share its memory.
    """

    name: str | None = None
    module: str = "head"
    target_class: str | int | None = None
    alpha: float = 1.0
    allow_tied: bool = False

    default_alphas: ClassVar[tuple[float, ...]] = (0.25, 0.5, 1.0, 2.0, 4.0)
    grid_kind: ClassVar[str] = "fraction"
    """What alpha measures, so that a sweep gives edits of one kind one grid: `alpha` (the paper's
    strength of a multiplicative edit), `fraction` (1 removes the whole of something), `logit`
    (units of a logit) or `norm` (units of the activation)."""

    signed_alpha: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha) or (self.alpha < 0 and not self.signed_alpha):
            wanted = "finite" if self.signed_alpha else "finite and not negative"
            raise BadConfig(f"alpha of {type(self).__name__} is {self.alpha}; it must be {wanted}.")

    @abstractmethod
    def resolve(self, scope: Scope) -> Resolved:
        """The ops this edit amounts to on the layer that `scope` shows."""

    def resolve_model(
        self, model: nn.Module, index: ModelIndex, context: EditContext
    ) -> Resolved | None:
        """The ops on the whole model, for an edit that picks its tensors itself.

        None, for the others, which are resolved layer by layer.

        Args:
            model: the network.
            index: its modules and tensors.
            context: SAEs and task vectors.
        """
        return None

    def sources(self, context: EditContext) -> dict[str, Any]:
        """What the edit was made from, for `edit.json`: path and SHA-256 by kind."""
        return context.sources(getattr(self, "sae", None), getattr(self, "features", None))

    def class_named(self, scope: Scope) -> str | int | None:
        """The class this edit is about: `target_class`, or what else in the spec says so."""
        return self.target_class

    @property
    def title(self) -> str:
        """`name`, or a short description."""
        if self.name is not None:
            return self.name
        about = getattr(self, "feature", None)
        about = about if about is not None else self.target_class
        text = "" if about is None else f"{about}, "
        return f"{type(self).__name__}({text}alpha={self.alpha:g})"


def spec_to_dict(spec: EditSpec) -> dict[str, Any]:
    """`spec` as `class_path` and `init_args`, as configs write it."""
    cls = type(spec)
    args = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.init}
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": args}
