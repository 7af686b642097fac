"""What the commands ask of `--model` and `--data`."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from lightning.pytorch import LightningDataModule, LightningModule

from salve_lm.activations.datamodule import ActivationData
from salve_lm.activations.key import hash_backbone
from salve_lm.data.labelled import LabelledData
from salve_lm.edits import EditSpec
from salve_lm.errors import BadConfig
from salve_lm.features import FeatureTable
from salve_lm.modules.studied import StudiedModel

logger = logging.getLogger(__name__)


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


def check_activations(datamodule: LightningDataModule | None, command: str) -> ActivationData:
    """`datamodule` as `ActivationData`, or a `BadConfig` that says what is wanted."""
    if not isinstance(datamodule, ActivationData):
        raise BadConfig(
            f"{command} reads activations, but --data is {type(datamodule).__name__}. "
            "Use salve_lm.activations.ActivationData with your images as its `source`."
        )
    return datamodule


def warn_of_other_backbone(
    studied: StudiedModel, edits: Iterable[EditSpec], features: str | None
) -> None:
    """Say so where a feature table was made from other weights than those to be edited.

    Not an error: an edited model may be edited again with the features of the original.
    """
    paths = {getattr(spec, "features", None) or features for spec in edits} - {None}
    if not paths:
        return
    own = hash_backbone(studied)
    for path in sorted(map(str, paths)):
        made_from = FeatureTable.load(path).provenance.get("backbone")
        if made_from not in (None, own):
            logger.warning(
                "The feature table %s was made from other weights (%s) than these (%s). Unless "
                "these are an edited version of those, run discover again.",
                path, str(made_from)[:12], own[:12],
            )  # fmt: skip
