"""Grad-FAM's maps: closed form against autograd and torchcam, silence, modes, a planted patch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchcam.methods import GradCAM

from salve_lm.activations.hooks import run_to
from salve_lm.activations.sites import Site
from salve_lm.errors import BadConfig
from tests.vision.explained import D_SAE, OPTIONS, POOLED, C, Latents, Net, close, make_sae
from vision.grad_fam import SilentLatent, encode, grad_fam


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 11, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("architecture", OPTIONS)
def test_closed_form_is_autograd(
    architecture: str, training: bool, net: Net, images: Tensor
) -> None:
    sae = make_sae(architecture, training=training)
    signs = [1, -1] * (D_SAE // 2)
    closed = grad_fam(net, sae, POOLED, images, signs=signs)
    slow = grad_fam(net, sae, POOLED, images, signs=signs, method="autograd")
    assert (closed.method, slow.method) == ("closed_form", "autograd")
    assert closed.layer == slow.layer == Site("trunk")
    close(closed.maps, slow.maps, 1e-5)
    close(closed.z, slow.z, 1e-5)
    if architecture != "linear_l1":
        assert (closed.z == 0).any()
        assert not closed.maps[closed.z == 0].any()
    assert (closed.maps.amax((0, 2, 3)) > 0).sum() > 3


@pytest.mark.parametrize("architecture", ["linear_l1", "standard", "topk", "gated", "jumprelu"])
@pytest.mark.parametrize("sign", [1, -1])
def test_torchcam_gives_the_same_map(
    architecture: str, sign: int, net: Net, images: Tensor
) -> None:
    sae = make_sae(architecture)
    found = grad_fam(net, sae, POOLED, images, signs=[sign] * D_SAE)
    wrapped = Latents(net, sae, POOLED, sign).eval()
    with GradCAM(wrapped, "model.trunk") as cam:
        scores = wrapped(images)
        for latent in range(D_SAE):
            (expected,) = cam(latent, scores, normalized=False, retain_graph=True)
            torch.testing.assert_close(found.maps[:, latent], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scaling", ["layer_norm", "constant_norm_rescale"])
def test_scaled_inputs_go_through_autograd(scaling: str, net: Net, images: Tensor) -> None:
    sae = make_sae("standard", scaling=scaling)
    found = grad_fam(net, sae, POOLED, images)
    assert found.method == "autograd"
    wrapped = Latents(net, sae, POOLED).eval()
    with GradCAM(wrapped, "model.trunk") as cam:
        (expected,) = cam(int(found.z.sum(0).argmax()), wrapped(images), normalized=False)
    close(found.maps[:, int(found.z.sum(0).argmax())], expected, 1e-4)
    with pytest.raises(BadConfig, match="not linear in its input"):
        grad_fam(net, sae, POOLED, images, method="closed_form")


def test_a_step_between_pool_and_site_is_noticed(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Net()
    model.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.GroupNorm(2, C))  # type: ignore[assignment]
    sae = make_sae("linear_l1")
    found = grad_fam(model, sae, POOLED, images)
    assert found.method == "autograd"
    with GradCAM(Latents(model, sae, POOLED).eval(), "model.trunk") as cam:
        (expected,) = cam(2, cam.model(images), normalized=False)
    close(found.maps[:, 2], expected, 1e-4)
    with pytest.raises(BadConfig, match="no average over the positions of 'trunk:output'"):
        grad_fam(model, sae, POOLED, images, method="closed_form")


def test_a_site_with_positions_is_its_own_layer(net: Net, images: Tensor) -> None:
    sae = make_sae("standard")
    mean = grad_fam(net, sae, Site("trunk.3", "output", "mean"), images)
    assert (mean.method, mean.layer) == ("closed_form", Site("trunk.3"))
    torch.testing.assert_close(mean.maps, grad_fam(net, sae, POOLED, images).maps)

    every = grad_fam(net, sae, Site("trunk.3", "output", "positions"), images)
    assert every.method == "autograd"
    # by hand: each position has its own gate; the mean of its gradients over positions
    A = net.trunk(images).detach()
    z = encode(sae, A.permute(0, 2, 3, 1).flatten(0, 2)).detach().reshape(4, -1, D_SAE)
    open_share = (z > 0).float().mean(1) / z.shape[1]
    expected = (torch.einsum("kl,nkhw->nlhw", sae.W_enc, A) * open_share[..., None, None]).relu()
    close(every.maps, expected.detach(), 1e-5)


def test_resized_and_chosen_latents(net: Net, images: Tensor) -> None:
    sae = make_sae("linear_l1")
    some = grad_fam(net, sae, POOLED, images, [7, 2])
    assert some.latents == (7, 2)
    torch.testing.assert_close(some.maps, grad_fam(net, sae, POOLED, images).maps[:, [7, 2]])
    assert some.resized().shape == (4, 2, 11, 9)
    assert some.resized((5, 6)).shape == (4, 2, 5, 6)
    assert some.resized().min() >= 0


@pytest.mark.parametrize("method", ["closed_form", "autograd"])
def test_inside_inference_mode_and_nothing_leaks(method: Any, net: Net, images: Tensor) -> None:
    sae = make_sae("gated")
    expected = grad_fam(net, sae, POOLED, images, method=method).maps
    net.train()
    with torch.inference_mode():
        inside = images * 1  # an inference tensor
        found = grad_fam(net, sae, POOLED, inside, method=method).maps
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    torch.testing.assert_close(found, expected)
    assert net.training and not any(m._forward_hooks for m in net.modules())
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_a_latent_that_never_fires(net: Net, images: Tensor) -> None:
    sae = make_sae("standard")
    with torch.no_grad():
        sae.b_enc[3] = -1e4
    for method in ("closed_form", "autograd"):
        with pytest.raises(SilentLatent, match=r"Latent 3 fires on none of these 4 images") as e:
            grad_fam(net, sae, POOLED, images, [0, 3], method=method)
        assert 3 in e.value.latents
        assert not grad_fam(net, sae, POOLED, images, method=method).maps[:, 3].any()


def test_the_heatmap_finds_a_planted_patch() -> None:
    """A detector of red squares points at the red square."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            parameter.zero_()
        model.get_parameter("trunk.0.weight")[0, 0] = 1 / 9
        model.get_parameter("trunk.2.weight")[4, 0] = 1 / 9
    sae = make_sae("linear_l1")
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.W_enc[4, 1] = 1.0
    pictures = torch.zeros(1, 3, 32, 32)
    pictures[0, 0, 20:26, 4:10] = 1.0
    heat = grad_fam(model, sae, POOLED, pictures, [1]).resized()[0, 0]
    row, column = divmod(int(heat.argmax()), 32)
    assert 20 <= row < 26 and 4 <= column < 10
    x = run_to(model, {"x": POOLED}, pictures)["x"]
    assert encode(sae, x)[0, 1] > 0
