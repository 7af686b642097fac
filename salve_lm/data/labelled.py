"""What a data module must offer so that features can be found per class."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset

Split = Literal["train", "val", "test"]


class LabelledData(LightningDataModule):
    """A LightningDataModule of `(input, label)` samples with named classes.

    Derive from it to bring data of your own: `salve_lm` needs nothing else.

    Attributes:
        class_names: one name a label, in order; known after `setup`.
        batch_size: samples a batch for every loader made from this data.
        num_workers: loader processes.
    """

    class_names: list[str]
    batch_size: int
    num_workers: int

    @abstractmethod
    def eval_dataset(self, split: Split) -> Dataset:
        """The samples of `split` in a fixed order under the evaluation transform (no augmentation).

        Each item is `(input, label)`, label an int below `len(class_names)`.
        """

    @abstractmethod
    def fingerprint(self, split: Split) -> str:
        """A hash of what `eval_dataset(split)` yields: the samples' identity and the transform."""

    def describe(self, split: Split, index: int) -> str:
        """Where sample `index` of `split` comes from: a path, or else `SPLIT/INDEX`."""
        return f"{split}/{index}"
