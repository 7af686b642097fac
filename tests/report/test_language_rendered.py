"""The report of a language run in a real browser, on screens and on paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.report.browser import NEEDS_CHROMIUM, WIDTHS, browse, check_paper, check_width

pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def page(language_run: Path) -> Path:
    return language_run / "report.html"


def test_screenshot_is_not_blank(page: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    browse(page, tmp_path / "profile", f"--screenshot={shot}", "--window-size=1280,4400")
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    # ink in every 600 rows, points of chosen and other layers, and the mark of a token
    for top in range(0, 3000, 600):
        assert (pixels[top : top + 600] < 128).all(2).sum() > 200
    for colour in ((213, 94, 0), (0, 114, 178), (255, 217, 184)):
        assert (pixels == colour).all(2).sum() > 40, colour


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out(width: int, page: Path, tmp_path: Path) -> None:
    check_width(width, page, tmp_path)


def test_it_prints_on_paper(page: Path, tmp_path: Path) -> None:
    check_paper(page, tmp_path)
