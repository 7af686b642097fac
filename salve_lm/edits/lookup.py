"""Finding modules by full name or anchored pattern, and tensors that share memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn

from salve_lm.edits.layout import is_editable
from salve_lm.edits.stream_norm import FINAL_NORM, final_norm_of
from salve_lm.errors import BadConfig, EditConflict, NameNotFound, UnsupportedEdit

logger = logging.getLogger(__name__)

HEAD = "head"
COMPILED = "_orig_mod"


class Owned(NamedTuple):
    """A tensor and the module that holds it."""

    name: str  # MODULE.KEY
    module: nn.Module
    key: str
    tensor: Tensor


def plain_name(name: str) -> str:
    """`name` without the `_orig_mod` that `torch.compile` puts in front of what it wraps."""
    if COMPILED not in name:
        return name
    return ".".join(part for part in name.split(".") if part != COMPILED)


class ModelIndex:
    """The modules and tensors of a model by plain name, and which of them share memory.

    Walks the model once; valid as long as no module or parameter is replaced.

    Attributes:
        modules: every module, under each of its names; compiled ones unwrapped.
        tensors: every parameter and buffer, under each of its names.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.modules = {plain_name(n): m for n, m in model.named_modules(remove_duplicate=False)}
        self.tensors = {
            (name := f"{prefix}.{key}" if prefix else key): Owned(name, module, key, tensor)
            for prefix, module in self.modules.items()
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        self._extents = [(owned, *_extent(owned.tensor)) for owned in self.tensors.values()]

    @property
    def values(self) -> dict[str, Tensor]:
        """The tensors themselves by name."""
        return {name: owned.tensor for name, owned in self.tensors.items()}

    def find(self, pattern: str, head_name: str | None) -> dict[str, nn.Module]:
        """The modules that `pattern` names, in the model's order.

        Args:
            pattern: a full name; a pattern with `*`, which must match a full name and picks the
                linear and convolutional layers among the matches (`layers.1` never matches
                `layers.10`); `head`, the final layer; or `final_norm`, that of a language model.
            head_name: name of the final layer.

        Raises:
            NameNotFound: nothing matches.
            BadConfig: `head` or `final_norm` is asked for and the model names none.
            UnsupportedEdit: a pattern matches modules, but no linear or convolutional layer.
        """
        if pattern == HEAD and head_name is not None:
            pattern = head_name
        elif pattern == HEAD and HEAD not in self.modules:
            raise BadConfig(
                "This model names no final layer. Set `head_name` of the studied model, or give "
                "the edit's `module` by its full name."
            )
        elif pattern == FINAL_NORM and FINAL_NORM not in self.modules:
            pattern = final_norm_of(self._model)
        if pattern in self.modules:
            return {pattern: self.modules[pattern]}
        matched = {n: m for n, m in self.modules.items() if n and fnmatchcase(n, pattern)}
        if not matched:
            cure = "Patterns match full names; `*` stands for any text."
            raise NameNotFound("module", pattern, [n for n in self.modules if n], cure)
        found = {n: m for n, m in matched.items() if is_editable(m)}
        if not found:
            kinds = sorted({type(m).__name__ for m in matched.values()})
            raise UnsupportedEdit(
                f"{pattern!r} matches {len(matched)} modules ({', '.join(kinds[:5])}), but no "
                "Linear or Conv layer. Name such layers."
            )
        logger.info("%r matches %d layers: %s", pattern, len(found), ", ".join(found))
        return found

    def sharing(self, tensor: Tensor) -> list[Owned]:
        """Every tensor whose memory overlaps that of `tensor`, itself included."""
        if tensor.is_meta:  # no memory to compare: ties are one parameter under several names
            return [owned for owned, _, _ in self._extents if owned.tensor is tensor]
        start, stop = _extent(tensor)
        return [
            owned
            for owned, first, last in self._extents
            if first < stop and start < last and owned.tensor.device == tensor.device
        ]

    def refuse_tied(self, name: str) -> None:
        """Raise `EditConflict` where the tensor `name` is known under other names too."""
        others = [o.name for o in self.sharing(self.tensors[name].tensor) if o.name != name]
        if others:
            raise EditConflict(
                f"{name!r} shares its memory with {', '.join(map(repr, others))}, so editing it "
                "edits them too. Set `allow_tied: true` if that is meant, or untie them first."
            )

    def tied_names(self, names: Iterable[str]) -> dict[str, str]:
        """Other names of the tensors `names` -> the one of `names` that they equal.

        Raises:
            UnsupportedEdit: one is a view of a part of another, so they have no common values.
        """
        names = list(names)
        found = {}
        for name in names:
            tensor = self.tensors[name].tensor
            for other in self.sharing(tensor):
                same = (other.tensor.shape, other.tensor.stride()) == (
                    tensor.shape,
                    tensor.stride(),
                )
                if not same:
                    raise UnsupportedEdit(
                        f"{other.name!r} is a view of a part of {name!r}; they cannot be replaced "
                        "one by one. Untie them first."
                    )
                if other.name not in names:
                    found[other.name] = name
        return found


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and the byte after the last one that `tensor` may touch."""
    if tensor.is_meta or tensor.numel() == 0:
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    reach = sum((n - 1) * stride for n, stride in steps) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()
