"""Transforms against torchvision's, and random parts that depend on their number alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from salve_lm.errors import BadConfig
from vision.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageTransform,
    random_crop,
    random_shift,
)


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(5, 90),
    height=st.integers(5, 90),
    size=st.integers(4, 64),
    fraction=st.sampled_from([1.0, 0.875, 0.5]),
)
def test_crop_is_torchvisions_resize_and_center_crop(
    width: int, height: int, size: int, fraction: float
) -> None:
    from torchvision.transforms import v2

    oracle = v2.Compose(
        [
            v2.Resize(round(size / fraction)),
            v2.CenterCrop(size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    image = noise(width, height)
    got = ImageTransform(size, crop_fraction=fraction)(image)
    torch.testing.assert_close(got, oracle(image), atol=1e-5, rtol=0)


def test_squash_is_torchvisions_resize_of_both_sides() -> None:
    from torchvision.transforms import v2

    image = noise(50, 30)
    oracle = v2.Compose([v2.Resize((24, 24)), v2.PILToTensor(), v2.ToDtype(torch.float32, True)])
    got = ImageTransform(24, "squash", mean=(0, 0, 0), std=(1, 1, 1))(image)
    torch.testing.assert_close(got, oracle(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("augment", ["flip", "crop_flip", "shift"])
def test_augmentation_is_a_function_of_the_number(augment: str) -> None:
    transform = ImageTransform(32, augment=augment)  # type: ignore[arg-type]
    image = noise(40, 36)
    seen = []
    for draw in range(12):
        torch.manual_seed(draw)
        first = transform(image, draw)
        assert torch.equal(first, transform(image, draw))
        assert first.shape == (3, 32, 32)
        seen.append(first)
    assert any(not torch.equal(seen[0], other) for other in seen)
    assert torch.equal(transform(image), ImageTransform(32)(image))  # evaluation: none of it


def test_flip_mirrors_half_of_the_images() -> None:
    transform = ImageTransform(16, augment="flip")
    image = noise(16, 16)
    plain = transform(image)
    flipped = [torch.equal(transform(image, d), plain.flip(-1)) for d in range(200)]
    assert all(f or torch.equal(transform(image, d), plain) for d, f in enumerate(flipped))
    assert 70 < sum(flipped) < 130


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**31))
def test_random_crops_lie_inside(height: int, width: int, seed: int) -> None:
    top, left, h, w = random_crop(height, width, torch.Generator().manual_seed(seed))
    assert top >= 0 and left >= 0 and h >= 1 and w >= 1
    assert top + h <= height and left + w <= width


def test_random_crops_keep_the_area_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    areas = [
        h * w / 200**2 for _, _, h, w in (random_crop(200, 200, generator) for _ in range(500))
    ]
    assert 0.34 < min(areas) < 0.4 and max(areas) <= 1 and 0.55 < float(np.mean(areas)) < 0.7


def test_shift_repeats_edges() -> None:
    image = torch.arange(32.0).expand(3, 32, 32)
    moved = {
        tuple(random_shift(image, torch.Generator().manual_seed(s))[0, 0].tolist())
        for s in range(50)
    }
    want = {tuple((torch.arange(32) + k).clamp(0, 31).float().tolist()) for k in range(-2, 3)}
    assert moved == want


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 8, "crop_fraction": 1.5}, r"crop_fraction is 1.5; it lies in \(0, 1\]"),
        ({"image_size": 8, "std": (1, 1, 0)}, "std above 0"),
        ({"image_size": 8, "mean": (0.5,)}, "three values each"),
    ],
)
def test_bad_options(arguments: dict, message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        ImageTransform(**arguments)
