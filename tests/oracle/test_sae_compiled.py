"""A compiled training step: one graph, and the results of the step as it is written.

By a back end that only traces (`aot_eager`), so that no C++ compiler is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from salve_lm.activations.batch import ActivationBatch
from salve_lm.modules.sae import SAETraining
from salve_lm.sae import build_training_sae, step
from salve_lm.sae.step import training_step
from tests.oracle.architectures import OPTIONS


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_one_graph_with_equal_results(name: str) -> None:
    eager, compiled = (build_training_sae(name, 16, 400, OPTIONS[name], seed=1) for _ in range(2))
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    # a graph break is an error
    take_step = torch.compile(training_step, backend="aot_eager", fullgraph=True)
    # as the penalty warms up, and the steps are counted
    for number, weight in enumerate((0.1, 0.2, 0.3)):
        coefficients = {"l1": weight, "l0": weight}
        a = training_step(eager, x, coefficients, step=number)
        b = take_step(compiled, x, coefficients, step=number)
        for sae, out in ((eager, a), (compiled, b)):
            sae.zero_grad()
            out.loss.backward()
        torch.testing.assert_close(a.loss, b.loss)
        torch.testing.assert_close(a.z.to_dense(), b.z.to_dense())
        for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert b.z.is_sparse == ("topk" in name)


def test_training_with_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = torch.compile(training_step, backend="aot_eager")
    monkeypatch.setattr("salve_lm.sae.measured_step.compiled_training_step", lambda: traced)

    def trained(compile_step: bool) -> Tensor:
        module = SAETraining("standard", 24, OPTIONS["standard"], 16, compile_step=compile_step)
        draw = torch.Generator().manual_seed(0)
        index = torch.zeros(8, dtype=torch.int64)
        batches = [
            ActivationBatch(torch.randn(8, 16, generator=draw), index, index, 8) for _ in range(4)
        ]
        Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]  # fmt: skip
        return module.sae.W_dec.detach()

    torch.testing.assert_close(trained(True), trained(False))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_the_step_that_is_compiled_is_the_training_step() -> None:
    assert step.compiled_training_step()._torchdynamo_orig_callable is training_step  # type: ignore[attr-defined]
