"""Erasure along the linear discriminant of the activations: what needs no autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from salve_lm.edits.latent_contrast import LatentContrastErasure, check_shrinkage, discriminant
from salve_lm.edits.layout import pads
from salve_lm.edits.ops import FoldInput
from salve_lm.edits.scope import Scope
from salve_lm.edits.spec import EditSpec, Resolved
from salve_lm.errors import UnsupportedEdit


@dataclass(frozen=True, kw_only=True)
class DiscriminantErasure(EditSpec):
    """Move samples of a class to where the others lie, along the LDA direction: no SAE (a control).

    The same fold as `LatentContrastErasure` in the coordinates of the activations x: with
    delta = mean of x in the class - mean of the others, C the shrunk within-class covariance of x
    and u = C^-1 delta / (delta^T C^-1 delta), T(x) = x - alpha u^T (x - rest) delta. Where this
    does as much as an erasure of latents, the autoencoder contributes nothing to it.

    Args:
        shrinkage: Weight of the multiple of the identity in C.
        contrast: Class of the feature table that is erased, where it is not the target class
            itself: with a table of images with and without a cue, the cue.
        features: Folder of the feature table, which holds means and covariance of x.
    """

    shrinkage: float = 0.1
    contrast: str | int | None = None
    features: str | None = None

    default_alphas: ClassVar[tuple[float, ...]] = LatentContrastErasure.default_alphas

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shrinkage(self.shrinkage)

    def resolve(self, scope: Scope) -> Resolved:
        """See `EditSpec.resolve`."""
        if pads(scope.module):
            raise UnsupportedEdit(
                f"{scope.name!r} pads its input, where the shift of this edit does not fold. Name "
                "a layer without padding."
            )
        table = scope.context.table(self.features)
        scope.check_width(table.d_in, "input", "The feature table")
        if self.contrast is None:
            scope.check_classes(table)
            erased = scope.target(self.target_class, table)
        else:
            erased = table.class_index(self.contrast)
        delta = table.x_contrast(erased)
        if not delta.any():
            raise UnsupportedEdit(
                f"The activations of class {table.class_names[erased]!r} have the same mean as "
                "those of the others: there is no direction to erase."
            )
        q = discriminant(delta, table.x_within_cov, self.shrinkage)
        op = FoldInput(
            module=scope.name,
            output_dim=scope.layout.output_dim,
            alpha=self.alpha,
            v=delta,
            q=q,
            offset=-float(q @ table.x_mean_rest(erased)),
        )
        return Resolved((op,))
