"""Imagenette: ten easy classes of ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from salve_lm.data.labelled import Split
from salve_lm.errors import MissingFile
from vision.data.download import fetch
from vision.data.files import FileTree, Identity
from vision.data.folder import ImageFolder
from vision.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Augment, Resize

CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
# torchvision's name of a size -> the folder inside its archive
FOLDERS = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}


class Imagenette(ImageFolder):
    """Imagenette as torchvision downloads it, or any copy with the same class folders.

    `train` is its training set, `val` and `test` its validation set.

    Args:
        root: where torchvision keeps (or puts) `imagenette2…/`; or a folder or .zip archive that
            holds `train/n01440764/…` itself.
        size: which of torchvision's copies: shorter side of 160 or 320 pixels, or full.
        download: fetch it where it is not there.
        image_size: pixels a side that the network gets.
        resize: `crop` scales the shorter side and cuts out the centre; `squash` scales both sides.
        crop_fraction: share of the scaled shorter side that is kept.
        mean: subtracted per channel; ImageNet's by default.
        std: divided by.
        augment: for training: `none`, `flip`, `crop_flip` or `shift`.
        val_from_train: hold a fifth of the training images out as `val` and `test`, and leave its
            validation set alone: for the choice of settings.
        classes: the classes to use, in this order; all ten where null.
        identity: what tells changed images apart: `content` or `size`.
        batch_size: samples a batch and process.
        num_workers: loader processes.
        seed: of the training order and augmentation.
        predict_split: the split that `predict` runs on.
    """

    def __init__(
        self,
        root: str,
        size: Literal["full", "320px", "160px"] = "160px",
        download: bool = False,
        image_size: int = 224,
        resize: Resize = "crop",
        crop_fraction: float = 1.0,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        augment: Augment = "none",
        val_from_train: bool = False,
        classes: list[str] | None = None,
        identity: Identity = "content",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        predict_split: Split = "val",
    ) -> None:
        super().__init__(
            root=root,
            image_size=image_size,
            resize=resize,
            crop_fraction=crop_fraction,
            mean=mean,
            std=std,
            augment=augment,
            val_from_train=val_from_train,
            classes=classes,
            identity=identity,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            predict_split=predict_split,
        )
        self._size, self._download = size, download

    def prepare_data(self) -> None:
        """Download, if asked for and needed."""
        if self._download and self._local() is None:
            from torchvision.datasets import Imagenette as Download

            fetch(lambda: Download(self._root, size=self._size, download=True), self._root)

    def locate(self) -> Path:
        """The folder or archive that holds `train/`.

        Raises:
            MissingFile: no copy at `root`.
        """
        found = self._local()
        if found is None:
            raise MissingFile(
                f"There is no Imagenette ({FOLDERS[self._size]}/, train/ or a .zip) at "
                f"{self._root}. Set `download: true`, or `root` to a copy."
            )
        return found

    def name_classes(self, tree: FileTree, folders: Sequence[str]) -> dict[str, str]:
        """WordNet id -> name, as in torchvision's copy."""
        return {folder: CLASSES.get(folder, folder) for folder in folders}

    def _local(self) -> Path | None:
        root = Path(self._root)
        if root.is_file() or (root / "train").is_dir():
            return root
        inner = root / FOLDERS[self._size]
        return inner if inner.is_dir() else None
