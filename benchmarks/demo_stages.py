"""Where the time of `make demo` and `make demo-lm` goes by stage, and whether any stage idles.

Runs the commands of the Makefile one by one in a scratch folder. For each: wall and CPU seconds
(user + system, all threads), how many cores that is on average, how much of the wall time went into
imports (`-X importtime`), and what the main thread did: it ran, it waited for a core that others
had, or it was blocked (disk, sleeping, another thread). Only the last one is idleness of this
program; on a busy machine wall time says little. Linux only.

    python benchmarks/demo_stages.py demo
    python benchmarks/demo_stages.py demo-lm --threads 2
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
POLL = 0.02  # seconds between two looks at the main thread


class Stage(NamedTuple):
    """Seconds of one command."""

    command: str
    wall: float
    cpu: float
    imports: float
    ran: float
    waited: float

    @property
    def blocked(self) -> float:
        """Time in which the main thread neither ran nor wanted a core."""
        return max(0.0, self.wall - self.ran - self.waited)


def commands(target: str) -> list[list[str]]:
    """What the Makefile's `target` runs, as arguments of `python -m salve_lm`."""
    text = (ROOT / "Makefile").read_text()
    recipe = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    if recipe is None:
        raise SystemExit(f"The Makefile has no target {target!r}.")
    found = re.findall(r"-m salve_lm (.*)", recipe[1])
    return [shlex.split(line) for line in found]


def main_thread(pid: int) -> tuple[float, float]:
    """Seconds that the main thread of `pid` has run, and has waited for a core."""
    ran, waited, _ = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()
    return int(ran) / 1e9, int(waited) / 1e9


def run(args: list[str], folder: Path, threads: int) -> Stage:
    """Run one stage in `folder`."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
    }
    log = folder / "import.log"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    with log.open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-X", "importtime", "-m", "salve_lm", *args],
            cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=err,
        )  # fmt: skip
        ran = waited = 0.0
        while process.poll() is None:
            with contextlib.suppress(OSError, ValueError):  # it may end while it is looked at
                ran, waited = main_thread(process.pid)
            time.sleep(POLL)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = log.read_text(errors="replace")
    if process.returncode:
        raise SystemExit(f"{' '.join(args)} failed:\n{text[-3000:]}")
    imports = sum(int(us) for us in re.findall(r"^import time:\s+(\d+) \|", text, re.MULTILINE))
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Stage(" ".join(args), wall, cpu, imports / 1e6, ran, waited)


def line(name: str, s: Stage) -> str:
    """A row of the table."""
    return (
        f"| {name} | {s.wall:.1f} | {s.cpu:.1f} | {s.cpu / s.wall:.2f} | "
        f"{100 * s.imports / s.wall:.0f} % | {100 * s.ran / s.wall:.0f} % | "
        f"{100 * s.waited / s.wall:.0f} % | {100 * s.blocked / s.wall:.1f} % |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("target", choices=("demo", "demo-lm"))
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS; the Makefile's 2")
    args = parser.parse_args()
    stages = commands(args.target)
    width = max(len(" ".join(s)) for s in stages)
    print(f"load {os.getloadavg()[0]:.1f} at the start, {args.threads} threads")
    head = ("stage", "wall s", "CPU s", "cores", "imports", "ran", "waited for a core", "blocked")
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    done = []
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "checkpoints").symlink_to(ROOT / "checkpoints")
        for stage in stages:
            done.append(run(stage, Path(scratch), args.threads))
            print(line(f"`{done[-1].command:{width}}`", done[-1]), flush=True)
    total = Stage("all", *(sum(column) for column in list(zip(*done, strict=True))[1:]))
    print(line("**all**", total))
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
