"""A tiny convolutional classifier and tiny generated images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from salve_lm.data.labelled import LabelledData, Split
from salve_lm.hashing import hash_tensors
from salve_lm.modules.studied import StudiedModel

D_IN = 6


class Reached(nn.Module):
    """Identity that counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x


class TinyNet(nn.Module):
    """[n, 1, 6, 6] -> [n, n_classes] through conv, norm, ReLU, pool, dropout and a linear head."""

    def __init__(self, n_classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, D_IN, 3)
        self.norm = nn.BatchNorm2d(D_IN)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(D_IN, n_classes)
        self.after = Reached()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.conv(x))))
        return self.after(self.fc(self.drop(x.flatten(1))))


class TinyStudied(StudiedModel):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = TinyNet()
            self.model.norm.running_mean += torch.randn(D_IN) / 4
        self.head_name = "fc"
        self.sites = {"pooled": "fc:input"}


class TinyData(LabelledData):
    """Generated images; `labels` may name the labels of the training split."""

    def __init__(
        self,
        n_train: int = 23,
        n_val: int = 11,
        seed: int = 0,
        labels: list[int] | None = None,
        bad_sample: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size, self.num_workers = 5, 0
        self.sizes = {"train": n_train, "val": n_val, "test": 7}
        self.seed, self.labels, self.bad_sample = seed, labels, bad_sample
        self.set_up: list[str] = []

    def setup(self, stage: str) -> None:
        self.set_up.append(stage)
        self.class_names = ["ant", "bee", "cat"]

    def tensors(self, split: Split) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 * self.seed + len(split))
        images = torch.randn(self.sizes[split], 1, 6, 6, generator=generator)
        if split == "train" and self.bad_sample is not None:
            images[self.bad_sample, 0, 2, 2] = torch.nan
        if split == "train" and self.labels is not None:
            return images, torch.tensor(self.labels)
        return images, torch.arange(self.sizes[split]) % 3

    def eval_dataset(self, split: Split) -> Dataset:
        return TensorDataset(*self.tensors(split))

    def fingerprint(self, split: Split) -> str:
        images, labels = self.tensors(split)
        return hash_tensors({"images": images, "labels": labels})

    def describe(self, split: Split, index: int) -> str:
        return f"{split}/image-{index}.png"


def ready_data(**options: object) -> TinyData:
    """`TinyData` after `setup`."""
    data = TinyData(**options)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def pooled(studied: StudiedModel, images: Tensor) -> Tensor:
    """The head's input, written out without hooks: the oracle for the site `pooled`."""
    net = studied.model
    norm = net.norm
    with torch.no_grad():
        x = nn.functional.conv2d(images, net.conv.weight, net.conv.bias)
        x = nn.functional.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
        )
        return x.clamp(min=0).mean(dim=(2, 3))
