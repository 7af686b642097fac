"""What the commands ask of `--model` and `--data`."""

from __future__ import annotations

from lightning.pytorch import LightningDataModule, LightningModule

from salve_lm.data.labelled import LabelledData
from salve_lm.errors import BadConfig
from salve_lm.modules.studied import StudiedModel


def check_model(model: LightningModule | None) -> StudiedModel:
    """`model` as a `StudiedModel`, or a `BadConfig` that says what is wanted."""
    if not isinstance(model, StudiedModel):
        raise BadConfig(
            f"--model is {type(model).__name__}; this command needs a StudiedModel such as "
            "vision.Classifier."
        )
    return model


def check_data(datamodule: LightningDataModule | None) -> LabelledData:
    """`datamodule` as `LabelledData`, or a `BadConfig` that says what is wanted."""
    if not isinstance(datamodule, LabelledData):
        raise BadConfig(
            f"--data is {type(datamodule).__name__}; this command needs a LabelledData such as "
            "vision.data.Digits."
        )
    return datamodule
