"""Sparse products against SAELens' own classes, against finite differences, and in edge cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from salve_lm.errors import BadConfig
from salve_lm.sae import build_training_sae
from salve_lm.sae.sparse_l1 import sparse_l1_terms
from salve_lm.sae.sparse_products import (
    SparseLatents,
    Weights,
    decoded,
    dense_encoded,
    encoded,
    make_entries,
    preactivations,
)
from salve_lm.sae.step import check_sparse, fired, training_step

D_IN, D_SAE, ROWS = 16, 40, 50
COEFFICIENTS = {"l1": 0.3, "l0": 0.2}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("topk", {"k": 4}),
    ("topk", {"k": 4, "apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": False}),
    ("topk", {"k": 40}),
    ("batchtopk", {"k": 3.5}),
    ("batchtopk", {"k": 3.5, "rescale_acts_by_decoder_norm": False}),
    ("matryoshka_batchtopk", {"k": 4, "matryoshka_widths": [5, 20, 40]}),
    ("matryoshka_batchtopk", {"k": 4, "use_matryoshka_aux_loss": True}),
    ("jumprelu", {"jumprelu_bandwidth": 0.5}),
    ("jumprelu", {"jumprelu_bandwidth": 0.5, "jumprelu_ste_to_input": True}),
    ("jumprelu", {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_bandwidth": 2.0}),
    ("jumprelu", {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 3.0}),
    ("jumprelu", {"pre_act_loss_coefficient": 0.1, "jumprelu_bandwidth": 0.5}),
]
DEAD = {"none": None, "few": torch.arange(D_SAE) % 9 == 0, "many": torch.arange(D_SAE) % 3 > 0}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # products this small lose more to a second thread's waiting than they gain
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    sae: Any = build_training_sae(name, D_IN, D_SAE, options, seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
            if key == "threshold":
                parameter.abs_()
    return sae.to(dtype)


def saelens_twin(sae: Any) -> Any:
    """SAELens' own class with the same weights and options."""
    theirs_class, config_class = get_sae_training_class(sae.cfg.architecture())
    given = {
        key: value
        for key, value in vars(sae.cfg).items()
        if key not in ("metadata", "reshape_activations")
    }
    theirs = theirs_class(config_class(**given))
    theirs.load_state_dict(sae.state_dict())
    return theirs


def activations(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(3)) + 0.5


@pytest.mark.parametrize("dead", list(DEAD))
@pytest.mark.parametrize("sparse", ["always", "never", "auto"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_loss_and_gradients_are_saelens(
    name: str, options: dict[str, Any], sparse: Any, dead: str
) -> None:
    ours = build(name, options)
    theirs = saelens_twin(ours)
    x, mask = activations(), DEAD[dead]
    out = training_step(ours, x, COEFFICIENTS, dead=mask, sparse=sparse)
    reference = theirs.training_forward_pass(TrainStepInput(x, COEFFICIENTS, mask, 0, False))
    out.loss.backward()
    reference.loss.backward()
    torch.testing.assert_close(out.loss, reference.loss, rtol=1e-5, atol=1e-6)
    assert set(out.losses) == set(reference.losses)
    for term, value in out.losses.items():
        torch.testing.assert_close(value, reference.losses[term].detach(), rtol=1e-5, atol=1e-6)
    dense_only = "use_matryoshka_aux_loss" in options or (
        "pre_act_loss_coefficient" in options and mask is not None
    )
    assert out.z.is_sparse == (sparse == "always" and not dense_only)
    z = out.z.to_dense()
    torch.testing.assert_close(z, reference.feature_acts.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(fired(ours, out.z, 0.1), (z > 0.1).any(0))
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        scale = float(expected[key].grad.abs().max())
        assert parameter.grad.is_contiguous()
        torch.testing.assert_close(
            parameter.grad, expected[key].grad, rtol=1e-5, atol=1e-5 * max(scale, 1e-6)
        )
    for key, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, dict(theirs.named_buffers())[key], rtol=1e-6, atol=0)


def _random(*shape: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def _weights(tensors: tuple[Tensor, ...], subtract_b_dec: bool) -> Weights:
    W_enc, b_enc, W_dec, b_dec = tensors
    return Weights(W_enc, b_enc, W_dec, b_dec, subtract_b_dec)


@pytest.mark.parametrize("subtract_b_dec", [False, True])
def test_gradients_against_finite_differences(subtract_b_dec: bool) -> None:
    leaves = [_random(4, 6, seed=0), _random(6, seed=1), _random(6, 4, seed=2), _random(4, seed=3)]
    for leaf in leaves:
        leaf.requires_grad_()
    x = _random(5, 4, seed=4)

    def l1(*tensors: Tensor) -> Tensor:
        w = _weights(tensors, subtract_b_dec)
        with torch.no_grad():
            z = preactivations(x, w).relu()
        mse, sparsity, _ = sparse_l1_terms(x, z, w, weight_by_norm=True)
        return mse + 0.7 * sparsity

    def at_entries(*tensors: Tensor) -> Tensor:
        w = _weights(tensors, subtract_b_dec)
        with torch.no_grad():
            pre = preactivations(x, w)
        rows, latents = (pre.argsort(1) < 2).nonzero().unbind(1)
        of = make_entries(rows, latents, 5, 6)
        return decoded(encoded(pre[rows, latents], x, w, of).tanh(), w.W_dec, of).square().sum()

    def everywhere(*tensors: Tensor) -> Tensor:
        w = _weights(tensors, subtract_b_dec)
        with torch.no_grad():
            pre = preactivations(x, w)
        return (dense_encoded(pre, x, w).tanh() @ w.W_dec).square().sum()

    # the forward passes use values computed without a graph, as the steps do
    for loss in (l1, at_entries, everywhere):
        assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_mixed_precision_agrees_to_its_precision(name: str, options: dict[str, Any]) -> None:
    exact, mixed = build(name, options), build(name, options)
    x = activations(400)
    training_step(exact, x, COEFFICIENTS, sparse="never").loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = training_step(mixed, x, COEFFICIENTS, sparse="always").loss
    assert loss.dtype == torch.float32
    loss.backward()
    expected = dict(exact.named_parameters())
    for key, parameter in mixed.named_parameters():
        assert parameter.grad.dtype == torch.float32
        wanted = expected[key].grad
        if key != "threshold":  # its few values near the border move when that is rounded
            assert (parameter.grad - wanted).norm() < 0.06 * wanted.norm(), key


@pytest.mark.parametrize(("name", "options"), CASES[:8])
def test_bfloat16_weights_agree_with_dense_products(name: str, options: dict[str, Any]) -> None:
    dense, sparse = (build(name, options, torch.bfloat16) for _ in range(2))
    x = activations(400).bfloat16()
    training_step(dense, x, COEFFICIENTS, sparse="never").loss.backward()
    training_step(sparse, x, COEFFICIENTS, sparse="always").loss.backward()
    expected = dict(dense.named_parameters())
    for key, parameter in sparse.named_parameters():
        wanted = expected[key].grad.float()
        assert (parameter.grad.float() - wanted).norm() < 0.02 * wanted.norm(), key


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_batch_in_which_nothing_acts(name: str, options: dict[str, Any]) -> None:
    ours = build(name, options)
    with torch.no_grad():
        ours.b_enc.fill_(-1e4)
    theirs = saelens_twin(ours)
    out = training_step(ours, activations(), COEFFICIENTS, sparse="always")
    reference = theirs.training_forward_pass(
        TrainStepInput(activations(), COEFFICIENTS, None, 0, False)
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss, reference.loss)
    assert not out.z.to_dense().any() and not fired(ours, out.z, 0.0).any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_nan_is_noticed(name: str, options: dict[str, Any]) -> None:
    ours = build(name, options)
    with torch.no_grad():
        ours.W_enc[:, 7] = torch.nan
    assert training_step(ours, activations(), COEFFICIENTS, sparse="always").loss.isnan()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_repeated_step_repeats_its_bits(name: str, options: dict[str, Any]) -> None:
    first, second = build(name, options), build(name, options)
    for sae in (first, second):
        training_step(sae, activations(), COEFFICIENTS, sparse="always").loss.backward()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_auto_goes_by_the_latents_of_the_batch() -> None:
    sae = build("standard", {})
    assert not training_step(sae, activations(), COEFFICIENTS).z.is_sparse
    with torch.no_grad():
        sae.b_enc -= sae.encode_with_hidden_pre(activations())[1].quantile(0.97)
    z = training_step(sae, activations(), COEFFICIENTS).z
    assert isinstance(z, SparseLatents) and 0 < z.values.numel() < 0.06 * ROWS * D_SAE
    assert not training_step(sae, activations(), COEFFICIENTS, sparse="never").z.is_sparse


@pytest.mark.parametrize(
    ("name", "options"),
    [("linear_l1", {}), ("gated", {}), ("standard", {"lp_norm": 2.0}), CASES[8]],
)
def test_always_is_refused_where_it_would_do_nothing(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(BadConfig, match="sparse"):
        check_sparse(build(name, options))
    check_sparse(build(*CASES[0]))
