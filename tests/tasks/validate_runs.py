"""`validate` of tasks under one and under two forked processes; see test_validate.

Runs in a fresh interpreter: forking is safe only before OpenMP has started its threads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from salve_lm.callbacks.problem_results import ProblemResults
from salve_lm.data.language_data import LanguageData
from salve_lm.modules.language_model import LanguageModel
from salve_lm.tasks import AnswerLikelihood, Generation, PlainPrompt
from tests.tasks.language_tiny import byte_tokenizer, tiny_model
from tests.tasks.made_problems import MadeProblems


def tasks() -> list[Any]:
    # 7 and 3 problems: no even share for two processes
    return [
        Generation(
            MadeProblems(7), PlainPrompt(), max_new_tokens=6, rows=2, batch_size=2, name="generated"
        ),
        AnswerLikelihood(MadeProblems(3), batch_size=2),
    ]


def validate(source: Path, out: Path, **options: Any) -> LanguageModel:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ProblemResults(str(out))],
        **options,
    )
    module = LanguageModel(str(source))
    trainer.validate(module, datamodule=LanguageData(tasks=tasks()), verbose=False)
    return module


def save(folder: Path) -> Path:
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    given = save(root / "model")
    validate(given, root / "two", strategy="ddp_fork", devices=2)
    validate(given, root / "one", devices=1)
