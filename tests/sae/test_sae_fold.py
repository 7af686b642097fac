from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from salve_lm.errors import BadConfig, NotFinite
from salve_lm.sae import fold_norm, to_inference
from salve_lm.sae.normalize import InputNormalizer

Make = Callable[..., Any]
MODES = ["expected_average_only_in", "covariance_whitening"]


@pytest.fixture
def x(make_activations: Callable[..., Tensor]) -> Tensor:
    return make_activations(400)


def test_expected_average(x: Tensor) -> None:
    normalizer = InputNormalizer("expected_average_only_in", x.shape[1])
    normalizer.estimate(x.split(64))
    scaled = normalizer(x)
    assert scaled.dtype == torch.float32
    assert scaled.norm(dim=1).mean().item() == pytest.approx(x.shape[1] ** 0.5, rel=1e-5)
    assert torch.allclose(scaled / x, (scaled / x)[0, 0], rtol=1e-5)


def test_whitening(x: Tensor) -> None:
    normalizer = InputNormalizer("covariance_whitening", x.shape[1])
    normalizer.estimate(x.split(64))
    white = normalizer(x).double()
    assert white.mean(0).abs().max() < 1e-4
    # 1e-3 is added to the covariance's eigenvalues
    torch.testing.assert_close(
        torch.cov(white.t()), torch.eye(x.shape[1]).double(), rtol=0, atol=5e-3
    )


@pytest.mark.parametrize("mode", MODES)
def test_saelens_estimates_the_same(mode: Any, x: Tensor) -> None:
    from sae_lens.training.activation_scaler import ActivationScaler

    normalizer = InputNormalizer(mode, x.shape[1])
    normalizer.estimate(x.split(50))
    scaler = ActivationScaler()
    batches = iter(x.split(50))
    if mode == "expected_average_only_in":
        scaler.estimate_scaling_factor(x.shape[1], batches, 8)
    else:
        scaler.estimate_whitening(x.shape[1], batches, 8)
    torch.testing.assert_close(normalizer(x), scaler(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fold_decoder_norm", [False, True])
def test_folding_changes_nothing(
    architecture: str, mode: Any, fold_decoder_norm: bool, trained_looking: Make, x: Tensor
) -> None:
    if architecture == "topk" and mode == "covariance_whitening" and fold_decoder_norm:
        pytest.skip("refused, see below")
    normalizer = InputNormalizer(mode, x.shape[1])
    normalizer.estimate(x.split(64))
    sae = trained_looking(architecture)
    plain, folded = (
        to_inference(sae),
        to_inference(sae, normalizer, fold_decoder_norm=fold_decoder_norm),
    )
    with torch.no_grad():
        white = normalizer(x)
        z, x_hat = plain.encode(white), plain(white).double()
        x_hat = (
            x_hat / normalizer.forward_map
            if mode == "expected_average_only_in"
            else x_hat @ normalizer.inverse_map + normalizer.mean
        )
        assert torch.equal(folded.encode(x) != 0, z != 0)
        error = (folded(x).double() - x_hat).norm() / x_hat.norm()
    assert error < 1e-5
    if fold_decoder_norm:
        torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(folded.cfg.d_sae))


def test_folding_decoder_norms_scales_latents_by_them(
    architecture: str, trained_looking: Make, x: Tensor
) -> None:
    inference = to_inference(trained_looking(architecture))
    with torch.no_grad():
        norms, z, x_hat = inference.W_dec.norm(dim=1), inference.encode(x), inference(x)
        fold_norm(inference)
        torch.testing.assert_close(inference(x), x_hat, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inference.encode(x), z * norms, rtol=1e-5, atol=1e-5)


def test_inexact_folds_are_refused(trained_looking: Make, x: Tensor) -> None:
    with pytest.raises(BadConfig, match=r"cannot be folded exactly.*fold_decoder_norm to false"):
        to_inference(
            trained_looking("topk", rescale_acts_by_decoder_norm=False), fold_decoder_norm=True
        )
    normalizer = InputNormalizer("covariance_whitening", x.shape[1])
    normalizer.estimate([x])
    with pytest.raises(BadConfig, match="without whitening"):
        to_inference(trained_looking("topk"), normalizer, fold_decoder_norm=True)


def test_the_scale_survives_a_cast_of_the_module(x: Tensor) -> None:
    normalizer = InputNormalizer("expected_average_only_in", x.shape[1])
    normalizer.estimate([x])
    assert normalizer.to(torch.bfloat16).forward_map.dtype == torch.float64


@pytest.mark.parametrize("mode", MODES)
def test_bad_activations(mode: Any) -> None:
    with pytest.raises(NotFinite, match="while measuring normalize_input"):
        InputNormalizer(mode, 3).estimate([torch.tensor([[1.0, float("nan"), 0.0]])])
    with pytest.raises(BadConfig, match="not all zero; found 2 rows"):
        InputNormalizer(mode, 3).estimate([torch.zeros(2, 3)])
    with pytest.raises(BadConfig, match="found 0 rows"):
        InputNormalizer(mode, 3).estimate([])
