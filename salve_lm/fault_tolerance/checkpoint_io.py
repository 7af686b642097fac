"""Checkpoints that appear whole or not at all.

Lightning writes a checkpoint in the system's temporary folder and moves it, which is not atomic
across file systems, and does not flush it; a process killed meanwhile can leave a torn `last.ckpt`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from salve_lm.atomic import atomic_file
from salve_lm.errors import CorruptFile, MissingFile

_Path = str | Path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk and renames; reads without running foreign code.

    Remote paths (`s3://...`) are left to Lightning.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _Path, storage_options: Any | None = None
    ) -> None:
        """Replace `path` by `checkpoint`, at once and only when all of it is on disk.

        Raises:
            OutputUnwritable: the disk is full, or the folder cannot be written.
        """
        if storage_options is not None or _remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_file(path) as partial, open(partial, "wb") as f:
            # through a file of ours: torch's own writer hides why the system refused
            torch.save(checkpoint, f)

    def load_checkpoint(
        self,
        path: _Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load `path`; tensors and plain values only, unless `weights_only=False` is asked for.

        Raises:
            MissingFile: there is no such file.
            CorruptFile: it is truncated, foreign, or holds other objects.
        """
        if _remote(path):
            return super().load_checkpoint(path, map_location, weights_only)
        if not Path(path).is_file():
            raise MissingFile(f"No checkpoint at {path}. Check the path given as --ckpt_path.")
        try:
            loaded: dict[str, Any] = torch.load(
                path, map_location=map_location, weights_only=weights_only is not False
            )
        except pickle.UnpicklingError as e:
            if "Weights only load failed" in str(e) and "GLOBAL" in str(e):
                raise CorruptFile(
                    path,
                    "it holds objects that are neither tensors nor plain values",
                    "Only if you trust where it comes from, load it with weights_only=False.",
                ) from e
            raise CorruptFile(path, "it is not a checkpoint", _CURE) from e
        except (RuntimeError, EOFError, ValueError, KeyError) as e:
            raise CorruptFile(path, "it is truncated or not a checkpoint", _CURE) from e
        return loaded


_CURE = "Use an earlier checkpoint, or start without --ckpt_path."


def _remote(path: _Path) -> bool:
    return "://" in str(path)
