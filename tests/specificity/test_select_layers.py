from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from salve_lm.data.text import TextCorpus
from salve_lm.errors import (
    BadConfig,
    MissingFile,
    OutputExists,
    ShapeMismatch,
    StaleStore,
)
from salve_lm.language import decoder_prefix
from salve_lm.specificity import (
    Attribution,
    Bootstrap,
    LatentShift,
    LayerChoice,
    MassShare,
    SingleLatentAUROC,
    TopMean,
)
from tests.language.tiny_models import BOS, make_tokenizer
from tests.specificity.tiny_run import D_SAE, N_DOCUMENTS, REFERENCE, TASK, build, corpus, run

TOP_2 = LayerChoice("top_n", n=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("select")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def full(made: Path) -> Path:
    """A run with every score."""
    scores = [MassShare(), TopMean(n=3), SingleLatentAUROC(), LatentShift(), Attribution()]
    finetuned = str(made / "finetuned")
    run(made, made / "full", scores=scores, select=TOP_2, finetuned=finetuned)
    return made / "full"


def latents_alone(folder: Path, model: str, texts: list[str]) -> list[list[torch.Tensor]]:
    """layer -> document -> what the latents add, token by token, each document run on its own."""
    from salve_lm.sae import load_sae

    model = AutoModelForCausalLM.from_pretrained(folder / model).eval()
    kept: list[list[torch.Tensor]] = [[], [], []]
    for layer, found in enumerate(kept):
        module = model.get_submodule(f"{decoder_prefix(model.config)}.{layer}")
        module.register_forward_hook(lambda _m, _a, out, found=found: found.append(out[0].detach()))
    tokenizer = make_tokenizer()
    for text in texts:
        ids = [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            model(torch.tensor([ids]))
    saes = [load_sae(folder / "saes" / f"resid_post.{n}") for n in range(3)]
    return [
        [(sae.encode(x) * sae.W_dec.norm(dim=1)).detach()[1:].double() for x in found]
        for sae, found in zip(saes, kept, strict=True)
    ]


@pytest.fixture(scope="module")
def task_alone(made: Path) -> list[list[torch.Tensor]]:
    return latents_alone(made, "base", TASK)


def test_scores_equal_documents_run_one_by_one(made: Path, full: Path, task_alone) -> None:
    record = json.loads((full / "layers.json").read_text())
    reference_alone = latents_alone(made, "base", REFERENCE)
    finetuned_alone = latents_alone(made, "finetuned", TASK)
    for layer in range(3):
        task, reference = task_alone[layer], reference_alone[layer]
        means = [torch.cat(z).mean(0).numpy() for z in (task, reference)]
        with np.errstate(invalid="ignore"):
            s = np.nan_to_num((means[0] - means[1]) / (means[0] + means[1]))
        share = means[0][s >= 0.5].sum() / means[0].sum()
        assert record["rankings"]["mass_share"][str(layer)]["estimate"] == pytest.approx(
            share, rel=1e-4
        )
        after = torch.cat(finetuned_alone[layer])
        before = torch.cat(task)
        shift = (after - before).abs().sum() / (after + before).sum()
        assert record["rankings"]["latent_shift"][str(layer)]["estimate"] == pytest.approx(
            float(shift), rel=1e-3, abs=1e-6
        )
    # layer 1 was fine-tuned, so nothing below it moves
    assert record["rankings"]["latent_shift"]["0"]["estimate"] == pytest.approx(0, abs=1e-6)
    assert record["corpora"]["task"]["documents"] == N_DOCUMENTS
    assert record["corpora"]["task"]["tokens"] == sum(len(t.encode()) for t in TASK)


def test_files_tell_the_same_story(made: Path, full: Path) -> None:
    record = json.loads((full / "layers.json").read_text())
    ranking = pd.read_csv(full / "ranking.csv")
    pd.testing.assert_frame_equal(ranking, pd.read_parquet(full / "ranking.parquet"))
    assert len(ranking) == 5 * 3
    own = ranking[ranking.score == "mass_share"]
    assert sorted(own[own.selected].layer) == record["layers"] == sorted(own.layer[:2])
    assert own.estimate.is_monotonic_decreasing
    assert (ranking.low <= ranking.high).all()
    for score in ("mass_share", "auroc", "latent_shift", "attribution"):
        assert ranking[ranking.score == score].estimate.between(0, 1).all()
    assert record["model"]["n_layers"] == 3 and len(record["model"]["weights"]) == 64
    assert record["score"] == "mass_share"
    assert set(record["latents"]) == {"0", "1", "2"}


def test_texts_show_the_token_that_fires(full: Path, task_alone) -> None:
    features = pd.read_parquet(full / "features.parquet")
    task = task_alone[2]
    tokenizer = make_tokenizer()
    mine = features[features.layer == 2]
    assert len(mine) > 10
    assert mine[mine.specific].specificity.min() >= 0.5
    for row in mine.head(20).itertuples():
        z = task[row.document][:, row.latent]
        assert row.activation == pytest.approx(float(z.max()), rel=1e-3)
        at = int(z.argmax())
        ids = tokenizer(TASK[row.document], add_special_tokens=False)["input_ids"]
        assert row.token == tokenizer.decode([ids[at]])
        unmarked = row.text.replace("⟦", "").replace("⟧", "")
        assert unmarked in TASK[row.document]


def test_two_processes_find_the_same(made: Path, full: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_processes.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, str(script), str(made), str(tmp_path / "two")],
        env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((p / "layers.json").read_text()) for p in (full, tmp_path / "two"))
    assert one["corpora"] == two["corpora"]
    assert one["layers"] == two["layers"] and one["latents"] == two["latents"]
    for name, layers in one["rankings"].items():
        for n, values in layers.items():
            for key in ("estimate", "low", "high"):
                other = two["rankings"][name][n][key]
                assert other == pytest.approx(values[key], rel=1e-4, abs=1e-6), (name, n, key)
    frames = [pd.read_parquet(p / "features.parquet") for p in (full, tmp_path / "two")]
    pd.testing.assert_frame_equal(frames[0], frames[1], rtol=1e-4)


def test_cheap_scores_need_no_second_pass(made: Path, tmp_path: Path) -> None:
    found = run(made, tmp_path / "out", select=TOP_2)
    assert len(found.layers) == 2 and found.score == "mass_share"
    again = run(made, tmp_path / "again", select=TOP_2, batch_size=3, context=64)
    for n, score in found.scores["mass_share"].items():
        assert again.scores["mass_share"][n] == pytest.approx(score, rel=1e-4)
    tokens = run(made, tmp_path / "tokens", select=TOP_2, scores=[SingleLatentAUROC("tokens")])
    assert all(0 <= s <= 1 for s in tokens.scores["auroc"].values())


def test_an_adapter_is_a_fine_tuned_model(made: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(made / "base")
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p += 0.5
    adapted.save_pretrained(tmp_path / "adapter")
    found = run(
        made, tmp_path / "out", select=TOP_2, scores=[LatentShift()],
        finetuned=str(tmp_path / "adapter"),
    )  # fmt: skip
    scores = found.scores["latent_shift"]
    assert scores[0] == pytest.approx(0, abs=1e-6) and scores[1] > 1e-4


def test_no_layer_above_the_mean_is_a_result(made: Path, tmp_path: Path, caplog) -> None:
    choice = LayerChoice("threshold", threshold=2.0)
    assert run(made, tmp_path / "out", select=choice) is None
    assert "No layer was chosen" in caplog.text
    assert json.loads((tmp_path / "out" / "layers.json").read_text())["layers"] == []


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layers": [0, 7]}, BadConfig, "layers 0 to 2, and no layer 7"),
        ({"layers": [1]}, BadConfig, "only 1 at"),
        ({"scores": [LatentShift()]}, BadConfig, "give `finetuned`"),
        ({"finetuned": "x"}, BadConfig, "no score uses it"),
        ({"scores": [MassShare(), MassShare(0.8)]}, BadConfig, "called 'mass_share'"),
        ({"bootstrap": Bootstrap(0.99, 2000)}, BadConfig, "22 documents.*needs at least 41"),
        ({"select": LayerChoice("top_n", n=3)}, BadConfig, "3 of 3 layers is no choice"),
        ({"context": 65}, BadConfig, "at most 64 tokens"),
        ({"windows": 0}, BadConfig, "windows at least 1"),
    ],
)
def test_options_that_do_not_fit(made: Path, tmp_path: Path, options, error, words) -> None:
    with pytest.raises(error, match=words):
        run(made, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_corpora_that_do_not_fit(made: Path, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="is the task corpus"):
        run(made, tmp_path / "out", reference=corpus(made / "task.txt"))
    few = TextCorpus(files=[str(made / "task.txt")], separator="\n\n", limit=5)
    with pytest.raises(BadConfig, match=r"task corpus has 5 documents; .* at least 18"):
        run(made, tmp_path / "out", task=few)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExists):
        run(made, tmp_path / "out")


def test_saes_that_do_not_fit(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    template = str(tmp_path / "saes" / "layer_{layer}")
    shutil.copytree(made / "saes" / "resid_post.0", tmp_path / "saes" / "layer_0")
    with pytest.raises(MissingFile, match=r"No SAE of layer 1, 2 at .*there are SAEs of layers 0"):
        run(made, out, saes=template, layers=[0, 1, 2])
    shutil.copytree(made / "saes" / "resid_post.0", tmp_path / "saes" / "layer_1")
    with pytest.raises(BadConfig, match=r"layer 0.*not on layer 1"):
        run(made, out, saes=template)
    with pytest.raises(BadConfig, match=r"both SAEs of layer 0.*template"):
        run(made, out, saes=str(tmp_path / "saes"))
    for missing in (str(tmp_path / "none"), str(tmp_path / "none_{layer}")):
        with pytest.raises(MissingFile):
            run(made, out, saes=missing)
    edit_config(tmp_path / "saes" / "layer_0", activations={"backbone": "0" * 64})
    with pytest.raises(StaleStore, match="made from other weights"):
        run(made, out, saes=template)
    from salve_lm.sae import build_training_sae, save_sae

    for n in range(2):
        save_sae(build_training_sae("standard", 8, D_SAE, {}), tmp_path / "narrow" / str(n))
    with pytest.raises(ShapeMismatch, match=r"width 8.*16 wide"):
        run(made, out, saes=str(tmp_path / "narrow" / "{layer}"))


def test_a_fine_tuned_model_of_another_shape(made: Path, tmp_path: Path) -> None:
    from salve_lm.language import new_causal_lm
    from tests.language.tiny_models import CONFIGS

    other = new_causal_lm({**CONFIGS["gemma3_text"], "num_hidden_layers": 2})
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ShapeMismatch, match="layers 2, this one 3"):
        run(made, tmp_path / "out", scores=[LatentShift()], finetuned=str(tmp_path / "other"))


def edit_config(folder: Path, **metadata: object) -> None:
    path = folder / "cfg.json"
    config = json.loads(path.read_text())
    config["metadata"].update(metadata)
    path.write_text(json.dumps(config))
