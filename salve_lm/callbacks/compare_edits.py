"""Every edit of a validation beside the trivial ones that might do as well."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from salve_lm.callbacks.head_callback import HeadCallback
from salve_lm.callbacks.head_samples import (
    HeadCapture,
    HeadSamples,
    editing_of,
    linear_head,
)
from salve_lm.callbacks.tables import write_table
from salve_lm.callbacks.weight_editing import WeightEditing, as_studied, class_names_of
from salve_lm.edits.class_bias import LowerClassBias
from salve_lm.edits.class_row import ShrinkClassRow
from salve_lm.edits.decoder_guided import DecoderGuided
from salve_lm.edits.plan import apply
from salve_lm.edits.resolve import EditPlan, plan_edit
from salve_lm.edits.spec import EditSpec
from salve_lm.errors import BadConfig, SalveError
from salve_lm.modules.studied import StudiedModel

logger = logging.getLogger(__name__)

FILE = "compare_edits"


class CompareEdits(HeadCallback[HeadSamples]):
    """After each validation, one table: what every edit does, and what its controls do.

    Target accuracy (share of the class's own samples that are still called so) and the accuracy of
    all other samples, before and after. "Target to 0, others intact" is nearly free for some
    trivial edits, so an edit shows something only where it beats them.

    Each edit of the final layer stands alone, computed in closed form from the inputs of that
    layer, together with its controls: for `DecoderGuided` the permuted guide, the head's own row
    and the class means as guides, at the same alpha; for every edit about a class its row zeroed
    and its bias lowered by as much as the edit lowers the class's mean logit (raised, where it
    rises). The row `all edits together` is the pass itself. Edits of other layers appear in that
    row only, and each batch then runs once more with the original weights.

    Needs a `WeightEditing` callback. Keeps the table in `table`, and writes it to
    `compare_edits.csv` and `.json` in `out`.

    Args:
        controls: Controls to show instead of those above. One without a `target_class` takes the
            class of the edit it is beside.
        out: Folder for the table; that of an earlier evaluation is replaced.
    """

    def __init__(self, controls: list[EditSpec] | None = None, out: str | None = None) -> None:
        super().__init__()
        self.controls = controls
        self.out = out
        self.table: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make sure that there are edits to compare."""
        _editing(trainer)

    def capture(self, trainer: Trainer, pl_module: LightningModule) -> HeadCapture:
        """Keep what the final layer reads."""
        return HeadCapture(trainer, pl_module, type(self).__name__)

    def report(self, trainer: Trainer, pl_module: LightningModule, samples: HeadSamples) -> None:
        """Compute, print and write the table of one evaluation."""
        editing = _editing(trainer)
        studied = as_studied(pl_module, type(self).__name__)
        names = class_names_of(trainer, pl_module)
        with editing.suspended():
            bench = _Bench(studied, editing, samples, names)
            self.table = list(self._rows(bench, editing))
        if trainer.is_global_zero:
            _print(self.table)
            if self.out is not None:
                write_table(self.out, FILE, self.table)

    def _rows(self, bench: _Bench, editing: WeightEditing) -> Iterable[dict[str, Any]]:
        for plan in editing.plans:
            if not bench.covers(plan):
                continue
            after = bench.logits(plan)
            title = plan.spec.title
            yield bench.row(plan.target, plan.spec.alpha, after, "edit", title)
            if plan.target is None:
                continue
            for label, spec in self._controls(bench, plan, after):
                try:
                    control = plan_edit(spec, bench.studied, editing.context, bench.class_names)
                    logits = bench.logits(control)
                except SalveError as e:
                    logger.warning("Control %s of %s left out: %s", label, title, e)
                    continue
                yield bench.row(plan.target, control.spec.alpha, logits, "control", label, title)
        for target in dict.fromkeys(plan.target for plan in editing.plans):
            yield bench.row(target, None, bench.passed, "all", "all edits together")

    def _controls(
        self, bench: _Bench, plan: EditPlan, after: Tensor
    ) -> Iterable[tuple[str, EditSpec]]:
        target = plan.target
        if self.controls is not None:
            for spec in self.controls:
                aimed = spec
                if spec.target_class is None:
                    aimed = dataclasses.replace(spec, target_class=target)
                yield spec.name or type(spec).__name__, aimed
            return
        spec = plan.spec
        if isinstance(spec, DecoderGuided) and spec.axis == "input":
            for guide in ("permuted", "head_row", "class_mean"):
                if guide != spec.guide:
                    # the same rows: `auto` may rest on the class that the feature names
                    changes: dict[str, Any] = {"guide": guide, "target_class": target, "name": None}
                    if guide == "permuted" and spec.feature is None:
                        changes["feature"] = list(plan.features)
                    yield guide, dataclasses.replace(spec, **changes)
        own = bench.own(target)
        if not own.any():
            return
        fall = float((bench.before[own, target] - after[own, target]).mean())
        if fall != 0:
            yield (
                "bias lowered" if fall > 0 else "bias raised",
                LowerClassBias(target_class=target, alpha=fall),
            )
        if fall > 0:
            yield "row zeroed", ShrinkClassRow(target_class=target)


class _Bench:
    """Edits of the final layer, measured from its inputs."""

    def __init__(
        self,
        studied: StudiedModel,
        editing: WeightEditing,
        samples: HeadSamples,
        class_names: list[str] | None,
    ) -> None:
        self.studied, self.samples, self.class_names = studied, samples, class_names
        head = linear_head(studied, CompareEdits.__name__)
        self._name = str(studied.head_name)
        # copies: the live tensors change back when the original weights go out of view
        self._head = {f"{self._name}.{n}": t.detach().clone() for n, t in head.named_parameters()}
        self.before = self._forward({})
        self.passed = samples.logits

    def covers(self, plan: EditPlan) -> bool:
        """Whether the plan changes nothing but the final layer."""
        return set(plan.tensors) <= set(self._head)

    def logits(self, plan: EditPlan) -> Tensor:
        """Logits [n, n_classes] under this plan alone."""
        return self._forward(apply(self._head, plan.ops))

    def own(self, target: int | None) -> Tensor:
        """Which samples belong to class `target`, bool [n]."""
        return self.samples.label == (-1 if target is None else target)

    def row(
        self,
        target: int | None,
        alpha: float | None,
        after: Tensor,
        kind: str,
        title: str,
        of: str = "",
    ) -> dict[str, Any]:
        """One line of the table; NaN for the target's accuracy where there is none."""
        name = "" if target is None else str(target)
        if target is not None and self.class_names is not None:
            name = self.class_names[target]
        values: dict[str, Any] = {
            "kind": kind, "edit": title, "control_of": of, "class": name, "alpha": alpha
        }  # fmt: skip
        own = self.own(target)
        for when, logits in (("before", self.before), ("after", after)):
            right = (logits.argmax(1) == self.samples.label).float()
            values[f"target_{when}"] = float(right[own].mean())
            values[f"others_{when}"] = float(right[~own].mean())
        return values

    def _forward(self, replaced: Mapping[str, Tensor]) -> Tensor:
        tensors = {**self._head, **replaced}
        weight, bias = (tensors.get(f"{self._name}.{n}") for n in ("weight", "bias"))
        x = self.samples.x.to(weight.device, weight.dtype)  # type: ignore[union-attr]
        return nn.functional.linear(x, weight, bias).float().cpu()  # type: ignore[arg-type]


def _editing(trainer: Trainer) -> WeightEditing:
    editing = editing_of(trainer)
    if editing is None:
        raise BadConfig(
            "CompareEdits needs edits to compare: add a WeightEditing callback with `edits`."
        )
    return editing


def _print(table: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="Edits and their controls (before > after)", title_justify="left")
    for column in ("class", "edit"):
        shown.add_column(column, no_wrap=True)
    for column in ("alpha", "target %", "others %"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in table:
        indent = "  " if row["kind"] == "control" else ""
        alpha = "" if row["alpha"] is None else f"{row['alpha']:.4g}"
        change = [
            f"{100 * row[f'{who}_before']:.1f} > {100 * row[f'{who}_after']:.1f}"
            for who in ("target", "others")
        ]
        shown.add_row(row["class"], indent + row["edit"], alpha, *change)
    Console().print(shown)
