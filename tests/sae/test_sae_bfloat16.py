"""bfloat16 parameters: training, Adam's rounding, the saved folder, exact resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from lightning.pytorch import Callback

from salve_lm.errors import BadConfig
from salve_lm.modules.sae import SAETraining
from salve_lm.sae import build_training_sae, load_sae
from salve_lm.sae.bfloat16_adam import BFloat16Adam, rounded
from salve_lm.sae.step import training_step

Make = Callable[..., Any]


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rounding_goes_to_a_neighbour_and_is_right_on_average() -> None:
    # between the bfloat16 neighbours 1 and 1.0078125, a quarter of the way
    x = torch.full((40_000,), 1 + 0.25 * 2**-7)
    for sign in (1, -1):
        found = rounded(sign * x, draw()).float() * sign
        assert set(found.tolist()) == {1.0, 1.0078125}
        share = float((found > 1).float().mean())
        assert share == pytest.approx(0.25, abs=0.01)  # 4.6 standard deviations
    exact = torch.tensor([0.0, -1.5, 3e38, 1e-30]).bfloat16()
    assert torch.equal(rounded(exact.float(), draw()), exact)


def test_without_rounding_it_is_adam() -> None:
    weight = torch.randn(30, 40)
    ours, theirs = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    a, b = BFloat16Adam([ours], lr=1e-2), torch.optim.Adam([theirs], lr=1e-2)
    for step in range(20):
        gradient = torch.randn(30, 40, generator=draw(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_updates_that_are_smaller_than_the_format_arrive() -> None:
    """A weight of 1 and a step of 1e-4: bfloat16 rounded to the nearest never moves."""
    start = torch.ones(2000, dtype=torch.bfloat16)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    a, b = BFloat16Adam([ours], lr=1e-4), torch.optim.Adam([theirs], lr=1e-4)
    for _ in range(100):
        ours.grad, theirs.grad = start.clone(), start.clone()
        a.step()
        b.step()
    assert torch.equal(theirs.detach(), start)
    assert float(ours.detach().float().mean()) == pytest.approx(0.99, abs=5e-4)


def test_trains_saves_and_opens_with_saelens(
    architecture: str, options: dict[str, Any], data: Any, make_trainer: Make, tmp_path: Path
) -> None:
    module = SAETraining(
        architecture, 24, options[architecture], lr=1e-2, out=str(tmp_path / "sae"),
        dtype="bfloat16", normalize_input="expected_average_only_in",
    )  # fmt: skip
    trainer = make_trainer(max_epochs=6, gradient_clip_val=1.0)
    trainer.fit(module, datamodule=data)
    assert module.sae.W_enc.dtype == torch.bfloat16
    for name in ("W_enc", "W_dec"):
        moments = trainer.optimizers[0].state[getattr(module.sae, name)]
        assert moments["exp_avg"].dtype == moments["exp_avg_sq"].dtype == torch.bfloat16
    # what small steps would be rounded away in stays wide
    for name, value in module.named_buffers():
        if "topk_threshold" in name or "normalizer" in name:
            assert value.dtype in (torch.float64, torch.bool), name
    saved = load_sae(tmp_path / "sae")
    opened = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert opened.cfg.dtype == "bfloat16"
    assert opened.W_dec.dtype == torch.bfloat16
    assert torch.equal(opened.W_dec, saved.W_dec)
    x = data.val
    with torch.no_grad():
        x_hat = opened(x.bfloat16()).float()
    explained = 1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    wanted = float(trainer.callback_metrics["val/explained_variance"])
    assert float(explained) == pytest.approx(wanted, abs=0.02)


def test_learns_as_much_as_float32(make_activations: Make) -> None:
    x, val = make_activations(256), make_activations(64, 1)
    explained = {}
    for dtype, adam in (("float32", torch.optim.Adam), ("bfloat16", BFloat16Adam)):
        sae = build_training_sae("topk", 12, 48, {"k": 8}, dtype=dtype, seed=0)
        optimizer = adam(sae.parameters(), lr=3e-3)
        for step in range(300):
            optimizer.zero_grad()
            rows = x[step % 8 :: 8].to(sae.dtype)
            training_step(sae, rows, {}, step=step).loss.backward()
            optimizer.step()
        with torch.no_grad():
            missed = (sae.decode(sae.encode(val.to(sae.dtype))).float() - val).square().sum()
        explained[dtype] = 1 - float(missed / (val - val.mean(0)).square().sum())
    assert explained["float32"] > 0.8
    assert explained["bfloat16"] == pytest.approx(explained["float32"], abs=0.02)


@pytest.mark.parametrize("architecture", ["linear_l1", "batchtopk", "jumprelu"])
def test_resume_is_exact(
    architecture: str, options: dict[str, Any], data: Any, make_trainer: Make, tmp_path: Path
) -> None:
    arguments = (architecture, 24, options[architecture])
    settings: dict[str, Any] = {"lr": 1e-2, "dtype": "bfloat16", "lr_warm_up_steps": 3}
    whole = SAETraining(*arguments, **settings)
    make_trainer(max_steps=7, max_epochs=-1).fit(whole, datamodule=data)
    first = make_trainer(max_steps=3, max_epochs=-1)
    first.fit(SAETraining(*arguments, **settings), datamodule=data)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = SAETraining(*arguments, **settings)
    trainer = make_trainer(max_steps=7, max_epochs=-1)
    trainer.fit(resumed, datamodule=data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for key, value in whole.state_dict().items():
        assert value.dtype == resumed.state_dict()[key].dtype, key
        assert torch.equal(resumed.state_dict()[key], value), key
    with pytest.raises(BadConfig, match=r"dtype \(was 'bfloat16', is 'float32'\)"):
        make_trainer().fit(
            SAETraining(*arguments), datamodule=data, ckpt_path=tmp_path / "half.ckpt"
        )


class State(Callback):
    """Writes down what each rank ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, module: Any) -> None:
        torch.save(module.state_dict(), self.folder / f"{trainer.global_rank}.pt")


def test_two_processes_round_alike(data: Any, make_trainer: Make, tmp_path: Path) -> None:
    module = SAETraining("topk", 24, {"k": 4}, lr=1e-2, dtype="bfloat16")
    trainer = make_trainer(devices=2, strategy="ddp_fork", callbacks=State(tmp_path))
    trainer.fit(module, datamodule=data)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for key, value in a.items():
        assert torch.equal(b[key], value), key


def test_settings_that_do_not_fit(data: Any, make_trainer: Make) -> None:
    with pytest.raises(BadConfig, match="'float32' or 'bfloat16', not 'float16'"):
        SAETraining(dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match="Remove one of them"):
        make_trainer(precision="bf16-mixed").fit(
            SAETraining("standard", 24, dtype="bfloat16"), datamodule=data
        )
