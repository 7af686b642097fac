"""Networks by name from torchvision and timm, with random or public weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from salve_lm.errors import BadConfig, CorruptFile, MissingFile, NameNotFound

# torchvision's other models have no row of logits per image
TORCHVISION_CLASSIFIERS = (
    "torchvision.models",
    "torchvision.models.video",
    "torchvision.models.quantization",
)


class Constructor(NamedTuple):
    """How to build a model: `create(num_classes=..., weights=...)`, where None leaves it open."""

    library: str
    name: str
    create: Callable[..., nn.Module]


def find_constructor(backbone: str | nn.Module, options: dict[str, Any]) -> Constructor:
    """What builds `backbone` with `options`.

    Raises:
        NameNotFound: neither library has a model of that name.
    """
    if isinstance(backbone, nn.Module):
        path = f"{type(backbone).__module__}.{type(backbone).__qualname__}"
        return Constructor("module", path, partial(_keep, backbone, path, options))
    library, _, name = backbone.rpartition(":")
    if library not in ("", "torchvision", "timm"):
        raise NameNotFound("library", library, ["torchvision", "timm"], "Write LIBRARY:NAME.")
    known: list[str] = []
    if library != "timm":
        from torchvision import models

        known += models.list_models()
        if name in known:
            create = partial(_create_torchvision, name, options)
            return Constructor("torchvision", name, create)
    if library != "torchvision":
        import timm

        if timm.is_model(name):
            return Constructor("timm", name, partial(_create_timm, name, options))
        known += timm.list_models()
    raise NameNotFound(
        "backbone", name, dict.fromkeys(known), "Use a torchvision name, timm:NAME or a class_path."
    )


def _keep(
    module: nn.Module,
    path: str,
    options: dict[str, Any],
    num_classes: int | None,
    weights: str | None,
) -> nn.Module:
    if options:
        raise BadConfig(f"`options` are for named backbones; give {path} its init_args instead.")
    if weights is not None:
        raise BadConfig(
            f"There are no public weights {weights!r} for {path}. Give `weights` a local file "
            f"({path} has to fit it), or leave it out."
        )
    return module


def _create_torchvision(
    name: str, options: dict[str, Any], num_classes: int | None, weights: str | None
) -> nn.Module:
    import sys

    from torchvision import models

    modules = [sys.modules[m] for m in TORCHVISION_CLASSIFIERS if m in sys.modules]
    if not any(name in models.list_models(module=m) for m in modules):
        raise BadConfig(
            f"torchvision's {name} is no classifier (it detects, segments or estimates flow). "
            f"Choose a classifier, such as resnet18."
        )
    if weights is None:
        width = {} if num_classes is None else {"num_classes": num_classes}
        return models.get_model(name, weights=None, **width, **options)
    enum = models.get_model_weights(name)
    known = [*enum.__members__, "DEFAULT"]
    member = weights.rpartition(".")[2]
    if member not in known:
        raise NameNotFound(
            f"weights for {name}", weights, known, "A local file needs its ending or a folder."
        )
    return _downloaded(
        partial(models.get_model, name, weights=getattr(enum, member), **options), name, weights
    )


def _create_timm(
    name: str, options: dict[str, Any], num_classes: int | None, weights: str | None
) -> nn.Module:
    import timm

    width: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if weights is None:
        return timm.create_model(name, pretrained=False, **width, **options)
    architecture, _, _ = name.partition(".")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
    if weights != "DEFAULT":
        if weights not in tags:
            raise NameNotFound(f"weights for timm's {architecture}", weights, [*tags, "DEFAULT"])
        name = f"{architecture}.{weights}"
    elif not tags:
        raise NameNotFound(f"public weights for timm's {architecture}", weights, [])
    create = partial(timm.create_model, name, pretrained=True, **width, **options)
    return _downloaded(create, name, weights)


def _downloaded(create: Callable[[], nn.Module], name: str, weights: str) -> nn.Module:
    """Run `create`, which may fetch weights, and explain why it could not."""
    try:
        return create()
    except (ValueError, TypeError, AttributeError):
        raise
    except Exception as e:
        # torchvision raises URLError, timm what huggingface_hub and its HTTP library raise
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
        if "invalid hash value" in reason:
            raise CorruptFile(
                f"the downloaded weights {weights} of {name}",
                reason,
                "Remove that file from the download cache and try again.",
            ) from e
        raise MissingFile(
            f"The public weights {weights!r} of {name} could not be downloaded: {reason}. Without "
            "a network, download them elsewhere and give `weights` that file, or use "
            "`weights: none`."
        ) from e
