"""What the final layer reads during an evaluation, every sample once, over all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from salve_lm.activations.hooks import record
from salve_lm.activations.sites import Site
from salve_lm.callbacks.weight_editing import WeightEditing, as_studied
from salve_lm.edits.lookup import ModelIndex
from salve_lm.errors import BadConfig, NotFinite, UnsupportedEdit
from salve_lm.modules.studied import StudiedModel

_LOADER = 1 << 40
"""Samples that a loader has at most."""


class HeadSamples(NamedTuple):
    """The final layer's inputs over a whole evaluation, in the order of the samples.

    x: inputs of the *unedited* network, float32 [n, d_in].
    logits: outputs as the pass produced them, edited or not, float32 [n, n_classes].
    label: int64 [n].
    """

    x: Tensor
    logits: Tensor
    label: Tensor


class HeadReader:
    """Reads what the final layer reads and gives, from the batches that an evaluation runs anyway.

    Where a `WeightEditing` has edited layers before the final one, each batch runs a second time
    with the original weights, since that layer's inputs are then edited too.

    Args:
        trainer: the one that evaluates.
        pl_module: a `StudiedModel` with a linear final layer.
        who: the callback, for messages.

    Raises:
        BadConfig: no final linear layer is named.
        UnsupportedEdit: the model is compiled, so that hooks added now would not run.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, who: str) -> None:
        self._studied = as_studied(pl_module, who)
        self._trainer, self._who = trainer, who
        self._editing = editing_of(trainer)
        linear_head(self._studied, who)
        refuse_compiled(self._studied, who)
        name = str(self._studied.head_name)
        sites = {"x": Site(name, "input"), "logits": Site(name, "output")}
        self._hooks = contextlib.ExitStack()
        self._read = self._hooks.enter_context(record(self._studied.model, sites))
        # (loader, samples) of each batch
        self._batches: list[tuple[int, int]] = []

    def read(self, batch: Any, dataloader_idx: int = 0) -> HeadSamples | None:
        """The samples of `batch`, whose pass has just ended, on the CPU; None without any."""
        if not (isinstance(batch, Sequence) and len(batch) >= 2):
            raise BadConfig(f"{self._who} needs batches of (inputs, labels).")
        inputs, label = batch[0], batch[1]
        if len(label) == 0:
            return None
        if "x" not in self._read:
            raise BadConfig(
                f"{self._who}: the final layer {self._studied.head_name!r} did not run in this "
                "step. Set `head_name` to the layer that gives the logits."
            )
        logits = self._read["logits"]
        if self._editing is not None and edits_before_head(self._editing, self._studied):
            with self._editing.suspended(), self._trainer.precision_plugin.forward_context():
                self._studied(inputs)
        self._batches.append((dataloader_idx, len(label)))
        x = self._read["x"].detach().float().cpu()
        return HeadSamples(x, logits.detach().float().cpu(), label.detach().cpu())

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def keys(self, loaders: Any) -> Tensor:
        """A number for each sample read here, int64 [n]: the same only for the same sample.

        Lightning's DistributedSampler pads the shares of the ranks with repeated samples; what it
        yields says which rows those are. Elsewhere no two ranks have a number in common.

        Args:
            loaders: the loaders that were run, as the trainer holds them.
        """
        rank, world = self._trainer.global_rank, self._trainer.world_size
        listed = list(loaders) if isinstance(loaders, list | tuple) else [loaders]
        keys = torch.empty(sum(n for _, n in self._batches), dtype=torch.int64)
        for index in {loader for loader, _ in self._batches}:
            sampler = getattr(listed[index], "sampler", None) if index < len(listed) else None
            mine = torch.cat([torch.full((n,), loader == index) for loader, n in self._batches])
            n = int(mine.sum())
            samples = rank + world * torch.arange(n)
            if isinstance(sampler, DistributedSampler):
                drawn = [d[0] if isinstance(d, tuple) else int(d) for d in sampler]
                samples = torch.tensor(drawn[:n]) if len(drawn) >= n else samples
            keys[mine] = index * _LOADER + samples
        return keys

    def gathered(self, mine: Any) -> list[Any]:
        """What each rank has, in order of rank, on every rank."""
        everyone = [mine] * self._trainer.world_size
        if self._trainer.world_size > 1:
            torch.distributed.all_gather_object(everyone, mine)
        return everyone

    def not_finite(self) -> NotFinite:
        """The error for NaN or infinity in the inputs."""
        cure = "Check the data and the weights (diverged training?)."
        return NotFinite(f"{self._studied.head_name}:input", self._who, cure)


class HeadCapture(HeadReader):
    """Collects `HeadSamples` of a whole evaluation, in host memory."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule, who: str) -> None:
        super().__init__(trainer, pl_module, who)
        head = linear_head(self._studied, who)
        empty = torch.empty(0, head.in_features), torch.empty(0, head.out_features)
        self._parts = [HeadSamples(*empty, torch.empty(0, dtype=torch.int64))]

    def take(self, batch: Any, dataloader_idx: int = 0) -> None:
        """Keep what the pass over `batch`, which has just ended, read."""
        samples = self.read(batch, dataloader_idx)
        if samples is not None:
            self._parts.append(samples)

    def gather(self, loaders: Any) -> HeadSamples:
        """Everything taken, on every rank, each sample once.

        Args:
            loaders: the loaders that were run, as the trainer holds them.

        Raises:
            NotFinite: NaN or infinity in the inputs.
        """
        self.close()
        mine = HeadSamples(*(torch.cat(column) for column in zip(*self._parts, strict=True)))
        ranks = self.gathered((self.keys(loaders), mine))
        rows = first_of_each(torch.cat([keys for keys, _ in ranks]))
        whole = zip(*(samples for _, samples in ranks), strict=True)
        x, logits, label = (torch.cat(column)[rows] for column in whole)
        if not torch.isfinite(x).all():
            raise self.not_finite()
        return HeadSamples(x, logits, label)


def first_of_each(keys: Tensor) -> Tensor:
    """Where each different key [n] stands first, in order of key, int64."""
    found: Tensor = torch.from_numpy(np.unique(keys.numpy(), return_index=True)[1])
    return found


def linear_head(studied: StudiedModel, who: str) -> nn.Linear:
    """The final layer, if it is a linear one; otherwise `BadConfig`."""
    head = ModelIndex(studied.model).modules.get(studied.head_name or "")
    if studied.head_name is None or not isinstance(head, nn.Linear):
        kind = "none is named" if studied.head_name is None else f"it is a {type(head).__name__}"
        raise BadConfig(
            f"{who} needs a final nn.Linear layer, but {kind}. Set `head_name` of the studied "
            "model (SqueezeNet: `head: gap_linear`)."
        )
    return head


def editing_of(trainer: Trainer) -> WeightEditing | None:
    """The trainer's WeightEditing callback, if it has one."""
    found = [c for c in trainer.callbacks if isinstance(c, WeightEditing)]  # type: ignore[attr-defined]
    return found[0] if found else None


def edits_before_head(editing: WeightEditing, studied: StudiedModel) -> bool:
    """Whether any layer but the final one is edited right now."""
    prefix = f"{studied.head_name}."
    return any(not name.startswith(prefix) for name in editing.originals)


def refuse_compiled(studied: StudiedModel, who: str) -> None:
    """Raise `UnsupportedEdit` for a compiled model: hooks added to one never run, or never stop."""
    wrapped = any(
        isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl is not None
        for m in studied.modules()
    )
    if wrapped or getattr(studied, "_compiler_ctx", None) is not None:
        raise UnsupportedEdit(
            f"{who} works with forward hooks, which a compiled model does not honour. Pass the "
            "uncompiled model (WeightEditing works with compiled ones)."
        )
