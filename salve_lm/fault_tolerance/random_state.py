"""The random state of every rank, in checkpoints: dropout falls where it would have fallen."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

_KEY = "random_states"


class RandomStates(Callback):
    """Stores torch's random states of all ranks, and sets them again where training goes on.

    On another number of ranks, or on another kind of device, they are left as they are.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Tensor] = {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gather the states; collective."""
        device = trainer.strategy.root_device
        states = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        gather = trainer.strategy.all_gather
        checkpoint[_KEY] = {
            kind: gather(state.to(device)).view(-1, len(state)).cpu()
            for kind, state in states.items()
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the states until training begins: what comes before it draws numbers too."""
        self._loaded = checkpoint.get(_KEY, {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set this rank's states."""
        for kind, states in self._loaded.items():
            if len(states) != trainer.world_size:
                continue
            # a copy: torch refuses a view
            mine = states[trainer.global_rank].clone()
            if kind == "cpu":
                torch.set_rng_state(mine)
            elif trainer.strategy.root_device.type == kind:
                torch.cuda.set_rng_state(mine, trainer.strategy.root_device)
        self._loaded = {}
