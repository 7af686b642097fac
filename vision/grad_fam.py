"""Grad-FAM: where in an image a latent comes from (SALVE; METHODS 5).

The map of latent l is ReLU(sum_k w_k A^k), with A the last activation with spatial positions before
the SAE's site and w_k the mean over positions of d(s z_l)/dA^k: Grad-CAM (arXiv 1610.02391) with a
latent in the place of a class logit. A dead unit is silent and has no map; a negative sign s asks
for what lowers the latent.

Where the site is the mean of A over positions and the encoder is linear in x up to its gate, w_k is
W_enc[k, l] / positions times the gate's slope, so that all latents of a batch are one product of
matrices and no backward pass is run. Elsewhere autograd does the same, one pass a latent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salve_lm.activations.hooks import evaluating
from salve_lm.activations.sites import Site
from salve_lm.errors import BadConfig, NotFinite, ShapeMismatch
from salve_lm.features import check_latent
from vision.site_forward import Reached, forward_to
from vision.spatial_layer import as_grid, find_layer

if TYPE_CHECKING:
    from sae_lens import SAE

Method = Literal["auto", "closed_form", "autograd"]

LINEAR_UP_TO_GATE = (
    "linear_l1",
    "standard",
    "topk",
    "batchtopk",
    "matryoshka_batchtopk",
    "jumprelu",
    "gated",
)
"""Architectures whose latent is, where it fires, affine in x with slope W_enc times a constant."""


class SilentLatent(BadConfig):
    """Latents that fire on none of the images; `latents` says which."""

    def __init__(self, latents: Sequence[int], n_images: int) -> None:
        self.latents = list(latents)
        listed = ", ".join(map(str, latents[:10])) + (", …" if len(latents) > 10 else "")
        super().__init__(
            f"Latent {listed} fires on none of these {n_images} images, so there is nothing to "
            "draw. Take images on which it fires (those with the largest activation), or another "
            "latent."
        )


@dataclass(frozen=True)
class Heatmaps:
    """Maps of some latents on a batch.

    Attributes:
        maps: [n, latents, h, w] float32, not negative, on the grid of the layer. All zero where
            the latent does not fire, or where nothing in the image raises s * z_l.
        z: the latents [n, latents] without their sign; the mean over positions where each position
            is a row of its own.
        latents: their indices.
        layer: the activation A.
        method: "closed_form" or "autograd".
        image_size: height and width of the images.
    """

    maps: Tensor
    z: Tensor
    latents: tuple[int, ...]
    layer: Site
    method: Method
    image_size: tuple[int, int]

    def resized(self, size: tuple[int, int] | None = None) -> Tensor:
        """The maps, bilinearly, at `size` (default: that of the images): [n, latents, H, W].

        Not done at once, because all latents of a batch at image size take gigabytes.
        """
        size = size or self.image_size
        return F.interpolate(self.maps, size=size, mode="bilinear", align_corners=False)


def grad_fam(
    model: nn.Module,
    sae: SAE[Any],
    site: Site,
    images: Tensor,
    latents: Iterable[int] | None = None,
    *,
    signs: Iterable[int] | Tensor | None = None,
    layer: Site | None = None,
    method: Method = "auto",
) -> Heatmaps:
    """Heatmaps of latents on images; also inside `torch.no_grad` and `torch.inference_mode`.

    Args:
        model: the network; run in eval mode.
        sae: reads `site`.
        site: where, as `parse_site` gives it. With `:positions` the latent's mean over the
            positions is explained.
        images: [n, channels, height, width], as the network takes them.
        latents: which; None means all, of which the silent ones get maps of zeros.
        signs: +1 or -1 per latent: `FeatureTable.sign(class, latent)` for linear_l1, whose latents
            have either sign. None: all +1.
        layer: the activation A, where `find_layer` would choose another one; its `reduce` is not
            looked at.
        method: "auto" takes the closed form wherever it is exact.

    Raises:
        BadConfig: no spatial positions; a layer that the latents do not depend on; images that the
            model does not take; a closed form that does not exist here; signs that are none.
        SilentLatent: a latent that was asked for by number fires on none of the images.
        NameNotFound: no such latent or module.
        ShapeMismatch: the SAE is of another width than the site.
        NotFinite: NaN or infinity among the latents.
    """
    if method not in ("auto", "closed_form", "autograd"):
        raise BadConfig(f"method is {method!r}; choose auto, closed_form or autograd.")
    d_sae = sae.W_dec.shape[0]
    chosen = [check_latent(i, d_sae) for i in (range(d_sae) if latents is None else latents)]
    with torch.inference_mode(False):
        sign = _signs(signs, chosen)
        size = (images.shape[-2], images.shape[-1]) if images.ndim == 4 else (0, 0)
        place = layer or find_layer(model, site, images[:1])
        if method != "autograd":
            reached = forward_to(model, site, images, place)
            why_not = closed_form_obstacle(model, sae, place, reached, size)
            if why_not is None:
                maps, z = closed_form_maps(model, sae, place, reached, size, chosen, sign)
                _check_firing(z, chosen, named=latents is not None)
                return Heatmaps(maps, z, tuple(chosen), place, "closed_form", size)
            if method == "closed_form":
                raise BadConfig(f"There is no closed form here: {why_not}. Use method: autograd.")
        reached = forward_to(model, site, images, place, graph=True)
        with torch.enable_grad():
            maps, z = autograd_maps(
                model, sae, place, reached, size, chosen, sign, latents is not None
            )
        return Heatmaps(maps, z, tuple(chosen), place, "autograd", size)


def encode(sae: SAE[Any], x: Tensor) -> Tensor:
    """Latents [rows, d_sae] of `x` [rows, d_in], dense, from the SAE in eval mode.

    Raises:
        ShapeMismatch: the SAE is of another width.
        NotFinite: NaN or infinity.
    """
    d_in = sae.W_dec.shape[1]
    if x.shape[-1] != d_in:
        raise ShapeMismatch(
            f"The SAE reads {d_in} values, the site gives {x.shape[-1]}. Use the site that the SAE "
            "was trained on."
        )
    with evaluating(sae):
        z = sae.encode(x.to(sae.W_dec.device))
    z = z.to_dense() if z.is_sparse else z
    if not bool(z.detach().isfinite().all()):
        raise NotFinite("z", "latents of these images", "Check the images and the SAE's weights.")
    return z


def encoder_slope(sae: SAE[Any]) -> Tensor | None:
    """[d_sae]: dz_l/dx = W_enc[:, l] * slope[l] where latent l fires; None where that is not so.

    exp(r_mag) for gated, the decoder norm for top-k with rescaling, otherwise 1. SAELens' scaling
    of each sample (layer norm, constant norm) makes z depend on x in another way.
    """
    if (
        sae.cfg.architecture() not in LINEAR_UP_TO_GATE
        or sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale")
        or sae.cfg.reshape_activations != "none"
    ):
        return None
    if sae.cfg.architecture() == "gated":
        return sae.r_mag.detach().exp()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        return sae.W_dec.detach().norm(dim=-1)
    return torch.ones_like(sae.W_dec[:, 0]).detach()


def _signs(signs: Iterable[int] | Tensor | None, latents: list[int]) -> Tensor:
    given = [1] * len(latents) if signs is None else [int(s) for s in signs]
    if len(given) != len(latents) or any(s not in (-1, 1) for s in given):
        raise BadConfig(f"signs must be +1 or -1 for each of the {len(latents)} latents.")
    return torch.tensor(given, dtype=torch.float32)


def closed_form_obstacle(
    model: nn.Module, sae: SAE[Any], layer: Site, reached: Reached, size: tuple[int, int]
) -> str | None:
    """Why `closed_form_maps` would be wrong for this forward pass; None where it is exact."""
    if encoder_slope(sae) is None:
        return (
            f"the encoder ({sae.cfg.architecture()}, scaling {sae.cfg.normalize_activations!r}) is "
            "not linear in its input"
        )
    if reached.layer is None or reached.layer.ndim != 4:
        return f"the site is no average over the positions of {str(layer)!r}"
    pooled = as_grid(model, layer, reached.layer, size).mean(dim=(2, 3))
    # sums of the same numbers in another order; any further step between A and x shows
    room = 64 * torch.finfo(pooled.dtype).eps * float(pooled.abs().max())
    if pooled.shape != reached.x.shape or float((pooled - reached.x).abs().max()) > room:
        return f"the site is no average over the positions of {str(layer)!r}"
    return None


@torch.no_grad()
def closed_form_maps(
    model: nn.Module,
    sae: SAE[Any],
    layer: Site,
    reached: Reached,
    size: tuple[int, int],
    latents: list[int],
    sign: Tensor,
) -> tuple[Tensor, Tensor]:
    """Maps [n, latents, h, w] and latents [n, latents] of one forward pass, all at once.

    Only where `closed_form_obstacle` has none; `size` is that of the images.
    """
    slope = encoder_slope(sae)
    if reached.layer is None or slope is None:
        raise TypeError("closed_form_obstacle was not asked")
    grid = as_grid(model, layer, reached.layer, size).to(sae.W_dec.device, torch.float32)
    z = encode(sae, reached.x)[:, latents].float()
    n, _, h, w = grid.shape
    # per latent and channel: d(s z_l)/dA at every position of a sample on which l fires
    weight = (sae.W_enc[:, latents] * slope[latents]).float() * sign.to(z.device) / (h * w)
    maps = weight.t() @ grid.flatten(2)
    if sae.cfg.architecture() != "linear_l1":
        maps *= (z != 0).unsqueeze(-1)
    return maps.relu_().reshape(n, len(latents), h, w), z


def autograd_maps(
    model: nn.Module,
    sae: SAE[Any],
    layer: Site,
    reached: Reached,
    size: tuple[int, int],
    latents: list[int],
    sign: Tensor,
    named: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same by one backward pass a latent, from a forward pass with `graph=True`.

    Raises:
        SilentLatent: a latent never fires, and they were `named`.
        BadConfig: the gradient is zero at every position.
    """
    leaf = reached.layer
    if leaf is None:
        raise TypeError("the forward pass has to hold the layer")
    n = len(leaf)
    grid = as_grid(model, layer, leaf.detach(), size)
    z = encode(sae, reached.x)
    z = z.reshape(n, -1, z.shape[-1]).mean(dim=1)
    _check_firing(z.detach()[:, latents], latents, named)
    firing = (z.detach()[:, latents] != 0).any(dim=0).tolist()
    maps = grid.new_zeros(n, len(latents), *grid.shape[2:], dtype=torch.float32)
    reaches = not any(firing)
    for i, latent in enumerate(latents):
        if not firing[i] or not z.requires_grad:
            continue
        (gradient,) = torch.autograd.grad(
            z[:, latent].sum(), leaf, retain_graph=True, allow_unused=True
        )
        if gradient is None:
            continue
        weight = as_grid(model, layer, gradient, size).mean(dim=(2, 3)).float() * sign[i].item()
        reaches = reaches or bool(weight.any())
        maps[:, i] = torch.einsum("nk,nkhw->nhw", weight, grid.float()).relu()
    if not reaches:
        raise BadConfig(
            f"The latents do not depend on the positions of {str(layer)!r}: their gradient there "
            "is zero. In a vision transformer the [CLS] token does not read the patch tokens "
            "of the last block's output: use the last block's first norm (`ln_1`, `norm1`), which "
            "is chosen where `layer` is left out."
        )
    return maps, z.detach()[:, latents].float()


def _check_firing(z: Tensor, latents: list[int], named: bool) -> None:
    silent = [
        i for i, fires in zip(latents, (z != 0).any(dim=0).tolist(), strict=True) if not fires
    ]
    if named and silent:
        raise SilentLatent(silent, len(z))
