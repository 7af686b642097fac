"""Does the editing callback, with all its checks, cost <= 1 % of one validation of the demo?

One validation: torchvision's ResNet-18 at 32 pixels on 900 of scikit-learn's digits, batch 128.
Timed inside it: the callback's `on_validation_start` (resolve the edits against the present
weights, apply, check, compare, install, log) and `on_validation_end` (restore). The first
validation also loads SAE and feature table and is shown apart. Validations without the callback
run in between, for the machine's own noise.

Memory: the most bytes that apply, install and restore hold at once in tensors of at least 64 kB,
over the bytes of the tensors that are edited.

    python benchmarks/editing_callback.py [--images 900] [--repeats 7] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from salve_lm.callbacks import WeightEditing
from salve_lm.edits import DecoderGuided, EditSpec, LatentContrastErasure, apply_named, plan_edits
from salve_lm.edits.live import LiveEdit
from salve_lm.edits.lookup import ModelIndex
from salve_lm.features import StreamingFeatureStatistics
from salve_lm.modules.studied import StudiedModel
from salve_lm.sae import LinearL1, LinearL1Config, hash_sae, save_sae

D_IN, D_SAE, CLASSES = 512, 512, 10


class Digits(StudiedModel):
    """The demo's network, untrained: its speed does not depend on its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torchvision.models.resnet18(num_classes=CLASSES)
        self.head_name = "fc"
        self.sites = {"pooled": "fc:input"}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        right = self.model(batch[0]).argmax(1) == batch[1]
        self.log("val_accuracy", right.float().mean())


class Timed(WeightEditing):
    """Notes how long its own hooks take."""

    def __init__(self, edits: list[EditSpec]) -> None:
        super().__init__(edits)
        self.apply_s: list[float] = []
        self.restore_s: list[float] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply."""
        start = time.perf_counter()
        super().on_validation_start(trainer, pl_module)
        self.apply_s.append(time.perf_counter() - start)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore."""
        start = time.perf_counter()
        super().on_validation_end(trainer, pl_module)
        self.restore_s.append(time.perf_counter() - start)


class Peak(TorchDispatchMode):
    """The most bytes held at once by new tensors of at least `at_least` bytes."""

    def __init__(self, at_least: int = 1 << 16) -> None:
        super().__init__()
        self.at_least, self.bytes = at_least, 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().nbytes() >= self.at_least:
            storage = out.untyped_storage()
            if storage.data_ptr() not in given:
                self._alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return out


def images(n: int) -> tuple[Tensor, Tensor]:
    digits = load_digits()
    x = torch.tensor(digits.images[:n], dtype=torch.float32)[:, None] / 16
    x = torch.nn.functional.interpolate(x, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    return x.contiguous(), torch.tensor(digits.target[:n])


def artefacts(studied: Digits, x: Tensor, label: Tensor, folder: Path) -> dict[str, str]:
    sae = LinearL1(LinearL1Config(d_in=D_IN, d_sae=D_SAE))
    save_sae(sae, folder / "sae")
    fc, studied.model.fc = studied.model.fc, torch.nn.Identity()
    studied.model.eval()
    statistics = StreamingFeatureStatistics(D_IN, D_SAE, CLASSES)
    with torch.no_grad():
        pooled = torch.cat([studied.model(part) for part in x.split(128)])
        statistics.update(pooled, sae.encode(pooled), label)
    studied.model.fc = fc
    names = [str(k) for k in range(CLASSES)]
    provenance = {"sae": hash_sae(folder / "sae")}
    norms = sae.W_dec.detach().norm(dim=1)
    statistics.finalize(names, norms, provenance).save(folder / "features")
    return {"sae": str(folder / "sae"), "features": str(folder / "features")}


def quiet_trainer(callbacks: list[Any]) -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def measure(
    studied: Digits, loader: DataLoader[Any], edits: list[EditSpec], repeats: int
) -> Mapping[str, Any]:
    timed = Timed(edits)
    plain, edited = quiet_trainer([]), quiet_trainer([timed])
    without, with_edits = [], []
    for _ in range(repeats + 1):  # the first is a warm-up, and loads SAE and table
        for running, times in ((plain, without), (edited, with_edits)):
            start = time.perf_counter()
            running.validate(studied, loader, verbose=False)
            times.append(time.perf_counter() - start)
    own = [a + r for a, r in zip(timed.apply_s, timed.restore_s, strict=True)]
    validation = statistics.median(without[1:])
    return {
        "validation_s": validation,
        "validation_with_edits_s": statistics.median(with_edits[1:]),
        "apply_ms": 1e3 * statistics.median(timed.apply_s[1:]),
        "restore_ms": 1e3 * statistics.median(timed.restore_s[1:]),
        "apply_and_restore_percent_of_validation": 100 * statistics.median(own[1:]) / validation,
        "worst_percent": 100 * max(own[1:]) / validation,
        "first_ms": 1e3 * own[0],
    }


def copies(studied: Digits, edits: list[EditSpec]) -> Mapping[str, float]:
    plans = plan_edits(edits, studied)
    index = ModelIndex(studied.model)
    tensors = index.values
    names = {n for plan in plans for n in plan.tensors}
    size = sum(tensors[n].numel() * tensors[n].element_size() for n in names)
    with Peak(min(1 << 16, size // 4)) as peak:
        applied = apply_named(tensors, [plan.named for plan in plans])
        live = LiveEdit(index, applied.tensors)
        del applied
        live.restore()
    return {"edited_kB": size / 1e3, "peak_copies": peak.bytes / size}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=900)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    studied = Digits()
    x, label = images(options.images)
    loader = DataLoader(TensorDataset(x, label), batch_size=128)
    with tempfile.TemporaryDirectory() as folder:
        paths = artefacts(studied, x, label, Path(folder))
        one: list[EditSpec] = [DecoderGuided(target_class=3, alpha=20.0, **paths)]
        cases: dict[str, list[EditSpec]] = {
            "one multiplicative edit of the head": one,
            "ten of them and an erasure": [
                *(DecoderGuided(target_class=k, alpha=20.0, **paths) for k in range(CLASSES)),
                LatentContrastErasure(target_class=3, **paths),
            ],
            "a 512 x 512 x 3 x 3 convolution": [
                DecoderGuided(module="layer4.1.conv2", feature=3, alpha=2.0, sae=paths["sae"])
            ],
        }
        for name, edits in cases.items():
            found = {**measure(studied, loader, edits, options.repeats), **copies(studied, edits)}
            print(json.dumps({"case": name, **{k: round(v, 3) for k, v in found.items()}}))
    load = os.getloadavg()
    print(json.dumps({"images": options.images, "threads": options.threads, "load": load}))


if __name__ == "__main__":
    main()
