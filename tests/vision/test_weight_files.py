"""Weights from files: every form that is read, and every file that is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from salve_lm.errors import CorruptFile, MissingFile, NotFinite, SalveError, ShapeMismatch
from vision.backbones import build_backbone
from vision.weights import match_names, read_state_dict


def tiny(n: int = 5) -> nn.Sequential:
    """A network whose names are its own: conv.weight, bn.*, fc.*."""
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(3, 4, 3))
    net.add_module("bn", nn.BatchNorm2d(4))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("fc", nn.Linear(4, n))
    return net


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return tiny().state_dict()


def assert_loads(path: Path, state: dict[str, Tensor]) -> None:
    loaded = build_backbone(tiny(), 5, weights=str(path)).model.state_dict()
    assert all(torch.equal(loaded[k], state[k]) for k in state)


def test_safetensors_and_export_folder(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "edit.json").write_text("{}")
    assert_loads(folder / "model.safetensors", state)
    assert_loads(folder, state)


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("a.pth", lambda s: s),
        ("a.pt", lambda s: {"state_dict": s, "epoch": 3}),
        ("a.bin", lambda s: {"model": s, "optimizer": {}}),
        ("b.pt", lambda s: {"model_state_dict": s}),
        ("c.pth", lambda s: {f"module.{k}": v for k, v in s.items()}),
        (
            "d.ckpt",
            lambda s: {
                "state_dict": {**{f"model.{k}": v for k, v in s.items()}, "loss.w": torch.ones(2)},
                "pytorch-lightning_version": "2.6.4",
            },
        ),
    ],
)
def test_forms_of_torch_files(
    tmp_path: Path, state: dict[str, Tensor], name: str, wrap: Any
) -> None:
    torch.save(wrap(state), tmp_path / name)
    assert_loads(tmp_path / name, state)


def test_old_torch_format(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_loads(tmp_path / "old.pth", state)


def test_half_precision_is_cast_to_the_model(tmp_path: Path, state: dict[str, Tensor]) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(half, tmp_path / "h.safetensors")
    loaded = build_backbone(tiny(), 5, weights=str(tmp_path / "h.safetensors")).model.state_dict()
    assert loaded["fc.weight"].dtype == torch.float32
    assert torch.equal(loaded["fc.weight"], half["fc.weight"].float())


def test_a_models_own_prefix_is_not_taken_off() -> None:
    own = {"model.a": torch.ones(1), "model.b": torch.ones(1)}
    assert set(match_names(own, own)) == set(own)
    assert set(match_names(own, {"a", "b"})) == {"a", "b"}


def test_head_width_of_the_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "w.safetensors")
    path = str(tmp_path / "w.safetensors")
    with pytest.raises(ShapeMismatch, match=r"has 5 classes, num_classes is 3.*ignore_head: true"):
        build_backbone(tiny(3), 3, weights=path)
    new = build_backbone(tiny(), 3, weights=path, ignore_head=True)
    assert new.num_classes == 3
    assert torch.equal(new.model.state_dict()["conv.weight"], state["conv.weight"])
    with pytest.raises(ShapeMismatch, match=r"fc.weight is \[5, 4\], the model's \[9, 4\]"):
        build_backbone(tiny(9), None, weights=path)


def test_head_width_comes_from_the_file_where_none_is_asked_for(tmp_path: Path) -> None:
    state = build_backbone("squeezenet1_1", 6).model.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    kept = build_backbone("squeezenet1_1", None, weights=str(tmp_path / "w.safetensors"))
    assert kept.num_classes == 6
    assert torch.equal(kept.model.state_dict()["classifier.1.bias"], state["classifier.1.bias"])


def test_ignore_head_still_wants_everything_else(tmp_path: Path, state: dict[str, Tensor]) -> None:
    del state["bn.weight"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CorruptFile, match=r"1 tensors missing \(bn.weight\)"):
        build_backbone(tiny(), 3, weights=str(tmp_path / "w.safetensors"), ignore_head=True)


def test_squeezenet_heads_mixed_up(tmp_path: Path) -> None:
    native, linear = tmp_path / "native.safetensors", tmp_path / "linear.safetensors"
    torch.manual_seed(0)
    old = build_backbone("squeezenet1_1", 6).model.state_dict()
    save_file(old, native)
    save_file(build_backbone("squeezenet1_1", 6, head="gap_linear").model.state_dict(), linear)
    with pytest.raises(CorruptFile, match="set `head: gap_linear`"):
        build_backbone("squeezenet1_1", 6, weights=str(linear))
    with pytest.raises(CorruptFile, match="`ignore_head: true` to start the new one"):
        build_backbone("squeezenet1_1", 6, weights=str(native), head="gap_linear")
    build_backbone("squeezenet1_1", 6, weights=str(linear), head="gap_linear")
    new = build_backbone(
        "squeezenet1_1", 4, weights=str(native), head="gap_linear", ignore_head=True
    )
    assert new.num_classes == 4
    features = {k: v for k, v in new.model.state_dict().items() if k.startswith("features.")}
    assert all(torch.equal(v, old[k]) for k, v in features.items())


class Payload:
    """Runs a command when it is unpickled by a reader that trusts its input."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_unsafe_pickles_do_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    torch.save({"fc.weight": Payload(mark)}, tmp_path / "evil.pth")
    with open(tmp_path / "plain.pth", "wb") as f:
        pickle.dump(Payload(mark), f, protocol=2)
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(CorruptFile, match=r"Python objects .*mkdir.*could run code"):
            read_state_dict(tmp_path / name)
    assert not mark.exists()


def test_whole_models_are_refused(tmp_path: Path) -> None:
    torch.save(tiny(), tmp_path / "model.pt")
    with pytest.raises(CorruptFile, match=r"Python objects .*Save the tensors alone: torch.save"):
        read_state_dict(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.ckpt"])
@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>404", b"hello world, no weights"])
def test_foreign_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptFile, match=r"Cannot read .*x\..*Copy or download it again"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "old"])
def test_truncated_files(tmp_path: Path, state: dict[str, Tensor], kind: str, share: float) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CorruptFile, match=str(path)):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds no state dict"),
        ({}, "holds no state dict"),
        ({"w": torch.ones(2), "epoch": 3}, r"no tensors \(epoch\)"),
    ],
)
def test_torch_files_without_a_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CorruptFile, match=message):
        read_state_dict(tmp_path / "w.pt")


def test_weights_of_another_model(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        CorruptFile,
        match=r"not hold the weights of resnet18: 120 tensors missing \(conv1.weight, .*, …\), "
        r"\d unexpected .*Choose the backbone",
    ):
        build_backbone("resnet18", 5, weights=str(tmp_path / "w.safetensors"))


def test_shapes_of_another_size(tmp_path: Path, state: dict[str, Tensor]) -> None:
    state["conv.weight"] = torch.zeros(4, 3, 5, 5)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        ShapeMismatch, match=r"conv.weight is \[4, 3, 5, 5\], the model's \[4, 3, 3, 3\]"
    ):
        build_backbone(tiny(), 5, weights=str(tmp_path / "w.safetensors"))


def test_nan_in_weights(tmp_path: Path, state: dict[str, Tensor]) -> None:
    state["bn.weight"][1] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(NotFinite, match=r"'bn.weight' .*w.safetensors"):
        build_backbone(tiny(), 5, weights=str(tmp_path / "w.safetensors"))


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "model_a.pth").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFile, match=r"No weight file at .*holds: model_a.pth"):
        build_backbone(tiny(), 5, weights=str(tmp_path / "model_b.pth"))
    with pytest.raises(MissingFile, match=r"a folder without model.safetensors"):
        build_backbone(tiny(), 5, weights=str(tmp_path / "empty"))


@pytest.mark.parametrize("weights", [None, "none", "random"])
def test_no_weights_leave_a_module_alone(weights: str | None, state: dict[str, Tensor]) -> None:
    own = tiny()
    own.load_state_dict(state)
    built = build_backbone(own, 5, weights=weights).model.state_dict()
    assert all(torch.equal(built[k], state[k]) for k in state)


def test_nothing_is_half_loaded(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """A refused file leaves the module as it was."""
    own = tiny()
    before = {k: v.clone() for k, v in own.state_dict().items()}
    state["fc.bias"] = torch.zeros(6)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(SalveError):
        build_backbone(own, 5, weights=str(tmp_path / "w.safetensors"))
    assert all(torch.equal(v, before[k]) for k, v in own.state_dict().items())
