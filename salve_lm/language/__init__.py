"""Causal language models of transformers: loading them, and what their tensors are called.

Light to import: transformers is loaded where it is used.
"""

from salve_lm.language.loading import load_causal_lm, load_tokenizer, new_causal_lm
from salve_lm.language.names import (
    d_model,
    decoder_prefix,
    disk_names,
    is_tied,
    layer_of,
    load_config,
    memory_name,
    n_layers,
    text_config,
)

__all__ = [
    "d_model",
    "decoder_prefix",
    "disk_names",
    "is_tied",
    "layer_of",
    "load_causal_lm",
    "load_config",
    "load_tokenizer",
    "memory_name",
    "n_layers",
    "new_causal_lm",
    "text_config",
]
