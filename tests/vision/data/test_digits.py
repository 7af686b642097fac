"""The embedded digits: splits, pixels, orders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from salve_lm.errors import BadConfig, NameNotFound
from vision.data import Digits
from vision.data.digits import NAMES


def pixels(data: Digits, split: str) -> Tensor:
    images = data.eval_dataset(split)  # type: ignore[arg-type]
    return torch.stack([images[i][0] for i in range(len(images))])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def digits() -> Digits:
    data = Digits(batch_size=50)
    data.setup()
    return data


def test_splits_are_disjoint_and_whole(digits: Digits) -> None:
    rows = [
        [digits.describe(split, i) for i in range(n)]  # type: ignore[arg-type]
        for split, n in (("train", 899), ("val", 898))
    ]
    assert set(rows[0]) | set(rows[1]) == {f"digits/{i}" for i in range(1797)}
    assert not set(rows[0]) & set(rows[1])
    assert digits.class_names == list(NAMES)


def test_the_test_split_is_the_validation_split(digits: Digits) -> None:
    assert digits.fingerprint("test") == digits.fingerprint("val") != digits.fingerprint("train")


def test_labels_and_pixels_are_scikit_learns(digits: Digits) -> None:
    from sklearn.datasets import load_digits

    raw, labels = load_digits(return_X_y=True)
    images = digits.eval_dataset("val")
    for i in (0, 17, 897):
        row = int(digits.describe("val", i).split("/")[1])
        image, label = images[i]
        assert label == labels[row]
        want = torch.tensor(raw[row], dtype=torch.float32).reshape(1, 1, 8, 8)
        want = F.interpolate(want, (32, 32), mode="bilinear", align_corners=False)[0] / 8 - 1
        torch.testing.assert_close(image, want.expand(3, -1, -1))


def test_every_class_is_halved(digits: Digits) -> None:
    train, val = (
        np.bincount([label for _, label in digits.eval_dataset(s)])  # type: ignore[arg-type]
        for s in ("train", "val")
    )
    assert abs(train - val).max() <= 1


def test_training_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int, workers: int = 0) -> list[int]:
        data = Digits(batch_size=50, seed=seed, augment="shift", num_workers=workers)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        torch.manual_seed(epoch * 7 + workers)  # the global state must not matter
        batches = list(loader)
        return [hash(x.numpy().tobytes()) for x, _ in batches]

    assert order(0, 1) == order(0, 1) == order(0, 1, workers=2)
    assert len({order(0, 0)[0], order(0, 1)[0], order(1, 0)[0]}) == 3


def test_the_split_does_not_depend_on_the_training_seed() -> None:
    assert Digits(seed=5).fingerprint("val") == Digits().fingerprint("val")
    assert Digits(split_seed=5).fingerprint("val") != Digits().fingerprint("val")


def test_shift_moves_training_images_only() -> None:
    plain, moved = Digits(), Digits(augment="shift")
    assert plain.fingerprint("train") == moved.fingerprint("train")
    batches = [next(iter(d.train_dataloader()))[0] for d in (plain, moved)]
    assert not torch.equal(*batches)
    assert torch.equal(pixels(plain, "train")[:9], pixels(moved, "train")[:9])


def test_loaders_shapes_and_last_batches(digits: Digits) -> None:
    train = [x.shape for x, _ in digits.train_dataloader()]
    assert train == [(50, 3, 32, 32)] * 17  # 899: the last 49 wait for another epoch
    assert sum(len(x) for x, _ in digits.val_dataloader()) == 898
    labels = torch.cat([y for _, y in digits.predict_dataloader()])
    assert labels.tolist() == [label for _, label in digits.eval_dataset("val")]  # type: ignore[attr-defined]


def test_image_size_and_fraction() -> None:
    data = Digits(image_size=40, test_fraction=0.6)
    assert pixels(data, "train").shape == (719, 3, 40, 40)
    assert data.fingerprint("val") != Digits(image_size=40).fingerprint("val")


def test_a_split_seed_of_scikit_learn_data_without_setup() -> None:
    """Asking before `setup` sets the data up."""
    assert len(Digits().eval_dataset("train")) == 899  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_size": 4}, BadConfig, "have 8 pixels"),
        ({"augment": "flip"}, NameNotFound, "augment of digits.*'flip'.*shift"),
        ({"batch_size": 0}, BadConfig, "batch_size is at least 1"),
        ({"predict_split": "vla"}, NameNotFound, "'vla'. Did you mean 'val'"),
    ],
)
def test_bad_options(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Digits(**arguments)


def test_bad_fraction_and_split() -> None:
    with pytest.raises(BadConfig, match=r"is 1\.0; it lies between 0 and 1"):
        Digits(test_fraction=1.0).setup()
    with pytest.raises(NameNotFound, match=r"No split named 'trian'\. Did you mean 'train'"):
        Digits().eval_dataset("trian")  # type: ignore[arg-type]
