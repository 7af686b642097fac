"""Scoped forward hooks: read activations, stop early, and leave nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from salve_lm.activations.sites import Site, reduce_positions
from salve_lm.errors import BadConfig, NameNotFound, NotFinite


class _AllRead(BaseException):
    """Ends a forward pass once every site is read.

    Not an `Exception`: a model that catches those must not swallow it.
    """


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` in eval mode, and each one back into its own mode after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def record(model: nn.Module, sites: Mapping[str, Site]) -> Iterator[dict[str, Tensor]]:
    """Record what passes `sites` in every forward pass of `model` inside the block.

    The dict that is yielded holds the activations of the latest pass, reduced to rows
    ([n, d] or [n * positions, d]) and still part of the autograd graph.

    Raises:
        NameNotFound: a site names a module that `model` does not have.
        BadConfig: a site needs a reduction (see `reduce_positions`).
    """
    with _hooked(model, sites, stop=False) as read:
        yield read


def run_to(
    model: nn.Module,
    sites: Mapping[str, Site],
    inputs: Tensor | Mapping[str, Any],
    describe: Callable[[int], str] | None = None,
) -> dict[str, Tensor]:
    """Run `model` only as far as the deepest of `sites`, in eval mode and without gradients.

    Args:
        model: the network; modules behind the deepest site are not executed.
        sites: name -> place to read.
        inputs: a batch [n, ...]; or the keyword arguments of the forward pass, of which the first
            is such a batch.
        describe: row of `inputs` -> a name for it in errors.

    Returns:
        name -> activations [n, d] or [n * positions, d].

    Raises:
        NotFinite: NaN or infinity at a site; names the site and the first such sample.
        NameNotFound: a site names a module that `model` does not have.
        BadConfig: a site needs a reduction, or its module did not run.
    """
    with torch.no_grad(), evaluating(model), _hooked(model, sites, stop=True) as read:
        with contextlib.suppress(_AllRead):
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(inputs)
        found = dict(read)
    n_samples = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)
    for name, site in sites.items():
        if name not in found:
            raise BadConfig(
                f"Module {site.module!r} did not run in the forward pass. Choose a module that "
                "does; of a compiled model, pass the original (compiled modules run no hooks)."
            )
        _check_finite(found[name], site, n_samples, describe)
    return found


@contextlib.contextmanager
def _hooked(model: nn.Module, sites: Mapping[str, Site], stop: bool) -> Iterator[dict[str, Tensor]]:
    modules = dict(model.named_modules())
    read: dict[str, Tensor] = {}

    def forget(*_: object) -> None:
        read.clear()

    def keep(name: str, site: Site, value: object) -> None:
        if name in read:
            return
        # A copy: the next module may work in place (a ReLU behind a norm layer).
        read[name] = reduce_positions(_first_tensor(value, site), site).clone()
        if stop and len(read) == len(sites):
            raise _AllRead

    def on_input(name: str, site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(name, site, args or tuple(kwargs.values()))

        return hook

    def on_output(name: str, site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: object) -> None:
            keep(name, site, output)

        return hook

    with contextlib.ExitStack() as handles:
        # first of all hooks, so that a site on `model` itself is not forgotten again
        handle = model.register_forward_pre_hook(forget, prepend=True)
        handles.callback(handle.remove)
        for name, site in sites.items():
            if site.module not in modules:
                raise NameNotFound("module", site.module, [m for m in modules if m])
            module = modules[site.module]
            if site.io == "input":
                handle = module.register_forward_pre_hook(on_input(name, site), with_kwargs=True)
            else:
                handle = module.register_forward_hook(on_output(name, site))
            handles.callback(handle.remove)
        yield read


def _first_tensor(value: object, site: Site) -> Tensor:
    """`value` itself, or the first tensor of a tuple (attention layers return several)."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list):
        for item in value:
            if isinstance(item, Tensor):
                return item
    raise BadConfig(
        f"Site {str(site)!r} gives a {type(value).__name__}, not a tensor. "
        "Choose a module whose input or output is one."
    )


def _check_finite(
    rows: Tensor, site: Site, n_samples: int, describe: Callable[[int], str] | None
) -> None:
    # a sum is finite only if every summand is; it may overflow, so the slow check decides
    if bool(rows.sum().isfinite()) or bool(rows.isfinite().all()):
        return
    bad = int((~rows.isfinite().all(dim=1)).nonzero()[0])
    sample = bad * n_samples // len(rows)
    where = describe(sample) if describe else f"sample {sample} of the batch"
    raise NotFinite(
        str(site), where, "Check this input and the model's weights (diverged training?)."
    )
