"""From a PIL image to a normalised tensor; random parts are a pure function of a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from salve_lm.errors import BadConfig

if TYPE_CHECKING:
    from PIL.Image import Image

Resize = Literal["crop", "squash"]
Augment = Literal["none", "flip", "crop_flip", "shift"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# ranges of the random crop: area and aspect ratio (as in torchvision's RandomResizedCrop; its
# smallest area, 0.08, suits ImageNet's million images, not the small sets used here)
CROP_AREA = (0.35, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
SHIFT = 1 / 16


@dataclass(frozen=True)
class ImageTransform:
    """Resize, crop, augment, normalise.

    Attributes:
        image_size: height and width of the result, in pixels.
        resize: "crop" scales the shorter side and cuts out the centre; "squash" scales both sides.
        crop_fraction: share of the scaled shorter side that the centre crop keeps (torchvision's
            256 -> 224 is 0.875); 1 keeps all.
        mean: subtracted per channel, of values in [0, 1].
        std: divided by.
        augment: for training: "flip" (left-right), "crop_flip" (random resized crop and flip),
            "shift" (by up to 1/16 of the size each way, edges repeated), "none".
    """

    image_size: int
    resize: Resize = "crop"
    crop_fraction: float = 1.0
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    augment: Augment = "none"

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise BadConfig(f"image_size is {self.image_size}; it must be at least 1.")
        if not 0 < self.crop_fraction <= 1:
            raise BadConfig(f"crop_fraction is {self.crop_fraction}; it lies in (0, 1].")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise BadConfig("mean and std have three values each (R, G, B), std above 0.")

    def __call__(self, image: Image, draw: int | None = None) -> Tensor:
        """Transform an RGB image.

        Args:
            image: in mode RGB.
            draw: seed of the random parts; None leaves them out (evaluation).

        Returns:
            float32 [3, image_size, image_size].
        """
        if draw is None or self.augment == "none":
            return self._normalise(self._fit(image))
        generator = torch.Generator().manual_seed(draw)
        if self.augment == "crop_flip":
            top, left, height, width = random_crop(image.height, image.width, generator)
            crop = image.crop((left, top, left + width, top + height))
            pixels = self._normalise(scale(crop, self.image_size, self.image_size))
        else:
            pixels = self._normalise(self._fit(image))
        if self.augment == "shift":
            return random_shift(pixels, generator)
        return pixels.flip(-1) if torch.rand((), generator=generator) < 0.5 else pixels

    def describe(self) -> dict[str, Any]:
        """Plain values that fix what evaluation sees (no augmentation)."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std), "augment": "none"}

    def _fit(self, image: Image) -> Image:
        size = self.image_size
        if self.resize == "squash":
            return scale(image, size, size)
        shorter = max(size, round(size / self.crop_fraction))
        now = min(image.width, image.height)
        # the longer side is cut down to a whole number, as torchvision's Resize does
        width, height = (int(shorter * n / now) for n in (image.width, image.height))
        image = scale(image, width, height)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return image.crop((left, top, left + size, top + size))

    def _normalise(self, image: Image) -> Tensor:
        import numpy as np

        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(list(v)).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std


def scale(image: Image, width: int, height: int) -> Image:
    """Resize bilinearly, with antialiasing.

    Pillow's own method: what torchvision does for PIL images, without the seconds that importing
    its transforms takes.
    """
    from PIL import Image as pil

    if image.size == (width, height):
        return image
    return image.resize((width, height), pil.Resampling.BILINEAR)


def random_crop(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop: uniform in area, log-uniform in aspect ratio.

    The rule of torchvision's RandomResizedCrop, which draws from the global random state only.
    """
    for _ in range(10):
        u = torch.rand(2, generator=generator).tolist()
        area = height * width * (CROP_AREA[0] + u[0] * (CROP_AREA[1] - CROP_AREA[0]))
        low, high = (math.log(r) for r in CROP_RATIO)
        ratio = math.exp(low + u[1] * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (), generator=generator))
            left = int(torch.randint(width - w + 1, (), generator=generator))
            return top, left, h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def random_shift(image: Tensor, generator: torch.Generator) -> Tensor:
    """Move `image` [c, h, w] by up to 1/16 of its height each way (at least 1), edges repeated."""
    reach = max(1, round(image.shape[-1] * SHIFT))
    down, right = torch.randint(2 * reach + 1, (2,), generator=generator).tolist()
    padded = torch.nn.functional.pad(image[None], (reach,) * 4, mode="replicate")[0]
    return padded[:, down : down + image.shape[1], right : right + image.shape[2]]
