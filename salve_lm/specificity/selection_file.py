"""The chosen layers on disk: the format of `docs/formats/layer-selection.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from salve_lm.errors import CorruptFile, MissingFile, StaleStore
from salve_lm.hashing import hash_tensors
from salve_lm.language.names import d_model, n_layers, text_config
from salve_lm.specificity.selection import LayerRanking

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FORMAT = "salve_lm.layers"
VERSION = 1
NAME = "layers.json"


@dataclass(frozen=True)
class LayerSelection:
    """Layers chosen for a model.

    Attributes:
        layers: the chosen ones, ascending.
        model: `source`, `model_type`, `n_layers`, `d_model`, `vocabulary`, `weights` (SHA-256 of
            the state dict).
        score: name of the score that chose.
        scores: score name -> layer -> estimate, of all scores.
        record: everything else that the file holds.
    """

    layers: tuple[int, ...]
    model: dict[str, Any]
    score: str
    scores: dict[str, dict[int, float]]
    record: dict[str, Any] = field(default_factory=dict)


def selection_record(
    layers: tuple[int, ...],
    model: Mapping[str, Any],
    chosen_by: LayerRanking,
    rankings: list[LayerRanking],
    rule: Mapping[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """The content of the file.

    Args:
        layers: the chosen layers.
        model: see `LayerSelection.model`.
        chosen_by: the ranking that chose them.
        rankings: all rankings.
        rule: how the choice was made.
        more: plain values to add.
    """
    rankings_by_name = {
        ranking.name: {
            str(n): {**asdict(score), "contrast": asdict(contrast)}
            for n, score, contrast in zip(
                ranking.layers, ranking.scores, ranking.contrasts, strict=True
            )
        }
        for ranking in rankings
    }
    own = zip(chosen_by.layers, chosen_by.scores, strict=True)
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": dict(model),
        "layers": list(layers),
        "score": chosen_by.name,
        "rule": dict(rule),
        "scores": {str(n): score.estimate for n, score in own},
        "rankings": rankings_by_name,
        **more,
    }


def read_selection(path: str | Path) -> LayerSelection:
    """Read a selection file, or the folder that `select_layers` wrote.

    Raises:
        MissingFile: nothing there.
        CorruptFile: not such a file, of another version, or no layer was chosen.
    """
    path = Path(path)
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise MissingFile(f"No layer selection at {path}. Make one with `salve-lm select_layers`.")
    try:
        record = json.loads(file.read_text())
    except (ValueError, OSError) as e:
        raise CorruptFile(file, f"not readable as JSON ({e})", "Run select_layers again.") from e
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CorruptFile(
            file, f"not a {FORMAT} file", f"Give the {NAME} that select_layers wrote."
        )
    if record.get("version") != VERSION:
        why = f"format version {record.get('version')}, this salve_lm reads {VERSION}"
        raise CorruptFile(file, why, "Run select_layers again with this version.")
    try:
        layers = tuple(sorted({int(n) for n in record["layers"]}))
        scores = {
            name: {int(n): float(v["estimate"]) for n, v in by_layer.items()}
            for name, by_layer in record["rankings"].items()
        }
        found = LayerSelection(layers, dict(record["model"]), record["score"], scores, record)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CorruptFile(file, f"damaged ({e!r})", "Run select_layers again.") from e
    if not layers:
        raise CorruptFile(
            file,
            "no layer was chosen",
            "Its rule found none: choose by another (`select.rule: top_n`), or name layers.",
        )
    return found


def check_model(selection: LayerSelection, model: Mapping[str, Any]) -> None:
    """Refuse a selection that was made for another model.

    Args:
        selection: the file's content.
        model: what is known of the model at hand, in the keys of `LayerSelection.model`; keys that
            are missing or None on either side are not compared, `source` never is.

    Raises:
        StaleStore: says what differs.
    """
    differing = [
        f"{key} {_short(selection.model[key])}, here {_short(model[key])}"
        for key in ("model_type", "n_layers", "d_model", "vocabulary", "weights")
        if selection.model.get(key) is not None
        and model.get(key) is not None
        and selection.model[key] != model[key]
    ]
    if differing:
        raise StaleStore(
            f"The layers were chosen for another model ({'; '.join(differing)}). Run select_layers "
            "on this one, or give `layers` as a list."
        )


def check_model_file(path: str | Path, model: nn.Module) -> None:
    """Refuse the selection at `path` where it was made for another model than `model`.

    A file that holds no more than a list `layers` says nothing about a model.

    Raises:
        StaleStore: see `check_model`.
    """
    file = Path(path)
    file = file / NAME if file.is_dir() else file
    if not file.is_file() or json.loads(file.read_text()).get("format") != FORMAT:
        return  # reading the layers says what is wrong
    selection = read_selection(file)
    state = model.state_dict()
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    here = identity_of(model.config)  # type: ignore[arg-type]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    # the hash is of the bits: the same weights in another dtype have another one
    if dtype == selection.model.get("dtype") and not any(t.is_meta for t in tensors.values()):
        here["weights"] = hash_tensors(tensors)
    check_model(selection, here)


def identity_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration alone says of a model, in the keys of `LayerSelection.model`."""
    return {
        "model_type": config.model_type,
        "n_layers": n_layers(config),
        "d_model": d_model(config),
        "vocabulary": int(text_config(config).vocab_size),
    }


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
