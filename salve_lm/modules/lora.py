"""LoRA through peft: small trained matrices beside the frozen ones of a language model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from salve_lm.errors import BadConfig, NameNotFound
from salve_lm.language.names import decoder_prefix, layer_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adaptation (Hu et al. 2021): W + (alpha / r) B A, of which B and A are trained.

    Attributes:
        r: Rank.
        alpha: Numerator of the scale.
        dropout: Share of the inputs of A that is dropped in training.
        target_modules: Last names of the linear maps in the decoder layers to adapt, such as
            `q_proj`; all of them when absent. Never those of a vision tower.
        rslora: Scale by alpha / sqrt(r), which suits high ranks.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise BadConfig("LoRA needs r of at least 1, alpha above 0, and 0 <= dropout < 1.")


def add_lora(model: PreTrainedModel, options: LoraOptions, seed: int = 0) -> PeftModel:
    """Put LoRA layers into `model`, in place, and freeze everything else.

    Args:
        model: the model.
        options: what to add.
        seed: of A's random numbers; B begins at zero. The global random state is left as it was.

    Returns:
        peft's wrapper, which can save the adapter; it shares all modules with `model`.

    Raises:
        NameNotFound: a target that no decoder layer has.
        BadConfig: peft is not installed.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as e:
        raise BadConfig("LoRA needs the package peft: pip install peft.") from e
    targets = target_names(model, options.target_modules)
    # bare last names, which every reader of adapters knows, would adapt a vision tower as well
    bare = not any(
        name.rpartition(".")[2] in targets and layer_of(name, model.config) is None
        for name, _ in model.named_modules()
    )
    pattern = rf"{re.escape(decoder_prefix(model.config))}\.\d+\.(.+\.)?({'|'.join(targets)})"
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # fractions work too
        lora_dropout=options.dropout,
        target_modules=targets if bare else pattern,
        use_rslora=options.rslora,
        # GPT-2's Conv1D holds its matrices transposed
        fan_in_fan_out=any(_is_conv1d(m) for m in model.modules()),
        task_type=TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def target_names(model: PreTrainedModel, wanted: tuple[str, ...] | None) -> list[str]:
    """Last names of the linear maps in the decoder layers of `model`: `wanted`, or all.

    Raises:
        NameNotFound: one that no decoder layer has.
    """
    known = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if layer_of(name, model.config) is not None
            and (isinstance(module, nn.Linear) or _is_conv1d(module))
        }
    )
    for name in wanted or ():
        if name not in known:
            raise NameNotFound("linear map of a decoder layer", name, known)
    return sorted(wanted) if wanted else known


def _is_conv1d(module: nn.Module) -> bool:
    # by name: importing transformers for it takes seconds, and a model has already done so
    return type(module).__name__ == "Conv1D"
