"""SALVE's multiplicative edit over the layers of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from salve_lm.edits.decoder_guided import DecoderGuided
from salve_lm.edits.guides import DecoderNorm, normalise, permuted
from salve_lm.edits.ops import Op, ScaleChannels
from salve_lm.edits.residual_stream import Place, ResidualEdit
from salve_lm.edits.spec import SIGN, Direction


@dataclass(frozen=True, kw_only=True)
class ResidualScaling(ResidualEdit):
    """w' = w * max(0, 1 +- alpha |c|) on every matrix of chosen layers that touches the stream.

    `DecoderGuided` for a whole language model: c is the decoder row of a latent of an SAE on the
    residual stream. Matrices that read the stream (q, k, v, gate, up) are scaled along their input
    axis, those that write it (o, down) along their output axis, with their bias. Where a norm
    stands behind a writing matrix (Gemma 2 and 3, OLMo 2), that norm's gain is scaled in its place:
    1 + w' = (1 + w) f. `final` scales the final norm's gain (and bias), which equals gating the
    input of the unembedding without untying it. The factors of several latents multiply.

    Args:
        latents: Latents of each layer's SAE: a list (for one SAE), layer -> list, or the path of a
            JSON file with that. When absent, `latents` of the file that `layers` names.
        layers: Decoder layers to edit by number, `all`, or the path of the `layers.json` that
            `select_layers` wrote. May be left out with `final`.
        tensors: Names inside a layer, `*` for any text (`mlp.down_proj.weight`); those that
            `reads` and `writes` mean when absent.
        reads: Edit matrices that read the residual stream.
        writes: Edit matrices that write to it.
        final: Edit the final norm; with an SAE for each layer, by that of the last of `layers`.
        top: Only the first so many of each layer's latents; a selection file lists the most
            task-specific ones first.
        sae: SAE folder, or `RELEASE:ID` of SAELens; `{layer}` in it stands for the layer's number.
            Without it one SAE serves all layers.
        direction: `suppress` (-) or `enhance` (+).
        guide: `decoder_abs`, the decoder row; or, as a control, the same `permuted`.
        decoder_norm: `unit` c / |c|, so that alpha compares across latents; `raw` as the paper
            writes it; `max` c / max(c), so that alpha = 1 is the first cut-off.
        seed: Of the permutation.
    """

    direction: Direction = "suppress"
    guide: Literal["decoder_abs", "permuted"] = "decoder_abs"
    decoder_norm: DecoderNorm = "unit"
    seed: int = 0

    default_alphas: ClassVar[tuple[float, ...]] = DecoderGuided.default_alphas
    grid_kind: ClassVar[str] = DecoderGuided.grid_kind

    def ops_at(self, place: Place) -> tuple[Op, ...]:
        """See `ResidualEdit.ops_at`."""
        if place.role.reads:
            return (self._scaled(place, place.module, place.output_dim, axis="input"),)
        if place.norm is not None:
            return (self._scaled_gain(place, place.norm),)
        return (
            self._scaled(
                place, place.module, place.output_dim, axis="output", has_bias=place.has_bias
            ),
        )

    def final_ops(self, place: Place) -> tuple[Op, ...]:
        """See `ResidualEdit.final_ops`."""
        return (self._scaled_gain(place, str(place.norm)),)

    def _scaled_gain(self, place: Place, norm: str) -> Op:
        return self._scaled(
            place, norm, 0, axis="output", has_bias=place.norm_has_bias, offset=place.role.offset
        )

    def _scaled(
        self,
        place: Place,
        module: str,
        output_dim: int,
        *,
        axis: Literal["input", "output"],
        has_bias: bool = False,
        offset: float = 0.0,
    ) -> Op:
        return ScaleChannels(
            module=module,
            output_dim=output_dim,
            alpha=self.alpha,
            c=torch.stack([self._guide(place, i) for i in place.latents]),
            sign=SIGN[self.direction],
            axis=axis,
            has_bias=has_bias,
            offset=offset,
        )

    def _guide(self, place: Place, latent: int) -> Tensor:
        """c of one latent, float64 [d_model]."""
        c = place.sae.decoder_row(latent).abs()
        if self.guide == "permuted":
            # by the latent, so that every matrix has its channels shuffled alike
            c = permuted(c, self.seed + latent)
        return normalise(c, self.decoder_norm, f"latent {latent} of {place.sae.path}")
