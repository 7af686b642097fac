"""Norms on the residual stream of a language model, as edits of single layers meet them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from salve_lm.errors import BadConfig, UnsupportedEdit
from salve_lm.language.names import final_norm_name
from salve_lm.language.residual import norm_offset, residual_role

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FINAL_NORM = "final_norm"


def config_of(model: nn.Module) -> PreTrainedConfig | None:
    """The configuration of a language model of transformers; None for any other network."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "get_text_config") else None


def final_norm_of(model: nn.Module) -> str:
    """Full name of a language model's final norm.

    Raises:
        BadConfig: another network, or a family whose names are not known.
    """
    config = config_of(model)
    if config is None:
        raise BadConfig(
            f"`{FINAL_NORM}` means the final norm of a language model of transformers, and this is "
            f"a {type(model).__name__}. Give the layer's full name."
        )
    return final_norm_name(config)


def gain_offset(module: nn.Module, model: nn.Module) -> float | None:
    """What the norm `module` of a language model adds to its weight before it multiplies.

    None where `module` is no norm, or `model` no language model of a known family.
    """
    config = config_of(model)
    weight = module._parameters.get("weight")
    if config is None or weight is None or weight.ndim != 1:
        return None
    return norm_offset(config)


def refuse_behind_norm(name: str, model: nn.Module) -> None:
    """Raise `UnsupportedEdit` where the output of layer `name` passes a norm to the stream.

    The norm brings the output back to its own length, which cancels much of a scaling.
    """
    config = config_of(model)
    if config is None:
        return
    try:
        role = residual_role(f"{name}.weight", config)
    except (BadConfig, UnsupportedEdit):
        return  # a family that is not known
    if role is not None and not role.reads and role.norm is not None:
        raise UnsupportedEdit(
            f"The output of {name!r} passes a norm before it is written to the residual stream, "
            "which cancels much of its scaling. Edit that norm's gain: set `module` to "
            f"{role.norm.removesuffix('.weight')!r}."
        )
