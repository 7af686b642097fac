"""The figures of one edit, and the label that follows from them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from salve_lm.errors import BadConfig, EmptyClass, ShapeMismatch
from salve_lm.removal.feature_map import FeatureMap
from salve_lm.removal.probes import FeatureFigures, ProbeSettings, Samples, measure_features
from salve_lm.removal.proportion import Proportion

Label = Literal["not suppressed", "suppressed", "linearly erased", "removed"]
# (W [n_classes, d_in], b [n_classes] or None)
Head = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Thresholds:
    """Where one label ends and the next begins. The stronger a claim, the more it must show.

    Attributes:
        low_recall: the edit suppresses if at most this share of the class's samples are still
            called so, and fewer than before. 0.1: one in ten, a guess among ten classes.
        erased_at_most: it erases linearly if recoverability is at most this. 0.2 is an AUROC of 0.6
            where the class was perfectly readable: three standard errors above chance for 100
            held-out samples of the class. Anything above counts as suppressed.
        chance_margin: it removes if the *upper* bounds of both held-out recalls, of the refitted
            head and of the nearest neighbours, lie within this of chance. So a few samples cannot
            prove a removal: with ten classes it takes at least 17 held-out samples of the class.
        min_auroc: below this, the original features do not hold the class to begin with;
            recoverability is then NaN, and the claim stops at suppressed.
    """

    low_recall: float = 0.1
    erased_at_most: float = 0.2
    chance_margin: float = 0.1
    min_auroc: float = 0.6

    def __post_init__(self) -> None:
        within = all(0 <= v <= 1 for v in asdict(self).values())
        if not within or self.min_auroc <= 0.5:
            raise BadConfig("Thresholds lie between 0 and 1, and min_auroc above 0.5.")


@dataclass(frozen=True)
class RemovalReport:
    """What one edit did to one class (METHODS 3c), on held-out samples.

    Attributes:
        label: the verdict.
        target: index of the class.
        recoverability: (AUROC of a linear probe on T(x) - 0.5) / (the same on x - 0.5). 1: all
            there; 0: gone for linear read-outs; below 0 by chance. NaN: not there before.
        target_before: share of the class's samples called so by the original head.
        target_after: by the edited one.
        runner_up: of the predictions that changed, the share that went to the sample's old
            runner-up; 1 is the mark of an edit of the class's own logit.
        before: what the original features x say about the class.
        after: what T(x) says.
    """

    label: Label
    target: int
    recoverability: float
    target_before: Proportion
    target_after: Proportion
    runner_up: Proportion
    before: FeatureFigures
    after: FeatureFigures

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON: proportions as dicts, NaN as None."""
        shares = ("target_before", "target_after", "runner_up")
        return {
            "label": self.label,
            "target": self.target,
            "recoverability": _plain(self.recoverability),
            "runner_up_share": _plain(self.runner_up.share),
            **{name: _plain(getattr(self, name)) for name in shares},
            "before": {name: _plain(v) for name, v in vars(self.before).items()},
            "after": {name: _plain(v) for name, v in vars(self.after).items()},
        }


def assess(
    train: Samples,
    val: Samples,
    head: Head,
    edited: Head,
    target: int,
    *,
    feature_map: FeatureMap | None = None,
    original: FeatureFigures | None = None,
    probes: ProbeSettings | None = None,
    thresholds: Thresholds | None = None,
) -> RemovalReport:
    """Assess one edit of a linear head.

    Args:
        train: inputs of the head [n, d_in] and labels [n]; the probes are fitted on these.
        val: likewise, held out; everything is measured on these.
        head: original weight [n_classes, d_in] and bias [n_classes] (or None).
        edited: the same after the edit.
        target: index of the class that the edit is about.
        feature_map: T, what the edit amounts to on the inputs, from `feature_map(plan.ops, ...)`;
            None is the identity, as for edits of single rows.
        original: `measure_features(train, val, target, probes)` where it is at hand: it is the same
            for all edits of a class, and an edit with T = identity then costs next to nothing.
        probes: settings of the probes.
        thresholds: of the labels.

    Raises:
        SalveError: as `measure_features` and `judge`.
    """
    before = original or measure_features(train, val, target, probes)
    after = before
    if feature_map is not None:
        # in float64: in float32 an erased direction would leave rounding errors that follow it
        mapped = [(feature_map(x.cpu().double()), label) for x, label in (train, val)]
        after = measure_features(mapped[0], mapped[1], target, probes)
    x, label = val
    logits = [torch.nn.functional.linear(x, w, b) for w, b in (head, edited)]
    return judge(before, after, logits[0], logits[1], label, thresholds)


def judge(
    before: FeatureFigures,
    after: FeatureFigures,
    logits_before: Tensor,
    logits_after: Tensor,
    label: Tensor,
    thresholds: Thresholds | None = None,
) -> RemovalReport:
    """The report of any edit, also of layers before the head, from features and logits measured.

    Args:
        before: figures of the original network's features.
        after: figures of the edited network's features, of the same class.
        logits_before: held-out logits [n, n_classes] of the original network.
        logits_after: of the edited one, for the same samples in the same order.
        label: [n].
        thresholds: of the labels.

    Raises:
        BadConfig: figures of two classes, or of different training sets.
        EmptyClass: no held-out sample of the class.
        ShapeMismatch: logits and labels do not fit together.
    """
    thresholds = thresholds or Thresholds()
    target = before.target
    if after.target != target:
        raise BadConfig(f"Figures of class {target} before and of {after.target} after the edit.")
    if logits_before.shape != logits_after.shape or logits_before.shape[:1] != label.shape:
        raise ShapeMismatch(
            f"Logits {tuple(logits_before.shape)} and {tuple(logits_after.shape)} for "
            f"{tuple(label.shape)} labels: pass those of the same samples."
        )
    own = label == target
    if not own.any():
        raise EmptyClass(str(target), "the held-out samples")
    recall_before, recall_after = (
        Proportion.of_mask(z[own].argmax(1) == target) for z in (logits_before, logits_after)
    )
    recoverability = float("nan")
    if before.auroc >= thresholds.min_auroc:
        recoverability = (after.auroc - 0.5) / (before.auroc - 0.5)
    return RemovalReport(
        label=_label(recall_before, recall_after, recoverability, after, thresholds),
        target=target,
        recoverability=recoverability,
        target_before=recall_before,
        target_after=recall_after,
        runner_up=runner_up_share(logits_before, logits_after),
        before=before,
        after=after,
    )


def runner_up_share(before: Tensor, after: Tensor) -> Proportion:
    """Of the predictions that changed, the share that went to the sample's old second choice.

    Args:
        before: logits [n, n_classes].
        after: of the same samples.

    Raises:
        ShapeMismatch: fewer than two classes.
    """
    if before.ndim != 2 or before.shape[1] < 2:
        raise ShapeMismatch(f"Logits {tuple(before.shape)}; a runner-up needs [n, 2 or more].")
    first, now = before.argmax(1), after.argmax(1)
    second = before.scatter(1, first[:, None], float("-inf")).argmax(1)
    return Proportion.of_mask((now == second)[now != first])


def _label(
    recall_before: Proportion,
    recall_after: Proportion,
    recoverability: float,
    after: FeatureFigures,
    thresholds: Thresholds,
) -> Label:
    low = recall_after.share <= thresholds.low_recall
    if not low or recall_after.successes >= recall_before.successes:
        return "not suppressed"
    if math.isnan(recoverability) or recoverability > thresholds.erased_at_most:
        return "suppressed"
    at_most = after.chance + thresholds.chance_margin
    if after.refit.high <= at_most and after.knn.high <= at_most:
        return "removed"
    return "linearly erased"


def _plain(value: Any) -> Any:
    if isinstance(value, Proportion):
        return {name: _plain(v) for name, v in value._asdict().items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
