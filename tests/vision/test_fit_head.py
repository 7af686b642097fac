"""The head that FitHead leaves, against scikit-learn's logistic regression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from salve_lm.errors import BadConfig, NotFinite
from salve_lm.evaluation import HeadInputs, collect_head_inputs
from tests.vision.test_classifier import Small, trainer
from vision import Classifier, FitHead
from vision.data import Digits
from vision.fit_head import logistic_regression


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_it_is_the_optimum(l2: float) -> None:
    from sklearn.linear_model import LogisticRegression

    draw = torch.Generator().manual_seed(0)
    label = torch.arange(90) % 3
    x = torch.randn(90, 5, generator=draw) + label[:, None] * torch.tensor([1.0, 0, -1, 0, 0.5])
    weight, bias = logistic_regression(HeadInputs(x, label), 3, l2)
    # scikit-learn's penalty is |w|^2 / 2 beside C times the summed loss
    oracle = LogisticRegression(C=1 / (2 * l2 * len(x)), tol=1e-10, max_iter=5000)
    oracle.fit(x.double().numpy(), label.numpy())
    np.testing.assert_allclose(weight, oracle.coef_, atol=1e-3)
    centred = bias - bias.mean()
    np.testing.assert_allclose(centred, oracle.intercept_ - oracle.intercept_.mean(), atol=1e-3)


def test_a_fit_begins_from_it_and_moves_nothing_at_a_rate_of_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = Digits(image_size=16, augment="shift")
    model = Classifier(
        Small(), freeze_backbone=True, optimizer=lambda p: torch.optim.SGD(p, lr=0.0)
    )
    trunk = {n: t.clone() for n, t in model.state_dict().items() if "fc" not in n}
    fit = trainer(tmp_path, limit_train_batches=1, callbacks=[FitHead(l2=1e-2)])
    fit.fit(model, data)
    inputs = collect_head_inputs(model.eval(), data, "train", torch.device("cpu"))
    weight, bias = logistic_regression(inputs, 10, 1e-2)
    head: Any = model.model.fc
    torch.testing.assert_close(head.weight.detach().double(), weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head.bias.detach().double(), bias, atol=1e-5, rtol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in trunk.items())
    assert fit.callback_metrics["val_accuracy"] > 0.7


def test_a_resumed_fit_keeps_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = Digits(image_size=16)
    still = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
    model = Classifier(Small(), **still)  # type: ignore[arg-type]
    first = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    first.fit(model, data)
    first.save_checkpoint(tmp_path / "x.ckpt")
    head: Any = model.model.fc
    kept = head.weight.detach().clone()
    again = trainer(
        tmp_path, max_epochs=2, limit_train_batches=1, limit_val_batches=0, callbacks=[FitHead()]
    )
    again.fit(model, data, ckpt_path=tmp_path / "x.ckpt", weights_only=False)
    assert torch.equal(head.weight, kept)


def test_bad_input(tmp_path: Path) -> None:
    data = Digits(image_size=16)
    for options in ({"l2": -1.0}, {"max_iterations": 0}):
        with pytest.raises(BadConfig, match="l2 is not negative"):
            FitHead(**options)  # type: ignore[arg-type]
    no_bias = Small()
    no_bias.fc = nn.Linear(16 * 9, 10, bias=False)
    with pytest.raises(BadConfig, match=r"a final torch\.nn\.Linear with a bias"):
        trainer(tmp_path, callbacks=[FitHead()]).fit(Classifier(no_bias), data)
    with pytest.raises(NotFinite, match="head reads"):
        nan = torch.tensor([[torch.nan]])
        logistic_regression(HeadInputs(nan, torch.tensor([0])), 2, 0.1)
