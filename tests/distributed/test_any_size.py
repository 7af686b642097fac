"""Data of any size on any number of ranks, also on more than there are samples: as one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from salve_lm.activations import ActivationData
from salve_lm.commands.discover import discover
from salve_lm.data.labelled import Split
from salve_lm.features import FeatureTable
from salve_lm.modules.sae import SAETraining
from tests.activations.tiny import D_IN, TinyData, TinyStudied
from tests.distributed.ranks import run_ranks
from vision import Classifier
from vision.data.images import ImageData, ImageSource, Normalisation

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "log_every_n_steps": 1,
    "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
}  # fmt: skip
WITHOUT = {**QUIET, "enable_checkpointing": False}
few = settings(deadline=None, max_examples=6, derandomize=True)
worlds = st.integers(2, 3)


class Seen(pl.Callback):
    """What this rank saw, by stage."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.samples: dict[str, list[list[int]]] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        (name,) = [n for n in trainer.callback_metrics if n in ("train/loss", "train_loss")]
        self.losses.append(float(trainer.callback_metrics[name]))

    def _end(self, trainer: pl.Trainer, m: Any, outputs: Any, batch: Any, *_: Any) -> None:
        if hasattr(batch, "sample"):
            stage = str(trainer.state.stage)
            self.samples.setdefault(stage, []).append(batch.sample.tolist())

    on_validation_batch_end = on_test_batch_end = _end


def plain(metrics: Any) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in found.items()} for found in metrics]


def run(work: Any, world: int) -> list[dict[str, Any]]:
    """`work(options of the trainer)` of one process, then of every rank of several."""
    results = [json.loads(json.dumps(work({"devices": 1})))]
    with TemporaryDirectory() as folder:

        def one(rank: int) -> None:
            found = work({"devices": world, "strategy": "ddp"})
            Path(folder, f"{rank}.json").write_text(json.dumps(found))

        assert run_ranks(one, world) == [0] * world
        for rank in range(world):
            results.append(json.loads(Path(folder, f"{rank}.json").read_text()))
    return results


def check(one: Any, other: Any) -> None:
    """Equal, numbers up to rounding."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
    if isinstance(one, dict | list):
        assert len(one) == len(other)
        for key in one if isinstance(one, dict) else range(len(one)):
            check(one[key], other[key])
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6, nan_ok=True)
    else:
        assert one == other


@few
@given(n=st.integers(1, 9), n_val=st.integers(1, 5), batch=st.integers(1, 6), world=worlds)
def test_autoencoders(n: int, n_val: int, batch: int, world: int) -> None:
    def work(options: dict[str, Any]) -> dict[str, Any]:
        data = ActivationData(
            None, TinyStudied(), TinyData(n_train=n, n_val=n_val), batch_size=batch
        )
        module = SAETraining("standard", 12, {"l1_coefficient": 0.1}, lr=1e-2, dead_after=2)
        seen = Seen()
        trainer = pl.Trainer(max_epochs=2, callbacks=[seen], **WITHOUT, **options)
        trainer.fit(module, datamodule=data)
        return {
            "losses": seen.losses,
            "validate": plain(trainer.validate(module, datamodule=data, verbose=False)),
            "test": plain(trainer.test(module, datamodule=data, verbose=False)),
            "fired": module.firing.since_fired.tolist(),
            "samples": seen.samples,
        }

    one, *ranks = run(work, world)
    shares = [r.pop("samples") for r in ranks]
    whole = one.pop("samples")
    for result in ranks:
        check(one, result)
    assert len(one["losses"]) == 2 * -(-n // batch)
    for stage, batches in whole.items():
        # side by side, the shares are the batches of one process
        dealt = zip(*(s[stage] for s in shares), strict=True)
        together = [list(chain(*parts)) for parts in dealt]
        assert together == batches


class Made:
    """Images of noise, of two classes in turn."""

    def __init__(self, n: int, seed: int) -> None:
        self.labels = [i % 2 for i in range(n)]
        self._x = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))

    def load(self, index: int, draw: int | None) -> Tensor:
        return self._x[index]

    def identity(self) -> object:
        return len(self.labels)

    def describe(self, index: int) -> str:
        return str(index)


class MadeImages(ImageData):
    def __init__(self, n: int, n_val: int, batch_size: int) -> None:
        super().__init__(batch_size, num_workers=0, seed=0)
        self._sizes = n, n_val

    @property
    def normalisation(self) -> Normalisation:
        return Normalisation((0.0,) * 3, (1.0,) * 3)

    def load_sources(self) -> tuple[list[str], dict[Split, ImageSource]]:
        n, n_val = self._sizes
        sources: dict[Split, ImageSource] = {"train": Made(n, 0), "val": Made(n_val, 1)}
        return ["even", "odd"], {**sources, "test": Made(n_val + 1, 2)}


@few
@given(n=st.integers(6, 25), n_val=st.integers(2, 7), batch=st.integers(1, 4), world=worlds)
def test_classifiers(n: int, n_val: int, batch: int, world: int) -> None:
    """`batch` is that of one of several processes; they have at least one global batch."""
    n = max(n, batch * world)

    def work(options: dict[str, Any]) -> dict[str, Any]:
        per_process = batch * (world if options["devices"] == 1 else 1)
        data = MadeImages(n, n_val, per_process)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.GELU(), nn.Linear(8, 2))
        module = Classifier(net, 2)
        seen = Seen()
        trainer = pl.Trainer(max_epochs=2, callbacks=[seen], **WITHOUT, **options)
        trainer.fit(module, datamodule=data)
        fitted = {k: float(v) for k, v in trainer.callback_metrics.items() if "val" in k}
        found = {
            "losses": seen.losses,
            "fit": fitted,
            "validate": plain(trainer.validate(module, datamodule=data, verbose=False)),
            "test": plain(trainer.test(module, datamodule=data, verbose=False)),
        }
        return found | {"logits": torch.cat(trainer.predict(module, data)).tolist()}  # type: ignore[arg-type]

    one, *ranks = run(work, world)
    logits = one.pop("logits")
    dealt = [r.pop("logits") for r in ranks]
    for result in ranks:
        check(one, result)
    assert sum(map(len, dealt)) == len(logits) == n_val
    for i, row in enumerate(logits):
        check(row, dealt[i % world][i // world])


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from salve_lm.sae import build_training_sae, save_sae, to_inference

    folder = tmp_path_factory.mktemp("sae") / "sae"
    save_sae(to_inference(build_training_sae("standard", D_IN, 12, {}, seed=1)), folder)
    return folder


@few
@given(n=st.integers(3, 9), batch=st.integers(1, 6), world=worlds)
def test_discover(sae: Path, n: int, batch: int, world: int) -> None:
    with TemporaryDirectory() as folder:
        one, many = Path(folder, "one"), Path(folder, "many")

        def work(out: Path, options: dict[str, Any]) -> None:
            data = ActivationData(None, TinyStudied(), TinyData(n_train=n), batch_size=batch)
            trainer = pl.Trainer(**WITHOUT, **options)
            discover(trainer, data, str(sae), str(out), top_samples=4)

        work(one, {"devices": 1})
        options = {"devices": world, "strategy": "ddp"}
        assert run_ranks(lambda _: work(many, options), world) == [0] * world
        assert {p.name for p in one.iterdir()} == {p.name for p in many.iterdir()}
        a, b = FeatureTable.load(one), FeatureTable.load(many)
        for name in ("counts", "firing_rate", "mean", "std", "x_mean", "x_within_cov", "mean_all"):
            left, right = getattr(a, name), getattr(b, name)
            torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert [a.dominant(c) for c in a.class_names] == [b.dominant(c) for c in b.class_names]
        tops = [pd.read_parquet(f / "top_samples.parquet") for f in (one, many)]
        pd.testing.assert_frame_equal(*tops, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def no_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lightning's advice on data this small would fill the screen."""
    monkeypatch.setenv("POSSIBLE_USER_WARNINGS", "off")
    yield
