"""Random sums of two corpora, dense beside sparse."""

from __future__ import annotations

import numpy as np
import torch

from salve_lm.specificity.documents import CorpusSums, DocumentSums
from salve_lm.specificity.latents import LayerSums, ShiftSums


def tokens_of(
    seed: int, n_documents: int, d_sae: int, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents [n] and sparse latents [n, d_sae]; every document has tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (n_documents,), generator=generator)
    document = torch.arange(n_documents).repeat_interleave(lengths)
    z = torch.rand(len(document), d_sae, generator=generator).sub(0.6).clamp(min=0)
    preference = torch.rand(d_sae, generator=generator) * scale
    return document, z * preference


def sums_of(document: torch.Tensor, z: torch.Tensor, n_documents: int) -> CorpusSums:
    """The sums of one corpus, with firings, an attribution (z cubed) and tokens."""
    sums = DocumentSums(n_documents, z.shape[1], keep_tokens=True)
    sums.update(document, z, firing=z > 0, attribution=z**3)
    return sums.result()


def layer(number: int, seed: int, n_documents: int = 24, d_sae: int = 9) -> LayerSums:
    """A layer with everything that any score needs."""
    task = sums_of(*tokens_of(seed, n_documents, d_sae, 2.0), n_documents)
    reference = sums_of(*tokens_of(seed + 1000, n_documents + 3, d_sae), n_documents + 3)
    generator = np.random.default_rng(seed)
    mass = generator.uniform(1, 2, n_documents)
    shift = ShiftSums(mass * generator.uniform(0, 1, n_documents), mass)
    return LayerSums(number, task, reference, shift)
