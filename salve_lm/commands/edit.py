"""`edit`: write the permanently edited model, after comparing the file with the live edit."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.func import functional_call

from salve_lm.activations.hooks import evaluating
from salve_lm.commands.inputs import check_data, check_model, warn_of_other_backbone
from salve_lm.data.labelled import LabelledData
from salve_lm.edits import EditContext, EditSpec
from salve_lm.edits.export import WEIGHTS, export
from salve_lm.errors import BadConfig
from salve_lm.evaluation import batches
from salve_lm.modules.language_evaluation import LanguageEvaluation
from salve_lm.modules.studied import StudiedModel
from salve_lm.task_vectors.tensor_files import TensorFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKED_BATCHES = 8


def edit(
    trainer: Trainer,
    model: LightningModule | None,
    edits: list[EditSpec],
    out: str,
    source: str | None = None,
    sae: str | None = None,
    features: str | None = None,
    datamodule: LightningDataModule | None = None,
    dtype: Literal["base", "float32"] = "base",
    check_live: bool = False,
    file_digests: bool = False,
) -> None:
    """Run `SalveTrainer.edit`; see there."""
    if (model is None) == (source is None):
        raise BadConfig("`edit` takes either a --model or the --source folder of one.")
    folder = source if model is None else folder_of(model)
    if folder is not None:
        if model is not None and model.hparams.get("dtype") == "float32":
            dtype = "float32"  # as the live edit of it
        loaded: Any = None if model is None else model.model
        _stream(str(folder), edits, out, sae, features, dtype, check_live, file_digests, loaded)
        return
    if dtype != "base" or check_live or file_digests:
        raise BadConfig(
            "dtype, check_live and file_digests are for a language model in a Hugging Face folder."
        )
    _export(trainer, model, edits, out, sae, features, datamodule)


def folder_of(model: LightningModule) -> Path | None:
    """The local Hugging Face folder that a language model was loaded from, whole and unchanged.

    Of a public model, its folder in the cache. Loaded in float32 it is unchanged too: every
    bfloat16 and float16 number is one of float32.
    """
    hparams = getattr(model, "hparams", {})
    source = hparams.get("source")
    if source is None or hparams.get("lora"):
        return None
    path = Path(os.path.expanduser(os.path.expandvars(str(source))))
    if not path.exists():
        path = _cached(str(source), hparams.get("revision"))
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        return None
    dtype = hparams.get("dtype")
    if dtype in ("auto", "float32"):
        return path
    with TensorFiles(path) as files:
        stored = {files.info(name).dtype for name in files.names}
    return path if stored == {getattr(torch, str(dtype))} else None


def _cached(name: str, revision: str | None) -> Path:
    """The folder in the cache of a public model that was loaded before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return Path(name)


def _stream(
    folder: str,
    edits: list[EditSpec],
    out: str,
    sae: str | None,
    features: str | None,
    dtype: str,
    check_live: bool,
    file_digests: bool,
    loaded: PreTrainedModel | None,
) -> None:
    from rich.console import Console

    from salve_lm.commands.edit_folder import edit_folder

    written = edit_folder(
        folder,
        edits,
        out,
        context=EditContext(sae=sae, features=features),
        dtype=None if dtype == "base" else dtype,
        check_live=check_live,
        file_digests=file_digests,
        model={"library": "transformers", "source": folder},
        loaded=loaded,
    )
    requested = sum(c.requested for c in written.changes.values())
    applied = sum(c.applied for c in written.changes.values())
    Console().print(
        f"Wrote {written.path}: {len(written.changes)} tensors changed, {applied / requested:.4f} "
        f"of the requested energy applied; read {written.bytes_read / 1e9:.2f} GB, wrote "
        f"{written.bytes_written / 1e9:.2f} GB.",
        highlight=False,
    )
    for name in written.left_out:
        Console().print(f"Left out: {name}", markup=False)
    Console().print(f"Digest of all tensors: {written.result_sha256}")


def _export(
    trainer: Trainer,
    model: LightningModule | None,
    edits: list[EditSpec],
    out: str,
    sae: str | None,
    features: str | None,
    datamodule: LightningDataModule | None,
) -> None:
    """Export a model in memory."""
    from rich.console import Console

    studied = check_model(model)
    data = None
    if datamodule is not None and not isinstance(studied, LanguageEvaluation):
        data = check_data(datamodule)
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
