"""What all image data modules share: samples by index, loaders, fingerprints."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from salve_lm.data.labelled import LabelledData, Split
from salve_lm.errors import BadConfig, EmptyClass, NameNotFound
from salve_lm.hashing import hash_plain
from vision.data.samplers import EachOnce, EachOnceLoader, ShuffledDraws, ShuffledLoader

SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Normalisation(NamedTuple):
    """(value - mean) / std, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class ImageSource(Protocol):
    """The images of one split."""

    @property
    def labels(self) -> Sequence[int]:
        """Class index of each image."""
        ...

    def load(self, index: int, draw: int | None) -> Tensor:
        """Image `index`, float32 [3, h, w]; augmented by the number `draw` unless that is None."""
        ...

    def identity(self) -> object:
        """Plain values that fix what `load(index, None)` gives for every index."""
        ...

    def describe(self, index: int) -> str:
        """Where image `index` comes from."""
        ...


class Images(Dataset[tuple[Tensor, int]]):
    """`(image, label)` by index, or by `(index, draw)` with augmentation."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        index, draw = key if isinstance(key, tuple) else (key, None)
        return self.source.load(index, draw), int(self.source.labels[index])


class ImageData(LabelledData):
    """Base of the image data modules: a subclass says what its images are.

    Training batches come in an order (and with augmentation) that depends on `seed` and the epoch
    alone; a last, smaller batch is left out. Evaluation loaders give every sample exactly once,
    also under distributed strategies, where Lightning's default would pad with duplicates.
    `batch_size` is per process.

    Args:
        batch_size: samples a batch and process.
        num_workers: loader processes; 0 loads in the main one.
        seed: of the training order and of splits that are drawn.
        predict_split: the split that `predict` runs on.
    """

    def __init__(
        self, batch_size: int, num_workers: int, seed: int, predict_split: Split = "val"
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0 or seed < 0:
            raise BadConfig("batch_size is at least 1, num_workers and seed at least 0.")
        if predict_split not in SPLITS:
            raise NameNotFound("split", predict_split, SPLITS)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.seed, self.predict_split = seed, predict_split
        self.class_names = []
        self._sources: dict[str, ImageSource] = {}
        self._fingerprints: dict[str, str] = {}

    @property
    @abstractmethod
    def normalisation(self) -> Normalisation:
        """What brings values in [0, 1] into the units that the network reads."""

    @abstractmethod
    def load_sources(self) -> tuple[list[str], dict[Split, ImageSource]]:
        """Class names, and the images of every split."""

    def setup(self, stage: str | None = None) -> None:
        """Find the images of all splits (once)."""
        if self._sources:
            return
        names, sources = self.load_sources()
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise BadConfig(f"Two classes are named {twice[0]!r}. Give each a name of its own.")
        for split, source in sources.items():
            found = Counter(source.labels)
            for label, name in enumerate(names):
                if not found[label]:
                    raise EmptyClass(name, f"split {split!r} of {type(self).__name__}")
        self.class_names, self._sources = names, {str(k): v for k, v in sources.items()}

    def eval_dataset(self, split: Split) -> Dataset:
        """The samples of `split` in a fixed order, without augmentation."""
        return Images(self._source(split))

    def fingerprint(self, split: Split) -> str:
        """A hash of the images' identity, their labels and the evaluation transform."""
        if split not in self._fingerprints:
            source = self._source(split)
            self._fingerprints[split] = hash_plain(
                [source.identity(), list(source.labels), self.class_names]
            )
        return self._fingerprints[split]

    def describe(self, split: Split, index: int) -> str:
        """Where sample `index` of `split` comes from."""
        return self._source(split).describe(index)

    @property
    def n_train_batches(self) -> int:
        """Training batches of this process in an epoch; known after `setup`."""
        return len(self.train_dataloader())

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of the training split, augmented."""
        images = Images(self._source("train"))
        rank, world = self._ranks()
        sampler = ShuffledDraws(images, self.seed, rank, world)
        last = len(sampler) >= self.batch_size
        return self._loader(images, sampler, drop_last=last, kind=ShuffledLoader)

    def val_dataloader(self) -> DataLoader:
        """Every validation sample once."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        """Every test sample once."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Every sample of `predict_split` once."""
        return self._eval_loader(self.predict_split)

    def _eval_loader(self, split: Split) -> DataLoader:
        images = Images(self._source(split))
        sampler = EachOnce(images, *self._ranks())
        return self._loader(images, sampler, drop_last=False, kind=EachOnceLoader)

    def _loader(
        self,
        images: Images,
        sampler: ShuffledDraws | EachOnce,
        drop_last: bool,
        kind: type[DataLoader],
    ) -> DataLoader:
        return kind(
            images,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            # its own: otherwise every pass draws a seed from the global random state
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _source(self, split: Split) -> ImageSource:
        if not self._sources:
            self.setup()
        if split not in self._sources:
            raise NameNotFound("split", split, list(self._sources))
        return self._sources[split]

    def _ranks(self) -> tuple[int, int]:
        """This process's rank, and how many there are."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def split_by_class(
    labels: Sequence[int], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Divide indices so that each class gives `fraction` of its samples to the second part.

    Both parts are in ascending order. A class with at least two samples is in both; how one class
    is divided does not depend on the others.

    Raises:
        BadConfig: `fraction` is not strictly between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise BadConfig(f"The share of held-out samples is {fraction}; it lies between 0 and 1.")
    first: list[int] = []
    second: list[int] = []
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)
    for label, own in of_class.items():
        generator = torch.Generator().manual_seed((seed << 20) + label)
        order = [own[i] for i in torch.randperm(len(own), generator=generator).tolist()]
        held = max(1, min(len(own) - 1, round(fraction * len(own))))
        second += order[:held]
        first += order[held:]
    return sorted(first), sorted(second)
