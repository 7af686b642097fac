"""Random models of each family, a few kilobytes each, and a tokenizer of single bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from salve_lm.language import new_causal_lm

PAD, EOS, BOS = 0, 1, 2
VOCABULARY = 3 + 256

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_GEMMA3 = {**_SIZES, "model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 8}
_IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3_text": _GEMMA3,
    "gemma3": {
        "model_type": "gemma3",
        "text_config": _GEMMA3,
        "vision_config": _IMAGES,
        "mm_tokens_per_image": 4,
        "boi_token_index": 3,
        "eoi_token_index": 4,
        "image_token_index": 5,
    },
    "llama": {**_SIZES, "model_type": "llama", "tie_word_embeddings": False},
    "llama_tied": {**_SIZES, "model_type": "llama", "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 3,
        "n_head": 2,
        "n_positions": 64,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
    },
}


def make_tokenizer(bos: bool = True, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte; pads on the left."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS}
    vocabulary |= {letter: 3 + i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>" if bos else None,
        padding_side="left",
    )
    made.chat_template = chat_template
    return made


def save_model(folder: Path, family: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random model of `family`, saved with its tokenizer."""
    model = new_causal_lm(CONFIGS[family], seed)
    model.save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    return model
