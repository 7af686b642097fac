"""A language model with random weights, its tokenizer and a corpus, all made in this process."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from salve_lm.data.corpus import Corpus, Document
from salve_lm.modules.studied import StudiedModel

# many: equal contexts give equal activations, and batch-top-k breaks ties as it likes
WORDS = [f"w{i}" for i in range(600)]
LAYERS = 3
WIDTH = 16


def make_tokenizer():  # type: ignore[no-untyped-def]
    """One token a word, with BOS, EOS and padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip


class TinyLanguage(StudiedModel):
    """A Llama of three layers; what `LanguageModel` offers and nothing else."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=len(WORDS) + 4, hidden_size=WIDTH, intermediate_size=32,
                    num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
                    max_position_embeddings=64, initializer_range=0.3,
                )
            ).eval()  # fmt: skip
        self.tokenizer = make_tokenizer()
        self.head_name = "lm_head"
        self.sites = {
            f"resid_post.{n}": f"model.layers.{n}:output:positions" for n in range(LAYERS)
        }


class TinyCorpus(Corpus):
    """Documents of random words and random lengths."""

    def __init__(self, n: int = 60, seed: int = 0) -> None:
        self.n, self.seed = n, seed

    def documents(self) -> Sequence[Document]:
        """The same every time."""
        draw = random.Random(self.seed)
        return [
            Document(" ".join(draw.choices(WORDS, k=draw.randint(2, 30)))) for _ in range(self.n)
        ]
