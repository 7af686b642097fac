"""Is Grad-FAM of all latents of a batch >= 10x faster in closed form than one backward a latent?

A torchvision trunk with random weights, its pooled site, a ReLU SAE on it, one batch of noise.

From images to maps, every row with its forward pass(es); `forward` alone bounds all ratios:

- `closed form`: `grad_fam(method="closed_form")`.
- `autograd`: `grad_fam(method="autograd")`: one forward pass, then one backward pass a latent that
  fires, only from the latent down to the last feature map. The strongest form of the loop.
- `torchcam, graph kept`: torchcam's GradCAM, one forward pass, then one call a latent, which also
  goes down to the feature map only, but skips no silent latents.
- `torchcam, pass each`: torchcam without `retain_graph`, so that every latent has a forward pass;
  timed on `--timed` latents and scaled up.

`maps only` leaves the forward pass out of both: from the feature maps in hand to the heatmaps.
Runs are interleaved; medians of wall time and of this thread's CPU time.

    python benchmarks/grad_fam.py [--backbone resnet18] [--size 128] [--batch 16] [--latents 512]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchcam.methods import GradCAM

from salve_lm.activations.hooks import run_to
from salve_lm.activations.sites import Site
from salve_lm.sae import build_training_sae, to_inference
from vision.backbones import build_backbone
from vision.grad_fam import autograd_maps, closed_form_maps, grad_fam
from vision.site_forward import forward_to
from vision.spatial_layer import find_layer


class Latents(nn.Module):
    """Images to latents: what torchcam explains."""

    def __init__(self, model: nn.Module, sae: Any, site: Site) -> None:
        super().__init__()
        self.model, self.sae = model, sae
        model.get_submodule(site.module).register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.x = args[0]

    def forward(self, images: Tensor) -> Tensor:
        """Latents [n, d_sae]."""
        self.model(images)
        return self.sae.encode(self.x)


def measure(run: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.thread_time()
    run()
    return time.perf_counter() - wall, time.thread_time() - cpu


def compare(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    built = build_backbone(args.backbone, num_classes=10)
    model = built.model.eval()
    site = Site(str(built.head_name), "input")
    images = torch.randn(args.batch, 3, args.size, args.size)
    d_in = run_to(model, {"x": site}, images)["x"].shape[1]
    sae = to_inference(build_training_sae("standard", d_in, args.latents, seed=0))
    layer = find_layer(model, site, images[:1])
    explained = Latents(build_backbone(args.backbone, num_classes=10).model, sae, site)
    explained.model.load_state_dict(model.state_dict())
    explained.eval()
    cam = GradCAM(explained, f"model.{layer.module}")

    def forward() -> object:
        return run_to(model, {"x": site}, images)

    def closed() -> Tensor:
        return grad_fam(model, sae, site, images, method="closed_form").maps

    def autograd() -> Tensor:
        return grad_fam(model, sae, site, images, method="autograd").maps

    def torchcam_kept() -> Tensor:
        z = explained(images)
        maps = [cam(i, z, normalized=False, retain_graph=True)[0] for i in range(args.latents)]
        return torch.stack(maps, dim=1)

    size, every, plus = (args.size, args.size), list(range(args.latents)), torch.ones(args.latents)
    plain = forward_to(model, site, images, layer)
    hung = forward_to(model, site, images, layer, graph=True)

    def closed_only() -> Tensor:
        return closed_form_maps(model, sae, layer, plain, size, every, plus)[0]

    def autograd_only() -> Tensor:
        return autograd_maps(model, sae, layer, hung, size, every, plus)[0]

    def torchcam_each() -> None:
        for i in range(args.timed):
            cam(i, explained(images), normalized=False)

    runs: dict[str, Callable[[], object]] = {
        "forward": forward,
        "closed form": closed,
        "autograd": autograd,
        "torchcam, graph kept": torchcam_kept,
        "torchcam, pass each": torchcam_each,
        "maps only, closed form": closed_only,
        "maps only, autograd": autograd_only,
    }
    against = {
        "autograd": "closed form",
        "torchcam, graph kept": "closed form",
        "torchcam, pass each": "closed form",
        "maps only, autograd": "maps only, closed form",
    }
    expected = closed()
    difference = {
        name: float((run() - expected).abs().max() / expected.abs().max())
        for name, run in (("autograd", autograd), ("torchcam", torchcam_kept))
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            factor = args.latents / args.timed if name == "torchcam, pass each" else 1.0
            wall, cpu = measure(run)
            times[name].append((wall * factor, cpu * factor))
    medians = {
        name: [statistics.median(t[i] for t in rows) for i in (0, 1)]
        for name, rows in times.items()
    }
    return {
        "seconds": medians,
        "ratio": {
            name: [medians[name][i] / medians[ours][i] for i in (0, 1)]
            for name, ours in against.items()
        },
        "max_relative_difference": difference,
        "map": list(expected.shape),
        "firing_share": float((expected.amax(dim=(2, 3)) > 0).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--timed", type=int, default=4, help="latents of the slowest row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    result = compare(args)
    if args.json:
        print(json.dumps(vars(args) | {"load": [load, os.getloadavg()[0]]} | result))
        return
    print(
        f"{args.backbone}, {args.batch} images of {args.size} px, {args.latents} latents, maps "
        f"{result['map']}, {args.threads} thread(s), medians of {args.repeats};"
    )
    print(f"load average {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    print(f"{'':26}{'wall ms':>10}{'CPU ms':>10}{'wall ratio':>12}{'CPU ratio':>11}")
    for name, (wall, cpu) in result["seconds"].items():
        ratio = result["ratio"].get(name)
        shown = f"{ratio[0]:12.1f}{ratio[1]:11.1f}" if ratio else ""
        print(f"{name:26}{wall * 1e3:10.1f}{cpu * 1e3:10.1f}{shown}")
    print(f"largest relative difference: {result['max_relative_difference']}")
    print(f"maps that are not zero: {result['firing_share']:.0%}")


if __name__ == "__main__":
    main()
