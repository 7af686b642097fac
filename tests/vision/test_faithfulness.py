"""Deletion, insertion, pointing game and IoU against loops that follow their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor, nn

from salve_lm.activations.sites import Site
from salve_lm.errors import BadConfig, NameNotFound, NotFinite, ShapeMismatch
from vision.faithfulness import (
    baseline_images,
    deletion_curve,
    insertion_curve,
    intersection_over_union,
    latent_score,
    pixel_order,
    pointing_game,
)

WEIGHT = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def linear(images: Tensor) -> Tensor:
    return (images * WEIGHT).sum(dim=(1, 2, 3))


def squared(images: Tensor) -> Tensor:
    return (images * WEIGHT).sum(dim=(1, 2, 3)) ** 2


def by_hand(images: Tensor, first: Tensor, then: Tensor, maps: Tensor, steps: int) -> np.ndarray:
    """Pixel by pixel, image by image."""
    n, channels, height, width = images.shape
    out = np.zeros((n, steps + 1))
    for i in range(n):
        order = sorted(range(height * width), key=lambda p: -float(maps[i].flatten()[p]))
        for s in range(steps + 1):
            picture = first[i].clone()
            for p in order[: s * height * width // steps]:
                row, column = divmod(p, width)
                for c in range(channels):
                    picture[c, row, column] = then[i, c, row, column]
            out[i, s] = float(squared(picture[None])[0])
    return out


@pytest.mark.parametrize("steps", [1, 4, 7, 30])
@pytest.mark.parametrize("baseline", ["mean", "blur", "own"])
def test_curves_by_hand(steps: int, baseline: str) -> None:
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(3, 2, 5, 6, generator=draw)
    maps = torch.rand(3, 5, 6, generator=draw)
    given_: object = torch.zeros(2, 1, 1) if baseline == "own" else baseline
    bare = baseline_images(images, given_)  # type: ignore[arg-type]
    options = {"steps": steps, "baseline": given_, "batch_size": 2}
    for run, first, then in (
        (deletion_curve, images, bare),
        (insertion_curve, bare, images),
    ):
        curve = run(squared, images, maps, **options)  # type: ignore[arg-type]
        expected = by_hand(images, first, then, maps, steps)
        np.testing.assert_allclose(curve.score.numpy(), expected, rtol=1e-4, atol=1e-5)
        share = np.array([s * 30 // steps for s in range(steps + 1)]) / 30
        np.testing.assert_allclose(curve.share.numpy(), share)
        area = np.trapezoid(expected, share, axis=1)
        np.testing.assert_allclose(curve.auc.numpy(), area, rtol=1e-4, atol=1e-5)
        full, empty = squared(images).double().numpy(), squared(bare).double().numpy()
        expected_share = (area - empty) / (full - empty)
        np.testing.assert_allclose(curve.relative_auc.numpy(), expected_share, rtol=1e-2)


def test_the_true_map_beats_every_other_one() -> None:
    """For a linear score the contribution of each pixel is the best order there is."""
    images = torch.rand(6, 2, 5, 6, generator=torch.Generator().manual_seed(2))
    bare = baseline_images(images, "mean")
    truth = ((images - bare) * WEIGHT).sum(dim=1)
    best_out = deletion_curve(linear, images, truth, steps=30)
    best_in = insertion_curve(linear, images, truth, steps=30, baseline="mean")
    for seed in range(5):
        other = torch.rand(truth.shape, generator=torch.Generator().manual_seed(seed))
        assert (deletion_curve(linear, images, other, steps=30).auc >= best_out.auc).all()
        found = insertion_curve(linear, images, other, steps=30, baseline="mean")
        assert (found.auc <= best_in.auc).all()


def test_no_difference_gives_nan_not_a_number_from_nowhere() -> None:
    flat = torch.ones(2, 2, 5, 6)
    curve = deletion_curve(linear, flat, torch.rand(2, 5, 6))
    assert curve.relative_auc.isnan().all() and curve.auc.isfinite().all()


def test_small_images_are_blurred_too() -> None:
    """5/224 of 16 pixels would leave everything readable."""
    stripes = torch.arange(16).remainder(2).float().expand(1, 1, 16, 16)
    blurred = baseline_images(stripes, "blur")
    torch.testing.assert_close(blurred, torch.full_like(blurred, 0.5), atol=0.01, rtol=0)


def test_blur_is_a_gaussian() -> None:
    images = torch.rand(2, 3, 40, 112, dtype=torch.float64)
    sigma = 112 * 5 / 224
    expected = ndimage.gaussian_filter(
        images.numpy(), (0, 0, sigma, sigma), mode="mirror", radius=int(np.ceil(3 * sigma))
    )
    np.testing.assert_allclose(baseline_images(images, "blur").numpy(), expected, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7))
def test_order_is_a_falling_permutation(seed: int, n: int, height: int, width: int) -> None:
    maps = torch.randint(0, 3, (n, height, width), generator=torch.Generator().manual_seed(seed))
    order = pixel_order(maps.float(), seed)
    assert torch.equal(order.sort(dim=1).values, torch.arange(height * width).expand(n, -1))
    assert (maps.flatten(1).gather(1, order).diff(dim=1) <= 0).all()
    assert torch.equal(order, pixel_order(maps.float(), seed))


def test_ties_are_not_broken_from_the_top() -> None:
    order = pixel_order(torch.zeros(200, 10, 10))
    assert abs(float(order[:, :20].double().mean()) - 49.5) < 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1.0, 1.5, 3.0]))
def test_pointing_game_by_hand(seed: int, tolerance: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, 6, (3, 5, 7), generator=draw).float()
    masks = torch.rand(3, 5, 7, generator=draw) < 0.2
    masks[:, 2, 3] = True
    expected = []
    for values, mask in zip(maps.numpy(), masks.numpy(), strict=True):
        peaks = np.argwhere(values == values.max())
        near = ndimage.distance_transform_edt(~mask) <= tolerance
        expected.append(np.mean([near[r, c] for r, c in peaks]))
    np.testing.assert_allclose(pointing_game(maps, masks, tolerance).numpy(), expected)


def test_a_constant_map_points_at_chance() -> None:
    masks = torch.zeros(1, 10, 10, dtype=torch.bool)
    masks[0, :3, :4] = True
    assert pointing_game(torch.zeros(1, 10, 10), masks).item() == pytest.approx(0.12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.2, 0.5, None]))
def test_iou_by_hand(seed: int, threshold: float | None) -> None:
    draw = torch.Generator().manual_seed(seed)
    maps = torch.rand(3, 5, 7, generator=draw)
    masks = torch.rand(3, 5, 7, generator=draw) < 0.4
    masks[:, 0, 0] = True
    found = intersection_over_union(maps, masks, threshold)
    for i in range(3):
        values = maps[i].flatten().tolist()
        if threshold is None:
            size = int(masks[i].sum())
            region = set(sorted(range(35), key=lambda p: -values[p])[:size])
        else:
            region = {p for p in range(35) if values[p] > threshold * max(values)}
        truth = set(masks[i].flatten().nonzero().flatten().tolist())
        assert found[i].item() == pytest.approx(len(region & truth) / len(region | truth))


def test_iou_of_the_mask_itself_and_of_an_empty_map() -> None:
    masks = torch.zeros(2, 6, 6, dtype=torch.bool)
    masks[:, 1:3, 2:5] = True
    for threshold in (None, 0.2):
        perfect = intersection_over_union(masks.float(), masks, threshold)
        assert perfect.tolist() == [1, 1]
    assert intersection_over_union(torch.zeros(2, 6, 6), masks, 0.2).tolist() == [0, 0]


def test_latent_score() -> None:
    from salve_lm.sae import build_training_sae, to_inference

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())
    sae = to_inference(build_training_sae("linear_l1", 4, 6, seed=0))
    images = torch.rand(3, 2, 5, 6)
    with torch.no_grad():
        z = model(images).mean(dim=(2, 3)) @ sae.W_enc
    for reduce in ("mean", "positions"):
        site = Site("1", "output", reduce)
        found = latent_score(model, sae, site, 2, -1)(images)
        torch.testing.assert_close(found, -z[:, 2])
    curve = deletion_curve(latent_score(model, sae, site, 2), images, torch.rand(3, 5, 6), steps=3)
    assert curve.score.shape == (3, 4)
    with pytest.raises(NameNotFound, match="0 to 5"):
        latent_score(model, sae, site, 6)


def test_bad_input() -> None:
    images, maps = torch.rand(2, 2, 5, 6), torch.rand(2, 5, 6)
    with pytest.raises(BadConfig, match="between 1 and 30"):
        deletion_curve(linear, images, maps, steps=31)
    with pytest.raises(ShapeMismatch, match=r"do not fit 2 images of 5 x 6"):
        deletion_curve(linear, images, torch.rand(2, 4, 6))
    with pytest.raises(ShapeMismatch, match="one map per image"):
        deletion_curve(linear, images, torch.rand(2, 1, 5, 6))
    with pytest.raises(NotFinite, match="heatmaps"):
        deletion_curve(linear, images, maps * torch.nan)
    with pytest.raises(NotFinite, match="score"):
        deletion_curve(lambda i: linear(i) * torch.nan, images, maps)
    with pytest.raises(ShapeMismatch, match="one number an image"):
        deletion_curve(lambda i: i, images, maps)
    with pytest.raises(BadConfig, match="choose mean, blur"):
        insertion_curve(linear, images, maps, baseline="black")  # type: ignore[arg-type]
    with pytest.raises(ShapeMismatch, match="baseline"):
        insertion_curve(linear, images, maps, baseline=torch.zeros(3, 1, 1))
    masks = maps > 0.5
    with pytest.raises(ShapeMismatch, match="Masks must be bool"):
        pointing_game(maps, masks.float())
    with pytest.raises(ShapeMismatch, match="Masks must be bool"):
        intersection_over_union(maps, masks[:, :4])
    with pytest.raises(BadConfig, match="mask of image 0 is empty"):
        pointing_game(maps, torch.zeros_like(masks))
    with pytest.raises(BadConfig, match="tolerance"):
        pointing_game(maps, masks, -1)
    with pytest.raises(BadConfig, match="threshold"):
        intersection_over_union(maps, masks, 1.0)
