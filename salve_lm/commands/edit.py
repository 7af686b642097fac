"""`edit`: write the permanently edited model, after comparing the file with the live edit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.func import functional_call

from salve_lm.activations.hooks import evaluating
from salve_lm.commands.inputs import check_data, check_model, warn_of_other_backbone
from salve_lm.data.labelled import LabelledData
from salve_lm.edits import EditContext, EditSpec
from salve_lm.edits.export import WEIGHTS, export
from salve_lm.evaluation import batches
from salve_lm.modules.studied import StudiedModel

CHECKED_BATCHES = 8


def edit(
    trainer: Trainer,
    model: LightningModule,
    edits: list[EditSpec],
    out: str,
    sae: str | None = None,
    features: str | None = None,
    datamodule: LightningDataModule | None = None,
) -> None:
    """Run `SalveTrainer.edit`; see there."""
    from rich.console import Console

    studied = check_model(model)
    data = None if datamodule is None else check_data(datamodule)
    if data is not None:
        data.prepare_data()
        data.setup("fit")
    warn_of_other_backbone(studied, edits, features)
    studied.to(trainer.strategy.root_device)
    exported = export(
        studied,
        edits,
        out,
        context=EditContext(sae=sae, features=features),
        class_names=data.class_names if data else None,
        info=getattr(studied, "describe", dict)(),
        check=lambda weights, live: compare_with_live(studied, weights, live, data),
    )
    Console().print(f"Wrote {exported.path}: {', '.join(exported.changes)} changed.")
    Console().print(f"sha256 of {WEIGHTS}: {exported.sha256}")


def compare_with_live(
    studied: StudiedModel,
    weights: Path,
    live: Mapping[str, Tensor],
    data: LabelledData | None,
) -> dict[str, Any]:
    """Whether the written file gives, bit for bit, what the edited weights in memory give.

    Args:
        studied: The unedited model.
        weights: The file written.
        live: The edited state dict in memory.
        data: Its validation split is run through both (the first batches); tensors are compared in
            any case.

    Returns:
        `matches_live`, and `checked_on` in words.
    """
    from safetensors.torch import load_file

    model = studied.model
    device = next(iter(model.parameters())).device
    written = load_file(weights, device=str(device))
    same = written.keys() == live.keys() and all(
        torch.equal(written[n], t.detach()) for n, t in live.items()
    )
    n = 0
    if data is not None:
        exported = copy.deepcopy(model)
        exported.load_state_dict(written)
        with torch.no_grad(), evaluating(model), evaluating(exported):
            for x, _ in islice(batches(data, "val"), CHECKED_BATCHES):
                x = x.to(device)
                same &= torch.equal(functional_call(model, dict(live), (x,)), exported(x))
                n += len(x)
    checked = f"all tensors and the outputs for {n} held-out samples" if n else "all tensors"
    return {"matches_live": bool(same), "checked_on": checked}
