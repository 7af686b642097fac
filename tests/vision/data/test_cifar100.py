"""CIFAR-100 through torchvision, on a small stand-in in its own file format."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from salve_lm.errors import MissingFile
from vision.data import CIFAR100


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`cifar-100-python/` with two images a class, and torchvision told of its checksums."""
    from torchvision import datasets

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    entry = {
        "data": rng.integers(0, 256, (200, 3072), dtype=np.uint8),
        "fine_labels": list(range(100)) * 2,
    }
    contents = {
        "train": entry,
        "test": {**entry, "data": entry["data"][::-1].copy()},
        "meta": {"fine_label_names": [f"class {i}" for i in range(100)]},
    }
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    for attribute, name in (("train_list", "train"), ("test_list", "test")):
        monkeypatch.setattr(datasets.CIFAR100, attribute, [[name, sums[name]]])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)
    return tmp_path


def test_splits_and_pixels(root: Path) -> None:
    cifar = CIFAR100(str(root), mean=(0, 0, 0), std=(1, 1, 1), batch_size=64)
    cifar.prepare_data()
    cifar.setup()
    assert len(cifar.class_names) == 100 and cifar.class_names[3] == "class 3"
    content = pickle.loads((root / "cifar-100-python/train").read_bytes())
    image, label = cifar.eval_dataset("train")[103]
    assert label == 3
    want = torch.tensor(content["data"][103]).view(3, 32, 32) / 255
    torch.testing.assert_close(image, want)
    assert cifar.describe("val", 7) == "cifar100/test/7"
    assert cifar.fingerprint("val") == cifar.fingerprint("test") != cifar.fingerprint("train")
    assert next(iter(cifar.train_dataloader()))[0].shape == (64, 3, 32, 32)


def test_image_size_changes_images_and_fingerprint(root: Path) -> None:
    large, own = CIFAR100(str(root), image_size=48), CIFAR100(str(root))
    assert large.eval_dataset("val")[0][0].shape == (3, 48, 48)
    assert large.fingerprint("val") != own.fingerprint("val")


def test_missing_and_corrupt(root: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"not usable: .*download: true.*complete copy"):
        CIFAR100(str(tmp_path / "nowhere")).setup()
    (root / "cifar-100-python/train").write_bytes(b"cut off")
    with pytest.raises(MissingFile, match="not found or corrupted"):
        CIFAR100(str(root)).setup()
