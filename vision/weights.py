"""Weights from local files, read without running any code in them, and loaded strictly."""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from salve_lm.errors import CorruptFile, MissingFile, NotFinite, ShapeMismatch

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# A name in front of all others: Lightning's attribute, torch's data-parallel wrappers.
PREFIXES = ("model.", "module.")
# Keys under which public checkpoints keep their weights beside the optimiser's state.
NESTED = ("state_dict", "model_state_dict", "model")


def looks_local(weights: str) -> bool:
    """Whether `weights` means a file or folder rather than the name of public weights."""
    path = Path(weights)
    return path.exists() or path.suffix in SUFFIXES or len(path.parts) > 1


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read named tensors from a file, or from `model.safetensors` of an export folder.

    Args:
        path: `.safetensors`; `.pth`, `.pt` or `.bin` holding a state dict (also under
            `state_dict`, `model_state_dict` or `model`); a Lightning `.ckpt`; or an export folder.

    Returns:
        name -> tensor on the CPU, in the file's dtypes and under the file's names.

    Raises:
        MissingFile: nothing there, or a folder without `model.safetensors`.
        CorruptFile: truncated, foreign, or a pickle that needs more than tensors.
        NotFinite: NaN or infinity in a tensor.
    """
    path = Path(path)
    if path.is_dir():
        inner = path / "model.safetensors"
        if not inner.is_file():
            raise MissingFile(
                f"{path} is a folder without model.safetensors. Give `weights` an export folder "
                "or a weight file."
            )
        path = inner
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES)[:5]
        listed = f" That folder holds: {', '.join(near)}." if near else ""
        raise MissingFile(
            f"No weight file at {path}.{listed} Correct `weights`, or train the model first."
        )
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NotFinite(name, str(path), "Use weights from an earlier, finite checkpoint.")
    return state


def match_names(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Bring a file's names to the model's by taking off one common prefix, where that fits better.

    A Lightning checkpoint names the weights of `self.model` `model.…` and may hold other things
    (a loss, a teacher); those are left out once the prefix is taken off.
    """
    best = dict(state)
    for prefix in PREFIXES:
        stripped = {k[len(prefix) :]: t for k, t in state.items() if k.startswith(prefix)}
        if len(stripped.keys() & set(own)) > len(best.keys() & set(own)):
            best = stripped
    return best


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: object,
    name: str,
    new: Collection[str] = (),
    hint: str = "",
) -> None:
    """Copy `state` into `model`; every name and shape must fit.

    Args:
        model: receives the values, cast to its own dtypes.
        state: name -> tensor, under the model's names.
        path: where `state` came from, for messages.
        name: of the model, for messages.
        new: names that keep the model's own values.
        hint: what else may be wrong, for messages.

    Raises:
        CorruptFile: names are missing, or left over.
        ShapeMismatch: a tensor has another shape.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state and k not in new]
    unexpected = [k for k in state if k not in own]
    if missing or unexpected:
        found = [f"{len(missing)} tensors missing ({_some(missing)})"] * bool(missing)
        found += [f"{len(unexpected)} unexpected ({_some(unexpected)})"] * bool(unexpected)
        raise CorruptFile(
            path,
            f"it does not hold the weights of {name}: {', '.join(found)}",
            hint or "Choose the backbone (and options) that these weights were saved from.",
        )
    wrong = [
        f"{k} is {list(state[k].shape)}, the model's {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if wrong:
        raise ShapeMismatch(
            f"Weights {path} do not fit {name}: {len(wrong)} tensors differ in shape "
            f"({'; '.join(wrong[:3])}). Choose the backbone and options (image size, width) that "
            "they were saved from."
        )
    model.load_state_dict({**{k: own[k] for k in new}, **state}, strict=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as e:
        raise CorruptFile(
            path, f"no complete safetensors file ({_first_line(e)})", "Copy or download it again."
        ) from e


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        # torch says so of a foreign stream too; only a refused object is named after GLOBAL
        refused = re.search(r"GLOBAL (\S+)", str(e))
        if refused:
            raise CorruptFile(
                path,
                f"it holds Python objects ({refused[1]}), which could run code when read, "
                "and not only tensors",
                "Save the tensors alone: torch.save(model.state_dict(), path), or as safetensors.",
            ) from e
        raise CorruptFile(path, "no weight file of torch", "Copy or download it again.") from e
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as e:
        raise CorruptFile(
            path,
            "truncated, or no weight file of torch",
            "Copy or download it again; TorchScript archives are not read.",
        ) from e
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise CorruptFile(path, "it holds no state dict", "Save one: model.state_dict().")
    foreign = [str(k) for k, v in content.items() if not isinstance(v, Tensor)]
    if foreign:
        raise CorruptFile(
            path,
            f"its state dict holds values that are no tensors ({_some(foreign)})",
            "Save model.state_dict() alone.",
        )
    return {str(k): v for k, v in content.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
