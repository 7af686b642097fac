"""Do statistics over a million samples need constant memory, and how long do they take?

A million samples x 512 inputs, made batch by batch and never all there:

- `thresholds`: `CriticalThreshold` in a real validation of a linear head, all definitions, one edit
  for each of the classes (it keeps 49 bytes a sample, and nothing of 512 x 4 bytes);
- `discover`: class statistics of the latents and of the inputs, and the top samples of each latent,
  as `discover` collects them.

Each size runs in a process of its own, which reports how far its resident memory grew over what it
had after one batch: the peak, from /proc. The growth from the first to the last size is what a
sample costs.

    python benchmarks/streaming_statistics.py [--samples 100000 1000000] [--inputs 512]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn

from salve_lm.callbacks import CriticalThreshold
from salve_lm.commands.discover import TopSamples
from salve_lm.edits import DecoderGuided
from salve_lm.features import StreamingFeatureStatistics
from salve_lm.modules.studied import StudiedModel

BATCH, CLASSES = 4096, 10


class Head(StudiedModel):
    """A linear head, whose inputs are the data."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Identity(), nn.Linear(d_in, CLASSES))
        self.head_name, self.sites = "1", {"pooled": "1:input"}
        with torch.no_grad():
            self.model[1].weight += torch.eye(d_in)[:CLASSES]

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.model(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Run the head; the callback reads what it reads."""
        self(batch[0])


class Made(LightningDataModule):
    """Samples of known classes: a random vector each, and more of the class's own direction."""

    def __init__(self, n: int, d_in: int) -> None:
        super().__init__()
        self.n, self.d_in = n, d_in
        self.class_names = [f"class {k}" for k in range(CLASSES)]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same every time."""
        draw = torch.Generator().manual_seed(0)
        for first in range(0, self.n, BATCH):
            n = min(BATCH, self.n - first)
            label = torch.randint(CLASSES, (n,), generator=draw)
            x = torch.rand(n, self.d_in, generator=draw)
            x[torch.arange(n), label] += 3
            yield x, label

    def val_dataloader(self) -> Any:
        """All batches."""
        return _Again(self)


class _Again:
    def __init__(self, made: Made) -> None:
        self.made = made

    def __len__(self) -> int:
        return -(-self.made.n // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.made.batches()


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return 1024 * int(line.split()[1])


def thresholds(n: int, d_in: int, folder: Path) -> dict[str, float]:
    from salve_lm.sae import LinearL1, LinearL1Config, save_sae

    torch.manual_seed(1)
    save_sae(LinearL1(LinearL1Config(d_in=d_in, d_sae=32)), folder / "sae")
    edits = [
        DecoderGuided(feature=k, target_class=k, rows="all", sae=str(folder / "sae"))
        for k in range(CLASSES)
    ]
    measured = CriticalThreshold(edits=edits)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[measured],
    )  # fmt: skip
    trainer.validate(Head(d_in), Made(n, d_in), verbose=False)
    if sum(row["samples"] for row in measured.rows) != n:
        raise RuntimeError("not every sample was counted once")
    return {"median_flip": measured.rows[0]["flip_median"]}


def discover(n: int, d_in: int, d_sae: int) -> dict[str, float]:
    encoder = torch.randn(d_in, d_sae, generator=torch.Generator().manual_seed(0)) / d_in**0.5
    statistics, top = StreamingFeatureStatistics(d_in, d_sae, CLASSES), TopSamples(16)
    first = 0
    for x, label in Made(n, d_in).batches():
        z = torch.relu(x @ encoder)
        statistics.update(x, z, label)
        top.update(z, torch.arange(first, first + len(x)), label)
        first += len(x)
    table = statistics.finalize([str(k) for k in range(CLASSES)], torch.ones(d_sae))
    return {"samples": float(table.counts.sum())}


def measure(what: str, n: int, options: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:

        def run(samples: int) -> dict[str, float]:
            if what == "thresholds":
                return thresholds(samples, options.inputs, Path(folder) / str(samples))
            return discover(samples, options.inputs, options.latents)

        run(BATCH)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        wall, cpu = time.perf_counter(), time.process_time()
        found = run(n)
        return {
            "statistics": what, "samples": n,
            "seconds": round(time.perf_counter() - wall, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "grown_mb": round((resident("VmHWM") - before) / 1e6, 1),
            "inputs_mb": round(4e-6 * n * options.inputs, 1),
            **found,
        }  # fmt: skip


def main() -> None:
    """Print one line of JSON a size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("thresholds", "discover"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        print(json.dumps(measure(options.only, options.samples[0], options)))
        return
    for what in ("thresholds", "discover"):
        grown = []
        for n in options.samples:
            command = [sys.executable, __file__, "--only", what, "--samples", str(n)]
            for name in ("inputs", "latents", "threads"):
                command += [f"--{name}", str(getattr(options, name))]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            grown.append(found["grown_mb"])
            print(json.dumps({**found, "load": round(os.getloadavg()[0], 1)}), flush=True)
        more = options.samples[-1] - options.samples[0]
        if more:
            each = round(1e6 * (grown[-1] - grown[0]) / more, 1)
            print(json.dumps({"statistics": what, "bytes_a_sample": each}), flush=True)


if __name__ == "__main__":
    main()
