"""Directional ablation: remove what the activations hold along one decoder row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from salve_lm.edits.ops import FoldInput
from salve_lm.edits.scope import Scope
from salve_lm.edits.spec import EditSpec, Resolved


@dataclass(frozen=True, kw_only=True)
class DirectionalAblation(EditSpec):
    """W' = W - alpha (W d) d^T, with d the unit decoder row of a latent.

    Equals x - alpha (d . x) d at the input; alpha = 1 projects the direction out (Arditi et al.
    2024, arXiv 2406.11717, on the reading side). All rows change, padding does no harm.

    Args:
        feature: A latent by index or name, as for `DecoderGuided`; the dominant feature of
            `target_class` when absent.
        sae: Folder of the SAE.
        features: Folder of the feature table; needed where the feature goes by name.
    """

    feature: str | int | None = None
    sae: str | None = None
    features: str | None = None

    default_alphas: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

    def class_named(self, scope: Scope) -> str | int | None:
        """The target class: as given, or as the feature names it."""
        if self.target_class is not None:
            return self.target_class
        return scope.class_of([self.feature], self.features)

    def resolve(self, scope: Scope) -> Resolved:
        """See `EditSpec.resolve`."""
        sae = scope.sae(self.sae)
        feature = scope.feature_or_dominant(self.feature, self.target_class)
        (latent,) = scope.latents([feature], sae, self.features, self.target_class)
        row = sae.decoder_row(latent)
        direction = row / row.norm()
        op = FoldInput(
            module=scope.name,
            output_dim=scope.layout.output_dim,
            alpha=self.alpha,
            v=direction,
            q=direction,
        )
        return Resolved((op,), (latent,))
