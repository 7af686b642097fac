"""Train and validate an image classifier; the StudiedModel of the vision side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassStatScores

from salve_lm.errors import BadConfig
from salve_lm.fault_tolerance.exact_resume import exact_resume
from salve_lm.fault_tolerance.random_state import RandomStates
from salve_lm.modules.learning_rate import total_steps
from salve_lm.modules.studied import StudiedModel
from vision.backbones import build_backbone
from vision.heads import HeadKind
from vision.site_forward import explained

STAGES = ("val", "test")
Schedule = Literal["constant", "cosine"]
# of Backbone.describe(): what must agree between a checkpoint and the model it is loaded into
IDENTITY = ("library", "name", "num_classes", "head")


class Classifier(StudiedModel):
    """An image classifier trained with cross-entropy.

    Logs `train_loss`, and for validation and test `{val,test}_loss`, `{val,test}_accuracy` and
    `{val,test}_accuracy/CLASS` for every class that has samples. Predicts logits.

    No hyper-parameters are stored in checkpoints: Lightning would let them win over the command
    line without a word. Instead a checkpoint names its network, and loading it into another one is
    an error.

    Args:
        backbone: a torchvision name (`resnet18`), a timm name (`timm:vit_tiny_patch16_224`), or any
            `nn.Module` by class_path.
        num_classes: number of logits; must equal the data's classes. null keeps the head of the
            weights (or the module) as it is.
        weights: `none`, a public name (`DEFAULT`, `IMAGENET1K_V1`), a local `.safetensors`, `.pth`
            or `.ckpt`, or an export folder.
        head: `gap_linear` gives SqueezeNet an average pool -> Linear head.
        head_name: name of the final linear layer, where it is not the last one.
        options: further arguments of a named backbone's constructor, such as `img_size`.
        ignore_head: start with a new head; the other weights come from the file or the module.
        freeze_backbone: train the head only; the rest stays in eval mode.
        optimizer: of the parameters that are trained.
        backbone_lr: learning rate of everything but the head, where it is to differ from the
            optimiser's: pretrained weights are moved gently, a new head needs more.
        schedule: of the learning rate, per step over the whole fit: `cosine` falls to zero.
        warmup: share of all steps over which the learning rate rises from zero.
        lr_scheduler: replaces `schedule` and `warmup`.
        lr_scheduler_interval: whether `lr_scheduler` moves per step or per epoch.
        label_smoothing: of the training loss. Smoothing (like dropout) makes classes harder to cut
            out of the head with `rows: class`.

    Raises:
        BadConfig: options out of range; for the others see `vision.backbones.build_backbone`.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18",
        num_classes: int | None = 10,
        weights: str | None = None,
        head: HeadKind = "native",
        head_name: str | None = None,
        options: dict[str, Any] | None = None,
        ignore_head: bool = False,
        freeze_backbone: bool = False,
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(
            p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-3
        ),
        schedule: Schedule = "cosine",
        warmup: float = 0.0,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["step", "epoch"] = "epoch",
        label_smoothing: float = 0.0,
        backbone_lr: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= warmup < 1 or not 0 <= label_smoothing < 1:
            raise BadConfig("warmup and label_smoothing are shares, from 0 to below 1.")
        if backbone_lr is not None and (freeze_backbone or not backbone_lr > 0):
            raise BadConfig(
                f"backbone_lr is {backbone_lr}: it lies above 0, and a frozen backbone has none. "
                "Leave out backbone_lr or freeze_backbone."
            )
        self.backbone = build_backbone(
            backbone, num_classes, weights, head, head_name, options, ignore_head
        )
        self.model = self.backbone.model
        self.head_name = self.backbone.head_name
        self.sites = self.backbone.sites
        self.num_classes = self.backbone.num_classes
        self.class_names: list[str] = []
        self.freeze_backbone = freeze_backbone
        self._make_optimizer, self._make_scheduler = optimizer, lr_scheduler
        self._schedule, self._warmup, self._interval = schedule, warmup, lr_scheduler_interval
        self._label_smoothing, self._backbone_lr = label_smoothing, backbone_lr
        self._counts = nn.ModuleDict()
        # not self.log's own mean: over ranks with unequally many samples that is not the mean
        self._losses = nn.ModuleDict({stage: MeanMetric() for stage in STAGES})
        if (freeze_backbone or backbone_lr is not None) and self.head_name is None:
            raise BadConfig("freeze_backbone and backbone_lr need a head; this model has none.")
        if freeze_backbone and self.head_name is not None:
            self.model.requires_grad_(False)
            self.model.get_submodule(self.head_name).requires_grad_(True)
            self.train()

    def describe(self) -> dict[str, Any]:
        """Plain values from which the network can be built without this package."""
        return self.backbone.describe()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, num_classes] of `images` [n, channels, height, width].

        Raises:
            BadConfig: images of another size or with other channels than the network takes.
        """
        with explained(self.model, images):
            out = self.model(images)
        # GoogLeNet and Inception give their auxiliary logits along while they train
        return out[0] if isinstance(out, tuple) else out

    def train(self, mode: bool = True) -> Classifier:
        """Set training mode; a frozen backbone stays in eval mode (batch norm, dropout)."""
        super().train(mode)
        if mode and self.freeze_backbone and self.head_name is not None:
            self.model.eval()
            self.model.get_submodule(self.head_name).train()
        return self

    def setup(self, stage: str) -> None:
        """Take the class names from the data module and check that they fit the head."""
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if names is not None and self.num_classes not in (None, len(names)):
            raise BadConfig(
                f"The data has {len(names)} classes, the classifier {self.num_classes} logits. Set "
                f"`num_classes: {len(names)}` (with weights of another width also `ignore_head: "
                "true`), or choose the data that the classifier was made for."
            )
        width = self.num_classes or len(names or ())
        if not width and stage != "predict":
            raise BadConfig(
                "The number of classes is not known: the model has no head and the data no "
                "class_names. Set `head_name`, or use a data module with class_names."
            )
        self.class_names = list(names or map(str, range(width)))
        if width:
            # at least two, or torchmetrics takes the task for a binary one
            counts = partial(MulticlassStatScores, num_classes=max(width, 2), average="none")
            self._counts = nn.ModuleDict({s: counts() for s in STAGES})

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch `(images, labels)`."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self._label_smoothing)
        # ranks have equally many images, so that the mean of their means is that of all
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Count hits of one batch `(images, labels)`."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Count hits of one batch `(images, labels)`."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> Tensor:
        """Logits of `(images, labels)` or of images alone."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracy, overall and per class."""
        self._log_results("val")

    def on_test_epoch_end(self) -> None:
        """Log loss and accuracy, overall and per class."""
        self._log_results("test")

    def configure_callbacks(self) -> list[Callback]:
        """Stop at SIGTERM with a checkpoint, and resume exactly from any."""
        return [*exact_resume(), RandomStates()]

    def configure_optimizers(self) -> Any:
        """The optimiser of the trainable parameters, with the schedule."""
        optimizer = self._make_optimizer(self._parameter_groups())
        if self._make_scheduler is not None:
            scheduler: Any = self._make_scheduler(optimizer)
            interval = self._interval
        elif self._schedule == "constant" and self._warmup == 0:
            return optimizer
        else:
            n_batches = getattr(getattr(self.trainer, "datamodule", None), "n_train_batches", None)
            if n_batches is None:
                steps = self.trainer.estimated_stepping_batches
            else:
                steps = total_steps(self.trainer, n_batches)
            if math.isinf(steps):
                raise BadConfig("A schedule needs an end: set trainer.max_epochs or max_steps.")
            factor = partial(
                learning_rate_factor, steps=int(steps), schedule=self._schedule, warmup=self._warmup
            )
            scheduler, interval = LambdaLR(optimizer, factor), "step"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": interval,
                "monitor": "val_loss",
            },
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which network the weights belong to."""
        checkpoint["backbone"] = self.describe()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another network with a message that says which."""
        found, own = checkpoint.get("backbone", {}), self.describe()
        other = [k for k in IDENTITY if k in found and found[k] != own[k]]
        if other:
            raise BadConfig(
                "The checkpoint holds another network: "
                + ", ".join(f"{k} {found[k]!r}, here {own[k]!r}" for k in other)
                + ". Use the model config that it was trained with."
            )

    def _parameter_groups(self) -> list[Any]:
        trained = [p for p in self.parameters() if p.requires_grad]
        if self._backbone_lr is None or self.head_name is None:
            return trained
        head = {id(p) for p in self.model.get_submodule(self.head_name).parameters()}
        return [
            {"params": [p for p in trained if id(p) in head]},
            {"params": [p for p in trained if id(p) not in head], "lr": self._backbone_lr},
        ]

    def _evaluate(self, batch: Sequence[Tensor], stage: str) -> None:
        images, labels = batch
        if not len(labels):  # the share of a rank for which there are no samples
            return
        logits = self(images)
        cast(MeanMetric, self._losses[stage]).update(F.cross_entropy(logits, labels), len(labels))
        cast(MulticlassStatScores, self._counts[stage]).update(logits, labels)

    def _log_results(self, stage: str) -> None:
        loss = cast(MeanMetric, self._losses[stage])
        counts = cast(MulticlassStatScores, self._counts[stage])
        self.log(f"{stage}_loss", loss.compute(), sync_dist=True)
        # columns: true and false positives, true and false negatives, samples; over all ranks
        scores = counts.compute()
        loss.reset()
        counts.reset()
        hits, samples = scores[:, 0], scores[:, 4]
        name = f"{stage}_accuracy"
        # equal on every rank already; sync_dist only silences Lightning's advice to set it
        self.log(name, hits.sum() / samples.sum(), prog_bar=True, sync_dist=True)
        self.log_dict(
            {
                f"{name}/{c}": hits[i] / samples[i]
                for i, c in enumerate(self.class_names)
                if samples[i] > 0
            },
            sync_dist=True,
        )


def learning_rate_factor(step: int, steps: int, schedule: Schedule, warmup: float) -> float:
    """Share of the full learning rate at `step` of `steps`: a linear rise, then the schedule."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    if schedule == "constant":
        return 1.0
    done = (step - rise) / max(steps - rise, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
