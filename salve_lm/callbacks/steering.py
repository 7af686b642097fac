"""Activation steering at inference time: the comparator that leaves the weights alone."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from salve_lm.callbacks.head_samples import refuse_compiled
from salve_lm.callbacks.weight_editing import as_studied, class_names_of
from salve_lm.edits.context import EditContext
from salve_lm.edits.lookup import ModelIndex
from salve_lm.edits.scope import Scope
from salve_lm.edits.spec import Direction
from salve_lm.edits.steering import Steering
from salve_lm.errors import BadConfig, NoEffect, ShapeMismatch
from salve_lm.modules.studied import StudiedModel

Side = Literal["input", "output"]


class ActivationSteering(Callback):
    """x + alpha d at one place in the network, during validation, test and prediction.

    d is the unit decoder row of a latent, turned towards (`enhance`) or away from (`suppress`) the
    class; see `salve_lm.edits.Steering`, which folds the same thing into a bias where it can. The
    vector is added at every position.

    Args:
        feature: A latent by index or name; the dominant feature of `target_class` when absent.
        alpha: Length of the vector added.
        direction: `suppress` or `enhance`.
        module: Full name of the module, `head`, or a site of the model's own, such as
            `resid_post.3` of a LanguageModel.
        io: Steer the module's (first) `input` or its `output`; a site says that itself.
        target_class: Class whose side of the latent counts, by name or index.
        sae: Folder of the SAE.
        features: Folder of the feature table; needed where feature or class go by name.
    """

    def __init__(
        self,
        feature: str | int | None = None,
        alpha: float = 1.0,
        direction: Direction = "suppress",
        module: str = "head",
        io: Side = "input",
        target_class: str | int | None = None,
        sae: str | None = None,
        features: str | None = None,
    ) -> None:
        if alpha == 0:
            raise NoEffect("ActivationSteering with alpha 0 changes nothing. Raise alpha.")
        self.spec = Steering(
            module=module, feature=feature, alpha=alpha, direction=direction,
            target_class=target_class, sae=sae, features=features,
        )  # fmt: skip
        self.io = io
        self.context = EditContext()
        self._handle: RemovableHandle | None = None
        self._runs = 0

    @classmethod
    def of(cls, spec: Steering, io: Side = "input") -> ActivationSteering:
        """The callback that does, at inference, what `spec` says."""
        steering = cls(feature=spec.feature, alpha=spec.alpha, io=io)
        steering.spec = spec
        return steering

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find module and feature once, before hours are spent."""
        self._resolve(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steer, unless this is the sanity check."""
        if not trainer.sanity_checking:
            self._start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop steering."""
        self._remove()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steer."""
        self._start(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop steering."""
        self._remove()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steer."""
        self._start(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop steering."""
        self._remove()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Make sure that the module ran."""
        self._check_ran()

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Make sure that the module ran."""
        self._check_ran()

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Make sure that the module ran."""
        self._check_ran()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop steering."""
        self._remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop steering."""
        self._remove()

    def _resolve(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[str, nn.Module, Side, Tensor]:
        studied = as_studied(pl_module, type(self).__name__)
        refuse_compiled(studied, type(self).__name__)
        pattern, io = _place(self.spec.module, self.io, studied)
        found = ModelIndex(studied.model).find(pattern, studied.head_name)
        if len(found) != 1:
            raise BadConfig(
                f"ActivationSteering steers one module; {self.spec.module!r} matches "
                f"{len(found)}. Give a full name."
            )
        ((name, module),) = found.items()
        names = class_names_of(trainer, pl_module)
        is_head = name == studied.head_name
        scope = Scope(name, module, studied.model, is_head, self.context, names)
        return name, module, io, self.spec.vector(scope)[1]

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()
        name, module, io, direction = self._resolve(trainer, pl_module)
        shift = self.spec.alpha * direction
        self._runs = 0

        def steered(x: Tensor) -> Tensor:
            self._runs += 1
            return x + _broadcast(shift, x, f"{name}:{io}")

        def on_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (steered(args[0]), *args[1:])

        def on_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, Tensor):
                return steered(output)
            return (steered(output[0]), *output[1:])

        if io == "input":
            self._handle = module.register_forward_pre_hook(on_input)
        else:
            self._handle = module.register_forward_hook(on_output)

    def _check_ran(self) -> None:
        if self._handle is not None and self._runs == 0:
            raise NoEffect(
                f"ActivationSteering changed nothing: {self.spec.module!r} did not run. Choose a "
                "module that the forward pass uses."
            )

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _place(module: str, io: Side, studied: StudiedModel) -> tuple[str, Side]:
    """The module meant, and its side; for a site of the model's, those of the site."""
    sites: dict[str, str] = getattr(studied, "sites", {})
    if module not in sites:
        return module, io
    parts = sites[module].split(":")
    return parts[0], "input" if "input" in parts[1:] else "output"


def _broadcast(shift: Tensor, x: Tensor, where: str) -> Tensor:
    """`shift` [d] shaped to be added along the channels of `x`: last, or second in images."""
    d = len(shift)
    shift = shift.to(x.device, torch.float32).to(x.dtype)
    if x.ndim == 4 and x.shape[1] == d:
        return shift[:, None, None]
    if x.shape[-1] == d:
        return shift
    raise ShapeMismatch(
        f"The SAE has width {d}, the activations at {where} are {tuple(x.shape)}. Choose the place "
        "the SAE was trained on."
    )
