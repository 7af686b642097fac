"""Directional ablation in the weights of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from salve_lm.edits.ablation_ops import AblateRead, AblateWrite
from salve_lm.edits.ops import Op
from salve_lm.edits.residual_stream import Place, ResidualEdit
from salve_lm.task_vectors.subspaces import latents_subspace


@dataclass(frozen=True, kw_only=True)
class ResidualAblation(ResidualEdit):
    """Take the span of decoder rows out of what chosen layers read from, or write to, the stream.

    Writing matrices become (I - alpha D^T D) W (Arditi et al. 2024, arXiv 2406.11717), D an
    orthonormal basis of the latents' decoder rows; alpha = 1 takes the directions out altogether.
    Reading matrices become W G (I - alpha D^T D) G^-1, with G the gain of the norm before them:
    without it most of the effect would stay. Where a norm stands behind a writing matrix (Gemma 2
    and 3, OLMo 2) its gain is folded in in the same way. Norms keep their scalar 1 / rms over what
    they see. Behind a LayerNorm (GPT-2), which never shows the direction of all ones, D is centred.

    `final` ablates the reading of the unembedding. That is the token embedding too where the two
    are tied (Gemma, GPT-2), so it takes `allow_tied` there. Where the unembedding has no bias, what
    a LayerNorm's own bias has along D is ablated with the rest.

    Args:
        latents: Latents of each layer's SAE: a list (for one SAE), layer -> list, or the path of a
            JSON file with that. When absent, `latents` of the file that `layers` names.
        layers: Decoder layers to edit by number, `all`, or the path of the `layers.json` that
            `select_layers` wrote. May be left out with `final`.
        tensors: Names inside a layer, `*` for any text (`mlp.down_proj.weight`); those that
            `reads` and `writes` mean when absent.
        reads: Edit matrices that read the residual stream.
        writes: Edit matrices that write to it.
        final: Edit the unembedding; with an SAE for each layer, by that of the last of `layers`.
        top: Only the first so many of each layer's latents; a selection file lists the most
            task-specific ones first.
        sae: SAE folder, or `RELEASE:ID` of SAELens; `{layer}` in it stands for the layer's number.
            Without it one SAE serves all layers.
    """

    default_alphas: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)

    def ops_at(self, place: Place) -> tuple[Op, ...]:
        """See `ResidualEdit.ops_at`."""
        if not place.role.reads:
            return (
                AblateWrite(
                    module=place.module,
                    output_dim=place.output_dim,
                    alpha=self.alpha,
                    basis=_basis(place),
                    norm=place.norm,
                    offset=place.role.offset,
                    has_bias=place.has_bias,
                ),
            )
        return (
            AblateRead(
                module=place.module,
                output_dim=place.output_dim,
                alpha=self.alpha,
                basis=_basis(place),
                norm=place.norm,
                offset=place.role.offset,
                has_bias=place.has_bias and place.norm_has_bias,
                centred=place.role.centred,
            ),
        )

    def final_ops(self, place: Place) -> tuple[Op, ...]:
        """See `ResidualEdit.final_ops`."""
        return self.ops_at(place)


def _basis(place: Place) -> Tensor:
    """Orthonormal rows that span the latents' decoder rows, float64 [k, d_model]."""
    return latents_subspace(place.sae, place.latents).basis.T.contiguous()
