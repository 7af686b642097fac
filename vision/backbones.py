"""Image classifiers by name or as a module, with the weights and the head that were asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from salve_lm.errors import BadConfig, ShapeMismatch
from vision.constructors import find_constructor
from vision.heads import (
    HeadKind,
    find_head,
    head_width,
    ready_sites,
    replace_head,
    use_gap_linear,
)
from vision.weights import load_strictly, looks_local, match_names, read_state_dict

logger = logging.getLogger(__name__)

RANDOM = (None, "", "none", "random")


@dataclass(frozen=True)
class Backbone:
    """A network and what must be known to study and rebuild it.

    Attributes:
        model: the network; nothing of this package is in its state dict.
        head_name: name of the final linear layer in `model`, None where there is none.
        num_classes: logits of the head, None without one.
        sites: ready choices of a place to read activations, see `vision.heads.ready_sites`.
        library: "torchvision", "timm" or "module" (an instance of one's own).
        name: the library's name of it, or the class path.
        head: "native" or "gap_linear".
        options: arguments that the constructor got.
    """

    model: nn.Module
    head_name: str | None
    num_classes: int | None
    sites: dict[str, str]
    library: str
    name: str
    head: HeadKind = "native"
    options: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Plain values that say how to build the same network in plain torchvision or timm code."""
        return {
            "library": self.library,
            "name": self.name,
            "num_classes": self.num_classes,
            "head": self.head,
            "head_name": self.head_name,
            "options": dict(self.options),
        }


def build_backbone(
    backbone: str | nn.Module,
    num_classes: int | None = None,
    weights: str | None = None,
    head: HeadKind = "native",
    head_name: str | None = None,
    options: Mapping[str, Any] | None = None,
    ignore_head: bool = False,
) -> Backbone:
    """Build a classifier.

    Args:
        backbone: a torchvision name (`resnet18`, `vit_b_16`, …), a timm name (`timm:NAME`; a bare
            name that torchvision lacks is looked up there too), or a module, which is used as it is
            and must have the head that is asked for.
        num_classes: logits wanted; None keeps those of the weights, or of the library's default.
        weights: None or "none" for random ones; a public name (`DEFAULT`, `IMAGENET1K_V1`; for
            timm `DEFAULT` or a tag), downloaded by the library and given a new head where
            `num_classes` differs; or a local file or export folder (`read_state_dict`), which must
            fit exactly. Environment variables such as `$DATA` in a path are filled in.
        head: "gap_linear" gives SqueezeNet an average pool -> Linear head (`use_gap_linear`).
        head_name: the head's name, where it is not the last linear layer.
        options: further arguments of the constructor, such as `image_size` (torchvision's ViT),
            `img_size` or `in_chans` (timm).
        ignore_head: start with a new head: all other weights come from the local file or the
            module.

    Raises:
        NameNotFound: no such model or public weights; names the nearest.
        MissingFile, CorruptFile, ShapeMismatch, NotFinite: weights that are not there, broken,
            unsafe, or of another model.
        BadConfig: options that the model does not take, or that contradict each other.
    """
    given = dict(options or {})
    weights = os.path.expandvars(weights) if weights else weights
    if num_classes is not None and num_classes < 1:
        raise BadConfig(f"num_classes is {num_classes}; it must be at least 1.")
    if "num_classes" in given:
        raise BadConfig("Give num_classes beside `options`, not in them.")
    found = find_constructor(backbone, given)
    local = weights not in RANDOM and looks_local(str(weights))
    state = read_state_dict(str(weights)) if local else None
    public = None if weights in RANDOM or local else weights
    try:
        model = found.create(num_classes=num_classes, weights=public)
    except TypeError as e:
        raise BadConfig(f"{found.name} does not take these options {given}: {e}.") from e
    if state is not None:
        state = match_names(state, model.state_dict())

    name = find_head(model, head_name)
    native_name = name
    if name is not None:
        width = num_classes or head_width(model.get_submodule(name))
        if head == "gap_linear":
            name = use_gap_linear(model, found.name, width)
        elif head_width(model.get_submodule(name)) != width:
            if found.library == "module" and not ignore_head:
                raise BadConfig(
                    f"The last linear layer of {found.name}, {name!r}, has "
                    f"{head_width(model.get_submodule(name))} outputs and num_classes is {width}. "
                    "Make the two equal (or num_classes null), name the real head as `head_name`, "
                    "or set `ignore_head: true` to replace that layer."
                )
            logger.info("%s: a new head %r with %d classes", found.name, name, width)
            replace_head(model, name, width)
    elif num_classes is not None or head != "native":
        raise BadConfig(
            f"{found.name} has no Linear or 1x1 Conv2d that could be its head. Set num_classes: "
            "null and head: native to use it as it is."
        )
    if state is not None and ignore_head:
        heads = tuple(f"{n}." for n in (name, native_name) if n is not None)
        state = {k: t for k, t in state.items() if not k.startswith(heads)}
        new = [k for k in model.state_dict() if name is not None and k.startswith(f"{name}.")]
        load_strictly(model, state, weights, found.name, new)
    elif state is not None:
        if name is not None:
            own = found.library == "module"
            _fit_head(model, name, state.get(f"{name}.weight"), num_classes, own, str(weights))
        load_strictly(model, state, weights, found.name, hint=_head_hint(state, head))
    return Backbone(
        model=model,
        head_name=name,
        num_classes=None if name is None else head_width(model.get_submodule(name)),
        sites=ready_sites(model, name),
        library=found.library,
        name=found.name,
        head=head,
        options=given,
    )


def _fit_head(
    model: nn.Module, name: str, in_file: Any, num_classes: int | None, own: bool, path: str
) -> None:
    """Take the file's number of classes where none was asked for, or say what to do."""
    width = head_width(model.get_submodule(name))
    if in_file is None or in_file.shape[0] == width:
        return
    if num_classes is not None:
        raise ShapeMismatch(
            f"The head {name!r} in {path} has {in_file.shape[0]} classes, num_classes is "
            f"{num_classes}. Set `num_classes: {in_file.shape[0]}`, or `ignore_head: true` to keep "
            "the other weights and start a new head."
        )
    if not own:
        replace_head(model, name, in_file.shape[0])


def _head_hint(state: Mapping[str, Any], head: HeadKind) -> str:
    """What to do where a SqueezeNet's two kinds of head were mixed up."""
    if head == "native" and "classifier.2.weight" in state and "features.0.weight" in state:
        return "If these are weights of a SqueezeNet saved with it, set `head: gap_linear`."
    if head == "gap_linear" and "classifier.1.weight" in state:
        return (
            "The file holds SqueezeNet's own head: set `ignore_head: true` to start the new one, "
            "or `head: native`."
        )
    return ""
