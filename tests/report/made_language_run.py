"""A small run of a language model, made by the commands themselves, so that formats cannot drift.

Random models of three layers. The tasks' rows do not come from what the model writes (it would
get nothing right) but from how far its layers moved from the base: layer 1 teaches most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from salve_lm.commands.edit_folder import edit_folder
from salve_lm.commands.inject import inject
from salve_lm.commands.measure import measure
from salve_lm.data.language_data import LanguageData
from salve_lm.edits.residual_ablation import ResidualAblation
from salve_lm.edits.residual_scaling import ResidualScaling
from salve_lm.edits.task_vector import TaskVectorInjection
from salve_lm.language import load_causal_lm
from salve_lm.modules.language_model import LanguageModel
from salve_lm.specificity import Attribution, Bootstrap, LatentShift, LayerChoice, MassShare
from salve_lm.tasks import TextLoss
from salve_lm.tasks.base import EvaluationTask, Row
from salve_lm.tasks.per_subject import subject_means
from salve_lm.trainer import SalveTrainer
from tests.specificity import tiny_run

SUBJECTS = ("addition", "subtraction", "<i>sums</i>")
PER_SUBJECT = 20
TEACHES = (0.02, 0.6, 0.2)  # share of the problems that each layer's task vector teaches
CONTROLS: list[Any] = [
    "finetuned", "all_layers", "least_specific", "random_layers", "single_layers", "projected",
    "projected_rescaled", "random_subspace", "random_direction",
]  # fmt: skip


class Taught(EvaluationTask):
    """Problems that a model gets right as far as its weights moved towards the fine-tuned ones.

    Args:
        base: folder of the unedited model.
        finetuned: folder of the fine-tuned model.
        name: of the task.
    """

    metrics = ("exact_match", "loss")
    batch_size = 16

    def __init__(self, base: str, finetuned: str, name: str = "made") -> None:
        self.base, self.finetuned, self.name = base, finetuned, name

    def items(self, tokenizer: Any) -> Sequence[int]:
        return range(PER_SUBJECT * len(SUBJECTS))

    def collate(self, items: Sequence[int], tokenizer: Any) -> dict[str, Any]:
        ids = torch.tensor([[3 + (7 * i + j) % 200 for j in range(9)] for i in items])
        return {"sample": list(items), "input_ids": ids}

    def step(self, model: Any, tokenizer: Any, batch: Mapping[str, Any]) -> list[Row]:
        known = 0.1 + sum(
            share * _moved(model, self.base, self.finetuned, n) for n, share in enumerate(TEACHES)
        )
        rows = []
        for i in batch["sample"]:
            hard = (i * 37 % 100) / 100
            rows.append(
                {
                    "sample": i,
                    "subject": SUBJECTS[i % len(SUBJECTS)],
                    "exact_match": hard < known,
                    "loss": max(hard - known, 0.0) + 0.1 + 0.001 * i,
                }
            )
        return rows

    def summary(self, rows: Sequence[Row]) -> dict[str, float]:
        return {k: v for m in self.metrics for k, v in subject_means(rows, m).items()}


def make_language_run(folder: Path, controls: Sequence[Any] = CONTROLS) -> Path:
    """Models and SAEs in `folder`, and a finished run in `folder/run`; returns that."""
    run = folder / "run"
    tiny_run.build(run)  # its `saes` are those of the run
    base, tuned = run.parent / "base", run.parent / "finetuned"
    for name in ("base", "finetuned"):
        (run / name).rename(folder / name)
    teach(base, tuned)
    choose(run, base, tuned)
    edit = TaskVectorInjection(
        finetuned=str(tuned),
        layers=str(run / "layers/layers.json"),
        sae=str(run / "saes/resid_post.{layer}"),
    )
    corpus = tiny_run.corpus(run / "reference.txt")
    data = LanguageData(
        tasks=[Taught(str(base), str(tuned)), TextLoss(corpus, context=48, name="text")]
    )
    inject(
        quiet(), LanguageModel(source=str(base)), data, edit, str(run / "inject"),
        controls=list(controls), judge=["made/exact_match", "made/loss"], resamples=400,
    )  # fmt: skip
    raw = TaskVectorInjection(finetuned=str(tuned), layers=str(run / "layers/layers.json"))
    edit_folder(base, [raw], run / "exported", check_live=True, file_digests=True)
    measure_edits(run, base, data)
    return run


def measure_edits(run: Path, base: Path, data: LanguageData) -> None:
    """The command `measure`: an edit, its control, and one without a control."""
    chosen: dict[str, Any] = {
        "layers": str(run / "layers/layers.json"), "sae": str(run / "saes/resid_post.{layer}"),
        "top": 2,
    }  # fmt: skip
    edits: list[Any] = [
        ResidualScaling(name="scaling", **chosen),
        ResidualScaling(name="shuffled", guide="permuted", **chosen),
        ResidualAblation(name="ablation", **chosen),
    ]
    measure(
        quiet(), LanguageModel(source=str(base)), data, edits, str(run / "edits"),
        alphas={"scaling": [1.0, 3.0], "shuffled": [1.0, 3.0]}, resamples=400,
    )  # fmt: skip


def choose(run: Path, base: Path, tuned: Path) -> None:
    """The command `select_layers` on the tiny run: one of three layers."""
    from salve_lm.commands.select_layers import select_layers

    select_layers(
        quiet(), LanguageModel(source=str(base)), tiny_run.corpus(run / "task.txt"),
        tiny_run.corpus(run / "reference.txt"), str(run / "saes"), str(run / "layers"),
        scores=[MassShare(), LatentShift(), Attribution()], finetuned=str(tuned),
        select=LayerChoice("top_n", n=1), bootstrap=Bootstrap(resamples=400), context=48,
        top_latents=4, windows=2,
    )  # fmt: skip


def quiet(*callbacks: Callback) -> SalveTrainer:
    """A trainer that shows and keeps nothing."""
    return SalveTrainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip


def teach(base: Path, tuned: Path) -> None:
    """Give the fine-tuned model a task vector in every layer."""
    model = load_causal_lm(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".layers." in name:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(tuned)


_PROBE = "mlp.down_proj.weight"


def _moved(model: Any, base: str, finetuned: str, layer: int) -> float:
    """How far the layer lies along the way from the base to the fine-tuned model, 0 to 1."""
    name = f"model.layers.{layer}.{_PROBE}"
    # the state dict holds the originals while an edit is on
    now = model.get_parameter(name).detach().cpu()
    before, after = (_tensor(folder, name) for folder in (base, finetuned))
    tau = after - before
    return float(((now - before) * tau).sum() / tau.square().sum())


def _tensor(folder: str, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(f"{folder}/model.safetensors", "pt") as f:
        found: torch.Tensor = f.get_tensor(name)
        return found
