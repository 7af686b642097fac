"""Are exact thresholds of 10,000 samples x 512 inputs >= 100x a scipy root finder per sample?

Both start from the same float64 contributions and bias. scipy gets its brackets for free: from 0
to the last breakpoint, or, where the logit changes sign more than once, to the breakpoint right
of the first root (elsewhere `brentq` may return a later one). Two scipy rows:

- `as written`: brentq on b + sum_j w_j a_j max(0, 1 - alpha c_j), numpy, the formula of METHODS 4;
- `tuned`: brentq on b + u @ max(0, 1 - alpha c), with u_j = w_j a_j computed beforehand.

Runs are interleaved; medians of wall time and of this thread's CPU time (a busy machine inflates
the first) are printed with the machine's load. One thread by default: scipy has no more.

    python benchmarks/thresholds.py [--samples 10000] [--inputs 512] [--repeats 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq

from salve_lm.alpha_crit import class_flip, exact, linear_contributions


class Problem(NamedTuple):
    """Pooled ReLU features, a head's row and bias, a unit decoder row's magnitudes."""

    a: np.ndarray  # [n, d_in] float32
    w: np.ndarray  # [d_in]
    b: float
    c: np.ndarray  # [d_in]


class Times(NamedTuple):
    """Seconds of each run."""

    wall: list[float]
    cpu: list[float]


def problem(n: int, d_in: int, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    a = np.maximum(0, rng.normal(0.5, 1.0, (n, d_in))).astype(np.float32)
    c = np.abs(rng.normal(size=d_in))
    return Problem(a, rng.normal(0.05, 0.1, d_in), -1.0, c / np.linalg.norm(c))


def brackets(u: np.ndarray, b: float, c: np.ndarray) -> tuple[np.ndarray, int]:
    """Right ends of the brackets (nan: no root), and how many samples change sign repeatedly.

    From the values at all breakpoints, computed one by one, not with the code under test.
    """
    strengths = np.sort(c[c > 0])[::-1]
    gates = np.maximum(0, 1 - c[:, None] / strengths)  # [d_in, m]
    right, repeated = np.full(len(u), np.nan), 0
    for start in range(0, len(u), 1000):
        z = b + np.column_stack([u[start : start + 1000].sum(1), u[start : start + 1000] @ gates])
        for i, row in enumerate(z <= 0):
            if row[0] or not row.any():
                continue
            single = np.count_nonzero(np.diff(row)) == 1
            repeated += not single
            right[start + i] = 1 / strengths[-1 if single else int(row.argmax()) - 1]
    return right, repeated


def scipy_roots(z: Callable[[int], Callable[[float], float]], right: np.ndarray) -> np.ndarray:
    """Root of each sample by brentq; 0 or inf where its bracket says so."""
    roots = np.empty(len(right))
    for i, end in enumerate(right):
        f = z(i)
        if np.isnan(end):
            roots[i] = 0.0 if f(0.0) <= 0 else np.inf
        else:
            roots[i] = brentq(f, 0.0, end)
    return roots


def timed(times: Times, run: Callable[[], object]) -> None:
    wall, cpu = time.perf_counter(), time.thread_time()
    run()
    times.cpu.append(time.thread_time() - cpu)
    times.wall.append(time.perf_counter() - wall)


def compare(n: int, d_in: int, repeats: int) -> dict[str, object]:
    a, w, b, c = problem(n, d_in)
    x, row, strength = torch.from_numpy(a), torch.from_numpy(w), torch.from_numpy(c)
    u = linear_contributions(x, row)
    u_rows, a_rows = np.ascontiguousarray(u.numpy()), a.astype(np.float64)
    right, repeated = brackets(u_rows, b, c)

    def written(i: int) -> Callable[[float], float]:
        ai = a_rows[i]
        return lambda alpha: b + np.sum(w * ai * np.maximum(0, 1 - alpha * c))

    def tuned(i: int) -> Callable[[float], float]:
        ui = u_rows[i]
        return lambda alpha: b + ui @ np.maximum(0, 1 - alpha * c)

    runs: dict[str, Callable[[], object]] = {
        "exact": lambda: exact(u, b, strength),
        "contributions + exact": lambda: exact(linear_contributions(x, row), b, strength),
        "scipy brentq, as written": lambda: scipy_roots(written, right),
        "scipy brentq, tuned": lambda: scipy_roots(tuned, right),
    }
    expected, found = scipy_roots(tuned, right), exact(u, b, strength).numpy()
    for run in runs.values():
        run()
    times = {name: Times([], []) for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            # Ours takes milliseconds: several runs beside each long one, so that its median
            # does not rest on a handful of moments.
            for _ in range(1 if name.startswith("scipy") else 5):
                timed(times[name], run)
    finite = np.isfinite(expected) & (expected > 0)
    same_kind = np.array_equal(expected[~finite], found[~finite])
    difference = np.abs(found[finite] / expected[finite] - 1).max()
    return {
        "times": {
            k: [statistics.median(t.wall), statistics.median(t.cpu)] for k, t in times.items()
        },
        "roots": int(finite.sum()),
        "repeated_sign_changes": repeated,
        "same_without_root": bool(same_kind),
        "max_relative_difference": float(difference),
    }


def flip(n: int, d_in: int, n_classes: int = 10) -> dict[str, float]:
    """Class flips with all rows edited: time, and how far memory grows beyond the inputs."""
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(n, d_in, generator=rng)
    W = torch.randn(n_classes, d_in, generator=rng)
    c = torch.rand(d_in, generator=rng)
    class_flip(x[:100], W, None, c, 0, "all")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = [class_flip(x, W, None, c, k, "all") for k in range(n_classes)]
    seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    counted = sum(int(f.counted.sum()) for f in found)
    return {"seconds": seconds, "samples": counted, "grown_mib": grown / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    flips = flip(args.samples, args.inputs)
    result = compare(args.samples, args.inputs, args.repeats)
    if args.json:
        print(json.dumps(vars(args) | {"load": [load, os.getloadavg()[0]], "flip": flips} | result))
        return
    times: dict[str, list[float]] = result["times"]  # type: ignore[assignment]
    print(f"{args.samples} samples x {args.inputs} inputs, {args.threads} thread(s), medians;")
    print(f"load average {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    print(f"{'':26}{'wall ms':>10}{'CPU ms':>10}{'wall / exact':>14}{'CPU / exact':>13}")
    for name, (wall, cpu) in times.items():
        ratio = (wall / times["exact"][0], cpu / times["exact"][1])
        print(f"{name:26}{wall * 1e3:10.1f}{cpu * 1e3:10.1f}{ratio[0]:14.1f}{ratio[1]:13.1f}")
    print(
        f"{result['roots']} roots ({result['repeated_sign_changes']} samples with several sign "
        f"changes); largest relative difference {result['max_relative_difference']:.1e}; "
        f"samples without a root agree: {result['same_without_root']}"
    )
    print(
        f"class flip, 10 classes, rows all: {flips['samples']} samples in "
        f"{flips['seconds'] * 1e3:.0f} ms; memory grew by {flips['grown_mib']:.0f} MiB"
    )


if __name__ == "__main__":
    main()
