"""A page in a real browser: what every report must hold on any screen and on paper."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
NEEDS_CHROMIUM = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
WIDTHS = [400, 794, 1280]


def browse(page: Path, profile: Path, *options: str) -> str:
    """What Chromium prints for `page`."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--disable-background-networking", f"--user-data-dir={profile}", *options,
         page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def check_width(width: int, page: Path, folder: Path) -> None:
    """Nothing sticks out to the right of a window of `width` pixels."""
    # in a frame: Chromium's own window cannot be as narrow as a telephone
    measure = (
        "<script>onload = () => parent.postMessage([innerWidth, "
        "document.documentElement.scrollWidth].join(), '*')</script></body>"
    )
    inner = folder / "inner.html"
    inner.write_text(page.read_text(encoding="utf-8").replace("</body>", measure), "utf-8")
    outer = folder / "outer.html"
    outer.write_text(
        "<body><script>onmessage = e => document.title = 'measured ' + e.data</script>"
        f'<iframe src="inner.html" style="width:{width}px;height:900px;border:0"></iframe></body>'
    )
    dom = browse(outer, folder / "profile", "--dump-dom", "--virtual-time-budget=5000")
    found = re.search(r"measured (\d+),(\d+)", dom)
    assert found, dom[:500]
    assert int(found[1]) == width
    assert int(found[2]) <= width


def check_paper(page: Path, folder: Path) -> None:
    """It prints on A4, every sheet."""
    paper = folder / "page.pdf"
    browse(page, folder / "profile", f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    pdf = paper.read_bytes()
    assert pdf.startswith(b"%PDF")
    # in points
    sizes = re.findall(rb"/MediaBox \[\s*0 0 ([\d.]+) ([\d.]+)", pdf)
    assert sizes
    assert all(abs(float(w) - 595) < 2 and abs(float(h) - 842) < 2 for w, h in sizes)
