"""What every latent did in every document: sums that a bootstrap over documents needs.

Kept sparsely: a document sets off few of the latents of a sparse autoencoder. A pair of document
and latent with any activity takes 16 bytes, 4 more with firing counts, 8 more with attributions;
with `keep_tokens` every active (token, latent) takes another 12. Latents without exact zeros
(`linear_l1`) fill all d_sae of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from salve_lm.errors import BadConfig, NotFinite, ShapeMismatch

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Array = NDArray[Any]
LEFT_OUT = -1
"""The document of a token that counts nowhere (BOS, padding)."""


@dataclass(frozen=True)
class TokenValues:
    """Every active latent of every token: `document`, `latent` int32 [n], `value` float32 [n]."""

    document: Array
    latent: Array
    value: Array


@dataclass(frozen=True)
class CorpusSums:
    """A corpus at one layer, document by document.

    Attributes:
        tokens: counted tokens of each document, float64 [n_documents].
        activation: sum over the document's tokens of each latent, float64 [n_documents, d_sae].
        firing: how many of its tokens fire the latent, float64, same shape; None where not counted.
        attribution: sum over its tokens of |activation x gradient|, same shape; None where not
            measured.
        by_token: the single tokens; None where not kept.
    """

    tokens: Array
    activation: csr_array
    firing: csr_array | None = None
    attribution: csr_array | None = None
    by_token: TokenValues | None = None

    @property
    def n_documents(self) -> int:
        """Number of documents, those without a counted token included."""
        return len(self.tokens)

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return int(self.activation.shape[1])


@dataclass
class _Parts:
    """Entries in the order they came; several may share document and latent."""

    document: list[Array] = field(default_factory=list)
    latent: list[Array] = field(default_factory=list)
    activation: list[Array] = field(default_factory=list)
    firing: list[Array] = field(default_factory=list)
    attribution: list[Array] = field(default_factory=list)
    token_document: list[Array] = field(default_factory=list)
    token_latent: list[Array] = field(default_factory=list)
    token_value: list[Array] = field(default_factory=list)


class DocumentSums:
    """Takes in tokens batch by batch, in any order, and adds up what each document's latents did.

    A document may come in several windows, batches or ranks; sums are float64.

    Args:
        n_documents: documents of the corpus, numbered from 0, the same on all ranks.
        d_sae: number of latents.
        keep_tokens: also keep every active latent of every token.
    """

    def __init__(self, n_documents: int, d_sae: int, *, keep_tokens: bool = False) -> None:
        if n_documents < 1 or d_sae < 1:
            raise BadConfig(f"Sums of {n_documents} documents and {d_sae} latents are empty.")
        self.n_documents, self.d_sae, self.keep_tokens = n_documents, d_sae, keep_tokens
        self.tokens = np.zeros(n_documents)
        self._parts = _Parts()

    def update(
        self,
        document: Tensor,
        activation: Tensor,
        firing: Tensor | None = None,
        attribution: Tensor | None = None,
    ) -> None:
        """Take in a batch of tokens.

        Args:
            document: int64 [n], the token's document, or `LEFT_OUT` for a token that must not count
                (BOS, padding). Tokens of one document should stand together: each run of them is
                one entry a latent.
            activation: [n, d_sae], at least 0.
            firing: bool [n, d_sae]; true only where `activation` is above 0.
            attribution: [n, d_sae], at least 0, and 0 wherever `activation` is.

        Raises:
            ShapeMismatch: shapes other than these.
            NotFinite: NaN or infinity.
            BadConfig: a document that does not exist.
        """
        self._check(document, activation, firing, attribution)
        start = 0
        runs, lengths = torch.unique_consecutive(document, return_counts=True)
        for d, length in zip(runs.tolist(), lengths.tolist(), strict=True):
            rows = slice(start, start + length)
            start += length
            if d != LEFT_OUT:
                self._add(
                    d,
                    activation[rows],
                    None if firing is None else firing[rows],
                    None if attribution is None else attribution[rows],
                )

    def merge(self, other: DocumentSums) -> None:
        """Take in what another rank added up; both hold different windows of the same corpus."""
        if (self.n_documents, self.d_sae) != (other.n_documents, other.d_sae):
            raise ShapeMismatch(
                f"Sums of {other.n_documents} documents and {other.d_sae} latents cannot be merged "
                f"into those of {self.n_documents} and {self.d_sae}."
            )
        self.tokens += other.tokens
        for name, mine in vars(self._parts).items():
            mine.extend(getattr(other._parts, name))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.tokens.nbytes + sum(a.nbytes for p in vars(self._parts).values() for a in p)

    def result(self) -> CorpusSums:
        """Everything taken in so far."""
        parts = self._parts
        by_token = None
        if self.keep_tokens:
            by_token = TokenValues(
                _joined(parts.token_document, np.int32),
                _joined(parts.token_latent, np.int32),
                _joined(parts.token_value, np.float32),
            )
        return CorpusSums(
            self.tokens.copy(),
            self._matrix(parts.activation),
            self._matrix(parts.firing) if parts.firing else None,
            self._matrix(parts.attribution) if parts.attribution else None,
            by_token,
        )

    def _add(
        self, document: int, activation: Tensor, firing: Tensor | None, attribution: Tensor | None
    ) -> None:
        total = activation.sum(0, dtype=torch.float64)
        if not bool(total.isfinite().all()):
            raise NotFinite("activation", f"document {document}")
        latent = total.nonzero().squeeze(1)
        parts = self._parts
        self.tokens[document] += len(activation)
        parts.document.append(np.full(len(latent), document, dtype=np.int32))
        parts.latent.append(latent.to(torch.int32).cpu().numpy())
        parts.activation.append(total[latent].cpu().numpy())
        if firing is not None:
            parts.firing.append(firing.sum(0, dtype=torch.int32)[latent].cpu().numpy())
        if attribution is not None:
            summed = attribution.sum(0, dtype=torch.float64)[latent]
            if not bool(summed.isfinite().all()):
                raise NotFinite("attribution", f"document {document}")
            parts.attribution.append(summed.cpu().numpy())
        if self.keep_tokens:
            _, which = entries = activation.nonzero(as_tuple=True)
            parts.token_document.append(np.full(len(which), document, dtype=np.int32))
            parts.token_latent.append(which.to(torch.int32).cpu().numpy())
            parts.token_value.append(activation[entries].float().cpu().numpy())

    def _matrix(self, values: list[Array]) -> csr_array:
        from scipy.sparse import coo_array

        parts = self._parts
        where = (_joined(parts.document, np.int32), _joined(parts.latent, np.int32))
        shape = (self.n_documents, self.d_sae)
        # several windows of a document: duplicates are added up
        return coo_array((_joined(values, np.float64), where), shape=shape).tocsr()

    def _check(
        self,
        document: Tensor,
        activation: Tensor,
        firing: Tensor | None,
        attribution: Tensor | None,
    ) -> None:
        wanted = (len(document), self.d_sae)
        for name, given in (
            ("activation", activation),
            ("firing", firing),
            ("attribution", attribution),
        ):
            if given is not None and tuple(given.shape) != wanted:
                raise ShapeMismatch(f"{name} has shape {tuple(given.shape)}, not {wanted}.")
        if len(document) == 0:
            return
        if int(document.min()) < LEFT_OUT or int(document.max()) >= self.n_documents:
            raise BadConfig(
                f"A token of document {int(document.max())}, but the corpus has "
                f"{self.n_documents}, numbered from 0."
            )
        for name, started, given in (
            ("firing", self._parts.firing, firing),
            ("attribution", self._parts.attribution, attribution),
        ):
            if self._parts.activation and bool(started) != (given is not None):
                raise BadConfig(f"Give {name} with every batch of a corpus, or with none.")


def _joined(parts: list[Array], dtype: type[np.generic]) -> Array:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)
