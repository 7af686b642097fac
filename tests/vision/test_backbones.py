"""Models by name: shapes, heads, ready sites, and names that do not exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from salve_lm.activations.hooks import run_to
from salve_lm.activations.sites import parse_site
from salve_lm.errors import BadConfig, MissingFile, NameNotFound
from salve_lm.modules.studied import StudiedModel
from vision.backbones import Backbone, build_backbone

SMALL_VIT: dict[str, Any] = {"options": {"image_size": 32}}
# name, extra arguments, image size, head, width of the head's input
CASES = [
    ("resnet18", {}, 32, "fc", 512),
    ("resnet50", {}, 32, "fc", 2048),
    ("resnet101", {}, 32, "fc", 2048),
    ("vit_b_16", SMALL_VIT, 32, "heads.head", 768),
    ("squeezenet1_1", {}, 64, "classifier.1", 512),
    ("squeezenet1_1", {"head": "gap_linear"}, 64, "classifier.2", 512),
    ("torchvision:mobilenet_v3_small", {}, 32, "classifier.3", 1024),
    ("timm:vit_tiny_patch16_224", {"options": {"img_size": 32}}, 32, "head", 192),
    ("timm:resnet10t", {}, 32, "fc", 512),
    ("convnext_atto", {}, 32, "head.fc", 320),  # torchvision has no such name
]


def studied(backbone: Backbone) -> StudiedModel:
    wrapped = StudiedModel()
    wrapped.model, wrapped.head_name = backbone.model, backbone.head_name
    wrapped.sites = backbone.sites
    return wrapped


def read(backbone: Backbone, site: str, images: Tensor) -> Tensor:
    return run_to(backbone.model, {"x": parse_site(site, studied(backbone))}, images)["x"]


@pytest.mark.parametrize(("name", "extra", "size", "head", "d_in"), CASES)
def test_forward_backward_and_pooled_site(
    name: str, extra: dict[str, Any], size: int, head: str, d_in: int
) -> None:
    torch.manual_seed(0)
    built = build_backbone(name, num_classes=7, **extra)
    assert (built.head_name, built.num_classes) == (head, 7)
    images = torch.randn(2, 3, size, size)
    logits = built.model.train()(images)
    assert logits.shape == (2, 7)
    logits.pow(2).sum().backward()
    assert all(p.grad is not None for p in built.model.parameters())
    assert read(built, "pooled", images).shape == (2, d_in)


@pytest.mark.parametrize("case", [0, 3, 5, 7, 9])
def test_the_pooled_site_feeds_the_head(case: int) -> None:
    """head(x at `pooled`) are the logits: so edits of the head are exact there."""
    name, extra, size, head, _ = CASES[case]
    built = build_backbone(name, num_classes=7, **extra)
    model = built.model.eval()
    # torchvision's ViT starts with a head of zeros
    nn.init.normal_(model.get_submodule(head).weight)  # type: ignore[arg-type]
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        x = read(built, "pooled", images)
        torch.testing.assert_close(model.get_submodule(head)(x), model(images))


@pytest.mark.parametrize(
    ("name", "options", "cls"),
    [
        ("vit_b_16", {"image_size": 32}, "encoder.layers.encoder_layer_11:output:cls"),
        ("timm:vit_tiny_patch16_224", {"img_size": 32}, "blocks.11:output:cls"),
    ],
)
def test_cls_site_is_before_the_final_norm(name: str, options: dict[str, Any], cls: str) -> None:
    built = build_backbone(name, 4, options=options)
    assert built.sites["cls"] == cls
    model = built.model.eval()
    images = torch.randn(2, 3, 32, 32)
    norm = model.encoder.ln if name == "vit_b_16" else model.norm  # type: ignore[union-attr]
    with torch.no_grad():
        normed = norm(read(built, "cls", images))  # type: ignore[operator]
    torch.testing.assert_close(normed, read(built, "pooled", images))


@pytest.mark.parametrize("names", ["torchvision", "timm"])
def test_the_head_is_found_in_many_models(names: str) -> None:
    """Built without memory: what matters is which layer gets the classes."""
    import timm
    from torchvision import models

    if names == "torchvision":
        # RegNet cannot be built without memory
        chosen = [n for n in models.list_models(module=models) if not n.startswith("regnet")][::4]
    else:
        every = timm.list_models(exclude_filters=["*dist*", "levit*", "crossvit*", "repvit*"])
        chosen = [f"timm:{n}" for n in every[::90]]
    with torch.device("meta"):
        for name in chosen:
            slow = name in ("googlenet", "inception_v3")  # their random initialisation
            built = build_backbone(name, 7, options={"init_weights": False} if slow else None)
            noted = getattr(built.model, "pretrained_cfg", {}).get("classifier", built.head_name)
            assert (built.num_classes, built.head_name) == (7, noted), name
    assert len(chosen) > 12


def test_an_encoder_without_head_is_no_classifier() -> None:
    """timm notes a head for some encoders that have none; their last layer is not taken for it."""
    encoder = nn.Sequential(nn.Linear(3, 7))
    encoder.pretrained_cfg = {"classifier": "head"}  # type: ignore[assignment]
    with pytest.raises(BadConfig, match="no Linear or 1x1 Conv2d"):
        build_backbone(encoder, 7)


def test_convolutional_nets_have_no_cls_site() -> None:
    assert set(build_backbone("resnet18").sites) == {"pooled"}


def test_state_dict_and_description_fit_plain_torchvision() -> None:
    from torchvision import models

    built = build_backbone("resnet18", num_classes=10)
    plain = models.resnet18(num_classes=10)
    plain.load_state_dict(built.model.state_dict(), strict=True)
    assert type(built.model) is models.ResNet
    assert built.describe() == {
        "library": "torchvision",
        "name": "resnet18",
        "num_classes": 10,
        "head": "native",
        "head_name": "fc",
        "options": {},
    }


def test_gap_linear_loads_in_the_plain_code_of_its_docstring() -> None:
    from torchvision import models

    built = build_backbone("squeezenet1_1", 5, head="gap_linear")
    plain = models.squeezenet1_1()
    plain.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 5))
    plain.load_state_dict(built.model.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), built.model.eval()(images))


def test_num_classes_none_keeps_the_librarys_head() -> None:
    assert build_backbone("squeezenet1_1").num_classes == 1000


def test_a_seed_gives_the_weights_of_plain_torchvision() -> None:
    from torchvision import models

    torch.manual_seed(3)
    plain = models.resnet18(num_classes=10).state_dict()
    torch.manual_seed(3)
    built = build_backbone("resnet18", 10).model.state_dict()
    assert all(torch.equal(plain[k], built[k]) for k in plain)


def test_own_module() -> None:
    own = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4))
    built = build_backbone(own, num_classes=4)
    assert built.model is own
    assert (built.library, built.name) == ("module", "torch.nn.modules.container.Sequential")
    assert (built.head_name, built.sites) == ("3", {"pooled": "3:input"})


def test_own_modules_get_a_new_head_only_if_told_so() -> None:
    own = nn.Sequential(nn.Flatten(), nn.Linear(12, 6, bias=False))
    with pytest.raises(BadConfig, match=r"Sequential, '1', has 6 outputs and num_classes is 3"):
        build_backbone(own, num_classes=3)
    head = build_backbone(own, num_classes=3, ignore_head=True).model.get_submodule("1")
    assert isinstance(head, nn.Linear)
    assert (head.out_features, head.bias) == (3, None)


def test_head_name_points_past_an_auxiliary_layer() -> None:
    class TwoEnds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classify, self.reconstruct = nn.Linear(4, 3), nn.Linear(4, 4)

    assert build_backbone(TwoEnds()).head_name == "reconstruct"
    assert build_backbone(TwoEnds(), head_name="classify").head_name == "classify"
    with pytest.raises(NameNotFound, match=r"'clasify'. Did you mean 'classify'"):
        build_backbone(TwoEnds(), head_name="clasify")
    with pytest.raises(BadConfig, match=r"'fc' is a Conv1d; a head is a Linear or a 1x1 Conv2d"):
        build_backbone(nn.ModuleDict({"fc": nn.Conv1d(1, 1, 1)}), head_name="fc")


def test_model_without_a_linear_layer() -> None:
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    built = build_backbone(bare)
    assert (built.head_name, built.num_classes, built.sites) == (None, None, {})
    with pytest.raises(BadConfig, match="no Linear or 1x1 Conv2d that could be its head"):
        build_backbone(bare, num_classes=4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backbone": "resnet19"}, NameNotFound, "No backbone named 'resnet19'.*'resnet18'"),
        (
            {"backbone": "timm:vit_tiny_patch16_22"},
            NameNotFound,
            r"No backbone named.*'vit_tiny_patch16_224'",
        ),
        ({"backbone": "keras:resnet50"}, NameNotFound, "No library named 'keras'.*torchvision"),
        ({"backbone": "raft_small"}, BadConfig, "raft_small is no classifier"),
        (
            {"backbone": "resnet18", "options": {"img_size": 3}},
            BadConfig,
            "resnet18 does not take these options .*img_size",
        ),
        (
            {"backbone": "resnet18", "options": {"num_classes": 3}},
            BadConfig,
            "num_classes beside `options`",
        ),
        ({"backbone": "resnet18", "num_classes": 0}, BadConfig, "num_classes is 0"),
        (
            {"backbone": "resnet18", "head": "gap_linear"},
            BadConfig,
            "gap_linear is for SqueezeNet.*Leave `head` at native",
        ),
        (
            {"backbone": "timm:deit_tiny_distilled_patch16_224"},
            BadConfig,
            r"several heads \(head, head_dist\)",
        ),
        (
            {"backbone": "resnet18", "weights": "IMAGENET1K_V9"},
            NameNotFound,
            "No weights for resnet18 named 'IMAGENET1K_V9'.*'IMAGENET1K_V1'",
        ),
        (
            {"backbone": "timm:vit_tiny_patch16_224", "weights": "augreg_in22k"},
            NameNotFound,
            "'augreg_in22k'.*'augreg_in21k'",
        ),
        (
            {"backbone": nn.Linear(2, 2), "weights": "DEFAULT"},
            BadConfig,
            "no public weights 'DEFAULT'.*local file",
        ),
        (
            {"backbone": nn.Linear(2, 2), "options": {"bias": False}},
            BadConfig,
            "init_args instead",
        ),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_backbone(**arguments)


def test_download_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    from torchvision.models import WeightsEnum

    def offline(self: object, *args: object, **kwargs: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    with pytest.raises(MissingFile, match=r"could not be downloaded: .*not known.* give `weights`"):
        build_backbone("resnet18", weights="DEFAULT")


def test_public_weights_get_a_new_head(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    public = models.resnet18().state_dict()
    asked = []

    def download(self: object, *args: object, **kwargs: object) -> dict[str, Tensor]:
        asked.append(str(self))
        return public

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", download)
    built = build_backbone("resnet18", num_classes=10, weights="IMAGENET1K_V1")
    assert asked == ["ResNet18_Weights.IMAGENET1K_V1"]
    assert built.num_classes == 10
    own = built.model.state_dict()
    assert torch.equal(own["conv1.weight"], public["conv1.weight"])
    assert build_backbone("resnet18", weights="DEFAULT").num_classes == 1000
