"""The study of robustness: effects by hand, spreads by numpy, groups, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from salve_lm.commands.robustness_effects import Rules, shared_strength
from salve_lm.commands.robustness_saes import (
    StudiedSAE,
    find_saes,
    group_by_setting,
    similarity,
)
from salve_lm.commands.swept import Swept
from salve_lm.edits import DecoderGuided, EditContext, LatentContrastErasure
from salve_lm.errors import (
    BadConfig,
    MissingFile,
    NameNotFound,
    OutputExists,
    SalveError,
    StaleStore,
)
from salve_lm.features import FeatureTable
from salve_lm.strength import Outcome
from tests.edits.tiny import NAMES
from tests.robustness.small_study import ALPHAS, SEEDS, data, suppress, sweep, trainer

TABLES = ("robustness", "summary", "saes", "features")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds trained and studied by the one command."""
    root = tmp_path_factory.mktemp("robustness")
    edits = [*suppress(), LatentContrastErasure(name="erase", top_k=4)]
    trainer().robustness(
        data(), edits, str(root / "study"), sweep(root / "saes"), alphas=ALPHAS, draws=2,
        others_drop=0.05,
    )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def effects(folder: Path) -> pd.DataFrame:
    return pd.DataFrame(json.loads((folder / "study/robustness.json").read_text()))


def test_one_command_trains_and_studies(folder: Path, effects: pd.DataFrame) -> None:
    assert {p.name for p in (folder / "saes").iterdir()} == {f"seed_{s}" for s in SEEDS}
    assert {p.name for p in (folder / "study").iterdir()} == {
        *(f"{n}.csv" for n in TABLES), *(f"{n}.json" for n in TABLES), "similarity.json",
        "robustness.svg", "robustness.md", "features",
    }  # fmt: skip
    counts = effects.groupby(["edit", "control"]).size().to_dict()
    each = len(SEEDS) * len(NAMES)
    assert counts == {
        ("suppress", ""): each, ("suppress", "random_latent"): 2 * each,
        ("suppress", "permuted"): each, ("erase", ""): each,
    }  # fmt: skip


def test_effects_are_those_of_the_edited_head(folder: Path, effects: pd.DataFrame) -> None:
    """By hand: w'_j = w_j max(0, 1 - alpha c_j) in the class's row, c the unit |decoder row|."""
    from safetensors.torch import load_file

    given = data()
    assert given.source is not None and given.model is not None
    x, label = given.source.samples("val")  # type: ignore[attr-defined]
    head = given.model.model.fc
    for row in effects[effects["edit"] == "suppress"].to_dict("records"):
        table = FeatureTable.load(folder / "study/features" / row["sae"])
        decoder = load_file(folder / "saes" / row["sae"] / "sae_weights.safetensors")["W_dec"]
        k, latent = NAMES.index(row["class"]), int(row["latents"])
        if row["control"] == "random_latent":
            assert latent != table.dominant(k)
        else:
            assert latent == table.dominant(k)
        c = decoder[latent].double().abs()
        if row["control"] == "permuted":
            assert row["target"] >= 0  # its order of channels is the permutation's own affair
            continue
        weight = head.weight.detach().double().clone()
        weight[k] *= (1 - row["alpha"] * c / c.norm()).clamp(min=0)
        right = (x.double() @ weight.T + head.bias.detach().double()).argmax(1) == label
        own = label == k
        assert row["target"] == pytest.approx(right[own].double().mean().item())
        assert row["others"] == pytest.approx(right[~own].double().mean().item())


def test_flip_median_is_where_half_of_the_class_is_lost(
    folder: Path, effects: pd.DataFrame
) -> None:
    """By a grid of strengths, without the closed form."""
    from safetensors.torch import load_file

    given = data()
    assert given.source is not None and given.model is not None
    x, label = given.source.samples("val")  # type: ignore[attr-defined]
    head = given.model.model.fc
    grid = torch.linspace(0, 10, 2001).double()
    row = effects[(effects["edit"] == "suppress") & (effects["control"] == "")].iloc[0]
    decoder = load_file(folder / "saes" / row["sae"] / "sae_weights.safetensors")["W_dec"]
    c = decoder[int(row["latents"])].double().abs()
    k = NAMES.index(row["class"])
    own = x[label == k].double()
    logits = own @ head.weight.detach().double().T + head.bias.detach().double()
    counted = logits.argmax(1) == k
    rivals = logits.clone()
    rivals[:, k] = -torch.inf
    factors = (1 - grid[:, None] * c / c.norm()).clamp(min=0)
    mine = own @ (head.weight[k].detach().double() * factors).T + head.bias[k].detach().double()
    lost = mine <= rivals.amax(1)[:, None]
    first = torch.where(lost.any(1), grid[lost.double().argmax(1)], torch.inf)[counted]
    expected = np.median(first.numpy())
    assert float(row["flip_median"]) == pytest.approx(expected, abs=0.006)


def test_every_seed_gets_the_same_strength(effects: pd.DataFrame) -> None:
    for _, mine in effects.groupby(["edit", "class"]):
        assert mine["alpha"].nunique() == 1
    own = effects[effects["control"] == ""]["own_alpha"]
    assert own.notna().all()
    assert effects[effects["control"] != ""]["own_alpha"].isna().all()


def test_spreads_are_over_seeds(folder: Path, effects: pd.DataFrame) -> None:
    summary = pd.DataFrame(json.loads((folder / "study/summary.json").read_text()))
    for row in summary.to_dict("records"):
        mine = effects[(effects["edit"] == row["edit"]) & (effects["control"] == row["control"])]
        if row["class"] != "all":
            mine = mine[mine["class"] == row["class"]]
        # draws and classes first, so that what varies is the seed
        values = mine.groupby("sae")["target"].mean().to_numpy()
        assert len(values) == row["saes"] == len(SEEDS)
        assert row["target_mean"] == pytest.approx(values.mean())
        assert row["target_sd"] == pytest.approx(values.std(ddof=1))
        assert (row["target_min"], row["target_max"]) == pytest.approx((values.min(), values.max()))
        assert row["removed"] == (values <= 0.05).sum()
    assert set(summary["class"]) == {*NAMES, "all"}


def test_words_and_plot_name_what_was_found(folder: Path) -> None:
    words = (folder / "study/robustness.md").read_text()
    assert "3 autoencoders that differ in their seeds" in words
    assert "**suppress**" in words and "**erase**" in words
    assert "of 4 classes fall to at most 5 %" in words
    plot = (folder / "study/robustness.svg").read_text()
    assert plot.startswith("<svg") and all(name in plot for name in NAMES)
    # a mark for each autoencoder, class and control, in each of three panels
    assert plot.count("<title>seed_0") == 3 * len(NAMES) * (3 + 1)


def test_a_copy_with_other_order_and_signs_is_alike(folder: Path, tmp_path: Path) -> None:
    """The same autoencoder, its latents shuffled and turned over, agrees with itself entirely."""
    from salve_lm.sae import load_sae, save_sae

    (first, *_) = find_saes(str(folder / "saes"))
    sae = load_sae(first.path)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.W_dec.copy_(-sae.W_dec[order])
        sae.W_enc.copy_(-sae.W_enc[:, order])
        sae.b_enc.copy_(-sae.b_enc[order])
    save_sae(sae, tmp_path / "turned")
    table = FeatureTable.load(folder / "study/features" / first.name)
    turned = FeatureTable(
        **{
            **{k: getattr(table, k) for k in table.__dataclass_fields__},
            "mean": -table.mean[:, order], "std": table.std[:, order],
            "firing_rate": table.firing_rate[order], "decoder_norm": table.decoder_norm[order],
            "mean_all": -table.mean_all[order],
        }
    )  # fmt: skip
    copy = StudiedSAE("turned", str(tmp_path / "turned"), 1, first.settings, {}, True)
    found = similarity([first, copy], {first.name: table, "turned": turned}, EditContext())
    assert found["decoder"] == pytest.approx(1.0, abs=1e-6)
    for ranking in ("dominant", "selective"):
        assert found[ranking]["same_class"] == pytest.approx(1.0, abs=1e-6)
        assert found[ranking]["recognised"] == 1
        assert found[ranking]["other_class"] <= 1


def test_one_autoencoder_has_no_pairs(folder: Path) -> None:
    (first, *_) = find_saes(str(folder / "saes"))
    assert similarity([first], {}, EditContext()) == {}


def test_settings_are_compared_and_seeds_pooled(folder: Path, tmp_path: Path) -> None:
    shape = {"sweep": {"l1_coefficient": [0.1, 0.5], "d_sae": [8, 12]}}
    group = sweep(tmp_path / "saes", **shape)
    trainer(max_epochs=2).robustness(
        data(), suppress(), str(tmp_path / "study"), group, alphas=[1.0], classes=["tower"],
        controls=[],
    )  # fmt: skip
    saes = pd.read_csv(tmp_path / "study/saes.csv")
    assert saes["setting"].tolist() == [
        "d_sae 8, l1_coefficient 0.1", "d_sae 8, l1_coefficient 0.5",
        "d_sae 12, l1_coefficient 0.1", "d_sae 12, l1_coefficient 0.5",
    ]  # fmt: skip
    assert saes["explained_variance"].notna().all() and saes["l0"].notna().all()
    assert saes["dead_fraction"].between(0, 1).all()
    effects = pd.read_csv(tmp_path / "study/robustness.csv")
    assert effects["class"].unique().tolist() == ["tower"]
    assert saes["suppress: target"].tolist() == effects["target"].tolist()
    plot = (tmp_path / "study/robustness.svg").read_text()
    assert "d_sae 8, l1_coefficient 0.5" in plot
    words = (tmp_path / "study/robustness.md").read_text()
    assert words.count("## 1 autoencoder: ") == 4


def made_sae(name: str, seed: int | None, **settings: Any) -> StudiedSAE:
    return StudiedSAE(name, name, seed, {"architecture": "topk", **settings}, {}, False)


def test_groups_differ_in_their_seeds_alone() -> None:
    seeds = [made_sae(f"seed_{i}", i, k=4) for i in range(3)]
    assert list(group_by_setting(seeds)) == ["all"]
    both = [made_sae(f"k_{k}-seed_{i}", i, k=k) for k in (4, 8) for i in range(2)]
    assert {n: len(g) for n, g in group_by_setting(both).items()} == {"k 4": 2, "k 8": 2}
    # the folders do not tell what differs (a learning rate): their names do
    rates = [made_sae(f"lr_{r}-seed_{i}", i, k=4) for r in (0.1, 0.2) for i in range(2)]
    assert {n: len(g) for n, g in group_by_setting(rates).items()} == {"lr_0.1": 2, "lr_0.2": 2}


def test_the_shared_strength_is_of_the_mean_curve() -> None:
    def swept(*targets: float) -> Swept:
        spec = suppress()[0]
        plan: Any = type("P", (), {"spec": spec})()
        curve = [Outcome(t, 0.9, 0.0, [t, 0.9]) for t in targets]
        before = {"train": Outcome(1.0, 0.9, 0.0, [1.0, 0.9])}
        return Swept("suppress", plan, 0, [1.0, 2.0, 3.0], {"train": curve}, before, before, 0.0)

    rules = Rules(margin=1.0)
    assert shared_strength([swept(0.5, 0.0, 0.0)], rules) == 2.0
    # the second seed needs more, so both get it
    assert shared_strength([swept(0.5, 0.0, 0.0), swept(0.5, 0.1, 0.0)], rules) == 3.0


def study(folder: Path, out: Path, **options: Any) -> None:
    given: dict[str, Any] = {
        "datamodule": data(), "edits": suppress(), "out": str(out),
        "saes": str(folder / "saes"), "alphas": [1.0],
    }  # fmt: skip
    trainer().robustness(**{**given, **options})


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"saes": None}, BadConfig, "needs autoencoders"),
        ({"saes": "nowhere"}, MissingFile, "No autoencoders in folders below nowhere"),
        ({"edits": suppress(target_class="tower")}, BadConfig, "names a class"),
        ({"edits": []}, BadConfig, "No edits"),
        ({"classes": ["towr"]}, NameNotFound, "Did you mean 'tower'"),
        ({"draws": 0}, BadConfig, "draws"),
        ({"margin": 0.5}, BadConfig, "margin"),
        ({"datamodule": data().source}, BadConfig, "robustness reads activations"),
    ],
)
def test_bad_input_is_told(
    options: dict[str, Any], error: type[SalveError], says: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        study(folder, tmp_path / "x", **options)
    assert not list(tmp_path.glob("x*"))


def test_folders_in_the_way_are_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExists):
        study(folder, folder / "study")
    with pytest.raises(BadConfig, match=r"--saes .*saes, or choose another"):
        study(folder, tmp_path / "x", saes=None, model=sweep(folder / "saes"))


def test_a_single_autoencoder_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "saes/seed_0", tmp_path / "saes/seed_0")
    with pytest.raises(BadConfig, match="compares several"):
        study(tmp_path, tmp_path / "x")


def test_autoencoders_of_another_network_are_refused(folder: Path, tmp_path: Path) -> None:
    other = data()
    assert other.model is not None
    with torch.no_grad():
        other.model.model.fc.weight.mul_(2)
        other.model.model.hidden.bias.add_(1)
    with pytest.raises(StaleStore, match="trained on activations of other weights"):
        study(folder, tmp_path / "x", datamodule=other)


def test_an_undefined_edit_is_left_out_with_a_word(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "saes", tmp_path / "saes")
    path = tmp_path / "saes/seed_1/sae_weights.safetensors"
    tensors = load_file(path)
    tensors["W_dec"][3] = 0
    save_file(tensors, path)
    edits = [DecoderGuided(name="third", feature=3, rows="class")]
    study(tmp_path, tmp_path / "x", edits=edits)
    assert "seed_1 left out" in caplog.text
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert {r["saes"] for r in summary if r["control"] == ""} == {2}
