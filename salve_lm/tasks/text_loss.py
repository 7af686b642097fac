"""Loss per token of a corpus, document by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from salve_lm.data.corpus import Corpus
from salve_lm.data.encoding import encode
from salve_lm.data.packing import pack
from salve_lm.errors import BadConfig
from salve_lm.tasks.base import EvaluationTask, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Window(NamedTuple):
    """Part of a document that the model reads at once.

    Attributes:
        ids: tokens, BOS included.
        first: index in `ids` of the first token whose loss counts.
    """

    ids: list[int]
    first: int


class DocumentItem(NamedTuple):
    """One document as windows."""

    sample: int
    subject: str | None
    windows: tuple[Window, ...]


class TextLoss(EvaluationTask):
    """Mean loss per token of a corpus, in nats, overall and per group of documents.

    Every document begins with BOS (where the tokenizer has one) and is read on its own; one longer
    than `context` is cut into windows that begin with BOS again. BOS is no target, nor is a first
    token with nothing before it.

    One row per document: `sample` (its index in the corpus), `subject` (its group), `nll` (sum over
    its tokens, in nats) and `tokens`. The summary has `loss`, and `loss/GROUP`.

    Args:
        corpus: The documents.
        name: Of the task.
        context: Tokens that the model reads at once, BOS included.
        batch_size: Windows in a batch.
        eos: Whether the end of a document is to be predicted too.
        completion_only: Leave the loss of prompts out.

    Raises:
        BadConfig: sizes out of range.
    """

    def __init__(
        self,
        corpus: Corpus,
        name: str = "text",
        context: int = 512,
        batch_size: int = 8,
        eos: bool = True,
        completion_only: bool = False,
    ) -> None:
        if context < 2 or batch_size < 1:
            raise BadConfig("context must be at least 2 and batch_size at least 1.")
        self.corpus, self.name, self.context, self.batch_size = corpus, name, context, batch_size
        self.eos, self.completion_only = eos, completion_only

    def items(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[DocumentItem]:
        """The documents with a token to predict, the longest first.

        Raises:
            BadConfig: none has one.
        """
        documents = self.corpus.documents()
        bos = tokenizer.bos_token_id
        items = []
        for sample, (document, (ids, n_prompt)) in enumerate(
            zip(documents, encode(documents, tokenizer, self.eos), strict=True)
        ):
            learned_from = n_prompt if self.completion_only else 0
            windows = []
            for (_, start, stop), *_ in pack([len(ids)], self.context, "none", bos is not None):
                head = [] if bos is None else [bos]
                window = [*head, *ids[start:stop].tolist()]
                first = max(learned_from - start + len(head), 1)
                if first < len(window):
                    windows.append(Window(window, first))
            if windows:
                items.append(DocumentItem(sample, document.group, tuple(windows)))
        if not items:
            raise BadConfig(
                f"No token of task {self.name!r} is to be predicted: its documents are too short, "
                "or with completion_only have no text behind the prompt."
            )
        return sorted(items, key=lambda i: (-sum(len(w.ids) for w in i.windows), i.sample))

    def collate(
        self, items: Sequence[DocumentItem], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any]:
        """All windows of some documents, padded on the right."""
        windows = [w for item in items for w in item.windows]
        shape = (len(windows), max(len(w.ids) for w in windows))
        fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        ids = np.full(shape, fill, np.int64)
        target = np.zeros(shape, bool)
        for i, window in enumerate(windows):
            ids[i, : len(window.ids)] = window.ids
            target[i, window.first : len(window.ids)] = True
        return {
            "input_ids": torch.from_numpy(ids),
            "target": torch.from_numpy(target),
            "n_windows": [len(item.windows) for item in items],
            "sample": [item.sample for item in items],
            "subject": [item.subject for item in items],
        }

    def step(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Any]
    ) -> list[Row]:
        """Sum of the loss and number of tokens of each document."""
        parts = zip(
            batch["input_ids"].split(self.batch_size),
            batch["target"].split(self.batch_size),
            strict=True,
        )
        nll = torch.cat([window_nll(model, ids, target) for ids, target in parts]).tolist()
        tokens = batch["target"].sum(dim=1).tolist()
        rows, at = [], 0
        for sample, subject, n in zip(
            batch["sample"], batch["subject"], batch["n_windows"], strict=True
        ):
            rows.append(
                {
                    "sample": sample,
                    "subject": subject,
                    "nll": sum(nll[at : at + n]),
                    "tokens": sum(tokens[at : at + n]),
                }
            )
            at += n
        return rows

    def summary(self, rows: Sequence[Row]) -> dict[str, float]:
        """`loss`: nats per token over all documents; `loss/GROUP`: over those of a group."""
        means = {"loss": _mean(rows)}
        for group in sorted({str(r["subject"]) for r in rows if r["subject"] is not None}):
            means[f"loss/{group}"] = _mean([r for r in rows if r["subject"] == group])
        return means


def window_nll(
    model: PreTrainedModel, input_ids: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Sum of -log p over the targets of each window, float64 [n] on the CPU.

    Args:
        model: in eval mode.
        input_ids: int64 [n, tokens], padded on the right.
        target: bool [n, tokens]; the first column is never a target.
    """
    # no attention mask is needed: nothing before the padding can see it
    width = int(target.any(dim=0).nonzero().max()) + 1
    input_ids, target = input_ids[:, :width], target[:, :width]
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    learned = target[:, 1:]
    losses = F.cross_entropy(logits[learned].float(), input_ids[:, 1:][learned], reduction="none")
    row = learned.nonzero()[:, 0].cpu()
    total = torch.zeros(len(input_ids), dtype=torch.float64)
    return total.index_add_(0, row, losses.double().cpu())


def _mean(rows: Sequence[Row]) -> float:
    return float(sum(r["nll"] for r in rows) / sum(r["tokens"] for r in rows))
