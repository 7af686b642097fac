"""A small convolutional network, SAEs of every architecture, and a wrapper for torchcam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from salve_lm.activations.sites import Site

C, D_SAE = 6, 10
POOLED = Site("fc", "input")
OPTIONS: dict[str, dict[str, Any]] = {
    "linear_l1": {},
    "standard": {},
    "gated": {},
    "jumprelu": {},
    "topk": {"k": 4, "rescale_acts_by_decoder_norm": True},
    "batchtopk": {"k": 4},
    "matryoshka_batchtopk": {"k": 4},
}


class Net(nn.Module):
    """Two convolutions, an in-place ReLU, an average pool and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, C, 3), nn.ReLU(inplace=True)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(C, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.pool(self.trunk(images)).flatten(1))


class Latents(nn.Module):
    """The network up to signed latents, for torchcam, which explains a module's output."""

    def __init__(self, model: nn.Module, sae: Any, site: Site, sign: float = 1.0) -> None:
        super().__init__()
        self.model, self.sae, self.sign = model, sae, sign
        self.x: Tensor
        module = model.get_submodule(site.module)
        if site.io == "input":
            module.register_forward_pre_hook(self._keep_input)
        else:
            module.register_forward_hook(self._keep_output)

    def _keep_input(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.x = args[0]

    def _keep_output(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.x = output[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        self.model(images)
        return self.sign * self.sae.encode(self.x)


def make_sae(
    architecture: str, d_in: int = C, training: bool = False, scaling: Any = "none"
) -> Any:
    """An SAE with random biases, norms and (gated) magnitudes, so that every factor shows."""
    from salve_lm.sae import build_training_sae, to_inference

    options = dict(OPTIONS[architecture])
    if scaling != "none" and architecture == "topk":
        options["aux_loss_coefficient"] = 0.0
    sae = build_training_sae(
        architecture, d_in, D_SAE, options, seed=2, normalize_activations=scaling
    )
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if name == "W_dec":
                p.mul_(torch.rand(D_SAE, 1, generator=draw) * 4 + 0.2)
            elif name in ("W_enc", "r_mag", "b_enc", "b_dec", "b_mag", "b_gate"):
                p.copy_(torch.randn(p.shape, generator=draw) * (1 if name == "W_enc" else 0.3))
    return sae if training else to_inference(sae)


def close(found: Tensor, expected: Tensor, rtol: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= rtol * expected.abs().max()
    assert expected.abs().max() > 0
