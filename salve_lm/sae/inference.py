"""The autoencoder as it will be used: on raw activations, by SAELens' inference classes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE
from torch import Tensor

from salve_lm.errors import BadConfig
from salve_lm.sae import ranks
from salve_lm.sae.gathering import gathered, gathered_on_first, is_sharded

if TYPE_CHECKING:
    from salve_lm.sae.normalize import InputNormalizer

T = TypeVar("T", bound=SAE[Any])


@torch.no_grad()
def to_inference(
    sae: TrainingSAE[Any],
    normalizer: InputNormalizer | None = None,
    *,
    fold_decoder_norm: bool = False,
) -> SAE[Any]:
    """A copy of `sae` for inference, on its device; `sae` stays as it is.

    Batch-top-k and matryoshka become jump-ReLU with their running threshold, as SAELens saves them.

    Args:
        sae: an autoencoder in training.
        normalizer: the scaling its inputs went through; folded into the weights.
        fold_decoder_norm: scale latents so that decoder rows have norm 1.

    Raises:
        BadConfig: the decoder norms of this architecture cannot be folded exactly.
    """
    state = gathered(sae.state_dict())
    return _converted(_twin(sae, state), normalizer, fold_decoder_norm)


@torch.no_grad()
def to_inference_on_first(
    sae: TrainingSAE[Any],
    normalizer: InputNormalizer | None = None,
    *,
    fold_decoder_norm: bool = False,
) -> SAE[Any] | None:
    """`to_inference` in the first process; None in the others.

    A sharded autoencoder becomes a whole one in host memory; all processes must call this then.
    """
    if not is_sharded(sae):
        first = ranks.rank() == 0
        return to_inference(sae, normalizer, fold_decoder_norm=fold_decoder_norm) if first else None
    state = gathered_on_first(sae.state_dict())
    return _converted(_twin(sae, state), normalizer, fold_decoder_norm) if state else None


def _converted(
    work: TrainingSAE[Any], normalizer: InputNormalizer | None, fold_decoder_norm: bool
) -> SAE[Any]:
    """`work` for inference; it is changed, and its tensors are taken over."""
    if normalizer is not None:
        normalizer.fold(work)
    if "threshold" in work.state_dict():
        # SAELens projects it before each step, so after the last one it may lie below zero, where
        # training and inference disagree
        work.threshold.data.clamp_(min=0.0)
    state = dict(work.state_dict())
    work.process_state_dict_for_saving_inference(state)
    config: SAEConfig = SAEConfig.from_dict(work.cfg.get_inference_sae_cfg_dict())
    # folded above or never estimated; a value other than these would do nothing after loading
    if config.normalize_activations not in ("layer_norm", "constant_norm_rescale"):
        config.normalize_activations = "none"
    inference = _assemble(get_sae_class(config.architecture())[0], config, state)
    if fold_decoder_norm:
        fold_norm(inference)
    return inference.eval()


def fold_norm(sae: SAE[Any]) -> None:
    """SAELens' `fold_W_dec_norm`, in place: the same function with decoder rows of norm 1.

    Raises:
        BadConfig: top-k without rescaling, where folding would change which latents are kept.
    """
    try:
        sae.fold_W_dec_norm()
    except NotImplementedError as e:
        raise BadConfig(
            f"The decoder norms of this {sae.cfg.architecture()} autoencoder cannot be folded "
            f"exactly: {e}. Set fold_decoder_norm to false, or train with "
            "rescale_acts_by_decoder_norm: true and without whitening."
        ) from e


def contributions(sae: SAE[Any], z: Tensor) -> Tensor:
    """What "active" is measured on [n, d_sae]: z, and |z_l| n_l for linear_l1.

    The penalty of linear_l1 has no norm constraint, so only the product with the decoder row's
    norm n_l (the length of what the latent adds to x_hat) has a scale.
    """
    return z.abs() * sae.W_dec.norm(dim=1) if sae.cfg.architecture() == "linear_l1" else z


def _twin(sae: TrainingSAE[Any], state: Mapping[str, Tensor]) -> TrainingSAE[Any]:
    # not deepcopy: SAELens keeps closures over the original on some instances
    return _assemble(type(sae), copy.deepcopy(sae.cfg), state)


def _assemble(sae_class: type[T], config: SAEConfig, state: Mapping[str, Tensor]) -> T:
    """An instance around the tensors of `state`, without ever drawing random weights."""
    weight = state["W_enc"]
    config.device, config.dtype = "meta", str(weight.dtype).removeprefix("torch.")
    sae = sae_class(config)
    sae.load_state_dict(state, assign=True)
    sae.device, sae.cfg.device = weight.device, str(weight.device)
    return sae
