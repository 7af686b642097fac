"""The LightningModule whose features are found and whose weights are edited."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import nn


class StudiedModel(LightningModule):
    """A LightningModule around the plain `nn.Module` under study.

    Attributes:
        model: the network itself. Sites and edits name modules of it, as `model.named_modules()`
            does, and an export holds its state dict and nothing else.
        head_name: name of the final linear layer in `model`, or None where there is none.
        sites: ready choices of a place to read activations, name -> site
            (`MODULE[:input|output][:mean|cls|positions]`), for example `{"pooled": "fc:input"}`.
    """

    model: nn.Module
    head_name: str | None
    sites: dict[str, str]
