"""Opening LoRA adapters: what peft saved, and what a `LanguageModel` keeps in its checkpoints."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from salve_lm.errors import CorruptFile, MissingFile, UnsupportedEdit
from salve_lm.language.names import memory_name
from salve_lm.task_vectors.lora import LoraAdapter, LowRank
from salve_lm.task_vectors.sources import ADAPTER
from salve_lm.task_vectors.tensor_files import TensorFiles
from salve_lm.task_vectors.weights import CheckpointWeights, FolderWeights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# initialisations that also change the base, so that s B A is not the difference from it
CHANGE_BASE = ("pissa", "olora", "corda", "loftq")
# options whose effect is more than s B A
REFUSED = {
    "use_dora": "DoRA also rescales the base weights, so its change is no product B A",
    "layer_replication": "it repeats layers, so its base has another depth",
    "alora_invocation_tokens": "it is active for some tokens only",
    "use_qalora": "it is a quantised adapter",
    "target_parameters": "it adapts bare parameters",
    "arrow_config": "it mixes several adapters",
}


def open_adapter(
    folder: Path,
    base: FolderWeights | None,
    config: PreTrainedConfig | None,
    *,
    other_base: bool = False,
) -> LoraAdapter:
    """Open an adapter that peft saved.

    Its matrices (a few MB) are held; what they amount to is computed row by row.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        base: for what an adapter replaces; or None, and `with_base` supplies it.
        config: of the model it belongs to, for names; None leaves names as peft wrote them.
        other_base: accept another base than the adapter names.

    Raises:
        MissingFile, CorruptFile: files that are absent or damaged.
        UnsupportedEdit: DoRA, or anything else whose change is more than s B A.
    """
    options = _read_options(folder)
    if not (folder / WEIGHTS).is_file():
        raise MissingFile(
            f"No {WEIGHTS} in {folder}. Save the adapter with peft's save_pretrained "
            "(safe_serialization)."
        )
    files = TensorFiles(folder / WEIGHTS)
    tensors = {n: files.read(n) for n in files.names}

    def named(name: str) -> str:
        return name if config is None else memory_name(name, config)

    pairs, biases, replaced = sort_tensors(tensors, options, str(folder))
    return LoraAdapter(
        finetuned=str(folder),
        base=base,
        pairs={named(n): p for n, p in pairs.items()},
        biases={named(n): t for n, t in biases.items()},
        replaced={named(n): t for n, t in replaced.items()},
        model_type=None if config is None else config.model_type,
        base_name=options.get("base_model_name_or_path"),
        other_base=other_base,
    )


def adapter_in_checkpoint(
    tuned: CheckpointWeights, base: FolderWeights | None, *, other_base: bool = False
) -> LoraAdapter:
    """The adapter that a `LanguageModel` trained, from its Lightning checkpoint.

    Raises:
        CorruptFile: the checkpoint does not say how the adapter is scaled.
    """
    lora = tuned.described.get("lora")
    if not isinstance(lora, Mapping):
        why = "it holds an adapter, and not its settings"
        raise CorruptFile(tuned.where, why, "Give the adapter's folder that the fit wrote.")
    options = {
        "lora_alpha": lora["alpha"],
        "use_rslora": lora["rslora"],
        "fan_in_fan_out": tuned.described.get("model_type") == "gpt2",
    }
    tensors = {n: tuned.stored_rows(n, 0, s[0]) for n, s in tuned.shapes.items()}
    pairs, biases, replaced = sort_tensors(tensors, options, tuned.where)
    return LoraAdapter(
        finetuned=tuned.where,
        base=base,
        pairs=pairs,
        biases=biases,
        replaced=replaced,
        model_type=tuned.described.get("model_type"),
        base_name=tuned.described.get("source"),
        other_base=other_base,
    )


def sort_tensors(
    tensors: Mapping[str, Tensor], options: Mapping[str, Any], where: str
) -> tuple[dict[str, LowRank], dict[str, Tensor], dict[str, Tensor]]:
    """Matrices, added biases and replaced tensors, by the names of what they change.

    Args:
        tensors: of the adapter, under peft's names.
        options: its `adapter_config.json`.
        where: for messages.

    Raises:
        CorruptFile: a matrix without its partner.
        UnsupportedEdit: a tensor of a kind not known here.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    pattern = re.compile(
        r"(?P<module>.+)\.(?P<kind>lora_(embedding_)?[AB])(\.default)?(?P<leaf>\.weight|\.bias)?"
    )
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        found = pattern.fullmatch(name)
        if found is not None:
            kind = found["kind"] + (".bias" if found["leaf"] == ".bias" else "")
            parts.setdefault(found["module"], {})[kind] = tensor
        elif "lora_" in name:
            raise UnsupportedEdit(
                f"The adapter {where} holds {key!r}, of a kind not known here. Merge it with peft "
                "and give the merged model's folder."
            )
        else:
            name = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
            replaced[name.replace(".base_layer.", ".")] = tensor
    pairs, biases = {}, {}
    for module, found_parts in parts.items():
        embedding = "lora_embedding_A" in found_parts or "lora_embedding_B" in found_parts
        kind = "lora_embedding_" if embedding else "lora_"
        try:
            a, b = found_parts[f"{kind}A"].float(), found_parts[f"{kind}B"].float()
        except KeyError as e:
            why = f"{module} has only one of its two matrices"
            raise CorruptFile(where, why, "Save the adapter again.") from e
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            why = f"matrices of {module} do not multiply ({list(b.shape)} by {list(a.shape)})"
            raise CorruptFile(where, why, "Save the adapter again.")
        scale = scale_of(module, a.shape[0], options)
        transposed = embedding or bool(options.get("fan_in_fan_out"))
        pairs[f"{module}.weight"] = LowRank(a, b, scale, transposed)
        if "lora_B.bias" in found_parts:
            biases[f"{module}.bias"] = found_parts["lora_B.bias"].float() * scale
    return pairs, biases, replaced


def scale_of(module: str, r: int, options: Mapping[str, Any]) -> float:
    """s = lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA, with the module's own alpha."""
    alpha = float(options.get("lora_alpha", 8))
    for key, value in (options.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):  # as peft does it
            alpha = float(value)
            break
    return alpha / (math.sqrt(r) if options.get("use_rslora") else r)


def _read_options(folder: Path) -> dict[str, Any]:
    try:
        options = json.loads((folder / ADAPTER).read_text())
    except ValueError as e:
        raise CorruptFile(folder / ADAPTER, f"not readable as JSON ({e})", "Save it again.") from e
    if not isinstance(options, dict):
        raise CorruptFile(folder / ADAPTER, "not a JSON object", "Save it again.")
    if str(options.get("peft_type")) != "LORA":
        raise UnsupportedEdit(
            f"{folder} is a {options.get('peft_type')} adapter; only LoRA is a task vector here. "
            "Merge it with peft and give the merged model's folder."
        )
    for key, why in REFUSED.items():
        if options.get(key):
            raise UnsupportedEdit(
                f"The adapter {folder} has `{key}`: {why}. Merge it with peft and give the merged "
                "model's folder."
            )
    start = options.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_BASE):
        raise UnsupportedEdit(
            f"The adapter {folder} began as {start!r}, which changes the base weights too. Save it "
            "with peft's `path_initial_model_for_weight_conversion`, or merge it."
        )
    return options
