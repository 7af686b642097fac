"""Task vectors tau = fine-tuned - base, read by rows; never a merged or a subtracted copy."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from salve_lm.errors import BadConfig, MissingFile
from salve_lm.task_vectors.compare import refuse_differences
from salve_lm.task_vectors.weights import CheckpointWeights, FolderWeights, Weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ADAPTER = "adapter_config.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class TaskVectorSource(ABC):
    """A task vector on disk.

    Attributes:
        finetuned: path of the fine-tuned model, adapter or checkpoint.
        base: what the fine-tuning began from. None until `with_base` supplies it, which an edit
            does with the unedited weights of the model at hand.
    """

    finetuned: str
    base: Weights | None = None

    @property
    @abstractmethod
    def names(self) -> Collection[str]:
        """Names in memory of the tensors it may change."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`, as the model stores it."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of tau, float32 on the CPU.

        For the same bits in every use, ask for the blocks of `row_blocks`.

        Raises:
            BadConfig: the base is needed and unknown.
            NameNotFound: it does not change that tensor.
        """

    @abstractmethod
    def check(self, base: Weights) -> None:
        """Refuse a task vector that does not belong to the model `base`.

        Raises:
            ShapeMismatch, BadConfig: lists what differs.
        """

    @abstractmethod
    def sha256(self, name: str) -> dict[str, str]:
        """SHA-256 of what the values of `name` are read from, by the name of the input."""

    def with_base(self, base: Weights) -> TaskVectorSource:
        """The same source with `base`, if it has none of its own."""
        return self if self.base is not None else dataclasses.replace(self, base=base)

    def to_dict(self) -> dict[str, Any]:
        """The paths it was opened with."""
        own = self.base.where if isinstance(self.base, FolderWeights) else None
        return {"finetuned": self.finetuned, "base": own}

    def _base_rows(self, name: str, start: int, stop: int) -> Tensor:
        if self.base is None:
            raise BadConfig(
                f"The task vector of {self.finetuned} needs the base model: set `base` to its "
                "folder."
            )
        return self.base.rows(name, start, stop)


@dataclass(frozen=True, eq=False, kw_only=True)
class Difference(TaskVectorSource):
    """tau = fine-tuned - base, both whole models.

    Attributes:
        tuned: the fine-tuned weights.
    """

    tuned: Weights

    @property
    def names(self) -> Collection[str]:
        """See `TaskVectorSource.names`."""
        return self.tuned.shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TaskVectorSource.shape`."""
        return self.tuned.shape(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `TaskVectorSource.rows`."""
        base = self._base_rows(name, start, stop)
        return self.tuned.rows(name, start, stop).sub(base)

    def check(self, base: Weights) -> None:
        """See `TaskVectorSource.check`; a base of its own is compared with both."""
        refuse_differences(self.tuned, base)
        if self.base is not None and self.base is not base:
            refuse_differences(self.tuned, self.base)
            refuse_differences(self.base, base)

    def sha256(self, name: str) -> dict[str, str]:
        """See `TaskVectorSource.sha256`."""
        found = {"finetuned": self.tuned.sha256(name)}
        if isinstance(self.base, FolderWeights):
            found["base"] = self.base.sha256(name)
        return found


def open_source(
    finetuned: str | Path,
    base: str | Path | None = None,
    config: PreTrainedConfig | None = None,
    *,
    other_base: bool = False,
) -> TaskVectorSource:
    """Open a task vector; its kind is seen from what `finetuned` is.

    Args:
        finetuned: Hugging Face folder, folder of a LoRA adapter (peft), or Lightning checkpoint of
            a `LanguageModel` (of its weights, or of its adapter).
        base: Hugging Face folder of the base. None: it is given later, by `with_base`.
        config: of the model to edit; an adapter needs it for its names, unless `base` is given.
        other_base: accept an adapter that names another base.

    Raises:
        MissingFile: there is nothing, or nothing known, at a path.
        SalveError: whatever is wrong with the files; each subclass names the cure.
    """
    path = Path(finetuned)
    own = None if base is None else FolderWeights(base)
    if (path / ADAPTER).is_file():
        from salve_lm.task_vectors.lora_files import open_adapter

        config = own.config if own is not None else config
        return open_adapter(path, own, config, other_base=other_base)
    if path.is_dir():
        return Difference(finetuned=str(path), base=own, tuned=FolderWeights(path))
    if path.is_file() and path.suffix == ".ckpt":
        tuned = CheckpointWeights(path)
        if any(".lora_A." in name for name in tuned.shapes):
            from salve_lm.task_vectors.lora_files import adapter_in_checkpoint

            return adapter_in_checkpoint(tuned, own, other_base=other_base)
        return Difference(finetuned=str(path), base=own, tuned=tuned)
    raise MissingFile(
        f"No fine-tuned model at {finetuned}. Give a Hugging Face folder, the folder of a LoRA "
        "adapter (adapter_config.json) or a Lightning .ckpt file. Download public models first."
    )
