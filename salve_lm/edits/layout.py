"""Which dimension of a module's weight reads inputs and which one writes outputs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from salve_lm.errors import UnsupportedEdit

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Layout(NamedTuple):
    """The axes of an editable weight.

    Seen with the output axis first, every editable weight is [d_out, d_in, *kernel]; that is the
    view in which all edits are written.
    """

    output_dim: int
    d_in: int
    d_out: int


def is_editable(module: nn.Module) -> bool:
    """Whether `module` is a linear or convolutional layer with an ordinary floating weight."""
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return False
    if isinstance(module, nn.Linear):
        return weight.ndim == 2
    return isinstance(module, CONVOLUTIONS) or _is_transposed_linear(module)


def layout_of(name: str, module: nn.Module) -> Layout:
    """The axes of the weight of `module`.

    Raises:
        UnsupportedEdit: neither linear nor convolutional, grouped, quantised or parametrised.
    """
    if not is_editable(module):
        raise UnsupportedEdit(
            f"{name!r} is a {type(module).__name__}: only Linear and Conv layers with an ordinary "
            "floating-point weight can be edited. Name such a layer."
        )
    weight = module._parameters["weight"]
    if weight is None:
        raise UnsupportedEdit(f"{name!r} has no weight. Name another layer.")
    if _is_transposed_linear(module):
        return Layout(output_dim=1, d_in=weight.shape[0], d_out=weight.shape[1])
    if isinstance(module, CONVOLUTIONS) and module.groups != 1:
        raise UnsupportedEdit(
            f"{name!r} is a convolution with {module.groups} groups, whose weight does not hold "
            "one input axis. Name an ungrouped layer."
        )
    return Layout(output_dim=0, d_in=weight.shape[1], d_out=weight.shape[0])


def outputs_first(weight: Tensor, output_dim: int) -> Tensor:
    """`weight` as a view [d_out, d_in, *kernel]; a bias [d_out] stays as it is."""
    return weight if weight.ndim == 1 else weight.movedim(output_dim, 0)


def pads(module: nn.Module) -> bool:
    """Whether a convolution pads its input, so that a shift of the input is not a shift of bias."""
    if not isinstance(module, CONVOLUTIONS):
        return False
    if isinstance(module.padding, str):
        return module.padding != "valid"
    return any(p != 0 for p in module.padding)


def _is_transposed_linear(module: nn.Module) -> bool:
    # transformers' GPT-2 layer, weight [d_in, d_out]; by name, since importing it takes seconds
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and weight is not None and weight.ndim == 2
