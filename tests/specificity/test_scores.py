from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from salve_lm.errors import BadConfig, ShapeMismatch
from salve_lm.specificity.latents import LayerSums, blocks, specificity
from salve_lm.specificity.scores import (
    Attribution,
    LatentShift,
    LayerScore,
    MassShare,
    MeanSpecificity,
    SingleLatentAUROC,
    TopMean,
    point_scores,
)
from tests.specificity.made import layer, sums_of, tokens_of

ALL: list[LayerScore] = [
    MassShare(),
    MassShare(measure="firing", at_least=0.2),
    MeanSpecificity(),
    TopMean(n=3, min_documents=2),
    SingleLatentAUROC(),
    SingleLatentAUROC(level="tokens"),
    LatentShift(),
    LatentShift(increment=True),
    Attribution(),
]


def repeated(at: LayerSums, task: list[int], reference: list[int]) -> LayerSums:
    """The layer on corpora that really hold each document so many times."""

    def corpus(sums, times):
        dense = {
            name: torch.tensor(getattr(sums, name).toarray()[np.repeat(range(len(times)), times)])
            for name in ("activation", "firing", "attribution")
        }
        tokens = np.repeat(sums.tokens, times)
        out = sums_of(torch.arange(len(tokens)), dense["activation"], len(tokens))
        return dataclasses.replace(
            out,
            tokens=tokens,
            firing=out.firing.__class__(dense["firing"].numpy()),
            attribution=out.attribution.__class__(dense["attribution"].numpy()),
        )

    shift = dataclasses.replace(
        at.shift, distance=np.repeat(at.shift.distance, task), mass=np.repeat(at.shift.mass, task)
    )
    return LayerSums(at.layer, corpus(at.task, task), corpus(at.reference, reference), shift)


def brute_mass(at: LayerSums, mass: str, measure: str, bound: float) -> float:
    part = whole = 0.0
    for f in range(at.task.d_sae):
        means = []
        for corpus in (at.task, at.reference):
            total = sum(getattr(corpus, measure).toarray()[d, f] for d in range(corpus.n_documents))
            means.append(total / sum(corpus.tokens))
        s = (means[0] - means[1]) / sum(means) if sum(means) else 0.0
        amount = sum(getattr(at.task, mass).toarray()[:, f])
        whole += amount
        part += amount if s >= bound else 0.0
    return part / whole


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_shares_equal_loops(seed: int) -> None:
    at = layer(0, seed)
    for bound in (0.5, 0.1):
        for measure in ("activation", "firing"):
            found = point_scores(MassShare(at_least=bound, measure=measure), [at])[0]
            assert found == pytest.approx(brute_mass(at, "activation", measure, bound), abs=1e-12)
        found = point_scores(Attribution(at_least=bound), [at])[0]
        assert found == pytest.approx(brute_mass(at, "attribution", "activation", bound), abs=1e-12)
    mass = at.task.activation.toarray().sum(0)
    means = mass / at.task.tokens.sum()
    others = at.reference.activation.toarray().sum(0) / at.reference.tokens.sum()
    weighted = sum(
        w * (t - r) / (t + r) for w, t, r in zip(mass, means, others, strict=True) if t + r
    )
    found = point_scores(MeanSpecificity(), [at])[0]
    assert found == pytest.approx(weighted / mass.sum())
    found = point_scores(LatentShift(), [at])[0]
    assert found == pytest.approx(sum(at.shift.distance) / sum(at.shift.mass))


@settings(max_examples=8)
@given(seed=st.integers(0, 10_000))
def test_weights_mean_repeated_documents(seed: int) -> None:
    layers = [layer(2, seed), layer(5, seed + 7)]
    generator = np.random.default_rng(seed)
    times = [
        generator.integers(0, 3, corpus.n_documents)
        for corpus in (layers[0].task, layers[0].reference)
    ]
    for score in ALL:
        if isinstance(score, SingleLatentAUROC | TopMean):
            continue  # these choose latents on the corpora themselves
        weighted = score.evaluate(
            layers, times[0][None].astype(float), times[1][None].astype(float)
        )
        real = point_scores(score, [repeated(at, *times) for at in layers])
        np.testing.assert_allclose(weighted[0], real, atol=1e-12, err_msg=str(score))


def test_top_mean_equals_sorting() -> None:
    at = layer(0, 3)
    task, reference = (
        c.activation.toarray().sum(0) / c.tokens.sum() for c in (at.task, at.reference)
    )
    common = (at.task.activation.toarray() > 0).sum(0) >= 10
    s = ((task - reference) / (task + reference))[common]
    for n in (1, 4, 100):
        expected = np.sort(s)[::-1][:n].sum() / n
        found = point_scores(TopMean(n=n, min_documents=10), [at])[0]
        assert found == pytest.approx(expected)
    assert point_scores(TopMean(min_documents=1000), [at])[0] == 0


@pytest.mark.parametrize("level", ["documents", "tokens"])
def test_auroc_chooses_and_measures_on_other_documents(level: str) -> None:
    n, d = 24, 6
    (td, tz), (rd, rz) = tokens_of(5, n, d, 2.0), tokens_of(6, n, d)
    at = LayerSums(0, sums_of(td, tz, n), sums_of(rd, rz, n))
    expected = []

    def samples(document, z, parity):
        if level == "tokens":
            return z[document % 2 == parity].numpy()
        return np.array([z[document == i].mean(0).numpy() for i in range(parity, n, 2)])

    for parity in (0, 1):
        aurocs = []
        for half in (parity, 1 - parity):
            task, reference = samples(td, tz, half), samples(rd, rz, half)
            truth = np.repeat([1, 0], [len(task), len(reference)])
            both = np.concatenate([task, reference])
            aurocs.append([roc_auc_score(truth, both[:, f]) for f in range(d)])
        expected.append(aurocs[1][int(np.argmax(aurocs[0]))])
    found = point_scores(SingleLatentAUROC(level=level), [at])[0]
    assert found == pytest.approx(np.mean(expected), abs=1e-9)


def test_auroc_does_not_reward_many_random_latents() -> None:
    n = 60
    generator = torch.Generator().manual_seed(0)
    document = torch.arange(n)
    for d_sae in (10, 3000):
        task, reference = (torch.rand(n, d_sae, generator=generator) for _ in range(2))
        at = LayerSums(0, sums_of(document, task, n), sums_of(document, reference, n))
        assert abs(point_scores(SingleLatentAUROC(), [at])[0] - 0.5) < 0.15


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), factor=st.floats(0.01, 100), copies=st.integers(1, 3))
def test_scores_grow_neither_with_scale_nor_with_width(seed, factor, copies) -> None:
    n = 24
    (td, tz), (rd, rz) = tokens_of(seed, n, 6, 2.0), tokens_of(seed + 1, n, 6)
    plain = LayerSums(0, sums_of(td, tz, n), sums_of(rd, rz, n))
    wide = LayerSums(
        0,
        sums_of(td, (tz.double() * factor).repeat(1, copies), n),
        sums_of(rd, (rz.double() * factor).repeat(1, copies), n),
    )
    # the attribution in `made` is a cube: every latent alike
    for score in (
        MassShare(),
        MassShare(measure="firing"),
        MeanSpecificity(),
        Attribution(),
        SingleLatentAUROC(),
    ):
        one, two = point_scores(score, [plain])[0], point_scores(score, [wide])[0]
        assert two == pytest.approx(one, abs=1e-6), score


@given(
    task=st.lists(st.floats(0, 1e6), min_size=1, max_size=5),
    factor=st.floats(1e-3, 1e3),
)
def test_specificity_is_bounded_and_antisymmetric(task: list[float], factor: float) -> None:
    a = np.array(task)
    b = a[::-1] * 0.5
    s = specificity(a, b)
    assert (np.abs(s) <= 1).all()
    np.testing.assert_array_equal(s, -specificity(b, a))
    np.testing.assert_allclose(s, specificity(a * factor, b * factor), atol=1e-9)


def test_nothing_over_nothing_is_zero() -> None:
    assert specificity(np.zeros(2), np.array([0.0, 1.0])).tolist() == [0.0, -1.0]
    silent = sums_of(torch.arange(4), torch.zeros(4, 3), 4)
    at = LayerSums(0, silent, silent)
    for score in (MassShare(), Attribution(), TopMean()):
        assert point_scores(score, [at])[0] == 0


def test_increments_add_up_to_the_shift() -> None:
    layers = [layer(i, i) for i in range(4)]
    found = point_scores(LatentShift(increment=True), layers)
    np.testing.assert_allclose(found.cumsum(), point_scores(LatentShift(), layers))


def test_blocks_cover_everything_once() -> None:
    for n, d_sae in ((1, 1), (1000, 5_000_000), (7, 10**9), (1000, 16_384)):
        rows = [i for b in blocks(n, d_sae) for i in range(b.start, b.stop)]
        assert rows == list(range(n))
        assert max(b.stop - b.start for b in blocks(n, d_sae)) * d_sae * 8 <= max(
            1 << 26, d_sae * 8
        )


def test_scores_say_what_they_lack() -> None:
    n = 24
    document, z = tokens_of(0, n, 4)
    from salve_lm.specificity.documents import DocumentSums

    bare = DocumentSums(n, 4)
    bare.update(document, z)
    at = LayerSums(0, bare.result(), bare.result())
    for score, words in (
        (MassShare(measure="firing"), "Firings were not counted"),
        (Attribution(), "Attributions were not measured"),
        (LatentShift(), "give `finetuned`"),
        (SingleLatentAUROC(level="tokens"), "tokens were not kept"),
    ):
        with pytest.raises(BadConfig, match=words):
            point_scores(score, [at])
    assert [s.needs_tokens for s in ALL].count(True) == 1
    assert [s.needs_firings for s in ALL].count(True) == 1
    with pytest.raises(ShapeMismatch, match="Encode both with one autoencoder"):
        LayerSums(0, bare.result(), DocumentSums(n, 5).result())
    with pytest.raises(BadConfig, match="at_least is 2"):
        MassShare(at_least=2)
    with pytest.raises(BadConfig, match="must be at least 1"):
        TopMean(n=0)
    assert math.isfinite(point_scores(MassShare(), [at])[0])
