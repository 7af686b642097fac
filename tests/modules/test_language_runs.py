"""Killed and started again, or on two processes, a language model comes out the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing import ProcessExitedException

from salve_lm.errors import BadConfig, OutputExists
from salve_lm.language import load_causal_lm
from salve_lm.modules.lora import LoraOptions
from tests.distributed.test_preemption import Preempt
from tests.distributed.training import KillAt
from tests.faults.processes import run_killed
from tests.language.tiny_models import save_model
from tests.modules.tiny_fits import Kept, data, model, read, trainer

TWO: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2}


def run(folder: Path, source: Path, text: str, *more: Callback, **options: Any) -> None:
    """The one command: it goes on where it was, or starts where there is nothing yet."""
    lora = options.pop("lora", None)
    keep = ModelCheckpoint(
        folder / "checkpoints", save_last=True, every_n_train_steps=options.pop("every", 1)
    )
    fit = trainer(Kept(folder), keep, *more, **options)
    module = model(source, lora=lora, out=str(folder / "out"))
    fit.fit(module, datamodule=data(text), ckpt_path="last")


def check_same(resumed: dict[str, Any], whole: dict[str, Any], exact: bool = True) -> None:
    assert max(resumed["losses"]) == max(whole["losses"])
    for step, loss in resumed["losses"].items():
        assert loss == pytest.approx(whole["losses"][step], rel=0 if exact else 1e-4, abs=0), step
    for name, weight in whole["weights"].items():
        if exact:
            assert torch.equal(resumed["weights"][name], weight), name
        else:
            torch.testing.assert_close(resumed["weights"][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    ("family", "lora"), [("gpt2", None), ("llama", LoraOptions(r=2, dropout=0.2))]
)
def test_killed_in_an_epoch(
    family: str, lora: LoraOptions | None, every: int, tmp_path: Path, text: str
) -> None:
    """GPT-2 and the adapter have dropout: it must fall where it would have fallen."""
    save_model(tmp_path / "base", family)
    given = tmp_path / "base", text
    torch.manual_seed(0)
    run(tmp_path / "whole", *given, lora=lora, every=every)
    torch.manual_seed(1)  # nothing may depend on the global random state
    whole = read(tmp_path / "whole")
    n = max(whole["losses"])
    for step in (2, n // 2, n - 1):
        kill = KillAt("on_train_batch_start", step)
        run_killed(partial(run, tmp_path / "run", *given, kill, lora=lora, every=every))
        assert not (tmp_path / "run" / "out").exists()
    run(tmp_path / "run", *given, lora=lora, every=every)
    check_same(read(tmp_path / "run"), whole)
    run(
        tmp_path / "run", *given, lora=lora, every=every
    )  # finished: nothing is trained, and the result stands
    for name in ("whole", "run"):
        assert (tmp_path / name / "out").is_dir()
    weights = "model.safetensors" if lora is None else "adapter_model.safetensors"
    a, b = (tmp_path / name / "out" / weights for name in ("whole", "run"))
    assert a.read_bytes() == b.read_bytes()


def test_preempted(llama: Path, text: str, tmp_path: Path) -> None:
    """SIGTERM: the one checkpoint there is was written because of it."""
    run(tmp_path / "whole", llama, text, every=1000)
    for step in (1, 4):
        with pytest.raises(SIGTERMException):
            run(tmp_path / "run", llama, text, Preempt("on_train_batch_start", step), every=1000)
    run(tmp_path / "run", llama, text, every=1000)
    resumed = read(tmp_path / "run")
    assert min(resumed["losses"]) == 6
    check_same(resumed, read(tmp_path / "whole"))


def test_two_processes_equal_one(llama: Path, text: str, tmp_path: Path) -> None:
    run(tmp_path / "one", llama, text)
    run(tmp_path / "two", llama, text, **TWO)
    one, two, other = read(tmp_path / "one"), read(tmp_path / "two"), read(tmp_path / "two", 1)
    check_same(two, one, exact=False)
    assert two["weights"].keys() == other["weights"].keys()
    for name, weight in two["weights"].items():
        assert torch.equal(other["weights"][name], weight)
    # every rank has every row, once and in order
    assert other["results"] == two["results"]
    for task, rows in one["results"].items():
        assert [r["sample"] for r in two["results"][task]] == [r["sample"] for r in rows]
        assert [r["tokens"] for r in two["results"][task]] == [r["tokens"] for r in rows]
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-4), name
    load_causal_lm(tmp_path / "two" / "out")


def test_two_processes_killed(llama: Path, text: str, tmp_path: Path) -> None:
    run(tmp_path / "whole", llama, text, **TWO)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run(tmp_path / "run", llama, text, KillAt("on_train_batch_start", 3), **TWO)
    run(tmp_path / "run", llama, text, **TWO)
    for rank in (0, 1):
        check_same(read(tmp_path / "run", rank), read(tmp_path / "whole", rank))


def test_validation_on_two_processes_has_no_duplicates(
    llama: Path, text: str, tmp_path: Path
) -> None:
    """7 and 13 documents: shares differ, and Lightning's own sampler would pad them."""
    module = model(llama)
    trainer().validate(module, datamodule=data(text), verbose=False)
    trainer(Kept(tmp_path), **TWO).validate(model(llama), datamodule=data(text), verbose=False)
    two = read(tmp_path)["results"]
    for task, rows in module.results.items():
        assert [r["sample"] for r in two[task]] == [r["sample"] for r in rows]
        for got, own in zip(two[task], rows, strict=True):
            assert got["nll"] == pytest.approx(own["nll"], rel=1e-5)


def test_fewer_samples_than_processes(llama: Path, text: str) -> None:
    few = data(text)
    few.tasks = few.tasks[:1]
    few.tasks[0].corpus.limit = 1  # type: ignore[attr-defined]
    with pytest.raises(Exception, match=r"fewer samples than there are processes \(2\)"):
        trainer(**TWO).validate(model(llama), datamodule=few, verbose=False)


def test_a_resumed_run_replaces_only_its_own_result(llama: Path, text: str, tmp_path: Path) -> None:
    run(tmp_path / "run", llama, text)
    module = model(llama, out=str(tmp_path / "run" / "out"), weight_decay=0.5)
    keep = ModelCheckpoint(tmp_path / "run" / "checkpoints", save_last=True)
    with pytest.raises(OutputExists):
        trainer(keep).fit(module, datamodule=data(text), ckpt_path="last")


def test_another_order_is_refused(llama: Path, text: str, tmp_path: Path) -> None:
    run_killed(lambda: run(tmp_path / "run", llama, text, KillAt("on_train_batch_start", 3)))
    keep = ModelCheckpoint(tmp_path / "run" / "checkpoints", save_last=True)
    other = data(text, batch_size=3)
    with pytest.raises(BadConfig, match=r"batch_size \(was 4, is 3\)"):
        trainer(keep).fit(model(llama), datamodule=other, ckpt_path="last")
