"""Autoencoders for n layers in one run, against n runs of one layer each.

A run of its own makes the activations of its layer: it runs the language model up to there. One run
for all runs it once, up to the deepest layer. So the one run must cost less than the sum of the
others by at least the forward passes that it saves, which are timed apart. And harvesting several
layers may cost 1.1 times the bare forward pass up to the deepest of them.

CPU time of the process with one thread; all variants take turns in every round; medians over rounds
after a warm-up round.

    python benchmarks/many_saes.py
    python benchmarks/many_saes.py --layers 12 --width 256 --d-sae 2048
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer

from salve_lm.activations.hooks import run_to
from salve_lm.activations.sites import parse_site
from salve_lm.activations.tokens_data import TokenActivationData
from salve_lm.data.corpus import Corpus, Document
from salve_lm.modules.sae_group import SAEGroupTraining
from salve_lm.modules.studied import StudiedModel

VOCABULARY = 1000
MARGIN = 1.1


class RandomModel(StudiedModel):
    """A Llama with random weights, and a tokenizer of one token a word."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).eval()
        words = {"<bos>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
        )
        self.head_name = "lm_head"
        self.sites = {f"resid_post.{n}": f"model.layers.{n}:output:positions" for n in
                      range(layers)}  # fmt: skip


class RandomText(Corpus):
    """Words drawn at random."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens

    def documents(self) -> Sequence[Document]:
        """Documents of 500 words."""
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(2, VOCABULARY, (self.n_tokens // 500 + 1, 500), generator=draw)
        return [Document(" ".join(f"w{i}" for i in row)) for row in ids.tolist()]


def timed(work: Callable[..., object], *args: object) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work(*args)
    return time.process_time() - start


class Bench:
    """All variants on the same model and text."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = RandomModel(args.layers, args.width)
        self.sites = list(self.model.sites)
        self.text = RandomText(args.steps * args.batch)

    def data(self, sites: list[str]) -> TokenActivationData:
        """Activations of `sites`, made on the fly."""
        args = self.args
        made = TokenActivationData(
            self.model, self.text, sites=sites, context=args.context, batch_size=args.batch,
            buffer_rows=8 * args.batch, sequences=args.sequences,
        )  # fmt: skip
        made.setup("fit")
        return made

    def train(self, data: TokenActivationData) -> None:
        """Train one autoencoder for each site of `data`."""
        group = SAEGroupTraining(
            architecture=self.args.architecture, d_sae=self.args.d_sae, lr=1e-3
        )
        Trainer(
            max_steps=self.args.steps, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10**6,
            limit_val_batches=0,
        ).fit(group, datamodule=data)  # fmt: skip

    def windows(self) -> list[dict[str, Any]]:
        """What the model is run on in one run, without padding or rests."""
        windows = self.data(self.sites[:1]).windows("train")
        n = self.args.steps * self.args.batch // self.args.context
        parts = torch.arange(min(n, len(windows))).split(self.args.sequences)
        return [windows.batch(part).model_inputs() for part in parts]

    def bare(self, inputs: list[dict[str, Any]], layers: int) -> None:
        """The decoder's own forward pass, cut behind `layers` layers."""
        decoder: Any = self.model.model.model
        whole = decoder.layers
        decoder.layers, decoder.config.num_hidden_layers = whole[:layers], layers
        try:
            with torch.no_grad():
                for batch in inputs:
                    decoder(**batch)
        finally:
            decoder.layers, decoder.config.num_hidden_layers = whole, len(whole)

    def harvest(self, inputs: list[dict[str, Any]]) -> None:
        """All sites, read in one pass."""
        places = {site: parse_site(site, self.model) for site in self.sites}
        for batch in inputs:
            run_to(self.model.model, places, batch)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(args)
    inputs = bench.windows()
    together = bench.data(bench.sites)
    alone = [bench.data([site]) for site in bench.sites]
    rounds: dict[str, list[float]] = {name: [] for name in
                                      ("together", "alone", "forward passes saved", "harvest",
                                       "bare forward pass")}  # fmt: skip
    for _ in range(args.rounds + 1):
        rounds["together"].append(timed(bench.train, together))
        rounds["alone"].append(sum(timed(bench.train, data) for data in alone))
        passes = [timed(bench.bare, inputs, n) for n in range(1, args.layers + 1)]
        rounds["forward passes saved"].append(sum(passes[:-1]))
        rounds["bare forward pass"].append(passes[-1])
        rounds["harvest"].append(timed(bench.harvest, inputs))
    return {name: [round(s, 3) for s in seconds[1:]] for name, seconds in rounds.items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--architecture", default="standard")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the record to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    seconds = measure(args)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        print(f"{name:>22}  {value:7.2f} CPU s   {seconds[name]}")
    # round by round: neighbours in time saw the same machine
    saved = [a - t for a, t in zip(seconds["alone"], seconds["together"], strict=True)]
    share = statistics.median(
        s / f for s, f in zip(saved, seconds["forward passes saved"], strict=True)
    )
    harvest = statistics.median(
        h / b for h, b in zip(seconds["harvest"], seconds["bare forward pass"], strict=True)
    )
    speed = statistics.median(
        a / t for a, t in zip(seconds["alone"], seconds["together"], strict=True)
    )
    print(f"one run is {speed:.2f} times as fast as {args.layers}; of the forward passes that it "
          f"need not make it saves {share:.2f} (target 1)")  # fmt: skip
    print(f"harvest of {args.layers} layers / bare forward pass: {harvest:.3f} (target {MARGIN})")
    record = {"arguments": vars(args), "torch": torch.__version__, "seconds": seconds,
              "saved / forward passes": share, "harvest / bare": harvest,
              "alone / together": speed}  # fmt: skip
    if args.json:
        with open(args.json, "w") as f:
            json.dump(record, f, indent=2)
    return int(share < 1 or harvest > MARGIN)


if __name__ == "__main__":
    sys.exit(main())
