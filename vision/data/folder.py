"""Images in one folder a class: a folder or a zip archive."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from salve_lm.data.labelled import Split
from salve_lm.errors import BadConfig, CorruptFile, EmptyClass, MissingFile, NameNotFound
from vision.data.files import SUFFIXES, FileTree, Identity, ImageFiles, open_tree
from vision.data.images import ImageData, ImageSource, Normalisation, split_by_class
from vision.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Augment, ImageTransform, Resize

SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
# class folder -> its images, as names inside the tree
Classes = dict[str, list[str]]


class ImageFolder(ImageData):
    """Any images sorted into folders: `root/train/CLASS/…`, `root/val/CLASS/…`, maybe `root/test/`.

    Without `val/` (or without any split folder: `root/CLASS/…`) a share of each class is held out.
    Without `test/`, `test` is `val`. Greyscale, palette, alpha and 16-bit images are accepted.

    Args:
        root: a folder, or a .zip archive of one, which is read in place. `~` and environment
            variables such as `$DATA` are filled in.
        image_size: pixels a side that the network gets.
        resize: `crop` scales the shorter side and cuts out the centre; `squash` scales both sides.
        crop_fraction: share of the scaled shorter side that is kept (torchvision: 0.875).
        mean: subtracted per channel, of values in [0, 1]; ImageNet's by default.
        std: divided by.
        augment: for training: `none`, `flip`, `crop_flip` (random resized crop, flip) or `shift`.
        val_fraction: share of each class that is held out where there is no `val/`.
        split_seed: of that division.
        val_from_train: hold that share out of the training images although there is a `val/`, which
            is then not looked at: for the choice of settings, so that `val/` stays untouched.
        classes: the classes to use, in this order (folders or names); all, sorted by folder, where
            null.
        class_names_file: JSON of folder -> name (or -> {"name": name}); of several names separated
            by commas the first is taken. A `classes.json` inside the root, or beside the archive,
            is found on its own.
        identity: what tells changed images apart: `content` (reads all files once; free for an
            archive) or `size`.
        batch_size: samples a batch and process.
        num_workers: loader processes.
        seed: of the training order and augmentation.
        predict_split: the split that `predict` runs on.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        resize: Resize = "crop",
        crop_fraction: float = 1.0,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        augment: Augment = "none",
        val_fraction: float = 0.2,
        split_seed: int = 0,
        val_from_train: bool = False,
        classes: list[str] | None = None,
        class_names_file: str | None = None,
        identity: Identity = "content",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        predict_split: Split = "val",
    ) -> None:
        super().__init__(batch_size, num_workers, seed, predict_split)
        self._root = os.path.expanduser(os.path.expandvars(root))
        self._classes, self._names_file = classes, class_names_file
        self._transform = ImageTransform(image_size, resize, crop_fraction, mean, std, augment)
        self._val_fraction, self._split_seed, self._identity = val_fraction, split_seed, identity
        self._val_from_train = val_from_train

    def locate(self) -> Path:
        """The folder or archive of images."""
        return Path(self._root)

    def name_classes(self, tree: FileTree, folders: Sequence[str]) -> dict[str, str]:
        """Class folder -> name of the class."""
        return class_names(tree, folders, self._names_file)

    @property
    def normalisation(self) -> Normalisation:
        """What brings values in [0, 1] into the units that the network reads."""
        return Normalisation(tuple(self._transform.mean), tuple(self._transform.std))

    def load_sources(self) -> tuple[list[str], dict[Split, ImageSource]]:
        """Class names, and the images of every split."""
        tree = open_tree(self.locate())
        found = find_splits(tree)
        if self._val_from_train:
            found = {"train": found["train"]}
        folders = sorted(found["train"])
        for split, classes in found.items():
            for folder in classes.keys() - found["train"].keys():
                raise BadConfig(
                    f"{tree.root} has a class {folder!r} in {split}/ and none in train/. Add its "
                    "training images, or remove it."
                )
        names = self.name_classes(tree, folders)
        folders = choose(folders, names, self._classes)
        lists: dict[Split, tuple[list[str], list[int]]] = {
            split: _listed(split, found[split], folders, tree) for split in found
        }
        if "val" not in lists:
            images, labels = lists["train"]
            for folder in folders:
                if len(found["train"][folder]) < 2:
                    raise EmptyClass(folder, f"the held-out share of {tree.root} (it has 1 image)")
            kept, held = split_by_class(labels, self._val_fraction, self._split_seed)
            lists["train"] = [images[i] for i in kept], [labels[i] for i in kept]
            lists["val"] = [images[i] for i in held], [labels[i] for i in held]
        sources: dict[Split, ImageSource] = {
            split: ImageFiles(tree, images, labels, self._transform, self._identity)
            for split, (images, labels) in lists.items()
        }
        sources.setdefault("test", sources["val"])
        return [names[folder] for folder in folders], sources


def find_splits(tree: FileTree) -> dict[Split, Classes]:
    """Sort the images of a tree by split and class folder; without split folders all are `train`.

    A single folder around everything (as archives often have) is stepped over, and so are folders
    between a class and its images.

    Raises:
        MissingFile: no images in class folders.
    """
    empty: list[tuple[str, ...]] = []
    images: list[tuple[str, ...]] = []
    for name in tree.names():
        parts = tuple(name.rstrip("/").split("/"))
        if any(part.startswith((".", "__MACOSX")) for part in parts):
            continue
        if name.endswith("/"):
            empty.append(parts)
        elif name.lower().endswith(SUFFIXES):
            images.append(parts)
    around = 0
    while images and all(
        len(p) > around + 2 and p[around] == images[0][around] and p[around] not in SPLIT_FOLDERS
        for p in images
    ):
        around += 1
    divided = any(p[around : around + 1] == ("train",) for p in images + empty)
    splits: dict[Split, Classes] = {}
    for n, path in enumerate(images + empty):
        rest = path[around:]
        split: Split = "train"
        if divided:
            if not rest or rest[0] not in SPLIT_FOLDERS:
                continue
            split, rest = SPLIT_FOLDERS[rest[0]], rest[1:]
        file = n < len(images)
        if len(rest) > file:
            images_of_class = splits.setdefault(split, {}).setdefault(rest[0], [])
            if file:
                images_of_class.append("/".join(path))
    if not splits.get("train"):
        raise MissingFile(
            f"{tree.root} holds no images in class folders. Expected root/train/CLASS/IMAGE and "
            f"root/val/CLASS/IMAGE, or root/CLASS/IMAGE ({', '.join(SUFFIXES[:4])}, …)."
        )
    return splits


def class_names(tree: FileTree, folders: Sequence[str], file: str | None) -> dict[str, str]:
    """Folder -> name of its class: from a JSON file, else the folder's own.

    Raises:
        MissingFile, CorruptFile: the file is not there, or no such JSON.
        NameNotFound: a file was named and lacks a folder.
    """
    inside = "classes.json" if "classes.json" in tree.names() else None
    beside = tree.root.parent / "classes.json"
    path = Path(file) if file is not None else beside
    if file is not None and not path.is_file():
        raise MissingFile(f"No class_names_file at {path}.")
    if file is None and inside is not None:
        path, text = tree.root / inside, tree.read(inside)
    elif path.is_file() and (file is not None or tree.root.is_file()):
        text = path.read_bytes()
    else:
        return {folder: folder for folder in folders}
    try:
        given = json.loads(text)
        full = {str(k): str(v["name"] if isinstance(v, dict) else v) for k, v in given.items()}
    except (ValueError, AttributeError, KeyError) as e:
        raise CorruptFile(
            path, "no JSON of class folder -> name", 'Write {"FOLDER": "NAME", …}.'
        ) from e
    if file is not None:
        for folder in folders:
            if folder not in full:
                raise NameNotFound(f"class folder in {path}", folder, list(full))
    first = {folder: full.get(folder, folder).partition(",")[0].strip() for folder in folders}
    # two synsets may share their first word ("crane"): those keep all of theirs
    shared = list(first.values())
    return {k: v if shared.count(v) == 1 else full.get(k, k) for k, v in first.items()}


def choose(
    folders: Sequence[str], names: dict[str, str], wanted: Sequence[str] | None
) -> list[str]:
    """The folders of the `wanted` classes, given as folders or names.

    Raises:
        NameNotFound: a class that is not there.
        BadConfig: an empty list.
    """
    if wanted is None:
        return list(folders)
    if not wanted:
        raise BadConfig("`classes` is empty. Name the classes to use, or leave it out.")
    of = {**{name: folder for folder, name in names.items()}, **{f: f for f in folders}}
    for name in wanted:
        if name not in of:
            raise NameNotFound("class", name, [*names.values(), *folders])
    return [of[name] for name in wanted]


def _listed(
    split: str, found: Classes, folders: Sequence[str], tree: FileTree
) -> tuple[list[str], list[int]]:
    """Images and labels of one split."""
    for folder in folders:
        if not found.get(folder):
            raise EmptyClass(folder, f"{split}/ of {tree.root}")
    pairs = [(image, label) for label, f in enumerate(folders) for image in sorted(found[f])]
    return [image for image, _ in pairs], [label for _, label in pairs]
