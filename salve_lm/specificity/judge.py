"""Does a layer score foretell what injecting a task vector into those layers gains?

Three readings of the same runs: `single` (inject into that layer alone), `all_but_one` (what is
lost when only that layer is left out) and `windows` (runs of neighbouring layers against the mean
score in them). Rank correlations, with p from permuting the scores over the layers: windows
overlap, so their gains are not independent, but under the null the layers' scores are exchangeable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from salve_lm.errors import BadConfig

Array = NDArray[Any]
Layers = tuple[int, ...]
Kind = Literal["single", "all_but_one", "windows"]
KINDS: tuple[Kind, ...] = ("single", "all_but_one", "windows")
EXACT_UP_TO = 8
"""Layers whose permutations are all tried (8! = 40,320); beyond, they are drawn."""
LEVEL = 0.05


@dataclass(frozen=True)
class RankCorrelation:
    """Agreement in rank of one score with one kind of measured gain.

    Attributes:
        score: name of the score.
        kind: which gains.
        n: number of points.
        spearman: rho; NaN where all scores or all gains are equal.
        spearman_p: two-sided, from permutations of the layers.
        kendall: tau-b; NaN as above.
        kendall_p: two-sided, from the same permutations.
        exact: whether all permutations were tried.
        smallest_p: the smallest p that so many layers permit.
        words: what that means.
    """

    score: str
    kind: Kind
    n: int
    spearman: float
    spearman_p: float
    kendall: float
    kendall_p: float
    exact: bool
    smallest_p: float
    words: str


def layer_gains(
    gains: Mapping[Layers, float], n_layers_all: int
) -> dict[Kind, dict[Layers, float]]:
    """Sort the measured gains of injecting into sets of layers by what they can be judged on.

    Args:
        gains: layers injected into -> gain over the base model, higher is better.
        n_layers_all: number of layers of the model.

    Returns:
        `single`: (layer,) -> gain. `all_but_one`: (layer,) -> gain of all layers minus the gain
        without that one. `windows`: (first, ..., last) -> gain, of two or more neighbours, not all.
    """
    sets = {tuple(sorted(set(s))): float(g) for s, g in gains.items()}
    everything = tuple(range(n_layers_all))
    found: dict[Kind, dict[Layers, float]] = {kind: {} for kind in KINDS}
    for layers, gain in sorted(sets.items()):
        if len(layers) == 1:
            found["single"][layers] = gain
        is_window = layers == tuple(range(layers[0], layers[-1] + 1)) if layers else False
        if is_window and 1 < len(layers) < n_layers_all:
            found["windows"][layers] = gain
        left_out = set(everything) - set(layers)
        if len(left_out) == 1 and everything in sets:
            found["all_but_one"][(left_out.pop(),)] = sets[everything] - gain
    return found


def rank_correlations(
    scores: Mapping[str, Mapping[int, float]],
    gains: Mapping[Layers, float],
    n_layers_all: int,
    *,
    draws: int = 20_000,
    seed: int = 0,
) -> list[RankCorrelation]:
    """Rank correlation of every score with every kind of gain that was measured.

    Args:
        scores: name -> layer -> score.
        gains: layers injected into -> gain over the base model, higher is better.
        n_layers_all: number of layers of the model.
        draws: permutations drawn where there are too many to try all.
        seed: of the draws.

    Raises:
        BadConfig: no kind of gain covers three sets of scored layers.
    """
    kinds = layer_gains(gains, n_layers_all)
    found = []
    for name, by_layer in scores.items():
        for kind, measured in kinds.items():
            usable = {s: g for s, g in measured.items() if all(n in by_layer for n in s)}
            if len(usable) >= 3:
                found.append(_correlate(name, by_layer, kind, usable, draws, seed))
    if not found:
        raise BadConfig(
            "No rank correlation can be computed: measure the gain of at least three single "
            "layers that have a score (or leave out each of three, or three windows)."
        )
    return found


def smallest_p(n: int) -> float:
    """The smallest two-sided p of a rank correlation of n untied layers: 2 / n!.

    4 layers cannot reach 0.05 (0.083); of 5, only the perfect order does; of 6, rho >= 0.886.
    """
    return min(1.0, 2 / math.factorial(n))


def critical_spearman(n: int, level: float = LEVEL) -> float | None:
    """The smallest |rho| whose exact two-sided p is at most `level`, for up to 8 untied layers.

    None where no order of n layers reaches it.
    """
    if not 2 <= n <= EXACT_UP_TO:
        raise BadConfig(f"All orders of {n} layers cannot be tried; use 2 to {EXACT_UP_TO}.")
    rho = np.abs(_spearman(_all_orders(n).astype(float), np.arange(n)))
    for value in np.unique(rho.round(9)):
        if (rho >= value - 1e-8).mean() <= level:
            return float(value)
    return None


def _correlate(
    name: str,
    by_layer: Mapping[int, float],
    kind: Kind,
    measured: Mapping[Layers, float],
    draws: int,
    seed: int,
) -> RankCorrelation:
    layers = sorted({n for s in measured for n in s})
    place = {n: i for i, n in enumerate(layers)}
    member = np.zeros((len(measured), len(layers)))
    for row, s in enumerate(measured):
        member[row, [place[n] for n in s]] = 1 / len(s)
    score = np.array([by_layer[n] for n in layers])
    gain = np.array(list(measured.values()))
    if not (np.isfinite(score).all() and np.isfinite(gain).all()):
        raise BadConfig(f"A score or gain of {name!r} ({kind}) is NaN or infinite.")
    exact = len(layers) <= EXACT_UP_TO
    if exact:
        orders = _all_orders(len(layers))
    else:
        generator = np.random.default_rng(seed)
        drawn = generator.permuted(np.tile(np.arange(len(layers)), (draws, 1)), axis=1)
        orders = np.concatenate([np.arange(len(layers))[None], drawn])
    # the first order is the one observed
    points = score[orders] @ member.T
    rho, tau = _spearman(points, gain), _kendall(points, gain)
    p, least = _two_sided(rho), _smallest(rho)
    return RankCorrelation(
        score=name,
        kind=kind,
        n=len(measured),
        spearman=float(rho[0]),
        spearman_p=p,
        kendall=float(tau[0]),
        kendall_p=_two_sided(tau),
        exact=exact,
        smallest_p=least,
        words=_words(len(layers), kind, float(rho[0]), p, least),
    )


def _words(n: int, kind: Kind, rho: float, p: float, least: float) -> str:
    if math.isnan(rho):
        return "All scores or all gains are equal: there is no order to compare."
    if least > LEVEL:
        return f"{n} layers permit no p below {least:.2g}: whatever the order, it proves nothing."
    direction = "the higher the score the higher the gain" if rho > 0 else "high scores gain less"
    if p <= LEVEL:
        return f"{direction} (p = {p:.2g})."
    note = (
        " Of 5 layers only the perfect order reaches 0.05." if n == 5 and kind != "windows" else ""
    )
    return f"No relation shown (p = {p:.2g}).{note}"


def _all_orders(n: int) -> Array:
    return np.array(list(permutations(range(n))))


def _spearman(points: Array, gain: Array) -> Array:
    """Spearman's rho of each row of `points` [orders, n] with `gain` [n]; NaN where constant."""
    from scipy.stats import rankdata

    a = rankdata(_untangled(points), axis=1)
    b = rankdata(gain)
    a -= a.mean(1, keepdims=True)
    b -= b.mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((a @ b) / np.sqrt((a**2).sum(1) * (b**2).sum()))


def _kendall(points: Array, gain: Array) -> Array:
    """Kendall's tau-b of each row of `points` [orders, n] with `gain` [n]; NaN where constant."""
    points = _untangled(points)
    i, j = np.triu_indices(len(gain), 1)
    b = np.sign(gain[i] - gain[j])
    concordance, pairs = np.zeros(len(points)), np.zeros(len(points))
    for k in range(len(b)):
        a = np.sign(points[:, i[k]] - points[:, j[k]])
        concordance += a * b[k]
        pairs += a != 0
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(concordance / np.sqrt(pairs * np.count_nonzero(b)))


def _untangled(points: Array) -> Array:
    # means of the same layers in another order differ in their last bits, which makes no tie of one
    scale = np.abs(points).max() or 1.0
    return np.asarray((points / scale).round(12))


def _two_sided(values: Array) -> float:
    """Share of the orders at least as extreme as the first, which is among them."""
    if math.isnan(values[0]):
        return math.nan
    return float((np.abs(values) >= abs(values[0]) - 1e-9).mean())


def _smallest(values: Array) -> float:
    if math.isnan(values[0]):
        return 1.0
    extreme = np.nanmax(np.abs(values))
    return float((np.abs(values) >= extreme - 1e-9).mean())
