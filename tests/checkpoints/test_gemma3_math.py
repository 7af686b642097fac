"""The paper's run from its shipped configs, on shrunk models of both Gemma 3 layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers.utils import logging

from salve_lm.cli import main
from salve_lm.configs import ROOT
from salve_lm.language import layer_of, load_causal_lm, new_causal_lm
from salve_lm.language.byte_pairs import train_byte_pairs
from salve_lm.sae import build_training_sae

RUN = "experiment/gemma3_4b_math"
SUBJECTS = ("algebra", "geometry", "number_theory")
# the release has autoencoders of layers 9, 17, 22 and 29; a model that reaches to 22 has three
SAE_LAYERS = (9, 17, 22)
TEXT: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 304,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 23,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 64,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "text_only": TEXT,
    "vision_language": {
        "model_type": "gemma3",
        "text_config": TEXT,
        "vision_config": IMAGES,
        "mm_tokens_per_image": 4,
        "boi_token_index": 300,
        "eoi_token_index": 301,
        "image_token_index": 302,
    },
}


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few problems in the layout of Hendrycks MATH, where the configs look for them."""
    logging.disable_progress_bar()
    for split, per_subject in (("train", 4), ("val", 8), ("test", 2)):
        for n, subject in enumerate(SUBJECTS):
            made = [
                {
                    "problem": f"What is ${a} + {n}$?",
                    "level": "Level 1",
                    "type": subject.replace("_", " ").title(),
                    "solution": f"It is $\\boxed{{{a + n}}}$." + " So it is." * 8,
                }
                for a in range(per_subject)
            ]
            path = tmp_path / "data" / "math" / split / f"{subject}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(made))
    monkeypatch.setenv("SALVE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, config: str, source: str, *more: str) -> None:
    main(
        [
            command,
            f"--config={RUN}/{config}",
            f"--model.init_args.source={source}",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            *more,
        ]
    )


def small_tasks(folder: Path) -> str:
    """The shipped tasks with outputs of four tokens in place of 512."""
    tasks = yaml.safe_load((ROOT / RUN / "data.yaml").read_text())
    tasks["init_args"]["tasks"][0]["init_args"]["max_new_tokens"] = 4
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(tasks))
    return str(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_whole_run(layout: str, problems: Path) -> None:
    new_causal_lm(LAYOUTS[layout], 0).to(torch.bfloat16).save_pretrained("gemma")
    train_byte_pairs(["What is it?"] * 9, vocab_size=290).save_pretrained("gemma")
    fit = ("--trainer.max_steps=2", "--trainer.accumulate_grad_batches=1")
    # steps large enough for bfloat16 weights to show them
    large = ("--model.init_args.learning_rate=0.05", "--model.init_args.warmup_steps=0")
    small = ("--data.init_args.context=256", "--trainer.enable_progress_bar=false")
    run("fit", "1_finetune", "gemma", *fit, *large, *small)
    adapter = Path("runs/gemma3_4b_math/finetuned")
    assert (adapter / "adapter_model.safetensors").is_file()

    # the release's place is taken by autoencoders of the shrunk model's width
    make_saes(Path("saes"))
    run("select_layers", "4_layers", "gemma", "--saes=saes/{layer}", "--context=64")
    chosen = json.loads(Path("runs/gemma3_4b_math/layers/layers.json").read_text())["layers"]
    assert len(chosen) == 2 and set(chosen) <= set(SAE_LAYERS)

    data = small_tasks(problems)
    # all of them on the paper's layout only, for the time it takes
    configs = (
        ("2_base", "3_finetuned", "5_injected") if layout == "vision_language" else ("5_injected",)
    )
    for config in configs:
        run("validate", config, "gemma", f"--data={data}", "--trainer.enable_progress_bar=false")
    losses = {solution_loss(Path(f"runs/gemma3_4b_math/results/{c[2:]}")) for c in configs}
    assert len({round(loss, 4) for loss in losses}) == len(configs)

    # the adapter names the folder it was trained on; the config a downloaded copy of it
    main(["edit", f"--config={RUN}/7_export", "--source=gemma"])
    check_exported(adapter, chosen)


def make_saes(folder: Path) -> None:
    """Random autoencoders of the layers that the release has and the shrunk model too."""
    for layer in SAE_LAYERS:
        build_training_sae("standard", 16, 24, {"l1_coefficient": 1.0}, seed=layer).save_model(
            str(folder / str(layer))
        )


def solution_loss(folder: Path) -> float:
    import pandas as pd

    assert (folder / "minerva_math.parquet").is_file()
    rows = pd.read_parquet(folder / "solution_likelihood.parquet")
    assert set(rows["subject"]) == set(SUBJECTS)
    return float(-rows["log_likelihood"].sum() / rows["tokens"].sum())


def check_exported(adapter: Path, chosen: list[int]) -> None:
    """Only the chosen layers changed, by what peft's formula gives."""
    base = load_causal_lm("gemma")
    edited = load_causal_lm("runs/gemma3_4b_math/exported")
    before, after = base.state_dict(), edited.state_dict()
    changed = {
        layer_of(name, base.config) for name, t in before.items() if not t.equal(after[name])
    }
    assert changed == set(chosen)
    low_rank = load_file(adapter / "adapter_model.safetensors")
    a, b = (
        next(
            t for n, t in low_rank.items() if f"layers.{chosen[0]}.self_attn.q_proj.lora_{x}." in n
        )
        for x in "AB"
    )
    name = next(n for n in before if n.endswith(f"layers.{chosen[0]}.self_attn.q_proj.weight"))
    expected = before[name].float() + 128 / 64 * b.float() @ a.float()
    torch.testing.assert_close(after[name], expected.to(torch.bfloat16))
