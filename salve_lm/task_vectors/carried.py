"""What a model folder holds beside its weights, and how it comes along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from salve_lm.errors import CorruptFile
from salve_lm.task_vectors.tensor_files import INDEX

CONFIG = "config.json"
RECORD = "edit.json"
# weights in any format, and what trainers leave
_NOT_CARRIED = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz",
    ".index.json",
)  # fmt: skip
# of another edit, or of an adapter that lies beside the model: transformers would apply it
_STALE = (RECORD, "adapter_config.json")
# the one folder in which transformers itself keeps files of a tokenizer
_FOLDERS = ("additional_chat_templates",)


def carry_over(base: Path, out: Path) -> list[str]:
    """Copy configurations, tokenizer, chat templates, licence and the like from `base` to `out`.

    Returns:
        Names of what is left out: weights in other files and formats, an earlier `edit.json`,
        subfolders other than chat templates, hidden files.
    """
    left_out = []
    for path in sorted(base.iterdir()):
        if path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, out / path.name)
        elif _is_carried(path):
            # no copy of permissions or times; a link into a cache becomes a file
            shutil.copyfile(path, out / path.name)
        elif not (out / path.name).exists():
            left_out.append(path.name)
    return [name for name in left_out if name != INDEX]


def write_index(index: dict[str, Any], total_size: int, out: Path) -> None:
    """Write the index of the shards with their present size; everything else in it stays."""
    metadata = {**(index.get("metadata") or {}), "total_size": total_size}
    text = json.dumps({**index, "metadata": metadata}, indent=2, sort_keys=True)
    (out / INDEX).write_text(text + "\n")


def declare_dtype(out: Path, dtype: str) -> None:
    """Set the dtype that `config.json` names, so that transformers does not round on loading.

    Raises:
        CorruptFile: `config.json` is no configuration.
    """
    path = out / CONFIG
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text())
        _set_dtype(config, dtype)
        config.setdefault("dtype", config.pop("torch_dtype", dtype))
    except (ValueError, AttributeError) as e:
        raise CorruptFile(path, f"not a configuration ({e!r})", "Fetch it again.") from e
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config"):
            _set_dtype(value, dtype)


def _is_carried(path: Path) -> bool:
    name = path.name
    return (
        path.is_file()
        and not name.startswith(".")
        and name not in _STALE
        and not name.endswith(_NOT_CARRIED)
    )
