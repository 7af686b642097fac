"""scikit-learn's handwritten digits: 1,797 real images that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from salve_lm.data.labelled import Split
from salve_lm.errors import BadConfig, NameNotFound
from salve_lm.hashing import hash_tensors
from vision.data.images import ImageData, ImageSource, Normalisation, split_by_class
from vision.data.transforms import random_shift

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits(ImageData):
    """Handwritten digits, 8x8 pixels scaled up, as three equal channels, values in [-1, 1].

    Two splits, drawn per class: training, and a held-out half that is both `val` and `test`
    (nothing is ever chosen on it: features and strengths are chosen on the training split). All
    images lie in memory.

    Args:
        image_size: pixels of the scaled image; a network made for 224 sees enough from 32 on.
        test_fraction: share of the samples that is held out.
        augment: `shift` moves training images by up to 1/16 of their size.
        batch_size: samples a batch and process.
        num_workers: loader processes; 0 is fastest for images in memory.
        seed: of the training order. The split does not depend on it.
        split_seed: of the division into training and held-out samples.
        predict_split: the split that `predict` runs on.
    """

    def __init__(
        self,
        image_size: int = 32,
        test_fraction: float = 0.5,
        augment: Literal["none", "shift"] = "none",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
        predict_split: Split = "val",
    ) -> None:
        super().__init__(batch_size, num_workers, seed, predict_split)
        if image_size < 8:
            raise BadConfig(f"image_size is {image_size}; the digits have 8 pixels a side already.")
        if augment not in ("none", "shift"):
            raise NameNotFound("augment of digits", augment, ["none", "shift"])
        self._image_size, self._test_fraction = image_size, test_fraction
        self._augment, self._split_seed = augment == "shift", split_seed

    @property
    def normalisation(self) -> Normalisation:
        """What brings values in [0, 1] into the units that the network reads."""
        return Normalisation((0.5,) * 3, (0.5,) * 3)

    def load_sources(self) -> tuple[list[str], dict[Split, ImageSource]]:
        """Class names, and the images of every split."""
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        labels = [int(label) for label in labels]
        images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
        size = (self._image_size, self._image_size)
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        images = images.expand(-1, 3, -1, -1)
        train, held = (
            DigitImages(images[rows], [labels[i] for i in rows], rows, self._augment)
            for rows in split_by_class(labels, self._test_fraction, self._split_seed)
        )
        return list(NAMES), {"train": train, "val": held, "test": held}


class DigitImages:
    """Some of the digits, in memory.

    Args:
        images: [n, 3, h, w].
        labels: digit of each.
        rows: their places in scikit-learn's set.
        shift: whether a draw moves an image.
    """

    def __init__(
        self, images: Tensor, labels: Sequence[int], rows: Sequence[int], shift: bool
    ) -> None:
        self.labels = labels
        self._images, self._rows, self._shift = images, rows, shift

    def load(self, index: int, draw: int | None) -> Tensor:
        """Image `index`, float32 [3, h, w]."""
        image = self._images[index]
        if draw is None or not self._shift:
            return image
        return random_shift(image, torch.Generator().manual_seed(draw))

    def identity(self) -> object:
        """A hash of the pixels."""
        return hash_tensors({"images": self._images})

    def describe(self, index: int) -> str:
        """The image's row in `sklearn.datasets.load_digits`."""
        return f"digits/{self._rows[index]}"
