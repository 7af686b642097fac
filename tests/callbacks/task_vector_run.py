"""A language model under `WeightEditing`; as a program, under two forked processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from salve_lm.callbacks import WeightEditing
from salve_lm.edits import TaskVectorInjection
from salve_lm.modules.studied import StudiedModel
from tests.callbacks.tiny import trainer


class Model(StudiedModel):
    """Keeps a copy of every parameter at each validation batch."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.head_name = "lm_head"
        self.sites = {}
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        named = self.model.named_parameters(remove_duplicate=False)
        self.seen.append({n: p.detach().clone() for n, p in named})
        self.model(input_ids=batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Tokens(LightningDataModule):
    """Eight sequences in two batches."""

    def _loader(self) -> DataLoader[Any]:
        tokens = torch.randint(3, 200, (8, 6), generator=torch.Generator().manual_seed(0))
        return DataLoader(list(tokens), batch_size=4)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader()


def data() -> Tokens:
    return Tokens()


class Disagreeing(WeightEditing):
    """The second rank reads another fine-tuned model."""

    def _apply(self, running: Trainer, pl_module: LightningModule) -> None:
        if running.global_rank == 1:
            self.context._sources.clear()
            old = self.edits[0]
            if isinstance(old, TaskVectorInjection):
                self.edits = [TaskVectorInjection(finetuned=old.finetuned, layers=[1], alpha=2.0)]
        super()._apply(running, pl_module)


if __name__ == "__main__":
    from salve_lm.language import load_causal_lm

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, kind in (("alike", WeightEditing), ("disagree", Disagreeing)):
        failure = None
        studied = Model(load_causal_lm(folder / "base"))
        edit = TaskVectorInjection(finetuned=str(folder / "tuned"), layers=[1])
        try:
            running = trainer(kind([edit]), strategy="ddp_fork", devices=2)
            running.validate(studied, data(), verbose=False)
        except Exception as e:
            failure = f"{type(e).__name__}: {e}"
        print(json.dumps({"scenario": name, "failure": failure}), flush=True)
