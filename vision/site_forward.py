"""One forward pass to a site, for gradients: with a graph from one layer, or from the images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from salve_lm.activations.hooks import evaluating, record
from salve_lm.activations.sites import Site
from salve_lm.errors import BadConfig, NameNotFound


class _SiteRead(BaseException):
    """Ends a forward pass once the site is read; no Exception, so no model swallows it."""


class Reached(NamedTuple):
    """What one forward pass gave.

    Attributes:
        x: rows at the site, [n, d_in] or [n * positions, d_in].
        layer: what passed the layer that was asked for, as the network has it; None if none was.
    """

    x: Tensor
    layer: Tensor | None


def check_images(model: nn.Module, images: Tensor) -> None:
    """Raise BadConfig unless `images` is [n, channels, height, width] with the model's channels."""
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise BadConfig(
            f"Images must be a float tensor [n, channels, height, width], not {images.dtype} "
            f"{list(images.shape)}. Add the batch axis, and use the model's own transform."
        )
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and images.shape[1] != first.in_channels:
        alpha = " The fourth may be an alpha channel: convert to RGB." * (images.shape[1] == 4)
        raise BadConfig(
            f"The images have {images.shape[1]} channels, the model takes {first.in_channels}."
            f"{alpha}"
        )


@contextlib.contextmanager
def explained(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Turn what a network says of images that it cannot take into a `BadConfig` with the cure.

    Vision transformers of torchvision and timm assert the size; convolutions fail at the channels.
    """
    try:
        yield
    except AssertionError as e:
        raise BadConfig(
            f"The model does not take images of shape {list(images.shape)}: {e}. Resize them with "
            "the model's own transform."
        ) from e
    except RuntimeError:
        check_images(model, images)
        raise


def forward_to(
    model: nn.Module,
    site: Site,
    images: Tensor,
    layer: Site | None = None,
    *,
    graph: bool = False,
) -> Reached:
    """Run `model`, in eval mode, until `site` is read.

    Works inside `torch.inference_mode` and `torch.no_grad` (a Lightning validation loop): the
    graph is built all the same.

    Args:
        model: the network.
        site: where the SAE reads.
        images: [n, channels, height, width].
        layer: a place before the site; with `graph` its activation becomes the leaf that `x` hangs
            on, and nothing before it is recorded. `layer.reduce` is not looked at.
        graph: record what gradients need, from `layer`, or without one from `images`.

    Raises:
        BadConfig: images that the model does not take; a layer or site that did not run, in this
            order; a layer that gives no tensor.
        NameNotFound: no such module.
    """
    check_images(model, images)
    held: list[Tensor] = []

    def hold(value: object) -> Tensor:
        if not isinstance(value, Tensor):
            raise BadConfig(
                f"Layer {str(layer)!r} gives a {type(value).__name__}, not a tensor. Choose a "
                "module whose input or output is one."
            )
        if held:
            return value
        # a copy, and another one for the network: the next module may work in place
        held.append(value.detach().clone())
        if not graph:
            return value
        # until here the pass ran without gradients; the context around it ends this
        torch.set_grad_enabled(True)
        return held[0].requires_grad_().clone()

    def hold_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (hold(args[0] if args else None), *args[1:])

    def hold_output(_: nn.Module, args: tuple[Any, ...], output: object) -> Tensor:
        return hold(output)

    def stop(*_: object) -> None:
        raise _SiteRead

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(graph and layer is None))
        stack.enter_context(evaluating(model))
        if layer is not None:
            _hook(stack, model, layer, hold_input, hold_output)
        # after the layer's hook, so that a site on the same module hangs on the leaf
        read = stack.enter_context(record(model, {"x": site}))
        _hook(stack, model, site, stop, stop)
        with contextlib.suppress(_SiteRead), explained(model, images):
            # an inference tensor cannot take part in a graph
            model(images.clone() if images.is_inference() else images)
        if "x" not in read:
            raise BadConfig(f"Module {site.module!r} did not run. Choose one that does.")
        if layer is not None and not held:
            raise BadConfig(
                f"Layer {str(layer)!r} did not run before the site {str(site)!r}. Choose a layer "
                "in front of it."
            )
        return Reached(read["x"], held[0] if held else None)


def _hook(
    stack: contextlib.ExitStack, model: nn.Module, place: Site, on_input: Any, on_output: Any
) -> None:
    modules = dict(model.named_modules())
    if place.module not in modules:
        raise NameNotFound("module", place.module, [m for m in modules if m])
    module = modules[place.module]
    if place.io == "input":
        handle = module.register_forward_pre_hook(on_input)
    else:
        handle = module.register_forward_hook(on_output)
    stack.callback(handle.remove)
