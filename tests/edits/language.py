"""Tiny language models with random norms and biases, SAEs of their stream, and brute force."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from salve_lm.edits import EditSpec, PlainModel, apply_named, plan_edits
from salve_lm.edits.plan import Applied
from salve_lm.language import new_causal_lm
from salve_lm.language.names import decoder_name, decoder_prefix, final_norm_name
from tests.edits.tiny import write_sae
from tests.language.tiny_models import CONFIGS

WIDTH = 16
FAMILIES = ("llama", "gemma3_text", "gemma3", "gpt2")
SANDWICH = ("gemma3_text", "gemma3")
READERS = {
    "gpt2": ("attn.c_attn", "mlp.c_fc"),
    **dict.fromkeys(
        ("llama", *SANDWICH),
        (*(f"self_attn.{n}_proj" for n in "qkv"), "mlp.gate_proj", "mlp.up_proj"),
    ),
}
WRITERS = {
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    **dict.fromkeys(SANDWICH, ("self_attn.o_proj", "mlp.down_proj")),
}
BEFORE = {  # norms in front of the readers
    "gpt2": ("ln_1", "ln_2"),
    "llama": ("input_layernorm", "post_attention_layernorm"),
    **dict.fromkeys(SANDWICH, ("input_layernorm", "pre_feedforward_layernorm")),
}
BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")  # Gemma's, after the writers


class Language(NamedTuple):
    """One model and the autoencoders of its layers."""

    family: str
    model: PreTrainedModel
    saes: str  # with {layer}
    sae: str
    tokens: Tensor

    @property
    def layers(self) -> str:
        return decoder_prefix(self.model.config)

    @property
    def final_norm(self) -> str:
        return final_norm_name(self.model.config)

    @property
    def embedding(self) -> str:
        name = "wte" if self.family == "gpt2" else "embed_tokens"
        return f"{decoder_name(self.model.config)}.{name}.weight"

    def decoder(self, layer: int, latents: Sequence[int]) -> Tensor:
        """Decoder rows, float64 [n, WIDTH], read from the file."""
        from safetensors.torch import load_file

        file = next(Path(self.saes.format(layer=layer)).glob("*weights.safetensors"))
        return load_file(file)["W_dec"][list(latents)].double()

    def factors(self, layer: int, latents: Sequence[int], alpha: float, sign: int = -1) -> Tensor:
        """max(0, 1 +- alpha |c|), multiplied over the latents."""
        f = torch.ones(WIDTH, dtype=torch.float64)
        for row in self.decoder(layer, latents):
            f = f * (1 + sign * alpha * row.abs() / row.norm()).clamp(min=0)
        return f.float()

    def logits(self, replaced: dict[str, Tensor] | None = None) -> Tensor:
        with torch.no_grad():
            return functional_call(
                self.model, replaced or {}, kwargs={"input_ids": self.tokens}
            ).logits

    def edited(self, *edits: EditSpec) -> Applied:
        plans = plan_edits(edits, PlainModel(self.model, "lm_head"))
        return apply_named(self.model.state_dict(), [p.named for p in plans])

    def module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    @contextmanager
    def changed(
        self,
        names: Sequence[str],
        inputs: Callable[[Tensor], Tensor] | None = None,
        outputs: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    ) -> Iterator[None]:
        """Inputs or outputs of modules replaced by hooks."""
        with ExitStack() as stack:
            for name in names:
                module = self.module(name)
                if inputs is not None:
                    handle = module.register_forward_pre_hook(lambda _, a: (inputs(a[0]), *a[1:]))
                else:
                    handle = module.register_forward_hook(
                        lambda m, a, out: outputs(m, a[0], out)  # type: ignore[misc]
                    )
                stack.callback(handle.remove)
            yield


def build(folder: Path, family: str) -> Language:
    """A random model of `family` and three SAEs."""
    model = new_causal_lm(CONFIGS[family], 1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            # weights large enough that every layer matters
            p.add_(0.2 * noise if p.ndim == 1 else 0.3 * noise)
    for n in range(3):
        write_sae(folder / f"layer_{n}", seed=n, d_in=WIDTH)
    tokens = torch.randint(8, 200, (2, 9), generator=generator)
    saes = str(folder / "layer_{layer}")
    return Language(family, model, saes, saes.format(layer=1), tokens)


def tensors_of(model: nn.Module) -> dict[str, Any]:
    return {n: t.clone() for n, t in model.state_dict().items()}
