"""CIFAR-100: 100 classes of 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from salve_lm.data.labelled import Split
from salve_lm.hashing import hash_tensors
from vision.data.download import fetch
from vision.data.images import ImageData, ImageSource, Normalisation
from vision.data.transforms import Augment, ImageTransform

if TYPE_CHECKING:
    import numpy as np

CIFAR_MEAN = (0.507, 0.4865, 0.4409)
CIFAR_STD = (0.2673, 0.2564, 0.2762)


class CIFAR100(ImageData):
    """CIFAR-100 through torchvision: 50,000 training images; 10,000 others are `val` and `test`.

    Args:
        root: where torchvision keeps (or puts) `cifar-100-python/`.
        download: fetch it where it is not there.
        image_size: pixels a side that the network gets.
        mean: subtracted per channel, of values in [0, 1]; CIFAR-100's own by default.
        std: divided by.
        augment: for training: `none`, `flip`, `crop_flip` or `shift`.
        batch_size: samples a batch and process.
        num_workers: loader processes.
        seed: of the training order and augmentation.
        predict_split: the split that `predict` runs on.
    """

    def __init__(
        self,
        root: str,
        download: bool = False,
        image_size: int = 32,
        mean: tuple[float, float, float] = CIFAR_MEAN,
        std: tuple[float, float, float] = CIFAR_STD,
        augment: Augment = "none",
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        predict_split: Split = "val",
    ) -> None:
        super().__init__(batch_size, num_workers, seed, predict_split)
        self._root, self._download = root, download
        self._transform = ImageTransform(image_size, mean=mean, std=std, augment=augment)

    def prepare_data(self) -> None:
        """Download, if asked for and needed."""
        if self._download:
            from torchvision import datasets

            fetch(lambda: datasets.CIFAR100(self._root, download=True), self._root)

    @property
    def normalisation(self) -> Normalisation:
        """What brings values in [0, 1] into the units that the network reads."""
        return Normalisation(tuple(self._transform.mean), tuple(self._transform.std))

    def load_sources(self) -> tuple[list[str], dict[Split, ImageSource]]:
        """Class names, and the images of every split.

        Raises:
            MissingFile: no complete copy at `root`.
        """
        from torchvision import datasets

        train, held = fetch(
            lambda: [datasets.CIFAR100(self._root, train=part) for part in (True, False)],
            self._root,
        )
        sources: dict[Split, ImageSource] = {
            "train": PixelArray(train.data, train.targets, self._transform, "train"),
            "val": PixelArray(held.data, held.targets, self._transform, "test"),
        }
        sources["test"] = sources["val"]
        return list(train.classes), sources


class PixelArray:
    """Images as one array in memory.

    Args:
        pixels: uint8 [n, h, w, 3].
        labels: class index of each.
        transform: from RGB image to tensor.
        name: of the part of the data set that they are.
    """

    def __init__(
        self, pixels: np.ndarray, labels: Sequence[int], transform: ImageTransform, name: str
    ) -> None:
        self.labels = labels
        self._pixels, self._transform, self._name = pixels, transform, name

    def load(self, index: int, draw: int | None) -> Tensor:
        """Image `index`, float32 [3, image_size, image_size]."""
        from PIL import Image

        return self._transform(Image.fromarray(self._pixels[index]), draw)

    def identity(self) -> object:
        """A hash of the pixels, and the evaluation transform."""
        pixels = hash_tensors({"pixels": torch.from_numpy(self._pixels)})
        return [pixels, self._transform.describe()]

    def describe(self, index: int) -> str:
        """Its place in the data set."""
        return f"cifar100/{self._name}/{index}"
