"""Layer scores under one interface: how specific to a task is what a layer's latents do?

Every score lies in [0, 1], or in [-1, 1] (`TopMean`, `MeanSpecificity`, and `LatentShift` with
`increment`), and all but `TopMean` do not grow by themselves with the number of latents, with how
many are active, or with their scale. "Activation" is the length of what a latent adds to the
reconstruction, |z_l| times the norm of decoder row l, so that rescaling a latent and its decoder
row changes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from salve_lm.errors import BadConfig
from salve_lm.specificity.auroc import auroc_of_latents, weighted_auroc
from salve_lm.specificity.latents import (
    LayerSums,
    Measure,
    blocks,
    mean_per_token,
    specificity,
    unit_weights,
)
from salve_lm.specificity.samples import Samples

Array = NDArray[Any]


class LayerScore(ABC):
    """A number for each layer, and for each resample of the documents. Derive to add a score.

    Attributes:
        name: names the score in files and tables.
        needs_gradients: gradients of the task loss (a backward pass over the task corpus).
        needs_finetuned: the fine-tuned model, run over the task corpus too.
    """

    name: ClassVar[str]
    needs_gradients: ClassVar[bool] = False
    needs_finetuned: ClassVar[bool] = False

    @property
    def needs_firings(self) -> bool:
        """Whether firings have to be counted."""
        return False

    @property
    def needs_tokens(self) -> bool:
        """Whether single tokens have to be kept, which takes much memory."""
        return False

    def describe(self) -> dict[str, Any]:
        """Name and options as plain values."""
        return {"name": self.name, "class": type(self).__name__, **vars(self)}

    def evaluate(self, layers: list[LayerSums], task: Array, reference: Array) -> Array:
        """The score of every layer under weights of the documents.

        Args:
            layers: in ascending order.
            task: weights of the task documents [n_weightings, n_documents].
            reference: of the reference documents.

        Returns:
            float64 [n_weightings, n_layers].

        Raises:
            BadConfig: something that the score needs was not measured.
        """
        columns = [
            np.concatenate(
                [
                    self.of_layer(layer, task[rows], reference[rows])
                    for rows in blocks(len(task), layer.task.d_sae)
                ]
            )
            for layer in layers
        ]
        return np.stack(columns, axis=1)

    @abstractmethod
    def of_layer(self, layer: LayerSums, task: Array, reference: Array) -> Array:
        """The score of one layer, float64 [n_weightings]; arguments as in `evaluate`."""


class SpecificLatents(LayerScore):
    """What the scores over task-specific latents share.

    Args:
        measure: What specificity compares: mean `activation`, or the rate of `firing`.
    """

    def __init__(self, measure: Measure = "activation") -> None:
        self.measure = measure

    @property
    def needs_firings(self) -> bool:
        """Whether firings have to be counted."""
        return self.measure == "firing"

    def specificity(self, layer: LayerSums, task: Array, reference: Array) -> Array:
        """s_f of every latent under weights of the documents, [n_weightings, d_sae]."""
        return specificity(
            mean_per_token(layer.task, task, self.measure),
            mean_per_token(layer.reference, reference, self.measure),
        )


class MassShare(SpecificLatents):
    """Share of the layer's task activation mass on latents with specificity of at least a bound.

    Specificity of latent f: s_f = (m_T - m_R) / (m_T + m_R), m the mean per token.

    Args:
        at_least: Bound of s_f. 0.5 means three times as much in the task corpus.
        measure: What specificity compares: mean `activation`, or the rate of `firing`.
    """

    name: ClassVar[str] = "mass_share"

    def __init__(self, at_least: float = 0.5, measure: Measure = "activation") -> None:
        super().__init__(measure)
        self.at_least = _checked_bound(at_least)

    def of_layer(self, layer: LayerSums, task: Array, reference: Array) -> Array:
        """See `LayerScore.of_layer`."""
        specific = self.specificity(layer, task, reference) >= self.at_least
        return _share(mean_per_token(layer.task, task, "activation"), specific)


class MeanSpecificity(SpecificLatents):
    """Mean specificity of the layer's task activation: sum of m_T s_f over sum of m_T (ours).

    As `MassShare`, but without a bound: a latent with much mass whose s_f lies at the bound moves
    `MassShare` from one resample of the documents to the next. Lies in [-1, 1].

    Args:
        measure: What specificity compares: mean `activation`, or the rate of `firing`.
    """

    name: ClassVar[str] = "mean_specificity"

    def of_layer(self, layer: LayerSums, task: Array, reference: Array) -> Array:
        """See `LayerScore.of_layer`."""
        mass = mean_per_token(layer.task, task, "activation")
        return _ratio((mass * self.specificity(layer, task, reference)).sum(1), mass.sum(1))


class TopMean(SpecificLatents):
    """Mean specificity of the n most specific latents. It grows with the number of latents.

    Args:
        n: How many latents.
        measure: What specificity compares: mean `activation`, or the rate of `firing`.
        min_documents: Only latents that are active in so many task documents; a latent that one
            document sets off has specificity 1 by chance.
    """

    name: ClassVar[str] = "top_mean"

    def __init__(
        self, n: int = 10, measure: Measure = "activation", min_documents: int = 5
    ) -> None:
        super().__init__(measure)
        if n < 1 or min_documents < 1:
            raise BadConfig("n and min_documents of TopMean must be at least 1.")
        self.n, self.min_documents = n, min_documents

    def of_layer(self, layer: LayerSums, task: Array, reference: Array) -> Array:
        """See `LayerScore.of_layer`. Fewer than n such latents: the missing ones count as 0."""
        documents = (layer.task.activation > 0).sum(0)
        common = np.asarray(documents).ravel() >= self.min_documents
        found = self.specificity(layer, task, reference)[:, common]
        n = min(self.n, found.shape[1])
        top = np.partition(found, found.shape[1] - n, axis=1)[:, found.shape[1] - n :] if n else 0
        return np.zeros(len(task)) + np.sum(top, axis=-1) / self.n


class SingleLatentAUROC(LayerScore):
    """AUROC of the one latent that best tells task from reference, chosen on other documents.

    The best of many latents looks good by chance, and the better the more there are. So the
    latent is chosen on the documents of even number and measured on those of odd number, and the
    other way round; the score is the mean of the two. The choice is made once, on the corpora
    themselves: the interval does not include it.

    Args:
        level: Samples are `documents` (by a latent's mean per token) or single `tokens`.
    """

    name: ClassVar[str] = "auroc"

    def __init__(self, level: Literal["documents", "tokens"] = "documents") -> None:
        self.level = level

    @property
    def needs_tokens(self) -> bool:
        """Whether single tokens have to be kept."""
        return self.level == "tokens"

    def of_layer(self, layer: LayerSums, task: Array, reference: Array) -> Array:
        """See `LayerScore.of_layer`."""
        both = [Samples.of(c, self.level) for c in (layer.task, layer.reference)]
        halves = []
        for parity in (0, 1):
            chosen = self._choose(both, parity, layer.task.d_sae)
            measured = [samples.half(1 - parity) for samples in both]
            halves.append(
                weighted_auroc(
                    measured[0].of_latent(chosen),
                    measured[1].of_latent(chosen),
                    measured[0].per_document,
                    measured[1].per_document,
                    task,
                    reference,
                )
            )
        return np.asarray(sum(halves) / 2)

    @staticmethod
    def _choose(both: list[Samples], parity: int, d_sae: int) -> int:
        task, reference = (samples.half(parity) for samples in both)
        n_task, n_reference = task.per_document.sum(), reference.per_document.sum()
        if n_task == 0 or n_reference == 0:
            raise BadConfig("AUROC needs at least two documents in each corpus: give more.")
        found = auroc_of_latents(
            d_sae, task.entries, reference.entries, float(n_task), float(n_reference)
        )
        return int(found.argmax())


class LatentShift(LayerScore):
    """How far fine-tuning moves the layer's latents on the same task tokens (ours).

    sum |b - a| / sum (|a| + |b|) over latents and tokens, a and b before and after (Bray-Curtis
    dissimilarity): 0 where nothing moves, 1 where no latent is shared. The residual stream carries
    a change upwards, so later layers tend to score higher; `increment` takes that away.

    Args:
        increment: Subtract the shift of the next lower layer that was measured.
    """

    name: ClassVar[str] = "latent_shift"
    needs_finetuned: ClassVar[bool] = True

    def __init__(self, increment: bool = False) -> None:
        self.increment = increment

    def evaluate(self, layers: list[LayerSums], task: Array, reference: Array) -> Array:
        """See `LayerScore.evaluate`."""
        found = super().evaluate(layers, task, reference)
        return np.diff(found, axis=1, prepend=0.0) if self.increment else found

    def of_layer(self, layer: LayerSums, task: Array, reference: Array) -> Array:
        """See `LayerScore.of_layer`."""
        if layer.shift is None:
            raise BadConfig("LatentShift compares two models: give `finetuned` too.")
        return _ratio(task @ layer.shift.distance, task @ layer.shift.mass)


class Attribution(SpecificLatents):
    """Share of the layer's attribution to the task loss that task-specific latents carry (ours).

    Attribution of a latent at a token: |z dL/dz|, L the loss summed over the document's tokens,
    dL/dz the gradient at the layer times the latent's decoder row. It estimates how much the loss
    would change without the latent. Task-specific latents: as in `MassShare`.

    Args:
        at_least: Bound of the specificity.
        measure: What specificity compares: mean `activation`, or the rate of `firing`.
    """

    name: ClassVar[str] = "attribution"
    needs_gradients: ClassVar[bool] = True

    def __init__(self, at_least: float = 0.5, measure: Measure = "activation") -> None:
        super().__init__(measure)
        self.at_least = _checked_bound(at_least)

    def of_layer(self, layer: LayerSums, task: Array, reference: Array) -> Array:
        """See `LayerScore.of_layer`."""
        if layer.task.attribution is None:
            raise BadConfig("Attributions were not measured on the task corpus.")
        specific = self.specificity(layer, task, reference) >= self.at_least
        return _share(np.asarray((layer.task.attribution.T @ task.T).T), specific)


def _checked_bound(at_least: float) -> float:
    if not -1 < at_least <= 1:
        raise BadConfig(f"at_least is {at_least}; a specificity lies in (-1, 1].")
    return at_least


def _share(mass: Array, selected: Array) -> Array:
    return _ratio((mass * selected).sum(1), mass.sum(1))


def _ratio(part: Array, whole: Array) -> Array:
    """`part / whole`, 0 where both are 0."""
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), 0.0)


def point_scores(score: LayerScore, layers: list[LayerSums]) -> Array:
    """The score of every layer on the corpora themselves, float64 [n_layers]."""
    weights = unit_weights(layers[0].task), unit_weights(layers[0].reference)
    return score.evaluate(layers, *weights)[0]
