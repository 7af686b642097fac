"""A shortcut planted in any images: a small patch that gives one class away (METHODS 3d)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from salve_lm.data.labelled import LabelledData, Split
from salve_lm.errors import BadConfig, EmptyClass, NameNotFound, ShapeMismatch
from salve_lm.features import class_index
from salve_lm.hashing import hash_plain
from salve_lm.removal import Proportion
from vision.data.images import SPLITS, Normalisation
from vision.data.patch import Patch, Pattern, Place, Stamped, labels_of
from vision.data.samplers import EachOnce, EachOnceLoader, ShuffledLoader

ValImages = Literal["clean", "stamped"]


class PlantedShortcut(LabelledData):
    """Images of another data module, with a patch on most training images of one class.

    A network trained on these learns the patch as a cue for the class. `val` and `test` are the
    source's own images; the same images with the patch on every other class show how far the cue
    misleads (`shortcut_figures`). Nothing is written to disk, and the source's augmentation runs
    before the patch is stamped, so that its place stays known.

    A sample's patch is a pure function of `seed`, the split and the sample's index.

    Args:
        source: the images, as `(image [c, h, w], label)`.
        target_class: the class that gets the patch, by name or index.
        fraction: share of its training images that are stamped, to the nearest whole image.
        size: height and width of the patch in pixels.
        place: `top_left`, `top_right`, `bottom_left`, `bottom_right`, or `random` (anywhere, drawn
            per sample).
        margin: pixels between the patch and the nearest edges.
        pattern: `solid`, or `checker` of two by two fields.
        colour: one value a channel (or one for all), in the units the network reads: after the
            source's normalisation. The default is yellow for images in [-1, 1].
        second_colour: the checker's other colour.
        seed: of the choice of stamped images and of random places.
        val_images: what `val` and `test` give: the source's images (`clean`), or only those of the
            other classes, all stamped (`stamped`), to run any command on them.
        predict_split: the split that `predict` runs on.
    """

    def __init__(
        self,
        source: LabelledData,
        target_class: str | int,
        fraction: float = 0.95,
        size: int = 4,
        place: Place = "bottom_right",
        margin: int = 0,
        pattern: Pattern = "checker",
        colour: tuple[float, ...] = (1.0, 1.0, -1.0),
        second_colour: tuple[float, ...] = (-1.0, -1.0, 1.0),
        seed: int = 0,
        val_images: ValImages = "clean",
        predict_split: Split = "val",
    ) -> None:
        super().__init__()
        if not 0 <= fraction <= 1:
            raise BadConfig(f"fraction is {fraction}; the share of stamped images lies in [0, 1].")
        if val_images not in ("clean", "stamped"):
            raise NameNotFound("kind of val_images", val_images, ["clean", "stamped"])
        if predict_split not in SPLITS:
            raise NameNotFound("split", predict_split, SPLITS)
        self.source, self.patch = (
            source,
            Patch(size, place, margin, pattern, tuple(colour), tuple(second_colour), seed),
        )
        self.batch_size, self.num_workers = source.batch_size, source.num_workers
        self.class_names = []
        self._target_class, self._fraction = target_class, fraction
        self._val_images, self._predict_split = val_images, predict_split
        self._target = -1
        self._labels: dict[Split, list[int]] = {}

    @property
    def normalisation(self) -> Normalisation:
        """That of the source, where it is an image data module; none otherwise."""
        return getattr(self.source, "normalisation", Normalisation((0.0,) * 3, (1.0,) * 3))

    @property
    def target(self) -> int:
        """Index of the class that gets the patch."""
        self.setup()
        return self._target

    def prepare_data(self) -> None:
        """Whatever the source prepares."""
        self.source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set the source up and check that the patch fits its images.

        Raises:
            NameNotFound: the source has no such class.
            BadConfig: the patch does not fit.
        """
        if self.class_names:
            return
        self.source.setup(stage or "fit")
        self._target = class_index(self._target_class, self.source.class_names)
        self.patch.check(self.source.eval_dataset("train")[0][0])
        self.class_names = list(self.source.class_names)

    def planted_rows(self) -> list[int]:
        """Which training samples carry the patch, ascending: the chosen share of the class.

        Raises:
            EmptyClass: no training image of the target class.
        """
        own = [i for i, label in enumerate(self._labels_of("train")) if label == self.target]
        if not own:
            raise EmptyClass(self.class_names[self.target], "the training images")
        # 32 bits: torch's generator on the CPU sees no more of its seed
        number = int(hash_plain([self.patch.seed, self.target])[:8], 16)
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(len(own), generator=generator).tolist()
        return sorted(own[i] for i in order[: round(self._fraction * len(own))])

    def eval_dataset(self, split: Split) -> Dataset:
        """`train` as the network saw it, `val` and `test` as `val_images` says."""
        if split == "train":
            images = self.source_dataset(split)
            return Stamped(images, self.patch, split, self.planted_rows())
        if self._val_images == "stamped":
            return self.stamped_dataset(split)
        return self.source_dataset(split)

    def source_dataset(self, split: Split) -> Dataset:
        """The source's own images, none of them stamped."""
        self.setup()
        return self.source.eval_dataset(split)

    def stamped_dataset(self, split: Split = "val") -> Stamped:
        """All images of the *other* classes with the patch on them, and their true labels.

        `.rows` are their places in `source_dataset(split)`, `.mask(i)` says where the patch of
        sample i is (for localisation scores).
        """
        rows = [i for i, label in enumerate(self._labels_of(split)) if label != self.target]
        return Stamped(self.source_dataset(split), self.patch, split, rows, only=True)

    def fingerprint(self, split: Split) -> str:
        """The source's, with the settings of the patch where images are stamped."""
        self.setup()
        own = self.source.fingerprint(split)
        if split == "train":
            return hash_plain([own, self.patch.describe(), self._target, self._fraction])
        if self._val_images == "stamped":
            return hash_plain([own, self.patch.describe(), self._target, "others stamped"])
        return own  # the very same images: stores made from them serve both

    def describe(self, split: Split, index: int) -> str:
        """Where the sample comes from, as the source says."""
        self.setup()
        if split != "train" and self._val_images == "stamped":
            index = self.stamped_dataset(split).rows[index]
        return self.source.describe(split, index)

    @property
    def n_train_batches(self) -> int | None:
        """Training batches of this process in an epoch, where the source says it."""
        self.source.trainer = self.trainer  # ranks
        return getattr(self.source, "n_train_batches", None)

    def train_dataloader(self) -> DataLoader:
        """The source's training batches, in its order and with its augmentation, then stamped.

        Raises:
            BadConfig: the source's loader is not a DataLoader over its training samples by index.
        """
        self.setup()
        self.source.trainer = self.trainer  # ranks of distributed samplers
        loader = self.source.train_dataloader()
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise BadConfig(
                f"{type(self.source).__name__}.train_dataloader gives a {type(loader).__name__}; a "
                "planted shortcut needs a torch DataLoader over a dataset with indices."
            )
        if len(cast(Any, loader.dataset)) != len(self._labels_of("train")):
            raise BadConfig(
                f"{type(self.source).__name__} trains on another number of samples than "
                'eval_dataset("train") has. Make both hold the same samples in the same order.'
            )
        batching: dict[str, Any] = {
            "batch_size": loader.batch_size,
            "sampler": loader.sampler,
            "drop_last": loader.drop_last,
        }
        if loader.batch_size is None and loader.batch_sampler is not None:
            batching = {"batch_sampler": loader.batch_sampler}
        # of its own kind where it keeps its place for checkpoints
        kind = ShuffledLoader if isinstance(loader, ShuffledLoader) else DataLoader
        return kind(
            Stamped(loader.dataset, self.patch, "train", self.planted_rows()),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            persistent_workers=loader.persistent_workers,
            generator=loader.generator,
            **batching,
        )

    def val_dataloader(self) -> DataLoader:
        """Every validation sample once."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        """Every test sample once."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Every sample of `predict_split` once."""
        return self._eval_loader(self._predict_split)

    def _eval_loader(self, split: Split) -> DataLoader:
        images = cast(Any, self.eval_dataset(split))
        trainer = self.trainer
        ranks = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        return EachOnceLoader(
            images,
            batch_size=self.batch_size,
            sampler=EachOnce(images, *ranks),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.patch.seed),
        )

    def _labels_of(self, split: Split) -> list[int]:
        if split not in self._labels:
            self._labels[split] = labels_of(self.source_dataset(split))
        return self._labels[split]


@dataclass(frozen=True)
class ShortcutFigures:
    """How far a network relies on the planted cue, on held-out images (METHODS 3d).

    Attributes:
        stamped_called: stamped images of other classes that are called the target class.
        clean_called: clean images of other classes that are: what is no effect of the cue.
        clean_accuracy: of all clean images.
        clean_recall: of clean images of the target class.
    """

    stamped_called: Proportion
    clean_called: Proportion
    clean_accuracy: Proportion
    clean_recall: Proportion


def shortcut_figures(
    logits_clean: Tensor, y_clean: Tensor, logits_stamped: Tensor, y_stamped: Tensor, target: int
) -> ShortcutFigures:
    """The figures of one network, edited or not.

    A cue is gone when `stamped_called` has come down to `clean_called` while accuracy and recall
    on clean images hold. A lower bias brings the first down at the cost of the last.

    Args:
        logits_clean: [n, n_classes] of the clean images.
        y_clean: their labels [n].
        logits_stamped: [m, n_classes] of stamped images; those of the target class are left out.
        y_stamped: their true labels [m].
        target: index of the class that the patch was planted in.

    Raises:
        ShapeMismatch: logits and labels of different lengths, or of another number of classes.
        EmptyClass: no clean image of the class.
    """
    for name, z, y in (("clean", logits_clean, y_clean), ("stamped", logits_stamped, y_stamped)):
        if z.ndim != 2 or y.shape != z.shape[:1] or z.shape[1] != logits_clean.shape[1]:
            raise ShapeMismatch(
                f"Logits {tuple(z.shape)} for {tuple(y.shape)} labels of the {name} images: "
                "expected [n, n_classes] and [n], with the same classes for both."
            )
    own = y_clean == target
    if not own.any():
        raise EmptyClass(str(target), "the clean images")
    clean = logits_clean.argmax(1)
    stamped = logits_stamped[y_stamped != target].argmax(1)
    return ShortcutFigures(
        stamped_called=Proportion.of_mask(stamped == target),
        clean_called=Proportion.of_mask(clean[~own] == target),
        clean_accuracy=Proportion.of_mask(clean == y_clean),
        clean_recall=Proportion.of_mask(clean[own] == target),
    )
