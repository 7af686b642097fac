"""Fit a linear head on frozen features by logistic regression, before anything is fine-tuned."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from salve_lm.data.labelled import LabelledData
from salve_lm.errors import BadConfig, NotFinite, ShapeMismatch
from salve_lm.evaluation import HeadInputs, collect_head_inputs, linear_head
from salve_lm.modules.studied import StudiedModel

logger = logging.getLogger(__name__)


class FitHead(Callback):
    """Gives the head its best weights for the network as it is, when a fit begins.

    One pass over the training images (without augmentation), then multinomial logistic regression
    on what the head reads: a convex problem with one solution, so there is no learning rate and no
    number of epochs to choose. Fine-tuning that starts from there does not send the gradients of a
    random head into pretrained weights (linear probing, then fine-tuning: Kumar et al., ICLR 2022,
    arXiv 2202.10054). A fit that resumes from a checkpoint keeps the checkpoint's head.

    Under distributed strategies every process makes the whole pass.

    Args:
        l2: Weight of the squared weights, beside the mean cross-entropy. The bias is free.
        max_iterations: Of L-BFGS; it stops earlier where it has converged.
    """

    def __init__(self, l2: float = 1e-3, max_iterations: int = 300) -> None:
        if l2 < 0 or max_iterations < 1:
            raise BadConfig("l2 is not negative, and max_iterations at least 1.")
        self.l2, self.max_iterations = l2, max_iterations

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the head, unless a checkpoint is resumed."""
        if trainer.ckpt_path is not None:
            return
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, StudiedModel) or not isinstance(data, LabelledData):
            raise BadConfig("FitHead needs a model such as vision.Classifier, and image data.")
        head = linear_head(pl_module)
        if head is None or head.bias is None:
            raise BadConfig(
                "FitHead needs a final torch.nn.Linear with a bias (SqueezeNet: head: gap_linear)."
            )
        was_training = pl_module.training
        pl_module.eval()
        with torch.no_grad():
            inputs = collect_head_inputs(pl_module, data, "train", pl_module.device)
        pl_module.train(was_training)
        if int(inputs.label.max()) >= head.out_features:
            raise ShapeMismatch(
                f"The data has a class {int(inputs.label.max())}, the head {head.out_features} "
                "outputs. Set num_classes."
            )
        weight, bias = logistic_regression(inputs, head.out_features, self.l2, self.max_iterations)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
            right = F.linear(inputs.x, head.weight, head.bias).argmax(1) == inputs.label
        logger.info("Head fitted: %.1f %% of the training images.", 100 * right.float().mean())


def logistic_regression(
    inputs: HeadInputs, n_classes: int, l2: float, max_iterations: int = 300
) -> tuple[Tensor, Tensor]:
    """Weight [n_classes, d_in] and bias [n_classes], float64, of the regularised optimum.

    Minimises mean cross-entropy + l2 * sum of squared weights.

    Raises:
        NotFinite: NaN or infinity in the inputs.
    """
    x, label = inputs.x.double(), inputs.label
    if not bool(x.isfinite().all()):
        raise NotFinite("x", "what the head reads", "Check the images and the weights.")
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone()
        weight = x.new_zeros(n_classes, x.shape[1]).requires_grad_()
        bias = x.new_zeros(n_classes).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=max_iterations, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(x, weight, bias), label) + l2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return weight.detach(), bias.detach()
