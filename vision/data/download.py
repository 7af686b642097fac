"""Downloads through torchvision, with errors that name the cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from salve_lm.errors import MissingFile

Dataset = TypeVar("Dataset")


def fetch(make: Callable[[], Dataset], root: str) -> Dataset:
    """Make a torchvision data set, which may download it to `root`.

    Raises:
        MissingFile: it is not there (or broken) and was not, or could not be, downloaded.
    """
    try:
        return make()
    # URLError is an OSError; torchvision says "not found or corrupted" with a RuntimeError
    except (OSError, RuntimeError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0].rstrip(".")
        raise MissingFile(
            f"The data set at {root} is not usable: {reason}. Set `download: true` where there is "
            "a network, or `root` to a complete copy."
        ) from e
