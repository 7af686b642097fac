"""No training step reads a value back from the device, which a GPU would have to be waited for.

The steps run on PyTorch's `meta` device, which holds no values: whatever reads one, or needs one to
know a shape, raises there. For this code it is a device like a GPU: only "cpu" is asked for.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from salve_lm.activations.batch import ActivationBatch
from salve_lm.modules.sae import SAETraining
from salve_lm.sae import build_training_sae
from salve_lm.sae.early_backward import differentiated
from salve_lm.sae.step import fired, training_step
from tests.oracle.architectures import OPTIONS

TOPK_FAMILY = ("topk", "batchtopk", "matryoshka_batchtopk")
READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
}


@pytest.fixture(autouse=True)
def no_autocast_for_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch knows no mixed precision for this device, and refuses to be asked."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast

    def is_enabled(device: str = "cpu") -> bool:
        return device != "meta" and enabled(device)

    def context(device: str, **kwargs: Any) -> Any:
        return nullcontext() if device == "meta" else autocast(device, **kwargs)

    monkeypatch.setattr(torch, "is_autocast_enabled", is_enabled)
    monkeypatch.setattr(torch, "autocast", context)


class Reads(TorchDispatchMode):
    """Counts operations that bring a value, or a number of values, to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func in READS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sparse", ["auto", "never", "always"])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_a_step_reads_nothing_back(name: str, sparse: Any) -> None:
    if sparse == "always" and name not in TOPK_FAMILY:
        pytest.skip("standard and jumprelu count their latents then, which is documented")
    sae: Any = build_training_sae(name, 16, 4096, OPTIONS[name], device="meta")
    x = torch.empty(50, 16, device="meta")
    out = training_step(sae, x, {"l1": 0.3, "l0": 0.1}, sparse=sparse)
    assert out.z.is_sparse == (name in TOPK_FAMILY and sparse != "never")
    seen = fired(sae, out.z, 0.01)
    differentiated(out.loss, sae.parameters()).backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    assert seen.shape == (4096,) and seen.device.type == "meta"


@pytest.mark.parametrize("name", TOPK_FAMILY)
def test_only_dead_latents_make_a_step_read(name: str) -> None:
    def reads(dead: Tensor | None) -> int:
        sae: Any = build_training_sae(name, 16, 64, OPTIONS[name], seed=0)
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
        with Reads() as counted:
            training_step(sae, x, {}, dead=dead, sparse="never").loss.backward()
        return counted.number

    assert reads(torch.arange(64) < 9) == reads(None) + 1


@pytest.mark.parametrize("name", list(OPTIONS))
def test_the_module_reads_nothing_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SAETraining(name, 64, OPTIONS[name], 16, dead_after=1000)
    module.configure_model()
    module.to("meta")
    module._prepare_fit()
    monkeypatch.setattr(SAETraining, "_log_now", lambda self: False)
    x, index = torch.empty(50, 16, device="meta"), torch.zeros(50, dtype=torch.int64)
    loss = module.training_step(ActivationBatch(x, index, index, 50), 0)
    loss.backward()
    assert loss.device.type == "meta"


def test_the_device_of_these_tests_raises_where_a_value_is_read() -> None:
    x = torch.empty(3, device="meta")
    for read in (lambda: bool(x.sum()), lambda: x.nonzero(), lambda: x[x > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
