"""A small tokenizer of one's own: byte-level pairs, every number split into its digits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from salve_lm.errors import BadConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # ids 0, 1, 2
_BYTES = 256


def train_byte_pairs(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Train a tokenizer that can write any text; the same texts give the same tokenizer.

    A text begins with BOS. Padding is on the left, as generation needs it.

    Args:
        texts: what to learn the pairs from.
        vocab_size: tokens, of which 256 are bytes and 3 are PAD, BOS and EOS.

    Raises:
        BadConfig: a vocabulary too small for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < _BYTES + 3:
        raise BadConfig(f"vocab_size is {vocab_size}; give at least {_BYTES + 3}.")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, made.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
