"""Text to train a language model on, and the tasks that evaluate it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule

from salve_lm.activations.loaders import GlobalBatchLoader
from salve_lm.activations.sampler import GlobalBatches
from salve_lm.data.corpus import Corpus
from salve_lm.data.packing import Packing
from salve_lm.data.tokens import PackedTokens, TokenBatch, stream_corpora
from salve_lm.errors import BadConfig
from salve_lm.tasks.base import EvaluationTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenLoader(GlobalBatchLoader[TokenBatch]):
    """Batches of rows of packed text, an equal share for each rank; resumes exactly."""

    def __init__(self, tokens: PackedTokens, sampler: GlobalBatches) -> None:
        super().__init__(sampler)
        self._tokens = tokens

    def _load(self, numbers: range) -> Iterator[TokenBatch]:
        for number in numbers:
            total = self._tokens.n_targets(self.sampler.global_rows(number))
            yield self._tokens.batch(self.sampler.rows(number), total)


class TaskLoader:
    """This rank's batches of one task: every world-th item, none twice.

    Not a DataLoader: Lightning would give that a sampler which pads with duplicates. Taking every
    world-th of items that are sorted by length gives all ranks about the same work.

    Args:
        task: the task.
        tokenizer: of the model.
        rank: this process.
        world: number of processes.

    Attributes:
        n_samples: samples of the task, summed over all ranks.
    """

    def __init__(
        self, task: EvaluationTask, tokenizer: PreTrainedTokenizerBase, rank: int, world: int
    ) -> None:
        self._task, self._tokenizer = task, tokenizer
        items = task.items(tokenizer)
        self.n_samples = len(items)
        self._items = list(islice(items, rank, None, world))

    def __len__(self) -> int:
        return -(-len(self._items) // self._task.batch_size)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        size = self._task.batch_size
        for first in range(0, len(self._items), size):
            yield self._task.collate(self._items[first : first + size], self._tokenizer)


class LanguageData(LightningDataModule):
    """Packed text for `fit`, and tasks for `validate` and `test`.

    The tokenizer is that of the `LanguageModel` in the same run.

    Args:
        train: Corpus to train on, or several, one after the other.
        tasks: Evaluations, for validation (also during training) and test alike.
        context: Tokens in a row.
        batch_size: Rows in a global batch, summed over all processes.
        packing: `cut` cuts documents wherever a row is full; `whole` begins a new row with a
            document that would not fit; `none` gives each document rows of its own.
        eos: End each document with the EOS token, so that the model learns to stop.
        completion_only: Learn only what follows each document's prompt.
        shuffle: Draw the rows in a new order each epoch, a pure function of seed and epoch.
        seed: Of the order.

    Raises:
        BadConfig: sizes below 1, or two tasks of one name.
    """

    def __init__(
        self,
        train: Corpus | list[Corpus] | None = None,
        tasks: list[EvaluationTask] | None = None,
        context: int = 512,
        batch_size: int = 8,
        packing: Packing = "cut",
        eos: bool = True,
        completion_only: bool = False,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or context < 2:
            raise BadConfig("batch_size must be at least 1 and context at least 2.")
        self.train, self.tasks = train, list(tasks or [])
        names = [task.name for task in self.tasks]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise BadConfig(f"Two tasks are called {twice[0]!r}. Give each a `name` of its own.")
        self.context, self.batch_size, self.packing = context, batch_size, packing
        self.eos, self.completion_only = eos, completion_only
        self.shuffle, self.seed = shuffle, seed
        self.train_tokens: PackedTokens | None = None
        self._loaders: list[TaskLoader] = []

    @property
    def n_train_batches(self) -> int:
        """Global batches in an epoch; known after `setup("fit")`."""
        return len(self._sampler(self._tokens()))

    def setup(self, stage: str) -> None:
        """Read and encode the training text for `fit`, and the tasks.

        Raises:
            BadConfig: nothing to do in this stage, a model without tokenizer, rows longer than the
                model's context, or fewer samples than processes.
        """
        tokenizer = self._tokenizer()
        if stage == "fit" and self.train_tokens is None:
            if self.train is None:
                raise BadConfig("Nothing to train on: give LanguageData a `train` corpus.")
            self._check_context()
            self.train_tokens = PackedTokens(
                stream_corpora(self.train),
                tokenizer,
                self.context,
                self.packing,
                self.eos,
                self.completion_only,
            )
        if stage in ("validate", "test") and not self.tasks:
            raise BadConfig("Nothing to evaluate: give LanguageData one or more `tasks`.")
        if stage != "predict" and not self._loaders:
            self._loaders = self._task_loaders(tokenizer)

    def train_dataloader(self) -> TokenLoader:
        """Global batches of the packed text; its position is stored in checkpoints."""
        tokens = self._tokens()
        return TokenLoader(tokens, self._sampler(tokens))

    def val_dataloader(self) -> list[TaskLoader]:
        """One loader a task, with this rank's share."""
        return self._loaders

    def test_dataloader(self) -> list[TaskLoader]:
        """The same tasks."""
        return self._loaders

    def _tokens(self) -> PackedTokens:
        if self.train_tokens is None:
            raise BadConfig("The training text is known after LanguageData.setup('fit').")
        return self.train_tokens

    def _sampler(self, tokens: PackedTokens) -> GlobalBatches:
        rank, world = self._place()
        return GlobalBatches(len(tokens), self.batch_size, self.seed, rank, world, self.shuffle)

    def _place(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _task_loaders(self, tokenizer: PreTrainedTokenizerBase) -> list[TaskLoader]:
        rank, world = self._place()
        loaders = [TaskLoader(task, tokenizer, rank, world) for task in self.tasks]
        # a rank without any batch would skip the evaluation, and the others wait for its rows
        if loaders and max(loader.n_samples for loader in loaders) < world:
            raise BadConfig(
                f"The tasks have fewer samples than there are processes ({world}). Use fewer "
                "devices, or more samples."
            )
        return loaders

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        module = getattr(self.trainer, "lightning_module", None)
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise BadConfig(
                "LanguageData takes the tokenizer of the model: use it with a LanguageModel, with "
                "its `tokenizer` set where `source` has none."
            )
        return tokenizer

    def _check_context(self) -> None:
        module = getattr(self.trainer, "lightning_module", None)
        longest = getattr(module, "max_context", None)
        if longest is not None and self.context > longest:
            raise BadConfig(
                f"context={self.context}, but the model reads at most {longest} tokens. Lower it."
            )
