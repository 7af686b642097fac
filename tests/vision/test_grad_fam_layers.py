"""Which layer Grad-FAM draws on, transformers, and what cannot be drawn."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchcam.methods import GradCAM

from salve_lm.activations.sites import Site, parse_site
from salve_lm.errors import BadConfig, NameNotFound, NotFinite, ShapeMismatch
from tests.vision.explained import D_SAE, POOLED, C, Latents, Net, close, make_sae
from vision import Classifier
from vision.backbones import build_backbone
from vision.grad_fam import grad_fam
from vision.spatial_layer import as_grid, find_layer


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 11, 9, generator=torch.Generator().manual_seed(1))


def test_the_layer_found() -> None:
    find = partial(find_layer, site=POOLED)
    resnet = build_backbone("resnet18", num_classes=2).model
    assert find(resnet, image=torch.randn(1, 3, 64, 64)) == Site("layer4")
    # one position behind layer4: the heatmap needs the layer before
    assert find(resnet, image=torch.randn(1, 3, 32, 32)) == Site("layer3")
    wrapped = nn.Sequential(nn.Identity(), resnet)
    assert (
        find_layer(wrapped, Site("1.fc", "input"), torch.randn(1, 3, 64, 64)).module == "1.layer4"
    )
    # here 2 x 2 positions also come out inside a block that ends at one: only a branch of it
    deep = build_backbone("resnet50", num_classes=2).model
    assert find(deep, image=torch.randn(1, 3, 32, 32)) == Site("layer3")


VITS = [
    ("vit_b_16", {}, "encoder.layers.encoder_layer_1.ln_1", 16, 1),
    ("timm:vit_tiny_patch16_224", {"img_size": (32, 48)}, "blocks.1.norm1", 16, 1),
    ("timm:vit_tiny_patch16_224", {"img_size": (32, 48), "reg_tokens": 2}, "blocks.1.norm1", 16, 3),
]


def small_vit(name: str, options: dict[str, Any]) -> tuple[nn.Module, dict[str, str], int]:
    torch.manual_seed(0)
    if name == "vit_b_16":
        from torchvision.models import VisionTransformer

        # torchvision's class knows square images only
        model: nn.Module = VisionTransformer(48, 16, 2, 2, 24, 48, num_classes=3)
        return model, {"pooled": "heads.head", "cls": "encoder.layers.encoder_layer_1"}, 24
    built = build_backbone(name, 3, options=options | {"depth": 2, "embed_dim": 24, "num_heads": 2})
    return built.model, {"pooled": "head", "cls": "blocks.1"}, 24


@pytest.mark.parametrize(("name", "options", "norm", "patch", "prefix"), VITS)
@pytest.mark.parametrize("place", ["pooled", "cls"])
def test_transformers(
    name: str, options: dict[str, Any], norm: str, patch: int, prefix: int, place: str
) -> None:
    model, modules, width = small_vit(name, options)
    site = (
        Site(modules[place], "input") if place == "pooled" else Site(modules[place], reduce="cls")
    )
    size = (48, 48) if name == "vit_b_16" else (32, 48)
    images = torch.randn(3, 3, *size)
    sae = make_sae("linear_l1", d_in=width)
    found = grad_fam(model, sae, site, images)
    grid = (size[0] // patch, size[1] // patch)
    assert (found.method, found.layer) == ("autograd", Site(norm))
    assert found.maps.shape == (3, D_SAE, *grid)
    assert found.maps.amax() > 0

    def lay_out(tokens: Tensor) -> Tensor:
        return tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)

    wrapped = Latents(model, sae, site).eval()
    with GradCAM(wrapped, f"model.{norm}", reshape_transform=lay_out) as cam:
        scores = wrapped(images)
        for latent in (0, 5):
            (expected,) = cam(latent, scores, normalized=False, retain_graph=True)
            close(found.maps[:, latent], expected, 1e-4)


@pytest.mark.parametrize(("name", "options", "norm", "patch", "prefix"), VITS[:2])
def test_the_last_block_s_output_has_no_gradient(
    name: str, options: dict[str, Any], norm: str, patch: int, prefix: int
) -> None:
    model, modules, width = small_vit(name, options)
    images = torch.randn(2, 3, 48 if name == "vit_b_16" else 32, 48)
    sae = make_sae("linear_l1", d_in=width)
    with pytest.raises(BadConfig, match=r"gradient there is zero.*first norm"):
        grad_fam(model, sae, Site(modules["pooled"], "input"), images, layer=Site(modules["cls"]))


def test_vit_b_16_at_full_width() -> None:
    """The real class, random weights: shapes and a gradient that is there."""
    built = build_backbone("vit_b_16", num_classes=2, options={"image_size": 32})
    sae = make_sae("standard", d_in=768)
    site = Site("encoder.layers.encoder_layer_11", "output", "cls")
    found = grad_fam(built.model, sae, site, torch.randn(1, 3, 32, 32))
    assert found.layer == Site("encoder.layers.encoder_layer_11.ln_1")
    assert found.maps.shape == (1, D_SAE, 2, 2)
    assert found.maps.any()


@pytest.mark.parametrize("name", ["vit_b_16", "timm:vit_base_patch16_224"])
def test_vit_b_16_at_full_size(name: str) -> None:
    """SALVE's network as both libraries build it, at 224 pixels, random weights, one image."""
    torch.manual_seed(0)
    built = Classifier(name, num_classes=10)
    assert sum(p.numel() for p in built.model.parameters()) == 85_806_346
    image = torch.randn(1, 3, 224, 224)
    for place in ("pooled", "cls"):
        site = parse_site(place, built)
        latents = [0, 5]
        found = grad_fam(built.model, make_sae("linear_l1", d_in=768), site, image, latents)
        block = "encoder.layers.encoder_layer_11.ln_1" if name == "vit_b_16" else "blocks.11.norm1"
        assert (found.method, found.layer) == ("autograd", Site(block))
        assert found.maps.shape == (1, 2, 14, 14)
        assert found.maps.isfinite().all()
        # not zero, and not one value everywhere
        assert all(m.any() and m.std() > 0 for m in found.maps[0])
        assert found.resized().shape == (1, 2, 224, 224)


def test_no_spatial_positions(images: Tensor) -> None:
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(3 * 11 * 9, C), nn.ReLU(), nn.Linear(C, 2))
    sae = make_sae("linear_l1")
    with pytest.raises(BadConfig, match=r"Nothing before the site '3:input' has spatial positions"):
        grad_fam(mlp, sae, Site("3", "input"), images)
    with pytest.raises(BadConfig, match=r"no spatial positions.*leave `layer` out"):
        grad_fam(mlp, sae, Site("3", "input"), images, layer=Site("2"))
    with pytest.raises(BadConfig, match="no spatial positions"):
        grad_fam(Net(), sae, POOLED, images, layer=Site("pool"))


def test_bad_input(net: Net, images: Tensor) -> None:
    sae = make_sae("linear_l1")
    with pytest.raises(BadConfig, match=r"4 channels, the model takes 3\. .*alpha"):
        grad_fam(net, sae, POOLED, torch.randn(1, 4, 9, 9))
    with pytest.raises(BadConfig, match=r"float tensor \[n, channels"):
        grad_fam(net, sae, POOLED, images[0])
    with pytest.raises(NameNotFound, match="0 to 9"):
        grad_fam(net, sae, POOLED, images, [10])
    with pytest.raises(NameNotFound, match="trunk"):
        grad_fam(net, sae, POOLED, images, layer=Site("trunc"))
    with pytest.raises(BadConfig, match=r"\+1 or -1 for each of the 2"):
        grad_fam(net, sae, POOLED, images, [0, 1], signs=[1, 0])
    with pytest.raises(BadConfig, match="did not run before the site"):
        grad_fam(net, sae, Site("trunk.1", "output", "mean"), images, layer=Site("trunk.2"))
    with pytest.raises(ShapeMismatch, match="reads 7 values, the site gives 6"):
        grad_fam(net, make_sae("linear_l1", d_in=7), POOLED, images)
    with pytest.raises(NotFinite, match="latents of these images"):
        grad_fam(net, sae, POOLED, images * torch.nan)
    vit, _, width = small_vit(VITS[0][0], {})
    with pytest.raises(BadConfig, match=r"does not take images of shape \[1, 3, 64, 64\]"):
        grad_fam(
            vit,
            make_sae("linear_l1", width),
            Site("heads.head", "input"),
            torch.randn(1, 3, 64, 64),
        )
    with pytest.raises(BadConfig, match="5 patch tokens, which fill no grid"):
        as_grid(net, Site("b"), torch.randn(1, 5, 4), (32, 32))
