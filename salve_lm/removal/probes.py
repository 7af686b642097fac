"""What can be read off features about one class: linear probes, refitted heads, neighbours.

All are fitted on training features and measured on held-out ones, after standardising with the
training features' own mean and deviation. So a channel that an edit scales down by any factor
short of zero counts as being there: whoever refits a probe can scale it up again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from salve_lm.errors import BadConfig, EmptyClass, NotFinite, ShapeMismatch
from salve_lm.removal.proportion import Proportion

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sklearn.linear_model import LogisticRegression

# (x [n, d_in], label [n] int64); `evaluation.HeadInputs` is one
Samples = tuple[Tensor, Tensor]
# a channel that varies by less than this share of the largest value holds rounding errors only
# (maps are applied in float64, where a projection leaves 1e-16)
DEAD = 1e-9


@dataclass(frozen=True)
class ProbeSettings:
    """How the probes are fitted.

    Attributes:
        inverse_penalty: scikit-learn's C of every logistic regression (L2). The penalty keeps a
            probe with more channels than samples in hand.
        max_iter: L-BFGS iterations at most. A probe near its minimum will do, so running into the
            limit is no error.
        neighbours: of the k-nearest-neighbour vote (fewer where there are fewer samples).
        shots: training samples a class for the small refits.
        seeds: of their draws; one refit each.
        per_class: training samples a class at most, drawn with seed 0, to bound the time.
    """

    inverse_penalty: float = 1.0
    max_iter: int = 200
    neighbours: int = 10
    shots: int = 10
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    per_class: int = 500

    def __post_init__(self) -> None:
        counts = (self.max_iter, self.neighbours, self.shots, self.per_class)
        if min(counts) < 1 or self.inverse_penalty <= 0 or not self.seeds:
            raise BadConfig(
                "max_iter, neighbours, shots and per_class are at least 1, inverse_penalty is "
                "positive, and there is at least one seed."
            )


@dataclass(frozen=True)
class FeatureFigures:
    """What features say about one class; recalls are of that class, on held-out samples.

    Attributes:
        target: index of the class.
        auroc: of a one-vs-rest linear probe.
        few_shot: recall of a linear head refitted on a few samples a class, one a seed.
        refit: recall of a linear head refitted on all training samples.
        knn: recall of the k-nearest-neighbour vote.
        chance: the class's share of the training samples: the recall of guessing by frequency.
    """

    target: int
    auroc: float
    few_shot: tuple[float, ...]
    refit: Proportion
    knn: Proportion
    chance: float


def measure_features(
    train: Samples, val: Samples, target: int, settings: ProbeSettings | None = None
) -> FeatureFigures:
    """Fit every probe of class `target` on `train` and measure it on `val`.

    Cost: three kinds of logistic regression on at most `per_class` samples a class; about a second
    for 10 classes, 512 channels and 1,000 samples.

    Args:
        train: features [n, d_in] and labels [n].
        val: likewise, held out.
        target: index of the class.
        settings: of the probes.

    Raises:
        EmptyClass: no sample of the class in one of the two.
        BadConfig: nothing but the class in one of the two.
        ShapeMismatch: features and labels do not fit together.
        NotFinite: NaN or infinity in features.
    """
    settings = settings or ProbeSettings()
    _check(train, "train", target)
    _check(val, "val", target)
    if train[0].shape[1] != val[0].shape[1]:
        raise ShapeMismatch(
            f"Training features have {train[0].shape[1]} channels, held-out ones "
            f"{val[0].shape[1]}. Take both from the same layer."
        )
    kept = _draw(train[1].cpu(), settings.per_class, seed=0)
    y_train, y_val = train[1].cpu()[kept], val[1].cpu()
    x_train, x_val = _standardise(train[0].cpu()[kept], val[0].cpu())
    own = (y_val == target).numpy()

    def recall(fitted_on: Tensor) -> NDArray:
        x, y = x_train[fitted_on.numpy()], y_train[fitted_on].numpy()
        with _unfinished_fits_allowed():
            return _logistic(settings).fit(x, y).predict(x_val[own]) == target

    from sklearn.metrics import roc_auc_score
    from sklearn.neighbors import KNeighborsClassifier

    with _unfinished_fits_allowed():
        probe = _logistic(settings).fit(x_train, (y_train == target).numpy())
    few = [_draw(y_train, settings.shots, seed) for seed in settings.seeds]
    refit = recall(torch.arange(len(y_train)))
    vote = KNeighborsClassifier(min(settings.neighbours, len(y_train)), algorithm="brute")
    knn = vote.fit(x_train, y_train.numpy()).predict(x_val[own]) == target
    return FeatureFigures(
        target=target,
        auroc=float(roc_auc_score(own, probe.decision_function(x_val))),
        few_shot=tuple(float(recall(rows).mean()) for rows in few),
        refit=Proportion.of(int(refit.sum()), len(refit)),
        knn=Proportion.of(int(knn.sum()), len(knn)),
        chance=float((y_train == target).double().mean()),
    )


class _Standardised(NamedTuple):
    train: NDArray
    val: NDArray


def _standardise(train: Tensor, val: Tensor) -> _Standardised:
    """Both in units of the training features' deviation, float64; dead channels are zero."""
    train, val = train.detach().double(), val.detach().double()
    mean, std = train.mean(0), train.std(0, correction=0)
    alive = std > DEAD * train.abs().max()
    scale = torch.where(alive, 1 / std.where(alive, torch.ones_like(std)), torch.zeros_like(std))
    return _Standardised(((train - mean) * scale).numpy(), ((val - mean) * scale).numpy())


def _draw(label: Tensor, per_class: int, seed: int) -> Tensor:
    """Up to `per_class` rows of each class, ascending. Classes are drawn independently."""
    rows = []
    for k in label.unique().tolist():
        own = (label == k).nonzero()[:, 0]
        generator = torch.Generator().manual_seed((seed << 20) + k)
        rows.append(own[torch.randperm(len(own), generator=generator)[:per_class]])
    return torch.cat(rows).sort().values


def _logistic(settings: ProbeSettings) -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=settings.inverse_penalty, max_iter=settings.max_iter)


@contextmanager
def _unfinished_fits_allowed() -> Iterator[None]:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _check(samples: Samples, split: str, target: int) -> None:
    x, label = samples
    if x.ndim != 2 or label.shape != x.shape[:1]:
        raise ShapeMismatch(
            f"Features {tuple(x.shape)} and labels {tuple(label.shape)} of {split}: expected "
            "[n, d_in] and [n]."
        )
    if not torch.isfinite(x).all():
        raise NotFinite(f"features of {split}", "probes", "Lower alpha, or check the activations.")
    own = int((label == target).sum())
    if own == 0:
        raise EmptyClass(str(target), f"the {split} features")
    if own == len(label):
        raise BadConfig(f"The {split} features are all of class {target}. Add the other classes.")
