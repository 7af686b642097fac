"""How long the command line takes to answer, against `import lightning` alone.

Whole processes, interleaved; CPU seconds (user + system) and wall seconds, medians and ratios.

    python benchmarks/start_up.py [ROUNDS]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from statistics import median

COMMANDS = {
    "import lightning": ["-c", "import lightning"],
    "salve_lm --help": ["-m", "salve_lm", "--help"],
    "salve_lm fit --help": ["-m", "salve_lm", "fit", "--help"],
}


def run(args: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run([sys.executable, *args], check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    """Print one line a command."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for args in COMMANDS.values():
        run(args)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, args in COMMANDS.items():
            taken[name].append(run(args))
    base = [median(t[i] for t in taken["import lightning"]) for i in (0, 1)]
    for name, times in taken.items():
        cpu, wall = (median(t[i] for t in times) for i in (0, 1))
        print(
            f"{name:22s} cpu {cpu:5.2f} s ({cpu / base[0]:.2f}x)"
            f"  wall {wall:5.2f} s ({wall / base[1]:.2f}x)"
        )


if __name__ == "__main__":
    main()
