from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from salve_lm.activations.batch import ActivationBatch

D_IN, D_SAE = 12, 24

# Small weights that leave some sparsity after a few steps on `activations`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "linear_l1": {"l1_coefficient": 0.1},
    "standard": {"l1_coefficient": 0.2},
    "topk": {"k": 4},
    "batchtopk": {"k": 3.5, "topk_threshold_lr": 0.1},
    "gated": {"l1_coefficient": 0.2},
    "jumprelu": {"l0_coefficient": 0.05, "jumprelu_bandwidth": 2.0},
    "matryoshka_batchtopk": {"k": 4, "topk_threshold_lr": 0.1},
}


def activations(n: int, seed: int = 0, d_in: int = D_IN) -> Tensor:
    """Sparse combinations of 20 directions, away from zero and not of unit scale [n, d_in]."""
    directions = torch.randn(20, d_in, generator=torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(seed)
    return torch.relu(torch.randn(n, 20, generator=draw) - 1) @ directions * 2 + 1.5


class Shares:
    """One rank's contiguous share of each global batch, possibly empty; resumes where it was."""

    def __init__(self, x: Tensor, batch_size: int, rank: int, world: int) -> None:
        self.x, self.batch_size, self.rank, self.world = x, batch_size, rank, world
        self.done = self.first = 0

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __iter__(self) -> Iterator[ActivationBatch]:
        start, self.first = self.first, 0
        for number in range(start, len(self)):
            self.done = number + 1
            rows = self.x[number * self.batch_size :][: self.batch_size]
            n = len(rows)
            mine = rows[n * self.rank // self.world : n * (self.rank + 1) // self.world]
            index = torch.arange(len(mine))
            yield ActivationBatch(mine, torch.full_like(index, -1), index, n)

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["done"] % len(self)


class SyntheticActivations(LightningDataModule):
    def __init__(self, train: Tensor, val: Tensor | None, batch_size: int = 32) -> None:
        super().__init__()
        self.train, self.val, self.batch_size = train, val, batch_size
        self.d_in = train.shape[1]

    def train_dataloader(self) -> Shares:
        return self._shares(self.train)

    def val_dataloader(self) -> Any:
        return [] if self.val is None else self._shares(self.val)

    def test_dataloader(self) -> Any:
        return self.val_dataloader()

    def _shares(self, x: Tensor) -> Shares:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return Shares(x, self.batch_size, rank, world)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # products this small lose more to a second thread's waiting than they gain
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_activations() -> Callable[..., Tensor]:
    return activations


@pytest.fixture
def data() -> SyntheticActivations:
    # 97 = 3 * 32 + 1: with two ranks the last share of one of them is empty
    return SyntheticActivations(activations(97), activations(50, seed=1))


@pytest.fixture
def make_data() -> Callable[..., SyntheticActivations]:
    return SyntheticActivations


@pytest.fixture
def make_trainer(tmp_path: Any) -> Callable[..., Trainer]:
    def make(**kwargs: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return Trainer(**(defaults | kwargs))

    return make


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def options() -> dict[str, dict[str, Any]]:
    return ARCHITECTURES


@pytest.fixture
def trained_looking() -> Callable[..., Any]:
    """An autoencoder in training whose every tensor is random, so that nothing is trivially 0."""
    from salve_lm.sae import build_training_sae

    def make(name: str, **changes: Any) -> Any:
        sae = build_training_sae(name, D_IN, D_SAE, ARCHITECTURES[name] | changes, seed=3)
        draw = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter_name, parameter in sae.named_parameters():
                noise = torch.randn(parameter.shape, generator=draw)
                if parameter_name == "threshold":
                    parameter.copy_(0.3 + 0.1 * noise.abs())
                else:
                    parameter.add_(0.2 * noise)
            if "topk_threshold" in dict(sae.named_buffers()):
                sae.topk_threshold.fill_(0.4)
        return sae

    return make
