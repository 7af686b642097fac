"""The report in a real browser: it shows something, and nothing sticks out on any screen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from salve_lm.report.summary import report
from tests.report.browser import NEEDS_CHROMIUM, WIDTHS, browse, check_paper, check_width
from tests.report.made_run import make_cards, make_run

pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("rendered") / "run")
    make_cards(run, 5)
    report(run)
    return run / "report.html"


def test_screenshot_is_not_blank(page: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    browse(page, tmp_path / "profile", f"--screenshot={shot}", "--window-size=1280,3000")
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape == (3000, 1280, 3)
    # ink in every 500 rows, and the two colours of the bars
    for top in range(0, 3000, 500):
        assert (pixels[top : top + 500] < 128).all(2).sum() > 200
    for colour in ((213, 94, 0), (0, 114, 178)):
        assert (pixels == colour).all(2).sum() > 200


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out(width: int, page: Path, tmp_path: Path) -> None:
    check_width(width, page, tmp_path)


def test_it_prints_on_paper(page: Path, tmp_path: Path) -> None:
    check_paper(page, tmp_path)
