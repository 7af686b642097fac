"""Activation steering, folded into the bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from salve_lm.edits.layout import pads
from salve_lm.edits.ops import FoldInput
from salve_lm.edits.scope import Scope
from salve_lm.edits.spec import SIGN, Direction, EditSpec, Resolved
from salve_lm.errors import BadConfig, UnsupportedEdit


@dataclass(frozen=True, kw_only=True)
class Steering(EditSpec):
    """x + alpha d for every sample, folded into the bias: b' = b + alpha W d.

    d is the unit decoder row of a latent, turned so that `enhance` adds and `suppress` takes away
    what the class has more of: d = +-sign(mu_k[l] - mu_rest[l]) W_dec[l] / n_l. Without a class
    (or without a feature table) the row's own sense is taken. Adding one vector to every sample
    moves all logits by constants: it is a bias edit, which is the point of the comparison.

    Args:
        feature: A latent by index or name, as for `DecoderGuided`; the dominant feature of
            `target_class` when absent.
        direction: `suppress` or `enhance`.
        sae: Folder of the SAE.
        features: Folder of the feature table; needed where feature or class go by name.
    """

    feature: str | int | None = None
    direction: Direction = "suppress"
    sae: str | None = None
    features: str | None = None

    default_alphas: ClassVar[tuple[float, ...]] = (
        0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0,
    )  # fmt: skip
    grid_kind: ClassVar[str] = "norm"

    def class_named(self, scope: Scope) -> str | int | None:
        """The target class: as given, or as the feature names it."""
        if self.target_class is not None:
            return self.target_class
        return scope.class_of([self.feature], self.features)

    def resolve(self, scope: Scope) -> Resolved:
        """See `EditSpec.resolve`."""
        if pads(scope.module):
            raise UnsupportedEdit(
                f"{scope.name!r} pads its input, where a shift does not fold into the bias. Name a "
                "layer without padding, or use the ActivationSteering callback."
            )
        if not scope.has_bias:
            raise UnsupportedEdit(
                f"{scope.name!r} has no bias to fold the shift into. Use the ActivationSteering "
                "callback, or a layer with a bias."
            )
        scope.sae(self.sae)
        latent, direction = self.vector(scope)
        op = FoldInput(
            module=scope.name,
            output_dim=scope.layout.output_dim,
            alpha=self.alpha,
            v=-direction,
            offset=1.0,
        )
        return Resolved((op,), (latent,))

    def vector(self, scope: Scope) -> tuple[int, Tensor]:
        """The latent and d, float64 [d_in], such that the input becomes x + alpha d."""
        sae = scope.context.sae(self.sae)
        target = self.class_named(scope)
        feature = scope.feature_or_dominant(self.feature, target)
        (latent,) = scope.latents([feature], sae, self.features, target)
        row = sae.decoder_row(latent)
        sense = 1
        if target is not None and scope.context.has_features(self.features):
            table = scope.context.table(self.features, sae)
            sense = table.sign(target, latent)
        elif isinstance(target, str):
            raise BadConfig(
                "Which way the class lies along the latent needs class statistics: set `features`."
            )
        return latent, SIGN[self.direction] * sense * row / row.norm()
