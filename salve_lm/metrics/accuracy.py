"""Accuracy per class, and what an edit of one class does to the others."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from salve_lm.errors import ShapeMismatch


def predicted_classes(predictions: Tensor) -> Tensor:
    """Class indices [n] of logits or probabilities [n, n_classes], or of indices [n] themselves."""
    return predictions.argmax(dim=1) if predictions.ndim == 2 else predictions


class _ClassCounts(Metric):
    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    correct: Tensor
    total: Tensor

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.n_classes = n_classes
        zeros = torch.zeros(n_classes, dtype=torch.int64)
        self.add_state("correct", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("total", zeros.clone(), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, target: Tensor) -> None:
        """Add predictions (logits [n, n_classes] or classes [n]) and true classes [n].

        Raises:
            ShapeMismatch: another number of classes, or predictions and targets of two lengths.
        """
        if predictions.ndim == 2 and predictions.shape[1] != self.n_classes:
            raise ShapeMismatch(
                f"Accuracy over {self.n_classes} classes got logits of {predictions.shape[1]}. "
                "Give the model and the data the same classes."
            )
        if predictions.shape[0] != target.shape[0]:
            raise ShapeMismatch(
                f"Accuracy got {predictions.shape[0]} predictions for {target.shape[0]} targets."
            )
        if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < self.n_classes:
            raise ShapeMismatch(
                f"Accuracy over {self.n_classes} classes got targets from {int(target.min())} to "
                f"{int(target.max())}. Give the model and the data the same classes."
            )
        hits = predicted_classes(predictions) == target
        self.total += torch.bincount(target, minlength=self.n_classes)
        self.correct += torch.bincount(target[hits], minlength=self.n_classes)


class PerClassAccuracy(_ClassCounts):
    """Share of each class's samples that are predicted right (its recall).

    Args:
        n_classes: number of classes.
    """

    def compute(self) -> Tensor:
        """Accuracies [n_classes]; NaN for a class without samples."""
        return (self.correct.double() / self.total).float()


class SpilloverAccuracy(_ClassCounts):
    """Accuracy on an edit's target class, and on the samples of all other classes together.

    Args:
        n_classes: number of classes.
        target_class: index of the class that the edit is about.
    """

    def __init__(self, n_classes: int, target_class: int) -> None:
        super().__init__(n_classes)
        if not 0 <= target_class < n_classes:
            raise ShapeMismatch(
                f"Target class {target_class} does not lie between 0 and {n_classes - 1}."
            )
        self.target_class = target_class

    def compute(self) -> dict[str, Tensor]:
        """`{"target": [], "other": []}`; NaN where there are no samples."""
        correct, total = self.correct.double(), self.total
        k = self.target_class
        return {
            "target": (correct[k] / total[k]).float(),
            "other": ((correct.sum() - correct[k]) / (total.sum() - total[k])).float(),
        }
