"""`select_layers`: which layers are specific to a task, with intervals, latents and their texts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer

import salve_lm
from salve_lm.activations.key import hash_backbone
from salve_lm.atomic import atomic_folder, check_writable_target
from salve_lm.commands.finetuned import load_finetuned
from salve_lm.commands.layer_measurement import LayerMeasurement, Measured, Needs, TwoCorpora
from salve_lm.commands.layer_tables import feature_table, ranking_table, show
from salve_lm.data.corpus import Corpus, Document
from salve_lm.data.tokens import PackedTokens, read_corpora
from salve_lm.errors import BadConfig
from salve_lm.modules.language_model import LanguageModel
from salve_lm.specificity.bootstrap import Bootstrap, check_enough_documents
from salve_lm.specificity.features import task_latents
from salve_lm.specificity.overlap import Overlap, check_overlap
from salve_lm.specificity.saes import LayerSAE, ModelIdentity, load_layer_saes
from salve_lm.specificity.scores import LayerScore, MassShare, SpecificLatents
from salve_lm.specificity.selection import LayerChoice, rank_layers
from salve_lm.specificity.selection_file import (
    NAME,
    LayerSelection,
    read_selection,
    selection_record,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def select_layers(
    trainer: Trainer,
    model: LightningModule,
    task: Corpus | list[Corpus],
    reference: Corpus | list[Corpus],
    saes: str,
    out: str,
    layers: list[int] | None = None,
    scores: list[LayerScore] | None = None,
    select: LayerChoice | None = None,
    bootstrap: Bootstrap | None = None,
    finetuned: str | None = None,
    context: int = 256,
    batch_size: int = 8,
    top_latents: int = 32,
    windows: int = 5,
    allow_other_model: bool = False,
) -> LayerSelection | None:
    """Score every layer's specificity to a task, choose layers, and write why.

    The model runs once over both corpora, whatever the number of layers. `out` gets `layers.json`
    (which `TaskVectorInjection` takes as `layers`), `ranking.parquet` and `.csv` (every score of
    every layer with its interval and its contrast with the mean layer), and `features.parquet`
    (each layer's most task-specific latents with the text that fires them).

    Args:
        trainer: Runs the pass, on one or several devices.
        model: A `LanguageModel`.
        task: Documents of the task.
        reference: Documents to compare with; best of the same surface (numbers without the task).
        saes: Where the SAEs are: a folder that holds one SAE folder a layer, or a path or SAELens
            `RELEASE:ID` with `{layer}` in it.
        out: Folder to write; must not exist.
        layers: Layers to compare; all that have an SAE when absent.
        scores: Scores to compute; the first one chooses. `MassShare` when absent.
        select: How to choose; layers above the mean layer when absent.
        bootstrap: How to make intervals; 0.95 from 1000 resamples of the documents when absent.
        finetuned: Folder of the fine-tuned model or of its LoRA adapter, for `LatentShift`.
        context: Tokens in a row.
        batch_size: Rows in a global batch, summed over all processes.
        top_latents: Latents listed for each layer.
        windows: Text windows listed for each of them.
        allow_other_model: Accept SAEs that were made from other weights or a model of another name.

    Returns:
        The selection, on rank zero; None on the others, and where the rule chose no layer.

    Raises:
        BadConfig: a corpus too small for the interval, or the same as the other; scores that lack
            something; SAEs of another layer; see also `load_layer_saes`.
        MissingFile, NameNotFound, ShapeMismatch, StaleStore: see `load_layer_saes`.
        OutputExists, OutputUnwritable: `out` is there already; cannot be written.
    """
    studied, tokenizer = _language_model(model)
    scores = list(scores or [MassShare()])
    select, bootstrap = select or LayerChoice(), bootstrap or Bootstrap()
    needs = _checked_needs(scores, finetuned)
    if context < 2 or batch_size < 1 or top_latents < 1 or windows < 1:
        raise BadConfig(
            "context must be at least 2; batch_size, top_latents and windows at least 1."
        )
    check_writable_target(out)
    documents = read_corpora(task), read_corpora(reference)
    for name, part in zip(("task", "reference"), documents, strict=True):
        check_enough_documents(len(part), name, bootstrap.confidence)
    overlap = check_overlap(*([_text(d) for d in part] for part in documents))
    if overlap.shared:
        logger.warning("%d task documents are in the reference corpus too.", overlap.shared)
    _check_context(context, studied)
    identity = _identity(studied)
    loaded = load_layer_saes(
        saes,
        ModelIdentity(
            identity["source"],
            identity["d_model"],
            identity["n_layers"],
            identity["weights"],
            identity["dtype"],
        ),
        layers=layers,
        allow_other_model=allow_other_model,
    )
    if select.n is not None and select.n >= len(loaded):
        raise BadConfig(
            f"{select.n} of {len(loaded)} layers is no choice. Lower select.n, or give SAEs of "
            "more layers."
        )
    packed = [
        PackedTokens(part, tokenizer, context, packing="whole", eos=False) for part in documents
    ]
    result = _Result(
        tokenizer, loaded, scores, select, bootstrap, identity, overlap, packed, top_latents,
        windows, finetuned, out,
    )  # fmt: skip
    measurement = LayerMeasurement(
        studied,
        loaded,
        (packed[0].n_documents, packed[1].n_documents),
        needs,
        load_finetuned(finetuned, studied) if finetuned is not None and needs.finetuned else None,
        windows,
        result.write,
    )
    data = TwoCorpora(packed[0], packed[1], batch_size)
    trainer.predict(measurement, datamodule=data, return_predictions=False)
    if not trainer.is_global_zero:
        return None
    # from disk: forked ranks have memory of their own
    record = json.loads((Path(out) / NAME).read_text())
    if not record["layers"]:
        logger.warning(
            "No layer was chosen: none satisfies `select.rule: %s`. See %s/ranking.csv; "
            "`select.rule: top_n` takes the highest scores whatever their intervals.",
            select.rule,
            out,
        )
        return None
    return read_selection(out)


class _Result:
    """Turns what was measured into the output folder; called on rank zero."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        saes: Mapping[int, LayerSAE],
        scores: list[LayerScore],
        select: LayerChoice,
        bootstrap: Bootstrap,
        identity: dict[str, Any],
        overlap: Overlap,
        packed: Sequence[PackedTokens],
        top_latents: int,
        windows: int,
        finetuned: str | None,
        out: str,
    ) -> None:
        self._tokenizer, self._saes, self._scores = tokenizer, saes, scores
        self._select, self._bootstrap, self._identity = select, bootstrap, identity
        self._overlap, self._packed = overlap, packed
        self._top_latents, self._windows = top_latents, windows
        self._finetuned, self._out = finetuned, out

    def write(self, measured: Measured) -> None:
        """Score, choose, and write the folder; whole or not at all."""
        rankings = rank_layers(self._scores, measured.layers, self._bootstrap)
        chosen = self._select.apply(rankings[0])
        specific = next((s for s in self._scores if isinstance(s, SpecificLatents)), MassShare())
        latents = {
            at.layer: task_latents(
                at, self._top_latents, getattr(specific, "at_least", 0.5), specific.measure
            )
            for at in measured.layers
        }
        record = selection_record(
            chosen,
            self._identity,
            rankings[0],
            rankings,
            asdict(self._select),
            latents={str(n): [f.latent for f in found] for n, found in latents.items()},
            options={
                "scores": [s.describe() for s in self._scores],
                "bootstrap": asdict(self._bootstrap),
                "finetuned": self._finetuned,
                "context": self._packed[0].context,
            },
            saes={
                str(n): {"source": one.source, "sha256": one.sha256}
                for n, one in self._saes.items()
            },
            corpora={
                name: {
                    "sha256": getattr(self._overlap, name),
                    "documents": packed.n_documents,
                    "tokens": int(getattr(measured.layers[0], name).tokens.sum()),
                }
                for name, packed in zip(("task", "reference"), self._packed, strict=True)
            },
            overlap={"documents": self._overlap.shared, "share": self._overlap.share},
            versions={"salve_lm": salve_lm.__version__, "torch": str(torch.__version__)},
        )
        ranking = ranking_table(rankings, chosen, measured.layers)
        features = feature_table(
            latents, measured.places, self._packed[0], self._tokenizer, self._windows
        )
        with atomic_folder(self._out) as folder:
            ranking.to_parquet(folder / "ranking.parquet", index=False)
            ranking.to_csv(folder / "ranking.csv", index=False)
            features.to_parquet(folder / "features.parquet", index=False)
            (folder / NAME).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        show(rankings[0], chosen, self._out)


def _language_model(model: LightningModule) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    if not isinstance(model, LanguageModel):
        raise BadConfig(
            f"--model is {type(model).__name__}; this command needs a LanguageModel "
            "(salve_lm.modules.language_model.LanguageModel)."
        )
    if model.tokenizer is None:
        raise BadConfig("The model has no tokenizer: give LanguageModel a `tokenizer`.")
    return model, model.tokenizer


def _checked_needs(scores: list[LayerScore], finetuned: str | None) -> Needs:
    names = [score.name for score in scores]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise BadConfig(f"Two scores are called {twice[0]!r}. Leave one of them out.")
    needs = Needs.of(scores)
    if needs.finetuned and finetuned is None:
        raise BadConfig("LatentShift compares two models: give `finetuned` too.")
    if finetuned is not None and not needs.finetuned:
        raise BadConfig(
            "`finetuned` is given, but no score uses it. Remove it, or add LatentShift."
        )
    return needs


def _check_context(context: int, studied: LanguageModel) -> None:
    if context > studied.max_context:
        raise BadConfig(
            f"context={context}, but the model reads at most {studied.max_context} tokens. Lower "
            "it."
        )


def _text(document: Document) -> list[Any]:
    messages = None if document.messages is None else [dict(m) for m in document.messages]
    return [document.prompt + document.text, messages]


def _identity(studied: LanguageModel) -> dict[str, Any]:
    described = studied.describe()
    dtype = next(p.dtype for p in studied.model.parameters())
    return {
        "source": described["source"],
        **{k: described[k] for k in ("model_type", "n_layers", "d_model", "vocabulary")},
        "weights": hash_backbone(studied),
        "dtype": str(dtype).removeprefix("torch."),
    }
