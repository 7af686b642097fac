"""The autoencoder of each layer: where it lies, and whether it belongs to this model.

A local folder of SAELens folders, or a text with `{layer}` in it: of paths, or `RELEASE:ID` of
SAELens. Importing this is light; loading imports SAELens (5-10 s).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from salve_lm.errors import BadConfig, MissingFile, NameNotFound, StaleStore

if TYPE_CHECKING:
    from sae_lens import SAE

_log = logging.getLogger(__name__)
FIELD = "{layer}"
_LAYER = re.compile(r"(?:^|\.)(?:blocks|layers|h|resid_post)\.(\d+)(?:[.:]|$)")


@dataclass(frozen=True)
class ModelIdentity:
    """The model that autoencoders are wanted for.

    Attributes:
        name: public name or path; None for a model that was never saved.
        d_model: width of the residual stream.
        n_layers: number of decoder layers.
        weights: SHA-256 of its state dict.
        dtype: of its weights, such as `bfloat16`.
    """

    name: str | None
    d_model: int
    n_layers: int
    weights: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class LayerSAE:
    """One layer's autoencoder.

    Attributes:
        layer: its number.
        source: folder, or `RELEASE:ID`.
        sha256: of its weight file; None for a public release.
        sae: the autoencoder, frozen.
        fire_threshold: a latent fires above this activation.
    """

    layer: int
    source: str
    sha256: str | None
    sae: SAE[Any]
    fire_threshold: float


def load_layer_saes(
    saes: str,
    model: ModelIdentity,
    *,
    layers: Sequence[int] | None = None,
    allow_other_model: bool = False,
) -> dict[int, LayerSAE]:
    """Load the autoencoder of every layer, ascending, after checking that it belongs there.

    Args:
        saes: a folder that holds one SAELens folder a layer (their metadata name it); or a path or
            `RELEASE:ID` with `{layer}` in it.
        model: the model they are for.
        layers: the layers wanted; all that have an autoencoder where None.
        allow_other_model: only warn where an autoencoder was made from other weights.

    Raises:
        MissingFile: a layer without autoencoder, or nothing there at all.
        NameNotFound: no such release or id; names the nearest.
        ShapeMismatch: an autoencoder of another width.
        BadConfig: one that was made for another layer, another place in it, or another public
            model; a layer that the model does not have; fewer than two layers; two autoencoders of
            one layer.
        StaleStore: one that was made from other weights.
    """
    wrong = [n for n in layers or [] if not 0 <= n < model.n_layers]
    if wrong:
        raise BadConfig(f"The model has layers 0 to {model.n_layers - 1}, and no layer {wrong[0]}.")
    found = _wanted(_sources(saes, model, layers), layers, saes)
    if len(found) < 2:
        raise BadConfig(
            f"Layers are compared with one another, but there are autoencoders of only "
            f"{len(found)} at {saes}. Give two or more layers."
        )
    return {n: _load(n, source, model, allow_other_model) for n, source in sorted(found.items())}


def check_weights(
    source: str, metadata: Mapping[str, Any], model: ModelIdentity, allow_other_model: bool = False
) -> None:
    """Refuse an autoencoder that was made from other weights, where its metadata tell.

    Weights that differ in dtype alone cannot be told from others by their hash; where the metadata
    name another dtype, only the rest is checked.

    Raises:
        StaleStore: other weights, and not `allow_other_model`.
    """
    made_from = metadata.get("activations")
    weights = made_from.get("backbone") if isinstance(made_from, Mapping) else None
    if not weights or not model.weights or weights == model.weights:
        return
    if metadata.get("model_dtype") not in (None, model.dtype):
        _log.info("%s was made from %s weights.", source, metadata["model_dtype"])
        return
    what = (
        f"The SAE {source} was made from other weights ({weights[:12]}) than these "
        f"({model.weights[:12]})."
    )
    if not allow_other_model:
        raise StaleStore(
            f"{what} Give SAEs of this model, or set allow_other_model: true if these are known to "
            "carry over (for example from a model to its fine-tuned copy)."
        )
    _log.warning(what)


def layer_of_metadata(metadata: Mapping[str, Any]) -> int | None:
    """The layer that an autoencoder's metadata name, or None."""
    for key in ("layer", "hook_layer"):
        if isinstance(metadata.get(key), int):
            return int(metadata[key])
    for key in ("hook_name", "site"):
        found = _LAYER.search(str(metadata.get(key) or ""))
        if found:
            return int(found[1])
    return None


def latent_lengths(sae: SAE[Any]) -> Tensor:
    """Length of what a latent of 1 adds to the reconstruction, [d_sae]: its decoder row's norm."""
    norm = sae.W_dec.detach().norm(dim=1)
    # such a top-k already multiplies by the norm, and divides by it when decoding
    rescaled = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    return norm.new_ones(norm.shape) if rescaled else norm


def _sources(saes: str, model: ModelIdentity, layers: Sequence[int] | None) -> dict[int, str]:
    """layer -> source, of every layer that has an autoencoder."""
    if FIELD not in saes:
        return _by_metadata(Path(saes).expanduser())
    from salve_lm.sae.pretrained import at_layer, check_release, is_release

    every = {n: at_layer(saes, n) for n in range(model.n_layers)}
    first = every[min(layers) if layers else 0]
    if not is_release(first):
        found = {n: s for n, s in every.items() if Path(s).expanduser().exists()}
        if not found:
            raise MissingFile(
                f"No autoencoder at {saes} for any layer. Check the path, or give RELEASE:ID of "
                f"SAELens with {FIELD} in the id."
            )
        return found
    released: dict[int, str] = {}
    refused: NameNotFound | None = None
    for layer, source in every.items():
        release, _, sae_id = source.partition(":")
        try:
            check_release(release, sae_id)
        except NameNotFound as e:
            refused = refused or e
        else:
            released[layer] = source
    if not released and refused is not None:
        raise refused
    return released


def _by_metadata(folder: Path) -> dict[int, str]:
    if not folder.is_dir():
        raise MissingFile(
            f"No folder of SAEs at {folder}. Give the folder that holds one SAE folder a layer, or "
            f"a path or RELEASE:ID with {FIELD} in it."
        )
    from salve_lm.sae import read_metadata

    found: dict[int, str] = {}
    for path in sorted(p for p in folder.iterdir() if (p / "cfg.json").is_file()):
        layer = layer_of_metadata(read_metadata(path))
        if layer is None:
            raise BadConfig(
                f"The metadata of {path} name no layer. Name the folders in a template such as "
                f"{folder}/layer_{FIELD}."
            )
        if layer in found:
            raise BadConfig(
                f"{found[layer]} and {path} are both SAEs of layer {layer}. Choose one for each "
                f"layer with a template, such as {folder}/NAME_{FIELD}."
            )
        found[layer] = str(path)
    if not found:
        raise MissingFile(f"No SAELens folder in {folder}. Give the folder that holds them.")
    return found


def _wanted(there: dict[int, str], layers: Sequence[int] | None, where: str) -> dict[int, str]:
    if layers is None:
        return there
    missing = sorted(set(layers) - set(there))
    if missing:
        raise MissingFile(
            f"No SAE of layer {', '.join(map(str, missing))} at {where}; there are SAEs of layers "
            f"{', '.join(map(str, sorted(there)))}. Train the missing ones, or leave them out of "
            "`layers`."
        )
    return {n: there[n] for n in layers}


def _load(layer: int, source: str, model: ModelIdentity, allow_other_model: bool) -> LayerSAE:
    from salve_lm.sae import hash_sae
    from salve_lm.sae.pretrained import check_belongs, is_release, open_sae
    from salve_lm.sae.resolve import LINEAR_FIRE_THRESHOLD

    sae = open_sae(source)
    metadata = dict(sae.cfg.metadata.to_dict())
    name = None if allow_other_model else model.name
    check_belongs(sae, source, d_in=model.d_model, layer=layer, model_name=name)
    check_weights(source, metadata, model, allow_other_model)
    sae.eval().requires_grad_(False)
    linear = sae.cfg.architecture() == "linear_l1"
    threshold = metadata.get("fire_threshold", LINEAR_FIRE_THRESHOLD if linear else 0.0)
    sha256 = None if is_release(source) else hash_sae(Path(source).expanduser())
    return LayerSAE(layer, source, sha256, sae, float(threshold))
