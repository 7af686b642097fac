"""Errors a user can mend: each names what is wrong and the cure, and carries its data.

`salve_lm.cli.main` prints these without a traceback (set `SALVE_LM_DEBUG=1` to see one).
They derive from the builtin a caller would expect, so `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SalveError(Exception):
    """Base of every error whose cure lies with the user."""


class ShapeMismatch(SalveError, ValueError):
    """Two things that must share a width do not (for example an SAE and the axis it edits)."""


class NotFinite(SalveError, ValueError):
    """NaN or infinity in a tensor; `tensor` is its name."""

    def __init__(self, tensor: str, where: str, cure: str = "") -> None:
        self.tensor = tensor
        super().__init__(f"NaN or infinity in {tensor!r} ({where}).{' ' + cure if cure else ''}")


class NoEffect(SalveError, ValueError):
    """An edit that would change nothing."""


class UnsupportedEdit(SalveError, ValueError):
    """An edit that is not defined for this module or these activations."""


class EditConflict(SalveError, RuntimeError):
    """Two things want to own the same weights."""


class UnsupportedStrategy(SalveError, RuntimeError):
    """A Lightning strategy under which the operation is not exact."""


class RankMismatch(SalveError, RuntimeError):
    """Ranks of one run disagree about tensors that must be equal."""


class LostRank(SalveError, RuntimeError):
    """Another process of this run died, or no longer answers; `said` is how that showed."""

    def __init__(self, said: str) -> None:
        self.said = said
        super().__init__(
            "Another process of this run has died, or did not answer within the strategy's "
            "`timeout`: see what it wrote last. Checkpoints are whole: the same command with "
            f"--ckpt_path last goes on from the last one. ({said})"
        )


class EmptyClass(SalveError, ValueError):
    """A class without samples, where its mean is needed; `class_name` says which."""

    def __init__(self, class_name: str, where: str) -> None:
        self.class_name = class_name
        super().__init__(
            f"Class {class_name!r} has no samples in {where}. "
            "Add images of it, or leave it out of the class list."
        )


class NameNotFound(SalveError, LookupError):
    """A module, class, feature or config that does not exist; `candidates` are the nearest."""

    def __init__(self, kind: str, name: str, known: Iterable[str], cure: str = "") -> None:
        known = list(known)
        self.kind, self.name = kind, name
        self.candidates = nearest(name, known)
        near = f" Did you mean {_either(self.candidates)}?" if self.candidates else ""
        listed = "" if near or not known else f" Known: {', '.join(known[:20])}."
        super().__init__(f"No {kind} named {name!r}.{near}{listed}{' ' + cure if cure else ''}")


class CorruptFile(SalveError, ValueError):
    """A file that is truncated, foreign or not what its name says; `path` says which."""

    def __init__(self, path: object, why: str, cure: str = "") -> None:
        self.path = str(path)
        super().__init__(f"Cannot read {path}: {why}.{' ' + cure if cure else ''}")


class MissingFile(SalveError, FileNotFoundError):
    """A file or folder that should be there and is not."""


class MissingStore(MissingFile):
    """No activation store at the path given."""


class StaleStore(SalveError, RuntimeError):
    """An activation store (or feature table) made from other weights, data or site."""


class OutputExists(SalveError, FileExistsError):
    """An output that is there already; nothing is overwritten."""

    def __init__(
        self, path: object, cure: str = "Choose another output, or remove it first."
    ) -> None:
        self.path = str(path)
        super().__init__(f"{path} exists already. {cure}")


class OutputUnwritable(SalveError, OSError):
    """A folder that cannot be written: permissions, a full disk, a file in the way."""


class NotEnoughMemory(SalveError, MemoryError):
    """Something that cannot fit; `needed` and `free` are in bytes."""

    def __init__(self, needed: int, free: int, message: str) -> None:
        self.needed, self.free = needed, free
        super().__init__(message)


class BadConfig(SalveError, ValueError):
    """Options that contradict each other or the data."""


def nearest(name: str, known: Sequence[str], n: int = 3) -> list[str]:
    """The up to `n` entries of `known` that look most like `name`."""
    lowered = {k.lower(): k for k in known}
    hits = difflib.get_close_matches(name.lower(), list(lowered), n=n, cutoff=0.5)
    return [lowered[h] for h in hits]


def _either(names: Sequence[str]) -> str:
    return " or ".join(repr(n) for n in names)
