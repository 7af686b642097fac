"""Does reading several layers cost <= 1.1x the bare forward pass up to the deepest of them?

A Llama of `--layers` layers, random weights (its speed does not depend on them), batches of packed
text. Bare: the same forward pass, ended by an exception behind the deepest layer (so without later
layers, final norm and head), with nothing read. Harvest: `run_to` with one site a layer, as
`select_layers` and the training of residual-stream autoencoders use it. Also one site only, and
every layer in a pass of its own (what one pass saves). Interleaved, medians of process CPU time;
the spread is the quartiles of the ratio round by round.

    python benchmarks/harvest_layers.py [--width 256] [--layers 8] [--rounds 15] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from salve_lm.activations.hooks import run_to
from salve_lm.activations.sites import Site


class Reached(Exception):
    """Ends the bare pass at the deepest layer."""


def build(width: int, layers: int, vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=layers, num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64), max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bare(model: LlamaForCausalLM, deepest: int) -> Callable[[dict[str, object]], None]:
    """The forward pass up to layer `deepest`, reading nothing."""
    layer = model.model.layers[deepest]

    def stop(*_: object) -> None:
        raise Reached

    def forward(inputs: dict[str, object]) -> None:
        handle = layer.register_forward_hook(stop)
        try:
            with torch.no_grad(), suppress(Reached):
                model(**inputs)
        finally:
            handle.remove()

    return forward


def harvest(model: LlamaForCausalLM, layers: list[int]) -> Callable[[dict[str, object]], None]:
    sites = {str(n): Site(f"model.layers.{n}", "output", "positions") for n in layers}
    return lambda inputs: run_to(model, sites, inputs) and None


def apart(model: LlamaForCausalLM, layers: list[int]) -> Callable[[dict[str, object]], None]:
    each = [harvest(model, [n]) for n in layers]

    def forward(inputs: dict[str, object]) -> None:
        for one in each:
            one(inputs)

    return forward


def cpu_seconds(function: Callable[[dict[str, object]], None], inputs: dict[str, object]) -> float:
    start = time.process_time()
    function(inputs)
    return time.process_time() - start


def main() -> None:
    """Print one line of JSON a batch shape."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--deepest", type=int, default=None)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = build(options.width, options.layers, options.vocabulary)
    deepest = options.layers - 1 if options.deepest is None else options.deepest
    layers = list(range(deepest + 1))
    cases = {
        "bare": bare(model, deepest),
        "all_layers": harvest(model, layers),
        "one_layer": harvest(model, [deepest]),
        "a_pass_each": apart(model, layers),
    }
    for rows, context in ((1, 128), (4, 256)):
        ids: Tensor = torch.randint(0, options.vocabulary, (rows, context))
        position = torch.arange(context).expand(rows, -1).contiguous()
        inputs = {"input_ids": ids, "position_ids": position, "use_cache": False}
        taken: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(options.rounds + 1):  # the first is a warm-up
            for name, function in cases.items():
                seconds = cpu_seconds(function, inputs)
                if turn:
                    taken[name].append(seconds)
        ratio = sorted(a / b for a, b in zip(taken["all_layers"], taken["bare"], strict=True))
        medians = {name: statistics.median(times) for name, times in taken.items()}
        print(
            json.dumps(
                {
                    "rows": rows, "context": context, "layers": len(layers), "width": options.width,
                    "bare_ms": round(1e3 * medians["bare"], 2),
                    **{
                        f"{name}_over_bare": round(medians[name] / medians["bare"], 3)
                        for name in cases if name != "bare"
                    },
                    "ratio_quartiles": [
                        round(ratio[len(ratio) // 4], 3), round(ratio[3 * len(ratio) // 4], 3)
                    ],
                    "load": [round(x, 1) for x in os.getloadavg()],
                }
            )
        )  # fmt: skip


if __name__ == "__main__":
    main()
