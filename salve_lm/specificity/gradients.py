"""Activations of decoder layers together with the gradient of the text's loss there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salve_lm.errors import BadConfig, NotFinite

if TYPE_CHECKING:
    from sae_lens import SAE


def layer_gradients(
    model: nn.Module, modules: Mapping[int, str], inputs: Mapping[str, Any], target: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    """One forward and one backward pass; weights get no gradients. Also under inference mode.

    Args:
        model: a causal language model of transformers, in eval mode.
        modules: layer -> name of its module, whose (first) output is the residual stream.
        inputs: keyword arguments of the forward pass, `input_ids` [n, context] among them.
        target: bool [n, context]; which tokens' losses -log p are summed.

    Returns:
        layer -> (activation, gradient), each [n, context, d_model], detached.

    Raises:
        NotFinite: a loss that is NaN or infinite.
        BadConfig: a module that did not run.
    """
    read: dict[int, Tensor] = {}

    def keep(layer: int, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if not hidden.requires_grad:  # nothing below it is trained: the graph begins here
            hidden = hidden.detach().requires_grad_()
        read[layer] = hidden
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    names = dict(model.named_modules())
    with torch.inference_mode(False), torch.enable_grad(), _frozen(model):
        # tensors made under inference mode cannot be part of a graph
        given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        with contextlib.ExitStack() as hooks:
            for layer, name in modules.items():
                hook = names[name].register_forward_hook(
                    lambda _module, _args, output, layer=layer: keep(layer, output)
                )
                hooks.callback(hook.remove)
            logits = model(**given).logits
        missing = [names_ for layer, names_ in modules.items() if layer not in read]
        if missing:
            raise BadConfig(f"Module {missing[0]!r} did not run in the forward pass.")
        learned = target[:, 1:].clone()
        labels = given["input_ids"][:, 1:][learned]
        loss = F.cross_entropy(logits[:, :-1][learned].float(), labels, reduction="sum")
        if not bool(loss.isfinite()):
            raise NotFinite("loss", "the task corpus", "Check the model's weights, or its dtype.")
        gradients = torch.autograd.grad(loss, [read[layer] for layer in modules])
    return {
        layer: (read[layer].detach(), gradient)
        for layer, gradient in zip(modules, gradients, strict=True)
    }


def attribute_latents(sae: SAE[Any], x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The latents z of x, and |z dL/dz|: to first order what the loss changes without a latent.

    dL/dz goes through the autoencoder's own decoder, with the error of its reconstruction kept
    fixed. Also under inference mode.

    Args:
        sae: an autoencoder with frozen weights.
        x: activations [n, d_in].
        gradient: dL/dx there, [n, d_in].

    Returns:
        z and the attribution, each [n, d_sae].
    """
    # normal tensors: those of inference mode cannot be saved for a backward pass. Encoding is
    # inside too, because SAEs that scale each sample remember the scale for the next decoding
    with torch.inference_mode(False), torch.enable_grad():
        z = sae.encode(x.detach().clone())
        leaf = z.detach().requires_grad_()
        upstream = gradient.detach().clone().to(leaf.dtype)
        (found,) = torch.autograd.grad(sae.decode(leaf), leaf, upstream)
    z = leaf.detach()
    return z, (z * found).abs()


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
