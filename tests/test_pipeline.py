"""The whole job through the command line, small: every stage of the demo with its own config."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from salve_lm import edits
from salve_lm.cli import main
from salve_lm.features import FeatureTable
from salve_lm.report.summary import NEEDED

CHECKOUT = Path(__file__).parents[1]
SWEEP = ["--config", "demo/4_sweep", "--config", "edit/comparison"]
SMALL = ["--data.init_args.image_size=16"]
SMALL_STORE = ["--data.init_args.source.init_args.image_size=16"]
THREE = ["--classes=[three, eight]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all stages have run: ResNet-18, a few epochs on 16-pixel digits."""
    root = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        main(["fit", "--config", "demo/1_backbone", "--trainer.max_epochs=3", *SMALL])
        fit = ["fit", "--config", "demo/2_autoencoder", *SMALL_STORE]
        main([*fit, "--trainer.max_epochs=40", "--trainer.check_val_every_n_epoch=40"])
        main(["discover", "--config", "demo/3_discover", *SMALL_STORE])
        main(["sweep", *SWEEP, *SMALL, *THREE])
        main(["validate", "--config", "demo/5_verify", *SMALL])
        swept = root / "runs/demo/sweep"
        chosen = sorted(p.name for p in (swept / "edits").glob("erase_*.yaml"))[0]
        edited = ["--config", "demo/6_validate", "--config", f"{swept}/validate/{chosen}"]
        main(["validate", *edited, *SMALL])
        main(["edit", "--config", "demo/7_export", "--config", f"{swept}/edits/{chosen}", *SMALL])
        main(["validate", "--config", "demo/8_exported", *SMALL])
        main(["report", "runs/demo"])
    return root / "runs/demo"


@pytest.fixture
def in_root(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(run.parent.parent)
    return run


def test_summary_has_the_promised_keys(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert {"accuracy", "per_class"} <= set(summary["baseline"])
    assert {"architecture", "explained_variance", "l0", "dead_fraction", "path"} <= set(
        summary["sae"]
    )
    wanted = {
        "name", "direction", "target_class", "feature", "alpha", "rows", "target_accuracy_before",
        "target_accuracy_after", "other_accuracy_before", "other_accuracy_after",
    }  # fmt: skip
    assert all(wanted <= set(e) for e in summary["edits"])
    names = [e["name"] for e in summary["edits"]]
    assert len(set(names)) == len(names)
    suppressed = {e["target_class"] for e in summary["edits"] if e["direction"] == "suppress"}
    assert suppressed == {"three", "eight"}
    crit = summary["alpha_crit"]["three"]
    assert {
        "feature", "linear_median", "exact_median", "flip_median", "observed", "no_root_share",
    } <= set(crit)  # fmt: skip
    assert summary["exported"]["matches_live"] is True
    assert len(summary["exported"]["sha256"]) == 64


def test_the_export_is_a_plain_torchvision_model(run: Path) -> None:
    import torchvision
    from safetensors.torch import load_file

    model = torchvision.models.resnet18(num_classes=10)
    model.load_state_dict(load_file(run / "exported/model.safetensors"))
    before = torch.load(run / "backbone/backbone.ckpt", weights_only=True)["state_dict"]
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[f"model.{n}"])]
    record = json.loads((run / "exported/edit.json").read_text())
    assert sorted(changed) == sorted(c["name"] for c in record["changed"])


def test_sweep_results_are_those_of_the_edited_network(run: Path, in_root: Path) -> None:
    """An oracle for the sweep: run the whole edited network, in place, over the held-out images."""
    from torchvision.models import resnet18

    from vision.data import Digits

    exported = resnet18(num_classes=10)
    from safetensors.torch import load_file

    exported.load_state_dict(load_file(run / "exported/model.safetensors"))
    exported.eval()
    digits = Digits(image_size=16)
    digits.prepare_data()
    digits.setup("fit")
    samples = [digits.eval_dataset("val")[i] for i in range(len(digits.eval_dataset("val")))]
    images, labels = torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])
    with torch.no_grad():
        right = exported(images).argmax(1) == labels
    record = json.loads((run / "exported/edit.json").read_text())
    edit, target = record["edits"][0]["title"].split(":")
    own = labels == digits.class_names.index(target)
    results = pd.read_csv(run / "sweep/results.csv")
    row = results[(results["edit"] == edit) & (results["target_class"] == target)].iloc[0]
    assert row["val_target_after"] == pytest.approx(right[own].float().mean().item(), abs=1e-6)
    assert row["val_others_after"] == pytest.approx(right[~own].float().mean().item(), abs=1e-6)


def test_strengths_come_from_the_training_split(run: Path) -> None:
    """Choosing again from the stored training curves alone gives the stored strengths."""
    from salve_lm.strength import Outcome, choose_strength

    curves = pd.read_parquet(run / "sweep/curves.parquet")
    results = pd.read_csv(run / "sweep/results.csv")
    assert set(curves["split"]) == {"train", "val"}
    for row in results.to_dict("records"):
        mine = curves[
            (curves["edit"] == row["edit"])
            & (curves["target_class"] == row["target_class"])
            & (curves["split"] == "train")
        ].sort_values("alpha")
        points = [
            Outcome(t, o, 0.0, []) for t, o in zip(mine["target"], mine["others"], strict=True)
        ]
        alphas = mine["alpha"].tolist()
        margin = 1.0 if getattr(edits, row["kind"]).grid_kind == "fraction" else 1.5
        found = choose_strength(alphas[1:], points[1:], points[0], row["direction"], margin=margin)
        assert found == row["alpha"], row["edit"]


def test_every_suppression_is_labelled(run: Path) -> None:
    found = {(r["edit"], r["target_class"]): r for r in json.loads(
        (run / "sweep/removal.json").read_text())}  # fmt: skip
    results = pd.read_csv(run / "sweep/results.csv")
    wanted = results[(results["direction"] == "suppress") & (results["alpha"] > 0)]
    assert set(found) == set(zip(wanted["edit"], wanted["target_class"], strict=True))
    for row in wanted.to_dict("records"):
        report = found[row["edit"], row["target_class"]]
        # measured apart from the sweep, on the same held-out samples
        assert report["target_after"]["share"] == pytest.approx(row["val_target_after"], abs=1e-6)
    # what lowers the class's own logit alone sends every changed prediction to the runner-up
    assert found["class bias lowered", "three"]["runner_up_share"] == 1


def test_every_class_has_a_card(run: Path) -> None:
    cards = json.loads((run / "cards/cards.json").read_text())
    table = FeatureTable.load(run / "features")
    assert (cards["format"], cards["version"]) == ("salve_lm.cards", 1)
    assert [c["latent"] for c in cards["latents"]] == [table.dominant(n) for n in table.class_names]
    for card in cards["latents"]:
        assert card["sign"] == table.sign(card["class"], card["latent"])
        activations = [card["sign"] * t["activation"] for t in card["top"]]
        assert activations == sorted(activations, reverse=True)
        for name in (t[kind] for t in card["top"] for kind in ("image", "overlay")):
            assert (run / "cards" / name).is_file()
        # a map of zeros has no maximum to cut out
        crops = [t["crop"] for t in card["top"] if "crop" in t]
        assert crops and all((run / "cards" / name).is_file() for name in crops)
        assert (run / "cards" / card["maximised"]).is_file()


def test_tables_open_elsewhere(run: Path) -> None:
    top = pd.read_parquet(run / "features/top_samples.parquet")
    assert {"latent", "direction", "rank", "sample", "activation", "class", "source"} <= set(top)
    assert (top.groupby(["latent", "direction"])["rank"].max() < 16).all()
    assert len(pd.read_csv(run / "features/classes.csv")) == 2 * 10 * 10


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["sweep", *SWEEP, *SMALL], "runs/demo/sweep exists already"),
        (["discover", "--config", "demo/3_discover", *SMALL_STORE], "exists already"),
        (["fit", "--config", "demo/2_autoencoder", *SMALL_STORE], "runs/demo/sae exists already"),
        (["fit", "--config", "demo/1_backbone", *SMALL], "backbone.ckpt exists already"),
        (["sweep", *SWEEP, *SMALL, "--out=x", "--margin=-1"], "margin (-1.0) is at least 1"),
        (
            ["sweep", *SWEEP, *SMALL, "--out=x", "--classes=[thre]"],
            "No class named 'thre'. Did you mean 'three'",
        ),
        (
            ["sweep", *SWEEP, *SMALL, "--out=x", "--headline=[supres]"],
            "No edit named 'supres'. Did you mean 'suppress'",
        ),
        (
            ["sweep", *SWEEP, *SMALL, "--out=x", "--features=nowhere"],
            "No feature table at nowhere",
        ),
        (
            ["sweep", *SWEEP, *SMALL, "--out=x", "--sae=nowhere"],
            "nowhere",
        ),
        (
            # the cached activations are of 16-pixel digits
            ["discover", "--config", "demo/3_discover", "--out=x"],
            "data",
        ),
        (
            ["discover", "--config", "demo/3_discover", "--out=/proc/x", *SMALL_STORE],
            "Cannot write /proc/x",
        ),
        (["report", "nowhere"], "No run folder at nowhere"),
        (
            ["validate", "--config", "demo/8_exported", "--model.init_args.weights=nowhere.pth"],
            "nowhere.pth",
        ),
    ],
)
def test_bad_input_is_one_clear_line(args: list[str], says: str, in_root: Path) -> None:
    logs = {p: p.read_bytes() for p in in_root.rglob("metrics.csv")}
    with pytest.raises(SystemExit) as e:
        main(args)
    assert str(e.value).startswith("error: ")
    assert says in str(e.value)
    assert not Path("x").exists()
    # nothing is lost by a command that is refused
    assert logs and {p: p.read_bytes() for p in in_root.rglob("metrics.csv")} == logs


def test_other_weights_are_noticed(
    in_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edits_file = sorted((in_root / "sweep/edits").glob("erase_*.yaml"))[0]
    args = ["edit", "--config", "demo/7_export", "--config", str(edits_file), *SMALL]
    main([*args, f"--out={tmp_path / 'a'}"])
    assert "made from other weights" not in caplog.text
    main([*args, f"--out={tmp_path / 'b'}", "--model.init_args.weights=runs/demo/exported"])
    assert "made from other weights" in caplog.text


def test_an_export_is_readable_as_any_new_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    assert (run / "exported/model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize("missing", NEEDED)
def test_an_incomplete_run_names_the_stage(missing: str, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("activations", "*.ckpt"))
    (copy / missing).unlink()
    with pytest.raises(SystemExit) as e:
        main(["report", str(copy)])
    assert missing in str(e.value)
    assert NEEDED[missing].split(" (")[0] in str(e.value)


def test_an_edit_of_a_layer_typo_suggests_the_nearest(in_root: Path) -> None:
    given = [{"class_path": "salve_lm.edits.DirectionalAblation",
              "init_args": {"feature": 1, "module": "layer4.1.conv3"}}]  # fmt: skip
    with pytest.raises(SystemExit, match=r"layer4.1.conv2"):
        main(
            ["edit", "--config", "demo/7_export", "--out=x", "--sae=runs/demo/sae",
             f"--edits={yaml.safe_dump(given, default_flow_style=True)}", *SMALL]
        )  # fmt: skip


def test_discover_on_two_processes_finds_the_same(run: Path, in_root: Path) -> None:
    """A real `ddp` launch: the same statistics and top samples, one set of files."""
    args = ["discover", "--config", "demo/3_discover", *SMALL_STORE, "--out=features2"]
    done = subprocess.run(
        [sys.executable, "-m", "salve_lm", *args, "--trainer.strategy=ddp", "--trainer.devices=2"],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    one, two = FeatureTable.load(run / "features"), FeatureTable.load("features2")
    for name in ("counts", "x_min", "firing_rate", "decoder_norm"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    for name in ("mean", "std", "x_mean", "x_within_cov", "mean_all"):
        assert torch.allclose(getattr(one, name), getattr(two, name), rtol=1e-5, atol=1e-7), name
    folders = (run / "features", Path("features2"))
    tops = [pd.read_parquet(f / "top_samples.parquet") for f in folders]
    keys = ["latent", "direction", "rank"]
    both = tops[0].merge(tops[1], on=keys, suffixes=("", "_2"))
    assert len(both) == len(tops[0]) == len(tops[1])
    assert (both["activation"] - both["activation_2"]).abs().max() < 1e-4
