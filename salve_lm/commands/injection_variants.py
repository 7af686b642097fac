"""What a task vector is compared with: other strengths, other layers, other vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from salve_lm.edits.task_vector import TaskVectorInjection
from salve_lm.language.names import decoder_prefix, n_layers
from salve_lm.specificity.controls import ControlLayers, control_layers
from salve_lm.task_vectors.patterns import ALL, read_layer_list, read_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BASE, FINETUNED, SELECTED = "base", "finetuned", "selected"
# variants of METHODS 6 that inject something else than tau itself into the chosen layers
OTHER_VECTORS = ("projected", "projected_rescaled", "random_subspace", "random_direction")
Control = Literal[
    "finetuned", "all_layers", "least_specific", "random_layers", "single_layers", "all_but_one",
    "windows", "projected", "projected_rescaled", "random_subspace", "random_direction",
]  # fmt: skip


class InjectionVariant(NamedTuple):
    """One evaluation: no edit (`base`), or one injection.

    name: of its results.
    kind: `base`, `selected`, or the control it belongs to.
    layers: into which the vector goes; empty for `base`.
    edit: None for `base`.
    """

    name: str
    kind: str
    layers: tuple[int, ...]
    edit: TaskVectorInjection | None


def injection_variants(
    edit: TaskVectorInjection,
    config: PreTrainedConfig,
    alphas: Sequence[float] | None,
    controls: Sequence[Control],
    *,
    window: int = 2,
    at_most: int = 50,
    seeds: int = 1,
    seed: int = 0,
) -> tuple[list[InjectionVariant], ControlLayers | None]:
    """The base model, the injection at each strength, and its controls at its own strength.

    Args:
        edit: the injection; with `alphas`, at each of these strengths beside its own.
        config: of the model.
        alphas: strengths; only the edit's own when None.
        controls: which controls to add.
        window: adjacent layers in a window.
        at_most: random layer sets at most; all other subsets of that size where they are fewer.
        seeds: draws of each random vector.
        seed: of the draws.

    Returns:
        The variants, and the layer sets compared (None where no control asks for them).

    Raises:
        BadConfig: no or all layers are chosen, and so there are no others to compare with.
        SalveError: see `read_layers`.
    """
    n = n_layers(config)
    chosen = read_layers(edit.layers, n) or ()
    strengths = dict.fromkeys([edit.alpha, *(alphas or [])])
    found = [InjectionVariant(BASE, BASE, (), None)]
    for alpha in strengths:
        name = SELECTED if alpha == edit.alpha else f"{SELECTED}_alpha_{alpha:g}"
        found.append(_at(edit, name, SELECTED, chosen, alpha=alpha))
    sets: ControlLayers | None = None
    if {"random_layers", "least_specific"} & set(controls):
        sets = control_layers(_scores(edit, n), chosen, at_most=at_most, seed=seed)
    for control in dict.fromkeys(controls):
        found += _of(control, edit, config, chosen, sets, window, seeds, seed)
    return found, sets


def _of(
    control: str,
    edit: TaskVectorInjection,
    config: PreTrainedConfig,
    chosen: tuple[int, ...],
    sets: ControlLayers | None,
    window: int,
    seeds: int,
    seed: int,
) -> list[InjectionVariant]:
    n = n_layers(config)
    everything = tuple(range(n))
    if control == FINETUNED:
        # every tensor of the text model: what the fine-tuning gave, whatever was chosen
        pattern = f"{decoder_prefix(config).split('.')[0]}.*"
        whole = {"alpha": 1.0, "variant": "raw", "tensors": [pattern], "allow_tied": True}
        return [_at(edit, FINETUNED, control, everything, **whole)]
    if control == "all_layers":
        return [_at(edit, control, control, everything)]
    if control == "least_specific" and sets is not None:
        return [_at(edit, control, control, sets.least_specific)]
    if control in OTHER_VECTORS:
        draws = range(seed, seed + (seeds if control.startswith("random_") else 1))
        # a selection file may hold the latents too; the layers are given by number from here on
        latents = edit.latents
        if latents is None and isinstance(edit.layers, str) and edit.layers != ALL:
            latents = edit.layers
        return [
            _at(edit, control if i == seed else f"{control}_seed_{i}", control, chosen,
                variant=control, seed=i, latents=latents)
            for i in draws
        ]  # fmt: skip
    if control == "random_layers" and sets is not None:
        layer_sets: Sequence[tuple[int, ...]] = sets.random_layers
    elif control == "single_layers":
        layer_sets = [(i,) for i in everything]
    elif control == "all_but_one":
        layer_sets = [tuple(j for j in everything if j != i) for i in everything]
    else:
        layer_sets = [everything[i : i + window] for i in range(n - window + 1)]
    return [_at(edit, f"{control}_{'_'.join(map(str, s))}", control, s) for s in layer_sets]


def _at(
    edit: TaskVectorInjection, name: str, kind: str, layers: tuple[int, ...], **changes: object
) -> InjectionVariant:
    changed = dataclasses.replace(edit, name=name, layers=list(layers), **changes)  # type: ignore[arg-type]
    return InjectionVariant(name, kind, layers, changed)


def _scores(edit: TaskVectorInjection, n: int) -> dict[int, float]:
    """Scores of the layers from the selection file; without one every layer counts the same."""
    scores: dict[int, float] = {}
    if isinstance(edit.layers, str) and edit.layers != ALL:
        data = read_layer_list(edit.layers)
        scores = {int(k): float(v) for k, v in dict(data.get("scores") or {}).items()}
    return scores or dict.fromkeys(range(n), 0.0)
