"""How a language model is evaluated: its tasks' batches, the rows of all ranks, their summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salve_lm.errors import BadConfig
from salve_lm.modules.studied import StudiedModel
from salve_lm.tasks.base import EvaluationTask, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LanguageEvaluation(StudiedModel):
    """The validation and test of `LanguageModel`.

    Attributes:
        tokenizer: of the model, padding on the left; None where there is none.
        results: task name -> one row of results per sample, of all ranks, sorted by `sample`; of
            the latest validation or test.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, list[Row]] = {}
        self._rows: dict[str, list[Row]] = {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [n, tokens, vocabulary] of token ids [n, tokens]."""
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return out.logits

    def on_validation_epoch_start(self) -> None:
        """Begin with no rows."""
        self._rows = {task.name: [] for task in self._tasks()}

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(
        self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Run the task of this loader on a batch."""
        if self.tokenizer is None:
            raise BadConfig("Tasks need a tokenizer: set the model's `tokenizer`.")
        task = self._tasks()[dataloader_idx]
        self._rows[task.name].extend(task.step(self.model, self.tokenizer, batch))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Gather the rows of all ranks and log each task's summary as `TASK/METRIC`."""
        gathered = gather_rows(self._rows)
        self._rows = {}
        for task in self._tasks():
            rows = gathered[task.name]
            for key, value in task.summary(rows).items() if rows else ():
                # equal on every rank already; sync_dist only silences the advice to set it
                self.log(f"{task.name}/{key}", float(value), sync_dist=True)
        if not self.trainer.sanity_checking:
            self.results = gathered

    on_test_epoch_end = on_validation_epoch_end

    def _tasks(self) -> list[EvaluationTask]:
        tasks = getattr(getattr(self.trainer, "datamodule", None), "tasks", None)
        if tasks is None:
            raise BadConfig("A LanguageModel is evaluated on the `tasks` of a LanguageData.")
        return list(tasks)


def gather_rows(rows: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """The rows of all ranks for each task, sorted by `sample`."""
    everyone = [dict(rows)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(everyone, dict(rows))
    return {
        name: sorted((row for rank in everyone for row in rank[name]), key=lambda r: r["sample"])
        for name in rows
    }
