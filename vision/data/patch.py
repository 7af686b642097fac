"""A small patch with a known place, and a dataset that stamps it on some of its images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from salve_lm.data.labelled import Split
from salve_lm.errors import BadConfig, NameNotFound
from salve_lm.hashing import hash_plain
from vision.data.images import Images

Place = Literal["top_left", "top_right", "bottom_left", "bottom_right", "random"]
Pattern = Literal["solid", "checker"]
PLACES: tuple[Place, ...] = ("top_left", "top_right", "bottom_left", "bottom_right", "random")
PATTERNS: tuple[Pattern, ...] = ("solid", "checker")


class Corner(NamedTuple):
    """Upper left corner of a patch, in pixels."""

    top: int
    left: int


@dataclass(frozen=True)
class Patch:
    """What is stamped, and where.

    Attributes:
        size: height and width in pixels.
        place: a corner of the image, or `random`: anywhere, drawn per sample.
        margin: pixels between the patch and the nearest edges.
        pattern: `solid`, or `checker` of two by two fields.
        colour: a value a channel, or one for all, in the units of the images.
        second_colour: the checker's other colour.
        seed: of random places.
    """

    size: int
    place: Place
    margin: int
    pattern: Pattern
    colour: tuple[float, ...]
    second_colour: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.margin < 0 or self.seed < 0:
            raise BadConfig("The size of a patch is at least 1, its margin and seed at least 0.")
        if self.place not in PLACES:
            raise NameNotFound("place of a patch", self.place, PLACES)
        if self.pattern not in PATTERNS:
            raise NameNotFound("pattern of a patch", self.pattern, PATTERNS)
        if self.pattern == "checker" and self.size < 2:
            raise BadConfig("A checker needs 2 pixels or more. Raise size, or use solid.")

    def check(self, image: object) -> None:
        """Raise `BadConfig` unless the patch fits `image`, which should be [c, h, w]."""
        if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
            kind = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise BadConfig(f"A patch needs float images [c, h, w]; the source gives {kind}.")
        channels, height, width = image.shape
        if self.size + 2 * self.margin > min(height, width):
            raise BadConfig(
                f"A patch of {self.size} pixels and a margin of {self.margin} do not fit an image "
                f"of {height} x {width}. Lower size or margin."
            )
        for name in ("colour", "second_colour"):
            if len(getattr(self, name)) not in (1, channels):
                raise BadConfig(
                    f"{name} of the patch has {len(getattr(self, name))} values and the images "
                    f"have {channels} channels. Give 1 or {channels} values."
                )

    def corner(self, split: Split, index: int, height: int, width: int) -> Corner:
        """Where the patch of sample `index` of `split` goes."""
        low, down, right = self.margin, *(n - self.size - self.margin for n in (height, width))
        if self.place == "random":
            # a hash: torch's generator on the CPU sees no more than 32 bits of its seed
            drawn = int(hash_plain([self.seed, split, index]), 16)
            drawn, top = divmod(drawn, down - low + 1)
            return Corner(low + top, low + drawn % (right - low + 1))
        vertical, horizontal = self.place.split("_")
        return Corner(low if vertical == "top" else down, low if horizontal == "left" else right)

    def pixels(self, channels: int) -> Tensor:
        """The patch itself, float32 [channels, size, size]."""
        first, second = (
            torch.tensor(c).expand(channels)[:, None, None]
            for c in (self.colour, self.second_colour)
        )
        if self.pattern == "solid":
            return first.expand(channels, self.size, self.size)
        half = torch.arange(self.size) >= (self.size + 1) // 2
        return torch.where(half[:, None] ^ half[None, :], second, first)

    def mask(self, split: Split, index: int, height: int, width: int) -> Tensor:
        """Where the patch of that sample lies, bool [height, width]."""
        top, left = self.corner(split, index, height, width)
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[top : top + self.size, left : left + self.size] = True
        return mask

    def stamp(self, image: Tensor, split: Split, index: int) -> Tensor:
        """`image` [c, h, w] with the patch of that sample on it; the original stays as it is."""
        self.check(image)
        channels, height, width = image.shape
        top, left = self.corner(split, index, height, width)
        stamped = image.clone()
        stamped[:, top : top + self.size, left : left + self.size] = self.pixels(channels)
        return stamped

    def describe(self) -> dict[str, Any]:
        """All settings as plain values."""
        values = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


class Stamped(Dataset[tuple[Tensor, int]]):
    """Images of which some carry the patch; labels stay what they are.

    Args:
        images: `(image, label)` by index, or by `(index, ...)` with augmentation, which then runs
            before the patch is stamped.
        patch: what to stamp.
        split: where the images are from.
        rows: indices of those that get it.
        only: leave out all other images; then sample i is image `rows[i]`.
    """

    def __init__(
        self, images: Dataset, patch: Patch, split: Split, rows: Iterable[int], only: bool = False
    ) -> None:
        self._images, self._patch, self._split = cast(Any, images), patch, split
        self.rows = tuple(rows)
        self._stamped, self._only = frozenset(self.rows), only

    def __len__(self) -> int:
        return len(self.rows) if self._only else len(self._images)

    def __getitem__(self, key: int | tuple[Any, ...]) -> tuple[Tensor, int]:
        index, *draw = key if isinstance(key, tuple) else (key,)
        index = self._index(index)
        image, label = self._images[(index, *draw) if draw else index]
        if index in self._stamped:
            image = self._patch.stamp(image, self._split, index)
        return image, int(label)

    def mask(self, i: int) -> Tensor:
        """Where the patch of sample `i` lies, bool [h, w]; nowhere if it has none."""
        index = self._index(i)
        height, width = self._images[index][0].shape[-2:]
        if index not in self._stamped:
            return torch.zeros(height, width, dtype=torch.bool)
        return self._patch.mask(self._split, index, height, width)

    def labels(self) -> list[int]:
        """Label of every sample."""
        labels = labels_of(self._images)
        return [labels[i] for i in self.rows] if self._only else labels

    def _index(self, i: int) -> int:
        return self.rows[i] if self._only else int(i)


def labels_of(dataset: Dataset) -> list[int]:
    """Labels of an image dataset, without loading the images where they are known apart from them.

    Of a dataset that is neither ours nor in torchvision's manner (`targets`) every item is loaded.
    """
    if isinstance(dataset, Images):
        return [int(label) for label in dataset.source.labels]
    if isinstance(dataset, Stamped):
        return dataset.labels()
    targets = getattr(dataset, "targets", None)
    items = cast(Any, dataset)
    if isinstance(targets, Tensor | list | tuple) and len(targets) == len(items):
        return [int(label) for label in targets]
    return [int(items[i][1]) for i in range(len(items))]
