"""Which tensors of a decoder layer read or write the residual stream, and through which gain.

A vector v of the residual stream reaches a reading matrix W behind a norm as G v / rms, with G the
norm's gain: W G is what acts on directions of the stream. A matrix whose output passes a norm
before it is added (Gemma 2 and 3, OLMo 2) writes G W. The norm's scalar 1 / rms turns no direction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from salve_lm.errors import UnsupportedEdit
from salve_lm.language.names import decoder_prefix, final_norm_name, layer_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class ResidualRole(NamedTuple):
    """How one tensor touches the residual stream.

    Attributes:
        reads: it reads the stream; otherwise it writes it.
        axis: dimension of the stored tensor that runs over the stream.
        norm: full name of the gain between the tensor and the stream; None where there is none.
        offset: the norm multiplies by offset + weight: 1 for Gemma, otherwise 0.
        centred: the norm takes away the mean over the stream first (LayerNorm), so that the
            direction of all ones is never read.
    """

    reads: bool
    axis: int
    norm: str | None
    offset: float = 0.0
    centred: bool = False

    def gain(self, weight: Tensor) -> Tensor:
        """What the norm multiplies by, float64 [d_model], from its stored `weight`."""
        return weight.double() + self.offset


class _Norms(NamedTuple):
    """Norms, by name inside a layer, before the two readings and behind the two writings."""

    before_attention: str | None
    before_mlp: str | None
    after_attention: str | None = None
    after_mlp: str | None = None
    offset: float = 0.0


_BEFORE = _Norms("input_layernorm", "post_attention_layernorm")
_AFTER = _Norms(None, None, "post_attention_layernorm", "post_feedforward_layernorm")
_SANDWICH = _Norms(
    "input_layernorm", "pre_feedforward_layernorm",
    "post_attention_layernorm", "post_feedforward_layernorm", 1.0,
)  # fmt: skip
_FAMILIES = {
    **dict.fromkeys(
        ("llama", "mistral", "ministral", "granite", "phi3", "qwen2", "qwen3", "smollm3"), _BEFORE
    ),
    "gemma": _BEFORE._replace(offset=1.0),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), _SANDWICH),
    **dict.fromkeys(("olmo2", "olmo3"), _AFTER),
}
_READ_ATTENTION = tuple(f"self_attn.{n}_proj.weight" for n in ("q", "k", "v", "qkv"))
_READ_MLP = tuple(f"mlp.{n}_proj.weight" for n in ("gate", "up", "gate_up"))


def residual_role(name: str, config: PreTrainedConfig) -> ResidualRole | None:
    """How the tensor `name` of a decoder layer touches the residual stream.

    None for what has no axis of its own over the stream, or none that a linear map could act on:
    gains of norms (diagonal), biases of reading layers, the norms inside attention heads; and for
    every tensor outside of the decoder layers.

    Args:
        name: full name in memory.
        config: of the model.

    Raises:
        UnsupportedEdit: a family whose layers are not known here.
    """
    layer = layer_of(name, config)
    if layer is None:
        return None
    prefix = f"{decoder_prefix(config)}.{layer}."
    inside = name.removeprefix(prefix)
    if config.model_type == "gpt2":
        return _gpt2(prefix, inside)
    norms = _family(config)

    def role(reads: bool, axis: int, norm: str | None) -> ResidualRole:
        full = None if norm is None else f"{prefix}{norm}.weight"
        return ResidualRole(reads, axis, full, norms.offset if full else 0.0)

    if inside in _READ_ATTENTION:
        return role(True, 1, norms.before_attention)
    if inside in _READ_MLP:
        return role(True, 1, norms.before_mlp)
    if inside in ("self_attn.o_proj.weight", "self_attn.o_proj.bias"):
        return role(False, 0, norms.after_attention)
    if inside in ("mlp.down_proj.weight", "mlp.down_proj.bias"):
        return role(False, 0, norms.after_mlp)
    return None


def head_role(config: PreTrainedConfig) -> ResidualRole:
    """How the unembedding, `lm_head.weight`, reads the residual stream: behind the final norm.

    Raises:
        UnsupportedEdit: a family whose layers are not known here.
    """
    norm = f"{final_norm_name(config)}.weight"
    if config.model_type == "gpt2":
        return ResidualRole(True, 1, norm, centred=True)
    return ResidualRole(True, 1, norm, _family(config).offset)


def norm_offset(config: PreTrainedConfig) -> float:
    """What the norms of the stream add to their weight: 1 for Gemma, otherwise 0.

    Raises:
        UnsupportedEdit: a family whose layers are not known here.
    """
    return 0.0 if config.model_type == "gpt2" else _family(config).offset


def _family(config: PreTrainedConfig) -> _Norms:
    norms = _FAMILIES.get(config.model_type)
    if norms is None:
        raise UnsupportedEdit(
            f"Which tensors of a {config.model_type!r} layer read and write the residual stream "
            f"is not known here. Known: gpt2, {', '.join(sorted(_FAMILIES))}. `variant: raw` needs "
            "no such knowledge."
        )
    return norms


def stores_inputs_first(name: str, ndim: int, config: PreTrainedConfig) -> bool:
    """Whether the tensor is the weight of GPT-2's Conv1D, [d_in, d_out]."""
    return config.model_type == "gpt2" and ndim == 2 and layer_of(name, config) is not None


def _gpt2(prefix: str, inside: str) -> ResidualRole | None:
    """GPT-2: LayerNorm before each part; Conv1D, which stores its weights inputs first."""
    before = {"attn.c_attn.weight": "ln_1", "mlp.c_fc.weight": "ln_2"}
    if inside in before:
        return ResidualRole(True, 0, f"{prefix}{before[inside]}.weight", centred=True)
    if inside in ("attn.c_proj.weight", "mlp.c_proj.weight"):
        return ResidualRole(False, 1, None)
    if inside in ("attn.c_proj.bias", "mlp.c_proj.bias"):
        return ResidualRole(False, 0, None)
    return None
