"""Our training step against SAELens' own classes, its trainer, and a formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from salve_lm.activations.batch import ActivationBatch
from salve_lm.modules.sae import SAETraining
from salve_lm.sae import build_training_sae
from salve_lm.sae.five_products import _by_autograd, l1_terms
from salve_lm.sae.schedule import coefficients_at, lr_factor
from salve_lm.sae.step import fired, training_step
from tests.oracle.architectures import OPTIONS


def _pair(name: str, d_in: int, d_sae: int, **options: Any) -> tuple[Any, Any]:
    """Ours, and SAELens' own class with the same random weights."""
    ours = build_training_sae(name, d_in, d_sae, OPTIONS[name] | options, seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    theirs_class, config_class = get_sae_training_class(name)
    fields = {"d_in": d_in, "d_sae": d_sae, **OPTIONS[name], **options}
    if name == "matryoshka_batchtopk":
        fields["matryoshka_widths"] = list(ours.cfg.matryoshka_widths)
    theirs = theirs_class(config_class(**fields))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _input(x: Tensor, sae: Any, dead: Tensor | None = None) -> TrainStepInput:
    return TrainStepInput(x, coefficients_at(sae, 10**6), dead, 0, False)


def _assert_same_gradients(ours: Any, theirs: Any) -> None:
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = float(expected[name].grad.abs().max())
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-5 * max(scale, 1e-6)
        )


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("with_dead", [False, True])
def test_function_and_gradients_are_saelens(name: str, with_dead: bool) -> None:
    ours, theirs = _pair(name, 16, 40)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(3)) + 0.5
    dead = torch.arange(40) % 3 == 0 if with_dead else None
    out = training_step(ours, x, coefficients_at(ours, 10**6), dead=dead)
    reference = theirs.training_forward_pass(_input(x, theirs, dead))
    out.loss.backward()
    reference.loss.backward()
    torch.testing.assert_close(out.loss, reference.loss, rtol=1e-5, atol=1e-6)
    assert set(out.losses) == set(reference.losses)
    for term, value in out.losses.items():
        torch.testing.assert_close(value, reference.losses[term].detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.z, reference.feature_acts.detach(), rtol=1e-5, atol=1e-5)
    assert not out.z.requires_grad
    _assert_same_gradients(ours, theirs)
    if name in ("batchtopk", "matryoshka_batchtopk"):
        assert ours.topk_threshold.dtype == torch.float64
        torch.testing.assert_close(ours.topk_threshold, theirs.topk_threshold, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["linear_l1", "standard"])
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 9), d_in=st.integers(1, 9), d_sae=st.integers(1, 9), seed=st.integers(0, 99)
)
def test_five_products_for_any_shape(name: str, n: int, d_in: int, d_sae: int, seed: int) -> None:
    ours, theirs = _pair(name, d_in, d_sae)
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))
    training_step(ours, x, coefficients_at(ours, 0)).loss.backward()
    theirs.training_forward_pass(_input(x, theirs)).loss.backward()
    _assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("subtract_b_dec", [False, True])
@pytest.mark.parametrize("weight_by_norm", [False, True])
def test_hand_written_backward_pass(relu: bool, subtract_b_dec: bool, weight_by_norm: bool) -> None:
    """Against finite differences and against autograd, in float64."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (6,), (6, 4), (4,)]
    weights = [
        torch.randn(s, generator=draw, dtype=torch.float64, requires_grad=True) for s in shapes
    ]
    x = torch.randn(5, 4, generator=draw, dtype=torch.float64)
    flags = {"relu": relu, "subtract_b_dec": subtract_b_dec, "weight_by_norm": weight_by_norm}

    def loss(*w: Tensor) -> Tensor:
        terms = l1_terms(x, *w, **flags)
        return terms.mse + 0.7 * terms.sparsity

    assert torch.autograd.gradcheck(loss, weights)
    reference = _by_autograd(x, *weights, relu, subtract_b_dec, weight_by_norm)
    expected = torch.autograd.grad(reference.mse + 0.7 * reference.sparsity, weights)
    for got, wanted in zip(torch.autograd.grad(loss(*weights), weights), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_zero_decoder_row_has_a_finite_gradient() -> None:
    ours, theirs = _pair("standard", 8, 6)
    for sae in (ours, theirs):
        sae.W_dec.data[2] = 0.0
    x = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    training_step(ours, x, {"l1": 0.5}).loss.backward()
    theirs.training_forward_pass(TrainStepInput(x, {"l1": 0.5}, None, 0, False)).loss.backward()
    assert ours.W_dec.grad.isfinite().all()
    _assert_same_gradients(ours, theirs)


def test_linear_l1_is_the_formula_of_the_paper() -> None:
    ours, _ = _pair("linear_l1", 8, 6)
    x = torch.randn(10, 8, generator=torch.Generator().manual_seed(0)).double()
    W_enc, b_enc, W_dec, b_dec = (
        p.detach().double() for p in (ours.W_enc, ours.b_enc, ours.W_dec, ours.b_dec)
    )
    z = torch.stack([row @ W_enc + b_enc for row in x])
    x_hat = torch.stack([row @ W_dec + b_dec for row in z])
    expected = ((x_hat - x) ** 2).sum(1).mean() + 0.3 * z.abs().sum(1).mean()
    out = training_step(ours, x.float(), {"l1": 0.3})
    assert float(out.loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", ["linear_l1", "standard"])
def test_autocast_agrees_to_its_precision(name: str) -> None:
    ours, theirs = _pair(name, 32, 16)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    training_step(theirs, x, {"l1": 0.5}).loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = training_step(ours, x, {"l1": 0.5}).loss
    assert loss.dtype == torch.float32
    loss.backward()
    expected = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        error = (parameter.grad - expected[parameter_name].grad).norm()
        assert error < 0.05 * expected[parameter_name].grad.norm()


def test_other_norms_than_l1_take_saelens_step() -> None:
    ours, theirs = _pair("standard", 8, 6, lp_norm=2.0)
    x = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    training_step(ours, x, {"l1": 0.5}).loss.backward()
    theirs.training_forward_pass(TrainStepInput(x, {"l1": 0.5}, None, 0, False)).loss.backward()
    _assert_same_gradients(ours, theirs)


def test_fired_is_what_saelens_trainer_counts() -> None:
    for name in OPTIONS:
        ours, _ = _pair(name, 16, 40)
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
        z = training_step(ours, x, coefficients_at(ours, 0)).z
        assert torch.equal(fired(ours, z, 0.0), z.bool().any(0))
    sparse, _ = _pair("topk", 16, 40, use_sparse_activations=True)
    z = training_step(sparse, x, {}).z
    assert z.is_sparse and torch.equal(fired(sparse, z, 0.0), z.to_dense().bool().any(0))


def test_linear_latents_fire_by_what_they_add() -> None:
    ours, _ = _pair("linear_l1", 16, 40)
    z = torch.randn(5, 40, generator=torch.Generator().manual_seed(6))
    added = z[:, :, None] * ours.W_dec.detach()  # what each latent adds to x_hat
    expected = (added.norm(dim=2) > 0.3).any(0)
    assert 0 < int(expected.sum()) < 40
    assert torch.equal(fired(ours, z, 0.3), expected)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_training_is_saelens_training(name: str) -> None:
    """SAELens' trainer and ours: same weights after warm-up, decay, clipping and dead latents."""
    d_in, d_sae, n, steps = 16, 24, 32, 24
    warm = {"linear_l1": "l1", "standard": "l1", "gated": "l1", "jumprelu": "l0"}.get(name)
    options = OPTIONS[name] | ({f"{warm}_warm_up_steps": 5} if warm else {})
    draw = torch.Generator().manual_seed(11)
    batches = [torch.randn(n, d_in, generator=draw) + 1 for _ in range(steps)]

    module = SAETraining(
        name, d_sae, OPTIONS[name], d_in, lr=3e-3, l1_warm_up_steps=5 if warm else 0,
        lr_warm_up_steps=4, lr_decay_steps=8, dead_after=6 * n, seed=1,
    )  # fmt: skip
    module.configure_model()
    start = {k: v.clone() for k, v in module.sae.state_dict().items()}
    index = torch.zeros(n, dtype=torch.int64)
    Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    ).fit(module, _Batches([ActivationBatch(x, index, index, n) for x in batches]))  # fmt: skip

    theirs_class, config_class = get_sae_training_class(name)
    if name == "matryoshka_batchtopk":
        options["matryoshka_widths"] = list(module.sae.cfg.matryoshka_widths)
    theirs = theirs_class(config_class(d_in=d_in, d_sae=d_sae, **options))
    theirs.load_state_dict(start)
    config = SAETrainerConfig(
        total_training_samples=n * steps, train_batch_size_samples=n, lr=3e-3, lr_end=3e-4,
        lr_warm_up_steps=4, lr_decay_steps=8, dead_feature_window=5,
    )  # fmt: skip
    trainer: Any = SAETrainer(config, theirs, iter(()))
    for x in batches:
        trainer.step(x) if hasattr(trainer, "step") else trainer._train_step(theirs, x)
        trainer.n_training_steps += 1
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(module.sae.state_dict()[key], value, rtol=1e-4, atol=1e-5)


class _Batches:
    def __init__(self, batches: list[ActivationBatch]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def test_learning_rate_is_saelens_schedule() -> None:
    from sae_lens.training.optim import get_lr_scheduler

    for warm_up, decay in [(0, 0), (1, 0), (5, 0), (0, 6), (5, 6), (1, 1)]:
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.Adam([parameter], lr=1.0)
        scheduler = get_lr_scheduler("constant", optimizer, 20, 1.0, warm_up, decay, 0.1, 1)
        for step in range(20):
            expected = optimizer.param_groups[0]["lr"]
            assert lr_factor(step, warm_up, decay, 20) == pytest.approx(expected), (warm_up, step)
            optimizer.step()
            scheduler.step()


def test_coefficients_are_saelens_schedule() -> None:
    from sae_lens.training.optim import CoefficientScheduler

    sae = build_training_sae("standard", 4, 4, {"l1_coefficient": 3.0, "l1_warm_up_steps": 4})
    scheduler = CoefficientScheduler(4, 3.0)
    for step in range(8):
        assert coefficients_at(sae, step)["l1"] == pytest.approx(scheduler.value)
        scheduler.step()
