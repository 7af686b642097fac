"""Activation maximisation: an image that drives one latent as high as possible.

Gradient ascent on the image's Fourier coefficients with decorrelated colours, seen through small
random shifts, turns and zooms (Olah et al., "Feature Visualization", Distill 2017; the constants
are those of its code, lucid). Without these the ascent ends in high-frequency noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salve_lm.activations.hooks import evaluating
from salve_lm.activations.sites import Site
from salve_lm.errors import BadConfig, NotFinite
from salve_lm.features import check_latent
from vision.grad_fam import encode, encoder_slope
from vision.site_forward import forward_to

if TYPE_CHECKING:
    from sae_lens import SAE

# square root of the covariance of ImageNet's colours, scaled to a largest column norm of 1
_IMAGENET_COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
# lucid's: the initial spectrum's spread, and what brings coefficients into the sigmoid's range
_INITIAL_SPREAD, _MAGIC = 0.01, 4.0


@dataclass(frozen=True)
class Maximised:
    """The image found and how it was reached.

    Attributes:
        image: [channels, height, width] in [0, 1], on the CPU, before the model's normalisation.
        objective: float64 [steps], what was climbed, on the shifted and turned image of each step:
            s times the latent's pre-activation (in units of the latent), or s * z where the encoder
            is not linear up to its gate.
        start: s * z of the first image, seen straight.
        latent: s * z of `image`, seen straight. It can be 0 although the pre-activation rose, where
            others win the top k or a threshold is not reached.
    """

    image: Tensor
    objective: Tensor
    start: float
    latent: float


def maximise_activation(
    model: nn.Module,
    sae: SAE[Any],
    site: Site,
    latent: int,
    *,
    size: int | tuple[int, int] = 224,
    sign: int = 1,
    steps: int = 256,
    lr: float = 0.05,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    shift: float = 0.05,
    degrees: float = 5.0,
    zoom: float = 0.05,
    colours: Tensor | None = None,
    channels: int = 3,
) -> Maximised:
    """Find an image with a large s * z_latent; also inside no_grad and inference_mode.

    The pre-activation is climbed, because a silent latent gives no gradient to start from; where it
    fires both are the same. The same seed gives the same image on the same machine (on CUDA up to
    the order of additions in `grid_sample`'s backward); the global random state is left alone.

    Args:
        model: the network, in eval mode for this; its device is used.
        sae: reads `site`.
        site: where; with `:positions` the mean over positions is climbed.
        latent: which.
        size: height and width of the image, or one number for both.
        sign: -1 to drive a linear_l1 latent down; see `FeatureTable.sign`.
        steps: of Adam.
        lr: of Adam, on the Fourier coefficients.
        seed: of the first image and of the shifts.
        mean: of the normalisation that the model's inputs go through, per channel; None for none.
        std: likewise.
        shift: largest jitter, as a share of the image.
        degrees: largest turn.
        zoom: largest relative change of scale.
        colours: [channels, channels], maps decorrelated to real colours; default ImageNet's for
            three channels, otherwise none.
        channels: of the image.

    Raises:
        BadConfig: options out of range.
        NameNotFound: no such latent or module.
        ShapeMismatch: the SAE does not fit the site.
        NotFinite: the objective became NaN or infinite.
    """
    check_latent(latent, sae.W_dec.shape[0])
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 2 or steps < 1 or lr <= 0 or sign not in (-1, 1):
        raise BadConfig("size must be at least 2, steps at least 1, lr positive, sign +1 or -1.")
    if not 0 <= shift < 1 or not 0 <= zoom < 1 or degrees < 0:
        raise BadConfig("shift and zoom are shares, from 0 to below 1; degrees is not negative.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # on the CPU, so that every device draws the same numbers
    draw = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        # in here, because a tensor made in inference mode cannot take part in a graph
        normalise = _Normalisation(mean, std, channels, device)
        palette = _palette(colours, channels).to(device)
        spectrum = torch.randn(1, channels, height, width // 2 + 1, 2, generator=draw)
        spectrum = (spectrum * _INITIAL_SPREAD).to(device).requires_grad_()
        weight = _frequency_weights(height, width).to(device)

        def paint() -> Tensor:
            return _paint(spectrum, weight, palette, (height, width))

        def straight() -> float:
            with torch.no_grad():
                x = forward_to(model, site, normalise(paint())).x
                return sign * float(encode(sae, x)[:, latent].double().mean())

        start = straight()
        adam = torch.optim.Adam([spectrum], lr=lr)
        objective = torch.empty(steps, dtype=torch.float64)
        for step in range(steps):
            view = _shifted(paint(), shift, degrees, zoom, draw)
            x = forward_to(model, site, normalise(view), graph=True).x
            value = sign * pre_activation(sae, x, latent).mean()
            objective[step] = value.detach().double().cpu()
            if not bool(objective[step].isfinite()):
                raise NotFinite("objective", f"step {step}", "Use a smaller lr.")
            (spectrum.grad,) = torch.autograd.grad(-value, spectrum)
            adam.step()
        return Maximised(paint().detach()[0].cpu(), objective, start, straight())


def pre_activation(sae: SAE[Any], x: Tensor, latent: int) -> Tensor:
    """What latent `latent` would be if its gate were open, [rows]; equal to z where it fires.

    z itself for an architecture whose encoder is not linear up to its gate.
    """
    slope = encoder_slope(sae)
    if slope is None:
        return encode(sae, x)[:, latent]
    with evaluating(sae):
        sae_in = sae.process_sae_in(x.to(sae.W_dec.device))
    linear = (sae_in @ sae.W_enc[:, latent]) * slope[latent]
    if sae.cfg.architecture() == "gated":
        return linear + sae.b_mag[latent]
    return linear + sae.b_enc[latent] * slope[latent]


class _Normalisation:
    """(image - mean) / std per channel."""

    def __init__(
        self,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        channels: int,
        device: torch.device,
    ) -> None:
        mean = [0.0] * channels if mean is None else mean
        std = [1.0] * channels if std is None else std
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise BadConfig(
                f"mean and std must be {channels} numbers each, std positive, not {list(mean)} and "
                f"{list(std)}."
            )
        self._mean = torch.tensor(mean, device=device).reshape(-1, 1, 1)
        self._std = torch.tensor(std, device=device).reshape(-1, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        return (image - self._mean) / self._std


def _palette(colours: Tensor | None, channels: int) -> Tensor:
    if colours is None:
        if channels != 3:
            return torch.eye(channels)
        colours = torch.tensor(_IMAGENET_COLOURS)
    if colours.shape != (channels, channels):
        raise BadConfig(f"colours must be [{channels}, {channels}], not {list(colours.shape)}.")
    return colours.float() / colours.float().norm(dim=0).max()


def _frequency_weights(height: int, width: int) -> Tensor:
    """1 / frequency, [height, width // 2 + 1, 1]: the fall-off of natural images."""
    rows = torch.fft.fftfreq(height)[:, None]
    columns = torch.fft.rfftfreq(width)[None]
    frequency = (rows**2 + columns**2).sqrt()
    return (1 / frequency.clamp(min=1 / max(height, width))).unsqueeze(-1)


def _paint(spectrum: Tensor, weight: Tensor, palette: Tensor, size: tuple[int, int]) -> Tensor:
    """Fourier coefficients [1, channels, h, w // 2 + 1, 2] to an image [1, channels, h, w]."""
    plane = torch.fft.irfft2(torch.view_as_complex(spectrum * weight), s=size, norm="ortho")
    return torch.einsum("dc,nchw->ndhw", palette, plane / _MAGIC).sigmoid()


def _shifted(
    image: Tensor, shift: float, degrees: float, zoom: float, draw: torch.Generator
) -> Tensor:
    """`image` after one random shift, turn and zoom, mirrored beyond its edges."""
    dx, dy, turn, stretch = (torch.rand(4, generator=draw) * 2 - 1).tolist()
    angle, scale = math.radians(degrees * turn), 1 / (1 + zoom * stretch)
    height, width = image.shape[2:]
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    # grid_sample's axes run from -1 to 1 whatever the image's proportions: a turn has to know them
    theta = image.new_tensor(
        [
            [cos, -sin * height / width, 2 * shift * dx],
            [sin * width / height, cos, 2 * shift * dy],
        ]
    )
    grid = F.affine_grid(theta[None], list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)
