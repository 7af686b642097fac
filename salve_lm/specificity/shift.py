"""How far fine-tuning moves a layer's latents, document by document."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from salve_lm.errors import NotFinite, ShapeMismatch
from salve_lm.specificity.documents import LEFT_OUT
from salve_lm.specificity.latents import ShiftSums


class DocumentShift:
    """Adds up |b - a|_1 and |a|_1 + |b|_1 over the tokens of each document, in float64.

    Args:
        n_documents: documents of the corpus, numbered from 0.
    """

    def __init__(self, n_documents: int) -> None:
        self.distance, self.mass = np.zeros(n_documents), np.zeros(n_documents)

    def update(self, document: Tensor, before: Tensor, after: Tensor) -> None:
        """Take in tokens.

        Args:
            document: int64 [n]; `LEFT_OUT` for a token that must not count.
            before: what each latent adds to the reconstruction, with its sign, [n, d_sae].
            after: the same in the fine-tuned model.

        Raises:
            ShapeMismatch: shapes that differ.
            NotFinite: NaN or infinity.
        """
        if before.shape != after.shape or len(document) != len(before):
            raise ShapeMismatch(
                f"Latents {tuple(before.shape)} before and {tuple(after.shape)} after fine-tuning, "
                f"for {len(document)} tokens. Run both models over the same tokens."
            )
        counts = document != LEFT_OUT
        where = document[counts].cpu().numpy()
        parts = (
            (self.distance, (after - before).abs()),
            (self.mass, before.abs() + after.abs()),
        )
        for total, values in parts:
            per_token = values.sum(1, dtype=torch.float64)[counts]
            if not bool(per_token.isfinite().all()):
                raise NotFinite("latents", "the latent shift")
            np.add.at(total, where, per_token.cpu().numpy())

    def merge(self, other: DocumentShift) -> None:
        """Take in what another rank added up."""
        self.distance += other.distance
        self.mass += other.mass

    def result(self) -> ShiftSums:
        """Everything taken in so far."""
        return ShiftSums(self.distance.copy(), self.mass.copy())
