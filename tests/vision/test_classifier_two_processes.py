"""Two processes: validation counts each sample once, and training needs no padding either."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from vision import Classifier
from vision.data import Digits


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Forked processes must not use the OpenMP threads that their parent started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Diary(pl.Callback):
    """Writes down the label counts that each rank trains and validates on, and the metrics."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, {"train": 0, "val": 0}

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: list[Tensor], index: int
    ) -> None:
        self.seen["train"] += len(batch[1])

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: list[Tensor], *_: Any
    ) -> None:
        self.seen["val"] += len(batch[1])

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items()}
        path = self.folder / f"{trainer.global_rank}.json"
        path.write_text(json.dumps({"seen": self.seen, "metrics": metrics}))
        if trainer.is_global_zero:
            torch.save(module.model.state_dict(), self.folder / "weights.pt")


def test_validation_under_ddp_is_exact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 10))
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    # an odd number of held-out samples: two processes cannot share them evenly
    data = Digits(image_size=8, test_fraction=0.497)
    two = pl.Trainer(
        max_epochs=2, devices=2, strategy="ddp_fork", num_sanity_val_steps=0,
        callbacks=[Diary(tmp_path)], **options,
    )  # fmt: skip
    two.fit(Classifier(net), data)
    ranks = [json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1)]
    n = len(data.eval_dataset("val"))  # type: ignore[arg-type]
    assert n % 2 == 1
    assert sum(r["seen"]["val"] for r in ranks) == 2 * n
    assert ranks[0]["seen"]["train"] == ranks[1]["seen"]["train"] == 2 * 7 * 64

    net.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    (one,) = pl.Trainer(devices=1, **options).validate(Classifier(net), data, verbose=False)
    for r in ranks:
        for name in one:
            assert r["metrics"][name] == pytest.approx(one[name], abs=1e-6), name
