"""Two processes, one with an empty share of the last batch, against one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from salve_lm.errors import NotFinite
from salve_lm.modules.sae import SAETraining
from salve_lm.sae import load_sae

Make = Callable[..., Any]


class Record(Callback):
    """Writes what each rank holds at the end, and the losses rank 0 logged."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.losses = folder, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        folder = self.folder / f"{trainer.world_size}-{trainer.global_rank}"
        folder.mkdir(parents=True)
        torch.save(module.state_dict(), folder / "state.pt")
        (folder / "losses.json").write_text(json.dumps(self.losses))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("linear_l1", {"normalize_input": "covariance_whitening"}),
        ("standard", {"dead_feature_handling": "resample", "dead_after": 97}),
        ("topk", {"normalize_input": "expected_average_only_in", "dead_after": 97}),
        ("topk", {"chunk_rows": 5, "dead_after": 97}),
        ("batchtopk", {"dead_after": 97}),
        ("gated", {"lr_warm_up_steps": 3, "l1_warm_up_steps": 3}),
        ("jumprelu", {"dead_feature_handling": "resample", "dead_after": 97}),
        ("matryoshka_batchtopk", {"dead_after": 97}),
    ],
)
def test_two_processes_are_one(
    name: str, changes: dict[str, Any], options: dict[str, Any], data: Any, make_trainer: Make,
    tmp_path: Path,
) -> None:  # fmt: skip
    metrics = {}
    for world in (2, 1):
        out = tmp_path / f"sae-{world}"
        module = SAETraining(name, 24, options[name], lr=1e-2, out=str(out), **changes)
        parallel = {"devices": 2, "strategy": "ddp_fork"} if world == 2 else {}
        trainer = make_trainer(max_epochs=4, callbacks=Record(tmp_path), **parallel)
        trainer.fit(module, datamodule=data)
        metrics[world] = json.loads((out / "metrics.json").read_text())

    def read(run: str) -> tuple[dict[str, torch.Tensor], list[float]]:
        state = torch.load(tmp_path / run / "state.pt", weights_only=True)
        return state, json.loads((tmp_path / run / "losses.json").read_text())

    one, losses = read("1-0")
    rank0, losses2 = read("2-0")
    rank1, _ = read("2-1")
    assert losses2 == pytest.approx(losses, rel=1e-5)
    for key, value in one.items():
        assert torch.equal(rank0[key], rank1[key]), key
        torch.testing.assert_close(rank0[key], value, rtol=1e-3, atol=1e-4, msg=key)
    for key, number in metrics[1].items():
        assert metrics[2][key] == (
            number if isinstance(number, str) else pytest.approx(number, abs=1e-3)
        )
    assert load_sae(tmp_path / "sae-2").cfg.metadata.training_samples == 4 * 97


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
def test_repeated_tokens_train_alike(
    name: str, options: dict[str, Any], data: Any, make_trainer: Make, tmp_path: Path
) -> None:
    """The border of the k-th value runs through equal activations in every step."""
    draw = torch.Generator().manual_seed(0)
    data.train = data.train[torch.randint(9, (97,), generator=draw)]
    losses = {}
    for world in (1, 2):
        module = SAETraining(name, 24, options[name], lr=1e-2, dead_after=97)
        parallel = {"devices": 2, "strategy": "ddp_fork"} if world == 2 else {}
        make_trainer(max_epochs=6, callbacks=Record(tmp_path), **parallel).fit(module, data)
        losses[world] = json.loads((tmp_path / f"{world}-0" / "losses.json").read_text())
    assert len(losses[1]) == 6 * 4
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)


def test_nan_on_one_rank_stops_both(data: Any, make_trainer: Make, tmp_path: Path) -> None:
    data.train = data.train.clone()
    data.train[60] = float("nan")  # in the second batch, in the share of rank 1
    module = SAETraining("standard", 24, out=str(tmp_path / "sae"))
    with pytest.raises(Exception, match="NaN or infinity in 'x'") as caught:
        make_trainer(devices=2, strategy="ddp_fork").fit(module, datamodule=data)
    assert isinstance(caught.value, NotFinite) or "NotFinite" in str(caught.value)
    assert not (tmp_path / "sae").exists()
