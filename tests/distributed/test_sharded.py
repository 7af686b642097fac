"""An autoencoder that two processes share (FSDP2), against one process that has it whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from salve_lm.cli import main
from salve_lm.errors import UnsupportedStrategy
from salve_lm.sae import ARCHITECTURES, load_sae
from tests.distributed.ranks import run_ranks
from tests.distributed.training import KillAt, Run, activation_data, checkpoints, fit, read_run
from tests.sae.conftest import ARCHITECTURES as OPTIONS

AUX = {"topk", "batchtopk", "matryoshka_batchtopk"}


class HoldsAPart(Callback):
    """Fails the run unless each rank keeps half of every large tensor."""

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        for name, parameter in module.sae.named_parameters():
            assert isinstance(parameter, DTensor), name
            assert 2 * parameter.to_local().numel() <= 1.2 * parameter.numel()
            moments = trainer.optimizers[0].state[parameter]
            assert moments["exp_avg"].to_local().numel() == parameter.to_local().numel()


def fit_sharded(
    store: Path, folder: Path, callbacks: tuple[Callback, ...] = (), **options: Any
) -> list[int]:
    strategy = ModelParallelStrategy(
        **{
            "data_parallel_size": 2,
            "tensor_parallel_size": 1,
            "save_distributed_checkpoint": False,
            **options.pop("strategy", {}),
        }
    )
    callbacks = (HoldsAPart(), *callbacks)
    return run_ranks(
        lambda rank: fit(
            activation_data(store), folder, callbacks=callbacks, devices=2, strategy=strategy,
            **options,
        )
    )  # fmt: skip


def check_equal(one: Run, two: Run) -> None:
    assert one.losses.keys() == two.losses.keys()
    for step, loss in one.losses.items():
        assert two.losses[step] == pytest.approx(loss, rel=1e-5, abs=1e-6), f"step {step}"
    for name, value in one.metrics.items():
        assert two.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert one.weights.keys() == two.weights.keys()
    for name, weight in one.weights.items():
        torch.testing.assert_close(two.weights[name], weight, rtol=1e-5, atol=1e-5, msg=name)


def one_and_two(store: Path, tmp_path: Path, module: dict[str, Any], **options: Any) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    saved = [{**module, "out": str(folder / "sae")} for folder in folders]
    fit(activation_data(store), folders[0], module=saved[0], **options)
    assert fit_sharded(store, folders[1], module=saved[1], **options) == [0, 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_one_process(store: Path, tmp_path: Path, architecture: str) -> None:
    module: dict[str, Any] = {
        "options": OPTIONS[architecture],
        "l1_warm_up_steps": 0 if architecture in AUX else 9,
        "normalize_input": "expected_average_only_in",
    }
    one_and_two(store, tmp_path, architecture=architecture, module=module)
    one, two = read_run(tmp_path / "one"), read_run(tmp_path / "two", world=2)
    check_equal(one, two)
    a, b = (load_sae(tmp_path / name / "sae") for name in ("one", "two"))
    assert a.cfg.architecture() == b.cfg.architecture()
    for name, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)
    measured = [json.loads((tmp_path / n / "sae/metrics.json").read_text()) for n in ("one", "two")]
    for name, number in measured[0].items():
        expected = number if isinstance(number, str) else pytest.approx(number, rel=1e-5, abs=1e-6)
        assert measured[1][name] == expected


@pytest.mark.parametrize(
    ("module", "trainer"),
    [
        ({"dead_feature_handling": "aux", "dead_after": 20}, {"gradient_clip_val": 0.3}),
        ({"normalize_input": "covariance_whitening"}, {"accumulate_grad_batches": 2}),
        ({"lr_decay_steps": 4, "fold_decoder_norm": True}, {"precision": "bf16-mixed"}),
    ],
    ids=["aux and clipping", "whitening and accumulation", "mixed precision"],
)
def test_options_equal_one_process(
    store: Path, tmp_path: Path, module: dict[str, Any], trainer: dict[str, Any]
) -> None:
    mixed = "precision" in trainer
    if not mixed:
        module = {"options": {"k": 3}, "l1_warm_up_steps": 0, **module}
    # which latents are among the top k may hang on a bfloat16's last bit
    architecture = "standard" if mixed else "topk"
    one_and_two(store, tmp_path, architecture=architecture, module=module, **trainer)
    one, two = read_run(tmp_path / "one"), read_run(tmp_path / "two", world=2)
    if mixed:
        assert list(two.losses.values()) == pytest.approx(list(one.losses.values()), rel=1e-2)
    else:
        check_equal(one, two)


@pytest.mark.parametrize("whole_file", [True, False], ids=["one file", "a file for each rank"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_and_resumed(store: Path, tmp_path: Path, whole_file: bool, dtype: str) -> None:
    module = {
        "options": {"k": 3}, "l1_warm_up_steps": 0, "dead_after": 20, "dtype": dtype,
        "normalize_input": "expected_average_only_in",
    }  # fmt: skip
    options: dict[str, Any] = {
        "architecture": "batchtopk",
        "strategy": {"save_distributed_checkpoint": not whole_file},
    }
    uninterrupted = tmp_path / "whole"
    options["module"] = {**module, "out": str(uninterrupted / "sae")}
    assert fit_sharded(store, uninterrupted, **options) == [0, 0]
    options["module"] = {**module, "out": str(tmp_path / "run" / "sae")}
    for kill in ((KillAt("on_train_batch_start", 9),), ()):
        callbacks = (checkpoints(tmp_path), *kill)
        ended = fit_sharded(store, tmp_path / "run", callbacks, resume=True, **options)
        assert (ended == [0, 0]) is not bool(kill)
    run, whole = (read_run(tmp_path / name, world=2) for name in ("run", "whole"))
    assert 8 <= min(run.losses) <= 10
    for step, loss in run.losses.items():
        assert loss == whole.losses[step]
    for name, weight in whole.weights.items():
        assert torch.equal(run.weights[name], weight), name
    assert run.metrics == whole.metrics
    weights = [
        (tmp_path / n / "sae/sae_weights.safetensors").read_bytes() for n in ("run", "whole")
    ]
    assert weights[0] == weights[1]


def test_one_process_goes_on_where_two_were(store: Path, tmp_path: Path) -> None:
    """The one file holds whole weights and moments, as any other checkpoint does."""
    module: dict[str, Any] = {"options": {"k": 3}, "l1_warm_up_steps": 0}
    options: dict[str, Any] = {"architecture": "topk", "module": module}
    fit(activation_data(store), tmp_path / "whole", **options)
    callbacks = (checkpoints(tmp_path), KillAt("on_train_batch_start", 9))
    assert fit_sharded(store, tmp_path / "run", callbacks, resume=True, **options) != [0, 0]
    callbacks = (checkpoints(tmp_path),)
    fit(activation_data(store), tmp_path / "run", callbacks=callbacks, resume=True, **options)
    whole, resumed = read_run(tmp_path / "whole"), read_run(tmp_path / "run")
    assert min(resumed.losses) >= 8
    for step, loss in resumed.losses.items():
        assert loss == pytest.approx(whole.losses[step], rel=1e-5)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], weight, rtol=1e-5, atol=1e-5, msg=name)


def test_the_shipped_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config=demo/2_autoencoder", "--config=trainer/model_parallel",
              "--trainer.strategy.init_args.data_parallel_size=2", "--print_config"])  # fmt: skip
    strategy = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]
    assert strategy["class_path"].endswith("ModelParallelStrategy")
    assert strategy["init_args"]["data_parallel_size"] == 2
    assert strategy["init_args"]["tensor_parallel_size"] == 1
    assert strategy["init_args"]["save_distributed_checkpoint"] is False


@pytest.mark.parametrize(
    ("module", "strategy", "message"),
    [
        ({"dead_feature_handling": "resample"}, {}, "resampling rewrites whole ones"),
        ({"chunk_rows": 4}, {}, "accumulate_grad_batches"),
        ({}, {"data_parallel_size": 1, "tensor_parallel_size": 2}, "data_parallel_size to 2"),
    ],
)
def test_what_needs_whole_weights_is_refused(
    store: Path, tmp_path: Path, module: dict[str, Any], strategy: dict[str, Any], message: str
) -> None:
    def refused(rank: int) -> None:
        plan = ModelParallelStrategy(
            **{"data_parallel_size": 2, "tensor_parallel_size": 1, **strategy}
        )
        data = activation_data(store)
        with pytest.raises(UnsupportedStrategy, match=message):
            fit(data, tmp_path / "run", "standard", module=module, devices=2, strategy=plan)

    assert run_ranks(refused) == [0, 0]
