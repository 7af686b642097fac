"""Fits of groups and of single autoencoders on the activations of a tiny language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from salve_lm.activations.batch import ActivationBatch, SitesBatch
from salve_lm.activations.tokens_data import TokenActivationData
from salve_lm.modules.sae import SAETraining
from salve_lm.modules.sae_group import SAEGroupTraining
from tests.activations.tiny_language import TinyCorpus, TinyLanguage

SHARED: dict[str, Any] = {"d_sae": 24, "lr": 1e-2, "dead_after": 100}


def token_data(**options: Any) -> TokenActivationData:
    """Three sites of a tiny model; 10 batches an epoch, in a buffer of 4."""
    settings: dict[str, Any] = {
        "model": TinyLanguage(), "train": TinyCorpus(40), "val": TinyCorpus(9, seed=1),
        "context": 12, "batch_size": 64, "buffer_rows": 256, "sequences": 5,
    }  # fmt: skip
    return TokenActivationData(**{**settings, **options})


class OneSite(LightningDataModule):
    """One site of token data, for `SAETraining` to train on alone."""

    def __init__(self, data: TokenActivationData, site: str) -> None:
        super().__init__()
        self.inner, self.site = data, site

    def setup(self, stage: str) -> None:
        """Set the data up."""
        self.inner.trainer = self.trainer
        self.inner.setup(stage)

    @property
    def d_in(self) -> int:
        """Its width."""
        return self.inner.d_in_of(self.site)

    def train_dataloader(self) -> Any:
        """The same batches."""
        return self.inner.train_dataloader()

    def val_dataloader(self) -> Any:
        """The same batches."""
        return self.inner.val_dataloader()

    def on_after_batch_transfer(self, batch: SitesBatch, dataloader_idx: int) -> ActivationBatch:
        """The site's part."""
        return batch.at(self.site)


class Alone(SAETraining):
    """`SAETraining` whose measuring of the input scaling sees one site."""

    def _training_activations(self, n_batches: int) -> Any:
        for i, batch in enumerate(self._datamodule().train_dataloader()):
            if i == n_batches:
                return
            yield batch.x[self._datamodule().site]


def trainer(**options: Any) -> pl.Trainer:
    """A quiet one."""
    settings: dict[str, Any] = {
        "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }  # fmt: skip
    return pl.Trainer(**{**settings, **options})


def fit_group(
    data: LightningDataModule, options: dict[str, Any], **settings: Any
) -> tuple[SAEGroupTraining, pl.Trainer]:
    """Train a group."""
    group = SAEGroupTraining(**{**SHARED, **options})
    made = trainer(**settings)
    made.fit(group, datamodule=data)
    return group, made


def state_of(group: SAEGroupTraining, name: str) -> dict[str, Tensor]:
    """State dict of a member."""
    (member,) = [m for m in group.members if m.member.name == name]
    return {k: v for k, v in member.state_dict().items() if torch.is_tensor(v)}


def read_folder(path: Path) -> dict[str, bytes]:
    """Name -> content of the files in a folder and below."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
