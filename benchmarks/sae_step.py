"""A training step: ours through the real Lightning Trainer, its peers', and bare torch.

Same tensor, initial weights, batches, learning rate, gradient clipping (at 1.0: sae-lens' trainer
always clips) and number of steps. All train side by side in one process: after every chunk of our
steps a callback runs the same chunk through the others, so machine noise meets all alike. CPU time
of the process with one thread; medians over chunks after a warm-up chunk; a run in which they end
with different explained variance or L0 is rejected.

    python benchmarks/sae_step.py                     # L1, d_in 512, d_sae 4096, batch 4096
    python benchmarks/sae_step.py --d-sae 16384 --batch 1024 --rounds 5
    python benchmarks/sae_step.py --architecture topk # needs eai-sparsify 1.3, see below

eai-sparsify is not installed with this project: `pip install --target DIR --no-deps
eai-sparsify==1.3.0 natsort simple-parsing schedulefree einops docstring-parser`, and put DIR on
PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from sae_step_peers import bare_torch, options, quality, sae_lens, sparsify
from torch import Tensor

from salve_lm.activations.batch import ActivationBatch
from salve_lm.modules.sae import SAETraining

PEERS = {
    "standard": {"sae-lens": sae_lens, "bare torch": bare_torch},
    "topk": {"sae-lens": sae_lens, "sparsify": sparsify, "bare torch": bare_torch},
}
TARGETS = {
    "standard": {"sae-lens": 1.2, "bare torch": 0.9},
    "topk": {"sae-lens": 1.2, "sparsify": 1.0, "bare torch": 0.9},
}


def make_activations(n: int, d_in: int, seed: int) -> Tensor:
    """Rows of mean norm sqrt(d_in), each a sparse sum of 2 d_in directions, off zero [n, d_in]."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(2 * d_in, d_in, generator=torch.Generator().manual_seed(0))
    x = torch.empty(n, d_in)
    for rows in x.split(4096):
        active = torch.rand(len(rows), 2 * d_in, generator=draw) < 0.02
        rows.copy_((active * torch.rand(active.shape, generator=draw)) @ directions + 0.3)
    return x * (d_in**0.5 / x.norm(dim=1).mean())


class Batches:
    """Slices of a resident tensor, over and over."""

    def __init__(self, x: Tensor, batch: int, steps: int) -> None:
        self.x, self.parts, self.steps = x, x.split(batch), steps
        self.index = torch.arange(batch)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Tensor:
        return self.parts[step % len(self.parts)]

    def __iter__(self) -> Iterator[ActivationBatch]:
        for step in range(self.steps):
            x = self[step]
            yield ActivationBatch(x, self.index, self.index, len(x))


class SideBySide(Callback):
    """Times our chunks, and runs and times the others' between them."""

    def __init__(self, batches: Batches, chunk: int, others: dict[str, Callable]) -> None:
        self.batches, self.chunk, self.others = batches, chunk, others
        self.seconds: dict[str, list[float]] = {name: [] for name in ("salve-lm", *others)}
        self.since = 0.0

    def on_train_start(self, *args: Any) -> None:
        """Start our clock."""
        self.since = time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it after a chunk, let the others do the same steps, and start it again."""
        done = trainer.global_step
        if done % self.chunk:
            return
        self.seconds["salve-lm"].append(time.process_time() - self.since)
        for name, step in self.others.items():
            start = time.process_time()
            for number in range(done - self.chunk, done):
                step(self.batches[number])
            self.seconds[name].append(time.process_time() - start)
        self.since = time.process_time()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9, help="timed chunks")
    parser.add_argument("--chunk", type=int, default=2, help="steps in a chunk")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--architecture", choices=list(PEERS), default="standard")
    parser.add_argument("--l1", type=float, default=1.0, help="weight of standard's penalty")
    parser.add_argument("--k", type=int, default=32, help="latents that topk keeps")
    parser.add_argument(
        "--rescale", action="store_true",
        help="choose the top k by what they add (SAELens' default); not for sparsify",
    )  # fmt: skip
    parser.add_argument(
        "--sparse", choices=["auto", "always", "never"], default="auto", help="our products"
    )
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="also write the record to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    steps = args.chunk * (args.rounds + 1)
    batches = Batches(make_activations(8 * args.batch, args.d_in, seed=1), args.batch, steps)
    module = SAETraining(
        args.architecture, args.d_sae, options(args), args.d_in, lr=args.lr,
        dead_feature_handling="none", sparse=args.sparse,
    )  # fmt: skip
    module.configure_model()
    start = {name: value.clone() for name, value in module.sae.state_dict().items()}
    spread = float((batches.x - batches.x.mean(0)).square().sum(1).mean())
    trained = {"salve-lm": module.sae.state_dict}
    others = {}
    for name, build in PEERS[args.architecture].items():
        if name not in args.without:
            trained[name], others[name] = build(start, args, spread)

    side_by_side = SideBySide(batches, args.chunk, others)
    Trainer(
        max_steps=steps, accelerator="cpu", gradient_clip_val=1.0, callbacks=side_by_side,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, batches)  # fmt: skip

    held_out = make_activations(4096, args.d_in, seed=2)
    record: dict[str, Any] = {"arguments": vars(args), "torch": torch.__version__, "runs": {}}
    tokens = args.batch * args.chunk
    for name, seconds in side_by_side.seconds.items():
        speeds = [tokens / s for s in seconds[1:]]
        record["runs"][name] = {
            "tokens_per_cpu_second": round(statistics.median(speeds), 1),
            "rounds": [round(s, 1) for s in speeds],
            **quality(trained[name](), held_out, args),
        }
    ours = side_by_side.seconds["salve-lm"][1:]
    print(f"{args.architecture}, {steps} steps of {args.batch}, {args.d_in} to {args.d_sae}")
    for name, run in record["runs"].items():
        print(
            f"{name:>10}  {run['tokens_per_cpu_second']:8.1f} tokens/CPU s"
            f"   explained variance {run['explained_variance']:.5f}   L0 {run['l0']:.2f}"
        )
    failed = False
    for name, target in TARGETS[args.architecture].items():
        if name not in others:
            continue
        # chunk by chunk: neighbours in time saw the same machine
        pairs = zip(side_by_side.seconds[name][1:], ours, strict=True)
        ratio = statistics.median(theirs / mine for theirs, mine in pairs)
        record[f"ratio to {name}"] = round(ratio, 3)
        failed |= ratio < target
        print(f"ratio to {name}: {ratio:.3f} (target {target})")
    best = record["runs"]["salve-lm"]
    for name, run in record["runs"].items():
        same = (
            abs(run["explained_variance"] - best["explained_variance"]) < 1e-3
            and abs(run["l0"] - best["l0"]) < 0.01 * best["l0"]
        )
        if not same:
            print(f"rejected: {name} ended with another quality")
            failed = True
    if args.json:
        with open(args.json, "w") as f:
            json.dump(record, f, indent=2)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
