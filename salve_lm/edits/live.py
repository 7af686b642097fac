"""Edited weights inside a running model, and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from salve_lm.edits.lookup import ModelIndex, Owned


class LiveEdit:
    """Puts replacement tensors into a model in place, and restores the original bits.

    Values are copied into the existing parameters, so optimisers, DDP and compiled graphs keep
    their references. The originals are kept as copies, not recomputed. While the edit is on,
    `state_dict()` of the model, or of any module around it, returns the originals: no checkpoint
    can hold edited weights.

    Args:
        index: the network's.
        replaced: new tensors by name, as `apply_named` returns them.

    Raises:
        UnsupportedEdit: a tensor is a view of a part of another.
    """

    def __init__(self, index: ModelIndex, replaced: Mapping[str, Tensor]) -> None:
        owned = index.tensors
        self._live = {name: owned[name].tensor for name in replaced}
        self._kept: dict[str, Tensor] = {}
        names = {name: name for name in replaced} | index.tied_names(replaced)
        try:
            for name, tensor in self._live.items():
                with _writable(tensor):
                    self._kept[name] = tensor.detach().clone()
            self._hooks = [self._hook(owned[alias], name) for alias, name in names.items()]
            for name, new in replaced.items():
                with _writable(self._live[name]):
                    self._live[name].copy_(new)
        except BaseException:
            self.restore()
            raise

    @property
    def originals(self) -> Mapping[str, Tensor]:
        """The unedited tensors by name; empty once restored."""
        return self._kept

    def restore(self) -> None:
        """Put the original bits back. Doing it again does nothing."""
        for name, kept in self._kept.items():
            with _writable(self._live[name]):
                self._live[name].copy_(kept)
        for hook in getattr(self, "_hooks", []):
            hook.remove()
        self._kept, self._hooks = {}, []

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Show the original weights inside the block, the edited ones again after it."""
        edited = {}
        try:
            for name, kept in self._kept.items():
                with _writable(self._live[name]):
                    edited[name] = self._live[name].detach().clone()
                    self._live[name].copy_(kept)
            yield
        finally:
            if self._kept:  # not if it was restored for good inside the block
                for name, tensor in edited.items():
                    with _writable(self._live[name]):
                        self._live[name].copy_(tensor)

    def _hook(self, owner: Owned, name: str) -> RemovableHandle:
        def show_original(_: nn.Module, state: dict[str, Any], prefix: str, __: object) -> None:
            if prefix + owner.key in state:
                state[prefix + owner.key] = self._kept[name]

        return owner.module.register_state_dict_post_hook(show_original)


@contextlib.contextmanager
def _writable(tensor: Tensor) -> Iterator[None]:
    """No gradients, and inference mode only for tensors that were made in it: a copy made in
    inference mode could not be used outside of it in every way a normal tensor can."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield
