"""How much memory a process may still take: on a GPU, in RAM, within a container's limit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# version 1 writes "no limit" as the largest multiple of a page
_NO_LIMIT = 1 << 60


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on `device`; None where the system does not say.

    On a GPU that is what the driver has free and what PyTorch's own cache holds unused. In RAM it
    is what the kernel counts as available, or what the limit of a control group (a container, a
    SLURM job) leaves if that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    return free_ram() if device.type == "cpu" else None


def free_ram(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Bytes of RAM that this process can still take; None where there is no /proc.

    Args:
        proc: where the kernel's process file system is.
        cgroups: where its control groups are, version 1 or 2.
    """
    try:
        fields = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return max(0, min([available, *_left_in_groups(proc, cgroups)]))


def _left_in_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            root, limit, usage, cache = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, cache = cgroups / "memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / group.lstrip("/")
        # a group is bound by the limits of those that it lies in; inside a container its own
        # path may not be mounted, and the root is the container's group
        for level in (folder, *folder.parents):
            left = _left(level / limit, level / usage, level / "memory.stat", cache)
            if left is not None:
                yield left
            if level == root:
                break


def _left(limit: Path, usage: Path, stat: Path, cache: str) -> int | None:
    try:
        most = limit.read_text().strip()
        if most == "max" or int(most) > _NO_LIMIT:
            return None
        used = int(usage.read_text())
        kept = dict(line.split() for line in stat.read_text().splitlines())
        # files that the kernel keeps in memory and gives up when it is needed
        return int(most) - used + int(kept.get(cache, 0))
    except (OSError, ValueError):
        return None
