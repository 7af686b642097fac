"""Whether each chosen edit suppressed, linearly erased or removed its class (METHODS 3c)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from salve_lm.commands.swept import Swept
from salve_lm.edits import apply
from salve_lm.errors import UnsupportedEdit
from salve_lm.evaluation import Evaluator, linear_head
from salve_lm.modules.studied import StudiedModel
from salve_lm.removal import FeatureFigures, assess, feature_map, measure_features

logger = logging.getLogger(__name__)


def label_edits(
    swept: Sequence[Swept],
    studied: StudiedModel,
    evaluators: Mapping[str, Evaluator],
    class_names: Sequence[str],
) -> list[dict[str, Any]]:
    """The `RemovalReport` of every suppressing edit of the head, as plain data.

    Probes are fitted on the training split and measured on the held-out one. Edits that reach
    beyond a linear head change what it reads and are left out, with a word in the log.
    """
    from rich.progress import track

    train, val = (evaluators[s].head_inputs for s in ("train", "val"))
    head, name = linear_head(studied), str(studied.head_name)
    if head is None or train is None or val is None:
        return []
    original = {f"{name}.{n}": t.detach().cpu() for n, t in head.named_parameters()}
    train, val = (type(h)(h.x.cpu(), h.label.cpu()) for h in (train, val))
    before: dict[int, FeatureFigures] = {}
    rows = []
    jobs = [s for s in swept if s.direction == "suppress" and s.spec.alpha > 0]
    for s in track(jobs, description="Probing what is left"):
        try:
            mapped = feature_map(s.plan.ops, name, len(class_names))
        except UnsupportedEdit as e:
            logger.warning("%s of %s has no label: %s", s.edit, class_names[s.target], e)
            continue
        if s.target not in before:
            before[s.target] = measure_features(train, val, s.target)
        edited = original | apply(original, s.plan.ops)
        report = assess(
            train,
            val,
            _head(original, name),
            _head(edited, name),
            s.target,
            feature_map=mapped,
            original=before[s.target],
        )
        rows.append({"edit": s.edit, "target_class": class_names[s.target], **report.to_dict()})
    return rows


def _head(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    return tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
