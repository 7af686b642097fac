"""Finding a planted cue's features, and editing them, from data modules to the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from salve_lm.activations import ActivationData
from salve_lm.edits import DirectionalAblation, LatentContrastErasure
from salve_lm.errors import BadConfig, NameNotFound
from salve_lm.features import FeatureTable
from salve_lm.trainer import SalveTrainer
from vision import Classifier, ShortcutCheck
from vision.data import CueContrast, Digits, PlantedShortcut


@pytest.fixture(scope="module")
def planted() -> PlantedShortcut:
    data = PlantedShortcut(Digits(image_size=8), "three", size=2, pattern="solid")
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def classifier(planted: PlantedShortcut) -> Classifier:
    """A linear read-out of the pixels that relies on the patch."""
    from sklearn.linear_model import LogisticRegression

    train = planted.eval_dataset("train")
    x = torch.stack([train[i][0] for i in range(len(train))]).flatten(1)  # type: ignore[arg-type]
    y = torch.tensor([train[i][1] for i in range(len(train))])  # type: ignore[arg-type]
    fitted = LogisticRegression(C=1e-3, max_iter=300).fit(x.numpy(), y.numpy())
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with torch.no_grad():
        net[1].weight.copy_(torch.as_tensor(fitted.coef_))
        net[1].bias.copy_(torch.as_tensor(fitted.intercept_))
    return Classifier(net, num_classes=None)


def quick_trainer(folder: Path, *callbacks: ShortcutCheck) -> SalveTrainer:
    return SalveTrainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )


@pytest.fixture(scope="module")
def artefacts(
    planted: PlantedShortcut, classifier: Classifier, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A LinearL1 SAE whose latents are principal components, and the cue's feature table."""
    from salve_lm.sae import build_training_sae, save_sae

    folder = tmp_path_factory.mktemp("cue")
    train = planted.eval_dataset("train")
    x = torch.stack([train[i][0] for i in range(len(train))]).flatten(1)  # type: ignore[arg-type]
    _, _, components = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    sae = build_training_sae("linear_l1", 192, 48, {})
    with torch.no_grad():
        sae.W_dec.copy_(components[:48])
        sae.W_enc.copy_(components[:48].T)
    save_sae(sae, folder / "sae")
    activations = ActivationData(model=classifier, source=CueContrast(planted), site="pooled")
    quick_trainer(folder).discover(activations, str(folder / "sae"), str(folder / "cue"))
    return folder


def test_the_contrast_holds_each_image_twice(planted: PlantedShortcut) -> None:
    cue = CueContrast(planted)
    cue.setup()
    images, masks = cue.eval_dataset("val"), planted.stamped_dataset("val")
    n = len(masks)
    assert len(images) == 2 * n  # type: ignore[arg-type]
    for i in (0, n // 2, n - 1):
        (without, a), (stamped, b) = images[i], images[n + i]
        assert (a, b) == (0, 1)
        changed = (without != stamped).any(0)
        assert changed.any() and not (changed & ~masks.mask(i)).any()
    assert "with cue" in cue.describe("val", n) and "without" in cue.describe("val", 0)
    assert cue.fingerprint("val") != planted.fingerprint("val")


def test_the_cue_is_found_and_removed_where_a_bias_cannot(
    planted: PlantedShortcut, classifier: Classifier, artefacts: Path
) -> None:
    table = FeatureTable.load(artefacts / "cue")
    assert table.class_names == ["without cue", "with cue"]
    check = ShortcutCheck(
        [
            LatentContrastErasure(name="erasure", contrast="with cue", top_k=30),
            DirectionalAblation(name="ablation", feature="selective:with cue"),
        ],
        sae=str(artefacts / "sae"),
        features=str(artefacts / "cue"),
        out=str(artefacts / "out"),
    )
    quick_trainer(artefacts, check).validate(classifier, planted, verbose=False)
    rows = {row["edit"]: row for row in check.rows}
    assert list(rows) == ["unedited", "erasure", "ablation", "class bias lowered"]
    before, erased, lowered = rows["unedited"], rows["erasure"], rows["class bias lowered"]
    assert before["stamped_called"] > 0.2 > 10 * before["clean_called"]
    assert erased["stamped_called_high"] < 0.1
    assert erased["clean_recall"] >= before["clean_recall"] - 0.05
    assert erased["clean_accuracy"] >= before["clean_accuracy"] - 0.02
    # within the same limits on clean recall the bias cannot go far
    assert lowered["stamped_called"] > 2 * erased["stamped_called"]
    written = json.loads((artefacts / "out" / "shortcut.json").read_text())
    assert [row["edit"] for row in written] == list(rows)


def test_grad_fam_finds_the_place_of_a_planted_cue() -> None:
    """A channel that sees only the patch's colour: its latent points at it, another does not."""
    from salve_lm.activations.sites import Site
    from salve_lm.sae import build_training_sae
    from vision.cue_localisation import localise_cue

    data = PlantedShortcut(
        Digits(image_size=32), "three", size=8, pattern="solid", place="random", colour=(3.0,)
    )
    data.setup("fit")
    conv = nn.Conv2d(3, 2, 4, stride=4)  # means of cells of 4 x 4 pixels, at least one all patch
    with torch.no_grad():
        for k, (weight, bias) in enumerate([(1 / 16, -6.0), (-1 / 16, 0.0)]):
            conv.weight[k], conv.bias[k] = weight, bias  # type: ignore[index]
    net = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 10))
    sae = build_training_sae("linear_l1", 2, 2, {})
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.b_enc.zero_()
    stamped = data.stamped_dataset("val")
    latents = {"cue": (0, 1), "other": (1, 1)}
    device = torch.device("cpu")
    rows = localise_cue(net, sae, Site("4", "input"), stamped, latents, 40, device)
    found = {row["map"]: row for row in rows}
    assert list(found) == ["cue", "other", "random map"]
    assert 20 <= found["cue"]["images"] <= 40
    assert found["cue"]["pointing"] == 1.0 and found["cue"]["iou"] > 0.6
    assert found["other"]["pointing"] == 0.0
    share = (8 / 32) ** 2
    assert found["cue"]["patch_share"] == pytest.approx(share)
    # what chance gives: the share of the image, and that of an overlap
    assert found["random map"]["iou"] == pytest.approx(share / (2 - share), abs=0.03)


def test_localisation_comes_with_the_check(planted: PlantedShortcut, tmp_path: Path) -> None:
    from salve_lm.sae import build_training_sae, save_sae

    torch.manual_seed(0)
    net = Classifier(
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)
        ),
        num_classes=None,
    )
    save_sae(build_training_sae("linear_l1", 6, 4, {}), tmp_path / "sae")
    activations = ActivationData(model=net, source=CueContrast(planted), site="pooled")
    quick_trainer(tmp_path).discover(activations, str(tmp_path / "sae"), str(tmp_path / "cue"))
    check = ShortcutCheck(
        [DirectionalAblation(feature="selective:with cue")],
        sae=str(tmp_path / "sae"),
        features=str(tmp_path / "cue"),
        cue="selective:with cue",
        cue_ranks=2,
        cue_images=30,
        out=str(tmp_path / "out"),
    )
    quick_trainer(tmp_path, check).validate(net, planted, verbose=False)
    names = [row["map"] for row in check.localisation]
    middle = "a latent in the middle of the ranking"
    assert names == ["selective:with cue", "selective:with cue/1", middle, "random map"]
    table = FeatureTable.load(tmp_path / "cue")
    assert check.localisation[0]["latent"] == table.selective("with cue")
    assert json.loads((tmp_path / "out/localisation.json").read_text()) == check.localisation
    unknown = ShortcutCheck(
        [DirectionalAblation(feature=0)],
        sae=str(tmp_path / "sae"), features=str(tmp_path / "cue"), cue="selective:with cu",
    )  # fmt: skip
    with pytest.raises(NameNotFound, match="Did you mean 'with cue'"):
        quick_trainer(tmp_path, unknown).validate(net, planted, verbose=False)
    with pytest.raises(BadConfig, match="`sae` and `features`"):
        ShortcutCheck([DirectionalAblation(feature=0)], cue="selective:with cue")
    with pytest.raises(BadConfig, match="at least 1"):
        ShortcutCheck([DirectionalAblation(feature=0)], cue_ranks=0)


def test_it_says_what_it_needs(classifier: Classifier, tmp_path: Path) -> None:
    check = ShortcutCheck([DirectionalAblation(feature=0)])
    with pytest.raises(BadConfig, match="PlantedShortcut"):
        quick_trainer(tmp_path, check).validate(classifier, Digits(image_size=8), verbose=False)
    with pytest.raises(BadConfig, match="at least one"):
        ShortcutCheck([])
