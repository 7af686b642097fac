"""`linear_l1`: SALVE's linear autoencoder with an L1 penalty, as a SAELens architecture.

z = x W_enc + b_enc and x_hat = z W_dec + b_dec, with no activation function. The loss is the mean
over the batch of the summed squared error, plus `l1_coefficient` times the mean over the batch of
sum_l |z_l| (METHODS 1). The penalty has no norm constraint: training shrinks z and inflates W_dec,
so compare latents by |z_l| times the norm of their decoder row, never by |z_l| alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import (
    SAE,
    SAEConfig,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
)
from torch import Tensor, nn

from salve_lm.errors import BadConfig

ARCHITECTURE = "linear_l1"


def _refuse_b_dec_in_input(cfg: SAEConfig) -> None:
    if cfg.apply_b_dec_to_input:
        raise BadConfig(
            "linear_l1 encodes x itself, not x - b_dec. Set apply_b_dec_to_input to false, "
            "or fold it: b_enc - b_dec @ W_enc."
        )


@dataclass
class LinearL1Config(SAEConfig):
    """Inference configuration of `linear_l1`."""

    apply_b_dec_to_input: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_b_dec_in_input(self)

    @classmethod
    def architecture(cls) -> str:
        """The name in SAELens' registry."""
        return ARCHITECTURE


@dataclass
class LinearL1TrainingConfig(TrainingSAEConfig):
    """Training configuration of `linear_l1`.

    Attributes:
        l1_coefficient: weight of the mean over the batch of sum_l |z_l|.
        l1_warm_up_steps: steps over which that weight grows linearly from 0.
    """

    apply_b_dec_to_input: bool = False
    l1_coefficient: float = 1.0
    l1_warm_up_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_b_dec_in_input(self)

    @classmethod
    def architecture(cls) -> str:
        """The name in SAELens' registry."""
        return ARCHITECTURE


class _LinearEncoder(SAE[Any]):
    """What the inference and the training class share: a linear map with its own bias."""

    b_enc: nn.Parameter

    def initialize_weights(self) -> None:
        """SAELens' own initialisation, and a zero encoder bias."""
        super().initialize_weights()
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device))

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """The input as the encoder sees it [..., d_in].

        SAELens subtracts `b_dec * apply_b_dec_to_input` even where that is zero, which costs a
        pass over the batch and, in training, a matrix product for a gradient nobody needs.
        """
        sae_in = self.hook_sae_input(self.reshape_fn_in(sae_in.to(self.dtype)))
        return self.run_time_activation_norm_fn_in(sae_in)

    def _pre_activation(self, x: Tensor) -> Tensor:
        return self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)


class LinearL1(_LinearEncoder):
    """The trained autoencoder: z = x W_enc + b_enc, x_hat = z W_dec + b_dec."""

    cfg: LinearL1Config

    def encode(self, x: Tensor) -> Tensor:
        """Latents [..., d_sae] of activations [..., d_in]; of either sign, none exactly zero."""
        return self.hook_sae_acts_post(self._pre_activation(x))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Activations [..., d_in] from latents [..., d_sae]."""
        x_hat = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(x_hat), self.d_head)


class LinearL1Training(_LinearEncoder, TrainingSAE[LinearL1TrainingConfig]):
    """`linear_l1` in training; SAELens' own trainer can train it as well."""

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and pre-activations, here the same tensor [..., d_sae]."""
        hidden_pre = self._pre_activation(x)
        return self.hook_sae_acts_post(hidden_pre), hidden_pre

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """The L1 weight and its warm-up."""
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps)}

    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """The L1 penalty of METHODS 1, not weighted by decoder norms."""
        return {"l1_loss": step_input.coefficients["l1"] * feature_acts.abs().sum(-1).mean()}


def register() -> None:
    """Make `linear_l1` known to SAELens' loaders. SAELens raises on a second registration."""
    if ARCHITECTURE not in SAE_CLASS_REGISTRY:
        register_sae_class(ARCHITECTURE, LinearL1, LinearL1Config)
    if ARCHITECTURE not in SAE_TRAINING_CLASS_REGISTRY:
        register_sae_training_class(ARCHITECTURE, LinearL1Training, LinearL1TrainingConfig)
