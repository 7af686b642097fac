"""Pieces of the feature cards; the whole callback runs in tests/test_pipeline.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from salve_lm.errors import BadConfig
from vision import FeatureCards
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


def test_options_out_of_range() -> None:
    with pytest.raises(BadConfig, match="at least 1"):
        FeatureCards("sae", "features", "out", top=0)
