"""Runs under two forked processes; started by test_two_processes in a fresh interpreter.

Forking is safe only before OpenMP has started its threads, which a pytest process has long done.
Prints one line of JSON a scenario: the error it ended with, or null.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from salve_lm.callbacks import CompareEdits, CriticalThreshold, WeightEditing
from salve_lm.edits import DecoderGuided, DirectionalAblation, EditSpec
from tests.callbacks.tiny import Data, Studied, trainer
from tests.edits.tiny import Fixture, build


class Disagreeing(WeightEditing):
    """The second rank has another strength."""

    def _apply(self, running: Trainer, pl_module: LightningModule) -> None:
        if running.global_rank == 1:
            self.edits = [dataclasses.replace(e, alpha=e.alpha + 1) for e in self.edits]
        super()._apply(running, pl_module)


class Failing(WeightEditing):
    """The second rank cannot find what it needs."""

    def _apply(self, running: Trainer, pl_module: LightningModule) -> None:
        if running.global_rank == 1:
            self.edits = [dataclasses.replace(e, module="nowhere") for e in self.edits]
        super()._apply(running, pl_module)


class Unpadded(Data):
    """Shares of unequal size, without Lightning's sampler."""

    def val_dataloader(self) -> Any:
        rank, world = self.trainer.global_rank, self.trainer.world_size  # type: ignore[union-attr]
        mine = torch.utils.data.Subset(self.dataset, range(rank, len(self.dataset), world))
        return DataLoader(mine, batch_size=self.size)


def run(scenario: str, tiny: Fixture, folder: Path) -> None:
    # 119 samples: two processes get 60 each, one of them twice
    x, label = tiny.x[:119], tiny.label[:119]
    edits: list[EditSpec] = [
        DecoderGuided(feature="dominant:tower", alpha=3.0, **tiny.paths),
        DirectionalAblation(module="hidden", feature=2, sae=tiny.sae),
    ]
    kind = {"disagree": Disagreeing, "fail": Failing}.get(scenario, WeightEditing)
    callbacks: list[Callback] = [kind(edits)]
    if scenario in ("one", "two", "unpadded"):
        callbacks += [
            CriticalThreshold(out=str(folder), **tiny.paths),
            CompareEdits(out=str(folder)),
        ]
    studied = Studied(tiny.studied.model.fc)
    data = (Unpadded if scenario == "unpadded" else Data)(x, label, 16)
    many: dict[str, Any] = {} if scenario == "one" else {"strategy": "ddp_fork", "devices": 2}
    options = {**many, "use_distributed_sampler": scenario != "unpadded"}
    before = studied.model.fc.weight.detach().clone()
    if scenario != "fit":
        trainer(*callbacks, **options).validate(studied, data, verbose=False)
        return
    options |= {"enable_checkpointing": True, "default_root_dir": folder}
    running = trainer(*callbacks, **options)
    running.fit(studied, data)
    best = running.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    saved = torch.load(best, weights_only=True)["state_dict"]["model.fc.weight"]
    if torch.equal(saved, before) or not torch.equal(saved, studied.model.fc.weight):
        raise RuntimeError("the checkpoint does not hold the trained weights")


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    artefacts = build(root / "artefacts")
    for name in sys.argv[2:]:
        failure = None
        try:
            run(name, artefacts, root / name)
        except Exception as e:
            failure = f"{type(e).__name__}: {e}"
        print(json.dumps({"scenario": name, "failure": failure}), flush=True)
