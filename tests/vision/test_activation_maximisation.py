"""Activation maximisation: it climbs, repeats itself, and paints what its formulas say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from salve_lm.activations.sites import Site
from salve_lm.errors import BadConfig, NameNotFound, NotFinite
from salve_lm.sae import build_training_sae, to_inference
from vision.activation_maximisation import (
    _frequency_weights,
    _paint,
    _palette,
    _shifted,
    maximise_activation,
    pre_activation,
)
from vision.grad_fam import encode
from vision.site_forward import forward_to

C, D_SAE, SIZE = 8, 12, 24
SITE = Site("3", "output")
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, C, 5, padding=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def make_sae(architecture: str, **options: Any) -> Any:
    sae = build_training_sae(architecture, C, D_SAE, options, seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if name != "threshold":
                p.copy_(torch.randn(p.shape, generator=draw) * (1 if name == "W_enc" else 0.3))
    return to_inference(sae)


def natural(n: int) -> Tensor:
    """Images with the 1/f spectrum of photographs, normalised as the network wants them."""
    noise = torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(9))
    spectrum = torch.fft.rfft2(noise) * _frequency_weights(SIZE, SIZE)[..., 0]
    plain = torch.fft.irfft2(spectrum, s=(SIZE, SIZE))
    images = (plain / plain.std()).sigmoid()
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def run(sae: Any, latent: int = 0, **options: Any) -> Any:
    given: dict[str, Any] = {"size": SIZE, "steps": 60, "mean": MEAN, "std": STD} | options
    return maximise_activation(network(), sae, SITE, latent, **given)


@pytest.mark.parametrize("architecture", ["linear_l1", "standard", "gated", "jumprelu"])
def test_it_rises_well_above_natural_images(architecture: str) -> None:
    sae = make_sae(architecture)
    z = encode(sae, forward_to(network(), SITE, natural(200)).x).detach()
    for latent in (0, 5):
        found = run(sae, latent)
        typical, best = float(z[:, latent].mean()), float(z[:, latent].max())
        assert found.latent - typical > 1.5 * (best - typical) > 0
        assert found.latent > found.start
        assert found.objective[-10:].mean() > found.objective[:10].mean()
        assert found.image.shape == (3, SIZE, SIZE)
        assert found.image.min() >= 0 and found.image.max() <= 1
        assert found.objective.shape == (60,)


def test_the_value_reported_is_that_of_the_image() -> None:
    sae = make_sae("linear_l1")
    found = run(sae, 3, sign=-1)
    ready = (found.image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    z = sae.encode(network()(ready[None]))[0, 3]
    assert found.latent == pytest.approx(-float(z.detach()), rel=1e-4)
    assert found.latent > run(sae, 3, sign=-1, steps=1).latent


def test_a_silent_latent_is_woken() -> None:
    """z gives no gradient where a latent is silent, its pre-activation does."""
    sae = make_sae("standard")
    x = forward_to(network(), SITE, natural(50)).x
    with torch.no_grad():
        sae.b_enc[0] -= pre_activation(sae, x, 0).max() + 0.05
    assert not encode(sae, x)[:, 0].any()
    found = run(sae, 0)
    assert found.start == 0 and found.latent > 0
    assert found.objective[0] < 0


def test_the_same_seed_gives_the_same_image() -> None:
    sae = make_sae("standard")
    state = torch.random.get_rng_state()
    first = run(sae, seed=4, steps=5)
    network_state = torch.random.get_rng_state()
    model = network()
    torch.manual_seed(99)
    with torch.inference_mode():
        again = maximise_activation(
            model, sae, SITE, 0, size=SIZE, steps=5, mean=MEAN, std=STD, seed=4
        )
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.objective, again.objective)
    assert not torch.equal(first.image, run(sae, seed=5, steps=5).image)
    torch.random.set_rng_state(state)
    network()  # the only thing that draws from the global state
    assert torch.equal(torch.random.get_rng_state(), network_state)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("linear_l1", {}),
        ("standard", {}),
        ("gated", {}),
        ("jumprelu", {}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": False}),
        ("standard", {"apply_b_dec_to_input": True}),
    ],
)
def test_the_pre_activation_is_z_where_it_fires(architecture: str, options: dict[str, Any]) -> None:
    sae = make_sae(architecture, **options)
    x = torch.randn(40, C)
    z = encode(sae, x).detach()
    for latent in range(D_SAE):
        fires = z[:, latent] != 0
        pre = pre_activation(sae, x, latent).detach()
        torch.testing.assert_close(pre[fires], z[fires, latent], rtol=1e-5, atol=1e-6)
    assert (z != 0).any(0).sum() > 8


def test_positions_are_averaged() -> None:
    found = maximise_activation(
        network(), make_sae("standard"), Site("1", "output", "positions"), 2, size=8, steps=20
    )
    assert found.latent > found.start


@pytest.mark.parametrize("size", [(6, 8), (7, 9), (8, 5)])
def test_the_image_is_the_inverse_transform(size: tuple[int, int]) -> None:
    height, width = size
    draw = torch.Generator().manual_seed(0)
    spectrum = torch.randn(1, 3, height, width // 2 + 1, 2, generator=draw)
    weight, palette = _frequency_weights(height, width), _palette(None, 3)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.maximum(np.hypot(rows, columns), 1 / max(size))
    both = spectrum.numpy()
    plane = np.fft.irfft2((both[0, ..., 0] + 1j * both[0, ..., 1]) / frequency, size, norm="ortho")
    colours = np.array([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]])
    colours /= np.sqrt((colours**2).sum(0)).max()
    expected = 1 / (1 + np.exp(-np.einsum("dc,chw->dhw", colours, plane / 4)))
    found = _paint(spectrum, weight, palette, size)[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_a_turn_keeps_the_proportions_of_an_oblong_image() -> None:
    at = torch.arange(40.0)
    image = (torch.sin(at[:24, None] / 3) + torch.cos(at[None, :] / 4))[None, None]
    turn = float((torch.rand(4, generator=torch.Generator().manual_seed(3)) * 2 - 1)[2])
    found = _shifted(image, 0, 20, 0, torch.Generator().manual_seed(3))
    # grid_sample says where each output pixel comes from, as ndimage's matrix does
    angle = math.radians(20 * turn)
    matrix = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    centre = np.array([11.5, 19.5])
    expected = ndimage.affine_transform(
        image[0, 0].numpy(), matrix, centre - matrix @ centre, order=1
    )
    inner = np.s_[7:-7, 7:-7]
    np.testing.assert_allclose(found[0, 0].numpy()[inner], expected[inner], atol=2e-5)
    assert abs(turn) > 0.1


def test_no_augmentation_leaves_the_image_alone() -> None:
    image = torch.rand(1, 3, 6, 9)
    torch.testing.assert_close(_shifted(image, 0, 0, 0, torch.Generator()), image)


def test_bad_options() -> None:
    sae = make_sae("linear_l1")
    with pytest.raises(NameNotFound, match="0 to 11"):
        run(sae, 12)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"steps": 0}, "size must be at least 2"),
        ({"lr": 0.0}, "size must be at least 2"),
        ({"sign": 2}, "size must be at least 2"),
        ({"size": 1}, "size must be at least 2"),
        ({"shift": 1.0}, "shift and zoom are shares"),
        ({"zoom": -0.1}, "shift and zoom are shares"),
        ({"degrees": -1.0}, "shift and zoom are shares"),
        ({"std": (1.0, 0.0, 1.0)}, "mean and std must be 3 numbers"),
        ({"mean": (0.5,)}, "mean and std must be 3 numbers"),
    ]
    for options, message in wrong:
        with pytest.raises(BadConfig, match=message):
            run(sae, **options)
    with pytest.raises(BadConfig, match=r"colours must be \[3, 3\]"):
        run(sae, colours=torch.eye(2))
    with pytest.raises(BadConfig, match="1 channels, the model takes 3"):
        run(sae, channels=1, mean=None, std=None)
    with torch.no_grad():
        sae.W_enc[0, 0] = torch.nan
    with pytest.raises(NotFinite):
        run(sae)
