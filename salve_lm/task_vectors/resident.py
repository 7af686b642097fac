"""How much memory a stretch of work takes at its peak, beyond what was resident before it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size, and nothing else


class ResidentGrowth:
    """Measures from the moment it is made; imports before that do not count.

    On Linux the kernel's peak is reset first, so that an earlier, higher peak hides nothing.
    Elsewhere only growth beyond all earlier peaks is seen.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            _RESET.write_text(_RESET_PEAK)
        self._before = _peak_mb()

    def peak_mb(self) -> float:
        """Peak resident memory since then minus what was resident then, in 10^6 bytes."""
        return max(_peak_mb() - self._before, 0.0)


def _peak_mb() -> float:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
