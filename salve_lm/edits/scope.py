"""What a spec sees while it is resolved for one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from salve_lm.edits.context import EditContext, SaeView
from salve_lm.edits.layout import Layout, is_editable, layout_of, outputs_first
from salve_lm.edits.lookup import ModelIndex
from salve_lm.edits.stream_norm import gain_offset
from salve_lm.errors import BadConfig, NameNotFound, ShapeMismatch, StaleStore, UnsupportedEdit
from salve_lm.features import FeatureTable, class_index

Axis = Literal["input", "output"]


@dataclass(frozen=True)
class Scope:
    """One layer of one model, and the artefacts that a spec may ask for.

    Attributes:
        name: full name of the layer.
        module: the layer.
        model: the network it belongs to.
        is_head: whether it is the final layer, whose outputs are classes.
        context: SAEs and feature tables.
        class_names: names of the classes, where the caller knows them.
    """

    name: str
    module: nn.Module
    model: nn.Module
    is_head: bool
    context: EditContext
    class_names: Sequence[str] | None = None

    @cached_property
    def layout(self) -> Layout:
        """The axes of the layer's weight; raises `UnsupportedEdit` where it has none to edit."""
        return layout_of(self.name, self.module)

    @cached_property
    def gain_offset(self) -> float | None:
        """For a norm of a language model, what it adds to its weight; None for other layers."""
        return gain_offset(self.module, self.model)

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias."""
        return self.module._parameters.get("bias") is not None

    def class_rows(self, what: str) -> Tensor:
        """The layer's weight as one row a class, float64 [n_classes, d_in] on the CPU.

        Raises:
            UnsupportedEdit: `what` needs classes and this is not the final layer, or its kernel
                reads several positions at once.
        """
        self.require_head(what)
        weight = self.module._parameters["weight"]
        if weight is None or weight.is_meta:
            raise UnsupportedEdit(
                f"{what} reads the values of {self.name!r}, which has none yet (meta device). Load "
                "the weights first (`edit --model` in place of `--source`)."
            )
        view = outputs_first(weight.detach(), self.layout.output_dim)
        if view[0, 0].numel() != 1:
            raise UnsupportedEdit(
                f"{what} reads one weight a class and input; {self.name!r} has a kernel of "
                f"{tuple(view.shape[2:])}. Use `guide: decoder_abs`."
            )
        return view.flatten(1).double().cpu()

    def class_bias(self) -> Tensor:
        """The final layer's bias, float64 [n_classes] on the CPU; zeros where it has none."""
        bias = self.module._parameters.get("bias")
        if bias is None:
            return torch.zeros(self.layout.d_out, dtype=torch.float64)
        return bias.detach().double().cpu()

    def require_head(self, what: str) -> None:
        """Raise `UnsupportedEdit` unless the layer's outputs are classes."""
        if not self.is_head:
            raise UnsupportedEdit(
                f"{what} is about a class's own row, and the outputs of {self.name!r} are not "
                "classes. Use `module: head`, or an edit of all rows."
            )

    def target(self, label: str | int | None, table: FeatureTable | None = None) -> int:
        """Index of class `label`.

        Raises:
            BadConfig: no class is given, or a name where no names are known.
            NameNotFound: there is no such class.
        """
        if label is None:
            raise BadConfig("This edit is about a class: set its `target_class`.")
        if table is None and self.class_names is None and self.context.has_features(None):
            table = self.context.table(None)
        if table is not None and not (self.class_names and self.groups_otherwise(table)):
            self.check_classes(table)
            return table.class_index(label)
        if self.class_names is not None:
            return class_index(label, list(self.class_names))
        if isinstance(label, str) and not label.isdigit():
            raise BadConfig(
                f"Class {label!r} cannot be looked up without class names: give its index, or the "
                "edit's `features`."
            )
        index = int(label)
        if index < 0 or (self.is_head and index >= self.layout.d_out):
            cure = f"The final layer has {self.layout.d_out} classes, counted from 0."
            raise NameNotFound("class", str(label), [], cure)
        return index

    def groups_otherwise(self, table: FeatureTable) -> bool:
        """Whether the table's classes are not the final layer's: images with and without a cue."""
        return self.is_head and table.n_classes != self.layout.d_out

    def check_classes(self, table: FeatureTable) -> None:
        """Check that the table's classes are those of the final layer and of the data.

        Raises:
            ShapeMismatch: another number of classes than the final layer has outputs.
            StaleStore: other class names than the data at hand.
        """
        if self.groups_otherwise(table):
            raise ShapeMismatch(
                f"The feature table has {table.n_classes} classes, {self.name!r} has "
                f"{self.layout.d_out} outputs. Run discover on this model's own data."
            )
        if self.class_names is not None and list(self.class_names) != table.class_names:
            pairs = zip(self.class_names, table.class_names, strict=False)
            ours, theirs = next((p for p in pairs if p[0] != p[1]), ("(none)", "(none)"))
            raise StaleStore(
                "The feature table was made with other classes than this data (first difference: "
                f"{theirs!r} there, {ours!r} here). Run discover again."
            )

    def check_width(self, width: int, axis: Axis, source: str) -> None:
        """Raise `ShapeMismatch` unless `width`, of `source`, is the length of the edited axis."""
        if self.gain_offset is not None:
            length = len(self.module._parameters["weight"])  # type: ignore[arg-type]
        else:
            length = self.layout.d_in if axis == "input" else self.layout.d_out
        if width == length:
            return
        fitting = []
        for name, module in ModelIndex(self.model).modules.items():
            if is_editable(module) and getattr(module, "groups", 1) == 1:
                layout = layout_of(name, module)
                if width == (layout.d_in if axis == "input" else layout.d_out):
                    fitting.append(name)
        shown = ", ".join(fitting[:8]) + (", ..." if len(fitting) > 8 else "")
        cure = f"Layers whose {axis} axis has {width}: {shown}." if fitting else (
            f"No layer of this model has an {axis} axis of {width}: the SAE belongs to another one."
        )  # fmt: skip
        raise ShapeMismatch(
            f"{source} has width {width}, the {axis} axis of {self.name!r} has {length}. {cure}"
        )

    def sae(self, path: str | None, axis: Axis = "input") -> SaeView:
        """The SAE of a spec, checked to fit the edited axis."""
        sae = self.context.sae(path)
        self.check_width(sae.d_in, axis, f"The SAE {sae.path}")
        return sae

    def latents(
        self,
        features: Sequence[str | int],
        sae: SaeView,
        table_path: str | None,
        target_class: str | int | None,
    ) -> tuple[int, ...]:
        """Indices of features given by index or by name; names need a feature table."""
        found = []
        for feature in features:
            if isinstance(feature, int) or feature.isdigit():
                found.append(int(feature))
            else:
                table = self.context.table(table_path, sae)
                found.append(table.resolve(feature, target_class))
        return tuple(dict.fromkeys(found))

    def feature_or_dominant(
        self, feature: str | int | None, target_class: str | int | None
    ) -> str | int:
        """`feature`, or where it is absent the paper's choice, the class's dominant one."""
        if feature is None and target_class is None:
            raise BadConfig("Name a `feature`, or a `target_class` to take its dominant one.")
        return "dominant" if feature is None else feature

    def class_of(self, features: Sequence[str | int | None], table_path: str | None) -> int | None:
        """The class that all `features` name, as in `dominant:church`; None where they differ."""
        names = [f for f in features if isinstance(f, str) and ":" in f]
        if not names or len(names) != len(features):
            return None
        table = self.context.table(table_path)
        if self.class_names and self.groups_otherwise(table):
            return None
        self.check_classes(table)
        classes = {table.parse(name).label for name in names}
        return classes.pop() if len(classes) == 1 else None
