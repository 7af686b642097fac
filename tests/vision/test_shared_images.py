"""Real images and real pretrained weights, where SALVE_DATA has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from salve_lm.errors import BadConfig
from vision import Classifier, build_backbone
from vision.data import ImageFolder, Imagenette
from vision.data.imagenette import CLASSES

pytestmark = pytest.mark.shared_data


@pytest.fixture(scope="module")
def nette(shared_data: Path) -> ImageFolder:
    root = shared_data / "imagenette224" / "imagenette224_subset.zip"
    data = ImageFolder(str(root), batch_size=50)
    data.setup()
    return data


@pytest.fixture(scope="module")
def squeezenet(shared_data: Path) -> str:
    folder = shared_data / "squeezenet1_1_imagenet"
    return str(folder / "squeezenet1_1_torchvision_fp16.safetensors")


def test_imagenette_archive(nette: ImageFolder, shared_data: Path) -> None:
    assert nette.class_names == list(CLASSES.values())
    assert (len(nette.eval_dataset("train")), len(nette.eval_dataset("val"))) == (4000, 1500)  # type: ignore[arg-type]
    assert "n01440764/" in nette.describe("val", 0)
    same = Imagenette(str(shared_data / "imagenette128" / "imagenette128.zip"), image_size=128)
    same.setup()
    assert same.class_names == nette.class_names
    assert len(same.eval_dataset("train")) == 9469  # type: ignore[arg-type]


def test_tiny_imagenet_names(shared_data: Path) -> None:
    root = shared_data / "tiny_imagenet100" / "tiny_imagenet100_subset.zip"
    tiny = ImageFolder(str(root), image_size=64)
    tiny.setup()
    assert len(set(tiny.class_names)) == 100
    assert tiny.class_names[0] == "goldfish"


def test_squeezenet_is_right_about_imagenette(nette: ImageFolder, squeezenet: str) -> None:
    """Strictly loaded, it tells Imagenette's classes apart (95.5 % over all of them)."""
    import json

    built = build_backbone("squeezenet1_1", weights=squeezenet)
    assert built.num_classes == 1000
    index = json.loads((Path(squeezenet).parents[1] / "imagenette224/classes.json").read_text())
    columns = [index[wnid]["imagenet1k_index"] for wnid in CLASSES]
    images = nette.eval_dataset("val")
    some = [images[i] for i in range(0, 1500, 15)]
    with torch.no_grad():
        logits = built.model.eval()(torch.stack([x for x, _ in some]))[:, columns]
    hits = logits.argmax(1) == torch.tensor([y for _, y in some])
    assert hits.float().mean() > 0.88


def test_squeezenet_with_a_linear_head(nette: ImageFolder, squeezenet: str) -> None:
    model = Classifier(
        "squeezenet1_1",
        weights=squeezenet,
        head="gap_linear",
        ignore_head=True,
        freeze_backbone=True,
    )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 512 * 10 + 10
    images, _ = next(iter(nette.val_dataloader()))
    plain = build_backbone("squeezenet1_1", weights=squeezenet).model.eval()
    with torch.no_grad():
        features = plain.features(images[:4]).mean((2, 3))  # type: ignore[operator]
        got = model.eval()(images[:4])
        torch.testing.assert_close(got, model.model.get_submodule("classifier.2")(features))


def test_own_head_with_imagenettes_ten_classes(nette: ImageFolder, squeezenet: str) -> None:
    import lightning.pytorch as pl

    run = pl.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with pytest.raises(BadConfig, match="data has 10 classes, the classifier 1000 logits"):
        run.validate(Classifier("squeezenet1_1", None, weights=squeezenet), nette)
