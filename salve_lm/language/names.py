"""What the tensors of a causal language model are called, in memory and on disk.

The one place for names. A model in memory is what `AutoModelForCausalLM` makes of a configuration;
on disk the same tensors may have other names: Gemma 3 with images keeps those of its first release
(`language_model.model.layers.0...` for `model.language_model.layers.0...`), and checkpoints of a
model without its head lack the first word (`h.0...` for `transformer.h.0...`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salve_lm.errors import BadConfig, CorruptFile, MissingFile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EMBEDDING, HEAD = "embed_tokens", "lm_head"


@dataclass(frozen=True)
class _Layout:
    """Names of one family in memory, and how its files may spell them.

    Attributes:
        decoder: prefix of the text decoder, without its layers.
        layers: name of the list of layers in it.
        embedding: name of the token embedding in it.
        norm: name of the final norm in it.
        spellings: (prefix on disk, prefix in memory), the longer first; the first that fits counts.
            For names of one prefix in memory, they stand in order of preference.
    """

    decoder: str
    layers: str
    embedding: str
    norm: str
    spellings: tuple[tuple[str, str], ...]


_LLAMA = _Layout(
    "model", "layers", EMBEDDING, "norm",
    (("model.", "model."), (f"{HEAD}.", f"{HEAD}."), ("", "model.")),
)  # fmt: skip
_GPT2 = _Layout(
    "transformer", "h", "wte", "ln_f",
    (("transformer.", "transformer."), (f"{HEAD}.", f"{HEAD}."), ("", "transformer.")),
)  # fmt: skip
_GEMMA3 = _Layout(
    "model.language_model", "layers", EMBEDDING, "norm",
    (
        ("language_model.model.", "model.language_model."),
        (f"language_model.{HEAD}.", f"{HEAD}."),
        ("language_model.", "model.language_model."),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("model.vision_tower.vision_model.", "model.vision_tower."),
        ("model.", "model."),
        (f"{HEAD}.", f"{HEAD}."),
    ),
)  # fmt: skip
# `model_type` -> layout. Others are refused: a guessed prefix would name no tensor, or a wrong one.
_LAYOUTS = {
    "gpt2": _GPT2,
    "gemma3": _GEMMA3,
    **dict.fromkeys(
        (
            "gemma", "gemma2", "gemma3_text", "granite", "llama", "ministral", "mistral", "olmo",
            "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
        ),
        _LLAMA,
    ),
}  # fmt: skip


def load_config(source: str | Path, *, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a Hugging Face folder, or of a public model by name.

    Raises:
        MissingFile: no such folder, no `config.json` in it, or no public model of that name.
        CorruptFile: `config.json` is not one of a model that transformers knows.
    """
    from transformers import AutoConfig

    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise MissingFile(
            f"No config.json in {source}. Give a Hugging Face folder: config.json, "
            "model.safetensors (or shards with their index), tokenizer.json."
        )
    try:
        return AutoConfig.from_pretrained(str(source), revision=revision)
    except (OSError, ValueError, KeyError) as e:
        if folder.is_dir():
            raise CorruptFile(
                folder / "config.json",
                f"transformers does not know it ({first_line(e)})",
                "Give the folder of a causal language model, or update transformers.",
            ) from e
        raise MissingFile(
            f"No model {str(source)!r}: no such folder, and no public model of that name within "
            f"reach ({first_line(e)}). Check the path; for a public name, check the network, and "
            "log in (`hf auth login`) where its licence has to be accepted."
        ) from e


def text_config(config: PreTrainedConfig) -> Any:
    """The part of `config` that describes the text decoder: itself, unless there are images."""
    return config.get_text_config(decoder=True)


def decoder_name(config: PreTrainedConfig) -> str:
    """Name in memory of the text decoder, such as `model` or `model.language_model`."""
    return _layout(config).decoder


def decoder_prefix(config: PreTrainedConfig) -> str:
    """Name in memory of the list of decoder layers, such as `model.layers` or `transformer.h`.

    Raises:
        BadConfig: a family whose names are not known here.
    """
    layout = _layout(config)
    return f"{layout.decoder}.{layout.layers}"


def embedding_name(config: PreTrainedConfig) -> str:
    """Name in memory of the token embedding's weight."""
    layout = _layout(config)
    return f"{layout.decoder}.{layout.embedding}.weight"


def final_norm_name(config: PreTrainedConfig) -> str:
    """Name in memory of the norm module before the output head."""
    layout = _layout(config)
    return f"{layout.decoder}.{layout.norm}"


def n_layers(config: PreTrainedConfig) -> int:
    """Number of decoder layers."""
    return int(text_config(config).num_hidden_layers)


def d_model(config: PreTrainedConfig) -> int:
    """Width of the residual stream."""
    return int(text_config(config).hidden_size)


def is_tied(config: PreTrainedConfig) -> bool:
    """Whether the output head shares its weight with the token embedding."""
    return bool(getattr(config, "tie_word_embeddings", False))


def layer_of(memory_name: str, config: PreTrainedConfig) -> int | None:
    """Number of the text decoder layer that a tensor or module in memory belongs to.

    None for everything else: embeddings, head, final norm, and all of a vision tower.
    """
    found = re.match(rf"{re.escape(decoder_prefix(config))}\.(\d+)(?:\.|$)", memory_name)
    number = int(found[1]) if found else None
    return number if number is not None and number < n_layers(config) else None


def memory_name(disk_name: str, config: PreTrainedConfig) -> str:
    """What the tensor that a file calls `disk_name` is called in memory.

    A name that is in memory's spelling already stays as it is. The head of a model with tied
    weights keeps its own name (`lm_head.weight`); see `disk_names`.

    Raises:
        BadConfig: a family whose names are not known here.
    """
    for on_disk, in_memory in _layout(config).spellings:
        if disk_name.startswith(on_disk):
            return in_memory + disk_name.removeprefix(on_disk)
    return disk_name


def disk_names(memory_name: str, config: PreTrainedConfig) -> tuple[str, ...]:
    """What files may call the tensor `memory_name`, the spelling of public checkpoints first.

    For the head of a model with tied weights the names of the embedding are among them, first:
    that is where its values lie on disk.

    Raises:
        BadConfig: a family whose names are not known here.
    """
    names: list[str] = []
    if is_tied(config) and memory_name == f"{HEAD}.weight":
        names.extend(_spelled(embedding_name(config), config))
    names.extend(_spelled(memory_name, config))
    return tuple(dict.fromkeys(names))


def _spelled(name: str, config: PreTrainedConfig) -> list[str]:
    written = [
        on_disk + name.removeprefix(in_memory)
        for on_disk, in_memory in _layout(config).spellings
        if name.startswith(in_memory)
    ]
    # a shorter prefix fits too, but is read as another tensor
    return [w for w in written if memory_name(w, config) == name]


def _layout(config: PreTrainedConfig) -> _Layout:
    layout = _LAYOUTS.get(config.model_type)
    if layout is None:
        raise BadConfig(
            f"The tensor names of {config.model_type!r} models are not known here. Use one of: "
            f"{', '.join(sorted(_LAYOUTS))}."
        )
    return layout


def first_line(e: BaseException) -> str:
    """The first line of an error's message, without its full stop."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
