from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from salve_lm.errors import BadConfig
from salve_lm.specificity.bootstrap import (
    Bootstrap,
    contrast_to_mean,
    documents_needed,
    interval,
    resampled_weights,
    resamples_needed,
)
from salve_lm.specificity.latents import LayerSums
from salve_lm.specificity.scores import LatentShift, MassShare
from salve_lm.specificity.selection import LayerChoice, rank_layers
from tests.specificity.made import layer, sums_of


def planted(strengths: list[float], n: int = 60, seed: int = 0) -> list[LayerSums]:
    """Layers in which a share of the latents' mass belongs to the task alone."""
    generator = torch.Generator().manual_seed(seed)
    document = torch.arange(n)
    amount = torch.rand(n, 1, generator=generator) + 0.5
    layers = []
    for i, strength in enumerate(strengths):
        noise = torch.rand(n, 8, generator=generator)
        task = torch.cat([amount * strength * 8, noise], dim=1)
        reference = torch.cat([torch.zeros(n, 1), torch.rand(n, 8, generator=generator)], dim=1)
        layers.append(LayerSums(i, sums_of(document, task, n), sums_of(document, reference, n)))
    return layers


def test_draws_are_multinomial_and_the_same_for_all_layers() -> None:
    w = resampled_weights(40, 500, 3)
    assert w.shape == (500, 40) and (w.sum(1) == 40).all()
    assert w.mean() == 1 and w.var() == pytest.approx(1 - 1 / 40, rel=0.05)
    np.testing.assert_array_equal(w, resampled_weights(40, 500, 3))
    assert not np.array_equal(w, resampled_weights(40, 500, 3, stream=1))
    # two layers with the same sums get the same replicates: the contrast is exactly 0
    twins = [dataclasses.replace(layer(0, 1), layer=i) for i in range(2)]
    ranking = rank_layers([MassShare()], twins, Bootstrap())[0]
    assert [(c.low, c.high) for c in ranking.contrasts] == [(0.0, 0.0)] * 2


def test_the_interval_of_a_mean_equals_scipys_percentile_bootstrap() -> None:
    x = np.random.default_rng(0).gamma(2.0, size=80)
    replicates = resampled_weights(80, 20_000, 0) @ x / 80
    ours = interval(float(x.mean()), replicates, 0.9)
    theirs = stats.bootstrap(
        (x,), np.mean, confidence_level=0.9, method="percentile", n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert abs(ours.bias) < 0.005


def test_pairing_makes_the_contrast_narrower() -> None:
    ranking = rank_layers([MassShare()], planted([1.0, 1.2, 0.8]), Bootstrap())[0]
    for score, contrast in zip(ranking.scores, ranking.contrasts, strict=True):
        assert contrast.high - contrast.low < score.high - score.low
    assert sum(c.estimate for c in ranking.contrasts) == pytest.approx(0)


def test_rules_choose_the_planted_layers() -> None:
    layers = planted([0.1, 1.5, 0.1, 1.4, 0.1])
    ranking = rank_layers([MassShare()], layers[::-1], Bootstrap())[0]
    assert ranking.layers == (0, 1, 2, 3, 4)
    assert ranking.ranked()[:2] == [1, 3]
    assert LayerChoice("top_n", n=2).apply(ranking) == (1, 3)
    assert LayerChoice("above_mean").apply(ranking) == (1, 3)
    assert LayerChoice("threshold", threshold=0.5).apply(ranking) == (1, 3)
    assert LayerChoice("threshold", threshold=2.0).apply(ranking) == ()
    with pytest.raises(BadConfig, match="5 of 5 layers is no choice"):
        LayerChoice("top_n", n=5).apply(ranking)


def test_no_layer_is_above_the_mean_of_equal_ones() -> None:
    chosen = [
        LayerChoice().apply(rank_layers([MassShare()], planted([1.0] * 4, seed=s), Bootstrap())[0])
        for s in range(5)
    ]
    assert chosen.count(()) >= 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "top_n"}, "Give n"),
        ({"rule": "above_mean", "n": 2}, "Remove n"),
        ({"rule": "threshold"}, "Give threshold"),
        ({"rule": "top_n", "n": 2, "threshold": 0.1}, "Remove threshold"),
        ({"rule": "top_n", "n": 0}, "at least one layer"),
    ],
)
def test_rules_refuse_options_of_others(options: dict, words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        LayerChoice(**options)


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95, 0.99])
def test_documents_needed_is_where_the_interval_of_a_mean_covers(confidence: float) -> None:
    n = documents_needed(confidence)
    z = stats.norm.isf((1 - confidence) / 2)
    generator = np.random.default_rng(0)

    def misses(size: int) -> float:
        # simulated, with the normal limit of the bootstrap of a mean
        x = generator.normal(size=(400_000, size))
        half = z * x.std(axis=1) / np.sqrt(size)
        return float((np.abs(x.mean(axis=1)) > half).mean())

    noise = 4 * np.sqrt(1.5 * (1 - confidence) / 400_000)
    assert misses(n) <= 1.5 * (1 - confidence) + noise
    assert misses(n - 1) >= 1.5 * (1 - confidence) - noise


def test_too_few_documents_or_resamples() -> None:
    few = [layer(i, i, n_documents=12) for i in range(2)]
    with pytest.raises(BadConfig, match=r"task corpus has 12 documents.*needs at least 18"):
        rank_layers([MassShare()], few, Bootstrap())
    rank_layers([MassShare()], few, Bootstrap(confidence=0.8))
    with pytest.raises(BadConfig, match="Use at least 2000"):
        Bootstrap(confidence=0.99, resamples=1999)
    assert resamples_needed(0.95) == 400
    with pytest.raises(BadConfig, match="between 0 and 1"):
        Bootstrap(confidence=95)


def test_layers_of_one_run_only() -> None:
    mixed = [layer(0, 0), layer(1, 1, n_documents=30)]
    with pytest.raises(BadConfig, match="different task documents"):
        rank_layers([MassShare()], mixed, Bootstrap())
    with pytest.raises(BadConfig, match="one name twice"):
        rank_layers([LatentShift(), LatentShift(increment=True)], mixed[:1], Bootstrap())
    silent = sums_of(torch.full((1,), -1), torch.zeros(1, 3), 30)
    with pytest.raises(BadConfig, match="No token of the task corpus"):
        rank_layers([MassShare()], [LayerSums(0, silent, silent)], Bootstrap())


def test_contrast_is_to_the_mean_over_layers() -> None:
    np.testing.assert_allclose(contrast_to_mean(np.array([[1.0, 2.0, 6.0]])), [[-2, -1, 3]])
