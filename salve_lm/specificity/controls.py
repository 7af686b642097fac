"""Which other layers to try beside the chosen ones, and whether the choice beat them.

A choice of layers is a finding only if it beats layers chosen at random. Where the other subsets
of the same size are few, all of them are tried: the rank among them is then exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from salve_lm.errors import BadConfig

FEWEST_DRAWS = 20
LEVEL = 0.05


@dataclass(frozen=True)
class ControlLayers:
    """The layer sets of one comparison, each ascending.

    Attributes:
        chosen: the selection.
        all_layers: every layer.
        least_specific: as many layers as chosen, those of the lowest score.
        random_layers: other subsets of that size, in lexicographic order.
        exhaustive: whether `random_layers` are all of them.
    """

    chosen: tuple[int, ...]
    all_layers: tuple[int, ...]
    least_specific: tuple[int, ...]
    random_layers: tuple[tuple[int, ...], ...]
    exhaustive: bool


@dataclass(frozen=True)
class Verdict:
    """Whether the chosen layers beat the others.

    Attributes:
        rank: of the chosen among all compared subsets, 1 the best; ties count against them.
        compared: number of other subsets.
        p: (1 + number of others at least as good) / (1 + number of others).
        smallest_p: the smallest p that so many subsets permit.
        beats_random: p <= 0.05.
        words: the same as a sentence.
    """

    rank: int
    compared: int
    p: float
    smallest_p: float
    beats_random: bool
    words: str


def control_layers(
    scores: Mapping[int, float], chosen: Sequence[int], *, at_most: int = 50, seed: int = 0
) -> ControlLayers:
    """The layer sets to inject into beside the chosen ones.

    Args:
        scores: layer -> score, of every layer that could have been chosen.
        chosen: the selection.
        at_most: all other subsets of the same size where they are no more than this; otherwise
            this many different ones, drawn at random.
        seed: of the draw.

    Raises:
        BadConfig: nothing or everything was chosen, a layer without a score, or `at_most` < 20.
    """
    layers, picked = tuple(sorted(scores)), tuple(sorted(set(chosen)))
    if at_most < FEWEST_DRAWS:
        raise BadConfig(f"at_most is {at_most}; fewer than {FEWEST_DRAWS} subsets prove nothing.")
    unknown = [n for n in picked if n not in scores]
    if unknown:
        raise BadConfig(f"Chosen layers without a score: {unknown}. Known: {list(layers)}.")
    if not 0 < len(picked) < len(layers):
        raise BadConfig(
            f"{len(picked)} of {len(layers)} layers are chosen, so there is no other subset of "
            "that size to compare with. Choose some of the layers, not none or all."
        )
    others = math.comb(len(layers), len(picked)) - 1
    exhaustive = others <= at_most
    if exhaustive:
        found = [s for s in combinations(layers, len(picked)) if s != picked]
    else:
        found = _drawn(layers, picked, at_most, seed)
    by_score = sorted(layers, key=lambda n: (scores[n], n))
    least = tuple(sorted(by_score[: len(picked)]))
    return ControlLayers(picked, layers, least, tuple(found), exhaustive)


def judge_choice(
    chosen: Sequence[int],
    gain: float,
    others: Mapping[tuple[int, ...], float],
    *,
    exhaustive: bool,
    unit: str = "",
) -> Verdict:
    """Compare the gain of the chosen layers with that of other subsets of the same size.

    Args:
        chosen: the selection.
        gain: its measured gain, higher is better (for a loss: before minus after).
        others: subset -> its gain.
        exhaustive: whether `others` are all other subsets of that size.
        unit: of the gain, for the words.

    Raises:
        BadConfig: no others, subsets of another size, the chosen one among them, or NaN.
    """
    mine = tuple(sorted(set(chosen)))
    sizes = {len(set(s)) for s in others}
    if sizes != {len(mine)} or mine in {tuple(sorted(s)) for s in others}:
        raise BadConfig(
            "Compare the chosen layers with other subsets of the same size, at least one."
        )
    if not all(math.isfinite(g) for g in (gain, *others.values())):
        raise BadConfig("A gain is NaN or infinite. Evaluate that subset again.")
    as_good = sum(g >= gain for g in others.values())
    n = len(others)
    p, smallest = (1 + as_good) / (1 + n), 1 / (1 + n)
    verdict = Verdict(as_good + 1, n, p, smallest, p <= LEVEL, "")
    words = _in_words(verdict, mine, gain, others, exhaustive, unit)
    return Verdict(as_good + 1, n, p, smallest, p <= LEVEL, words)


def _in_words(
    verdict: Verdict,
    chosen: tuple[int, ...],
    gain: float,
    others: Mapping[tuple[int, ...], float],
    exhaustive: bool,
    unit: str,
) -> str:
    def amount(value: float) -> str:
        return f"{value:+.4g}{' ' + unit if unit else ''}"

    best = max(others, key=lambda s: others[s])
    n, size = verdict.compared, len(chosen)
    pool = f"all {n + 1} subsets" if exhaustive else f"{n + 1} subsets ({n} drawn at random)"
    said = (
        f"Layers {_listed(chosen)} gained {amount(gain)}: rank {verdict.rank} of {pool} of "
        f"{size} {'layer' if size == 1 else 'layers'}, p = {verdict.p:.3g}. The others gained "
        f"{amount(float(np.mean(list(others.values()))))} on average, the best of them "
        f"({_listed(best)}) {amount(others[best])}."
    )
    if verdict.beats_random:
        end = "The choice beat random layers."
    elif verdict.rank == 1:
        end = (
            f"The choice is the best subset, but so few subsets permit no p below "
            f"{verdict.smallest_p:.2g}: this alone does not show that it beats random layers."
        )
    else:
        end = "The choice did not beat random layers: this selection is not a finding."
    if gain <= 0:
        end += " It gained nothing over the base model either."
    return f"{said} {end}"


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _drawn(
    layers: tuple[int, ...], chosen: tuple[int, ...], draws: int, seed: int
) -> list[tuple[int, ...]]:
    generator = np.random.default_rng(seed)
    found: set[tuple[int, ...]] = set()
    while len(found) < draws:
        drawn = generator.choice(len(layers), size=len(chosen), replace=False)
        subset = tuple(sorted(layers[i] for i in drawn))
        if subset != chosen:
            found.add(subset)
    return sorted(found)
