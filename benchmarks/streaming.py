"""How much of a language model's work does prefetching hide behind an autoencoder's training?

Activations of a Llama with random weights, streamed through the shuffle buffer of
`TokenActivationData`, and an L1 autoencoder's five products with fused Adam on each batch: the same
steps with and without `prefetch`, interleaved. Reported are medians of wall time, of CPU time, and
of the time that the training waited for batches. Both the model and the step have `--threads`
threads; on a machine with one free core nothing can be gained, and with two at most the smaller of
the two parts. The batches, and so the losses, are compared and must be equal to the bit.

    python benchmarks/streaming.py [--width 256] [--layers 4] [--d-sae 2048] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from salve_lm.activations.tokens_data import TokenActivationData
from salve_lm.data.corpus import Corpus, Document
from salve_lm.modules.studied import StudiedModel

WORDS = [f"w{i}" for i in range(2000)]


class Model(StudiedModel):
    """A Llama with random weights and a tokenizer of one token a word."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        special = ["<pad>", "<bos>", "<eos>", "<unk>"]
        vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
            unk_token="<unk>",
        )  # fmt: skip
        torch.manual_seed(0)
        heads = max(1, width // 64)
        config = LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
            max_position_embeddings=512,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).eval()
        self.head_name = "lm_head"
        self.sites = {"deepest": f"model.layers.{layers - 1}:output:positions"}


class Words(Corpus):
    """Documents of random words."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def documents(self) -> Sequence[Document]:
        """The same every time."""
        draw = random.Random(0)
        return [Document(" ".join(draw.choices(WORDS, k=200))) for _ in range(self.tokens // 200)]


class Taken(NamedTuple):
    """Seconds of one pass, and its last loss."""

    wall: float
    cpu: float
    waited: float
    loss: float


def train(data: TokenActivationData, width: int, d_sae: int) -> Taken:
    torch.manual_seed(1)
    W_enc = nn.Parameter(torch.randn(width, d_sae) / width**0.5)
    W_dec = nn.Parameter(W_enc.detach().T.clone())
    optimizer = torch.optim.Adam([W_enc, W_dec], fused=True)
    start, cpu, waited, loss = time.perf_counter(), time.process_time(), 0.0, torch.zeros(())
    batches = iter(data.train_dataloader())
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        x = batch.x["deepest"]
        z = torch.relu(x @ W_enc)
        loss = (z @ W_dec - x).square().sum(1).mean() + 0.1 * z.sum(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wall = time.perf_counter() - start
    return Taken(wall, time.process_time() - cpu, waited, float(loss.detach()))


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--buffer-rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    model = Model(options.width, options.layers)
    cases = {}
    for prefetch in (False, True):
        cases[prefetch] = TokenActivationData(
            model=model, train=Words(options.tokens), sites=["deepest"], context=128,
            batch_size=1024, buffer_rows=options.buffer_rows, sequences=8, prefetch=prefetch,
        )  # fmt: skip
        cases[prefetch].setup("fit")
    taken: dict[bool, list[Taken]] = {False: [], True: []}
    for turn in range(options.rounds + 1):  # the first is a warm-up
        for prefetch, data in cases.items():
            one = train(data, options.width, options.d_sae)
            if turn:
                taken[prefetch].append(one)
    if [t.loss for t in taken[False]] != [t.loss for t in taken[True]]:
        raise RuntimeError("prefetching changed the losses")
    median = {
        name: {
            field: round(statistics.median(getattr(t, field) for t in taken[prefetch]), 2)
            for field in ("wall", "cpu", "waited")
        }
        for name, prefetch in (("alone", False), ("prefetch", True))
    }
    gain = round(median["alone"]["wall"] / median["prefetch"]["wall"], 2)
    load = round(os.getloadavg()[0], 1)
    print(json.dumps({**vars(options), **median, "wall_gain": gain, "load": load}))


if __name__ == "__main__":
    main()
