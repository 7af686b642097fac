"""From which sparsity on a training step is faster with sparse products: the CPU's crossover.

The same autoencoder, batch and seed, forward and backward, `sparse: always` against `never`, in
turns; the encoder's bias is set so that a given number of latents acts (for topk it is k). CPU time
of the process with one thread, medians.

    python benchmarks/sae_step_sparse.py                     # standard, d_sae 4096, batch 1024
    python benchmarks/sae_step_sparse.py --architecture topk --d-sae 16384 --l0 32 1024 2048
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import Tensor

from salve_lm.sae import build_training_sae
from salve_lm.sae.sparse_products import preactivations, weights_of
from salve_lm.sae.step import training_step

COEFFICIENTS = {"l1": 1.0, "l0": 1.0}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--architecture", choices=["standard", "topk", "batchtopk", "jumprelu"], default="standard"
    )
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--l0", type=int, nargs="+", default=[32, 128, 256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="also write the record to this file")
    return parser.parse_args(argv)


def prepared(args: argparse.Namespace, x: Tensor, l0: int) -> torch.nn.Module:
    """An autoencoder of which about `l0` latents act in each row of `x`."""
    options = {"k": l0} if "topk" in args.architecture else {}
    sae = build_training_sae(args.architecture, args.d_in, args.d_sae, options, seed=0)
    if not options:
        with torch.no_grad():
            some = preactivations(x[:64], weights_of(sae)).flatten()
            border = some.kthvalue(max(1, round(some.numel() * (1 - l0 / args.d_sae)))).values
            sae.b_enc -= border
    return sae


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    x = torch.randn(args.batch, args.d_in, generator=torch.Generator().manual_seed(1))
    record = []
    for l0 in args.l0:
        sae = prepared(args, x, l0)
        seconds: dict[str, list[float]] = {"never": [], "always": []}
        for _ in range(args.rounds + 1):
            for sparse, times in seconds.items():
                sae.zero_grad()
                start = time.process_time()
                out = training_step(sae, x, COEFFICIENTS, sparse=sparse)
                out.loss.backward()
                times.append(time.process_time() - start)
        dense, few = (statistics.median(t[1:]) for t in seconds.values())
        z = out.z.to_dense()
        measured = float(z.count_nonzero() / len(z))
        row = {"l0": measured, "share": measured / args.d_sae, "dense_s": dense, "sparse_s": few}
        record.append(row | {"ratio": dense / few})
        print(
            f"{args.architecture} {args.d_in} to {args.d_sae}, {args.batch} rows: L0 {measured:.0f}"
            f" (1/{args.d_sae / measured:.0f})   dense {dense:.3f} s   sparse {few:.3f} s"
            f"   {dense / few:.2f}x",
            flush=True,
        )
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"arguments": vars(args), "rows": record}, f, indent=2)


if __name__ == "__main__":
    main()
