"""How much of a language model's loss survives when reconstructions replace its activations.

With the mean loss per token of the model as it is (clean), with the activations of one site
replaced by their reconstruction (spliced), and with them set to zero (zero):

    loss recovered = (zero - spliced) / (zero - clean)

which is 1 for a perfect autoencoder and 0 for one that says nothing. Only the activations that
autoencoders are trained on are replaced, in both cases: not those of BOS, padding and a document's
first token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salve_lm.errors import BadConfig, NameNotFound, ShapeMismatch
from salve_lm.sae import ranks

if TYPE_CHECKING:
    from sae_lens import SAE

    from salve_lm.data.tokens import TokenBatch

Change = Callable[[Tensor], Tensor]


class Splice(NamedTuple):
    """An autoencoder and where it goes.

    Attributes:
        module: name of the module in the language model.
        io: whether its output or its first input is replaced.
        sae: for inference, on raw activations.
    """

    module: str
    io: Literal["input", "output"]
    sae: SAE[Any]


class SplicedLoss(NamedTuple):
    """Mean losses per token, in nats.

    Attributes:
        clean: of the model as it is.
        spliced: with the reconstruction in place of the activations.
        zero: with zeros in their place.
        recovered: (zero - spliced) / (zero - clean); NaN where zeros do no harm.
    """

    clean: float
    spliced: float
    zero: float
    recovered: float


@torch.no_grad()
def spliced_losses(
    model: nn.Module,
    splices: Mapping[str, Splice],
    batches: Iterable[TokenBatch],
    device: torch.device | str = "cpu",
) -> dict[str, SplicedLoss]:
    """Measure every splice on the same text, each one alone; `model` is left as it was.

    Args:
        model: a causal language model of transformers, on `device`.
        splices: name -> autoencoder and place.
        batches: this rank's share of the text; sums are pooled over all ranks.
        device: where to run.

    Raises:
        NameNotFound: a module that `model` does not have.
        ShapeMismatch: an autoencoder of another width.
        BadConfig: no token to predict.
    """
    modules = dict(model.named_modules())
    for splice in splices.values():
        if splice.module not in modules:
            raise NameNotFound("module", splice.module, [m for m in modules if m])
    places = {(splice.module, splice.io) for splice in splices.values()}
    sums: dict[object, Tensor] = {}

    def add(key: object, value: Tensor) -> None:
        sums[key] = sums[key] + value if key in sums else value

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in batches:
            inputs = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in batch.model_inputs().items()
            }
            target, keep = batch.target.to(device), batch.keep.to(device)
            add("tokens", target[:, 1:].sum().double())
            add("clean", _loss(model, inputs, target))
            for module, io in places:
                with replaced(modules[module], _on(keep, torch.zeros_like), io):
                    add((module, io), _loss(model, inputs, target))
            for name, (module, io, sae) in splices.items():
                with replaced(modules[module], _on(keep, _reconstruction(sae, module)), io):
                    add(("spliced", name), _loss(model, inputs, target))
    finally:
        for part, training in modes.items():
            part.training = training
    # a rank without batches must take part with zeros of every sum, in the same order
    keys = ["tokens", "clean", *sorted(places), *(("spliced", name) for name in splices)]
    zero = torch.zeros((), dtype=torch.float64, device=device)
    pooled = ranks.all_reduce(torch.stack([sums.get(key, zero) for key in keys]), "sum")
    if not float(pooled[0]):
        raise BadConfig("No token to predict: give held-out text for the loss recovered.")
    means = dict(zip(keys, (pooled / pooled[0]).tolist(), strict=True))
    return {
        name: _result(means["clean"], means["spliced", name], means[splice.module, splice.io])
        for name, splice in splices.items()
    }


def _result(clean: float, spliced: float, zero: float) -> SplicedLoss:
    gap = zero - clean
    return SplicedLoss(clean, spliced, zero, (zero - spliced) / gap if gap else float("nan"))


@contextlib.contextmanager
def replaced(
    module: nn.Module, change: Change, io: Literal["input", "output"] = "output"
) -> Iterator[None]:
    """Inside the block, `module` gives (or, for input, gets) `change` of its activations.

    The activation is the output, or the first of several; or the first input.
    """

    def on_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        first, *rest = output
        return (change(first), *rest)

    def on_input(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: change(kwargs[name])}

    if io == "output":
        handle = module.register_forward_hook(on_output)
    else:
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _on(keep: Tensor, change: Change) -> Change:
    """`change` of the rows [n, d] that `keep` [sequences, context] marks; the others stay."""

    def changed(x: Tensor) -> Tensor:
        out = x.clone()
        out[keep] = change(x[keep]).to(x.dtype)
        return out

    return changed


def _reconstruction(sae: SAE[Any], where: str) -> Change:
    def reconstruct(x: Tensor) -> Tensor:
        if x.shape[-1] != sae.cfg.d_in:
            raise ShapeMismatch(
                f"The SAE takes activations of width {sae.cfg.d_in}, but {where} gives "
                f"{x.shape[-1]}. Choose the SAE of this model and site."
            )
        return sae.decode(sae.encode(x.to(sae.W_enc.dtype)))

    return reconstruct


def _loss(model: nn.Module, inputs: Mapping[str, Any], target: Tensor) -> Tensor:
    """Sum over predicted tokens of their negative log-likelihood, float64 []."""
    logits: Tensor = model(**inputs).logits
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    # one sequence at a time: float32 logits of a large vocabulary are the largest tensor of all
    for row, ids, of in zip(logits, inputs["input_ids"], target, strict=True):
        predicted = of[1:]
        scores = row[:-1][predicted].float()
        total += F.cross_entropy(scores, ids[1:][predicted], reduction="sum").double()
    return total
