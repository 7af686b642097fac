"""The report of a language run in a real browser, on screens and on paper."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.report.test_rendered import CHROMIUM, browse

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")


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


@pytest.mark.parametrize("width", [400, 794, 1280])
def test_nothing_sticks_out(width: int, page: Path, tmp_path: Path) -> None:
    # in a frame: Chromium's own window cannot be as narrow as a telephone
    measure = (
        "<script>onload = () => parent.postMessage([innerWidth, "
        "document.documentElement.scrollWidth].join(), '*')</script></body>"
    )
    inner = tmp_path / "inner.html"
    inner.write_text(page.read_text(encoding="utf-8").replace("</body>", measure), "utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<body><script>onmessage = e => document.title = 'measured ' + e.data</script>"
        f'<iframe src="inner.html" style="width:{width}px;height:900px;border:0"></iframe></body>'
    )
    dom = browse(outer, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=5000")
    found = re.search(r"measured (\d+),(\d+)", dom)
    assert found, dom[:500]
    assert int(found[1]) == width
    assert int(found[2]) <= width


def test_it_prints_on_paper(page: Path, tmp_path: Path) -> None:
    paper = tmp_path / "page.pdf"
    browse(page, tmp_path / "profile", f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    pdf = paper.read_bytes()
    assert pdf.startswith(b"%PDF")
    sizes = re.findall(rb"/MediaBox \[\s*0 0 ([\d.]+) ([\d.]+)", pdf)
    assert sizes
    assert all(abs(float(w) - 595) < 2 and abs(float(h) - 842) < 2 for w, h in sizes)
