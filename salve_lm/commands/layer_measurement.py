"""One pass of a language model over two corpora that measures the latents of many layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from salve_lm.activations.hooks import evaluating, run_to
from salve_lm.activations.sampler import GlobalBatches
from salve_lm.activations.sites import parse_site
from salve_lm.data.language_data import TokenLoader
from salve_lm.data.tokens import PackedTokens, TokenBatch
from salve_lm.specificity.documents import DocumentSums
from salve_lm.specificity.gradients import attribute_latents, layer_gradients
from salve_lm.specificity.latents import LayerSums
from salve_lm.specificity.saes import LayerSAE, latent_lengths
from salve_lm.specificity.scores import LayerScore
from salve_lm.specificity.shift import DocumentShift
from salve_lm.specificity.windows import TopPlaces

if TYPE_CHECKING:
    from sae_lens import SAE

    from salve_lm.modules.language_model import LanguageModel

TASK, REFERENCE = 0, 1


@dataclass(frozen=True)
class Needs:
    """What a set of scores needs beyond mean activations."""

    firings: bool
    tokens: bool
    gradients: bool
    finetuned: bool

    @classmethod
    def of(cls, scores: Sequence[LayerScore]) -> Needs:
        """What any of `scores` needs."""
        return cls(
            any(s.needs_firings for s in scores),
            any(s.needs_tokens for s in scores),
            any(s.needs_gradients for s in scores),
            any(s.needs_finetuned for s in scores),
        )


class TwoCorpora(LightningDataModule):
    """The task and the reference corpus, each row once over all ranks, in order.

    Args:
        task: packed task documents.
        reference: packed reference documents.
        batch_size: rows in a global batch.
    """

    def __init__(self, task: PackedTokens, reference: PackedTokens, batch_size: int) -> None:
        super().__init__()
        self.corpora = (task, reference)
        self._batch_size = batch_size

    def predict_dataloader(self) -> list[TokenLoader]:
        """One loader a corpus, with this rank's share; nothing is padded with duplicates."""
        rank, world = (0, 1)
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
        return [
            TokenLoader(
                tokens,
                GlobalBatches(len(tokens), self._batch_size, 0, rank, world, shuffle=False),
            )
            for tokens in self.corpora
        ]


@dataclass
class _Layer:
    """What is added up at one layer on this rank."""

    sums: tuple[DocumentSums, DocumentSums]
    places: TopPlaces
    shift: DocumentShift | None = None

    def merge(self, other: _Layer) -> None:
        for mine, theirs in zip(self.sums, other.sums, strict=True):
            mine.merge(theirs)
        self.places.merge(other.places)
        if self.shift is not None and other.shift is not None:
            self.shift.merge(other.shift)


@dataclass(frozen=True)
class Measured:
    """What the pass found, on rank zero.

    Attributes:
        layers: the sums of every layer, ascending.
        places: layer -> where its latents are strongest in the task corpus.
    """

    layers: list[LayerSums] = field(default_factory=list)
    places: dict[int, TopPlaces] = field(default_factory=dict)


class LayerMeasurement(LightningModule):
    """Encodes the residual stream of every layer and adds up, document by document.

    The model runs once over each corpus, as far as the deepest layer; where gradients are needed,
    once forwards and backwards over the task corpus; where the fine-tuned model is needed, that one
    runs over the task corpus too. Lightning's predict loop shards the rows over ranks.

    Args:
        studied: the language model.
        saes: layer -> its autoencoder.
        n_documents: of the task and of the reference corpus.
        needs: what to measure.
        finetuned: the fine-tuned model.
        n_places: strongest places kept for each latent.
        finish: called once with the result, on rank zero, when all ranks are done.
    """

    def __init__(
        self,
        studied: LanguageModel,
        saes: Mapping[int, LayerSAE],
        n_documents: tuple[int, int],
        needs: Needs,
        finetuned: nn.Module | None,
        n_places: int,
        finish: Callable[[Measured], None],
    ) -> None:
        super().__init__()
        self.saes = nn.ModuleDict({str(n): one.sae for n, one in saes.items()})
        self._thresholds = {n: one.fire_threshold for n, one in saes.items()}
        self._needs, self._finish = needs, finish
        # not submodules: a model that is spread over devices must stay where it is
        self._models = [studied.model] + ([finetuned] if finetuned is not None else [])
        self._sites = {n: parse_site(f"resid_post.{n}", studied) for n in saes}
        self._layers = {
            n: _Layer(
                (
                    DocumentSums(n_documents[TASK], _d_sae(one.sae), keep_tokens=needs.tokens),
                    DocumentSums(n_documents[REFERENCE], _d_sae(one.sae), keep_tokens=needs.tokens),
                ),
                TopPlaces(n_places),
                DocumentShift(n_documents[TASK]) if needs.finetuned else None,
            )
            for n, one in saes.items()
        }

    def on_predict_start(self) -> None:
        """Move the models to the device that Lightning runs on."""
        for model in self._models:
            if len(set(getattr(model, "hf_device_map", {}).values())) <= 1:
                nn.Module.to(model, self.device)
        for sae in self.saes.values():
            # `.to(...)` does not tell SAELens
            sae.device = self.device  # type: ignore[assignment]
        self._lengths = {int(n): latent_lengths(sae) for n, sae in self.saes.items()}

    def predict_step(self, batch: TokenBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take in this rank's share of a batch, which may be empty."""
        keep = batch.keep.flatten()
        if not bool(keep.any()):
            return
        gradients: dict[int, Tensor] = {}
        if self._needs.gradients and dataloader_idx == TASK:
            activations, gradients = self._differentiated(batch, keep)
        else:
            activations = self._recorded(self._models[0], batch, keep)
        after: dict[int, Tensor] = {}
        if self._needs.finetuned and dataloader_idx == TASK:
            after = self._recorded(self._models[1], batch, keep)
        document = batch.document.flatten()[keep]
        for n in self._layers:
            z = self._add(n, dataloader_idx, batch, keep, document, activations.pop(n), gradients)
            if n in after:
                self._add_shift(n, document, z, after.pop(n))

    def _add(
        self,
        n: int,
        corpus: int,
        batch: TokenBatch,
        keep: Tensor,
        document: Tensor,
        x: Tensor,
        gradients: dict[int, Tensor],
    ) -> Tensor:
        """Add the tokens of one layer; returns its latents."""
        sae: Any = self.saes[str(n)]
        attribution = None
        if n in gradients:
            z, attribution = attribute_latents(sae, x.float(), gradients.pop(n).float())
        else:
            z = sae.encode(x.float())
        active = z.abs() * self._lengths[n]
        firing = active > self._thresholds[n] if self._needs.firings else None
        own = self._layers[n]
        own.sums[corpus].update(document, active, firing, attribution)
        if corpus == TASK:
            context = batch.input_ids.shape[1]
            column = torch.arange(context, device=keep.device)
            place = (batch.sample[:, None] * context + column).flatten()[keep]
            own.places.update(document, place, active)
        return z

    def _add_shift(self, n: int, document: Tensor, z: Tensor, x: Tensor) -> None:
        shift, lengths = self._layers[n].shift, self._lengths[n]
        if shift is not None:
            sae: Any = self.saes[str(n)]
            shift.update(document, z * lengths, sae.encode(x.float()) * lengths)

    def _recorded(self, model: nn.Module, batch: TokenBatch, keep: Tensor) -> dict[int, Tensor]:
        sites = {str(n): site for n, site in self._sites.items()}
        found = run_to(
            model, sites, batch.model_inputs(), lambda row: f"row {int(batch.sample[row])}"
        )
        return {int(n): rows[keep.to(rows.device)].to(self.device) for n, rows in found.items()}

    def _differentiated(
        self, batch: TokenBatch, keep: Tensor
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        modules = {n: site.module for n, site in self._sites.items()}
        with evaluating(self._models[0]):
            found = layer_gradients(self._models[0], modules, batch.model_inputs(), batch.target)
        there = [
            {n: pair[i].flatten(0, 1)[keep.to(pair[i].device)] for n, pair in found.items()}
            for i in (0, 1)
        ]
        activations, gradients = (
            {n: rows.to(self.device) for n, rows in part.items()} for part in there
        )
        return activations, gradients

    def on_predict_epoch_end(self) -> None:
        """Bring all ranks' sums together, layer by layer, and hand them over on rank zero."""
        many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        found = Measured()
        for n in sorted(self._layers):
            mine = self._layers.pop(n)
            if many:
                mine = _gathered(mine)
            if self.global_rank == 0:
                shift = None if mine.shift is None else mine.shift.result()
                found.layers.append(
                    LayerSums(n, mine.sums[TASK].result(), mine.sums[REFERENCE].result(), shift)
                )
                found.places[n] = mine.places
        if self.global_rank == 0:
            self._finish(found)


def _gathered(mine: _Layer) -> _Layer:
    """All ranks' parts of one layer, merged on rank zero; `mine` on the others."""
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(mine, everyone)
    for other in (everyone or [])[1:]:
        mine.merge(other)
    return mine


def _d_sae(sae: SAE[Any]) -> int:
    return int(sae.W_dec.shape[0])
