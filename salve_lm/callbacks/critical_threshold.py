"""Critical suppression thresholds of every class, measured during validation."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from salve_lm.alpha_crit import (
    class_flip,
    exact,
    lce_flip,
    linear,
    linear_contributions,
    lower_bound_share,
    rank_agreement,
    row_centred,
    summarise,
)
from salve_lm.callbacks.head_callback import HeadCallback
from salve_lm.callbacks.head_samples import editing_of, linear_head
from salve_lm.callbacks.tables import write_table
from salve_lm.callbacks.threshold_samples import Compute, ThresholdCapture, Thresholds
from salve_lm.callbacks.weight_editing import as_studied, class_names_of
from salve_lm.edits.context import EditContext
from salve_lm.edits.decoder_guided import DecoderGuided, Guide
from salve_lm.edits.guides import DecoderNorm
from salve_lm.edits.ops import FoldInput, ScaleChannels
from salve_lm.edits.resolve import EditPlan, plan_edits
from salve_lm.edits.spec import EditSpec
from salve_lm.errors import BadConfig, UnsupportedEdit
from salve_lm.features.table import Ranking

FILE = "critical_thresholds"
LOGGED = ("flip", "exact", "linear")


class CriticalThreshold(HeadCallback[list[Thresholds]]):
    """How strongly an edit must act before a class is lost, sample by sample (METHODS 4).

    For each class, over its own validation or test samples and in closed form from the inputs of
    the *unedited* final layer: `flip` (the class stops being the arg max; the primary one), `exact`
    and `linear` (its logit reaches zero; the paper's), and the latter two for the head with its
    mean row taken out, which does not depend on a vector that could be added to all rows.

    Logs per class `alpha_crit/CLASS/{flip,exact,linear}` (medians) and `.../no_root` (share of the
    counted samples that no strength flips). Keeps everything in `rows`, and writes it to
    `critical_thresholds.csv` and `.json` in `out`: median, quartiles and share without a root for
    each definition, the share of samples left out (not assigned to the class before), the share
    that returns at a larger alpha, the share for which `linear` is a lower bound, and rank
    correlations between definitions.

    Each sample counts once, also where a distributed sampler repeats some. The samples are not
    kept, only their thresholds: 49 bytes a sample beside a buffer of 128 MiB, whatever the width of
    the layer.

    Args:
        sae: Folder of the SAE.
        features: Folder of the feature table.
        feature: Which latent of each class: `dominant` or `selective`.
        rows: Rows that the edit changes: `class` or `all`.
        guide: See `DecoderGuided`.
        decoder_norm: See `DecoderGuided`.
        edits: Edits to take instead, each about one class: suppressing `DecoderGuided` with one
            feature, or edits that fold into the head (LatentContrastErasure, DirectionalAblation),
            which have a `flip` only. Their alpha does not matter.
        out: Folder for the tables; those of an earlier evaluation are replaced.
    """

    def __init__(
        self,
        sae: str | None = None,
        features: str | None = None,
        feature: Ranking = "dominant",
        rows: str = "class",
        guide: Guide = "decoder_abs",
        decoder_norm: DecoderNorm = "unit",
        edits: list[EditSpec] | None = None,
        out: str | None = None,
    ) -> None:
        super().__init__()
        if rows not in ("class", "all"):
            raise BadConfig(f"rows is {rows!r}; use `class` or `all`.")
        if edits is not None and not edits:
            raise BadConfig("`edits` is an empty list: name at least one, or leave it out.")
        self.context = EditContext(sae, features)
        self.edits = edits
        self.out = out
        self.rows: list[dict[str, Any]] = []
        self._measured: list[EditPlan] = []
        self._options: dict[str, Any] = {
            "feature": feature, "rows": rows, "guide": guide, "decoder_norm": decoder_norm
        }  # fmt: skip

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the edits once, before hours are spent."""
        self._plans(trainer, pl_module)

    def capture(self, trainer: Trainer, pl_module: LightningModule) -> ThresholdCapture:
        """Compute thresholds while the batches pass."""
        return ThresholdCapture(
            trainer, pl_module, type(self).__name__, lambda: self._prepared(trainer, pl_module)
        )

    def report(
        self, trainer: Trainer, pl_module: LightningModule, samples: list[Thresholds]
    ) -> None:
        """Log and write the thresholds of one evaluation."""
        names = class_names_of(trainer, pl_module)
        self.rows = []
        for plan, found in zip(self._measured, samples, strict=True):
            name = str(plan.target) if names is None else names[int(plan.target or 0)]
            self.rows.append(self._row(plan, name, found))
        self._log(pl_module)
        if self.out is not None and trainer.is_global_zero:
            write_table(self.out, FILE, self.rows)

    def _prepared(self, trainer: Trainer, pl_module: LightningModule) -> list[Compute]:
        """The edits, against the original weights."""
        editing = editing_of(trainer)
        studied = as_studied(pl_module, type(self).__name__)
        head = linear_head(studied, type(self).__name__)
        originals = editing.originals if editing is not None else {}
        name = studied.head_name
        # copies: live tensors would change with later edits
        W = originals.get(f"{name}.weight", head.weight).detach().cpu().double().clone()
        bias = originals.get(f"{name}.bias", head.bias)
        b = torch.zeros(len(W)).double() if bias is None else bias.detach().cpu().double().clone()
        with contextlib.nullcontext() if editing is None else editing.suspended():
            self._measured = self._plans(trainer, pl_module)
        edits = []
        for plan in self._measured:
            if plan.target is None:
                raise BadConfig(f"{plan.spec.title} names no class: set its `target_class`.")
            at = partial(thresholds, W=W, b=b, plan=plan, target=plan.target)
            edits.append(Compute(plan.target, at))
        return edits

    def _plans(self, trainer: Trainer, pl_module: LightningModule) -> list[EditPlan]:
        studied = as_studied(pl_module, type(self).__name__)
        head = linear_head(studied, type(self).__name__)
        names = class_names_of(trainer, pl_module)
        edits = self.edits or [
            DecoderGuided(target_class=k, **self._options) for k in range(head.out_features)
        ]
        plans = plan_edits(edits, studied, self.context, names)
        for plan in plans:
            check_closed_form(plan, str(studied.head_name))
        return plans

    def _row(self, plan: EditPlan, name: str, found: Thresholds) -> dict[str, Any]:
        row: dict[str, Any] = {
            "class": name,
            "label": plan.target,
            "edit": plan.spec.title,
            "feature": " ".join(map(str, plan.features)),
            "samples": len(found.flip.alpha),
            "left_out_share": found.flip.left_out_share,
            "re_entry_share": found.flip.re_entry_share,
        }
        for definition, alpha in found.by_definition.items():
            summary = summarise(alpha)
            for key in ("median", "q25", "q75", "no_root_share"):
                row[f"{definition}_{key}"] = getattr(summary, key)
        of = found.by_definition
        if "exact" in of:
            row["linear_is_lower_bound_share"] = lower_bound_share(of["linear"], of["exact"])
            for first, second in (
                ("flip", "exact"),
                ("flip", "exact_centred"),
                ("exact", "linear"),
            ):
                row[f"rank_{first}_{second}"] = rank_agreement(of[first], of[second])
        return row

    def _log(self, pl_module: LightningModule) -> None:
        for row in self.rows:
            if row["samples"] == 0:
                continue
            values = {d: row.get(f"{d}_median") for d in LOGGED}
            values["no_root"] = row["flip_no_root_share"]
            for key, value in values.items():
                if value is not None:
                    # equal on every rank already; sync_dist only silences the advice to set it
                    pl_module.log(
                        f"alpha_crit/{row['class']}/{key}", torch.tensor(value), sync_dist=True
                    )


def thresholds(x: Tensor, W: Tensor, b: Tensor, plan: EditPlan, target: int) -> Thresholds:
    """Thresholds of samples `x` [n, d_in] of class `target` under the edit of `plan`.

    Args:
        x: inputs of the final layer.
        W: its weight [n_classes, d_in], float64.
        b: its bias [n_classes], float64.
        plan: an edit of that layer.
        target: index of the class.
    """
    op = plan.ops[0]
    if isinstance(op, FoldInput):
        x = x.double()
        s = torch.full((len(x),), op.offset).double() if op.q is None else x @ op.q + op.offset
        flip = lce_flip(x @ W.T + b, W, op.v, s, target)
        return Thresholds({"flip": flip.alpha}, flip)
    if not isinstance(op, ScaleChannels):
        raise UnsupportedEdit(f"{plan.spec.title} has no thresholds.")
    c = op.c[0]
    flip = class_flip(x, W, b, c, target, "all" if op.rows is None else op.rows)
    definitions = {"flip": flip.alpha}
    for suffix, head in (("", (W, b)), ("_centred", row_centred(W, b))):
        u = linear_contributions(x, head[0][target])
        bias = head[1][target].expand(len(x))
        if op.rows is not None and target not in op.rows:
            # the class's own row stays as it is, so its logit does not move
            u, bias = torch.zeros_like(u), bias + u.sum(1)
        definitions[f"exact{suffix}"] = exact(u, bias, c)
        definitions[f"linear{suffix}"] = linear(u, bias, c)
    return Thresholds(definitions, flip)


def check_closed_form(plan: EditPlan, head_name: str) -> None:
    """Raise `UnsupportedEdit` where `thresholds` is not defined for the edit of `plan`."""
    op = plan.ops[0]
    one_guide = (
        isinstance(op, ScaleChannels) and op.axis == "input" and len(op.c) == 1 and op.sign < 0
    )
    if len(plan.ops) != 1 or op.module != head_name or not (one_guide or isinstance(op, FoldInput)):
        raise UnsupportedEdit(
            f"{plan.spec.title} has no closed-form threshold. Give suppressing edits of the final "
            "layer with one feature each (use salve_lm.alpha_crit.searched for others)."
        )
