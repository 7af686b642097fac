"""Which part of an image one position of a layer sees."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from salve_lm.activations.hooks import evaluating
from salve_lm.activations.sites import Site
from salve_lm.errors import BadConfig, NameNotFound
from vision.site_forward import check_images
from vision.spatial_layer import as_grid


class Box(NamedTuple):
    """A part of an image in pixels; `bottom` and `right` are one past its end."""

    top: int
    left: int
    bottom: int
    right: int


def receptive_area(
    model: nn.Module, layer: Site, images: Tensor, peaks: Tensor, mass: float = 0.9
) -> list[Box]:
    """The box that a position of `layer` sees, by its gradient: the *effective* receptive field.

    In a deep network the theoretical field covers the image, but nearly all of the gradient comes
    from a small part of it (Luo et al., NeurIPS 2016). The box leaves out (1 - mass) / 2 of the
    absolute gradient of |A[:, row, column]|^2 on each of its four sides.

    Args:
        model: the network; run in eval mode.
        layer: the activation A, as `Heatmaps.layer` has it; its `reduce` is not looked at.
        images: [n, channels, height, width], as the network takes them.
        peaks: row and column of one position of A's grid for each image, int64 [n, 2].
        mass: share of the gradient's sum along each axis that the box holds.

    Returns:
        One box an image; the whole image where the gradient is zero.

    Raises:
        BadConfig: images that the model does not take, a layer without positions or that did not
            run, or a mass outside (0, 1].
        NameNotFound: no such module.
    """
    check_images(model, images)
    if not 0 < mass <= 1:
        raise BadConfig(f"mass is {mass}; the share of the gradient lies in (0, 1].")
    modules = dict(model.named_modules())
    if layer.module not in modules:
        raise NameNotFound("module", layer.module, [m for m in modules if m])
    held: list[Tensor] = []

    # copies: the next module may work in place
    def hold_input(_: nn.Module, args: tuple[Any, ...]) -> None:
        held.extend(a.clone() for a in args[:1])

    def hold_output(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        held.append(output.clone())

    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        leaf = images.detach().clone().requires_grad_()
        module = modules[layer.module]
        if layer.io == "input":
            handle = module.register_forward_pre_hook(hold_input)
        else:
            handle = module.register_forward_hook(hold_output)
        try:
            model(leaf)
        finally:
            handle.remove()
        if not held:
            raise BadConfig(f"Layer {str(layer)!r} did not run. Choose one that does.")
        height, width = images.shape[2:]
        grid = as_grid(model, layer, held[0], (height, width))
        # one at a time: an index made in inference mode may not be kept for the backward pass
        at = torch.stack([g[:, int(r), int(c)] for g, (r, c) in zip(grid, peaks, strict=True)])
        (gradient,) = torch.autograd.grad(at.square().sum(), leaf)
    seen = gradient.abs().sum(dim=1).double().cpu()
    boxes = []
    for s in seen:
        (top, bottom), (left, right) = (_interval(s.sum(dim), mass) for dim in (1, 0))
        boxes.append(Box(top, left, bottom, right))
    return boxes


def _interval(along: Tensor, mass: float) -> tuple[int, int]:
    """Start and end of what holds `mass` of `along` [pixels]."""
    total = along.sum()
    if total == 0:
        return 0, len(along)
    share = along.cumsum(0) / total
    tail = (1 - mass) / 2
    start = int((share <= tail).sum())
    end = int((share < 1 - tail).sum()) + 1
    return min(start, len(along) - 1), min(end, len(along))
