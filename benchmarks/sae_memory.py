"""Peak memory of training an autoencoder, against the estimate that is shown before the start.

Each row is a process of its own, forked after the imports: the real Lightning Trainer, some steps,
a validation, a checkpoint and the saved folder. Its peak is the growth of resident memory (the
kernel's high-water mark, reset before training; Linux only), with the activations already there.
The formula is `salve_lm.sae.memory`: 32 d_in d_sae bytes for float32 Adam, 3 rows d_sae values for
the latents (more for some architectures), and a second gradient for parts and accumulation.

    python benchmarks/sae_memory.py                # the table of docs/performance.md, below 4 GB
    python benchmarks/sae_memory.py --only 512x16384 --steps 8
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer

from salve_lm.activations.batch import ActivationBatch
from salve_lm.fault_tolerance.checkpoint_io import AtomicCheckpointIO
from salve_lm.modules.sae import SAETraining
from salve_lm.sae import build_training_sae
from salve_lm.sae.memory import parameter_count, training_memory

ALLOWED = 0.15


class Case(NamedTuple):
    """One training run."""

    architecture: str
    d_in: int
    d_sae: int
    rows: int
    options: dict[str, Any]
    trainer: dict[str, Any]

    @property
    def name(self) -> str:
        """What it is called in the table."""
        more = {**self.options, **self.trainer}
        of = " ".join(f"{k} {v}" for k, v in more.items() if k != "options")
        return f"{self.architecture} {self.d_in}x{self.d_sae} rows {self.rows} {of}".strip()


def cases() -> list[Case]:
    """Small to wide, with and without chunks, bfloat16, clipping and accumulation."""
    k = {"options": {"k": 32}}
    found = []
    for d_in, d_sae, rows in ((512, 16384, 1024), (1024, 65536, 512), (128, 262144, 256)):
        found.append(Case("standard", d_in, d_sae, rows, {}, {}))
        found.append(Case("standard", d_in, d_sae, rows, {"chunk_rows": rows // 8}, {}))
        found.append(Case("topk", d_in, d_sae, rows, k, {}))
        found.append(Case("topk", d_in, d_sae, rows, {**k, "chunk_rows": rows // 8}, {}))
    million = 1 << 20
    found.append(Case("topk", 64, million, 64, k, {}))
    found.append(Case("batchtopk", 64, million, 64, k, {"gradient_clip_val": 1.0}))
    clip, accumulate = {"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}
    found += [
        Case("linear_l1", 512, 16384, 1024, {}, {}),
        Case("standard", 512, 16384, 1024, {}, clip),
        Case("standard", 512, 16384, 1024, {}, accumulate),
        Case("standard", 512, 16384, 1024, {"dtype": "bfloat16"}, {}),
        Case("batchtopk", 512, 16384, 1024, k, {}),
        Case("jumprelu", 512, 16384, 1024, {}, {}),
        Case("gated", 512, 16384, 1024, {}, {}),
        Case("standard", 512, 16384, 8192, {}, {}),
        Case("standard", 512, 16384, 8192, {"chunk_rows": 512}, {}),
    ]
    return found


def high_water() -> int:
    """Largest resident size of this process since the last reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    if found is None:
        raise SystemExit("This benchmark reads Linux's /proc.")
    return int(found[1]) * 1024


class Batches:
    """Batches as a loader: Lightning takes a plain list for a list of loaders."""

    def __init__(self, batches: list[ActivationBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[ActivationBatch]:
        return iter(self.batches)


class Activations(LightningDataModule):
    """The same resident batch over and over."""

    def __init__(self, case: Case, steps: int) -> None:
        super().__init__()
        self.d_in, self.batch_size, self.steps = case.d_in, case.rows, steps
        self.validated = case.options.get("chunk_rows") or case.rows
        self.x, self.index = torch.randn(case.rows, case.d_in), torch.arange(case.rows)

    def train_dataloader(self) -> Any:
        """So many steps."""
        return Batches([self._batch(self.batch_size)] * self.steps)

    def val_dataloader(self) -> Any:
        """Two batches, of the rows that training has in work at a time."""
        return Batches([self._batch(self.validated)] * 2)

    def _batch(self, rows: int) -> ActivationBatch:
        index = self.index[:rows]
        return ActivationBatch(self.x[:rows], index, index, rows)


class Marks(Callback):
    """The high-water mark behind the training steps, before validation and saving."""

    training = 0

    def on_train_batch_end(self, *args: Any) -> None:
        """Look."""
        self.training = high_water()


def fit(case: Case, steps: int) -> Marks:
    """Train, validate, write a checkpoint and save the folder."""
    data = Activations(case, steps * case.trainer.get("accumulate_grad_batches", 1))
    marks = Marks()
    with tempfile.TemporaryDirectory() as folder:
        module = SAETraining(case.architecture, case.d_sae, out=f"{folder}/sae", **case.options)
        settings: dict[str, Any] = {
            "max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False,
            "enable_progress_bar": False, "enable_model_summary": False,
            "num_sanity_val_steps": 0, "log_every_n_steps": 2, "default_root_dir": folder,
            "callbacks": [marks], "plugins": [AtomicCheckpointIO()],
        }  # fmt: skip
        Trainer(**settings, **case.trainer).fit(module, datamodule=data)
    return marks


def measure(case: Case, steps: int) -> dict[str, int]:
    """Train `case` in this process; its measured and its estimated peak, in bytes."""
    # what PyTorch and Lightning load or start on first use is no training
    tiny = {**case.options, "chunk_rows": None}
    if "options" in tiny:
        tiny["options"] = {"k": 4}
    fit(case._replace(d_in=8, d_sae=64, rows=16, options=tiny), steps)
    x = torch.randn(case.rows, case.d_in)  # stands for the activations, which are no part of it
    Path("/proc/self/clear_refs").write_text("5")
    start = high_water()
    del x
    marks = fit(case, steps)
    whole = high_water()
    options = case.options.get("options")
    empty = build_training_sae(case.architecture, case.d_in, case.d_sae, options, device="meta")
    chunk = case.options.get("chunk_rows")
    formula = training_memory(
        case.architecture,
        parameter_count(empty),
        case.d_sae,
        chunk or case.rows,
        value_bytes=2 if case.options.get("dtype") == "bfloat16" else 4,
        second_gradients=int(chunk is not None or "accumulate_grad_batches" in case.trainer),
    )
    return {
        "training": marks.training - start,
        "whole": whole - start,
        "formula": formula.total,
        "latents": formula.latents,
    }


def measured(case: Case, steps: int) -> dict[str, int]:
    """`measure` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(measure, case, steps).result()


def main() -> None:
    """Run every case in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--steps", type=int, default=3, help="optimiser steps of a run")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "salve_lm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    sys.stdout.write(
        "| run | formula, MB | of it latents | peak of training | ratio | peak of all | ratio |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
    )
    chosen = [case for case in cases() if args.only in case.name]
    over = 0
    for case in chosen:
        found = measured(case, args.steps)
        mb = {name: value / 1e6 for name, value in found.items()}
        ratios = [found[name] / found["formula"] for name in ("training", "whole")]
        over += max(ratios) > 1 + ALLOWED
        sys.stdout.write(
            f"| {case.name} | {mb['formula']:.0f} | {mb['latents']:.0f} | {mb['training']:.0f} "
            f"| {ratios[0]:.2f} | {mb['whole']:.0f} | {ratios[1]:.2f} |\n"
        )
        sys.stdout.flush()
    sys.stdout.write(f"{over} of {len(chosen)} peaks lie more than 15 % above the formula.\n")


if __name__ == "__main__":
    main()
