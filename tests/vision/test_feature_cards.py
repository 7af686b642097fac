"""Pieces of the feature cards; the whole callback runs in tests/test_pipeline.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from salve_lm.activations import ActivationData
from salve_lm.errors import BadConfig
from salve_lm.report.cards import cards_section, read_cards
from salve_lm.trainer import SalveTrainer
from vision import Classifier, FeatureCards
from vision.data import Digits
from vision.feature_cards import overlay, save_png


def test_overlay_colours_only_where_there_is_heat() -> None:
    image = torch.rand(3, 6, 6)
    heat = torch.zeros(6, 6)
    heat[2, 3] = 5.0
    shown = overlay(image, heat)
    grey = image.mean(0)
    cold = heat == 0
    assert torch.allclose(shown[:, cold], grey[cold].expand(3, -1))
    assert shown[0, 2, 3] - shown[2, 2, 3] > 0.3  # yellow
    assert float(shown.min()) >= 0 and float(shown.max()) <= 1


def test_no_heat_is_the_grey_image() -> None:
    image = torch.rand(3, 4, 4)
    assert torch.allclose(overlay(image, torch.zeros(4, 4)), image.mean(0).expand(3, -1, -1))


def test_png_holds_the_pixels(tmp_path: Path) -> None:
    image = torch.tensor([0.0, 0.5, 1.0])[:, None, None].expand(3, 2, 2)
    save_png(tmp_path / "x.png", image)
    assert Image.open(tmp_path / "x.png").getpixel((0, 0)) == (0, 128, 255)


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Classifier, Digits]:
    """A network with an SAE of three latents, of which number 1 never fires, and its table."""
    from salve_lm.sae import build_training_sae, save_sae

    folder = tmp_path_factory.mktemp("silent")
    torch.manual_seed(0)
    trunk = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = Classifier(nn.Sequential(*trunk, nn.Linear(6, 10)), num_classes=None)
    sae = build_training_sae("standard", 6, 3, {})
    with torch.no_grad():
        sae.W_enc.abs_()
        sae.W_enc[:, 1] = 0.0
        sae.b_dec.zero_()
        sae.b_enc.copy_(torch.tensor([0.0, -1.0, 0.0]))
    save_sae(sae, folder / "sae")
    data = Digits(image_size=12)
    activations = ActivationData(model=model, source=data, site="pooled")
    quick(folder).discover(activations, str(folder / "sae"), str(folder / "features"))
    return folder, model, data


def quick(folder: Path, *callbacks: FeatureCards) -> SalveTrainer:
    return SalveTrainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=folder, callbacks=list(callbacks),
    )  # fmt: skip


def cards_of(folder: Path, **options: Any) -> FeatureCards:
    paths = {"sae": str(folder / "sae"), "features": str(folder / "features")}
    return FeatureCards(**paths, **{"top": 2, "maximise_steps": 2, "per_class": 3} | options)


def test_a_latent_that_never_fires_has_a_card_that_says_so(
    silent: tuple[Path, Classifier, Digits],
) -> None:
    folder, model, data = silent
    cards = cards_of(folder, out=str(folder / "run/cards"))
    quick(folder, cards).validate(model, data, verbose=False)
    drawn = json.loads((folder / "run/cards/cards.json").read_text())["latents"]
    assert len(drawn) == 30
    for card in drawn:
        # a latent of this kind is never negative, so nothing drives it down either
        assert bool(card["top"]) == (card["latent"] != 1 and card["sign"] > 0)
        for top in card["top"]:
            crop = Image.open(folder / "run/cards" / top["crop"])
            assert min(crop.size) >= 3 and max(crop.size) <= 12  # one 3 x 3 kernel, or more
    html = cards_section(read_cards(folder / "run"), [], 10**6)
    empty = sum(not card["top"] for card in drawn)
    assert html.count("No sample drives it this way") == empty >= 10


def test_no_heatmap_without_positions(silent: tuple[Path, Classifier, Digits]) -> None:
    folder, model, data = silent
    cards = cards_of(folder, out=str(folder / "none"), layer="2")
    with pytest.raises(BadConfig, match=r"no spatial positions.*Choose an earlier layer"):
        quick(folder, cards).validate(model, data, verbose=False)
    assert not (folder / "none").exists()


def test_options_out_of_range() -> None:
    with pytest.raises(BadConfig, match="at least 1"):
        FeatureCards("sae", "features", "out", top=0)
