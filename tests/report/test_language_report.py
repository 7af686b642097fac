"""The report of a language run: every figure from the stages' own files, honest and whole."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from salve_lm.errors import CorruptFile, MissingFile, SalveError, StaleStore
from salve_lm.hashing import hash_file
from salve_lm.report.language_charts import Axis
from salve_lm.report.language_html import render
from salve_lm.report.language_run import is_language_run, read_language_run
from salve_lm.report.language_summary import correlate, summarise_language_run
from salve_lm.report.language_verdict import judge_run
from salve_lm.report.limits import MAX_BYTES
from salve_lm.report.summary import report
from tests.report.made_language_run import PER_SUBJECT, SUBJECTS
from tests.report.test_html import Page

SECTIONS = {
    "layers", "variants", "subjects", "projection", "edits", "features", "autoencoders", "repeat",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(language_run: Path) -> Path:
    return language_run


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_summary_has_the_promised_keys(run: Path, summary: dict[str, Any]) -> None:
    layer = {"layer", "score", "ci", "latent_shift", "attribution", "measured_gain", "selected"}
    assert all(set(e) == layer for e in summary["layers"])
    assert [e["layer"] for e in summary["layers"]] == [0, 1, 2]
    assert all(e["ci"][0] <= e["ci"][1] for e in summary["layers"])
    assert set(summary["rank_correlation"]) == {"mass_share", "latent_shift", "attribution"}
    assert set(summary["accuracy"]) == {
        "base", "finetuned", "selected", "random_layers", "least_specific", "all_layers",
        "projected", "projected_rescaled", "random_subspace",
    }  # fmt: skip
    for value in (*summary["accuracy"]["random_layers"], summary["accuracy"]["projected"]):
        assert set(value["per_subject"]) == set(SUBJECTS) and 0 <= value["overall"] <= 1
    assert len(summary["accuracy"]["random_layers"]) == 2  # every other subset of one of three
    assert set(summary["tests"]) == set(SUBJECTS)
    for test in summary["tests"].values():
        assert set(test) == {"z_unpooled", "p_unpooled", "mcnemar_p", "holm_p"}
    assert set(summary["projection"]) == {"retained_energy", "k_over_d", "ratio"}
    assert {"base", "selected", "all_layers", "random_direction"} <= set(summary["general_loss"])
    assert summary["report"] == str(run / "report.html")


def test_figures_are_those_of_the_rows(run: Path, summary: dict[str, Any]) -> None:
    """Against the parquet files, by pandas and scipy alone."""
    folder = run / "inject/results"
    base, chosen = (pd.read_parquet(folder / v / "made.parquet") for v in ("base", "selected"))
    assert summary["metric"] == "made/exact_match"
    assert summary["accuracy"]["base"]["overall"] == pytest.approx(base["exact_match"].mean())
    by_hand = chosen.groupby("subject")["exact_match"].mean().to_dict()
    assert summary["accuracy"]["selected"]["per_subject"] == pytest.approx(by_hand)
    raw = []
    for subject in SUBJECTS:
        a, b = (t[t["subject"] == subject].sort_values("sample")["exact_match"].to_numpy()
                for t in (base, chosen))  # fmt: skip
        n = len(a)
        p, q = a.mean(), b.mean()
        spread = np.sqrt(p * (1 - p) / n + q * (1 - q) / n)
        found = summary["tests"][subject]
        assert n == PER_SUBJECT
        if spread:
            assert found["z_unpooled"] == pytest.approx((q - p) / spread)
        raw.append(found["mcnemar_p"])
    order = np.argsort(raw)
    adjusted, highest = {}, 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, raw[i] * (len(raw) - rank)))
        adjusted[SUBJECTS[i]] = highest
    holm = {s: t["holm_p"] for s, t in summary["tests"].items()}
    assert holm == pytest.approx(adjusted)
    for e in summary["layers"]:
        alone = pd.read_parquet(folder / f"single_layers_{e['layer']}" / "made.parquet")
        gain = alone["exact_match"].mean() - base["exact_match"].mean()
        assert e["measured_gain"] == pytest.approx(gain)
    expected = spearmanr(
        [e["score"] for e in summary["layers"]], [e["measured_gain"] for e in summary["layers"]]
    )
    assert summary["rank_correlation"]["mass_share"] == pytest.approx(expected.statistic)
    text = pd.read_parquet(folder / "all_layers" / "text.parquet")
    loss = text["nll"].sum() / text["tokens"].sum()
    assert summary["general_loss"]["all_layers"] == pytest.approx(loss)


def test_projection_is_what_the_projected_variant_applied(
    run: Path, summary: dict[str, Any]
) -> None:
    """Kept energy by brute force: dense projectors on gain-folded tensors."""
    from safetensors.torch import load_file

    data = json.loads((run / "inject/projection.json").read_text())
    layers = json.loads((run / "layers/layers.json").read_text())
    (n,) = layers["layers"]
    decoder = load_file(run / f"saes/resid_post.{n}/sae_weights.safetensors")["W_dec"].double()
    q, _ = torch.linalg.qr(decoder[layers["latents"][str(n)]].T)
    projector = q @ q.T
    base, tuned = (
        load_file(run.parent / name / "model.safetensors") for name in ("base", "finetuned")
    )
    reading = {"q_proj": "input_layernorm", "k_proj": "input_layernorm",
               "v_proj": "input_layernorm", "gate_proj": "pre_feedforward_layernorm",
               "up_proj": "pre_feedforward_layernorm"}  # fmt: skip
    writing = {"o_proj": "post_attention_layernorm", "down_proj": "post_feedforward_layernorm"}
    kept = whole = 0.0
    for name in (x for x in base if f"layers.{n}." in x):
        part = name.split(".")[-2]
        if part not in reading | writing:
            continue
        tau = (tuned[name] - base[name]).double()
        tau = tau if part in reading else tau.T
        norm = (reading | writing)[part]
        gain = 1 + base[f"model.layers.{n}.{norm}.weight"].double()
        seen = tau * gain
        whole += float(seen.square().sum())
        kept += float((seen @ projector).square().sum())
    found = summary["projection"]
    assert found["retained_energy"] == pytest.approx(kept / whole, rel=1e-5)
    assert found["k_over_d"] == pytest.approx(q.shape[1] / 16)
    assert found["ratio"] == pytest.approx(found["retained_energy"] / found["k_over_d"])
    total = next(e for e in data["totals"] if e["name"] == f"layer {n}")
    # among all subspaces of that rank, principal components of the activations and random latents
    assert 0 < total["principal_components"] < 1
    assert total["random_subspace"]["low"] < found["k_over_d"] < total["random_subspace"]["high"]
    assert total["random_latents"]["low"] <= total["random_latents"]["mean"]


def test_exported_file_is_the_one_named(summary: dict[str, Any]) -> None:
    exported = summary["exported"]
    assert hash_file(Path(exported["path"])) == exported["sha256"]
    assert exported["matches_live"] is True
    assert 0 <= exported["rss_growth_mb"] < 500


def test_page_is_whole_and_needs_no_network(run: Path, summary: dict[str, Any]) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.ids == SECTIONS
    assert {link[1:] for link in page.links} == SECTIONS
    assert not re.search(r"https?://|@import|url\(|<script|<link|<img", html)
    assert len(html.encode()) < MAX_BYTES
    assert "<i>sums</i>" not in html and "&lt;i&gt;sums&lt;/i&gt;" in html
    assert page.count["mark"] > 3
    assert page.count["svg"] > 10
    for word in ("python -m salve_lm report run", "python -m salve_lm inject", "rebuild_folder",
                 summary["exported"]["sha256"], "made/exact_match", "Spearman",
                 "Holm", "random layers"):  # fmt: skip
        assert word in page.text or word in html, word
    assert str(run.parent) not in page.text


def test_marks_stand_at_the_token_that_fired(run: Path, summary: dict[str, Any]) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    frame = pd.read_parquet(run / "layers/features.parquet")
    tokens = {t for t in frame["token"] if t.strip() and not set(t) & set("<>&\"'\n")}
    shown = set(re.findall(r"<mark>([^<]*)</mark>", html)) - {"token"}
    assert tokens and tokens & shown


def judged(run: Path, **changes: Any) -> tuple[str, str, str]:
    """Headline, tone and page of the run with another set of verdicts."""
    found = read_language_run(run)
    injection = found.injection | {"verdicts": [v | changes for v in found.injection["verdicts"]]}
    found = dataclasses.replace(found, injection=injection)
    summary = summarise_language_run(found)
    verdict = judge_run(found, summary, correlate(found))
    return verdict.headline, verdict.tone, render(found, summary, correlate(found))


def test_verdict_says_whether_the_choice_beat_random_layers(run: Path) -> None:
    headline, tone, page = judged(run, beats_random=True)
    assert (tone, "beat other layers chosen at random" in headline) == ("good", True)
    # the made run: the best of three, of which no p below 0.33 can come
    headline, tone, page = judged(run)
    assert (tone, "too few to call that more" in headline) == ("mixed", True)
    headline, tone, page = judged(run, beats_random=False, rank=2)
    assert (tone, "did not beat" in headline) == ("bad", True)
    assert headline in page


@pytest.mark.parametrize(
    ("kept", "says"), [(0.1, "less than a random"), (0.5, "about what"), (0.9, "more than a")]
)
def test_projection_is_judged_against_chance(kept: float, says: str, run: Path) -> None:
    found = read_language_run(run)
    projection = dict(found.projection or {}) | {"retained_energy": kept, "k_over_d": 0.5}
    found = dataclasses.replace(found, projection=projection)
    summary = summarise_language_run(found)
    assert any(says in line for line in judge_run(found, summary, correlate(found)).lines)


def test_controls_that_were_not_run_are_null_and_said(copy: Path) -> None:
    path = copy / "inject/injection.json"
    record = json.loads(path.read_text())
    kept = ("base", "selected", "finetuned")
    record["variants"] = {k: v for k, v in record["variants"].items() if k in kept}
    record["verdicts"] = []
    path.write_text(json.dumps(record))
    summary = report(copy)
    assert summary["projection"] is None and summary["rank_correlation"] == {}
    assert summary["accuracy"]["random_layers"] == []
    assert summary["accuracy"]["all_layers"] is None
    # the chosen layer is one, and so its own gain is known
    assert all((e["measured_gain"] is None) != e["selected"] for e in summary["layers"])
    page = Page((copy / "report.html").read_text())
    for words in ("Nothing says whether the chosen layers beat", "No rank correlation",
                  "No projection was injected", "Single layers were not injected"):  # fmt: skip
        assert words in page.text


@pytest.mark.parametrize(
    ("gone", "command"),
    [
        ("layers", "select_layers (with out: RUN/layers)"),
        ("inject", "inject (with out: RUN/inject)"),
        ("inject/projection.json", "inject (with out: RUN/inject)"),
        ("exported", "edit (a task vector"),
        ("saes", "SAEGroupTraining"),
    ],
)
def test_a_missing_stage_names_its_command(gone: str, command: str, copy: Path) -> None:
    path = copy / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(MissingFile, match=re.escape(command)):
        report(copy)


@pytest.mark.parametrize(
    "file", ["layers/layers.json", "inject/injection.json", "inject/projection.json",
             "inject/results/base/results.json", "exported/edit.json"],
)  # fmt: skip
def test_another_version_or_damage_names_file_and_cure(file: str, copy: Path) -> None:
    path = copy / file
    record = json.loads(path.read_text())
    for content in (json.dumps(record | {"version": 99}), json.dumps(record)[:-40], "{}"):
        path.write_text(content)
        with pytest.raises(CorruptFile) as e:
            report(copy)
        assert Path(file).name in str(e.value)
        assert re.search(r"again|version of salve-lm|version that|Give", str(e.value)), str(e.value)


@pytest.mark.parametrize("file", ["layers/features.parquet", "inject/compare/compare.parquet"])
def test_a_truncated_table_is_named(file: str, copy: Path) -> None:
    (copy / file).write_bytes((copy / file).read_bytes()[:-100])
    with pytest.raises(CorruptFile, match=Path(file).name):
        report(copy)


def test_fields_that_are_missing_are_no_traceback(copy: Path) -> None:
    path = copy / "inject/injection.json"
    record = json.loads(path.read_text())
    for variant in record["variants"].values():
        del variant["summary"]
    path.write_text(json.dumps(record))
    with pytest.raises(SalveError, match="not what the stages write"):
        report(copy)


def test_stages_that_do_not_belong_together_are_refused(copy: Path) -> None:
    path = copy / "layers/layers.json"
    record = json.loads(path.read_text())
    record["layers"] = [n for n in range(3) if n not in record["layers"]]
    path.write_text(json.dumps(record))
    with pytest.raises(StaleStore, match="Run inject again"):
        report(copy)
    record["model"]["weights"] = "ab" * 32
    path.write_text(json.dumps(record))
    with pytest.raises(StaleStore, match="chosen for another model"):
        report(copy)


def test_exported_weights_that_changed_afterwards_are_named(copy: Path) -> None:
    path = copy / "exported/model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    with pytest.raises(CorruptFile, match=r"model\.safetensors: it is not what"):
        report(copy)
    path.unlink()  # the weights may have been moved to where they are used
    report(copy)


def test_a_vision_run_is_none_of_language(tmp_path: Path) -> None:
    (tmp_path / "sae").mkdir()
    assert not is_language_run(tmp_path)
    (tmp_path / "saes").mkdir()
    assert is_language_run(tmp_path)


def test_axis_has_round_ticks_and_holds_its_values() -> None:
    axis = Axis.over([0.031, -0.004, float("nan")], include=(0.0,))
    assert axis.ticks[0] <= -0.004 and axis.ticks[-1] >= 0.031
    assert any(abs(t) < 1e-12 for t in axis.ticks)
    assert axis.place(axis.ticks[0]) == 0 and axis.place(9.0) == 1
    assert axis.label(0.01) == "0.01" and axis.label(-0.01) == "−0.01"
    assert len(Axis.over([]).ticks) >= 2 and len(Axis.over([5.0]).ticks) >= 2
