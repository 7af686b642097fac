"""The command line imports these modules at start: they load nothing heavy."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, lightning.pytorch.cli
before = set(sys.modules)
import vision, vision.classifier, vision.data
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_nothing_heavy_beyond_lightning() -> None:
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    new = set(out.stdout.split())
    # lightning itself brings parts of torchvision (through torchmetrics); no more of it may come
    heavy = {"torchvision", "timm", "sklearn", "sae_lens", "transformers", "pandas", "scipy"}
    assert not new & heavy
    assert {"vision", "salve_lm"} <= new
