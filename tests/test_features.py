from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import Tensor

from salve_lm.errors import (
    BadConfig,
    CorruptFile,
    EmptyClass,
    MissingFile,
    NameNotFound,
    NotFinite,
    OutputExists,
    ShapeMismatch,
    StaleStore,
)
from salve_lm.features import FeatureTable, StreamingFeatureStatistics

NAMES = ["church", "golf ball", "n/1"]
D_IN, D_SAE, K = 4, 6, 3


def samples(n: int = 60, seed: int = 0, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % K
    x = torch.randn(n, D_IN, generator=generator, dtype=torch.float64) + offset
    z = torch.randn(n, D_SAE, generator=generator, dtype=torch.float64) + label[:, None] + offset
    z[:, 5] = 0  # a dead latent
    return x, z, label


def collect(x: Tensor, z: Tensor, label: Tensor, sizes: list[int]) -> StreamingFeatureStatistics:
    statistics = StreamingFeatureStatistics(D_IN, D_SAE, K, firing_threshold=0.5)
    for part in zip(x.split(sizes), z.split(sizes), label.split(sizes), strict=True):
        statistics.update(*part)
    return statistics


def make_table(**provenance: str) -> FeatureTable:
    x, z, label = samples()
    norms = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 3.0])
    return collect(x, z, label, [60]).finalize(NAMES, norms, provenance)


def split_sizes(n: int, seed: int) -> list[int]:
    cuts = np.sort(np.random.default_rng(seed).integers(0, n + 1, size=4))
    return np.diff([0, *cuts, n]).tolist()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), offset=st.sampled_from([0.0, 3.0, 1e6]))
def test_any_batches_and_ranks_give_what_numpy_gives_at_once(seed: int, offset: float) -> None:
    x, z, label = samples(57, seed, offset)
    first = collect(x[:20], z[:20], label[:20], split_sizes(20, seed))
    second = collect(x[20:], z[20:], label[20:], split_sizes(37, seed + 1))
    first.merge(pickle.loads(pickle.dumps(second)))
    table = first.finalize(NAMES, torch.ones(D_SAE))

    xn, zn, yn = x.numpy(), z.numpy(), label.numpy()
    frame = pd.DataFrame(zn).groupby(yn)
    close = {"rtol": 1e-10, "atol": 1e-7}  # a plain sum of squares would miss this by far
    np.testing.assert_array_equal(table.counts, frame.size())
    np.testing.assert_allclose(table.mean, frame.mean(), **close)
    np.testing.assert_allclose(table.std, frame.std(ddof=0), **close)
    np.testing.assert_allclose(table.x_mean, pd.DataFrame(xn).groupby(yn).mean(), **close)
    centred = xn - pd.DataFrame(xn).groupby(yn).transform("mean").to_numpy()
    np.testing.assert_allclose(table.x_within_cov, centred.T @ centred / len(xn), **close)
    np.testing.assert_allclose(table.x_min, xn.min(0))
    np.testing.assert_allclose(table.mean_all, zn.mean(0), **close)
    np.testing.assert_allclose(table.firing_rate, (np.abs(zn) > 0.5).mean(0))
    np.testing.assert_allclose(table.x_second_moment, xn.T @ xn / len(xn), rtol=1e-9)
    within = zn - pd.DataFrame(zn).groupby(yn).transform("mean").to_numpy()
    np.testing.assert_allclose(table.pooled_std, np.sqrt((within**2).mean(0)), **close)


def test_rankings_against_the_formulas_written_out() -> None:
    table = make_table()
    _, z, label = samples()
    mu = np.stack([z.numpy()[label.numpy() == k].mean(0) for k in range(K)])
    within = z.numpy() - mu[label.numpy()]
    pooled = np.sqrt((within**2).mean(0))
    norms = np.array([1.0, 2.0, 0.5, 1.0, 1.0, 3.0])
    for k, name in enumerate(NAMES):
        rest = (mu.sum(0) - mu[k]) / (K - 1)
        order = np.argsort(-norms * np.abs(mu[k]), kind="stable")
        assert [table.dominant(name, r) for r in range(D_SAE)] == order.tolist()
        with np.errstate(invalid="ignore"):
            score = np.nan_to_num(np.abs(mu[k] - rest) / pooled)
        order = np.argsort(-score, kind="stable")
        assert [table.selective(name, r) for r in range(D_SAE)] == order.tolist()
        for latent in range(D_SAE):
            assert table.sign(name, latent) == (-1 if mu[k][latent] < rest[latent] else 1)


def test_a_latent_that_is_always_on_is_dominant_but_not_selective() -> None:
    label = torch.arange(30) % K
    noise = torch.randn(30, D_SAE, generator=torch.Generator().manual_seed(0)) / 100
    z = noise.clone()
    z[:, 0] += 50
    z[:, 1] += (label == 1).float()
    statistics = StreamingFeatureStatistics(D_IN, D_SAE, K)
    statistics.update(torch.randn(30, D_IN), z, label)
    table = statistics.finalize(NAMES, torch.ones(D_SAE))
    assert table.dominant("golf ball") == 0
    assert table.selective("golf ball") == 1
    assert table.sign("golf ball", 1) == 1
    assert table.sign("church", 1) == -1


def test_features_by_name_and_index() -> None:
    table = make_table()
    assert table.resolve("dominant:church") == table.dominant("church")
    assert table.resolve("dominant:church/2") == table.dominant("church", 2)
    assert table.resolve("selective:2/1") == table.selective(2, 1)
    assert table.resolve("dominant:n/1") == table.dominant("n/1")
    assert table.resolve("dominant:n/1/3") == table.dominant("n/1", 3)
    assert table.resolve("selective", "golf ball") == table.selective("golf ball")
    assert table.resolve(4) == table.resolve("4") == 4


def test_class_names_win_over_digits() -> None:
    x, z, label = samples()
    table = collect(x, z, label, [60]).finalize(["2", "1", "0"], torch.ones(D_SAE))
    assert table.class_index("2") == 0
    assert table.class_index(2) == 2


@pytest.mark.parametrize(
    ("feature", "error", "message"),
    [
        ("dominant:churhc", NameNotFound, "Did you mean 'church'"),
        ("dominnt:church", NameNotFound, "Did you mean 'dominant'"),
        ("church", NameNotFound, "RANKING:CLASS"),
        ("dominant", BadConfig, "dominant:CLASS"),
        ("dominant:church/6", NameNotFound, "the table has 6 latents"),
        ("selective:7", NameNotFound, "3 classes, counted from 0"),
        (6, NameNotFound, "The latents are 0 to 5"),
        (-1, NameNotFound, "The latents are 0 to 5"),
        ("-1", NameNotFound, "The latents are 0 to 5"),
    ],
)
def test_unknown_features(feature: str | int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_table().resolve(feature)


def test_unlabelled_rows_count_for_the_corpus_only() -> None:
    x, z, label = samples()
    statistics = collect(x, z, label, [60])
    statistics.update(x[:5] - 100, z[:5] + 7, torch.full((5,), -1))
    table = statistics.finalize(NAMES, torch.ones(D_SAE))
    assert table.counts.sum() == 60
    torch.testing.assert_close(table.mean, make_table().mean)
    torch.testing.assert_close(table.mean_all, torch.cat([z, z[:5] + 7]).mean(0))
    torch.testing.assert_close(table.x_min, x.amin(0).minimum(x[:5].amin(0) - 100))


def test_bad_batches() -> None:
    x, z, label = samples()
    statistics = StreamingFeatureStatistics(D_IN, D_SAE, K)
    with pytest.raises(ShapeMismatch, match=r"\(60, 4\) and \(60, 6\)"):
        statistics.update(x[:, :3], z, label)
    with pytest.raises(BadConfig, match="3 classes"):
        statistics.update(x, z, label + 1)
    with pytest.raises(BadConfig, match="-2"):
        statistics.update(x, z, label - 2)
    z[3, 2] = torch.nan
    with pytest.raises(NotFinite, match="'z'"):
        statistics.update(x, z, label)
    with pytest.raises(ShapeMismatch, match="merge"):
        statistics.merge(StreamingFeatureStatistics(D_IN, D_SAE, K + 1))
    statistics.update(x[:0], z[:0], label[:0])  # an empty share of a last batch
    assert statistics.counts.sum() == 0


def test_a_class_without_samples() -> None:
    x, z, label = samples()
    statistics = collect(x[label != 1], z[label != 1], label[label != 1], [40])
    with pytest.raises(EmptyClass, match="'golf ball' has no samples in split 'train'"):
        statistics.finalize(NAMES, torch.ones(D_SAE), where="split 'train'")


def test_one_class_cannot_be_compared() -> None:
    statistics = StreamingFeatureStatistics(D_IN, D_SAE, 1)
    statistics.update(torch.randn(4, D_IN), torch.randn(4, D_SAE), torch.zeros(4, dtype=int))
    with pytest.raises(BadConfig, match="compares classes"):
        statistics.finalize(["only"], torch.ones(D_SAE))


def test_round_trip_and_tables_that_others_open(tmp_path: Path) -> None:
    table = make_table(sae="abc", site="fc:input")
    extra = {"top_samples": pd.DataFrame({"latent": [0], "sample": [3]})}
    table.save(tmp_path / "t", extra)
    again = FeatureTable.load(tmp_path / "t")
    assert again.class_names == table.class_names
    assert again.provenance == {"sae": "abc", "site": "fc:input", "firing_threshold": 0.5}
    arrays = load_file(tmp_path / "t" / "features.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, getattr(table, name))
        assert torch.equal(getattr(again, name), getattr(table, name))

    classes = pd.read_csv(tmp_path / "t" / "classes.csv")
    pd.testing.assert_frame_equal(classes, pd.read_parquet(tmp_path / "t" / "classes.parquet"))
    top = classes[(classes["ranking"] == "dominant") & (classes["rank"] == 0)]
    assert top["latent"].tolist() == [table.dominant(n) for n in NAMES]
    assert top["class"].tolist() == NAMES
    latents = pd.read_parquet(tmp_path / "t" / "latents.parquet")
    assert len(latents) == D_SAE
    assert latents["selective_class"][5] == ""
    assert latents["selective_class"][0] in NAMES
    assert pd.read_parquet(tmp_path / "t" / "top_samples.parquet")["sample"].tolist() == [3]
    with pytest.raises(OutputExists):
        table.save(tmp_path / "t")


def test_a_table_of_another_sae() -> None:
    table = make_table(sae="a" * 64)
    table.check_sae("a" * 64, "runs/sae")
    with pytest.raises(StaleStore, match="another SAE"):
        table.check_sae("b" * 64, "runs/sae")
    make_table().check_sae("b" * 64, "a table by other hands that names no SAE")


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="salve-lm discover"):
        FeatureTable.load(tmp_path / "nothing")
    folder = make_table().save(tmp_path / "t")
    index, weights = folder / "index.json", folder / "features.safetensors"
    good_index, good_weights = index.read_text(), weights.read_bytes()

    weights.write_bytes(good_weights[:-1])
    with pytest.raises(CorruptFile, match="changed or cut off"):
        FeatureTable.load(folder)
    weights.unlink()
    with pytest.raises(CorruptFile, match="is missing"):
        FeatureTable.load(folder)
    weights.write_bytes(good_weights)
    for text, message in [
        ("{", "not readable as JSON"),
        ("[]", "not a salve_lm.features"),
        (json.dumps({**json.loads(good_index), "version": 99}), "version 99"),
        (json.dumps({"format": "salve_lm.features", "version": 1}), "'class_names' is missing"),
        (json.dumps({**json.loads(good_index), "class_names": ["a", "b"]}), r"\(3,\), not \(2,\)"),
    ]:
        index.write_text(text)
        with pytest.raises(CorruptFile, match=message):
            FeatureTable.load(folder)
    index.write_text(good_index)
    FeatureTable.load(folder)


def test_foreign_weights_with_a_right_hash(tmp_path: Path) -> None:
    from salve_lm.hashing import hash_file

    folder = make_table().save(tmp_path / "t")
    index = json.loads((folder / "index.json").read_text())
    (folder / "features.safetensors").write_bytes(b"not safetensors at all")
    index["sha256"]["features.safetensors"] = hash_file(folder / "features.safetensors")
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptFile, match="does not hold a feature table"):
        FeatureTable.load(folder)
