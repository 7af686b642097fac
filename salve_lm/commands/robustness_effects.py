"""One edit with the features of several autoencoders: its effect at one strength for all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch

from salve_lm.alpha_crit import summarise
from salve_lm.callbacks.critical_threshold import check_closed_form, thresholds
from salve_lm.commands.robustness_saes import StudiedSAE, live_latents
from salve_lm.commands.sweep import for_class, replacements, sweep_one
from salve_lm.commands.swept import Swept
from salve_lm.edits import EditContext, EditPlan, EditSpec, plan_edit
from salve_lm.edits.decoder_guided import DecoderGuided
from salve_lm.errors import UnsupportedEdit
from salve_lm.evaluation import Evaluator, linear_head
from salve_lm.features import FeatureTable
from salve_lm.modules.studied import StudiedModel
from salve_lm.strength import Outcome, choose_strength, outcome

Control = Literal["random_latent", "permuted"]
# what stands in the column `control` for the edit itself
ITSELF = ""


@dataclass(frozen=True)
class Classifier:
    """The network that is edited, and what it is measured on.

    Attributes:
        studied: the network; its weights are never changed.
        evaluators: `train` and `val` -> logits of edited weights.
        class_names: one name a label.
    """

    studied: StudiedModel
    evaluators: Mapping[str, Evaluator]
    class_names: list[str]


@dataclass(frozen=True)
class Rules:
    """How a strength is chosen, and which controls stand beside an edit.

    Attributes:
        alphas: strengths to try; each kind of edit's own where None.
        target_at_most: see `choose_strength`.
        others_drop: see `choose_strength`.
        margin: see `choose_strength`.
        controls: what to measure beside each edit of a class's feature.
        draws: random latents for each autoencoder and class.
        seed: of the draws and the permutations.
    """

    alphas: Sequence[float] | None = None
    target_at_most: float = 0.0
    others_drop: float = 0.01
    margin: float = 1.5
    controls: Sequence[Control] = ("random_latent", "permuted")
    draws: int = 3
    seed: int = 0


def effects_of(
    saes: Sequence[StudiedSAE],
    edits: Mapping[str, EditSpec],
    classes: Sequence[str],
    classifier: Classifier,
    contexts: Mapping[str, EditContext],
    rules: Rules,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Held-out effect of every edit of every class with every autoencoder of one setting.

    All get the same strength, chosen on the training split from the mean of their curves; the
    strength that each would choose by itself is `own_alpha`. Controls get the strength of the edit
    they stand beside.

    Args:
        saes: of one setting.
        edits: name -> edit without a class.
        classes: to edit.
        classifier: what is edited.
        contexts: name of an autoencoder -> it and its feature table.
        rules: how.

    Returns:
        One row an (autoencoder, edit, class, control, draw), and messages about what is left out.
    """
    rows, left_out = [], []
    for name, spec in edits.items():
        for target in classes:
            swept: dict[str, Swept] = {}
            for sae in saes:
                try:
                    plan = _plan(for_class(spec, target), contexts[sae.name], classifier)
                except UnsupportedEdit as e:
                    left_out.append(f"{name} of {target} with {sae.name} left out: {e}")
                    continue
                swept[sae.name] = _swept(name, plan, classifier, rules)
            if not swept:
                continue
            alpha = shared_strength(list(swept.values()), rules)
            for sae in (s for s in saes if s.name in swept):
                own = swept[sae.name]
                common = {"sae": sae.name, "seed": sae.seed, "edit": name, "class": target}
                rows.append(
                    common
                    | _measured(own.plan, alpha, own.before["val"], classifier, ITSELF, 0)
                    | {
                        "own_alpha": own.spec.alpha,
                        "own_target": own.after["val"].target,
                        "own_others": own.after["val"].others,
                    }
                )
                table = contexts[sae.name].table(None)
                for control, draw, changed in control_edits(own, table, rules):
                    plan = _plan(changed, contexts[sae.name], classifier)
                    rows.append(
                        common
                        | _measured(plan, alpha, own.before["val"], classifier, control, draw)
                    )
    return rows, left_out


def shared_strength(swept: Sequence[Swept], rules: Rules) -> float:
    """The strength that the mean of several training curves chooses."""
    curves = [s.curves["train"] for s in swept]
    first = swept[0]
    return choose_strength(
        first.alphas,
        [_mean(points) for points in zip(*curves, strict=True)],
        first.before["train"],
        first.direction,
        rules.target_at_most,
        rules.others_drop,
        _margin(first.spec, rules),
    )


def control_edits(
    edited: Swept, table: FeatureTable, rules: Rules
) -> list[tuple[Control, int, EditSpec]]:
    """(control, draw, edit): the edit of one class with a latent drawn at random, or c shuffled.

    Only edits that take one feature of the class have them.
    """
    spec = edited.spec
    if not isinstance(spec, DecoderGuided) or spec.guide != "decoder_abs":
        return []
    found: list[tuple[Control, int, EditSpec]] = []
    if "random_latent" in rules.controls:
        live = live_latents(table)
        live = live[~torch.isin(live, torch.tensor(edited.plan.features))]
        draw = torch.Generator().manual_seed(rules.seed * 1_000_003 + edited.target)
        for i, n in enumerate(torch.randperm(len(live), generator=draw)[: rules.draws].tolist()):
            drawn = dataclasses.replace(spec, feature=int(live[n]))
            found.append(("random_latent", i, drawn))
    if "permuted" in rules.controls:
        found.append(("permuted", 0, dataclasses.replace(spec, guide="permuted", seed=rules.seed)))
    return found


def _plan(spec: EditSpec, context: EditContext, classifier: Classifier) -> EditPlan:
    return plan_edit(spec, classifier.studied, context, classifier.class_names)


def _swept(name: str, plan: EditPlan, classifier: Classifier, rules: Rules) -> Swept:
    spec = plan.spec
    given = rules.alphas if rules.alphas and spec.grid_kind == "alpha" else spec.default_alphas
    return sweep_one(
        name,
        plan,
        sorted(given),
        classifier.studied,
        classifier.evaluators,
        rules.target_at_most,
        rules.others_drop,
        _margin(spec, rules),
    )


def _margin(spec: EditSpec, rules: Rules) -> float:
    # beyond the whole of something (alpha = 1) more is not further, but elsewhere
    return 1.0 if spec.grid_kind == "fraction" else rules.margin


def _measured(
    plan: EditPlan, alpha: float, before: Outcome, classifier: Classifier, control: str, draw: int
) -> dict[str, Any]:
    """Held-out outcome at `alpha` (0: the unedited model), and the class-flip threshold."""
    target, held_out = int(plan.target or 0), classifier.evaluators["val"]
    after = before
    if alpha:
        replaced = replacements(plan, alpha, classifier.studied)
        after = outcome(held_out.logits(replaced), held_out.label, target)
    flip, no_root = _flip(plan, classifier)
    return {
        "control": control,
        "draw": draw,
        "latents": " ".join(map(str, plan.features)),
        "alpha": alpha,
        "target_before": before.target,
        "target": after.target,
        "others_before": before.others,
        "others": after.others,
        "flip_median": flip,
        "flip_no_root_share": no_root,
    }


def _flip(plan: EditPlan, classifier: Classifier) -> tuple[float, float]:
    """Median class-flip threshold of the class's held-out samples; NaN without a closed form."""
    head, inputs = linear_head(classifier.studied), classifier.evaluators["val"].head_inputs
    if head is None or inputs is None:
        return math.nan, math.nan
    try:
        check_closed_form(plan, str(classifier.studied.head_name))
    except UnsupportedEdit:
        return math.nan, math.nan
    W = head.weight.detach().cpu().double()
    b = torch.zeros(len(W)).double() if head.bias is None else head.bias.detach().cpu().double()
    own = inputs.x[inputs.label == plan.target].cpu()
    found = summarise(thresholds(own, W, b, plan, int(plan.target or 0)).flip.alpha)
    return found.median, found.no_root_share


def _mean(points: Sequence[Outcome]) -> Outcome:
    return Outcome(
        target=fmean(p.target for p in points),
        others=fmean(p.others for p in points),
        target_logit=fmean(p.target_logit for p in points),
        per_class=[fmean(v) for v in zip(*(p.per_class for p in points), strict=True)],
    )
