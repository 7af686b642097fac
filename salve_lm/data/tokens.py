"""Documents as tokens: encoded, cut into pieces, packed into rows of one length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from salve_lm.data.corpus import Corpus, Document
from salve_lm.errors import BadConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Packing = Literal["cut", "whole", "none"]
Ids = np.ndarray[Any, np.dtype[np.int32]]
PADDING = -1


class Encoded(NamedTuple):
    """One document as tokens.

    Attributes:
        ids: int32 [n], without BOS, with EOS if asked for.
        n_prompt: tokens of the prompt, at the beginning of `ids`.
    """

    ids: Ids
    n_prompt: int


class Piece(NamedTuple):
    """A part of a document that stands in one row, `ids[start:stop]` after a BOS.

    Attributes:
        document: index of the document.
        start: its first token.
        stop: the end.
    """

    document: int
    start: int
    stop: int


class TokenBatch(NamedTuple):
    """One rank's share of a global batch of rows.

    Attributes:
        input_ids: int64 [n, context].
        position_ids: int64 [n, context]; each document starts again at 0, by which transformers
            sees that documents of a row must not look at each other (with no attention mask and no
            cache). Padding has 0 throughout.
        document: index of each token's document, int64 [n, context]; -1 at padding.
        target: bool [n, context]; whether the token is to be predicted from those before it: not
            BOS, not padding, and with `completion_only` not the prompt.
        keep: bool [n, context]; whether activations here belong in statistics and in the training
            of autoencoders: not BOS, not padding, and not a document's first token, to which
            attention flows as it does to BOS.
        sample: index of each row in its split, int64 [n].
        n_targets: targets in the global batch, summed over all ranks. The mean loss is
            `sum over targets / n_targets`, summed over ranks.
    """

    input_ids: Tensor
    position_ids: Tensor
    document: Tensor
    target: Tensor
    keep: Tensor
    sample: Tensor
    n_targets: int

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for a causal language model of transformers."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "use_cache": False,
        }


class PackedTokens:
    """Documents of one or several corpora in rows of `context` tokens; the order is fixed.

    A row holds pieces of documents, each behind a BOS token (where the tokenizer has one), also the
    later pieces of a document that did not fit into one row: models that were trained with a BOS
    go astray without it. Rows are filled up with padding.

    Args:
        documents: the documents, in order.
        tokenizer: writes them as tokens.
        context: tokens in a row.
        packing: `cut` cuts documents wherever a row is full; `whole` begins a new row with a
            document that would not fit, and cuts only those longer than a row; `none` gives each
            piece a row of its own.
        eos: end each document with the EOS token.
        completion_only: prompts are not targets.

    Attributes:
        n_documents: number of documents.
        n_tokens: tokens without BOS and padding.
        groups: group of each document.

    Raises:
        BadConfig: no documents, a context below 2, text that fills no row, or nothing to learn.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        packing: Packing = "cut",
        eos: bool = True,
        completion_only: bool = False,
    ) -> None:
        if context < 2:
            raise BadConfig(f"context must be at least 2 tokens, but is {context}.")
        if not documents:
            raise BadConfig("No documents to make tokens of: the corpus is empty.")
        encoded = encode(documents, tokenizer, eos)
        self.context = context
        self.groups = [d.group for d in documents]
        self.n_documents = len(documents)
        self.n_tokens = sum(len(e.ids) for e in encoded)
        if packing == "cut" and self.n_tokens < context:
            raise BadConfig(
                f"The corpus is too small: {self.n_tokens} tokens in {len(documents)} documents "
                f"do not fill one row of context={context}. Add text, lower context, or set "
                "packing: none."
            )
        self._bos: int | None = tokenizer.bos_token_id
        rows = list(pack([len(e.ids) for e in encoded], context, packing, self._bos is not None))
        shape = (len(rows), context)
        fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._ids = np.full(shape, fill, np.int32)
        self._document = np.full(shape, PADDING, np.int32)
        self._position = np.zeros(shape, np.int32)
        self._target = np.zeros(shape, bool)
        for r, pieces in enumerate(rows):
            self._write(r, pieces, encoded, completion_only)
        self._n_targets = torch.from_numpy(self._target.sum(axis=1))
        if not int(self._n_targets.sum()):
            raise BadConfig(
                "No token of the corpus is to be learned. With completion_only, the text behind "
                "each prompt must not be cut off: raise context."
            )

    def _write(
        self, row: int, pieces: Sequence[Piece], encoded: Sequence[Encoded], completion_only: bool
    ) -> None:
        at, head = 0, int(self._bos is not None)
        for document, start, stop in pieces:
            ids, n_prompt = encoded[document]
            end = at + head + stop - start
            if self._bos is not None:
                self._ids[row, at] = self._bos
            self._ids[row, at + head : end] = ids[start:stop]
            self._document[row, at:end] = document
            self._position[row, at:end] = np.arange(end - at)
            # the first token of a piece has nothing before it
            learned = np.arange(start, stop) >= (n_prompt if completion_only else 0)
            self._target[row, at + head : end] = learned
            self._target[row, at] = False
            at = end

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._ids)

    def batch(self, rows: Tensor, n_targets: int | None = None) -> TokenBatch:
        """The rows with these numbers.

        Args:
            rows: int64 [n], possibly none.
            n_targets: targets in the global batch; those of `rows` where not given.
        """
        at = rows.numpy()
        ids, document, position, target = (
            torch.from_numpy(a[at])
            for a in (self._ids, self._document, self._position, self._target)
        )
        keep = (document != PADDING) & (position > 0)
        if self._bos is not None:
            keep &= ids != self._bos
        total = self.n_targets(rows) if n_targets is None else n_targets
        return TokenBatch(ids.long(), position.long(), document.long(), target, keep, rows, total)

    def n_targets(self, rows: Tensor) -> int:
        """Tokens to be predicted in the rows with these numbers."""
        return int(self._n_targets[rows].sum())


def read_corpora(corpora: Corpus | Sequence[Corpus]) -> list[Document]:
    """The documents of one corpus, or of several one after the other."""
    several = [corpora] if isinstance(corpora, Corpus) else corpora
    return [document for corpus in several for document in corpus.documents()]


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


def pack(
    lengths: Sequence[int], context: int, packing: Packing, bos: bool
) -> Iterator[list[Piece]]:
    """Which pieces of documents stand in which row.

    Args:
        lengths: tokens of each document, without BOS.
        context: tokens in a row.
        packing: see `PackedTokens`.
        bos: whether each piece needs one more token.
    """
    row: list[Piece] = []
    room = context
    for document, length in enumerate(lengths):
        start = 0
        while start < length:
            rest = length - start + bos
            begins_anew = packing == "none" or (packing == "whole" and rest > room)
            # a piece of one token would have nothing to predict or to be predicted from
            if row and (begins_anew or room < 2):
                yield row
                row, room = [], context
            taken = min(rest, room)
            row.append(Piece(document, start, start + taken - bos))
            start, room = start + taken - bos, room - taken
    if row:
        yield row


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
