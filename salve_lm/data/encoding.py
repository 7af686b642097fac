"""Documents as tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from salve_lm.data.corpus import Document
from salve_lm.errors import BadConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = np.ndarray[Any, np.dtype[np.int32]]
_DOCUMENTS, _CHARACTERS = 1024, 1 << 20
"""So many documents are encoded at once, of together so many characters at most, or one alone."""


class Encoded(NamedTuple):
    """One document as tokens.

    Attributes:
        ids: int32 [n], without BOS, with EOS if asked for.
        n_prompt: tokens of the prompt, at the beginning of `ids`.
    """

    ids: Ids
    n_prompt: int


def encode_stream(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, eos: bool = True
) -> Iterator[Encoded]:
    """`encode`, a few documents at a time."""
    block: list[Document] = []
    characters = 0
    for document in documents:
        size = len(document.prompt) + len(document.text)
        size += sum(len(m["content"]) for m in document.messages or ())
        if block and (len(block) == _DOCUMENTS or characters + size > _CHARACTERS):
            yield from encode(block, tokenizer, eos)
            block, characters = [], 0
        block.append(document)
        characters += size
    if block:
        yield from encode(block, tokenizer, eos)


def encode(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, eos: bool = True
) -> list[Encoded]:
    """Each document as tokens, prompt and text together, without BOS.

    A conversation is written out by the chat template, which has its own BOS and EOS: its BOS is
    taken off, and no EOS added. A token across the border of prompt and text counts as text.

    Raises:
        BadConfig: a conversation, and a tokenizer without chat template or one that refuses it.
    """
    written = [_written(d, tokenizer) for d in documents]
    # not every tokenizer can say which characters a token stands for
    offsets = any(w.n_prompt for w in written) and bool(tokenizer.is_fast)
    out = tokenizer(
        [w.text for w in written],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=offsets,
        # its advice on texts longer than the model's context is not for text that gets cut
        verbose=False,
    )
    encoded = []
    for i, (document, whole) in enumerate(zip(documents, written, strict=True)):
        ids: list[int] = out["input_ids"][i]
        n_prompt = 0
        if whole.n_prompt and offsets:
            n_prompt = sum(stop <= whole.n_prompt for _, stop in out["offset_mapping"][i])
        elif whole.n_prompt:
            prompt = whole.text[: whole.n_prompt]
            n_prompt = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if document.messages is not None:
            if ids[:1] == [tokenizer.bos_token_id]:
                ids, n_prompt = ids[1:], max(n_prompt - 1, 0)
        elif eos and tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
        encoded.append(Encoded(np.asarray(ids, np.int32), n_prompt))
    return encoded


class _Written(NamedTuple):
    """A document's text; its first `n_prompt` characters are the prompt."""

    text: str
    n_prompt: int


def _written(document: Document, tokenizer: PreTrainedTokenizerBase) -> _Written:
    if document.messages is None:
        return _Written(document.prompt + document.text, len(document.prompt))
    if not tokenizer.chat_template:
        raise BadConfig(
            "The tokenizer has no chat template. Take that of an instruction-tuned model, or set "
            "chat_template: false."
        )
    messages = [dict(m) for m in document.messages]
    try:
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        if messages[-1]["role"] != "assistant" or len(messages) == 1:
            return _Written(whole, 0)
        asked = str(
            tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        )
    except Exception as e:  # jinja's errors, of a package that need not be installed
        raise BadConfig(
            f"The tokenizer's chat template refuses a conversation: {e}. Its roles are "
            f"{[m['role'] for m in messages]}."
        ) from e
    return _Written(whole, len(asked) if whole.startswith(asked) else 0)
