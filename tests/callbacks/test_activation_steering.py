from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from salve_lm.callbacks import ActivationSteering, WeightEditing
from salve_lm.edits import Steering
from salve_lm.errors import (
    BadConfig,
    NameNotFound,
    NoEffect,
    ShapeMismatch,
    UnsupportedEdit,
)
from tests.callbacks.tiny import PassNet, Studied, parts, trainer
from tests.edits.tiny import D_IN, Fixture


@pytest.mark.parametrize("direction", ["suppress", "enhance"])
def test_equals_the_folded_edit(tiny: Fixture, direction: Any) -> None:
    common: dict[str, Any] = {
        "feature": "dominant:tower", "alpha": 2.5, "direction": direction, **tiny.paths
    }  # fmt: skip
    steered, data = parts(tiny)
    folded, _ = parts(tiny)
    plain, _ = parts(tiny)
    trainer(ActivationSteering(**common)).validate(steered, data)
    trainer(WeightEditing([Steering(**common)])).validate(folded, data)
    trainer().validate(plain, data)
    torch.testing.assert_close(torch.cat(steered.logits), torch.cat(folded.logits))
    assert not torch.allclose(torch.cat(steered.logits), torch.cat(plain.logits), atol=0.1)
    # nothing stays behind
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in steered.modules())


def test_output_side_and_other_modules(tiny: Fixture) -> None:
    studied, data = parts(tiny)
    steering = ActivationSteering(3, 1.5, module="relu", io="output", sae=tiny.sae)
    trainer(steering).test(studied, data)
    predictions = trainer(steering).predict(studied, data)
    d = (tiny.decoder[3] / tiny.decoder[3].norm()).float()
    expected = nn.functional.linear(tiny.x - 1.5 * d, *studied.model.fc.parameters())
    torch.testing.assert_close(torch.cat(predictions), expected)  # type: ignore[arg-type]


class ImageNet(PassNet):
    """The activations are images of one pixel, and travel in a tuple."""

    class Spread(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x[:, :, None, None].expand(-1, -1, 2, 2), "more"

    def __init__(self) -> None:
        super().__init__()
        self.spread = self.Spread()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.spread(x)[0].mean((2, 3)))


def test_images_are_steered_along_their_channels(tiny: Fixture) -> None:
    _, data = parts(tiny)
    studied = Studied(tiny.studied.model.fc, ImageNet())
    trainer(ActivationSteering(3, 1.5, module="spread", io="output", sae=tiny.sae)).validate(
        studied, data
    )
    d = (tiny.decoder[3] / tiny.decoder[3].norm()).float()
    expected = nn.functional.linear(tiny.x - 1.5 * d, *studied.model.fc.parameters())
    torch.testing.assert_close(torch.cat(studied.logits), expected)


def test_training_and_sanity_check_are_not_steered(tiny: Fixture) -> None:
    studied, data = parts(tiny)
    steering = ActivationSteering(3, 1.5, sae=tiny.sae)
    hooked: list[bool] = []
    studied.training_step = _noting(studied, studied.training_step, hooked)  # type: ignore[method-assign]
    trainer(steering, num_sanity_val_steps=1).fit(studied, data)
    assert hooked
    assert not any(hooked)
    with torch.no_grad():
        torch.testing.assert_close(studied.logits[0], parts(tiny)[0].model(tiny.x[:32]))


def _noting(studied: Studied, step: Any, hooked: list[bool]) -> Any:
    def training_step(batch: Any, batch_idx: int) -> Tensor:
        hooked.append(bool(studied.model.fc._forward_pre_hooks))
        return step(batch, batch_idx)

    return training_step


def test_removed_after_an_exception(tiny: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    studied, data = parts(tiny)

    def fail(*_: Any) -> None:
        raise ValueError("now")

    monkeypatch.setattr(studied, "on_validation_epoch_end", fail)
    with pytest.raises(ValueError, match="now"):
        trainer(ActivationSteering(3, sae=tiny.sae)).validate(studied, data)
    assert not studied.model.fc._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"feature": 3, "module": "fcc"}, NameNotFound, "'fc'"),
        ({"feature": 99}, NameNotFound, "0 to 11"),
        ({"feature": 3, "module": "*"}, BadConfig, "matches 2"),
        ({"feature": 3, "module": "fc", "io": "output"}, ShapeMismatch, "width 8"),
        ({}, BadConfig, "Name a `feature`"),
    ],
)
def test_bad_input(tiny: Fixture, options: Any, error: type[Exception], message: str) -> None:
    studied, data = parts(tiny)
    with pytest.raises(error, match=message):
        trainer(ActivationSteering(**{"sae": tiny.sae, **options})).validate(studied, data)


def test_without_effect(tiny: Fixture) -> None:
    with pytest.raises(NoEffect, match="alpha 0"):
        ActivationSteering(3, 0.0)
    studied, data = parts(tiny)
    studied.model.unused = nn.Linear(D_IN, 2)
    with pytest.raises(NoEffect, match="did not run"):
        trainer(ActivationSteering(3, module="unused", sae=tiny.sae)).validate(studied, data)


def test_compiled_models_are_refused(tiny: Fixture) -> None:
    studied, data = parts(tiny)
    compiled = torch.compile(studied, backend="eager")
    with pytest.raises(UnsupportedEdit, match="compiled"):
        trainer(ActivationSteering(3, sae=tiny.sae)).validate(compiled, data)
