"""What the final layer reads during an evaluation, every sample once, over all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


class HeadSamples(NamedTuple):
    """The final layer's inputs over a whole evaluation, in the order of the samples.

    x: inputs of the *unedited* network, float32 [n, d_in].
    logits: outputs as the pass produced them, edited or not, float32 [n, n_classes].
    label: int64 [n].
    """

    x: Tensor
    logits: Tensor
    label: Tensor


@dataclass
class _Part:
    """One rank's share: rows, and (loader, sample) of each."""

    x: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    label: list[Tensor] = field(default_factory=list)
    loader: list[int] = field(default_factory=list)


class HeadCapture:
    """Collects `HeadSamples` from the batches that an evaluation runs anyway, in host memory.

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
        self._part = _Part()

    def take(self, batch: Any, dataloader_idx: int = 0) -> None:
        """Keep what the pass over `batch`, which has just ended, read."""
        if not (isinstance(batch, Sequence) and len(batch) >= 2):
            raise BadConfig(f"{self._who} needs batches of (inputs, labels).")
        inputs, label = batch[0], batch[1]
        if len(label) == 0:
            return
        if "x" not in self._read:
            raise BadConfig(
                f"{self._who}: the final layer {self._studied.head_name!r} did not run in this "
                "step. Set `head_name` to the layer that gives the logits."
            )
        logits = self._read["logits"]
        if self._editing is not None and edits_before_head(self._editing, self._studied):
            with self._editing.suspended(), self._trainer.precision_plugin.forward_context():
                self._studied(inputs)
        self._part.x.append(self._read["x"].detach().float().cpu())
        self._part.logits.append(logits.detach().float().cpu())
        self._part.label.append(label.detach().cpu())
        self._part.loader += [dataloader_idx] * len(label)

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def gather(self, loaders: Any) -> HeadSamples:
        """Everything taken, on every rank, each sample once.

        Lightning's DistributedSampler pads the shares of the ranks with repeated samples; what it
        yields says which rows those are.

        Args:
            loaders: the loaders that were run, as the trainer holds them.

        Raises:
            NotFinite: NaN or infinity in the inputs.
        """
        self.close()
        keys = self._sample_keys(loaders)
        width, classes = _widths(self._studied)
        mine = HeadSamples(
            torch.cat([*self._part.x, torch.empty(0, width)]),
            torch.cat([*self._part.logits, torch.empty(0, classes)]),
            torch.cat([*self._part.label, torch.empty(0, dtype=torch.int64)]),
        )
        parts = [(keys, mine)]
        if self._trainer.world_size > 1:
            parts = parts * self._trainer.world_size
            torch.distributed.all_gather_object(parts, (keys, mine))
        order = {key: row for row, key in enumerate(k for part, _ in parts for k in part)}
        rows = torch.tensor([order[key] for key in sorted(order)], dtype=torch.int64)
        whole = zip(*(samples for _, samples in parts), strict=True)
        x, logits, label = (torch.cat(column)[rows] for column in whole)
        if not torch.isfinite(x).all():
            cure = "Check the data and the weights (diverged training?)."
            raise NotFinite(f"{self._studied.head_name}:input", self._who, cure)
        return HeadSamples(x, logits, label)

    def _sample_keys(self, loaders: Any) -> list[tuple[int, int]]:
        """(loader, sample) of each row taken here; unlike on any other rank where unknown."""
        rank, world = self._trainer.global_rank, self._trainer.world_size
        listed = list(loaders) if isinstance(loaders, list | tuple) else [loaders]
        keys: list[tuple[int, int]] = []
        for index in sorted(set(self._part.loader)):
            n = self._part.loader.count(index)
            sampler = getattr(listed[index], "sampler", None) if index < len(listed) else None
            samples = [rank + world * row for row in range(n)]
            if isinstance(sampler, DistributedSampler):
                drawn = [d[0] if isinstance(d, tuple) else int(d) for d in sampler]
                samples = drawn[:n] if len(drawn) >= n else samples
            keys += [(index, sample) for sample in samples]
        return keys


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


def _widths(studied: StudiedModel) -> tuple[int, int]:
    head = linear_head(studied, "this callback")
    return head.in_features, head.out_features
