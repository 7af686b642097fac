"""Does the data module read a store from disk at >= 70 % of what `dd` reads?

A store of random activations, read whole through the loaders that training and validation use:
`train`, shuffled (a buffer at a time, since the store is larger than one), and `val`, in order,
each with and without `prefetch`. Against `dd bs=1M` of the same files. Cold: the files' pages are
dropped before each run (`posix_fadvise`, which needs no rights). Warm: everything in the page
cache, where `dd` copies into one buffer that never leaves the processor's cache, and a loader must
write each row to memory. Interleaved; medians; the ratio is that of the medians.

    python benchmarks/store_reading.py [--gib 1] [--d-in 512] [--dtype float32] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from salve_lm import __version__
from salve_lm.activations.datamodule import ActivationData
from salve_lm.activations.shard import DTYPES
from salve_lm.activations.shard_writer import ShardWriter
from salve_lm.activations.store import FORMAT, VERSION, SplitEntry, write_index


def write_store(folder: Path, rows: int, d_in: int, dtype: str) -> None:
    """One store whose `train` and `val` splits are the same files, linked."""
    draw = torch.Generator().manual_seed(0)
    writer = ShardWriter(folder, "train", DTYPES[dtype], 65536)
    writer.check_space(rows, d_in)
    block = torch.randn(16384, d_in, generator=draw).to(DTYPES[dtype])
    for first in range(0, rows, len(block)):
        n = min(len(block), rows - first)
        sample = torch.arange(first, first + n)
        writer.add(block[:n], torch.zeros(n, dtype=torch.int64), sample)
    shards = writer.finish()
    whole: SplitEntry = {"samples": rows, "rows": rows, "shards": shards}
    key = {"backbone": "", "site": "made", "data": {"train": "", "val": ""}, "dtype": dtype}
    write_index(
        folder,
        {
            "format": FORMAT, "version": VERSION, "key": key, "class_names": ["made"],
            "d_in": d_in, "dtype": dtype, "splits": {"train": whole, "val": whole},
            "versions": {"salve_lm": __version__},
        },  # type: ignore[typeddict-item]
    )  # fmt: skip
    os.sync()


def dd(files: list[Path]) -> None:
    for file in files:
        command = ["dd", f"if={file}", "of=/dev/null", "bs=1M", "status=none"]
        subprocess.run(command, check=True)


def drop(files: list[Path]) -> None:
    """Take the files out of the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def reader(store: Path, split: str, rows: int, options: argparse.Namespace) -> Callable[[], None]:
    prefetch = split.endswith("prefetch")
    data = ActivationData(
        store=str(store), batch_size=options.batch, buffer_rows=options.buffer_rows,
        prefetch=prefetch,
    )  # fmt: skip
    data.setup("fit")

    def read() -> None:
        train = split.startswith("train")
        loader = data.train_dataloader() if train else data.val_dataloader()
        seen = sum(len(batch.x) for batch in loader)
        if seen != rows:
            raise RuntimeError(f"{seen} rows of {rows}")

    return read


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--buffer-rows", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="a folder on the disk to measure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    row = options.d_in * DTYPES[options.dtype].itemsize
    rows = int(options.gib * 2**30) // row
    folder = Path(tempfile.mkdtemp(prefix="store-reading-", dir=options.folder))
    try:
        write_store(folder, rows, options.d_in, options.dtype)
        files = sorted(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        cases: dict[str, Callable[[], None]] = {"dd": lambda: dd(files)}
        for name in ("train, prefetch", "train, alone", "val, prefetch", "val, alone"):
            cases[name] = reader(folder, name, rows, options)
        for cache in ("cold", "warm"):
            taken: dict[str, list[float]] = {name: [] for name in cases}
            used: dict[str, list[float]] = {name: [] for name in cases}
            for turn in range(options.rounds + 1):  # the first is a warm-up
                # what ran before matters: the kernel's free memory comes in other pieces then
                for name, run in random.sample(list(cases.items()), len(cases)):
                    if cache == "cold":
                        drop(files)
                    start, cpu = time.perf_counter(), sum(os.times()[:4])
                    run()
                    if turn:
                        taken[name].append(time.perf_counter() - start)
                        used[name].append(sum(os.times()[:4]) - cpu)
            median = {name: statistics.median(times) for name, times in taken.items()}
            found = {
                name: {
                    "gb_s": round(size / seconds / 1e9, 2),
                    "of_dd": round(median["dd"] / seconds, 3),
                    "slowest_gb_s": round(size / max(taken[name]) / 1e9, 2),
                    "cpu_s": round(statistics.median(used[name]), 2),
                }
                for name, seconds in median.items()
            }
            load = [round(x, 1) for x in os.getloadavg()]
            print(json.dumps({"cache": cache, "bytes": size, "load": load, **found}))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
