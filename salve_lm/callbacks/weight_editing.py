"""Edited weights during validation, test and prediction; the original ones at any other time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from salve_lm.edits.context import EditContext
from salve_lm.edits.live import LiveEdit
from salve_lm.edits.lookup import ModelIndex
from salve_lm.edits.plan import Applied, TensorChange, apply_named
from salve_lm.edits.resolve import EditPlan, plan_edits
from salve_lm.edits.spec import EditSpec
from salve_lm.errors import BadConfig, EditConflict, RankMismatch, UnsupportedStrategy
from salve_lm.hashing import hash_tensors
from salve_lm.modules.studied import StudiedModel

logger = logging.getLogger(__name__)

SHARDED = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
SWAPPERS = (WeightAveraging, StochasticWeightAveraging, ModelPruning)
# callbacks of other projects that exchange weights during validation, known by name only
FOREIGN_SWAPPERS = {"EMA", "EMACallback", "ExponentialMovingAverage", "SWA", "WeightEMA"}


class WeightEditing(Callback):
    """Validate, test and predict with edited weights; train and save with the original ones.

    The edits are resolved against the weights of the moment whenever an evaluation starts, applied
    in order, and taken back, bit for bit, when it ends, at an exception and at teardown. The
    sanity check before training runs unedited. A checkpoint written in between holds the original
    weights. How far each tensor moved is logged as `edit/TENSOR` (norm of the change over norm of
    the tensor).

    One callback owns all edits: a second one, weight averaging or pruning beside it is an error, as
    are sharded strategies.

    Args:
        edits: Edits, applied in order.
        sae: SAE folder for edits that name none.
        features: Feature-table folder for edits that name none.
    """

    def __init__(
        self, edits: list[EditSpec], sae: str | None = None, features: str | None = None
    ) -> None:
        if not edits:
            raise BadConfig("WeightEditing without edits: give at least one under `edits`.")
        self.edits = list(edits)
        self.context = EditContext(sae, features)
        self.plans: list[EditPlan] = []
        self.changes: Mapping[str, TensorChange] = {}
        self._live: LiveEdit | None = None

    @property
    def edited(self) -> bool:
        """Whether the model holds edited weights right now."""
        return self._live is not None

    @property
    def originals(self) -> Mapping[str, Tensor]:
        """The unedited values of the tensors that are edited right now, by name."""
        return self._live.originals if self._live is not None else {}

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Show the original weights inside the block."""
        with contextlib.nullcontext() if self._live is None else self._live.suspended():
            yield

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and resolve the edits once, before hours are spent."""
        _refuse_sharded(trainer)
        self._refuse_conflicts(trainer)
        studied = as_studied(pl_module, type(self).__name__)
        if isinstance(getattr(studied, "model", None), torch.nn.Module):
            plan_edits(self.edits, studied, self.context, class_names_of(trainer, pl_module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply, unless this is the sanity check."""
        if not trainer.sanity_checking:
            self._apply(trainer, pl_module)
            self._log(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore."""
        self._restore()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply."""
        self._apply(trainer, pl_module)
        self._log(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore."""
        self._restore()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply."""
        self._apply(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore."""
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restore."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore, should anything have been left edited."""
        self._restore()

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()
        studied = as_studied(pl_module, type(self).__name__)
        failure: Exception | None = None
        digest = bytes(32)
        try:
            index = ModelIndex(studied.model)
            applied = self._compute(trainer, studied, index)
            if trainer.world_size > 1:
                digest = bytes.fromhex(hash_tensors(applied.tensors))
        except Exception as e:  # the other ranks wait for this one's hash before anyone may stop
            failure = e
        agreed = _ranks_agree(trainer, digest)
        if failure is not None:
            raise failure
        if not agreed:
            raise RankMismatch(
                "The edited tensors differ between the processes of this run. Give every process "
                "the same weights, SAE and feature table (same files, same options)."
            )
        self._live = LiveEdit(index, applied.tensors)
        self.changes = applied.changes
        if trainer.is_global_zero:
            for name, change in applied.changes.items():
                logger.info(
                    "Edited %s: norm %.4g -> %.4g, relative change %.3g",
                    name, change.norm_before, change.norm_after, change.relative,
                )  # fmt: skip

    def _compute(self, trainer: Trainer, studied: StudiedModel, index: ModelIndex) -> Applied:
        names = class_names_of(trainer, studied)
        self.plans = plan_edits(self.edits, studied, self.context, names, index)
        return apply_named(index.values, [plan.named for plan in self.plans])

    def _restore(self) -> None:
        if self._live is not None:
            self._live.restore()
            self._live = None

    def _log(self, pl_module: LightningModule) -> None:
        for name, change in self.changes.items():
            # equal on every rank already; sync_dist only silences the advice to set it
            pl_module.log(f"edit/{name}", change.relative, sync_dist=True)

    def _refuse_conflicts(self, trainer: Trainer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            kinds = {kind.__name__ for kind in type(other).__mro__}
            swaps = isinstance(other, SWAPPERS) or kinds & FOREIGN_SWAPPERS
            if swaps or (isinstance(other, WeightEditing) and other is not self):
                raise EditConflict(
                    f"WeightEditing and {type(other).__name__} would both exchange the same "
                    "weights. Put all edits into one WeightEditing, and remove the other callback."
                )


def as_studied(pl_module: LightningModule, who: str) -> StudiedModel:
    """`pl_module`, if it names the network under study; otherwise `BadConfig`."""
    if not isinstance(pl_module, StudiedModel):
        raise BadConfig(
            f"{who} needs a StudiedModel (for example vision.Classifier), not a "
            f"{type(pl_module).__name__}: derive yours from salve_lm.modules.studied.StudiedModel."
        )
    return pl_module


def class_names_of(trainer: Trainer, pl_module: LightningModule) -> list[str] | None:
    """Names of the classes as the data module, or else the model, has them."""
    data: Any = getattr(trainer, "datamodule", None)
    for source in (data, pl_module):
        names = getattr(source, "class_names", None)
        if names:
            return list(names)
    return None


def _refuse_sharded(trainer: Trainer) -> None:
    if isinstance(trainer.strategy, SHARDED):
        raise UnsupportedStrategy(
            f"Weights cannot be edited under {type(trainer.strategy).__name__}, which shards them. "
            "Use one device or `strategy: ddp`, or validate the model that `salve-lm edit` writes."
        )


def _ranks_agree(trainer: Trainer, digest: bytes) -> bool:
    """Whether all ranks hold the same 32 bytes."""
    if trainer.world_size == 1:
        return True
    mine = torch.tensor(list(digest), dtype=torch.uint8, device=trainer.strategy.root_device)
    everyone = trainer.strategy.all_gather(mine).reshape(-1, len(digest))
    return bool((everyone == mine).all())
