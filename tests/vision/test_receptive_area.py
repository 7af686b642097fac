"""What a position of a layer sees, against kernels whose receptive field is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from salve_lm.activations.sites import Site
from salve_lm.errors import BadConfig, NameNotFound
from vision.backbones import build_backbone
from vision.receptive_area import Box, receptive_area

IMAGES = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))


def test_of_one_convolution_it_is_the_kernel() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(inplace=True))
    peaks = torch.tensor([[10, 20], [0, 31]])
    boxes = receptive_area(model, Site("0"), IMAGES, peaks, mass=1.0)
    # in the corner the kernel hangs over the edge
    assert boxes == [Box(8, 18, 13, 23), Box(0, 29, 3, 32)]


def test_of_a_stack_it_is_the_theoretical_field_at_most() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, stride=2, padding=1)
    )
    peaks = torch.tensor([[3, 4], [2, 5]])
    whole = receptive_area(model, Site("2"), IMAGES, peaks, mass=1.0)
    # 3 + 2 * 2 pixels around the pixel 4 * position
    assert whole == [Box(9, 13, 16, 20), Box(5, 17, 12, 24)]
    for box, outer in zip(receptive_area(model, Site("2"), IMAGES, peaks, 0.5), whole, strict=True):
        assert outer.top <= box.top < box.bottom <= outer.bottom
        assert outer.left <= box.left < box.right <= outer.right
        assert box.bottom - box.top < 7


def test_a_dead_position_sees_the_whole_image_and_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    nn.init.constant_(model[0].bias, -1e6)  # type: ignore[arg-type]
    with torch.inference_mode():  # as in a Lightning validation
        boxes = receptive_area(model, Site("1"), IMAGES, torch.zeros(2, 2, dtype=torch.int64))
    assert boxes == [Box(0, 0, 24, 32)] * 2
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_of_a_vision_transformer() -> None:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "depth": 2}
    model = build_backbone("timm:vit_tiny_patch16_224", 3, options=options).model
    images = torch.randn(1, 3, 32, 32)
    (box,) = receptive_area(model, Site("blocks.0.norm1"), images, torch.tensor([[1, 2]]), 1.0)
    assert box == Box(8, 16, 16, 24)  # before any attention a token sees its patch


def test_bad_input() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 22 * 30, 2))
    peaks = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(BadConfig, match="no spatial positions"):
        receptive_area(model, Site("2"), IMAGES, peaks)
    with pytest.raises(BadConfig, match="mass"):
        receptive_area(model, Site("0"), IMAGES, peaks, mass=0.0)
    with pytest.raises(BadConfig, match="alpha channel"):
        receptive_area(model, Site("0"), torch.randn(1, 4, 24, 32), peaks)
    with pytest.raises(NameNotFound, match="module"):
        receptive_area(model, Site("conv"), IMAGES, peaks)
