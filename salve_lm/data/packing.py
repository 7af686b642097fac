"""Documents packed into rows of one length, one row after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from salve_lm.data.corpus import Document
from salve_lm.data.encoding import Encoded, encode_stream
from salve_lm.errors import BadConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Packing = Literal["cut", "whole", "none"]
Rows = np.ndarray[Any, np.dtype[np.void]]
PADDING = -1
_ROWS = 1024
"""That are made at once."""


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


@dataclass
class Tally:
    """What was packed so far: documents, and tokens without BOS and padding."""

    n_documents: int = 0
    n_tokens: int = 0
    n_targets: int = 0


def row_type(context: int) -> np.dtype[np.void]:
    """A row of `context` tokens, 13 bytes each; see `TokenBatch` for the fields."""
    each = (context,)
    fields = [("ids", "<i4", each), ("document", "<i4", each), ("position", "<i4", each)]
    return np.dtype([*fields, ("target", "?", each)])


def pack_stream(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    packing: Packing,
    eos: bool,
    completion_only: bool,
    tally: Tally,
) -> Iterator[Rows]:
    """Rows of `row_type`, some at a time; see `PackedTokens` for the options.

    In memory are these rows and the documents in them, whatever the size of the corpus.

    Raises:
        BadConfig: see `PackedTokens`; known at the end.
    """
    if context < 2:
        raise BadConfig(f"context must be at least 2 tokens, but is {context}.")
    bos = tokenizer.bos_token_id
    held: dict[int, Encoded] = {}

    def lengths() -> Iterator[int]:
        for number, encoded in enumerate(encode_stream(documents, tokenizer, eos)):
            held[number] = encoded
            tally.n_documents += 1
            tally.n_tokens += len(encoded.ids)
            yield len(encoded.ids)

    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    rows, n = _empty_rows(context, fill), 0
    for pieces in pack(lengths(), context, packing, bos is not None):
        _write(rows[n], pieces, held, bos, completion_only)
        n += 1
        for number in [number for number in held if number < pieces[-1].document]:
            del held[number]
        if n == _ROWS:
            tally.n_targets += int(rows["target"].sum())
            yield rows
            rows, n = _empty_rows(context, fill), 0
    tally.n_targets += int(rows["target"].sum())
    if n:
        yield rows[:n]
    _check(tally, context, packing)


def pack(
    lengths: Iterable[int], context: int, packing: Packing, bos: bool
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


def _empty_rows(context: int, fill: int) -> Rows:
    rows = np.zeros(_ROWS, row_type(context))
    rows["ids"], rows["document"] = fill, PADDING
    return rows


def _write(
    row: np.void,
    pieces: Sequence[Piece],
    encoded: dict[int, Encoded],
    bos: int | None,
    completion_only: bool,
) -> None:
    at, head = 0, int(bos is not None)
    for document, start, stop in pieces:
        ids, n_prompt = encoded[document]
        end = at + head + stop - start
        if bos is not None:
            row["ids"][at] = bos
        row["ids"][at + head : end] = ids[start:stop]
        row["document"][at:end] = document
        row["position"][at:end] = np.arange(end - at)
        # the first token of a piece has nothing before it
        learned = np.arange(start, stop) >= (n_prompt if completion_only else 0)
        row["target"][at + head : end] = learned
        row["target"][at] = False
        at = end


def _check(tally: Tally, context: int, packing: Packing) -> None:
    if not tally.n_documents:
        raise BadConfig("No documents to make tokens of: the corpus is empty.")
    if packing == "cut" and tally.n_tokens < context:
        raise BadConfig(
            f"The corpus is too small: {tally.n_tokens} tokens in {tally.n_documents} documents "
            f"do not fill one row of context={context}. Add text, lower context, or set "
            "packing: none."
        )
    if not tally.n_targets:
        raise BadConfig(
            "No token of the corpus is to be learned. With completion_only, the text behind "
            "each prompt must not be cut off: raise context."
        )
