"""How fast is a task vector written into a checkpoint, against mergekit and against the disk?

A 1.0B Gemma-3 text checkpoint with random weights (`make_gemma_checkpoint.py`), lambda = 1 into two
layers and into all 26: this project's `edit_folder` (everything that `salve-lm edit` does after its
imports, hashes and `edit.json` included), mergekit 0.1.5's `task_arithmetic` (its `run_merge`,
after its imports), and `cp -r` of the base as the disk's floor. Interleaved, caches dropped before
and `sync` included in each run, a new process each; medians. The results of both are compared in
units of the last place of bfloat16.

    python3 -m venv MK && MK/bin/pip install mergekit==0.1.5
    python benchmarks/injection.py --folder DISK --mergekit MK/bin/mergekit-yaml

`--one vl-4b` measures one run on gemma-3-4b-it's true shape in place of all that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

LAYERS = {"two layers": [9, 17], "all layers": "all"}
SCRIPTS = Path(__file__).parent
# The host of a virtual machine takes emptied pages back within seconds, and touching them again is
# slow: every run has to find the machine in the same state, however long its imports take.
SETTLE_S = 6

OURS = """
import json, os, sys, time
start = time.perf_counter()
import transformers.models.gemma3.modeling_gemma3
from transformers import AutoConfig, AutoModelForCausalLM
from salve_lm.commands.edit_folder import edit_folder
from salve_lm.edits.task_vector import TaskVectorInjection
imported = time.perf_counter() - start
base, tuned, out, layers = json.loads(sys.argv[1])
def memory(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))
def moved():
    with open("/proc/self/io") as f:
        return {k: int(v) for k, v in (line.split(":") for line in f)}
before, first = memory("VmRSS"), moved()
start, cpu = time.perf_counter(), time.process_time()
done = edit_folder(base, [TaskVectorInjection(finetuned=tuned, layers=layers)], out)
os.sync()
last = moved()
print(json.dumps({
    "s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu, "import_s": imported,
    "growth_gb": (memory("VmHWM") - before) / 1e9, "peak_gb": memory("VmHWM") / 1e9,
    "read_gb": (last["rchar"] - first["rchar"]) / 1e9,
    "written_gb": (last["wchar"] - first["wchar"]) / 1e9,
    "from_disk_gb": (last["read_bytes"] - first["read_bytes"]) / 1e9,
    "changed": len(done.changes),
}))
"""

MERGEKIT = """
import json, os, sys, time
start = time.perf_counter()
import resource
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
imported = time.perf_counter() - start
base, tuned, out, layers, dtype = json.loads(sys.argv[1])
weight = 1.0
if layers != "all":  # its filter is a substring, hence the dot
    weight = [{"filter": f"layers.{k}.", "value": 1.0} for k in layers] + [{"value": 0.0}]
config = {
    "merge_method": "task_arithmetic", "base_model": base, "dtype": dtype,
    "out_dtype": "bfloat16", "models": [{"model": tuned, "parameters": {"weight": weight}}],
}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
options = MergeOptions(
    quiet=True, copy_tokenizer=False, write_model_card=False, out_shard_size=500_000_000
)
start, cpu = time.perf_counter(), time.process_time()
run_merge(MergeConfiguration.model_validate(config), out, options)
os.sync()
print(json.dumps({
    "s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu, "import_s": imported,
    "growth_gb": (peak() - before) / 1e9, "peak_gb": peak() / 1e9,
}))
"""


def make(folder: Path, shape: str) -> tuple[Path, Path]:
    """The base and the fine-tuned checkpoint of a shape below `folder`, made where absent."""
    base, tuned = folder / f"{shape}-base", folder / f"{shape}-finetuned"
    if not (base.is_dir() and tuned.is_dir()):
        command = [sys.executable, str(SCRIPTS / "make_gemma_checkpoint.py"), shape, str(base)]
        subprocess.run([*command, "--finetuned", str(tuned)], check=True)
    return base, tuned


def cold(out: Path, *inputs: Path) -> None:
    """Remove the last output and empty the page cache, of the inputs at least."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        for file in (f for folder in inputs for f in folder.iterdir()):
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    time.sleep(SETTLE_S)


def run(python: str, code: str, arguments: list[Any]) -> dict[str, float]:
    """Run `code` in a process of its own; the last line it prints is its result."""
    paths = [str(a) if isinstance(a, Path) else a for a in arguments]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)} if code == OURS else None
    done = subprocess.run(
        [python, "-c", code, json.dumps(paths)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def copy(base: Path, out: Path) -> dict[str, float]:
    """The disk's floor: `cp` and `sync`."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    os.sync()
    return {"s": time.perf_counter() - start}


def units_in_last_place(a: Path, b: Path) -> dict[str, int]:
    """The largest distance of two bfloat16 checkpoints, and how many values are not equal."""
    from salve_lm.task_vectors.blocks import row_blocks
    from salve_lm.task_vectors.tensor_files import TensorFiles

    most, unequal, n = 0, 0, 0
    with TensorFiles(a) as first, TensorFiles(b) as second:
        for name in first.names:
            for start, stop in row_blocks(first.info(name).shape):
                x, y = (_ordered(f.read_rows(name, start, stop)) for f in (first, second))
                distance = (x - y).abs()
                most = max(most, int(distance.max()))
                unequal += int((distance != 0).sum())
                n += distance.numel()
    return {"largest_ulp": most, "unequal": unequal, "of": n}


def _ordered(x: torch.Tensor) -> torch.Tensor:
    """bfloat16 as integers in the order of the values, neighbours one apart."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def compare(options: argparse.Namespace) -> None:
    base, tuned = make(options.folder, "text-1b")
    outs = {k: options.folder / f"out-{k}" for k in ("ours", "mergekit", "floor")}
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    peer = options.mergekit and str(Path(options.mergekit).parent / "python")
    for k in range(options.repeats):
        for case, layers in LAYERS.items():
            here = found.setdefault(case, {})
            for who in ("floor", "ours", *(f"mergekit {d}" for d in options.dtypes)):
                if who.startswith("mergekit") and (peer is None or k >= options.peer_repeats):
                    continue
                out = outs[who.split()[0]]
                cold(out, base, tuned)
                if who == "floor":
                    measured = copy(base, out)
                elif who == "ours":
                    measured = run(sys.executable, OURS, [base, tuned, out, layers])
                else:
                    arguments = [base, tuned, out, layers, who.split()[1]]
                    measured = run(str(peer), MERGEKIT, arguments)
                here.setdefault(who, []).append(measured)
                if who.startswith("mergekit") and k == 0:
                    print(json.dumps({"case": case, "ours against": who, **units_in_last_place(
                        outs["ours"], out)}), flush=True)  # fmt: skip
    for case, runs in found.items():
        ours = statistics.median(r["s"] for r in runs["ours"])
        for who, measured in runs.items():
            row = {
                key: round(statistics.median(r[key] for r in measured), 3) for key in measured[0]
            }
            seconds = sorted(round(r["s"], 2) for r in measured)
            against = round(statistics.median(r["s"] for r in measured) / ours, 2)
            print(
                json.dumps({"case": case, "who": who, **row, "all_s": seconds, "x_ours": against})
            )
    print(json.dumps({"load": os.getloadavg(), "cores": os.cpu_count()}))
    for out in outs.values():
        shutil.rmtree(out, ignore_errors=True)


def one(options: argparse.Namespace) -> None:
    base, tuned = make(options.folder, options.one)
    out = options.folder / "out-one"
    for case, layers in LAYERS.items():
        cold(out, base, tuned)
        floor = copy(base, out)["s"]
        cold(out, base, tuned)
        measured = run(sys.executable, OURS, [base, tuned, out, layers])
        rounded = {k: round(v, 3) for k, v in measured.items()}
        print(json.dumps({"case": case, **rounded, "floor_s": round(floor, 2)}), flush=True)
    shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, 12 GB free")
    parser.add_argument("--mergekit", help="mergekit-yaml of an environment that has 0.1.5")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-repeats", type=int, default=5)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        help="what mergekit computes in; float32 is what this project does",
    )
    parser.add_argument("--one", choices=["text-1b", "vl-4b"], help="only this shape, once")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if options.one:
        one(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
