"""A studied model and data module around the generated artefacts of `tests.edits.tiny`."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from salve_lm.modules.studied import StudiedModel
from tests.edits.tiny import D_IN, NAMES, Fixture, K


class PassNet(nn.Module):
    """A hidden layer that lets non-negative inputs through, and the head `fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(D_IN, D_IN)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(D_IN, K)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.eye(D_IN))
            self.hidden.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.hidden(x)))


class Studied(StudiedModel):
    """Notes the head's weight at every hook, and every validation logit."""

    def __init__(self, head: nn.Linear, net: nn.Module | None = None) -> None:
        super().__init__()
        self.model = PassNet() if net is None else net
        self.model.fc.load_state_dict(head.state_dict())
        self.head_name = "fc"
        self.sites = {"pooled": "fc:input"}
        self.seen: list[tuple[str, Tensor]] = []
        self.logits: list[Tensor] = []

    def note(self, where: str) -> None:
        self.seen.append((where, self.model.fc.weight.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.note("training_step")
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note("validation_step")
        self.logits.append(self(batch[0]).detach().clone())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.note("test_step")
        self(batch[0])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.note("predict_step")
        return self(batch[0])

    def on_validation_start(self) -> None:
        self.note("on_validation_start")

    def on_validation_epoch_end(self) -> None:
        self.note("on_validation_epoch_end")

    def on_validation_end(self) -> None:
        self.note("on_validation_end")

    def on_train_epoch_end(self) -> None:
        self.note("on_train_epoch_end")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Data(LightningDataModule):
    """The fixture's samples, in order."""

    def __init__(self, x: Tensor, label: Tensor, batch_size: int = 32) -> None:
        super().__init__()
        self.dataset = TensorDataset(x, label)
        self.size = batch_size
        self.class_names = list(NAMES)

    def _loader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=self.size)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader()

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader()

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader()


def parts(tiny: Fixture) -> tuple[Studied, Data]:
    return Studied(tiny.studied.model.fc), Data(tiny.x, tiny.label)


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
        "callbacks": list(callbacks),
    }
    return Trainer(**{**defaults, **options})
