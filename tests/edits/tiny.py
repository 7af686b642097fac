"""Tiny networks, a LinearL1 SAE and a feature table that belong together, all generated."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from salve_lm.edits.context import EditContext
from salve_lm.edits.resolve import PlainModel
from salve_lm.features import FeatureTable, StreamingFeatureStatistics

D_IN, D_SAE = 8, 12
NAMES = ["church", "golf ball", "tower", "pump"]
K = len(NAMES)


class Net(nn.Module):
    """[n, 5] -> [n, K]: a hidden layer with a ReLU, then the head `fc`."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.hidden = nn.Linear(5, D_IN)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(D_IN, K, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.hidden(x)))


class Conv1D(nn.Module):
    """GPT-2's linear layer as transformers has it: weight [d_in, d_out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Fixture(NamedTuple):
    """A trained-looking classifier head, its inputs, and the artefacts made from them."""

    studied: PlainModel
    sae: str
    features: str
    x: Tensor  # [n, D_IN], never negative
    label: Tensor
    context: EditContext

    @property
    def table(self) -> FeatureTable:
        return self.context.table(self.features)

    @property
    def decoder(self) -> Tensor:
        """W_dec [D_SAE, D_IN], float64."""
        return self.context.sae(self.sae).decoder(torch.arange(D_SAE))

    @property
    def encoder(self) -> Tensor:
        """W_enc [D_IN, D_SAE], float64."""
        return self.context.sae(self.sae).encoder(torch.arange(D_SAE))

    @property
    def paths(self) -> dict[str, str]:
        return {"sae": self.sae, "features": self.features}


def activations(n: int = 120, seed: int = 0, lowest: float = 0.0) -> tuple[Tensor, Tensor]:
    """Clusters of K classes, [n, D_IN], and their labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % K
    centres = 2 * torch.rand(K, D_IN, generator=generator)
    x = centres[label] + 0.3 * torch.randn(n, D_IN, generator=generator)
    return x.clamp(min=lowest), label


def fitted_head(x: Tensor, label: Tensor) -> nn.Linear:
    """The least-squares classifier of `x`."""
    targets = nn.functional.one_hot(label, K).double() * 8 - 2
    design = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    solution = torch.linalg.lstsq(design, targets).solution.float()
    head = nn.Linear(D_IN, K)
    with torch.no_grad():
        head.weight.copy_(solution[:D_IN].T)
        head.bias.copy_(solution[D_IN])
    return head


def write_sae(folder: Path, seed: int = 0, d_in: int = D_IN, zero_row: int | None = None) -> str:
    """A LinearL1 SAE with random weights."""
    from salve_lm.sae import LinearL1, LinearL1Config, save_sae

    sae = LinearL1(LinearL1Config(d_in=d_in, d_sae=D_SAE))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(sae.named_parameters()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / (1 + len(name) % 3))
        if zero_row is not None:
            sae.W_dec[zero_row] = 0
    save_sae(sae, folder)
    return str(folder)


def write_table(folder: Path, sae: str, x: Tensor, label: Tensor) -> str:
    """The feature table of `sae` on `x`."""
    from salve_lm.sae import hash_sae, load_sae

    loaded = load_sae(sae)
    statistics = StreamingFeatureStatistics(D_IN, D_SAE, K)
    with torch.no_grad():
        statistics.update(x, loaded.encode(x), label)
        norms = loaded.W_dec.norm(dim=1)
    statistics.finalize(NAMES, norms, {"sae": hash_sae(sae)}).save(folder)
    return str(folder)


def build(folder: Path, lowest: float = 0.0) -> Fixture:
    """Everything an edit needs, in `folder`."""
    torch.manual_seed(0)
    x, label = activations(lowest=lowest)
    net = Net()
    net.fc = fitted_head(x, label)
    sae = write_sae(folder / "sae")
    features = write_table(folder / "features", sae, x, label)
    return Fixture(PlainModel(net.eval(), "fc"), sae, features, x, label, EditContext())


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {n: t.clone() for n, t in model.state_dict().items()}
