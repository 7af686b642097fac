from __future__ import annotations

import math
from itertools import combinations

import pytest

from salve_lm.errors import BadConfig
from salve_lm.specificity.controls import control_layers, judge_choice

FIVE = {0: 0.3, 1: 0.9, 2: 0.1, 3: 0.8, 4: 0.2}


def test_every_other_subset_of_few_layers() -> None:
    found = control_layers(FIVE, [3, 1])
    assert found.chosen == (1, 3)
    assert found.all_layers == (0, 1, 2, 3, 4)
    assert found.least_specific == (2, 4)
    assert found.exhaustive
    assert {*found.random_layers, (1, 3)} == set(combinations(range(5), 2))


def test_draws_of_many_are_different_and_repeatable() -> None:
    scores = {n: float(n) for n in range(34)}
    found = control_layers(scores, range(30, 34), at_most=25, seed=1)
    assert not found.exhaustive
    assert len(set(found.random_layers)) == 25
    assert all(len(set(s)) == 4 and s == tuple(sorted(s)) for s in found.random_layers)
    assert (30, 31, 32, 33) not in found.random_layers
    assert found == control_layers(scores, range(30, 34), at_most=25, seed=1)
    assert found != control_layers(scores, range(30, 34), at_most=25, seed=2)
    used = {n for s in found.random_layers for n in s}
    assert len(used) > 25


@pytest.mark.parametrize(
    ("chosen", "options", "words"),
    [
        ([], {}, "0 of 5 layers"),
        (range(5), {}, "no other subset"),
        ([7], {}, r"without a score: \[7\]"),
        ([1], {"at_most": 5}, "fewer than 20"),
    ],
)
def test_choices_without_controls(chosen, options, words) -> None:
    with pytest.raises(BadConfig, match=words):
        control_layers(FIVE, chosen, **options)


def test_words_say_whether_random_layers_were_beaten() -> None:
    others = {(i,): i / 100 for i in range(1, 40)}
    best = judge_choice([50], 1.0, others, exhaustive=False, unit="nats")
    assert (best.rank, best.compared, best.p, best.beats_random) == (1, 39, 1 / 40, True)
    assert best.words.endswith("The choice beat random layers.")
    assert "+1 nats: rank 1 of 40 subsets (39 drawn at random) of 1 layer, p = 0.025" in best.words
    middle = judge_choice([50], 0.2, others, exhaustive=True)
    # 20 others are at least as good, one of them equal
    assert (middle.rank, middle.p, middle.beats_random) == (21, 21 / 40, False)
    assert "not a finding" in middle.words and "all 40 subsets" in middle.words
    losing = judge_choice([50], -0.2, others, exhaustive=True)
    assert "gained nothing over the base model" in losing.words


def test_the_best_of_few_proves_nothing() -> None:
    others = dict.fromkeys(combinations(range(5), 2), 0.0)
    del others[(1, 3)]
    found = judge_choice([1, 3], 1.0, others, exhaustive=True)
    assert found.rank == 1 and found.p == found.smallest_p == 0.1 and not found.beats_random
    assert "permit no p below 0.1" in found.words


def test_other_comparisons_are_refused() -> None:
    for others in ({}, {(1, 2): 0.0}, {(3,): 0.0}):
        with pytest.raises(BadConfig, match="other subsets of the same size"):
            judge_choice([3], 1.0, others, exhaustive=True)
    with pytest.raises(BadConfig, match="NaN"):
        judge_choice([3], 1.0, {(1,): math.nan}, exhaustive=True)
