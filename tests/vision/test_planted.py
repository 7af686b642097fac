"""The planted shortcut: pixels, places, shares, loaders, and a network that falls for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from salve_lm.data.labelled import LabelledData, Split
from salve_lm.errors import BadConfig, EmptyClass, NameNotFound, ShapeMismatch
from vision.data import Digits
from vision.data.patch import Patch, Stamped, labels_of
from vision.data.planted import PlantedShortcut, shortcut_figures

YELLOW = torch.tensor([1.0, 1.0, -1.0])[:, None, None]


class Plain(LabelledData):
    """The least that a source must be: 12 images of 3 classes, [3, 6, 8], each of one grey."""

    def __init__(self, shape: tuple[int, ...] = (3, 6, 8), labels: Tensor | None = None) -> None:
        super().__init__()
        self.batch_size, self.num_workers = 5, 0
        self.labels = torch.arange(12) % 3 if labels is None else labels
        grey = torch.arange(12.0).reshape(-1, *[1] * len(shape)) / 12
        self.images = TensorDataset(grey.expand(-1, *shape), self.labels)

    def setup(self, stage: str | None = None) -> None:
        self.class_names = ["ant", "bee", "cow"]

    def eval_dataset(self, split: Split) -> Dataset:
        return self.images

    def fingerprint(self, split: Split) -> str:
        return f"plain {split}"

    def describe(self, split: Split, index: int) -> str:
        return f"{split} of plain {index}"

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(self.images, batch_size=5, shuffle=True, generator=generator)


def plant(source: LabelledData | None = None, target: str | int = "bee", **options: Any):  # type: ignore[no-untyped-def]
    return PlantedShortcut(source or Plain(), target, **{"size": 2, **options})


def everything(dataset: Any) -> tuple[Tensor, Tensor]:
    items = [dataset[i] for i in range(len(dataset))]
    return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])


def patch(**options: Any) -> Patch:
    plain = {"size": 2, "place": "bottom_right", "margin": 0, "pattern": "solid", "seed": 0}
    colours = {"colour": (1.0, 1.0, -1.0), "second_colour": (0.0,)}
    return Patch(**{**plain, **colours, **options})


# ------------------------------------------------------------------------ the patch


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["top_left", "top_right", "bottom_left", "bottom_right", "random"]),
    st.sampled_from(["solid", "checker"]),
    st.integers(2, 4),
    st.integers(0, 2),
    st.integers(0, 500),
)
def test_pixels_change_where_the_mask_says_and_nowhere_else(
    place: str, pattern: str, size: int, margin: int, index: int
) -> None:
    p = patch(place=place, pattern=pattern, size=size, margin=margin, second_colour=(9.0,))
    image = torch.full((3, 8, 11), 5.0)
    stamped, mask = p.stamp(image, "val", index), p.mask("val", index, 8, 11)
    assert torch.equal((stamped != image).all(0), mask)
    assert torch.equal((stamped != image).any(0), mask)
    assert int(mask.sum()) == size**2
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    assert margin <= rows.min() and rows.max() < 8 - margin
    assert margin <= columns.min() and columns.max() < 11 - margin


@pytest.mark.parametrize(
    ("place", "corner"),
    [
        ("top_left", (1, 1)),
        ("top_right", (1, 7)),
        ("bottom_left", (3, 1)),
        ("bottom_right", (3, 7)),
    ],
)
def test_corners(place: str, corner: tuple[int, int]) -> None:
    assert patch(place=place, margin=1).corner("train", 5, 6, 10) == corner


def test_colours() -> None:
    assert torch.equal(patch().pixels(3), YELLOW.expand(3, 2, 2))
    grey = patch(pattern="checker", size=3, colour=(1.0,), second_colour=(0.0,)).pixels(1)
    assert grey.tolist() == [[[1, 1, 0], [1, 1, 0], [0, 0, 1]]]


def test_random_places_are_the_same_each_time_and_cover_the_image() -> None:
    p = patch(place="random")
    places = [p.corner("val", i, 6, 6) for i in range(400)]
    assert places == [p.corner("val", i, 6, 6) for i in range(400)]
    assert set(places) == {(top, left) for top in range(5) for left in range(5)}
    assert places != [p.corner("train", i, 6, 6) for i in range(400)]
    assert places != [patch(place="random", seed=1).corner("val", i, 6, 6) for i in range(400)]


# ------------------------------------------------------------------------ the data


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.5, 2), (0.6, 2), (0.95, 4), (1, 4)])
def test_the_share_is_exact_and_of_one_class_only(fraction: float, count: int) -> None:
    data = plant(fraction=fraction)
    images, labels = everything(data.eval_dataset("train"))
    clean, _ = everything(data.source_dataset("train"))
    changed = (images != clean).flatten(1).any(1)
    assert changed.nonzero()[:, 0].tolist() == data.planted_rows()
    assert len(data.planted_rows()) == count
    assert bool((labels[changed] == 1).all())
    assert torch.equal(labels, torch.arange(12) % 3)


def test_digits_share_labels_and_masks() -> None:
    source = Digits(image_size=8)
    data = plant(source, "three", place="random", pattern="solid")
    rows = data.planted_rows()
    dataset = data.eval_dataset("train")
    images, labels = everything(dataset)
    clean, _ = everything(source.eval_dataset("train"))
    assert data.class_names == source.class_names and data.target == 3
    assert len(rows) == round(0.95 * int((labels == 3).sum())) > 80
    for i, (image, was) in enumerate(zip(images, clean, strict=True)):
        mask = dataset.mask(i)
        assert bool(mask.any()) == (i in rows)
        assert torch.equal(image, torch.where(mask, YELLOW, was))
    # the source keeps all its images in one tensor: stamping must not write into it
    assert torch.equal(everything(Digits(image_size=8).eval_dataset("train"))[0], clean)


def test_val_and_test_are_the_sources_own() -> None:
    source = Digits(image_size=8)
    data = plant(source, 3)
    for split in ("val", "test"):
        assert data.eval_dataset(split).source is source.eval_dataset(split).source
        assert data.fingerprint(split) == source.fingerprint(split)
        assert data.describe(split, 7) == source.describe(split, 7)


def test_stamped_images_are_all_others_with_their_own_labels() -> None:
    data = plant()
    stamped = data.stamped_dataset()
    assert stamped.rows == (0, 2, 3, 5, 6, 8, 9, 11) and len(stamped) == 8
    images, labels = everything(stamped)
    clean, all_labels = everything(data.source_dataset("val"))
    assert labels.tolist() == all_labels[list(stamped.rows)].tolist() == labels_of(stamped)
    for i, row in enumerate(stamped.rows):
        changed = (images[i] != clean[row]).all(0)
        assert torch.equal(changed, stamped.mask(i)) and int(changed.sum()) == 4


def test_val_images_stamped_serve_any_command() -> None:
    data = plant(val_images="stamped")
    images, labels = everything(data.eval_dataset("val"))
    assert torch.equal(images, everything(plant().stamped_dataset("val"))[0])
    batches = list(data.val_dataloader())
    assert torch.equal(torch.cat([x for x, _ in batches]), images)
    assert torch.equal(torch.cat([y for _, y in batches]), labels)
    assert data.describe("val", 1) == "val of plain 2"
    assert data.describe("train", 1) == "train of plain 1"
    assert data.fingerprint("val") != plant().fingerprint("val")


@pytest.mark.parametrize(
    "other",
    [
        {"fraction": 0.5},
        {"size": 3},
        {"place": "top_left"},
        {"margin": 1},
        {"pattern": "solid"},
        {"colour": (0.5, 0.5, 0.5)},
        {"second_colour": (0.5,)},
        {"seed": 1},
        {"target": "cow"},
    ],
)
def test_fingerprints_tell_every_setting(other: dict[str, Any]) -> None:
    assert plant().fingerprint("train") == plant().fingerprint("train")
    assert plant().fingerprint("train") != plant(**other).fingerprint("train")
    assert plant().fingerprint("train") != Plain().fingerprint("train")


# ------------------------------------------------------------------------ the loaders


def test_training_batches_are_the_sources_with_the_patch_on() -> None:
    data = plant()
    stamped, _ = everything(data.eval_dataset("train"))
    expected = [(stamped[[int(12 * x) for x in b[:, 0, 0, 0].round(decimals=4) + 0.001]], y)
                for b, y in Plain().train_dataloader()]  # fmt: skip
    got = list(data.train_dataloader())
    assert [len(y) for _, y in got] == [5, 5, 2]
    for (x, y), (want, labels) in zip(got, expected, strict=True):
        assert torch.equal(x, want) and torch.equal(y, labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_moves_the_image_and_not_the_patch(workers: int) -> None:
    def source() -> Digits:
        return Digits(image_size=16, augment="shift", batch_size=64, num_workers=workers)

    data = plant(source(), "three", fraction=1.0, pattern="solid")
    plain = list(source().train_dataloader())
    mask = data.patch.mask("train", 0, 16, 16)
    for (x, y), (was, labels) in zip(data.train_dataloader(), plain, strict=True):
        assert torch.equal(y, labels)
        put = (y == 3)[:, None, None, None] & mask
        assert torch.equal(x, torch.where(put, YELLOW, was))


def test_evaluation_loaders_give_each_sample_once() -> None:
    data = plant(Digits(image_size=8, batch_size=100), 3, predict_split="test")
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        labels = torch.cat([y for _, y in loader])
        assert labels.tolist() == labels_of(data.eval_dataset("val"))
    assert data.batch_size == 100


def test_a_batch_sampler_of_the_source_is_kept() -> None:
    class Batched(Plain):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(self.images, batch_sampler=[[1, 0], [4]])  # type: ignore[arg-type]

    batches = list(plant(Batched(), fraction=1).train_dataloader())
    assert [y.tolist() for _, y in batches] == [[1, 0], [1]]
    assert batches[0][0][0, 0, -1, -1] == 1 != batches[0][0][1, 0, -1, -1]


def test_lightning_runs_it() -> None:
    from lightning.pytorch import LightningModule, Trainer

    class Count(LightningModule):
        seen = 0

        def training_step(self, batch: Any, _: int) -> None:
            self.seen += len(batch[1])

        def validation_step(self, batch: Any, _: int) -> None:
            self.seen += 1000 * len(batch[1])

        def configure_optimizers(self) -> None:
            return None

    model = Count()
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_epochs=1, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(model, datamodule=plant())
    assert model.seen == 12_012


def test_it_comes_from_a_config() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LabelledData, "data")
    config = parser.parse_object(
        {
            "data": {
                "class_path": "vision.data.planted.PlantedShortcut",
                "init_args": {
                    "source": {
                        "class_path": "vision.data.digits.Digits",
                        "init_args": {"image_size": 8},
                    },
                    "target_class": "three",
                    "size": 2,
                    "colour": [1, -1, 1],
                },
            }
        }
    )
    data = parser.instantiate_classes(config).data
    data.prepare_data()
    data.setup("fit")
    assert data.target == 3 and data.patch.colour == (1, -1, 1)
    assert "PlantedShortcut" in parser.dump(config)


# ------------------------------------------------------------------------ the figures


def test_figures_of_answers_written_out() -> None:
    y = torch.tensor([0, 0, 0, 1, 1, 2])
    called = torch.tensor([0, 0, 2, 1, 0, 2])
    stamped = torch.tensor([0, 0, 1, 0])
    found = shortcut_figures(
        torch.eye(3)[called], y, torch.eye(3)[stamped], torch.tensor([1, 1, 2, 0]), 0
    )
    assert found.stamped_called[:2] == (2, 3)  # the stamped image of class 0 does not count
    assert found.clean_called[:2] == (1, 3)
    assert found.clean_accuracy[:2] == (4, 6)
    assert found.clean_recall[:2] == (2, 3)
    assert found.clean_recall.low < 2 / 3 < found.clean_recall.high


def test_a_network_falls_for_the_patch_and_only_the_edit_of_the_patch_cures_it() -> None:
    from sklearn.linear_model import LogisticRegression

    from salve_lm.edits import apply
    from salve_lm.edits.ops import FoldInput, ShiftBias

    data = plant(Digits(image_size=8), "three", pattern="solid")
    k = data.target
    x, y = everything(data.eval_dataset("train"))
    x = x.flatten(1)
    was = everything(data.source_dataset("train"))[0].flatten(1)
    fitted = LogisticRegression(C=1e-3, max_iter=300).fit(x.numpy(), y.numpy())
    head = {
        "fc.weight": torch.as_tensor(fitted.coef_, dtype=torch.float32),
        "fc.bias": torch.as_tensor(fitted.intercept_, dtype=torch.float32),
    }
    (clean, y_clean), (stamped, y_stamped) = (
        everything(d) for d in (data.eval_dataset("val"), data.stamped_dataset("val"))
    )

    def figures(ops: list[Any]) -> Any:
        new = {**head, **(apply(head, ops) if ops else {})}
        clean_logits, stamped_logits = (
            t.flatten(1) @ new["fc.weight"].T + new["fc.bias"] for t in (clean, stamped)
        )
        return shortcut_figures(clean_logits, y_clean, stamped_logits, y_stamped, k)

    v = (x - was)[data.planted_rows()].mean(0).double()
    q = v / (v @ v)
    erase = FoldInput(
        module="fc", output_dim=0, alpha=1.0, v=v, q=q, offset=-float(q @ was.double().mean(0))
    )
    delta = -torch.eye(10, dtype=torch.float64)[k]
    lower = ShiftBias(module="fc", output_dim=0, alpha=0.5, delta=delta)
    unedited, erased, lowered = figures([]), figures([erase]), figures([lower])
    assert unedited.stamped_called.low > 0.25 and unedited.clean_called.high < 0.02
    assert erased.stamped_called.high < 0.02
    assert erased.clean_recall.share >= unedited.clean_recall.share > 0.4
    assert erased.clean_accuracy.share >= unedited.clean_accuracy.share
    assert lowered.stamped_called.share < unedited.stamped_called.share
    assert lowered.clean_recall.share < 0.1  # the trivial edit pays with the class itself


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: plant(target="bea").setup(), NameNotFound, "Did you mean 'bee'"),
        (lambda: plant(target=3).setup(), NameNotFound, "There are 3 classes"),
        (lambda: plant(size=7).setup(), BadConfig, "patch of 7 pixels .* image of 6 x 8. Lower"),
        (lambda: plant(size=4, margin=2).setup(), BadConfig, "margin of 2 do not fit"),
        (lambda: plant(fraction=1.1), BadConfig, r"fraction is 1.1.*\[0, 1\]"),
        (lambda: plant(fraction=-0.1), BadConfig, "fraction is -0.1"),
        (lambda: plant(fraction=float("nan")), BadConfig, "fraction is nan"),
        (lambda: plant(size=0), BadConfig, "at least 1"),
        (lambda: plant(seed=-1), BadConfig, "at least 0"),
        (lambda: plant(place="bottom_rigth"), NameNotFound, "mean 'bottom_right'"),
        (lambda: plant(pattern="chequer"), NameNotFound, "mean 'checker'"),
        (lambda: plant(size=1), BadConfig, "checker needs 2 pixels"),
        (lambda: plant(val_images="stampd"), NameNotFound, "mean 'stamped'"),
        (lambda: plant(predict_split="valid"), NameNotFound, "mean 'val'"),
        (lambda: plant(colour=(1.0, 1.0)).setup(), BadConfig, "colour of the patch has 2 values"),
        (lambda: plant(Plain((3,))).setup(), BadConfig, r"float images \[c, h, w\].*\(3,\)"),
        (
            lambda: plant(Plain(labels=torch.zeros(12, dtype=torch.int64))).planted_rows(),
            EmptyClass,
            "'bee' has no samples in the training images",
        ),
    ],
)
def test_bad_settings(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_sources_whose_training_loader_has_no_indices() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter([])

    class Streaming(Plain):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(Stream())

    class Fewer(Plain):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(TensorDataset(torch.zeros(3, 3, 6, 8), torch.zeros(3)))

    with pytest.raises(BadConfig, match=r"Streaming.train_dataloader.*dataset with indices"):
        plant(Streaming()).train_dataloader()
    with pytest.raises(BadConfig, match="Fewer trains on another number of samples"):
        plant(Fewer()).train_dataloader()


def test_bad_figures() -> None:
    z, y = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ShapeMismatch, match="of the stamped images"):
        shortcut_figures(z, y, z[:, :2], y, 0)
    with pytest.raises(ShapeMismatch, match="of the clean images"):
        shortcut_figures(z, y[:1], z, y, 0)
    with pytest.raises(EmptyClass, match="the clean images"):
        shortcut_figures(z, y, z, y, 2)


def test_labels_are_read_without_loading_images_where_possible() -> None:
    class Torchvisions(Dataset):
        targets = (2, 0)

        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> None:
            raise AssertionError("an image was loaded")

    assert labels_of(Torchvisions()) == [2, 0]
    assert labels_of(Stamped(Torchvisions(), patch(), "val", [1], only=True)) == [0]
