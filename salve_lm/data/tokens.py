"""Documents as tokens in rows of one length: what language models are trained and run on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from salve_lm.data.corpus import Corpus, Document
from salve_lm.data.packing import PADDING, Packing, Rows, Tally, pack_stream
from salve_lm.hashing import hash_plain, hash_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 4096
"""Rows that are hashed together."""


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


class RowTable(Protocol):
    """Rows that can be taken by their numbers: an array, or a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> Rows: ...


class PackedTokens:
    """Documents of one or several corpora in rows of `context` tokens; the order is fixed.

    A row holds pieces of documents, each behind a BOS token (where the tokenizer has one), also the
    later pieces of a document that did not fit into one row: models that were trained with a BOS
    go astray without it. Rows are filled up with padding.

    They are in memory, 13 bytes a token; `salve_lm.data.stored_tokens` has the same on disk.

    Args:
        documents: the documents, in order; few of them are held at a time.
        tokenizer: writes them as tokens.
        context: tokens in a row.
        packing: `cut` cuts documents wherever a row is full; `whole` begins a new row with a
            document that would not fit, and cuts only those longer than a row; `none` gives each
            piece a row of its own.
        eos: end each document with the EOS token.
        completion_only: prompts are not targets.

    Attributes:
        context: tokens in a row.
        n_documents: number of documents.
        n_tokens: tokens without BOS and padding.
        n_kept: tokens of each row whose activations count, see `TokenBatch.keep`; int32 [rows].

    Raises:
        BadConfig: no documents, a context below 2, text that fills no row, or nothing to learn.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        packing: Packing = "cut",
        eos: bool = True,
        completion_only: bool = False,
    ) -> None:
        tally, bos = Tally(), tokenizer.bos_token_id
        blocks = list(
            pack_stream(documents, tokenizer, context, packing, eos, completion_only, tally)
        )
        counts = np.concatenate([count(rows, bos) for rows in blocks])
        self._hold(np.concatenate(blocks), counts, context, bos, tally)

    def _hold(
        self,
        rows: RowTable,
        counts: npt.NDArray[np.int32],
        context: int,
        bos: int | None,
        tally: Tally,
    ) -> None:
        self.context, self.n_documents, self.n_tokens = context, tally.n_documents, tally.n_tokens
        self._rows, self._bos = rows, bos
        targets, kept = np.ascontiguousarray(counts.T)
        self._n_targets, self.n_kept = torch.from_numpy(targets), torch.from_numpy(kept)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def batch(self, rows: Tensor, n_targets: int | None = None) -> TokenBatch:
        """The rows with these numbers.

        Args:
            rows: int64 [n], possibly none.
            n_targets: targets in the global batch; those of `rows` where not given.
        """
        found = self._rows[rows.numpy()]
        ids, document, position, target = (
            torch.from_numpy(np.ascontiguousarray(found[name])) for name in found.dtype.names or ()
        )
        keep = torch.from_numpy(kept(found, self._bos))
        total = self.n_targets(rows) if n_targets is None else n_targets
        return TokenBatch(ids.long(), position.long(), document.long(), target, keep, rows, total)

    def n_targets(self, rows: Tensor) -> int:
        """Tokens to be predicted in the rows with these numbers."""
        return int(self._n_targets[rows].sum())

    def fingerprint(self) -> str:
        """A hash of the tokens, of where documents begin, and of which tokens count."""
        parts = []
        for part in torch.arange(len(self)).split(_AT_ONCE):
            batch = self.batch(part)
            fields = {"ids": batch.input_ids, "position": batch.position_ids, "keep": batch.keep}
            parts.append(hash_tensors(fields))
        return hash_plain(parts)


def kept(rows: Rows, bos: int | None) -> npt.NDArray[np.bool_]:
    """`TokenBatch.keep` of `rows`."""
    keep = (rows["document"] != PADDING) & (rows["position"] > 0)
    if bos is not None:
        keep &= rows["ids"] != bos
    return np.asarray(keep)


def count(rows: Rows, bos: int | None) -> npt.NDArray[np.int32]:
    """Targets, and kept tokens, of each row: [rows, 2]."""
    both = [rows["target"].sum(1), kept(rows, bos).sum(1)]
    return np.stack(both, axis=1).astype(np.int32)


def read_corpora(corpora: Corpus | Sequence[Corpus]) -> list[Document]:
    """The documents of one corpus, or of several one after the other."""
    return list(stream_corpora(corpora))


def stream_corpora(corpora: Corpus | Sequence[Corpus]) -> Iterator[Document]:
    """The documents of one corpus, or of several one after the other, as they are read."""
    for corpus in [corpora] if isinstance(corpora, Corpus) else corpora:
        yield from corpus.stream()
