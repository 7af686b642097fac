"""What an evaluation of a language model is: items, batches, one row of results a sample.

A task knows nothing of ranks or of Lightning. `LanguageData` makes one loader a task, in which
every rank takes its own items; `LanguageModel` calls `step` on each batch, gathers the rows of all
ranks, and logs what `summary` makes of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# one dict of plain values (numbers, strings, None, lists of them) per sample
Row = dict[str, Any]


class Item(Protocol):
    """One sample of a task, ready to be batched.

    Attributes:
        sample: index of the sample in the source; unique in its task, and the order of the rows.
    """

    @property
    def sample(self) -> int:
        """Index of the sample in the source."""


class EvaluationTask(ABC):
    """One evaluation, as a list entry in a config names it with `class_path` and `init_args`.

    Attributes:
        name: names the task in logs (`NAME/metric`), in `LanguageModel.results` and on disk; unique
            among the tasks of a run.
        batch_size: samples in a batch of one rank.
    """

    name: str
    batch_size: int

    @abstractmethod
    def items(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[Item]:
        """Read the source: all samples, the same in the same order on every rank.

        Sorted by length, so that batches of neighbours pad little. A rank takes every world-th.
        """

    @abstractmethod
    def collate(
        self, items: Sequence[Any], tokenizer: PreTrainedTokenizerBase
    ) -> Mapping[str, Any]:
        """Make a batch (tensors, and lists of plain values) of `items`, never of none."""

    @abstractmethod
    def step(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Any]
    ) -> list[Row]:
        """Run `model` (in eval mode, without gradients, on the batch's device) on a batch.

        Returns:
            One row per sample, with the key `sample` at least.
        """

    @abstractmethod
    def summary(self, rows: Sequence[Row]) -> dict[str, float]:
        """Metric name -> value, from the rows of all samples, sorted by `sample`."""
