"""How many tokens a model takes, and batches of sequences of different length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from salve_lm.errors import BadConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def context_of(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens that fit: `asked`, or else what the model's config says.

    Raises:
        BadConfig: more is asked than the model has, or the config says nothing.
    """
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is None and own is None:
        raise BadConfig("The model's config names no context length; set `context`.")
    if asked is not None and own is not None and asked > own:
        raise BadConfig(f"context is {asked}, but the model takes {own} tokens; lower it.")
    return int(asked if asked is not None else own or 0)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model's inputs go; under a device map it has several devices."""
    weight = model.get_input_embeddings().weight
    if not isinstance(weight, Tensor):
        raise BadConfig("The model's embeddings have no weights.")
    return weight.device


def pad_left(sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, both [n, longest], with zeros on the left."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        if sequence:
            ids[i, -len(sequence) :] = torch.tensor(sequence)
            mask[i, -len(sequence) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def unpad(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The sequences that `pad_left` was given."""
    lengths = mask.sum(dim=1).tolist()
    return [row[len(row) - n :] for row, n in zip(ids.tolist(), lengths, strict=True)]
