"""Images with and without a planted cue, as two classes: what finds the cue's features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from salve_lm.data.labelled import LabelledData, Split
from salve_lm.hashing import hash_plain
from vision.data.images import Normalisation
from vision.data.planted import PlantedShortcut

WITHOUT, WITH = "without cue", "with cue"


class CueContrast(LabelledData):
    """Every image of the classes without the cue, once as it is and once stamped.

    Two classes, `without cue` and `with cue`, that differ in nothing else. `discover` on them gives
    a feature table whose `selective:with cue` is the cue's latent, for an edit with that table as
    `features`. For a cue of one's own, sort images with and without it into two folders and use
    `vision.data.ImageFolder` in the same way.

    Args:
        planted: The data that the network was trained on.
    """

    def __init__(self, planted: PlantedShortcut) -> None:
        super().__init__()
        self.planted = planted
        self.class_names = [WITHOUT, WITH]
        self.batch_size, self.num_workers = planted.batch_size, planted.num_workers

    @property
    def normalisation(self) -> Normalisation:
        """That of the images."""
        return self.planted.normalisation

    def prepare_data(self) -> None:
        """Whatever the images need."""
        self.planted.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set the images up."""
        self.planted.setup(stage)

    def eval_dataset(self, split: Split) -> Dataset:
        """All clean images, then the same stamped."""
        stamped = self.planted.stamped_dataset(split)
        clean = self.planted.source_dataset(split)
        return ConcatDataset([_Labelled(clean, 0, stamped.rows), _Labelled(stamped, 1)])

    def fingerprint(self, split: Split) -> str:
        """That of the images, with the patch."""
        self.setup()
        source = self.planted.source.fingerprint(split)
        return hash_plain(["cue", source, self.planted.patch.describe(), self.planted.target])

    def describe(self, split: Split, index: int) -> str:
        """Where the image comes from, and whether it is stamped."""
        rows = self.planted.stamped_dataset(split).rows
        kind = WITHOUT if index < len(rows) else WITH
        return f"{self.planted.source.describe(split, rows[index % len(rows)])} ({kind})"

    def predict_dataloader(self) -> DataLoader:
        """Every validation image, clean and stamped."""
        return DataLoader(
            self.eval_dataset("val"),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(0),
        )


class _Labelled(Dataset[tuple[Tensor, int]]):
    """Some images of a data set, all with one label."""

    def __init__(self, images: Dataset, label: int, rows: Sequence[int] | None = None) -> None:
        self._images, self._label = images, label
        self._rows: Sequence[int] = rows if rows is not None else range(len(images))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[self._rows[index]][0], self._label
