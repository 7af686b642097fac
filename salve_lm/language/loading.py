"""Load a causal language model whole, or say why not.

transformers fills tensors that a checkpoint lacks with random numbers and only warns; a Gemma 3
checkpoint with images, loaded as its text-only class, is random from end to end. Here that is an
error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from salve_lm.errors import BadConfig, CorruptFile, MissingFile, ShapeMismatch
from salve_lm.language.names import decoder_prefix, first_line, load_config, n_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DeviceMap = str | dict[str, Any]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# constants that old files carry and that models now compute
_CONSTANTS = re.compile(r"(\.attn\.(masked_)?bias|\.rotary_emb\.inv_freq)$")
_COPY_AGAIN = "Copy or download the folder again."


def load_causal_lm(
    source: str | Path,
    *,
    dtype: Dtype = "auto",
    device_map: DeviceMap | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a model with `AutoModelForCausalLM`, in eval mode, every tensor from the checkpoint.

    Args:
        source: Hugging Face folder, or a public name such as `google/gemma-3-4b-it`.
        dtype: of the weights; `auto` takes that of the checkpoint.
        device_map: where to put what, as transformers (accelerate) has it: `auto`, a device, or
            module name -> device.
        revision: branch, tag or commit of a public model.

    Raises:
        MissingFile: no such folder or public model, no weights in it, or a shard is missing.
        CorruptFile: truncated weights, or a folder whose index and files do not match.
        BadConfig: the checkpoint lacks tensors of the model (they would be random) or holds others
            that the model has no place for; or a family whose names are not known.
        ShapeMismatch: tensors of another shape than `config.json` says.
    """
    config = load_config(source, revision=revision)
    decoder_prefix(config)  # refuses a family that nothing here could address
    if Path(source).is_dir():
        check_weight_files(source)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    try:
        # Any: with output_loading_info a pair comes back, of which the annotation knows nothing
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(source),
            dtype=dtype,
            revision=revision,
            output_loading_info=True,
            # otherwise an opaque RuntimeError; told apart below
            ignore_mismatched_sizes=True,
            **options,
        )
    except SafetensorError as e:
        raise CorruptFile(source, f"truncated weights ({first_line(e)})", _COPY_AGAIN) from e
    except OSError as e:
        raise MissingFile(
            f"Cannot load the weights of {source}: {first_line(e)}. Give a folder or a public "
            "name with safetensors weights."
        ) from e
    except ValueError as e:
        if "Unrecognized configuration class" not in str(e):
            raise
        raise BadConfig(
            f"{source} is no causal language model ({config.model_type}). Give one that "
            "AutoModelForCausalLM loads."
        ) from e
    model, info = loaded
    check_loading(source, config, info)
    whole: PreTrainedModel = model.eval()
    return whole


def new_causal_lm(config: Mapping[str, Any] | str | Path, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, for training from scratch.

    Args:
        config: the content of a `config.json` (`model_type` and sizes), or the path of one or of
            its folder, or a public name.
        seed: of the weights; the global random state is left as it was.

    Raises:
        BadConfig: no `model_type`, one that transformers or this project does not know, or sizes
            that do not fit together.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(config, Mapping):
        options = dict(config)
        model_type = options.pop("model_type", None)
        if model_type is None:
            raise BadConfig("The config of a new model needs a model_type, such as gemma3_text.")
        try:
            made = AutoConfig.for_model(model_type, **options)
        except (ValueError, KeyError, TypeError, StrictDataclassError) as e:
            raise BadConfig(f"No model can be made of this config: {first_line(e)}.") from e
    else:
        path = Path(config)
        made = load_config(path.parent if path.name == "config.json" else config)
    decoder_prefix(made)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
        except (ValueError, RuntimeError, AssertionError, TypeError) as e:
            raise BadConfig(f"No model can be made of this config: {first_line(e)}.") from e


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer; it pads on the left, as generation needs, with its EOS if it has no pad.

    Raises:
        MissingFile: no tokenizer there.
        BadConfig: a tokenizer with neither a padding nor an EOS token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise MissingFile(
            f"No tokenizer in {source} ({first_line(e)}). Give the folder or the public name of a "
            "model with tokenizer.json as `tokenizer`."
        ) from e
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BadConfig(
                f"The tokenizer of {source} has neither a padding nor an EOS token. Set pad_token "
                "in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_weight_files(folder: str | Path) -> list[Path]:
    """The weight files of a Hugging Face folder, after a look at whether they are all there.

    Raises:
        MissingFile: no safetensors weights, or a shard that the index names is missing.
        CorruptFile: an unreadable index, a truncated file, or tensors that the index puts elsewhere
            than they are.
    """
    folder = Path(folder)
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
        where: dict[str, str] = {}
    elif index.is_file():
        where = _weight_map(index)
        files = [folder / name for name in sorted(set(where.values()))]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise MissingFile(
                f"{folder} lacks {len(missing)} of {len(files)} shards: {listed(missing)}. "
                f"{_COPY_AGAIN}"
            )
    else:
        raise MissingFile(
            f"No weights in {folder}: neither {SINGLE} nor {INDEX}. Give a folder with safetensors "
            "weights (convert others with transformers' save_pretrained)."
        )
    for file in files:
        held = _tensor_names(file)
        lacking = [n for n, shard in where.items() if shard == file.name and n not in held]
        if lacking:
            raise CorruptFile(
                index, f"it puts {listed(lacking)} into {file.name}, which lacks it", _COPY_AGAIN
            )
    return files


def check_loading(source: object, config: PreTrainedConfig, info: Mapping[str, Any]) -> None:
    """Refuse a model that is not, tensor for tensor, what the checkpoint holds.

    Args:
        source: named in errors.
        config: of the model.
        info: what `from_pretrained(output_loading_info=True)` reports.

    Raises:
        BadConfig: missing or unexpected tensors.
        ShapeMismatch: tensors of another shape.
    """
    mismatched = sorted(info.get("mismatched_keys") or [])
    if mismatched:
        name, held, wanted = mismatched[0]
        raise ShapeMismatch(
            f"{source}: {len(mismatched)} tensors do not have the shape that config.json says, "
            f"such as {name} {list(held)}, not {list(wanted)}. Give a folder whose config.json "
            "belongs to its weights."
        )
    missing = sorted(info.get("missing_keys") or [])
    unexpected = sorted(k for k in info.get("unexpected_keys") or [] if not _CONSTANTS.search(k))
    if not missing and not unexpected:
        return
    what = []
    if missing:
        what.append(f"{len(missing)} tensors are missing and would be random: {listed(missing)}")
    if unexpected:
        what.append(f"{len(unexpected)} have no place in the model: {listed(unexpected)}")
    kind = (getattr(config, "architectures", None) or [config.model_type])[0]
    raise BadConfig(
        f"{source} does not hold a {kind} with {n_layers(config)} layers: {'; '.join(what)}. Give "
        "a checkpoint whose config.json belongs to its weights (for a Gemma 3 with images, the "
        "config of the whole model; for a LoRA adapter, its base model)."
    )


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first few of `names`, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(k): str(v) for k, v in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CorruptFile(index, "it is not an index of safetensors shards", _COPY_AGAIN) from e


def _tensor_names(file: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as f:
            return set(f.keys())
    except (SafetensorError, OSError) as e:
        raise CorruptFile(
            file, f"truncated or not a safetensors file ({first_line(e)})", _COPY_AGAIN
        ) from e
