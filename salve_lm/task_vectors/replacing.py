"""Layers that are edited as a whole, on their way from file to file."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from salve_lm.edits.plan import Applied, Effect, NamedOps, TensorChange, apply_to_layer
from salve_lm.task_vectors.blocks import row_blocks
from salve_lm.task_vectors.changing import Changed
from salve_lm.task_vectors.copying import write_all
from salve_lm.task_vectors.safetensors_header import TensorInfo
from salve_lm.task_vectors.tensor_files import TensorFiles


class Replacement(Protocol):
    """The new values of one tensor, computed when and where they are wanted."""

    def tensor(self, effects: Sequence[Effect]) -> tuple[Tensor, TensorChange]:
        """The new tensor on the CPU, and how far it moved; asked for once.

        `effects`, one an edit, take note of which edits changed anything. Different tensors are
        asked for from different threads at the same time.
        """


class EditedLayer:
    """One layer with all edits of it: computed by the function that makes the live edit.

    Holds a layer's old and new tensors from when the first of them is asked for until the last is.

    Args:
        module: full name of the layer.
        tensors: the unedited model's, by name in memory; read when they are needed.
        edits: all edits, in order; their ops on other layers are passed over.
    """

    def __init__(
        self, module: str, tensors: Mapping[str, Tensor], edits: Sequence[NamedOps]
    ) -> None:
        self._module, self._tensors, self._edits = module, tensors, edits
        self._lock = threading.Lock()
        self._applied: Applied | None = None
        self._waiting = 0

    def replacement(self, name: str) -> Replacement:
        """The new tensor `name` (full, in memory)."""
        self._waiting += 1
        return _OfLayer(self, name)

    def take(self, name: str, effects: Sequence[Effect]) -> tuple[Tensor, TensorChange]:
        """See `Replacement.tensor`."""
        with self._lock:
            if self._applied is None:
                self._applied = apply_to_layer(self._module, self._tensors, self._edits, effects)
            taken = self._applied.tensors[name], self._applied.changes[name]
            self._waiting -= 1
            if not self._waiting:
                self._applied = None
        return taken


class _OfLayer:
    """One tensor of an `EditedLayer`."""

    def __init__(self, layer: EditedLayer, name: str) -> None:
        self._layer, self._name = layer, name

    def tensor(self, effects: Sequence[Effect]) -> tuple[Tensor, TensorChange]:
        """See `Replacement.tensor`."""
        return self._layer.take(self._name, effects)


def replace_tensor(
    name: str,
    base: TensorFiles,
    target: TensorInfo,
    fd: int,
    replacement: Replacement,
    effects: Sequence[Effect],
    proceed: Callable[[], None],
) -> Changed:
    """Write a new tensor in place of the one that `base` calls `name`.

    Args:
        name: of the tensor in `base`.
        base: the unedited weights.
        target: dtype and place of the new tensor in its file.
        fd: the new file, open for writing.
        replacement: the new values.
        effects: see `Replacement.tensor`.
        proceed: called once a block; raises where the work is to end.

    Raises:
        SalveError: see `apply_to_layer`.
    """
    info = base.info(name)
    new, change = replacement.tensor(effects)
    new = new.to(target.dtype).contiguous()
    before, after = hashlib.sha256(), hashlib.sha256()
    raw = new.reshape(-1).view(torch.uint8).numpy().data
    row = len(raw) // new.shape[0]
    for start, stop in row_blocks(info.shape):
        proceed()
        old = base.read_rows(name, start, stop)
        before.update(old.reshape(-1).view(torch.uint8).numpy().data)
        part = raw[start * row : stop * row]
        after.update(part)
        write_all(fd, part, target.offset + start * row)
    return Changed(change, before.hexdigest(), after.hexdigest())
