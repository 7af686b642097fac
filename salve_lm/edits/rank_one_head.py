"""A rank-one edit of the final layer in the manner of ROME."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from salve_lm.edits.ops import RankOneUpdate
from salve_lm.edits.scope import Scope
from salve_lm.edits.spec import EditSpec, Resolved
from salve_lm.errors import BadConfig, UnsupportedEdit


@dataclass(frozen=True, kw_only=True)
class RankOneHead(EditSpec):
    """W' = W - alpha gap e_i (C^-1 k)^T / (k^T C^-1 k): one logit lowered at one key.

    ROME's constrained least squares (Meng et al. 2022, arXiv 2202.05262) with a linear head as the
    memory. Which key and value to take for "forget a class" is **ours**: k is the class mean of
    the activations, C their second moment E[x x^T] plus `ridge` times its mean diagonal, and
    gap = z_i(k) - max (or mean) of the other logits at k. So alpha = 1 brings the class mean level
    with its runner-up, and alpha = 2 as far below it. No SAE takes part.

    Args:
        against: Measure the gap from the `max` or the `mean` of the other logits.
        ridge: Added to C in units of its mean diagonal, since dead channels make it singular.
        features: Folder of the feature table.
    """

    against: Literal["max", "mean"] = "max"
    ridge: float = 1e-3
    features: str | None = None

    default_alphas: ClassVar[tuple[float, ...]] = (
        0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ridge <= 0:
            raise BadConfig(f"ridge is {self.ridge}; it must be positive.")

    def resolve(self, scope: Scope) -> Resolved:
        """See `EditSpec.resolve`."""
        rows = scope.class_rows("RankOneHead")
        table = scope.context.table(self.features)
        scope.check_width(table.d_in, "input", "The feature table")
        scope.check_classes(table)
        target = scope.target(self.target_class, table)
        key = table.x_mean[target]
        if not key.any():
            raise UnsupportedEdit(f"The mean activation of class {target} is zero.")
        logits = rows @ key + scope.class_bias()
        others = torch.cat([logits[:target], logits[target + 1 :]])
        gap = float(logits[target] - (others.max() if self.against == "max" else others.mean()))
        if gap <= 0:
            raise UnsupportedEdit(
                f"At its own mean, class {table.class_names[target]!r} lies {-gap:.3g} below the "
                "others: there is no gap to close. Choose a class that the model recognises."
            )
        solved = scope.context.whitened_mean(self.features, target, self.ridge)
        left = torch.zeros(len(rows), dtype=torch.float64)
        left[target] = gap
        op = RankOneUpdate(
            module=scope.name,
            output_dim=scope.layout.output_dim,
            alpha=self.alpha,
            left=left,
            right=solved / (key @ solved),
        )
        return Resolved((op,))
