"""From an architecture's name and plain options to SAELens' own training class."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, NamedTuple

import torch
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE

from salve_lm.errors import BadConfig, NameNotFound
from salve_lm.sae import linear_l1
from salve_lm.sae.global_topk import GlobalBatchTopKTrainingSAE, GlobalMatryoshkaTrainingSAE

linear_l1.register()

ARCHITECTURES = (
    "linear_l1",
    "standard",
    "topk",
    "batchtopk",
    "gated",
    "jumprelu",
    "matryoshka_batchtopk",
)
"""Names of the architectures this project trains, SAELens' own where it has them."""

NormalizeActivations = Literal["none", "constant_norm_rescale", "layer_norm"]
"""Scaling that SAELens repeats for every sample when the autoencoder is used."""

_EXACT_UNDER_DDP: dict[str, type[TrainingSAE[Any]]] = {
    "batchtopk": GlobalBatchTopKTrainingSAE,
    "matryoshka_batchtopk": GlobalMatryoshkaTrainingSAE,
}
_TOPK_FAMILY = ("topk", "batchtopk", "matryoshka_batchtopk")
_SET_ELSEWHERE = {
    "d_in": "it is the width of the activations",
    "d_sae": "it has an argument of its own",
    "dtype": "it has an argument of its own",
    "device": "the trainer chooses it",
    "normalize_activations": "use the argument normalize_input",
    "reshape_activations": "activations arrive as [n, d_in]",
    "metadata": "it is written when the autoencoder is saved",
}


class Traits(NamedTuple):
    """What the training loop must know of an architecture with its options.

    Attributes:
        warm_up_option: the option that warms its sparsity weight up, None where it has no weight.
        has_aux_loss: SAELens revives its dead latents with an auxiliary loss, if given a mask.
        exact_zeros: its silent latents are exactly 0.
        foldable: its decoder norms can be folded without changing the function.
    """

    warm_up_option: str | None
    has_aux_loss: bool
    exact_zeros: bool
    foldable: bool


def architecture_traits(architecture: str, options: Mapping[str, Any] | None = None) -> Traits:
    """The traits of `architecture`; raises NameNotFound for an unknown name."""
    check_architecture(architecture)
    options = options or {}
    known = option_defaults(architecture)
    warm_up = next((o for o in ("l1_warm_up_steps", "l0_warm_up_steps") if o in known), None)
    aux_weight = options.get("aux_loss_coefficient", known.get("aux_loss_coefficient", 0.0))
    return Traits(
        warm_up_option=warm_up,
        has_aux_loss=bool(aux_weight) or options.get("pre_act_loss_coefficient") is not None,
        exact_zeros=architecture != "linear_l1",
        foldable=architecture != "topk" or options.get("rescale_acts_by_decoder_norm", True),
    )


def check_architecture(architecture: str) -> None:
    """Raise NameNotFound unless `architecture` is one of ARCHITECTURES."""
    if architecture not in ARCHITECTURES:
        raise NameNotFound("SAE architecture", architecture, ARCHITECTURES)


def option_defaults(architecture: str) -> dict[str, Any]:
    """The options of `architecture` and their defaults, as SAELens' training config has them."""
    check_architecture(architecture)
    return {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default
        for f in fields(get_sae_training_class(architecture)[1])
        if f.name not in _SET_ELSEWHERE
    }


def build_training_sae(
    architecture: str,
    d_in: int,
    d_sae: int,
    options: Mapping[str, Any] | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    normalize_activations: NormalizeActivations = "none",
    seed: int | None = None,
) -> TrainingSAE[Any]:
    """An untrained autoencoder.

    Args:
        architecture: one of ARCHITECTURES.
        d_in: width of the activations.
        d_sae: number of latents.
        options: options of the architecture by name (`option_defaults` lists them). Without
            `matryoshka_widths`, matryoshka gets d_sae/8, d_sae/4, d_sae/2 and d_sae.
        device: where the weights are made.
        dtype: their type.
        normalize_activations: scaling that stays part of the autoencoder.
        seed: draws the weights from this seed and leaves the global random state alone; None draws
            from the global one.

    Raises:
        NameNotFound: no such architecture or option.
        BadConfig: an option of the wrong type or size.
    """
    checked = _checked(architecture, d_in, d_sae, dict(options or {}), normalize_activations)
    default, config_class = get_sae_training_class(architecture)
    sae_class = _EXACT_UNDER_DDP.get(architecture, default)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.random.default_generator.manual_seed(seed)
        try:
            return sae_class(config_class(**checked, device=device, dtype=dtype))
        except BadConfig:
            raise
        except ValueError as e:
            raise BadConfig(f"Options of SAE architecture {architecture!r}: {e}") from e


def _checked(
    architecture: str,
    d_in: int,
    d_sae: int,
    options: dict[str, Any],
    normalize_activations: NormalizeActivations,
) -> dict[str, Any]:
    known = option_defaults(architecture)
    for name, size in (("d_in", d_in), ("d_sae", d_sae)):
        if not _is_int(size) or size < 1:
            raise BadConfig(f"{name} must be a whole number of at least 1, not {size!r}.")
    for name in options:
        if name in _SET_ELSEWHERE:
            raise BadConfig(f"Remove {name!r} from the SAE's options: {_SET_ELSEWHERE[name]}.")
        if name not in known:
            raise NameNotFound(f"option of SAE architecture {architecture!r}", name, known)
    if architecture == "matryoshka_batchtopk":
        options["matryoshka_widths"] = _widths(options.get("matryoshka_widths"), d_sae)

    config_class = get_sae_training_class(architecture)[1]
    types = typing.get_type_hints(config_class)
    for name, value in options.items():
        _check_type(architecture, name, value, types[name])
    _check_sizes(architecture, d_sae, known | options, normalize_activations)
    sizes = {"d_in": d_in, "d_sae": d_sae}
    return sizes | options | {"normalize_activations": normalize_activations}


def _check_type(architecture: str, name: str, value: Any, expected: Any) -> None:
    allowed = set(typing.get_args(expected)) or {expected}
    if typing.get_origin(expected) is Literal:
        if value not in allowed:
            raise BadConfig(
                f"{name} of SAE architecture {architecture!r} must be one of "
                f"{sorted(map(str, allowed))}, not {value!r}."
            )
        return
    fits = (
        (bool in allowed and isinstance(value, bool))
        or (int in allowed and _is_int(value))
        or (float in allowed and _is_number(value))
        or (type(None) in allowed and value is None)
        or (typing.get_origin(expected) is list and isinstance(value, list | tuple))
    )
    if not fits:
        wanted = getattr(expected, "__name__", str(expected))
        raise BadConfig(
            f"{name} of SAE architecture {architecture!r} must be of type {wanted}, not {value!r}."
        )


def _check_sizes(
    architecture: str, d_sae: int, options: dict[str, Any], normalize_activations: str
) -> None:
    for name, value in options.items():
        weight = name.endswith(("_coefficient", "_steps", "_lr", "_scale"))
        if weight and value is not None and value < 0:
            raise BadConfig(f"{name} must not be negative, but is {value}.")
    k = options.get("k")
    if k is not None and not 0 < k <= d_sae:
        raise BadConfig(
            f"k={k} does not fit d_sae={d_sae}: {architecture} keeps k of the d_sae latents. "
            f"Set options k between 1 and {d_sae}, or raise d_sae."
        )
    if options.get("lp_norm", 1) <= 0:
        raise BadConfig(f"lp_norm must be positive, but is {options['lp_norm']}.")
    target_l0 = options.get("target_l0")
    if target_l0 is not None and not 0 < target_l0 <= d_sae:
        raise BadConfig(f"target_l0={target_l0} does not lie between 0 and d_sae={d_sae}.")
    if (
        normalize_activations != "none"
        and architecture in _TOPK_FAMILY
        and options["aux_loss_coefficient"]
    ):
        raise BadConfig(
            f"The auxiliary loss of {architecture} cannot be used with normalize_input "
            f"{normalize_activations!r} (SAELens would compare scaled with unscaled residuals). "
            "Set options aux_loss_coefficient to 0, or normalize_input to "
            "'expected_average_only_in'."
        )


def _widths(widths: Any, d_sae: int) -> list[int]:
    if widths is None:
        return sorted({max(1, d_sae // n) for n in (8, 4, 2, 1)})
    if not isinstance(widths, list | tuple) or not all(_is_int(w) for w in widths):
        raise BadConfig(f"matryoshka_widths must be a list of whole numbers, not {widths!r}.")
    if list(widths) != sorted(set(widths)) or not widths or widths[0] < 1 or widths[-1] > d_sae:
        raise BadConfig(
            f"matryoshka_widths must grow from at least 1 to at most d_sae={d_sae}, not {widths!r}."
        )
    # SAELens appends the last level itself, to the caller's own list and with a warning
    return [*widths, d_sae] if widths[-1] != d_sae else list(widths)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))
