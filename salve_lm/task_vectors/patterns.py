"""Which tensors of a model an edit means: layers by number, tensors by anchored pattern."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salve_lm.errors import BadConfig, CorruptFile, MissingFile, NameNotFound
from salve_lm.language.names import decoder_name, decoder_prefix, layer_of, n_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ALL = "all"
HOW = (
    "Patterns match whole names inside a layer, such as 'self_attn.q_proj.weight'; `*` is any text."
)


def read_layers(layers: Sequence[int] | str | None, n: int) -> tuple[int, ...] | None:
    """The layers meant, in order, each once; None where none are given.

    Args:
        layers: Numbers; `all`; or the path of a JSON file with a list `layers`.
        n: Number of decoder layers of the model.

    Raises:
        BadConfig: an empty list, or something else than numbers.
        NameNotFound: a layer that the model does not have.
        MissingFile, CorruptFile: the selection file is absent, or is none.
    """
    if layers is None:
        return None
    if isinstance(layers, str):
        layers = range(n) if layers == ALL else read_layer_list(layers)["layers"]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in layers):
        raise BadConfig(f"`layers` holds {list(layers)}: give whole numbers, or `all`.")
    if not layers:
        raise BadConfig("`layers` is empty: give at least one layer, or `all`.")
    for i in layers:
        if not 0 <= i < n:
            cure = f"The model has {n} decoder layers, 0 to {n - 1}."
            raise NameNotFound("layer", str(i), [], cure)
    return tuple(sorted(set(layers)))


def read_layer_list(path: str | Path) -> dict[str, Any]:
    """A layer selection on disk: a JSON object with `layers`, and perhaps `latents` by layer."""
    data = _read_object(path, "layers", '{"layers": [9, 17]}')
    if not isinstance(data.get("layers"), list):
        raise CorruptFile(path, "no list `layers` in it", 'It should be {"layers": [9, 17]}.')
    return data


def _read_object(path: str | Path, what: str, example: str) -> dict[str, Any]:
    file = Path(path)
    file = file / "layers.json" if file.is_dir() else file
    if not file.is_file():
        raise MissingFile(
            f"No file {path}. Give `{what}` directly, or as the path of a JSON file such as "
            f"{example}."
        )
    try:
        data = json.loads(file.read_text())
    except ValueError as e:
        raise CorruptFile(path, f"not readable as JSON ({e})", "Write it again.") from e
    if not isinstance(data, dict):
        raise CorruptFile(path, "not a JSON object", f"It should be {example}.")
    return data


def read_latents(
    latents: Mapping[int, list[int]] | Sequence[int] | str | None,
    layers_given: Sequence[int] | str | None,
    layers: Sequence[int],
) -> dict[int, list[int]]:
    """Selected latents of each of `layers`.

    Args:
        latents: layer -> latents; the path of a JSON file with that, or with it under `latents`; a
            plain list where there is one layer; or None, where `layers_given` is a selection file
            with `latents`.
        layers_given: as the user gave the layers.
        layers: their numbers.

    Raises:
        BadConfig: no latents for a layer, or a list for several layers.
        MissingFile, CorruptFile: the file is absent, or holds something else.
    """
    path = latents if isinstance(latents, str) else None
    if latents is None and isinstance(layers_given, str) and layers_given != ALL:
        path = layers_given
    if path is not None:
        table: Mapping[Any, Any] = _read_object(path, "latents", '{"9": [12, 345], "17": [8]}')
        table = table.get("latents", table)
    elif isinstance(latents, Mapping):
        table = latents
    elif latents is None:
        raise BadConfig("Which latents? Set `latents` to layer -> list, or to a JSON file.")
    elif len(layers) > 1:
        raise BadConfig(
            f"`latents` is one list for layers {list(layers)}, whose SAEs differ: give layer -> "
            "list."
        )
    else:
        table = {layers[0]: latents}
    try:
        by_layer = {int(i): [int(latent) for latent in chosen] for i, chosen in table.items()}
    except (TypeError, ValueError, AttributeError) as e:
        raise BadConfig(
            f"`latents` should be layer -> list of numbers, such as {{9: [12, 345]}} ({e})."
        ) from e
    missing = [i for i in layers if not by_layer.get(i)]
    if missing:
        raise BadConfig(
            f"No latents are given for layers {missing}: name some, or drop the layers."
        )
    return {i: by_layer[i] for i in layers}


def select_tensors(
    names: Iterable[str],
    config: PreTrainedConfig,
    layers: Sequence[int] | None,
    patterns: Sequence[str] | None,
) -> tuple[str, ...]:
    """Full names of the tensors meant, in the order of `names`.

    A pattern is compared with the whole name inside a layer, for the chosen layers. One that begins
    with the model's own first word (`model.`, `transformer.`, `lm_head.`) is compared with whole
    full names instead: the only way to reach embeddings, head and final norm. Nothing outside of
    the text decoder and its head is ever matched, whatever the pattern.

    Args:
        names: of the model's parameters, in memory.
        config: of the model.
        layers: numbers of the chosen decoder layers; None where only full names are meant.
        patterns: None: all of a layer, which is attention, MLP and norms.

    Raises:
        BadConfig: no layers where they are needed, or no patterns.
        NameNotFound: a pattern that matches nothing; lists near names.
    """
    if patterns is None:
        patterns = ["*"]
    if not patterns:
        raise BadConfig("`tensors` is empty: give a pattern, or leave it out for whole layers.")
    inside, outside = _text_tensors(names, config)
    chosen = {n: rel for n, (layer, rel) in inside.items() if layers is None or layer in layers}
    first_words = {n.split(".")[0] for n in (*inside, *outside)}
    found: set[str] = set()
    for pattern in patterns:
        if pattern.split(".")[0] in first_words and "." in pattern:
            known = [*chosen, *outside]
            hits = {n for n in known if fnmatchcase(n, pattern)}
        else:
            if layers is None:
                raise BadConfig(
                    f"Which layers does {pattern!r} mean? Set `layers` to numbers or `all`, or "
                    f"give full names, such as {next(iter(outside), 'lm_head.weight')!r}."
                )
            known = list(dict.fromkeys(chosen.values()))
            hits = {n for n, rel in chosen.items() if fnmatchcase(rel, pattern)}
        if not hits:
            _refuse(pattern, known, list(outside))
        found |= hits
    return tuple(n for n in (*inside, *outside) if n in found)


def _text_tensors(
    names: Iterable[str], config: PreTrainedConfig
) -> tuple[dict[str, tuple[int, str]], list[str]]:
    """Tensors of decoder layers -> (layer, name inside it); and the others of the text model."""
    prefix, decoder = decoder_prefix(config), decoder_name(config)
    inside: dict[str, tuple[int, str]] = {}
    outside: list[str] = []
    for name in names:
        layer = layer_of(name, config)
        if layer is not None:
            inside[name] = layer, name.removeprefix(f"{prefix}.{layer}.")
        elif name.startswith((f"{decoder}.", "lm_head.")) and not _is_visual(name):
            outside.append(name)
    if len({layer for layer, _ in inside.values()}) != n_layers(config):
        raise BadConfig(
            f"The model's parameters do not lie under {prefix}.N, where its configuration "
            f"({config.model_type}) has them. Edit the plain model, not a wrapper around it."
        )
    return inside, outside


def _is_visual(name: str) -> bool:
    return any(part.startswith(("vision", "multi_modal")) for part in name.split("."))


def _refuse(pattern: str, known: Sequence[str], outside: Sequence[str]) -> None:
    """Raise `NameNotFound` with the names that `pattern` may have meant."""
    core = pattern.strip("*. ")
    holding = [n for n in known if core and core in n]
    if holding:
        some = ", ".join(repr(n) for n in holding[:6])
        cure = f"{pattern!r} is only a part of {some}. {HOW}"
        raise NameNotFound("tensor", pattern, holding, cure)
    elsewhere = [n for n in outside if core and core in n]
    if elsewhere:
        cure = f"Outside of the layers there is {elsewhere[0]!r}: give it by that full name. {HOW}"
        raise NameNotFound("tensor", pattern, elsewhere, cure)
    raise NameNotFound("tensor", pattern, known, HOW)
