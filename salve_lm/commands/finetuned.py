"""The fine-tuned model beside the one it came from."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from salve_lm.errors import BadConfig, MissingFile, ShapeMismatch
from salve_lm.modules.language_model import LanguageModel


def load_finetuned(source: str, studied: LanguageModel) -> nn.Module:
    """The fine-tuned model, in the dtype of the other; an adapter is merged into a copy of it."""
    base = studied.model
    if (Path(source) / "adapter_config.json").is_file():
        try:
            from peft import PeftModel
        except ImportError as e:
            raise BadConfig("LoRA adapters need peft: pip install 'salve-lm[language]'.") from e
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), source)
        return adapted.merge_and_unload().eval()
    if Path(source).is_file():
        raise MissingFile(
            f"{source} is a file. Give the folder of the fine-tuned model (its fit writes `out`) "
            "or of its LoRA adapter."
        )
    from salve_lm.language import d_model, load_causal_lm, n_layers, text_config

    found = load_causal_lm(source)
    nn.Module.to(found, dtype=next(base.parameters()).dtype)
    for what, of in (
        ("layers", n_layers),
        ("width", d_model),
        ("vocabulary", lambda config: text_config(config).vocab_size),
    ):
        if of(found.config) != of(base.config):
            raise ShapeMismatch(
                f"The fine-tuned model {source} has {what} {of(found.config)}, this one "
                f"{of(base.config)}. Give the model that was fine-tuned from this one."
            )
    return found
