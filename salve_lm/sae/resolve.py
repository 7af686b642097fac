"""The arguments of `SAETraining` that depend on each other, settled before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

from salve_lm.errors import BadConfig
from salve_lm.sae.build import NormalizeActivations, architecture_traits
from salve_lm.sae.normalize import FOLDED, Folded

Handling = Literal["none", "aux", "resample"]

LINEAR_FIRE_THRESHOLD = 0.01
"""Default length of a latent's contribution to x_hat from which it counts as active, linear_l1."""


class Plan(NamedTuple):
    """Settled arguments.

    Attributes:
        options: of the architecture, the warm-up of its sparsity weight included.
        handling: what is done about dead latents.
        fire_threshold: a latent is active above this.
        per_sample: scaling that stays part of the autoencoder.
        folded: scaling that is estimated, and folded into the weights at the end.
    """

    options: dict[str, Any]
    handling: Handling
    fire_threshold: float
    per_sample: NormalizeActivations
    folded: Folded | None


def resolve(
    architecture: str,
    options: Mapping[str, Any] | None,
    *,
    l1_warm_up_steps: int = 0,
    normalize_input: str = "none",
    fold_decoder_norm: bool = False,
    dead_feature_handling: str = "auto",
    fire_threshold: float | None = None,
) -> Plan:
    """Settle the arguments of `SAETraining` of the same names.

    Raises:
        NameNotFound: no such architecture.
        BadConfig: arguments that contradict each other or would do nothing.
    """
    options = dict(options or {})
    traits = architecture_traits(architecture, options)
    if l1_warm_up_steps:
        name = traits.warm_up_option
        if name is None:
            raise BadConfig(
                f"l1_warm_up_steps does nothing for {architecture}, which has no sparsity weight: "
                "k sets its sparsity. Remove it."
            )
        if options.setdefault(name, l1_warm_up_steps) != l1_warm_up_steps:
            raise BadConfig(
                f"l1_warm_up_steps={l1_warm_up_steps} contradicts the option "
                f"{name}={options[name]}. Give one of them."
            )
    folded = cast(Folded, normalize_input) if normalize_input in FOLDED else None
    per_sample = "none" if folded else cast(NormalizeActivations, normalize_input)

    # under per-sample scaling SAELens would compare scaled with unscaled residuals
    aux = traits.has_aux_loss and per_sample == "none"
    handling = dead_feature_handling
    if handling == "auto":
        handling = "aux" if aux else "none"
    if handling == "aux" and not aux:
        hint = " (jumprelu: set the option pre_act_loss_coefficient)"
        raise BadConfig(
            f"{architecture} has no auxiliary loss with these options and normalize_input "
            f"{normalize_input!r}. Set dead_feature_handling to 'resample' or 'none'"
            f"{hint if architecture == 'jumprelu' else ''}."
        )
    whitened_topk = architecture == "topk" and folded == "covariance_whitening"
    if fold_decoder_norm and (whitened_topk or not traits.foldable):
        raise BadConfig(
            "fold_decoder_norm would change which latents this topk autoencoder keeps. Set it to "
            "false, or use rescale_acts_by_decoder_norm: true without whitening."
        )
    if fire_threshold is None:
        fire_threshold = 0.0 if traits.exact_zeros else LINEAR_FIRE_THRESHOLD
    return Plan(options, cast(Handling, handling), fire_threshold, per_sample, folded)
