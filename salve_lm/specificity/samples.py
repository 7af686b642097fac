"""Documents or tokens as samples of every latent, for AUROC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from salve_lm.errors import BadConfig
from salve_lm.specificity.documents import CorpusSums

Array = NDArray[Any]


@dataclass(frozen=True)
class Samples:
    """The entries above 0 of documents or tokens, and how many samples each document has."""

    document: Array
    latent: Array
    value: Array
    per_document: Array

    @classmethod
    def of(cls, corpus: CorpusSums, level: str) -> Samples:
        """Documents by their mean per token, or single tokens (`level: tokens`)."""
        if level == "tokens":
            found = corpus.by_token
            if found is None:
                raise BadConfig("Single tokens were not kept: collect the sums with keep_tokens.")
            return cls(found.document, found.latent, found.value, corpus.tokens)
        entries = corpus.activation.tocoo()
        value = entries.data / corpus.tokens[entries.row]
        return cls(entries.row, entries.col, value, (corpus.tokens > 0).astype(np.float64))

    @property
    def entries(self) -> tuple[Array, Array]:
        """`(latent, value)` of all entries."""
        return self.latent, self.value

    def half(self, parity: int) -> Samples:
        """The documents of even (0) or odd (1) number; the others have no samples."""
        mine = self.document % 2 == parity
        kept = np.arange(len(self.per_document)) % 2 == parity
        return Samples(
            self.document[mine], self.latent[mine], self.value[mine], self.per_document * kept
        )

    def of_latent(self, latent: int) -> tuple[Array, Array]:
        """`(document, value)` of one latent."""
        mine = self.latent == latent
        return self.document[mine], self.value[mine]
