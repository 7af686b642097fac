"""The trivial control: lower one class's bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from salve_lm.edits.ops import ShiftBias
from salve_lm.edits.scope import Scope
from salve_lm.edits.spec import EditSpec, Resolved
from salve_lm.errors import UnsupportedEdit


@dataclass(frozen=True, kw_only=True)
class LowerClassBias(EditSpec):
    """b_i' = b_i - alpha; a negative alpha raises it.

    Needs no SAE and no data. "Target to 0, others intact" is nearly free this way, so it stands
    beside every edit that claims more.
    """

    default_alphas: ClassVar[tuple[float, ...]] = (
        0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0,
    )  # fmt: skip
    grid_kind: ClassVar[str] = "logit"
    signed_alpha: ClassVar[bool] = True

    def resolve(self, scope: Scope) -> Resolved:
        """See `EditSpec.resolve`."""
        scope.require_head("LowerClassBias")
        if not scope.has_bias:
            raise UnsupportedEdit(
                f"{scope.name!r} has no bias to lower. Use ShrinkClassRow instead."
            )
        delta = torch.zeros(scope.layout.d_out, dtype=torch.float64)
        delta[scope.target(self.target_class)] = -1
        op = ShiftBias(
            module=scope.name,
            output_dim=scope.layout.output_dim,
            alpha=self.alpha,
            delta=delta,
        )
        return Resolved((op,))
