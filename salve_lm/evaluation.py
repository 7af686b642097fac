"""Logits of an edited classifier over a whole split, without touching its weights.

An edit of the final linear layer leaves that layer's inputs as they were, so they are computed once
and every strength costs one small matrix product. Any other edit runs the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from salve_lm.activations.hooks import run_to
from salve_lm.activations.sites import Site
from salve_lm.data.labelled import LabelledData, Split
from salve_lm.errors import BadConfig
from salve_lm.modules.studied import StudiedModel


class HeadInputs(NamedTuple):
    """What the final linear layer reads, for every sample of a split."""

    x: Tensor  # [n, d_in]
    label: Tensor  # [n] int64


def batches(data: LabelledData, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Every `(inputs, labels)` batch of `split` in its fixed order, under the eval transform."""
    yield from DataLoader(
        data.eval_dataset(split), batch_size=data.batch_size, num_workers=data.num_workers
    )


def linear_head(studied: StudiedModel) -> nn.Linear | None:
    """The model's final layer, where it is a linear one."""
    if studied.head_name is None:
        return None
    head = studied.model.get_submodule(studied.head_name)
    return head if isinstance(head, nn.Linear) else None


def collect_head_inputs(
    studied: StudiedModel, data: LabelledData, split: Split, device: torch.device
) -> HeadInputs:
    """Run `split` up to the head of `studied` and keep what the head reads.

    Raises:
        BadConfig: the model has no final linear layer.
        NotFinite: NaN or infinity in those activations.
    """
    if linear_head(studied) is None:
        raise BadConfig(f"The final layer {studied.head_name!r} is not a torch.nn.Linear.")
    site = {"head": Site(str(studied.head_name), "input", None)}
    xs, labels = [], []
    for inputs, label in batches(data, split):
        xs.append(run_to(studied.model, site, inputs.to(device))["head"])
        labels.append(label)
    return HeadInputs(torch.cat(xs), torch.cat(labels).to(device))


class Evaluator:
    """Logits over one split for any replacement of the model's tensors.

    Args:
        studied: The classifier; its weights are never changed.
        data: Its data module.
        split: The split to run.
        device: Where to compute.
    """

    def __init__(
        self, studied: StudiedModel, data: LabelledData, split: Split, device: torch.device
    ) -> None:
        self._studied, self._data, self._split, self._device = studied, data, split, device
        self._head = linear_head(studied)
        if self._head is not None:
            self._inputs = collect_head_inputs(studied, data, split, device)
            self.label = self._inputs.label
        else:
            self.label = torch.cat([y for _, y in batches(data, split)]).to(device)

    @property
    def head_inputs(self) -> HeadInputs | None:
        """What the unedited head reads, where it is a linear layer."""
        return self._inputs if self._head is not None else None

    def logits(self, replaced: Mapping[str, Tensor]) -> Tensor:
        """Logits [n, n_classes] with the tensors `replaced` (names inside `studied.model`)."""
        names = {f"{self._studied.head_name}.{n}": n for n in ("weight", "bias")}
        if self._head is not None and set(replaced) <= set(names):
            tensors = {n: replaced.get(full, getattr(self._head, n)) for full, n in names.items()}
            with torch.no_grad():
                return nn.functional.linear(self._inputs.x, **tensors)
        model = self._studied.model
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return torch.cat(
                    [
                        functional_call(model, dict(replaced), (x.to(self._device),))
                        for x, _ in batches(self._data, self._split)
                    ]
                )
        finally:
            model.train(training)
