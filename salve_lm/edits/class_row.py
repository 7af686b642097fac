"""The trivial control: shrink one class's row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from salve_lm.edits.ops import ScaleChannels
from salve_lm.edits.scope import Scope
from salve_lm.edits.spec import EditSpec, Resolved


@dataclass(frozen=True, kw_only=True)
class ShrinkClassRow(EditSpec):
    """w_i' = max(0, 1 - alpha) w_i; alpha = 1 zeroes the row, so that the logit is b_i.

    What `DecoderGuided` with `rows: class` tends to as its alpha grows. Needs no SAE and no data.
    """

    default_alphas: ClassVar[tuple[float, ...]] = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)

    def resolve(self, scope: Scope) -> Resolved:
        """See `EditSpec.resolve`."""
        scope.require_head("ShrinkClassRow")
        op = ScaleChannels(
            module=scope.name,
            output_dim=scope.layout.output_dim,
            alpha=self.alpha,
            c=torch.ones(1, scope.layout.d_in, dtype=torch.float64),
            sign=-1,
            rows=(scope.target(self.target_class),),
        )
        return Resolved((op,))
