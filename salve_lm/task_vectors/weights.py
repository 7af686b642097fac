"""Weights by their names in memory, read by rows: from a folder, a checkpoint or a live model."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salve_lm.errors import BadConfig, CorruptFile, MissingFile, NameNotFound, UnsupportedEdit
from salve_lm.language.names import disk_names, load_config, memory_name
from salve_lm.task_vectors.blocks import row_blocks
from salve_lm.task_vectors.tensor_files import TensorFiles

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PREFIX = "model."  # a LightningModule's network in its state dict


class Weights(ABC):
    """Tensors of one model under their names in memory; values are read when asked for.

    Attributes:
        where: path, or words, for messages.
        config: of the model, where it is known.
    """

    where: str
    config: PreTrainedConfig | None = None

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by name, in order."""

    @abstractmethod
    def stored_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` in the dtype they are stored in."""

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`.

        Raises:
            NameNotFound: there is none.
        """
        if name not in self:
            raise NameNotFound("tensor", name, self.shapes, f"The weights are {self.where}.")
        return self.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, float32 on the CPU.

        Raises:
            UnsupportedEdit: the tensor is stored in integers (quantised).
        """
        stored = self.stored_rows(name, start, stop)
        if not stored.is_floating_point():
            raise UnsupportedEdit(
                f"{name!r} in {self.where} is stored as {stored.dtype}: quantised weights have no "
                "plain difference. Give the model in bfloat16, float16 or float32."
            )
        return stored.detach().to("cpu", torch.float32)

    def read(self, name: str) -> Tensor:
        """The whole tensor, float32 on the CPU."""
        return self.rows(name, 0, self.shape(name)[0])

    def sha256(self, name: str) -> str:
        """SHA-256 (hex) over dtype, shape and raw bytes of one tensor."""
        digest = hashlib.sha256()
        shape = self.shape(name)
        dtype = self.stored_rows(name, 0, 0).dtype
        digest.update(f"{dtype}|{shape}|".encode())
        for start, stop in row_blocks(shape):
            raw = self.stored_rows(name, start, stop).detach().cpu().contiguous()
            digest.update(raw.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


class FolderWeights(Weights):
    """A Hugging Face folder: `config.json`, and safetensors in one file or several.

    Raises:
        SalveError: see `load_config` and `TensorFiles`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.where = str(folder)
        self.files = TensorFiles(folder)
        self.config = load_config(folder)
        self._disk = {memory_name(n, self.config): n for n in self.files.names}
        head = "lm_head.weight"
        if head not in self._disk:  # tied, and therefore not on disk under its own name
            on_disk = next((n for n in disk_names(head, self.config) if n in self.files), None)
            if on_disk is not None:
                self._disk[head] = on_disk
        self._shapes = {n: tuple(self.files.info(d).shape) for n, d in self._disk.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Weights.shapes`."""
        return self._shapes

    def disk_name(self, name: str) -> str:
        """What the file calls the tensor `name`."""
        self.shape(name)
        return self._disk[name]

    def stored_rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Weights.stored_rows`."""
        return self.files.read_rows(self.disk_name(name), start, stop)


class StoredTensors(Mapping[str, Tensor]):
    """Weights as a mapping from names in memory to whole tensors, each read when it is asked for.

    Nothing is kept. The tensors have the dtype they are stored in, or `dtype`.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype | None = None) -> None:
        self.weights, self._dtype = weights, dtype

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.weights:
            raise KeyError(name)
        tensor = self.weights.stored_rows(name, 0, self.weights.shape(name)[0])
        return tensor if self._dtype is None else tensor.to(self._dtype)

    def __contains__(self, name: object) -> bool:
        return name in self.weights.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights.shapes)

    def __len__(self) -> int:
        return len(self.weights.shapes)


class CheckpointWeights(Weights):
    """The network in a Lightning checkpoint of a `LanguageModel`, mapped, not loaded.

    Attributes:
        described: what the `LanguageModel` said of itself.

    Raises:
        MissingFile: no such file.
        CorruptFile: not a checkpoint.
        BadConfig: no network in it (a checkpoint that holds an adapter only, say).
    """

    def __init__(self, path: str | Path) -> None:
        self.where = str(path)
        checkpoint = load_checkpoint(path)
        self.described = dict(checkpoint.get("language_model") or {})
        self._tensors = {
            str(n).removeprefix(PREFIX): t
            for n, t in checkpoint["state_dict"].items()
            if isinstance(t, Tensor) and str(n).startswith(PREFIX)
        }
        if not self._tensors:
            raise BadConfig(
                f"No network in the checkpoint {path}: no tensor under {PREFIX!r}. Give one that "
                "`salve-lm fit` wrote for a LanguageModel."
            )
        self._shapes = {n: tuple(t.shape) for n, t in self._tensors.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Weights.shapes`."""
        return self._shapes

    def stored_rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Weights.stored_rows`."""
        self.shape(name)
        return self._tensors[name][start:stop]


class GivenWeights(Weights):
    """Tensors at hand by name: those of a model in memory."""

    def __init__(
        self, tensors: Mapping[str, Tensor], config: PreTrainedConfig | None = None
    ) -> None:
        self.where, self.config = "the model in memory", config
        self._tensors = tensors

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Weights.shapes`."""
        return {n: tuple(t.shape) for n, t in self._tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights.shape`."""
        if name not in self._tensors:
            return super().shape(name)
        return tuple(self._tensors[name].shape)

    def stored_rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Weights.stored_rows`."""
        self.shape(name)
        return self._tensors[name].detach()[start:stop]


def is_constant(name: str) -> bool:
    """Whether a tensor on disk is a constant of the model rather than a parameter."""
    return name.endswith((".attn.bias", ".attn.masked_bias", "inv_freq", ".embed_scale"))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint, its tensors mapped from the file.

    Raises:
        MissingFile, CorruptFile: there is no such file, or it is no checkpoint.
    """
    import pickle

    if not Path(path).is_file():
        raise MissingFile(f"No checkpoint {path}. Give the .ckpt file of a finished fit.")
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        dict(loaded["state_dict"])
        return dict(loaded)
    except (RuntimeError, pickle.UnpicklingError, KeyError, TypeError, EOFError, ValueError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
        raise CorruptFile(
            path, f"not a Lightning checkpoint ({reason[:200]})", "Give one that a fit wrote."
        ) from e
