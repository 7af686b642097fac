"""Autoencoders in SAELens' folder format: `cfg.json` and `sae_weights.safetensors`."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEMetadata, TrainingSAE
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from salve_lm.atomic import atomic_folder
from salve_lm.errors import BadConfig, CorruptFile, MissingFile, NameNotFound, NotFinite
from salve_lm.hashing import hash_file
from salve_lm.sae.inference import to_inference

METRICS_FILENAME = "metrics.json"
"""Beside SAELens' two files; its loaders do not look at it."""

_PART = 1 << 23
_log = logging.getLogger(__name__)


def save_sae(
    sae: SAE[Any],
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Path:
    """Write `sae` as a folder that SAELens reads; whole or not at all.

    Args:
        sae: for inference, or in training (then its inference form is written).
        path: the folder to create.
        metadata: plain values added to the config's metadata.
        metrics: plain values for `metrics.json`.
        replace: put the new folder in the place of an existing one.

    Raises:
        OutputExists: `path` is there already, and not `replace`.
        OutputUnwritable: no permission, no space.
        NotFinite: NaN or infinity in a weight.
    """
    path = Path(path)
    if isinstance(sae, TrainingSAE):
        sae = to_inference(sae)
    state = {name: value.detach().cpu().contiguous() for name, value in sae.state_dict().items()}
    sae.process_state_dict_for_saving(state)
    _check_finite(state, f"the autoencoder to be saved at {path}", "Nothing was written.")
    config = sae.cfg.to_dict()
    # without a version SAELens takes the file for an old one, and drops the metadata
    config["metadata"] = SAEMetadata(**{**config["metadata"], **(metadata or {})}).to_dict()
    config["device"] = "cpu"
    target = path.with_name(f".{path.name}.new-{os.getpid()}") if replace else path
    with atomic_folder(target) as folder:
        save_file(state, folder / SAE_WEIGHTS_FILENAME)
        (folder / SAE_CFG_FILENAME).write_text(_to_json(config))
        if metrics is not None:
            (folder / METRICS_FILENAME).write_text(_to_json(dict(metrics)))
    if replace:
        _swap(target, path)
    return path


def load_sae(path: str | Path, *, device: str = "cpu", dtype: str | None = None) -> SAE[Any]:
    """Read an autoencoder for inference from a folder in SAELens' format.

    A folder that holds a training autoencoder (SAELens' checkpoints of batch-top-k) is converted.

    Raises:
        MissingFile: no folder, or no weights in it.
        CorruptFile: truncated, foreign, or weights that do not fit the config.
        NameNotFound: an architecture that SAELens does not know.
        NotFinite: NaN or infinity in a weight.
    """
    path = Path(path)
    cfg, weights = _config(path), _weights(path)
    _check_weights(weights)
    architecture = cfg["architecture"]
    if architecture in SAE_CLASS_REGISTRY:
        loader: type[SAE[Any]] = SAE
    elif architecture in SAE_TRAINING_CLASS_REGISTRY:
        loader = TrainingSAE
    else:
        known = sorted({*SAE_CLASS_REGISTRY, *SAE_TRAINING_CLASS_REGISTRY})
        raise NameNotFound(
            "SAE architecture", str(architecture), known, f"It is named in {path}/cfg.json."
        )
    try:
        sae = loader.load_from_disk(path, device=device, dtype=dtype)
    except BadConfig:
        raise
    except (RuntimeError, KeyError, TypeError, ValueError) as e:
        reason = f"its weights do not fit its cfg.json ({' '.join(str(e).split())})"
        raise CorruptFile(path, reason, "Save it again from its training run.") from e
    if isinstance(sae, TrainingSAE):
        sae = to_inference(sae)
    if sae.cfg.normalize_activations == "expected_average_only_in":
        _log.warning(
            "%s asks for inputs scaled to an expected norm, which SAELens does not do after "
            "loading: give it scaled activations, or fold the factor into its weights.",
            path,
        )
    _check_finite(dict(sae.state_dict()), str(path), "Train it again with a lower learning rate.")
    return sae.eval()


def hash_sae(path: str | Path) -> str:
    """SHA-256 (hex) of the folder's weight file; raises MissingFile where there is none."""
    return hash_file(_weights(Path(path)))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata in the folder's config; empty where it has none."""
    metadata = _config(Path(path)).get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _config(path: Path) -> dict[str, Any]:
    cure = "Give the folder that an SAE training run wrote (its argument `out`)."
    if not path.exists():
        raise MissingFile(f"No autoencoder at {path}. {cure}")
    if not path.is_dir():
        raise CorruptFile(path, "an autoencoder is a folder with cfg.json, not a file", cure)
    file = path / SAE_CFG_FILENAME
    if not file.is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise CorruptFile(path, f"not a SAELens folder: no cfg.json (found {found})", cure)
    try:
        cfg = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CorruptFile(file, f"truncated or not JSON ({e})", "Copy the folder again.") from e
    if not isinstance(cfg, dict) or "d_in" not in cfg or "d_sae" not in cfg:
        raise CorruptFile(file, "not the config of a SAELens autoencoder (no d_in, d_sae)", cure)
    metadata = cfg.get("metadata")
    versioned = isinstance(metadata, dict) and metadata.get("sae_lens_version")
    if versioned or cfg.get("sae_lens_version"):
        if "architecture" not in cfg:
            raise CorruptFile(file, "no architecture in it", cure)
        return cfg
    known = cfg.get("architecture", "standard") in SAE_CLASS_REGISTRY
    return handle_config_defaulting(cfg) if known else cfg


def _weights(path: Path) -> Path:
    file = path / SAE_WEIGHTS_FILENAME
    if not file.is_file():
        raise MissingFile(
            f"No {SAE_WEIGHTS_FILENAME} in {path}. Give the folder that an SAE training run wrote."
        )
    return file


def _check_weights(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as f:
            f.keys()
    except (SafetensorError, OSError) as e:
        cure = "Copy the folder again, or train again."
        raise CorruptFile(file, f"truncated or not a safetensors file ({e})", cure) from e


def _check_finite(state: Mapping[str, torch.Tensor], where: str, cure: str) -> None:
    for name, value in state.items():
        # in parts: PyTorch takes a copy to look at
        if not all(bool(torch.isfinite(part).all()) for part in value.reshape(-1).split(_PART)):
            raise NotFinite(name, where, cure)


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _swap(new: Path, path: Path) -> None:
    # folders cannot be exchanged in one portable call; a crash between the renames leaves both
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old, ignore_errors=True)
