"""Tiny random language models and a tokenizer of bytes, made in the process."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from salve_lm.tasks.base import EvaluationTask, Row

FAMILIES = ("llama", "gpt2", "gemma3", "gemma3_images")
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


def byte_tokenizer(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """A BPE over bytes with the few `merges`; BOS comes first, as with Llama and Gemma."""
    pieces = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
    )


def rows_of(
    task: EvaluationTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: int = 1
) -> list[Row]:
    """All rows of a task, as the ranks of a run would make them."""
    rows: list[Row] = []
    for rank in range(world):
        items = task.items(tokenizer)[rank::world]
        for i in range(0, len(items), task.batch_size):
            batch = task.collate(items[i : i + task.batch_size], tokenizer)
            with torch.no_grad():
                rows += task.step(model, tokenizer, batch)
    return sorted(rows, key=lambda row: row["sample"])


def tiny_model(family: str, vocab: int = 272, context: int = 256, seed: int = 0) -> PreTrainedModel:
    """A random model whose greedy outputs vary; in eval mode."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": context,
        "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    # one layer of full attention behind two that see 8 tokens
    gemma = {
        **sizes, "head_dim": 8, "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    }  # fmt: skip
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    if family == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**gemma)).eval()
    if family == "gemma3_images":
        eyes = {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        }  # fmt: skip
        config = Gemma3Config(
            text_config=gemma, vision_config=eyes, mm_tokens_per_image=1, boi_token_index=vocab - 3,
            eoi_token_index=vocab - 2, image_token_index=vocab - 1, eos_token_id=2,
        )  # fmt: skip
        return Gemma3ForConditionalGeneration(config).eval()
    config = GPT2Config(
        vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=context,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()
