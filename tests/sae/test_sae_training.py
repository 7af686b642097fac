from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sae_lens
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from salve_lm.errors import (
    BadConfig,
    NameNotFound,
    NotFinite,
    OutputExists,
    ShapeMismatch,
    UnsupportedStrategy,
)
from salve_lm.modules.sae import SAETraining
from salve_lm.sae import load_sae, read_metadata

Make = Callable[..., Any]


class Losses(Callback):
    """What was logged at every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k[:5] == "train"}
        logged["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows.append(logged)


@pytest.mark.parametrize("normalize_input", ["none", "expected_average_only_in"])
def test_fit_saves_an_autoencoder_of_raw_activations(
    architecture: str,
    normalize_input: Any,
    options: dict[str, Any],
    data: Any,
    make_trainer: Make,
    tmp_path: Path,
) -> None:
    out = tmp_path / "sae"
    module = SAETraining(
        architecture, 24, options[architecture], lr=1e-2, normalize_input=normalize_input,
        fold_decoder_norm=True, out=str(out), dead_after=60,
    )  # fmt: skip
    trainer = make_trainer(max_epochs=8)
    trainer.fit(module, datamodule=data)

    sae = sae_lens.SAE.load_from_disk(out)
    x = data.val
    with torch.no_grad():
        z, x_hat = sae.encode(x), sae(x)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    explained = 1 - (x_hat - x).square().sum() / (x - x.mean(0)).square().sum()
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["explained_variance"] == pytest.approx(float(explained), abs=1e-5)
    threshold = 0.01 if architecture == "linear_l1" else 0.0
    assert metrics["fire_threshold"] == threshold
    active = z.abs() > threshold
    assert metrics["l0"] == pytest.approx(float(active.float().sum(1).mean()), abs=1e-4)
    assert metrics["dead_fraction"] == pytest.approx(float((~active.any(0)).float().mean()))
    assert ("participation_ratio" in metrics) == (architecture == "linear_l1")
    for name in ("explained_variance", "l0", "dead_fraction"):
        assert float(trainer.callback_metrics[f"val/{name}"]) == pytest.approx(metrics[name])
        assert sae.cfg.metadata[name] == metrics[name]
    assert sae.cfg.metadata.training_steps == 8 * 4
    assert sae.cfg.metadata.training_samples == 8 * 97
    assert sae.cfg.normalize_activations == "none"
    files = ["cfg.json", "metrics.json", "sae_weights.safetensors"]
    assert sorted(p.name for p in out.iterdir()) == files


def test_training_reconstructs(
    architecture: str, options: dict[str, Any], make_data: Make, make_activations: Make,
    make_trainer: Make,
) -> None:  # fmt: skip
    data = make_data(make_activations(256), make_activations(64, seed=1))
    module = SAETraining(architecture, 24, options[architecture], lr=2e-2)
    trainer = make_trainer(max_epochs=15, log_every_n_steps=50)
    trainer.fit(module, datamodule=data)
    assert float(trainer.callback_metrics["val/explained_variance"]) > 0.5
    tested = trainer.test(module, datamodule=data, verbose=False)[0]
    assert tested["test/explained_variance"] == pytest.approx(
        float(trainer.callback_metrics["test/explained_variance"])
    )


@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
def test_per_sample_scaling_stays_in_the_autoencoder(
    mode: Any, data: Any, make_trainer: Make, tmp_path: Path
) -> None:
    out = tmp_path / "sae"
    module = SAETraining("standard", 24, lr=1e-2, normalize_input=mode, out=str(out))
    make_trainer(max_epochs=3).fit(module, datamodule=data)
    sae = load_sae(out)
    assert sae.cfg.normalize_activations == mode
    with torch.no_grad():
        # the scale of a sample does not change its latents
        torch.testing.assert_close(
            sae.encode(3 * data.val), sae.encode(data.val), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("name", ["linear_l1", "standard", "gated", "jumprelu"])
def test_the_sparsity_weight_warms_up(
    name: str, options: dict[str, Any], data: Any, make_trainer: Make
) -> None:
    term = "train/l0_loss" if name == "jumprelu" else "train/l1_loss"

    def first_losses(warm_up: int) -> list[float]:
        losses = Losses()
        # lr 0 would be refused; this one moves nothing
        module = SAETraining(name, 24, options[name], lr=1e-20, l1_warm_up_steps=warm_up)
        make_trainer(max_epochs=2, callbacks=losses).fit(module, datamodule=data)
        return [row[term] for row in losses.rows]

    plain, warmed = first_losses(0), first_losses(5)
    shares = [w / p for w, p in zip(warmed, plain, strict=True)]
    assert shares == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1], abs=1e-5)


def test_the_learning_rate_follows_its_schedule(data: Any, make_trainer: Make) -> None:
    losses = Losses()
    module = SAETraining("standard", 24, lr=0.01, lr_warm_up_steps=2, lr_decay_steps=4)
    make_trainer(max_epochs=2, callbacks=losses).fit(module, datamodule=data)
    # read after the scheduler's step, so one step ahead
    expected = [0.01, 0.01, 0.01, 0.01, 0.0075, 0.005, 0.0025, 0.0]
    assert [row["lr"] for row in losses.rows] == pytest.approx(expected)


def test_dead_latents_are_resampled(
    architecture: str, options: dict[str, Any], make_data: Make, make_activations: Make,
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import salve_lm.sae.resample as resample

    data = make_data(make_activations(512), make_activations(256, seed=1), batch_size=64)
    kept = options[architecture] | ({"k": 8} if "topk" in architecture else {})
    drawn: list[Tensor] = []
    original = resample.resample_dead

    def record(sae: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        latents = original(sae, optimizer, *args, **kwargs)
        for name, parameter in sae.named_parameters():
            moments = optimizer.state[parameter]["exp_avg"]
            if name != "b_dec":
                forgotten = moments[:, latents] if name == "W_enc" else moments[latents]
                assert not forgotten.any()
        drawn.append(latents)
        return latents

    monkeypatch.setattr(resample, "resample_dead", record)

    def dead_after_training(handling: Any) -> float:
        module = SAETraining(
            architecture, 24, kept, lr=5e-3, dead_after=512, dead_feature_handling=handling
        )
        module.d_in = data.d_in
        module.hparams.d_in = data.d_in
        module.configure_model()
        with torch.no_grad():  # six latents that no input reaches
            module.sae.W_enc[:, :6] = 0.0
            for name in ("b_enc", "b_gate", "b_mag"):
                if hasattr(module.sae, name):
                    getattr(module.sae, name)[:6] = 0 if architecture == "linear_l1" else -50
        trainer = make_trainer(max_epochs=6)
        trainer.fit(module, datamodule=data)
        return float(trainer.callback_metrics["val/dead_fraction"])

    before = dead_after_training("none")
    if architecture != "linear_l1":  # a linear latent gets a gradient from anywhere
        assert before >= 6 / 24 - 1e-6
        assert dead_after_training("resample") < before - 0.15
        assert set(range(6)) <= set(torch.cat(drawn).tolist())


def test_resampling_is_a_function_of_seed_and_step(
    trained_looking: Make, make_activations: Make
) -> None:
    from salve_lm.sae.resample import resample_dead

    x = make_activations(64)
    dead = torch.arange(24) < 5

    def after(seed: int, step: int) -> Tensor:
        sae = trained_looking("standard")
        adam = torch.optim.Adam(sae.parameters())
        torch.rand(1)  # the global state has no part in it
        resample_dead(sae, adam, x, dead, seed=seed, step=step)
        return sae.W_dec.detach()

    assert torch.equal(after(0, 7), after(0, 7))
    assert not torch.equal(after(0, 7), after(0, 8))
    assert not torch.equal(after(0, 7), after(1, 7))


def test_a_resampled_latent_is_an_input_that_was_badly_reconstructed(
    trained_looking: Make, make_activations: Make
) -> None:
    from salve_lm.sae.resample import ENCODER_SHARE, resample_dead

    sae = trained_looking("standard")
    x = make_activations(64)
    x[11] = 300.0 * torch.eye(x.shape[1])[3]  # its squared loss is nearly all of the total
    dead = torch.arange(24) == 5
    norms = sae.W_dec.detach()[~dead].norm(dim=1).mean()
    columns = sae.W_enc.detach()[:, ~dead].norm(dim=0).mean()
    resample_dead(sae, torch.optim.Adam(sae.parameters()), x, dead, seed=0, step=0)
    direction = torch.nn.functional.normalize(x[11] - sae.b_dec.detach(), dim=0)
    torch.testing.assert_close(sae.W_dec.detach()[5], direction * norms)
    torch.testing.assert_close(sae.W_enc.detach()[:, 5], direction * columns * ENCODER_SHARE)
    assert sae.b_enc[5] == 0
    with torch.no_grad():
        assert sae.encode(x[11])[5] > 0


def test_no_resampling_from_the_step_given(data: Any, make_trainer: Make) -> None:
    def train(until: int | None) -> Tensor:
        module = SAETraining(
            "topk", 24, {"k": 1}, lr=1e-2, dead_after=32, dead_feature_handling="resample",
            resample_until_step=until,
        )  # fmt: skip
        make_trainer(max_epochs=2).fit(module, datamodule=data)
        return module.sae.W_dec.detach()

    assert not torch.equal(train(0), train(None))
    none = SAETraining("topk", 24, {"k": 1}, lr=1e-2, dead_feature_handling="none")
    make_trainer(max_epochs=2).fit(none, datamodule=data)
    assert torch.equal(train(0), none.sae.W_dec.detach())


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_resume_is_exact(
    architecture: str, stop: int, options: dict[str, Any], make_data: Make,
    make_activations: Make, make_trainer: Make, tmp_path: Path,
) -> None:  # fmt: skip
    """Interrupted within and between epochs; the state includes counters, moments, schedules."""
    data = make_data(make_activations(128), make_activations(32, seed=1))  # 4 steps an epoch
    handling = "aux" if "topk" in architecture else "resample"

    def module(out: Path) -> SAETraining:
        return SAETraining(
            architecture, 24, options[architecture], lr=1e-2, lr_warm_up_steps=3, lr_decay_steps=3,
            normalize_input="expected_average_only_in", dead_after=64,
            dead_feature_handling=handling, out=str(out),
            l1_warm_up_steps=0 if "topk" in architecture else 7,
        )  # fmt: skip

    whole = module(tmp_path / "whole")
    make_trainer(max_epochs=2).fit(whole, datamodule=data)

    class Interrupt(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        first = module(tmp_path / "resumed")
        make_trainer(max_epochs=2, callbacks=Interrupt()).fit(first, datamodule=data)
    assert not (tmp_path / "resumed").exists()

    second = module(tmp_path / "resumed")
    make_trainer(max_epochs=2).fit(second, datamodule=data, ckpt_path=tmp_path / "stop.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
    for name in ("sae_weights.safetensors", "metrics.json", "cfg.json"):
        a, b = ((tmp_path / run / name).read_bytes() for run in ("whole", "resumed"))
        assert a == b, name


def test_a_run_resumed_after_its_last_step_still_saves(
    data: Any, make_trainer: Make, tmp_path: Path
) -> None:
    module = SAETraining("standard", 24, out=str(tmp_path / "sae"))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    weights = (tmp_path / "sae" / "sae_weights.safetensors").read_bytes()
    metrics = (tmp_path / "sae" / "metrics.json").read_bytes()

    for again in ("sae", "other"):  # killed after, or before, the folder was written
        module = SAETraining("standard", 24, out=str(tmp_path / again))
        make_trainer(max_epochs=1).fit(module, datamodule=data, ckpt_path=tmp_path / "end.ckpt")
        assert (tmp_path / again / "sae_weights.safetensors").read_bytes() == weights
        assert (tmp_path / again / "metrics.json").read_bytes() == metrics


def test_an_existing_output_is_refused_before_training(
    data: Any, make_trainer: Make, tmp_path: Path
) -> None:
    losses = Losses()
    first = SAETraining("standard", 24, out=str(tmp_path / "sae"))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(first, datamodule=data)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(OutputExists, match="Choose another output"):
        module = SAETraining("standard", 24, out=str(tmp_path / "sae"))
        make_trainer(callbacks=losses).fit(module, datamodule=data)
    assert losses.rows == []
    # a resumed run replaces its own output, and no other's
    other = SAETraining("standard", 24, seed=1, out=str(tmp_path / "other"))
    make_trainer(max_epochs=1).fit(other, datamodule=data)
    with pytest.raises(OutputExists):
        module = SAETraining("standard", 24, out=str(tmp_path / "other"))
        make_trainer().fit(module, datamodule=data, ckpt_path=tmp_path / "end.ckpt")
    module = SAETraining("standard", 24, out=str(tmp_path / "sae"))
    make_trainer(max_epochs=2).fit(module, datamodule=data, ckpt_path=tmp_path / "end.ckpt")
    assert read_metadata(tmp_path / "sae")["training_steps"] == 8


def test_a_dry_run_writes_nothing(data: Any, make_trainer: Make, tmp_path: Path) -> None:
    module = SAETraining("standard", 24, out=str(tmp_path / "sae"))
    make_trainer(fast_dev_run=True).fit(module, datamodule=data)
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("missing", ["empty", "not defined"])
def test_without_validation_data_there_are_no_metrics(
    missing: str, make_data: Make, make_activations: Make, make_trainer: Make, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = make_data(make_activations(64), None)
    if missing == "not defined":
        monkeypatch.delattr(type(data), "val_dataloader")
    module = SAETraining("standard", 24, out=str(tmp_path / "sae"))
    make_trainer().fit(module, datamodule=data)
    assert "saved without its metrics" in caplog.text
    metrics = json.loads((tmp_path / "sae" / "metrics.json").read_text())
    assert metrics == {"fire_threshold": 0.0, "split": None}


def test_metrics_are_of_the_last_weights(data: Any, make_trainer: Make, tmp_path: Path) -> None:
    module = SAETraining("standard", 24, out=str(tmp_path / "sae"), lr=1e-2)
    make_trainer(max_epochs=3, check_val_every_n_epoch=2).fit(module, datamodule=data)
    sae = load_sae(tmp_path / "sae")
    with torch.no_grad():
        sse = (sae(data.val) - data.val).square().sum()
    expected = 1 - sse / (data.val - data.val.mean(0)).square().sum()
    metrics = json.loads((tmp_path / "sae" / "metrics.json").read_text())
    assert metrics["explained_variance"] == pytest.approx(float(expected), abs=1e-5)


def test_a_checkpoint_loads_without_a_data_module(
    architecture: str, options: dict[str, Any], data: Any, make_trainer: Make, tmp_path: Path
) -> None:
    module = SAETraining(
        architecture, 24, options[architecture], normalize_input="expected_average_only_in"
    )
    trainer = make_trainer()
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = SAETraining.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(loaded.inference_sae()(data.val), module.inference_sae()(data.val))


def test_a_foreign_checkpoint_is_refused(data: Any, make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(SAETraining("standard", 24), datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(BadConfig, match=r"d_sae \(was 24, is 30\).*start a new run"):
        make_trainer().fit(
            SAETraining("standard", 30), datamodule=data, ckpt_path=tmp_path / "a.ckpt"
        )


@pytest.mark.parametrize("where", ["activations", "loss"])
def test_nan_is_named(where: str, data: Any, make_trainer: Make, tmp_path: Path) -> None:
    if where == "activations":
        data.train = data.train.clone()
        data.train[40, 3] = float("nan")
        says = r"'x' \(activations, training step 1\).*Harvest them again"
    else:
        data.train = data.train * 1e25
        says = r"'loss' \(training step 0\).*Lower lr.*gradient_clip_val.*normalize_input"
    module = SAETraining("standard", 24, out=str(tmp_path / "sae"))
    trainer = make_trainer(num_sanity_val_steps=0)
    with pytest.raises(NotFinite, match=says):
        trainer.fit(module, datamodule=data)
    assert not (tmp_path / "sae").exists()
    with pytest.raises(NotFinite):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")


def test_half_precision_activations_and_weights(data: Any, make_trainer: Make) -> None:
    data.train = data.train.to(torch.float16)
    module = SAETraining("standard", 24, {"l1_coefficient": 0.1}, lr=1e-2)
    make_trainer().fit(module, datamodule=data)
    assert module.sae.W_enc.dtype == torch.float32
    for precision, dtype in (("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)):
        module = SAETraining("batchtopk", 24, {"k": 4}, lr=1e-2)
        make_trainer(precision=precision, gradient_clip_val=1.0).fit(module, datamodule=data)
        assert module.sae.W_enc.dtype == dtype
        assert module.sae.topk_threshold.dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"architecture": "toppk"}, NameNotFound, "Did you mean 'topk'"),
        ({"options": {"l1": 1.0}}, NameNotFound, "No option of SAE architecture 'linear_l1'"),
        ({"d_in": 13}, ShapeMismatch, "d_in=13, but the activations are 12 wide"),
        ({"lr": 0.0}, BadConfig, "lr must be positive"),
        ({"dead_after": 0}, BadConfig, "dead_after must be positive"),
        ({"lr_decay_steps": -1}, BadConfig, "lr_decay_steps must not be negative"),
        ({"lr_decay_steps": 99}, BadConfig, "do not fit into 8 training steps"),
        (
            {"architecture": "topk", "options": {"k": 4}, "l1_warm_up_steps": 5},
            BadConfig,
            "l1_warm_up_steps does nothing for topk",
        ),
        (
            {"options": {"l1_warm_up_steps": 3}, "l1_warm_up_steps": 5},
            BadConfig,
            "l1_warm_up_steps=5 contradicts the option l1_warm_up_steps=3",
        ),
        ({"dead_feature_handling": "aux"}, BadConfig, "linear_l1 has no auxiliary loss"),
        (
            {"architecture": "jumprelu", "dead_feature_handling": "aux"},
            BadConfig,
            "pre_act_loss_coefficient",
        ),
        (
            {
                "architecture": "topk",
                "options": {"k": 4, "rescale_acts_by_decoder_norm": False},
                "fold_decoder_norm": True,
            },
            BadConfig,
            "fold_decoder_norm would change which latents",
        ),
        (
            {
                "architecture": "topk",
                "options": {"k": 4},
                "fold_decoder_norm": True,
                "normalize_input": "covariance_whitening",
            },
            BadConfig,
            "without whitening",
        ),
    ],
)
def test_bad_arguments_name_the_cure(
    arguments: dict[str, Any], error: type[Exception], says: str, data: Any, make_trainer: Make
) -> None:
    with pytest.raises(error, match=says):
        make_trainer().fit(SAETraining(**({"d_sae": 24} | arguments)), datamodule=data)


def test_without_a_data_module(data: Any, make_trainer: Make) -> None:
    trainer = make_trainer()
    data.trainer = trainer
    with pytest.raises(BadConfig, match="set the SAE's d_in"):
        trainer.fit(SAETraining("standard", 24), data.train_dataloader())
    scaled = SAETraining("standard", 24, d_in=12, normalize_input="covariance_whitening")
    with pytest.raises(BadConfig, match="give the trainer a data module"):
        make_trainer().fit(scaled, data.train_dataloader())
    make_trainer().fit(SAETraining("standard", 24, d_in=12), data.train_dataloader())
    with pytest.raises(ShapeMismatch, match=r"takes activations \[n, 13\], but got \[32, 12\]"):
        make_trainer().fit(SAETraining("standard", 24, d_in=13), data.train_dataloader())


def test_sharded_strategies_are_refused() -> None:
    class FSDPStrategy:
        pass

    module = SAETraining("standard", 24, d_in=4)
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        strategy=FSDPStrategy(), precision="32-true", datamodule=None
    )
    with pytest.raises(UnsupportedStrategy, match=r"FSDPStrategy.*Use strategy 'auto' or 'ddp'"):
        module.setup("fit")
