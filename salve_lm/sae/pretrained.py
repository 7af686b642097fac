"""Autoencoders by name: SAELens' public releases, or a folder on disk.

A source is written `RELEASE:ID`, such as `gemma-scope-2-4b-it-res:layer_9_width_16k_l0_medium`, or
is the path of a folder in SAELens' format. `{layer}` in it stands for the number of a layer, so one
text names the autoencoders of all layers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import httpx
from sae_lens.loading.pretrained_saes_directory import (
    PretrainedSAELookup,
    get_pretrained_saes_directory,
)
from sae_lens.saes.sae import SAE

from salve_lm.errors import BadConfig, MissingFile, NameNotFound, ShapeMismatch
from salve_lm.sae.folder import load_sae, save_sae

_LAYER = re.compile(r"(?:^|\.)(?:blocks|layers|h|resid_post)\.(\d+)(?:\.|:|$)")
_KIND = re.compile(r"\.hook_(\w+)$")

_log = logging.getLogger(__name__)


def at_layer(source: str, layer: int) -> str:
    """`source` with the number of a layer in the place of `{layer}`."""
    return source.replace("{layer}", str(layer))


def is_release(source: str) -> bool:
    """Whether `source` names a public release, and not a folder."""
    release, colon, _ = source.partition(":")
    looks_like_path = source.startswith((".", "/", "~")) or len(release) == 1
    return bool(colon) and not looks_like_path and not Path(source).exists()


def open_sae(source: str, *, device: str = "cpu", dtype: str | None = None) -> SAE[Any]:
    """The autoencoder that `source` names, for inference on raw activations.

    Args:
        source: `RELEASE:ID` of SAELens, or the path of a folder in SAELens' format.
        device: where to put it.
        dtype: of its weights; float32 for a release, the folder's own, where None.

    Raises:
        NameNotFound: no such release, or no such id in it; lists the nearest.
        MissingFile: no such folder; or a release that cannot be downloaded.
        CorruptFile, NotFinite: see `load_sae`.
    """
    if not is_release(source):
        path = Path(source).expanduser()
        if not path.exists():
            raise MissingFile(
                f"No autoencoder at {source}. Give the folder that an SAE training run wrote, or "
                "RELEASE:ID of SAELens, such as "
                "gemma-scope-2-4b-it-res:layer_9_width_16k_l0_medium."
            )
        return load_sae(path, device=device, dtype=dtype)
    release, _, sae_id = source.partition(":")
    lookup = check_release(release, sae_id)
    try:
        sae: SAE[Any] = SAE.from_pretrained(
            release, sae_id, device=device, dtype=dtype or "float32"
        )
    except (OSError, ValueError, RuntimeError, KeyError, httpx.HTTPError) as e:
        raise MissingFile(
            f"Cannot get {source} from https://huggingface.co/{lookup.repo_id}: "
            f"{' '.join(str(e).split()) or type(e).__name__}. It needs a network, and for some "
            "models an account that accepted the licence (`hf auth login`). Where there is none, "
            "write it to a folder on another machine with salve_lm.sae.pretrained.copy_to_folder, "
            "and give that folder."
        ) from e
    return sae.eval()


def copy_to_folder(source: str, out: str | Path) -> Path:
    """Write the autoencoder that `source` names to a folder, for machines without a network.

    Raises:
        OutputExists, OutputUnwritable: `out` is there already; cannot be written.
        NameNotFound, MissingFile: see `open_sae`.
    """
    return save_sae(open_sae(source), out, metadata={"source": source})


def check_release(release: str, sae_id: str) -> PretrainedSAELookup:
    """What SAELens knows of a release, after checking that it has `sae_id`; needs no network.

    Raises:
        NameNotFound: no such release or id; lists the nearest, and releases that have the id.
    """
    directory = get_pretrained_saes_directory()
    if release not in directory:
        raise NameNotFound("SAELens release", release, list(directory))
    lookup = directory[release]
    if sae_id not in lookup.saes_map:
        same = [
            name
            for name, other in directory.items()
            if other.model == lookup.model and sae_id in other.saes_map
        ]
        # ids repeat themselves: of the model's other releases, the one of the most similar name
        same.sort(key=lambda name: SequenceMatcher(None, name, release).ratio(), reverse=True)
        cure = f"Release {same[0]!r} has it." if same else ""
        raise NameNotFound(f"SAE in release {release!r}", sae_id, list(lookup.saes_map), cure)
    return lookup


def check_belongs(
    sae: SAE[Any],
    source: str,
    *,
    d_in: int | None = None,
    layer: int | None = None,
    model_name: str | None = None,
    hook: str = "resid_post",
) -> None:
    """Compare an autoencoder with the place it shall be used at, as far as its metadata say.

    Args:
        sae: the autoencoder.
        source: its name in errors.
        d_in: width of the activations there.
        layer: the layer whose residual stream is read.
        model_name: public name of the model, or the path of its folder. A folder may hold a
            fine-tuned copy, so a name that differs from it is only warned of.
        hook: what is read of the layer, in SAELens' words.

    Raises:
        ShapeMismatch: it was made for activations of another width.
        BadConfig: it was made for another layer, another place in it, or another public model.
    """
    metadata = sae.cfg.metadata
    hook_name = str(metadata.get("hook_name") or "")
    if d_in is not None and sae.cfg.d_in != d_in:
        raise ShapeMismatch(
            f"The SAE {source} takes activations of width {sae.cfg.d_in}"
            f"{f' ({hook_name})' if hook_name else ''}, but they are {d_in} wide here. Choose an "
            "SAE that was trained on this model."
        )
    theirs = _layer_of(metadata.get("site"), hook_name)
    if layer is not None and theirs is not None and theirs != layer:
        raise BadConfig(
            f"The SAE {source} was trained on layer {theirs} ({hook_name}), not on layer {layer}. "
            f"Choose the SAE of layer {layer}, or read layer {theirs}."
        )
    kind = _KIND.search(hook_name)
    if layer is not None and kind and kind[1] != hook:
        raise BadConfig(
            f"The SAE {source} was trained on {hook_name}, not on {hook} of the layer. Choose an "
            f"SAE of {hook}."
        )
    named = metadata.get("hf_model_name") or metadata.get("model_name")
    if model_name and named and _short(str(named)) != _short(model_name):
        message = f"The SAE {source} was trained on the model {named}, not on {model_name}."
        if Path(model_name).exists() or Path(str(named)).exists():
            _log.warning("%s Use it if one is a fine-tuned copy of the other.", message)
            return
        raise BadConfig(f"{message} Choose an SAE of this model.")


def _layer_of(*names: object) -> int | None:
    for name in names:
        found = _LAYER.search(str(name)) if name else None
        if found:
            return int(found[1])
    return None


def _short(model: str) -> str:
    return Path(model).name.lower()


def saes_of_layers(source: str | Sequence[str], layers: Sequence[int]) -> dict[int, str]:
    """layer -> the source of its autoencoder.

    Args:
        source: one text with `{layer}` in it, or as many texts as layers.
        layers: the layers.

    Raises:
        BadConfig: one text for several layers without `{layer}`, or not one text a layer.
    """
    if isinstance(source, str):
        if len(layers) > 1 and "{layer}" not in source:
            raise BadConfig(
                f"{source!r} names one SAE for {len(layers)} layers. Write {{layer}} where the "
                "number of the layer belongs."
            )
        return {layer: at_layer(source, layer) for layer in layers}
    if len(source) != len(layers):
        raise BadConfig(f"{len(source)} SAEs for {len(layers)} layers: give one for each.")
    return dict(zip(layers, source, strict=True))
