"""`sweep`: strength curves of every edit and control, the strength chosen on training data."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from salve_lm.atomic import atomic_folder, check_writable_target
from salve_lm.commands.inputs import check_data, check_model, warn_of_other_backbone
from salve_lm.commands.labels import label_edits
from salve_lm.commands.sweep_files import print_tables, write_sweep
from salve_lm.commands.swept import Swept, direction_of
from salve_lm.data.labelled import Split
from salve_lm.edits import EditContext, EditPlan, EditSpec, apply, plan_edit
from salve_lm.edits.decoder_guided import DecoderGuided
from salve_lm.errors import BadConfig, NameNotFound, NoEffect, UnsupportedEdit
from salve_lm.evaluation import Evaluator
from salve_lm.features import class_index
from salve_lm.modules.studied import StudiedModel
from salve_lm.strength import Outcome, best_variant, choose_strength, outcome

logger = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = ("train", "val")
# far beyond every breakpoint 1/c_j of a multiplicative edit: what no strength can take away
UNBOUNDED = 1e12


def sweep(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule,
    edits: list[EditSpec],
    out: str,
    sae: str | None = None,
    features: str | None = None,
    classes: list[str] | None = None,
    alphas: list[float] | None = None,
    target_at_most: float = 0.0,
    others_drop: float = 0.01,
    margin: float = 1.5,
    headline: list[str] | None = None,
) -> None:
    """Run `SalveTrainer.sweep`; see there."""
    from rich.progress import track

    check_choice(target_at_most, others_drop, margin)
    studied, data = check_model(model), check_data(datamodule)
    named = group_by_name(edits)
    shown = headline or list(named)[:1]
    for name in shown:
        if name not in named:
            raise NameNotFound("edit", name, named)
    check_writable_target(out)
    warn_of_other_backbone(studied, edits, features)
    data.prepare_data()
    data.setup("fit")
    names = data.class_names
    for name in classes or []:
        class_index(name, names)
    device = trainer.strategy.root_device
    studied.to(device)
    evaluators: dict[str, Evaluator] = {s: Evaluator(studied, data, s, device) for s in SPLITS}
    context = EditContext(sae=sae, features=features)
    jobs = [
        (name, [for_class(spec, target) for spec in variants])
        for name, variants in named.items()
        for target in _targets(variants, classes or names)
    ]
    swept, refused = [], []
    for name, variants in track(jobs, description="Sweeping strengths"):
        tried = []
        for spec in variants:
            try:
                plan = plan_edit(spec, studied, context, names)
            except UnsupportedEdit as e:
                # one class for which an edit is undefined must not cost the others their results
                refused.append(f"{name} of {spec.target_class} left out: {e}")
                continue
            grid = alphas if alphas and spec.grid_kind == "alpha" else spec.default_alphas
            tried.append(
                sweep_one(
                    name,
                    plan,
                    sorted(grid),
                    studied,
                    evaluators,
                    target_at_most,
                    others_drop,
                    # beyond the whole of something (alpha = 1) more is not further, but elsewhere
                    1.0 if spec.grid_kind == "fraction" else margin,
                )
            )
        if tried:
            chosen = [t.after["train"] for t in tried]
            swept.append(tried[best_variant(chosen, tried[0].direction, target_at_most)])
    for message in refused:
        logger.warning(message)
    if not swept:
        raise UnsupportedEdit(refused[0])
    baseline = {s: outcome(e.logits({}), e.label, 0) for s, e in evaluators.items()}
    accuracy: dict[str, float] = {
        s: (e.logits({}).argmax(1) == e.label).float().mean().item() for s, e in evaluators.items()
    }
    labels = label_edits(swept, studied, evaluators, names)
    with atomic_folder(out) as folder:
        write_sweep(folder, swept, shown, names, baseline, accuracy, labels, sae, features)
    print_tables(swept, shown, names, accuracy["val"], labels, out)


def check_choice(target_at_most: float, others_drop: float, margin: float) -> None:
    """Raise `BadConfig` where strengths cannot be chosen by these; see `choose_strength`."""
    if margin < 1 or others_drop < 0 or not 0 <= target_at_most <= 1:
        raise BadConfig(
            f"margin ({margin}) is at least 1, others_drop ({others_drop}) not negative, and "
            f"target_at_most ({target_at_most}) a share."
        )


def sweep_one(
    name: str,
    plan: EditPlan,
    alphas: Sequence[float],
    studied: StudiedModel,
    evaluators: Mapping[str, Evaluator],
    target_at_most: float,
    others_drop: float,
    margin: float,
) -> Swept:
    """Measure `plan` at every strength on both splits and choose one on the training split."""
    target = plan.target
    if target is None:
        raise BadConfig(f"{plan.spec.title} names no class: set its `target_class`.")

    def at(alpha: float) -> dict[str, Outcome]:
        replaced = replacements(plan, alpha, studied)
        return {s: outcome(e.logits(replaced), e.label, target) for s, e in evaluators.items()}

    before = {s: outcome(e.logits({}), e.label, target) for s, e in evaluators.items()}
    points = {a: at(a) for a in alphas}
    curves = {s: [points[a][s] for a in alphas] for s in evaluators}
    direction = direction_of(plan.spec)
    chosen = choose_strength(
        alphas, curves["train"], before["train"], direction, target_at_most, others_drop, margin
    )
    bounded = isinstance(plan.spec, DecoderGuided) and direction == "suppress"
    return Swept(
        edit=name,
        plan=plan.with_alpha(chosen),
        target=target,
        alphas=list(alphas),
        curves=curves,
        before=before,
        after=points[chosen] if chosen else before,
        floor=at(UNBOUNDED)["val"].target if bounded else float("nan"),
    )


def replacements(plan: EditPlan, alpha: float, studied: StudiedModel) -> dict[str, Tensor]:
    """The tensors of `studied.model` that `plan` changes at strength `alpha`.

    A strength too small to change a bit is a point of the curve like any other, not an error.
    """
    try:
        return apply(dict(studied.model.named_parameters()), plan.with_alpha(alpha).ops)
    except NoEffect:
        return {}


def group_by_name(edits: Sequence[EditSpec]) -> dict[str, list[EditSpec]]:
    """Edits by name. Those that share a name are variants, of which training data choose one.

    Raises:
        BadConfig: no edits, two of one kind without a name, or variants of both directions.
    """
    named: dict[str, list[EditSpec]] = {}
    for spec in edits:
        name = spec.name or type(spec).__name__
        if name in named and spec.name is None:
            raise BadConfig(f"Two edits of kind {name}: give each a `name`.")
        named.setdefault(name, []).append(spec)
    if not named:
        raise BadConfig("No edits to sweep; give at least one under `edits`.")
    for name, variants in named.items():
        if len({direction_of(v) for v in variants}) > 1:
            raise BadConfig(f"The edits named {name!r} both suppress and enhance; rename one.")
    return named


def _targets(variants: Sequence[EditSpec], classes: Sequence[str]) -> Sequence[str | int]:
    own = [v.target_class for v in variants if v.target_class is not None]
    return list(dict.fromkeys(own)) or classes


def for_class(spec: EditSpec, target: str | int) -> EditSpec:
    """`spec` aimed at class `target`; a bare `dominant` or `selective` feature becomes its own."""
    changes: dict[str, Any] = {"target_class": target}
    feature = getattr(spec, "feature", None)
    if feature in ("dominant", "selective"):
        changes["feature"] = f"{feature}:{target}"
    return dataclasses.replace(spec, **changes)
