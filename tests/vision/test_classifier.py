"""The classifier module: fits, counts, checkpoints, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from salve_lm.errors import BadConfig
from salve_lm.modules.studied import StudiedModel
from vision import Classifier
from vision.classifier import learning_rate_factor
from vision.data import CIFAR100, Digits, ImageFolder, Imagenette


class Small(nn.Module):
    """A network with batch norm, dropout and a head."""

    def __init__(self, n: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2)
        self.bn = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(16 * 9, n)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_max_pool2d(torch.relu(self.bn(self.conv(x))), 3)
        return self.fc(self.drop(x.flatten(1)))


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "max_epochs": 1,
            **options,
        }
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, pl.Trainer, Digits]:
    torch.manual_seed(0)
    model, data = Classifier(Small()), Digits(image_size=16)
    fit = trainer(tmp_path_factory.mktemp("fit"), max_epochs=4)
    fit.fit(model, data)
    return model, fit, data


def logits_and_labels(model: Classifier, data: Digits) -> tuple[Tensor, Tensor]:
    images = data.eval_dataset("val")
    pairs = [images[i] for i in range(len(images))]  # type: ignore[arg-type]
    with torch.no_grad():
        logits = model.eval()(torch.stack([x for x, _ in pairs]))
    return logits, torch.tensor([y for _, y in pairs])


def test_fit_learns_and_counts_like_the_oracle(
    fitted: tuple[Classifier, pl.Trainer, Digits],
) -> None:
    model, fit, data = fitted
    logged = fit.callback_metrics
    logits, labels = logits_and_labels(model, data)
    hits = (logits.argmax(1) == labels).float()
    assert hits.mean() > 0.8
    assert logged["val_accuracy"].item() == pytest.approx(hits.mean().item(), abs=1e-6)
    for k, name in enumerate(data.class_names):
        want = hits[labels == k].mean().item()
        assert logged[f"val_accuracy/{name}"].item() == pytest.approx(want, abs=1e-6)
    loss = nn.functional.cross_entropy(logits, labels).item()
    assert logged["val_loss"].item() == pytest.approx(loss, rel=1e-4)


def test_validate_test_and_predict(
    fitted: tuple[Classifier, pl.Trainer, Digits], tmp_path: Path
) -> None:
    model, _, data = fitted
    run = trainer(tmp_path)
    (val,) = run.validate(model, data, verbose=False)
    (test,) = run.test(model, data, verbose=False)
    assert {k.replace("test_", "val_"): v for k, v in test.items()} == val
    predicted = run.predict(model, data)
    assert predicted is not None
    logits, _ = logits_and_labels(model, data)
    torch.testing.assert_close(torch.cat(predicted), logits)  # type: ignore[arg-type]


def test_accuracy_leaves_out_classes_without_samples(tmp_path: Path) -> None:
    x, y = torch.zeros(6, 3, 16, 16), torch.tensor([0, 0, 2, 2, 2, 2])
    model = Classifier(Small(4), num_classes=4)
    nn.init.zeros_(model.model.fc.weight)  # type: ignore[arg-type]
    model.model.fc.bias.data = torch.tensor([0.0, 0.0, 1.0, 0.0])  # type: ignore[union-attr]
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    (got,) = trainer(tmp_path).validate(model, loader, verbose=False)
    assert got["val_accuracy"] == pytest.approx(4 / 6)
    assert {k: v for k, v in got.items() if "/" in k} == {
        "val_accuracy/0": 0.0,
        "val_accuracy/2": 1.0,
    }


def test_is_a_studied_model() -> None:
    model = Classifier("resnet18")
    assert isinstance(model, StudiedModel)
    assert (model.head_name, model.sites) == ("fc", {"pooled": "fc:input"})
    assert model.describe()["name"] == "resnet18"
    assert not any(k for k in model.state_dict() if not k.startswith("model."))


def test_data_of_another_number_of_classes(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"data has 10 classes, the classifier 7 logits.*`num_cla"):
        trainer(tmp_path).validate(Classifier(Small(7), num_classes=7), Digits(), verbose=False)


def test_unknown_number_of_classes(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.zeros(2, 3), torch.zeros(2).long()))
    with pytest.raises(BadConfig, match="number of classes is not known"):
        trainer(tmp_path).validate(Classifier(nn.Flatten(), None), loader, verbose=False)


def test_frozen_backbone_trains_the_head_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier(Small(), freeze_backbone=True)
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    assert not model.model.bn.training and model.model.fc.training  # type: ignore[union-attr]
    trainer(tmp_path, max_epochs=2).fit(model, Digits(image_size=16))
    changed = {k for k, v in model.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"fc.weight", "fc.bias"}
    with pytest.raises(BadConfig, match="need a head"):
        Classifier(nn.Flatten(), num_classes=None, freeze_backbone=True)


def test_checkpoints_are_safe_and_know_their_network(tmp_path: Path) -> None:
    model = Classifier(Small())
    run = trainer(tmp_path)
    run.fit(model, Digits(image_size=16))
    path = tmp_path / "a.ckpt"
    run.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert "hyper_parameters" not in content and "optimizer_states" in content
    again = Classifier.load_from_checkpoint(path, backbone=Small(), weights_only=True)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            model.model.state_dict().values(), again.model.state_dict().values(), strict=True
        )
    )
    assert Classifier(Small(), weights=str(path)).num_classes == 10  # as plain weights, too
    with pytest.raises(BadConfig, match=r"holds another network: num_classes 10, here 4"):
        Classifier.load_from_checkpoint(path, backbone=Small(4), num_classes=4, weights_only=True)


def test_resumed_fit_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def fit(epochs: int, resume: Path | None = None) -> tuple[Classifier, pl.Trainer]:
        torch.manual_seed(0)
        model = Classifier(Small(), schedule="constant")
        model.model.drop.p = 0.0  # type: ignore[union-attr]  # dropout draws from the global state
        run = trainer(tmp_path, max_epochs=epochs)
        run.fit(model, Digits(image_size=16, augment="shift"), ckpt_path=resume, weights_only=True)
        return model, run

    whole, _ = fit(3)
    _, half = fit(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(3, tmp_path / "half.ckpt")
    for k, v in whole.state_dict().items():
        assert torch.equal(v, resumed.state_dict()[k]), k


def test_default_optimiser_and_cosine_schedule(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    model = Classifier(Small())
    run = trainer(tmp_path, max_epochs=2, callbacks=[Watch()])
    run.fit(model, Digits(image_size=16))
    group = run.optimizers[0].param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-3)
    # 899 images: 14 batches of 64 an epoch
    want = [0.05 * 0.5 * (1 + math.cos(math.pi * s / 28)) for s in range(28)]
    assert seen == pytest.approx(want)


def test_learning_rate_factor() -> None:
    curve = [learning_rate_factor(s, 10, "cosine", 0.2) for s in range(11)]
    assert curve[:3] == [0.5, 1.0, 1.0]
    assert curve == curve[:2] + sorted(curve[2:], reverse=True)
    assert curve[-1] == pytest.approx(0)
    assert [learning_rate_factor(s, 10, "constant", 0.2) for s in (0, 1, 5, 99)] == [0.5, 1, 1, 1]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_own_optimizer_and_scheduler(tmp_path: Path, interval: Any) -> None:
    model = Classifier(
        Small(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.5),
        lr_scheduler_interval=interval,
    )
    run = trainer(tmp_path, max_epochs=2, limit_train_batches=3)
    run.fit(model, Digits(image_size=16))
    steps = 6 if interval == "step" else 2
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**steps)


def test_a_schedule_needs_an_end(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"set trainer.max_epochs or max_steps"):
        trainer(tmp_path, max_epochs=-1).fit(Classifier(Small()), Digits(image_size=16))


@pytest.mark.parametrize("name", ["warmup", "label_smoothing"])
def test_shares_are_checked(name: str) -> None:
    with pytest.raises(BadConfig, match="shares, from 0 to below 1"):
        Classifier(Small(), **{name: 1.0})  # type: ignore[arg-type]


def test_auxiliary_logits_are_left_out() -> None:
    model = Classifier("googlenet", 4, options={"init_weights": False, "aux_logits": True})
    out = model.train()(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 4)


def parse(arguments: Sequence[str]) -> Any:
    """What the command line makes of `arguments`, without the rest of it."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.LightningModule, "model")
    parser.add_subclass_arguments(pl.LightningDataModule, "data", required=False)
    config = parser.parse_args(list(arguments))
    return parser, config, parser.instantiate_classes(config)


def test_from_the_command_line(tmp_path: Path) -> None:
    _, _, made = parse(
        [
            "--model=vision.Classifier",
            "--model.backbone=timm:vit_tiny_patch16_224",
            '--model.options={"img_size": 32}',
            "--model.optimizer=torch.optim.AdamW",
            "--model.optimizer.lr=0.002",
            "--data=vision.data.Digits",
            "--data.image_size=32",
        ]
    )
    trainer(tmp_path, limit_train_batches=2, limit_val_batches=1).fit(made.model, made.data)
    assert made.model.trainer.optimizers[0].defaults["lr"] == 0.002


def test_own_module_by_class_path_and_config_round_trip() -> None:
    parser, config, made = parse(
        [
            "--model=vision.Classifier",
            "--model.backbone=torchvision.models.AlexNet",
            "--model.backbone.num_classes=10",
        ]
    )
    assert type(made.model.model).__name__ == "AlexNet"
    assert made.model.backbone.name == "torchvision.models.alexnet.AlexNet"
    again = parser.parse_string(parser.dump(config))
    assert parser.instantiate_classes(again).model.head_name == "classifier.6"
    optimizer = made.model._make_optimizer([nn.Parameter(torch.ones(1))])
    assert (type(optimizer).__name__, optimizer.defaults["lr"]) == ("SGD", 0.05)


@pytest.mark.parametrize("owner", [Classifier, Digits, ImageFolder, Imagenette, CIFAR100])
def test_every_option_is_documented_for_the_command_line(owner: type) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(owner, "x")
    options = [a for a in parser._actions if (a.dest or "").startswith("x.")]
    bare = [a.dest for a in options if "help" not in a.dest.split(".") and not a.help]
    assert len(options) > 5 and not bare


def test_the_backbone_can_move_more_slowly_than_the_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier(Small(), backbone_lr=1e-3, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    before = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    fit = trainer(tmp_path, max_steps=1, max_epochs=-1, limit_val_batches=0)
    gradients: dict[str, Tensor] = {}

    class Keep(pl.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            own = model.model.named_parameters()
            gradients.update({n: p.grad.clone() for n, p in own if p.grad is not None})

    fit.callbacks.append(Keep())  # type: ignore[attr-defined]
    fit.fit(model, Digits(image_size=16))
    assert gradients.keys() == before.keys()
    for name, p in model.model.named_parameters():
        rate = 0.1 if name.startswith("fc.") else 1e-3
        torch.testing.assert_close(p.detach(), before[name] - rate * gradients[name])


@pytest.mark.parametrize("options", [{"backbone_lr": 0.0}, {"freeze_backbone": True}])
def test_a_rate_of_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadConfig, match=r"backbone_lr is .* Leave out"):
        Classifier(Small(), **{"backbone_lr": 1e-3, **options})
    with pytest.raises(BadConfig, match="need a head"):
        Classifier(nn.Conv2d(3, 2, 3), num_classes=None, backbone_lr=1e-3)


def test_images_of_another_size_or_with_alpha_are_named() -> None:
    options = {"img_size": 32, "patch_size": 8, "depth": 1}
    vit = Classifier("timm:vit_tiny_patch16_224", 10, options=options)
    with pytest.raises(BadConfig, match=r"does not take images of shape .*48, 48.*Resize"):
        vit(torch.zeros(1, 3, 48, 48))
    with pytest.raises(BadConfig, match=r"4 channels, the model takes 3.*alpha channel"):
        vit(torch.zeros(1, 4, 32, 32))
