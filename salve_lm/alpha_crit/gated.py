"""Margins of a real network under an edit whose strength differs from sample to sample.

An edit of weights has one alpha. A search needs another one per sample, so it gates the layer's
*inputs* instead: scaling input channel j of W by f_j is the same as scaling x_j by f_j.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from salve_lm.alpha_crit.inputs import Rows, gating_strength, row_numbers
from salve_lm.errors import BadConfig, NameNotFound, ShapeMismatch, UnsupportedEdit

Margin = Literal["flip", "logit"]


@contextmanager
def gated_margin(
    model: nn.Module,
    module_name: str,
    c: Tensor,
    rows: Rows,
    sign: int,
    target: int,
    inputs: Tensor,
    *,
    margin: Margin = "flip",
    batch_size: int = 256,
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Scope in which alphas [n] are turned into margins [n] by the real network.

    The network runs in eval mode without gradients, and is as it was afterwards, also after an
    exception. No weights are copied: edited rows take their output from the gated input, the
    others from the ungated one.

    Args:
        model: maps `inputs` [n, ...] to logits [n, n_classes].
        module_name: the edited Linear or Conv (ungrouped) inside it.
        c: non-negative strengths [d_in] of its input channels.
        rows: its edited output rows: "class" (row `target`), "all" or a list.
        sign: -1 suppresses, +1 enhances: the gate is max(0, 1 + sign * alpha * c).
        target: the class whose logit is followed.
        inputs: the samples [n, ...], on the device of the model.
        margin: "flip" (target minus the largest other logit) or "logit" (the target logit).
        batch_size: samples per forward pass.

    Yields:
        A function for `searched`.
    """
    if sign not in (-1, 1):
        raise BadConfig(f"sign is {sign!r}; use -1 to suppress or 1 to enhance.")
    if margin not in ("flip", "logit"):
        raise BadConfig(f"margin is {margin!r}; use 'flip' or 'logit'.")
    module = _editable(model, module_name)
    channel_dim = -1 if isinstance(module, nn.Linear) else 1
    weight = module.weight
    c = gating_strength(c, weight.shape[1]).to(inputs.device)
    gate = _Gate(module, c * sign, _edited_rows(rows, target, weight.shape[0]), channel_dim)

    def margins(alpha: Tensor) -> Tensor:
        if alpha.shape != inputs.shape[:1]:
            raise ShapeMismatch(f"{tuple(alpha.shape)} alphas for {len(inputs)} samples.")
        parts = zip(inputs.split(batch_size), alpha.to(c).split(batch_size), strict=True)
        return torch.cat([_margin(gate.run(model, x, a), target, margin) for x, a in parts])

    handle = module.register_forward_hook(gate.hook, with_kwargs=True)
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield margins
    finally:
        handle.remove()
        for m, was in training:
            m.training = was


def _edited_rows(rows: Rows, target: int, n_rows: int) -> list[int] | None:
    """Edited rows of a layer of `n_rows` outputs; None for all of them."""
    if isinstance(rows, str) and rows == "all":
        return None
    # The target is a row of this layer only where the layer is the head.
    return row_numbers(rows, target if isinstance(rows, str) else 0, n_rows)


class _Gate:
    """The forward hook, and the alphas of the batch that is under way."""

    def __init__(
        self, module: nn.Module, signed: Tensor, rows: list[int] | None, channel_dim: int
    ) -> None:
        self.module, self.signed, self.channel_dim = module, signed, channel_dim
        self.rows = None if rows is None else torch.tensor(rows, device=signed.device)
        self.alpha: Tensor | None = None
        self.calls = 0

    def run(self, model: nn.Module, x: Tensor, alpha: Tensor) -> Tensor:
        """Logits of `x` [n, ...] at `alpha` [n]."""
        self.alpha, self.calls = alpha, 0
        try:
            logits: Tensor = model(x)
        finally:
            self.alpha = None
        if not self.calls:
            raise UnsupportedEdit(
                "The forward pass did not run the edited module. Hooks added to a compiled model "
                "never fire: pass the model from before torch.compile."
            )
        return logits

    def hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if self.alpha is None:
            return None
        self.calls += 1
        x: Tensor = args[0] if args else kwargs["input"]
        if x.shape[0] != len(self.alpha):
            raise ShapeMismatch(
                f"The edited module saw {x.shape[0]} rows for {len(self.alpha)} samples. "
                "Its input must keep samples in the first axis."
            )
        gate = (1 + self.alpha[:, None] * self.signed).clamp_(min=0).to(x.dtype)
        shape = [1] * x.ndim
        shape[0], shape[self.channel_dim] = gate.shape
        gated = self.module.forward(x * gate.view(shape))  # forward(): no hooks a second time
        if self.rows is None:
            return gated
        mixed = output.clone()
        changed = gated.index_select(self.channel_dim, self.rows)
        return mixed.index_copy_(self.channel_dim, self.rows, changed)


def _editable(model: nn.Module, name: str) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d:
    modules = dict(model.named_modules())
    if name not in modules:
        raise NameNotFound("module", name, [k for k in modules if k])
    module = modules[name]
    if isinstance(module, nn.Linear):
        return module
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return module
    raise UnsupportedEdit(
        f"{name!r} is a {type(module).__name__}; thresholds can be searched through a Linear or "
        "an ungrouped Conv. Choose such a layer."
    )


def _margin(logits: Tensor, target: int, kind: Margin) -> Tensor:
    if logits.ndim != 2 or not 0 <= target < logits.shape[1]:
        raise ShapeMismatch(
            f"The model returned {tuple(logits.shape)}; margins of class {target} need logits "
            "[n, n_classes] with that class."
        )
    own = logits[:, target].to(torch.float64)
    if kind == "logit":
        return own
    others = torch.cat([logits[:, :target], logits[:, target + 1 :]], 1)
    return own - others.to(torch.float64).amax(1)
