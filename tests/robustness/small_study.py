"""A classifier of clusters, its activations, and a sweep over the seeds of a small autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from salve_lm.activations.datamodule import ActivationData
from salve_lm.data.labelled import LabelledData, Split
from salve_lm.edits import DecoderGuided, EditSpec
from salve_lm.hashing import hash_tensors
from salve_lm.modules.sae_group import SAEGroupTraining
from salve_lm.trainer import SalveTrainer
from tests.callbacks.tiny import Studied
from tests.edits.tiny import NAMES, activations, fitted_head

SEEDS = [0, 1, 2]
ALPHAS = [0.5, 1.0, 2.0, 4.0, 8.0]


class Vectors(LabelledData):
    """Clusters of classes as they are: the network of `Studied` lets them through to its head."""

    def __init__(self) -> None:
        super().__init__()
        self.class_names, self.batch_size, self.num_workers = list(NAMES), 50, 0

    def samples(self, split: Split) -> tuple[Tensor, Tensor]:
        # one draw of clusters, of which every second sample of each class is held out
        x, label = activations(200)
        held_out = torch.arange(200) // len(NAMES) % 2 == 1
        mine = ~held_out if split == "train" else held_out
        return x[mine], label[mine]

    def eval_dataset(self, split: Split) -> Dataset[Any]:
        return TensorDataset(*self.samples(split))

    def fingerprint(self, split: Split) -> str:
        x, label = self.samples(split)
        return hash_tensors({"x": x, "label": label})


def data() -> ActivationData:
    """What the classifier's head reads, made on the fly."""
    source = Vectors()
    studied = Studied(fitted_head(*source.samples("train")))
    return ActivationData(model=studied, source=source, site="pooled", batch_size=50)


def sweep(out: Path, **options: Any) -> SAEGroupTraining:
    """A sweep over seeds."""
    settings: dict[str, Any] = {
        "architecture": "linear_l1", "d_sae": 12, "lr": 1e-2, "sweep": {"seed": SEEDS},
        "options": {"l1_coefficient": 0.1}, "out": str(out),
    }  # fmt: skip
    return SAEGroupTraining(**{**settings, **options})


def trainer(**options: Any) -> SalveTrainer:
    """A quiet one."""
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 30, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0,
        "enable_model_summary": False, "limit_val_batches": 0,
    }  # fmt: skip
    return SalveTrainer(**{**settings, **options})


def suppress(**options: Any) -> list[EditSpec]:
    """The paper's edit of each class's dominant feature."""
    return [DecoderGuided(name="suppress", feature="dominant", rows="class", **options)]
