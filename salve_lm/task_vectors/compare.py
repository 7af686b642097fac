"""Whether two models are one architecture, so that their difference means something."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salve_lm.errors import ShapeMismatch
from salve_lm.language.names import text_config
from salve_lm.task_vectors.weights import Weights, is_constant

# settings that decide what a weight means; rope scaling, dropout and the like may differ
SETTINGS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation",
    "activation_function",
)  # fmt: skip
SHOWN = 8


def refuse_differences(tuned: Weights, base: Weights) -> None:
    """Compare settings, vocabularies, and names and shapes of the tensors of the text model.

    Raises:
        ShapeMismatch: one error that lists what differs.
    """
    found = differences(tuned, base)
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ShapeMismatch(
            f"{tuned.where} is not a fine-tuned version of {base.where}. Different: "
            f"{'; '.join(found[:SHOWN])}{more}. Give two models of one architecture and vocabulary."
        )


def differences(tuned: Weights, base: Weights) -> list[str]:
    """What differs between two models, in words; empty if they belong together."""
    found = []
    if tuned.config is not None and base.config is not None:
        ours, theirs = text_config(base.config), text_config(tuned.config)
        for key in SETTINGS:
            a, b = getattr(ours, key, None), getattr(theirs, key, None)
            if a != b and None not in (a, b):
                found.append(f"{key} {b} against {a}")
        if tuned.config.model_type != base.config.model_type and not found:
            found.append(f"model_type {tuned.config.model_type} against {base.config.model_type}")
    found += _vocabularies(tuned, base)
    a_shapes, b_shapes = _trained(base.shapes), _trained(tuned.shapes)
    for name, shape in a_shapes.items():
        if name in b_shapes and b_shapes[name] != shape:
            found.append(f"{name} {list(b_shapes[name])} against {list(shape)}")
    for only, where in (
        (a_shapes.keys() - b_shapes.keys(), base),
        (b_shapes.keys() - a_shapes.keys(), tuned),
    ):
        if only:
            some = ", ".join(sorted(only)[:3])
            found.append(f"{len(only)} tensors only in {where.where} ({some})")
    return found


def _trained(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Without what one of two equal models may lack: buffers, a tied head, the image side."""
    return {
        n: s
        for n, s in shapes.items()
        if n != "lm_head.weight"
        and not any(part.startswith(("vision", "multi_modal")) for part in n.split("."))
        and not is_constant(n)
    }


def _vocabularies(tuned: Weights, base: Weights) -> list[str]:
    """Tokens that mean something else in the two folders, where both have a `tokenizer.json`."""
    files = [_folder(w) / "tokenizer.json" for w in (tuned, base)]
    if not all(f.is_file() for f in files) or files[0].read_bytes() == files[1].read_bytes():
        return []
    try:
        theirs, ours = (_vocabulary(json.loads(f.read_text())) for f in files)
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # not a reason against the weights: the tokenizer says so where it is used
    moved = [t for t, i in ours.items() if t in theirs and theirs[t] != i]
    lost = [t for t in ours if t not in theirs]
    if not moved and not lost:
        return []
    some = ", ".join(repr(t) for t in (*moved, *lost)[:3])
    return [f"{len(moved) + len(lost)} tokens of the vocabulary ({some})"]


def _folder(weights: Weights) -> Path:
    """Where they lie, or for a model in memory where it says that it was loaded from."""
    loaded_from = getattr(weights.config, "_name_or_path", None)
    return Path(weights.where if Path(weights.where).is_dir() else loaded_from or weights.where)


def _vocabulary(data: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = data["model"]["vocab"]
    if isinstance(vocabulary, list):  # unigram: pieces with scores, in order of index
        return {str(piece[0]): i for i, piece in enumerate(vocabulary)}
    return dict(vocabulary)
