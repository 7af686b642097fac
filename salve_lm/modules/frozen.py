"""Which parameters of a language model are not trained."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING

from salve_lm.errors import BadConfig, NameNotFound
from salve_lm.language.names import HEAD, decoder_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def freeze_images(model: PreTrainedModel) -> None:
    """Freeze what text does not pass through; DDP would wait for its gradients."""
    trained = (f"{decoder_name(model.config)}.", f"{HEAD}.")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(trained))


def freeze(model: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose whole name fits one of `patterns`.

    Raises:
        NameNotFound: a pattern that fits no parameter.
        BadConfig: nothing is left to train.
    """
    # a tied parameter goes by each of its names
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        found = fnmatch.filter(parameters, pattern)
        if not found:
            raise NameNotFound("parameter", pattern, parameters)
        for name in found:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise BadConfig("`frozen` leaves no parameter to train. Name fewer.")
