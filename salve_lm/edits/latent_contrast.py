"""Latent-contrast erasure: remove a class's contrast over a few latents, with one rank-one fold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from salve_lm.edits.guides import contrast_ranking
from salve_lm.edits.layout import pads
from salve_lm.edits.ops import FoldInput
from salve_lm.edits.scope import Scope
from salve_lm.edits.spec import EditSpec, Resolved
from salve_lm.errors import BadConfig, NameNotFound, UnsupportedEdit


@dataclass(frozen=True, kw_only=True)
class LatentContrastErasure(EditSpec):
    """Move samples of a class to where the others lie, along what `top_k` latents know (ours).

    With S the top latents by ((w_i - mean row) . W_dec[l]) (mu_i[l] - mu_rest[l]),
    delta = mu_i[S] - mu_rest[S], C = (1 - shrinkage) cov_within(z_S) + shrinkage (trace / |S|) I,
    u = C^-1 delta / (delta^T C^-1 delta), v = delta^T W_dec[S] and
    s(x) = u^T (z_S(x) - mu_rest[S]):  T(x) = x - alpha s(x) v, folded exactly into the head,
    W' = W - alpha (W v) (W_enc[:, S] u)^T,  b' = b + alpha (mu_rest[S] - b_enc[S])^T u  W v.
    s is 1 on the mean of the class and 0 on the mean of the others, so alpha = 1 takes the one to
    the other. All rows change; the rank is one.

    For a LinearL1 SAE z_S(x) is its latents. For any other architecture it is their
    pre-activations x W_enc[:, S] + b, since only these fold into a matrix; class means and
    covariance are then those of the pre-activations too. They are taken from the means and the
    within-class covariance of x, in which b cancels.

    Args:
        top_k: Number of latents |S|, or all of them where there are fewer. Choose it on training
            data, for example from 1, 3, 10, 30, 100.
        choose: Which latents: the `best` by the score above, or, as a control, `random` ones.
        seed: Of the random ones.
        shrinkage: Weight of the multiple of the identity in C.
        contrast: Class of the feature table that is erased, where it is not the target class
            itself: with a table of images with and without a cue, the cue. The target class, of the
            final layer, then only says on whose logit the latents are ranked.
        sae: Folder of the SAE.
        features: Folder of the feature table.
    """

    top_k: int = 30
    choose: Literal["best", "random"] = "best"
    seed: int = 0
    shrinkage: float = 0.1
    contrast: str | int | None = None
    sae: str | None = None
    features: str | None = None

    default_alphas: ClassVar[tuple[float, ...]] = (
        0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise BadConfig(f"top_k is {self.top_k}; it must be at least 1.")
        check_shrinkage(self.shrinkage)
        if self.choose not in ("best", "random"):
            raise NameNotFound("choice of latents", self.choose, ["best", "random"])

    def resolve(self, scope: Scope) -> Resolved:
        """See `EditSpec.resolve`."""
        if pads(scope.module):
            raise UnsupportedEdit(
                f"{scope.name!r} pads its input, where the shift of this edit does not fold. Name "
                "a layer without padding."
            )
        sae = scope.sae(self.sae)
        table = scope.context.table(self.features, sae)
        scope.check_width(table.d_in, "input", "The feature table")
        target = scope.target(self.target_class, table)
        if self.contrast is None:
            scope.check_classes(table)
        erased = target if self.contrast is None else table.class_index(self.contrast)
        rest = table.x_mean_rest(erased)
        encoder = sae.encoder()
        contrast = (table.x_mean[erased] - rest) @ encoder
        rows = scope.class_rows("LatentContrastErasure")
        if self.choose == "random":
            draw = torch.Generator().manual_seed(self.seed)
            ranked = torch.randperm(len(contrast), generator=draw)
        else:
            ranked = contrast_ranking(rows, target, sae.decoder(), contrast)
        chosen = ranked[: self.top_k]
        delta, encoder = contrast[chosen], encoder[:, chosen]
        if not delta.any():
            raise UnsupportedEdit(
                f"The {len(chosen)} chosen latents do not tell class {erased} of the table "
                "from the others. Raise top_k, or train the SAE longer."
            )
        u = discriminant(delta, encoder.T @ table.x_within_cov @ encoder, self.shrinkage)
        q = encoder @ u
        op = FoldInput(
            module=scope.name,
            output_dim=scope.layout.output_dim,
            alpha=self.alpha,
            v=delta @ sae.decoder(chosen),
            q=q,
            offset=-float(q @ rest),
        )
        return Resolved((op,), tuple(chosen.tolist()))


def check_shrinkage(shrinkage: float) -> None:
    """Raise `BadConfig` unless `shrinkage` lies in (0, 1]."""
    if not 0 < shrinkage <= 1:
        raise BadConfig(f"shrinkage is {shrinkage}; it must lie in (0, 1].")


def discriminant(delta: Tensor, cov: Tensor, shrinkage: float) -> Tensor:
    """Fisher's linear discriminant u [d], scaled so that u^T delta = 1.

    u = C^-1 delta / (delta^T C^-1 delta), C = (1 - shrinkage) cov + shrinkage (trace / d) I.

    Args:
        delta: class mean minus mean of the others [d], not zero.
        cov: within-class covariance [d, d].
        shrinkage: in (0, 1].

    Raises:
        UnsupportedEdit: nothing varies within classes.
    """
    ridge = cov.diagonal().mean() * torch.eye(len(delta), dtype=cov.dtype)
    cov = (1 - shrinkage) * cov + shrinkage * ridge
    try:
        solved = torch.linalg.solve(cov, delta)
    except torch.linalg.LinAlgError as e:
        raise UnsupportedEdit(
            "What was chosen does not vary within classes, so there is no scale to erase by. "
            "Raise top_k, or make the feature table from more samples."
        ) from e
    return solved / (delta @ solved)
