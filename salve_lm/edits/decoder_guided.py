"""SALVE's multiplicative edit, W' = W * max(0, 1 +- alpha c), and its controls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from salve_lm.edits.context import SaeView
from salve_lm.edits.guides import (
    DecoderNorm,
    contrast_ranking,
    normalise,
    permuted,
    require_non_negative,
)
from salve_lm.edits.ops import ScaleChannels
from salve_lm.edits.scope import Axis, Scope
from salve_lm.edits.spec import SIGN, Direction, EditSpec, Resolved
from salve_lm.edits.stream_norm import refuse_behind_norm
from salve_lm.errors import BadConfig, UnsupportedEdit
from salve_lm.features import FeatureTable

Feature = str | int
Guide = Literal["decoder_abs", "decoder_signed", "permuted", "head_row", "class_mean"]
Rows = Literal["auto", "class", "all"]

NEED_DECODER = ("decoder_abs", "decoder_signed", "permuted")
NEED_CLASS = ("decoder_signed", "head_row", "class_mean")


@dataclass(frozen=True, kw_only=True)
class DecoderGuided(EditSpec):
    """Scale the channels that a feature writes to: w'_ij = w_ij max(0, 1 +- alpha c_j).

    The guide c comes from the decoder row of latent l (n_l is its norm, mu the class means):
    `decoder_abs` (the paper) |W_dec[l]|; `decoder_signed` (ours) max(0, sum over the features of
    (mu_i[l] - mu_rest[l]) W_dec[l]), which shrinks only channels that carry more of the class and
    is refused where activations can be negative. Controls: `permuted` shuffles decoder_abs,
    `head_row` is |W_i|, `class_mean` the positive part of (class mean - mean of the others) of the
    activations, without an SAE. The factors of several features multiply.

    Along the output axis whole outputs and the bias are scaled. A batch norm behind the layer then
    still subtracts its unscaled running mean, so this is not the same as gating its output.

    In a language model `module` may be a norm: its gain (and bias) is scaled, which gates what
    reads behind it. Gating the unembedding's input is `module: final_norm`, with nothing to untie;
    for Gemma 2 and 3, what attention and MLP write is gated by the norms behind them. For all
    matrices of chosen layers at once there is `ResidualScaling`.

    Args:
        feature: A latent by index, `dominant:CLASS`, `selective:CLASS/RANK` (ranks from 0), or a
            list of them; `dominant` or `selective` alone mean the target class's own. When absent,
            the dominant feature of `target_class` (`decoder_signed`: the best `signed_top_k`).
        direction: `suppress` (-) or `enhance` (+).
        rows: Output rows to change: `class` (the target's row only), `all` (equals gating the
            input), a list of classes or indices, or `auto`: `class` for the final layer where a
            class is named, else `all`.
        guide: Where c comes from.
        decoder_norm: `unit` c / |c|, so that alpha compares across features; `raw` as the paper
            writes it; `max` c / max(c), so that alpha = 1 is the first cut-off.
        axis: `input` (matrices that read the activations) or `output` (those that write them).
        signed_top_k: Latents summed by `decoder_signed` where no feature is named.
        seed: Of the permutation.
        sae: Folder of the SAE.
        features: Folder of the feature table; needed where features or classes go by name.
    """

    feature: Feature | list[Feature] | None = None
    direction: Direction = "suppress"
    rows: Rows | list[Feature] = "auto"
    guide: Guide = "decoder_abs"
    decoder_norm: DecoderNorm = "unit"
    axis: Axis = "input"
    signed_top_k: int = 10
    seed: int = 0
    sae: str | None = None
    features: str | None = None

    default_alphas: ClassVar[tuple[float, ...]] = (
        0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0, 50.0, 80.0, 120.0, 200.0, 300.0, 500.0,
        1000.0,
    )  # fmt: skip
    grid_kind: ClassVar[str] = "alpha"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signed_top_k < 1:
            raise BadConfig(f"signed_top_k is {self.signed_top_k}; it must be at least 1.")
        if isinstance(self.feature, list) and not self.feature:
            raise BadConfig("`feature` is an empty list: name at least one, or leave it out.")
        if self.axis == "output" and self.guide in NEED_CLASS:
            raise UnsupportedEdit(
                f"`guide: {self.guide}` speaks of what a class's row reads, so it edits the input "
                "axis. Use `guide: decoder_abs` for the output axis."
            )

    def resolve(self, scope: Scope) -> Resolved:
        """See `EditSpec.resolve`."""
        offset = scope.gain_offset
        if offset is not None and self.axis == "input":
            # a gain has one axis; as an output, so that what needs class rows is refused
            return replace(self, axis="output").resolve(scope)
        if offset is None and self.axis == "output":
            refuse_behind_norm(scope.name, scope.model)
        latents, guides = self._guides(scope)
        op = ScaleChannels(
            module=scope.name,
            output_dim=0 if offset is not None else scope.layout.output_dim,
            alpha=self.alpha,
            c=guides,
            sign=SIGN[self.direction],
            axis=self.axis,
            rows=self._row_indices(scope),
            has_bias=scope.has_bias,
            offset=offset or 0.0,
        )
        return Resolved((op,), latents)

    def class_named(self, scope: Scope) -> str | int | None:
        """The target class: as given, or the one class that the features name."""
        if self.target_class is not None:
            return self.target_class
        features = self.feature if isinstance(self.feature, list) else [self.feature]
        return scope.class_of(features, self.features)

    def _guides(self, scope: Scope) -> tuple[tuple[int, ...], Tensor]:
        """The latents and the guides [n_guides, d] of the edited axis."""
        target = self.class_named(scope)
        if self.guide in NEED_CLASS and target is None:
            raise BadConfig(f"`guide: {self.guide}` is about a class: set `target_class`.")
        if self.guide == "head_row":
            row = scope.class_rows("guide: head_row")[scope.target(target, self._table(scope))]
            return (), self._normalised(row.abs(), "the head row")[None]
        if self.guide == "class_mean":
            table = scope.context.table(self.features)
            scope.check_width(table.d_in, self.axis, "The feature table")
            scope.check_classes(table)
            difference = table.x_contrast(target)  # type: ignore[arg-type]
            return (), self._normalised(difference.clamp(min=0), "the class means")[None]
        sae = scope.sae(self.sae, self.axis)
        if self.guide == "decoder_signed":
            return self._signed(scope, sae)
        latents = scope.latents(self._named(scope), sae, self.features, target)
        rows = [sae.decoder_row(latent).abs() for latent in latents]
        if self.guide == "permuted":
            rows = [permuted(c, self.seed + i) for i, c in enumerate(rows)]
        return latents, torch.stack(
            [self._normalised(c, f"latent {n}") for n, c in zip(latents, rows, strict=True)]
        )

    def _signed(self, scope: Scope, sae: SaeView) -> tuple[tuple[int, ...], Tensor]:
        table = scope.context.table(self.features, sae)
        require_non_negative(table, "guide: decoder_signed")
        scope.check_classes(table)
        target = scope.target(self.class_named(scope), table)
        contrast = table.mean_contrast(target)
        if self.feature is None:
            decoder = sae.decoder()
            rows = scope.class_rows("guide: decoder_signed")
            ranked = contrast_ranking(rows, target, decoder, contrast)
            latents = tuple(ranked[: self.signed_top_k].tolist())
        else:
            latents = scope.latents(self._named(scope), sae, self.features, target)
        rows = torch.stack([sae.decoder_row(n) for n in latents])
        c = (contrast[list(latents)] @ rows).clamp(min=0)
        return latents, self._normalised(c, f"latents {latents}")[None]

    def _named(self, scope: Scope) -> list[Feature]:
        if isinstance(self.feature, list):
            return self.feature
        return [scope.feature_or_dominant(self.feature, self.target_class)]

    def _table(self, scope: Scope) -> FeatureTable | None:
        has_table = scope.context.has_features(self.features)
        return scope.context.table(self.features) if has_table else None

    def _normalised(self, c: Tensor, source: str) -> Tensor:
        return normalise(c, self.decoder_norm, source)

    def _row_indices(self, scope: Scope) -> tuple[int, ...] | None:
        """Rows to change, None for all."""
        if self.axis == "output":
            if self.rows not in ("auto", "all"):
                raise UnsupportedEdit(
                    "Along the output axis every row has its own factor: leave `rows` out."
                )
            return None
        target = self.class_named(scope)
        if self.rows == "all" or (self.rows == "auto" and (target is None or not scope.is_head)):
            return None
        table = self._table(scope)
        if self.rows in ("auto", "class"):
            scope.require_head("rows: class")
            return (scope.target(target, table),)
        if not self.rows:
            raise BadConfig("`rows` is an empty list: name at least one row, or use `all`.")
        if scope.is_head:
            return tuple(dict.fromkeys(scope.target(r, table) for r in self.rows))
        return tuple(dict.fromkeys(_plain_row(r, scope) for r in self.rows))


def _plain_row(row: str | int, scope: Scope) -> int:
    if not str(row).isdigit() or int(row) >= scope.layout.d_out:
        raise BadConfig(
            f"Row {row!r} of {scope.name!r} does not exist: give indices 0 to "
            f"{scope.layout.d_out - 1}."
        )
    return int(row)
