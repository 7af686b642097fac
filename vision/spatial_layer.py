"""Which activation a heatmap is drawn on, and how it becomes a grid of positions."""

from __future__ import annotations

import contextlib
import math
from functools import partial

from torch import Size, Tensor, nn

from salve_lm.activations.sites import Site
from salve_lm.errors import BadConfig
from vision.site_forward import forward_to


def find_layer(model: nn.Module, site: Site, image: Tensor) -> Site:
    """The last activation with spatial positions that the site depends on.

    - A site that averages or lists positions itself: the site.
    - A transformer: the output of the last block's first norm before the site. Behind it patch
      tokens still reach the [CLS] token, at the block's output they no longer do (METHODS 5).
    - Otherwise: the last module before the site whose output is [n, channels, h, w] with more than
      one position, and that is not inside a block which itself ends at one position (a branch of
      such a block is not all that the site depends on).

    Where a network ends in several branches, only the last is found: name a layer by hand.

    Args:
        model: the network.
        site: where the SAE reads.
        image: one image [1, channels, height, width], for one forward pass.

    Raises:
        BadConfig: nothing before the site has positions.
    """
    shapes: dict[str, Size] = {}

    def note(name: str, _: nn.Module, args: tuple[object, ...], output: object) -> None:
        if isinstance(output, Tensor):
            # last to come out is last in the dict; a module's first run counts
            shapes.setdefault(name, output.shape)

    def note_input(_: nn.Module, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            shapes.setdefault("", args[0].shape)

    modules = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            if name:
                handle = module.register_forward_hook(partial(note, name))
                stack.callback(handle.remove)
        if site.io == "input" and site.module in modules:
            handle = modules[site.module].register_forward_pre_hook(note_input)
            stack.callback(handle.remove)
        forward_to(model, site, image)

    at_site = shapes.pop("", None) if site.io == "input" else shapes.get(site.module)
    if site.reduce in ("mean", "positions") and at_site is not None and _has_positions(at_site):
        return Site(site.module, site.io)
    tokens = [n for n in _block_norms(model) if len(shapes.get(n, ())) == 3 and n != site.module]
    if tokens:
        return Site(max(tokens, key=list(shapes).index))
    for name in reversed(shapes):
        blocks = [
            block
            for block in _ancestors(name)
            if block in shapes and not isinstance(modules[block], nn.Sequential)
        ]
        narrow = any(len(shapes[b]) == 4 and not _has_positions(shapes[b]) for b in blocks)
        if len(shapes[name]) == 4 and _has_positions(shapes[name]) and not narrow:
            return Site(name)
    raise BadConfig(
        f"Nothing before the site {str(site)!r} has spatial positions, so there is no heatmap. "
        "Choose a site behind a convolution or a transformer block."
    )


def as_grid(
    model: nn.Module, layer: Site, activation: Tensor, image_size: tuple[int, int]
) -> Tensor:
    """Bring an activation into the form [n, channels, h, w]; gradients pass through.

    Args:
        model: says how many tokens are no patches, and whether channels come last (timm).
        layer: named in errors.
        activation: [n, channels, h, w] or [n, tokens, channels]; of the tokens those in front that
            are no patches ([CLS], registers) are dropped and the others laid out in rows.
        image_size: height and width of the images; the patch grid has their proportions.

    Raises:
        BadConfig: no axes for positions, a single position, or tokens that fill no such grid.
    """
    if activation.ndim == 4:
        last = any(getattr(m, "output_fmt", None) == "NHWC" for m in model.modules())
        grid = activation.permute(0, 3, 1, 2) if last else activation
    elif activation.ndim == 3:
        patches = activation[:, _prefix_tokens(model) :]
        n, count, width = patches.shape
        rows = max(1, round(math.sqrt(count * image_size[0] / image_size[1])))
        if count % rows or count == 0:
            raise BadConfig(
                f"Layer {str(layer)!r} gives {count} patch tokens, which fill no grid of the "
                f"proportions of {image_size[0]} x {image_size[1]} images. Choose another layer."
            )
        grid = patches.transpose(1, 2).reshape(n, width, rows, count // rows)
    else:
        grid = activation
    if grid.ndim != 4 or not _has_positions(grid.shape):
        raise BadConfig(
            f"Layer {str(layer)!r} gives {list(activation.shape)}: there are no spatial positions "
            "to draw a heatmap on. Choose an earlier layer, or leave `layer` out."
        )
    return grid


def _has_positions(shape: Size) -> bool:
    return len(shape) == 3 or (len(shape) == 4 and shape[2] * shape[3] > 1)


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _block_norms(model: nn.Module) -> list[str]:
    """The first norm of every transformer block (torchvision's and timm's names of them)."""
    found = []
    for name, module in model.named_modules():
        if f".{name}".endswith((".encoder.layers", ".blocks")):
            for child, block in module.named_children():
                norm = next((n for n, m in block.named_modules() if "Norm" in type(m).__name__), "")
                if norm:
                    found.append(f"{name}.{child}.{norm}")
    return found


def _prefix_tokens(model: nn.Module) -> int:
    """Number of tokens in front of the patches."""
    for module in model.modules():
        count = getattr(module, "num_prefix_tokens", None)
        if isinstance(count, int):
            return count
        if any(getattr(module, n, None) is not None for n in ("class_token", "cls_token")):
            return 1
    return 0
