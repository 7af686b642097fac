"""Configs name these modules, so that the command line imports them: they load nothing heavy."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, lightning.pytorch.cli
before = set(sys.modules)
import salve_lm.modules.language_model, salve_lm.data.language_data, salve_lm.data.text
import salve_lm.tasks.text_loss
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_nothing_heavy_beyond_lightning() -> None:
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    new = set(out.stdout.split())
    heavy = {
        "transformers",
        "peft",
        "datasets",
        "pandas",
        "pyarrow",
        "scipy",
        "sae_lens",
        "lm_eval",
    }
    assert not new & heavy
    assert "salve_lm" in new
