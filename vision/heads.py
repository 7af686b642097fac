"""The final linear layer of an image classifier: find it, replace it, name the sites around it."""

from __future__ import annotations

from typing import Literal

from torch import nn

from salve_lm.errors import BadConfig, NameNotFound

HeadKind = Literal["native", "gap_linear"]


def is_head(module: nn.Module) -> bool:
    """Whether `module` maps features to logits: a Linear, or a 1x1 Conv2d over all channels."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def head_width(module: nn.Module) -> int:
    """Number of logits that a head module gives."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    if isinstance(module, nn.Linear):
        return module.out_features
    raise TypeError(f"A {type(module).__name__} is no head.")


def find_head(model: nn.Module, name: str | None = None) -> str | None:
    """Name of the layer that makes the logits.

    Args:
        model: any network. timm's own note of its classifier is followed; elsewhere it is the last
            registered Linear or 1x1 convolution, which holds for every classifier of torchvision.
        name: the head's name, where that rule does not hold.

    Returns:
        The name, or None for a model without a linear layer.

    Raises:
        NameNotFound: `name` is no module of the model.
        BadConfig: `name` is another kind of layer, or the model has several heads.
    """
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules:
            raise NameNotFound("module (head_name)", name, [m for m in modules if m])
        if not is_head(modules[name]):
            raise BadConfig(
                f"head_name {name!r} is a {type(modules[name]).__name__}; a head is a Linear or a "
                "1x1 Conv2d."
            )
        return name
    noted = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if isinstance(noted, tuple | list):
        raise BadConfig(
            f"{type(model).__name__} has several heads ({', '.join(map(str, noted))}). Choose a "
            "model with one, or name one of them as `head_name`."
        )
    if isinstance(noted, str):
        # some of timm's encoders note a head that they do not have
        return noted if noted in modules and is_head(modules[noted]) else None
    return next((n for n, m in reversed(modules.items()) if is_head(m)), None)


def replace_head(model: nn.Module, name: str, num_classes: int) -> None:
    """Put a freshly initialised head of `num_classes` logits in the place of module `name`."""
    old = model.get_submodule(name)
    bias = getattr(old, "bias", None) is not None
    width_in = int(old.in_channels if isinstance(old, nn.Conv2d) else old.in_features)  # type: ignore
    new = (
        nn.Conv2d(width_in, num_classes, 1, bias=bias)
        if isinstance(old, nn.Conv2d)
        else (nn.Linear(width_in, num_classes, bias=bias))
    )
    model.set_submodule(name, new)


def use_gap_linear(model: nn.Module, name: str, num_classes: int) -> str:
    """Give a SqueezeNet the head that the edit's formulas are exact for: average pool -> Linear.

    Its own head is dropout -> 1x1 convolution -> ReLU -> average pool, whose ReLU stands between
    the edited weights and the logits. The new state dict has `classifier.2.weight` [n, 512] and
    `classifier.2.bias` [n] where the old one had `classifier.1.*`; plain torch loads it after

        model = torchvision.models.squeezenet1_1()
        model.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, n))

    Returns:
        The new head's name, `classifier.2`.

    Raises:
        BadConfig: not a SqueezeNet.
    """
    old = dict(model.named_modules()).get("classifier.1")
    if type(model).__name__ != "SqueezeNet" or not isinstance(old, nn.Conv2d):
        raise BadConfig(
            f"head: gap_linear is for SqueezeNet; the head of {name} ({type(model).__name__}) is "
            "its own already. Leave `head` at native."
        )
    model.set_submodule(
        "classifier",
        nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(old.in_channels, num_classes)
        ),
    )
    return "classifier.2"


def ready_sites(model: nn.Module, head_name: str | None) -> dict[str, str]:
    """Sites with names of their own.

    - `pooled`: the head's input, the place for edits of the head: only there is the edit exact.
      For a vision transformer this is its [CLS] token *after* the final norm; for SqueezeNet's own
      convolutional head the average over positions.
    - `cls`: the [CLS] token as the last block gives it, *before* the final norm (SALVE's choice).
      A norm stands between it and the head, so an SAE trained there does not share the head's
      axis: use `pooled` for edits of the head.
    """
    sites = {}
    if head_name is not None:
        conv = isinstance(model.get_submodule(head_name), nn.Conv2d)
        sites["pooled"] = f"{head_name}:input" + (":mean" if conv else "")
    last = last_block(model)
    if last is not None:
        sites["cls"] = f"{last}:output:cls"
    return sites


def last_block(model: nn.Module) -> str | None:
    """Name of the last block of a transformer with a [CLS] token (torchvision's or timm's form)."""
    if getattr(model, "class_token", None) is not None:
        prefix = "encoder.layers"
    elif getattr(model, "cls_token", None) is not None:
        prefix = "blocks"
    else:
        return None
    modules = dict(model.named_modules())
    names = [name for name, _ in modules[prefix].named_children()] if prefix in modules else []
    return f"{prefix}.{names[-1]}" if names else None
