"""Batches in parts, and steps of several batches: the same gradient as one batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from salve_lm.errors import BadConfig
from salve_lm.modules.sae import SAETraining
from salve_lm.modules.sae_group import SAEGroupTraining
from salve_lm.sae.early_backward import differentiated_parts
from salve_lm.sae.measured_step import measured_step
from salve_lm.sae.schedule import coefficients_at

Make = Callable[..., Any]
CHUNKABLE = ("linear_l1", "standard", "topk", "gated", "jumprelu")


def dead() -> Tensor:
    mask = torch.zeros(24, dtype=torch.bool)
    mask[::4] = True
    return mask


@pytest.mark.parametrize("rows", [1, 5, 8, 40])
@pytest.mark.parametrize("name", CHUNKABLE)
def test_parts_are_the_whole(
    name: str, rows: int, trained_looking: Make, make_activations: Make
) -> None:
    options = {"pre_act_loss_coefficient": 0.1} if name == "jumprelu" else {}
    whole, parts = trained_looking(name, **options), trained_looking(name, **options)
    x = make_activations(32)
    steps = []
    for sae, chunk_rows in ((whole, None), (parts, rows)):
        out = measured_step(
            sae, x, coefficients_at(sae, 7), fire_threshold=0.1, with_l0=True,
            chunk_rows=chunk_rows, dead=dead(), step=7,
        )  # fmt: skip
        (out.loss * 0.5).backward()
        steps.append(out)
    a, b = steps
    assert float(b.loss.detach()) == pytest.approx(float(a.loss.detach()), rel=1e-5)
    assert b.losses.keys() == a.losses.keys()
    for term, value in a.losses.items():
        torch.testing.assert_close(b.losses[term], value, rtol=1e-5, atol=1e-6)
    assert torch.equal(a.fired, b.fired)
    assert float(b.l0) == pytest.approx(float(a.l0), rel=1e-6)
    assert 0 < float(a.l0) < 24
    for (key, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None
        else:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", CHUNKABLE)
def test_a_run_in_parts_ends_where_a_whole_one_does(
    name: str, options: dict[str, Any], data: Any, make_trainer: Make
) -> None:
    ends = []
    for chunk_rows in (None, 7):
        module = SAETraining(
            name, 24, options[name], chunk_rows=chunk_rows, dead_after=60, lr=1e-3,
            normalize_input="expected_average_only_in",
        )  # fmt: skip
        trainer = make_trainer(gradient_clip_val=1.0)
        trainer.fit(module, datamodule=data)
        ends.append((module, trainer))
    (a, of_a), (b, of_b) = ends
    assert torch.equal(a.firing.since_fired, b.firing.since_fired)
    for key, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[key], value, rtol=1e-5, atol=1e-5, msg=key)
    for key, value in of_a.callback_metrics.items():
        torch.testing.assert_close(of_b.callback_metrics[key], value, rtol=1e-5, atol=1e-5, msg=key)


def test_members_of_a_group_in_parts(data: Any, make_trainer: Make) -> None:
    data.site = "pooled"
    ends = []
    for chunk_rows in (None, 10):
        group = SAEGroupTraining(
            sweep={"seed": [0, 1]}, architecture="topk", d_sae=24, options={"k": 4},
            chunk_rows=chunk_rows,
        )  # fmt: skip
        make_trainer().fit(group, datamodule=data)
        ends.append(group.state_dict())
    for key, value in ends[0].items():
        if torch.is_tensor(value):
            torch.testing.assert_close(ends[1][key], value, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
def test_a_global_k_cannot_be_parted(
    name: str, options: dict[str, Any], data: Any, make_trainer: Make
) -> None:
    module = SAETraining(name, 24, options[name], chunk_rows=8)
    with pytest.raises(BadConfig, match=r"accumulate_grad_batches.*architecture: topk"):
        make_trainer().fit(module, datamodule=data)


def test_no_rows_at_a_time_are_refused() -> None:
    with pytest.raises(BadConfig, match="chunk_rows must be at least 1, not 0"):
        SAETraining(chunk_rows=0)


def test_gradients_before_the_loss_is_scaled_are_refused(data: Any, make_trainer: Make) -> None:
    trainer = make_trainer()
    module = SAETraining("standard", 24, chunk_rows=8)
    trainer.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(BadConfig, match="bf16-mixed"):
        trainer.fit(module, datamodule=data)


@pytest.mark.parametrize("name", CHUNKABLE)
def test_accumulated_batches_are_one_large_batch(
    name: str, options: dict[str, Any], make_activations: Make, make_data: Make,
    make_trainer: Make,
) -> None:  # fmt: skip
    """Four batches of 8 rows a step are one of 32: the same steps, to 1e-5."""
    x, val = make_activations(96), make_activations(20, seed=1)
    ends = []
    for batch_size, accumulate in ((32, 1), (8, 4)):
        module = SAETraining(name, 24, options[name], lr=1e-2, lr_warm_up_steps=2)
        trainer = make_trainer(accumulate_grad_batches=accumulate, gradient_clip_val=1.0)
        trainer.fit(module, datamodule=make_data(x, val, batch_size))
        assert trainer.global_step == 2 * 3
        assert module._samples_seen == 2 * 96
        ends.append((module, trainer.callback_metrics))
    (a, of_a), (b, of_b) = ends
    for key, value in a.sae.state_dict().items():
        torch.testing.assert_close(b.sae.state_dict()[key], value, rtol=1e-5, atol=1e-5, msg=key)
    for key in ("val/explained_variance", "val/l0"):
        torch.testing.assert_close(of_b[key], of_a[key], rtol=1e-5, atol=1e-5)


def test_resampling_waits_for_the_step(data: Any, make_trainer: Make) -> None:
    """Between accumulated batches it would reinitialise latents whose gradients are waiting."""
    seen = []

    class Watched(SAETraining):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            before = self._resampled_at
            super().on_train_batch_start(batch, batch_idx)
            if self._resampled_at != before:
                seen.append(batch_idx)

    module = Watched("standard", 24, dead_after=33, dead_feature_handling="resample")
    make_trainer(accumulate_grad_batches=2, max_epochs=3).fit(module, datamodule=data)
    assert seen
    assert all(batch_idx % 2 == 0 for batch_idx in seen)


def test_one_part_is_in_memory_at_a_time() -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    w = torch.randn(6, 50, requires_grad=True)

    def losses() -> Any:
        nonlocal most
        for _ in range(5):
            z = torch.randn(4, 6) @ w
            held = z.relu()
            alive.add(held)
            loss = held.square().sum()
            del z, held
            most = max(most, len(alive))
            yield loss

    differentiated_parts(losses(), [w])
    assert most <= 2


def test_gradients_are_free_between_steps(data: Any, make_trainer: Make) -> None:
    """Validation and the next forward pass need their memory."""
    found = []

    class Watched(SAETraining):
        def on_train_batch_end(self, *args: Any) -> None:
            found.append([p.grad is None for p in self.sae.parameters()])

    make_trainer(accumulate_grad_batches=2, max_epochs=1).fit(
        Watched("standard", 24), datamodule=data
    )
    assert [all(step) for step in found] == [False, True, False, True]
