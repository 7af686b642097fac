"""The training step on a GPU: share of the matrix rate, sae-lens' trainer, sparse products.

Four questions, all on tensors of the same seed and measured by CUDA events in one run:
the bfloat16 matrix rate of this GPU at the step's own shapes; the L1 step (compiled, autocast to
bfloat16, fused Adam, clipping at 1.0) as a share of that rate, 10 d_in d_sae operations a token,
and against sae-lens' trainer with its autocast and compile switched on, at equal explained variance
and L0; the same step fed from pinned host memory; and top-k at 65k and 262k latents by sparse
products against the dense ceiling of five products at that matrix rate. After the warm-up our steps
run under `torch.cuda.set_sync_debug_mode("error")`.

    python benchmarks/sae_step_gpu.py
    python benchmarks/sae_step_gpu.py --question l1 --d-in 768 --d-sae 16384

Without a GPU it says so and measures nothing; `--device cpu --no-compile` with small sizes runs the
same code to see that it works, by the wall clock, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from sae_step_peers import quality
from torch import Tensor, nn

from salve_lm.activations.ahead import ahead
from salve_lm.sae import build_training_sae
from salve_lm.sae.step import compiled_training_step, training_step

TARGETS = {"share of matrix rate": 0.6, "ratio to sae-lens": 2.0, "ratio to dense ceiling": 1.5}
Step = Callable[[Tensor], None]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--question", choices=["all", "l1", "sparse"], default="all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--d-in", type=int, default=2560)
    parser.add_argument("--d-sae", type=int, default=16384, help="of the L1 step")
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--wide", type=int, nargs="+", default=[65536, 262144])
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--l1", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--warm-up", type=int, default=10, help="steps before timing")
    parser.add_argument("--steps", type=int, default=20, help="steps of a timed round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", help="also write the record to this file")
    args = parser.parse_args(argv)
    args.architecture, args.rescale = "standard", False
    return args


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Time that the device takes for `work`."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def matrix_rate(n: int, d_in: int, d_sae: int, device: torch.device) -> float:
    """Operations a second of bfloat16 products of the step's three shapes; the best of them."""
    shapes = [(n, d_in, d_sae), (n, d_sae, d_in), (d_in, n, d_sae)]
    best = 0.0
    for a, b, c in shapes:
        left = torch.randn(a, b, device=device, dtype=torch.bfloat16)
        right = torch.randn(b, c, device=device, dtype=torch.bfloat16)

        def multiply(left: Tensor = left, right: Tensor = right) -> None:
            for _ in range(10):
                left @ right

        multiply()
        best = max(best, 20 * a * b * c / median([seconds(multiply, device) for _ in range(5)]))
    return best


def our_step(sae: Any, args: argparse.Namespace, sparse: str) -> Step:
    optimizer = torch.optim.Adam(sae.parameters(), lr=args.lr, fused=True)
    take = training_step if args.no_compile else compiled_training_step()
    parameters = list(sae.parameters())

    def step(x: Tensor) -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            out = take(sae, x, {"l1": args.l1}, sparse=sparse)
        out.loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def sae_lens_step(start: dict[str, Tensor], args: argparse.Namespace) -> tuple[Any, Step]:
    from sae_lens import SAETrainer, StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    cfg = StandardTrainingSAEConfig(
        d_in=args.d_in, d_sae=args.d_sae, l1_coefficient=args.l1, device=args.device
    )
    sae: Any = StandardTrainingSAE(cfg)
    sae.load_state_dict(start)
    if not args.no_compile:
        # as its runner does with compile_sae
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)
    total = args.batch * (args.warm_up + args.steps * args.rounds)
    trainer: Any = SAETrainer(
        SAETrainerConfig(
            total_training_samples=total, train_batch_size_samples=args.batch, lr=args.lr,
            lr_end=args.lr / 10, autocast=True, device=args.device,
        ),
        sae,
        iter(()),
    )  # fmt: skip

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return sae, step


def make_batches(args: argparse.Namespace, device: torch.device, number: int = 8) -> list[Tensor]:
    draw = torch.Generator(device).manual_seed(1)
    directions = torch.randn(2 * args.d_in, args.d_in, generator=draw, device=device)
    batches = []
    for _ in range(number):
        shape = (args.batch, 2 * args.d_in)
        active = torch.rand(shape, generator=draw, device=device) < 0.02
        x = (active * torch.rand(shape, generator=draw, device=device)) @ directions + 0.3
        batches.append(x * (args.d_in**0.5 / x.norm(dim=1).mean()))
    return batches


def watched(step: Step, batches: list[Tensor], device: torch.device) -> None:
    """One step during which waiting for the GPU is an error."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        step(batches[0])
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def in_turns(
    steps: dict[str, Step], batches: list[Tensor], args: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """Median seconds of one step of each, in interleaved rounds over the same batches."""
    for step in steps.values():
        for number in range(args.warm_up):
            step(batches[number % len(batches)])
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():

            def work(step: Step = step) -> None:
                for number in range(args.steps):
                    step(batches[number % len(batches)])

            times[name].append(seconds(work, device) / args.steps)
    return {name: median(found) for name, found in times.items()}


def from_host(
    step: Step, batches: list[Tensor], args: argparse.Namespace, device: torch.device
) -> float:
    """Seconds of one step whose batches come from pinned host memory, copied one ahead."""
    cuda = device.type == "cuda"
    host = [x.cpu().pin_memory() if cuda else x for x in batches]

    def work() -> None:
        def produce(stopped: Any) -> Any:
            for number in range(args.steps):
                yield host[number % len(host)].to(device, non_blocking=True)

        for x in ahead(produce, 1, device):
            step(x)

    return median([seconds(work, device) / args.steps for _ in range(args.rounds)])


def question_l1(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    batches = make_batches(args, device)
    held_out = batches.pop()
    options = {"l1_coefficient": args.l1}
    ours: Any = build_training_sae("standard", args.d_in, args.d_sae, options, seed=0).to(device)
    ours.device = device
    theirs, their_step = sae_lens_step(ours.state_dict(), args)
    step = our_step(ours, args, "auto")
    rate = matrix_rate(args.batch, args.d_in, args.d_sae, device)
    found = in_turns({"salve-lm": step, "sae-lens": their_step}, batches, args, device)
    record = {
        "matrix rate, TFLOP/s": rate / 1e12,
        "tokens/s": {name: args.batch / s for name, s in found.items()},
        "share of matrix rate": 10 * args.d_in * args.d_sae * args.batch / found["salve-lm"] / rate,
        "ratio to sae-lens": found["sae-lens"] / found["salve-lm"],
        "quality": {
            name: quality(dict(sae.state_dict()), held_out, args)
            for name, sae in (("salve-lm", ours), ("sae-lens", theirs))
        },
    }
    a, b = record["quality"].values()
    record["equal quality"] = (
        abs(a["explained_variance"] - b["explained_variance"]) < 5e-3
        and abs(a["l0"] - b["l0"]) < 0.02 * b["l0"]
    )
    # after the comparison: these steps train on
    watched(step, batches, device)
    hosted = from_host(step, batches, args, device)
    record["from host memory, share of the resident speed"] = found["salve-lm"] / hosted
    return record


def question_sparse(args: argparse.Namespace, d_sae: int, device: torch.device) -> dict[str, Any]:
    batches = make_batches(args, device, 4)
    options = {"k": args.k, "aux_loss_coefficient": 0.0}
    sae: Any = build_training_sae("topk", args.d_in, d_sae, options, seed=0).to(device)
    sae.device = device
    step = our_step(sae, args, "always")
    rate = matrix_rate(args.batch, args.d_in, d_sae, device)
    found = in_turns({"sparse": step}, batches, args, device)
    watched(step, batches, device)
    ceiling = rate / (10 * args.d_in * d_sae)
    return {
        "d_sae": d_sae,
        "matrix rate, TFLOP/s": rate / 1e12,
        "tokens/s": args.batch / found["sparse"],
        "dense ceiling, tokens/s": ceiling,
        "ratio to dense ceiling": args.batch / found["sparse"] / ceiling,
    }


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("No CUDA device here: nothing was measured.")
        return 0
    device = torch.device(args.device)
    rows = []
    if args.question in ("all", "l1"):
        rows.append(question_l1(args, device))
    if args.question in ("all", "sparse"):
        rows += [question_sparse(args, d_sae, device) for d_sae in args.wide]
    failed = False
    for row in rows:
        print(json.dumps(row, indent=2))
        failed |= not row.get("equal quality", True)
        for name, target in TARGETS.items():
            if name in row:
                failed |= row[name] < target
                print(f"{name}: {row[name]:.3f} (target {target})")
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"arguments": vars(args), "torch": torch.__version__, "rows": rows}, f)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
