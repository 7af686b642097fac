"""`select_layers` under two forked processes; started in a fresh interpreter by its test.

Forking is safe only before OpenMP has started its threads, which a pytest process has long done.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from salve_lm.specificity import (
    Attribution,
    LatentShift,
    LayerChoice,
    MassShare,
    SingleLatentAUROC,
    TopMean,
)
from tests.specificity.tiny_run import run

if __name__ == "__main__":
    torch.set_num_threads(1)
    made, out = Path(sys.argv[1]), Path(sys.argv[2])
    run(
        made,
        out,
        trainer={"strategy": "ddp_fork", "devices": 2},
        scores=[MassShare(), TopMean(n=3), SingleLatentAUROC(), LatentShift(), Attribution()],
        select=LayerChoice("top_n", n=2),
        finetuned=str(made / "finetuned"),
    )
