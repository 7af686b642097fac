"""Training of sparse autoencoders: any architecture, one or many processes, exact resume."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from salve_lm.activations.batch import ActivationBatch
from salve_lm.errors import BadConfig, ShapeMismatch
from salve_lm.fault_tolerance.exact_resume import exact_resume
from salve_lm.modules.sae_memory import check_memory
from salve_lm.modules.sae_module import SAEModule
from salve_lm.modules.sae_optimizer import Trained, configure_adam

if TYPE_CHECKING:
    # SAELens takes seconds to import: everything of salve_lm.sae is imported where it is used
    from salve_lm.sae.measured_step import MeasuredStep

_log = logging.getLogger(__name__)


class SAETraining(SAEModule):
    """Trains one autoencoder on batches of activations and saves it in SAELens' format.

    Args:
        architecture: `linear_l1` (SALVE's), `standard` (ReLU-L1), `topk`, `batchtopk`, `gated`,
            `jumprelu` or `matryoshka_batchtopk`.
        d_sae: number of latents.
        options: options of the architecture by SAELens' names, such as `l1_coefficient`, `k` or
            `l0_coefficient`.
        d_in: width of the activations; taken from the data module where not given.
        lr: learning rate of Adam.
        betas: Adam's decay rates.
        l1_warm_up_steps: steps over which the sparsity weight (L1, or L0 for jumprelu) grows
            linearly from zero.
        lr_warm_up_steps: steps over which the learning rate grows linearly to `lr`.
        lr_decay_steps: steps at the end over which it falls linearly towards zero.
        normalize_input: scaling of the activations. `expected_average_only_in` (to an average norm
            of sqrt(d_in)) and `covariance_whitening` are estimated once on training data and folded
            into the weights at the end, so that the saved autoencoder takes raw activations;
            `layer_norm` and `constant_norm_rescale` act on each sample and stay part of it.
        normalize_batches: number of global batches to estimate it from.
        fold_decoder_norm: save with decoder rows of norm 1 (the same function).
        dead_after: samples without firing after which a latent counts as dead.
        dead_feature_handling: `aux` (SAELens' auxiliary loss, where the architecture has one),
            `resample` (dead latents start anew at badly reconstructed inputs, every `dead_after`
            samples), `none`, or `auto`: aux where there is one, else none.
        resample_until_step: no resampling from this step on, so that the last ones can still learn.
        fire_threshold: a latent is active above this. The default is 0, and 0.01 for linear_l1,
            which has no exact zeros and where |z_l| times the norm of decoder row l is compared.
        out: folder that the autoencoder is saved to when training ends.
        seed: of the initial weights, of resampling and of bfloat16's rounding.
        dtype: of the parameters. `bfloat16` halves the memory of weights, gradients and Adam's
            moments; sums are made in float32 and rounded at random, so that small updates are not
            lost (`salve_lm.sae.bfloat16_adam`). Lost are digits: a stored weight has 8 significant
            bits (0.4 %), also in the saved folder, and folding `normalize_input` or
            `fold_decoder_norm` rounds once more. Running thresholds stay float64.
        chunk_rows: process a batch in parts of so many rows, for batches whose latents do not fit;
            the gradient is that of the whole batch. Not for batchtopk and matryoshka_batchtopk.
        sparse: leave latents that are zero out of all products but the encoder's; the same loss and
            gradients, to rounding. `auto` does so where it is faster: on a CPU where at most 1/16
            of the latents act in a batch, on a GPU where k is at most d_sae / 512 (topk, batchtopk,
            matryoshka_batchtopk). `always` also makes a GPU count the latents of standard and
            jumprelu, and wait. linear_l1 and gated are dense.
        compile_step: loss and gradients by torch.compile (on a CPU it needs a C++ compiler). Of
            standard and jumprelu the products are dense then, unless sparse is `always`.

    Under `ModelParallelStrategy` (FSDP2) the parameters are shared out over devices. The memory
    that training takes is told before it starts, and refused where it cannot fit.
    With the trainer's `accumulate_grad_batches` n, a step averages n batches of equal weight, and
    k of batchtopk and matryoshka_batchtopk is that of each of them.

    Gradients are clipped by the trainer's `gradient_clip_val` (SAELens' own trainer clips at 1.0).
    """

    def __init__(
        self,
        architecture: str = "linear_l1",
        d_sae: int = 512,
        options: dict[str, Any] | None = None,
        d_in: int | None = None,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        l1_warm_up_steps: int = 0,
        lr_warm_up_steps: int = 0,
        lr_decay_steps: int = 0,
        normalize_input: Literal[
            "none",
            "expected_average_only_in",
            "covariance_whitening",
            "layer_norm",
            "constant_norm_rescale",
        ] = "none",
        normalize_batches: int = 64,
        fold_decoder_norm: bool = False,
        dead_after: int = 100_000,
        dead_feature_handling: Literal["auto", "none", "aux", "resample"] = "auto",
        resample_until_step: int | None = None,
        fire_threshold: float | None = None,
        out: str | None = None,
        seed: int = 0,
        dtype: Literal["float32", "bfloat16"] = "float32",
        chunk_rows: int | None = None,
        sparse: Literal["auto", "always", "never"] = "auto",
        compile_step: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if dtype not in ("float32", "bfloat16"):
            raise BadConfig(f"dtype must be 'float32' or 'bfloat16', not {dtype!r}.")
        if chunk_rows is not None and chunk_rows < 1:
            raise BadConfig(f"chunk_rows must be at least 1, not {chunk_rows}.")
        for name in ("lr", "normalize_batches", "dead_after"):
            if self.hparams[name] <= 0:
                raise BadConfig(f"{name} must be positive, but is {self.hparams[name]}.")
        for name in ("l1_warm_up_steps", "lr_warm_up_steps", "lr_decay_steps"):
            if self.hparams[name] < 0:
                raise BadConfig(f"{name} must not be negative, but is {self.hparams[name]}.")

    # ---------------------------------------------------------------- set-up

    def setup(self, stage: str) -> None:
        """Refuse now what would fail later: the arguments, the strategy, too little memory."""
        if stage == "fit":
            self._resumed = self._saved = False
            demand = self.demand()
            check_memory(self.trainer, [demand], getattr(self._datamodule(), "batch_size", None))

    def configure_callbacks(self) -> list[Callback]:
        """Stop at SIGTERM with a checkpoint, and resume exactly from any."""
        return exact_resume()

    def configure_optimizers(self) -> Any:
        """Adam, and the learning rate's warm-up and decay."""
        return configure_adam(self.trainer, [self._trained()])

    def _trained(self) -> Trained:
        return Trained(list(self.sae.parameters()), self._hp, self._lr_factor)

    def _lr_factor(self, step: int) -> float:
        from salve_lm.sae.schedule import lr_factor

        warm_up, decay = self._hp.lr_warm_up_steps, self._hp.lr_decay_steps
        # Asking for the number of steps makes Lightning create the train loader. While optimisers
        # are configured (step 0) that is too early: the loader would miss its place in a checkpoint
        # that is restored only later, and a run resumed within an epoch would start that epoch anew
        total = self.trainer.estimated_stepping_batches if decay and step else math.inf
        return lr_factor(step, warm_up, decay, total)

    def on_fit_start(self) -> None:
        """Check the output folder; measure the input scaling, unless a checkpoint brought it."""
        self._prepare_fit()
        if self.normalizer is not None and not bool(self.normalizer.ready):
            self.normalizer.estimate(self._training_activations(self._hp.normalize_batches))

    def _prepare_fit(self) -> None:
        # `.to(...)` on this module does not tell SAELens, which casts inputs to `sae.dtype`
        self.sae.dtype, self.sae.device = self.sae.W_enc.dtype, self.sae.W_enc.device
        self._check_out()

    def _training_activations(self, n_batches: int) -> Iterable[Tensor]:
        datamodule = self._datamodule()
        if datamodule is None:
            raise BadConfig(
                "normalize_input is measured on the data module's training data: give the trainer "
                "a data module, or set normalize_input to 'none'."
            )
        for i, batch in enumerate(datamodule.train_dataloader()):
            if i == n_batches:
                return
            yield self.trainer.strategy.batch_to_device(batch, self.device).x

    # -------------------------------------------------------------- training

    def on_train_start(self) -> None:
        """Refuse a schedule that does not fit, now that the number of steps is known."""
        warm_up, decay = self._hp.lr_warm_up_steps, self._hp.lr_decay_steps
        if not decay:
            return
        total = self.trainer.estimated_stepping_batches
        if not warm_up + decay <= total < math.inf:
            raise BadConfig(
                f"lr_warm_up_steps={warm_up} and lr_decay_steps={decay} do not fit into {total} "
                "training steps. Set max_epochs or max_steps, or shorten them."
            )

    def on_train_batch_start(self, batch: ActivationBatch, batch_idx: int) -> None:
        """Resample dead latents when due.

        Here, and not after the step: callbacks save checkpoints before the module's own
        `on_train_batch_end`, and a resumed run would miss a change made there.
        """
        hp = self._hp
        period = self._samples_seen // hp.dead_after
        if self.plan.handling != "resample" or period == self._resampled_at:
            return
        if batch_idx % self.trainer.accumulate_grad_batches:
            # gradients of the latents as they were are waiting for their step
            return
        self._resampled_at = period
        if hp.resample_until_step is not None and self.global_step >= hp.resample_until_step:
            return
        dead = self.firing.dead(hp.dead_after)
        if not bool(dead.any()):
            return
        from salve_lm.sae import ranks
        from salve_lm.sae.resample import resample_dead

        x = ranks.gather_rows(self._scaled(batch.x))
        optimizer = cast(Optimizer, self.optimizers(use_pl_optimizer=False))
        latents = resample_dead(self.sae, optimizer, x, dead, seed=hp.seed, step=self.global_step)
        self.firing.reset(latents)
        _log.info("Step %d: %d dead latents resampled.", self.global_step, latents.numel())

    def training_step(self, batch: ActivationBatch, batch_idx: int) -> Tensor:
        """The loss, weighted so that DDP's mean over ranks is the mean over the global batch."""
        from salve_lm.sae import ranks
        from salve_lm.sae.schedule import coefficients_at
        from salve_lm.sae.shards import take_step

        hp = self._hp
        n, n_global = batch.x.shape[0], batch.n_global
        x = batch.x if n else batch.x.new_ones(1, hp.d_in)
        out = take_step(
            self.sae,
            self._scaled(x),
            coefficients_at(self.sae, self.global_step),
            fire_threshold=self.plan.fire_threshold,
            with_l0=self._log_now(),
            chunk_rows=hp.chunk_rows,
            dead=self._to_revive(),
            step=self.global_step,
            n_global=n_global,
            empty=n == 0,
            sparse=hp.sparse,
            compiled=hp.compile_step,
        )
        with torch.no_grad():
            seen = out.fired if n else torch.zeros_like(out.fired)
            bad = ~torch.isfinite(torch.stack([x.sum().float(), out.loss.detach().float()]))
            self._watch(self.firing.update(seen, bad, n_global))
            self._samples_seen += n_global
            if self._log_now():
                self._log_step(out, n, n_global)
        weight = n * ranks.world_size() / n_global
        return out.loss if weight == 1 else out.loss * weight

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step and free the gradients, which Lightning would keep until the next ones."""
        super().optimizer_step(*args, **kwargs)
        self.zero_grad()

    def _to_revive(self) -> Tensor | None:
        # none is dead yet, and to find that out a GPU would have to be waited for
        early = self._samples_seen < self._hp.dead_after
        return (
            None if early or self.plan.handling != "aux" else self.firing.dead(self._hp.dead_after)
        )

    def _scaled(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self._hp.d_in:
            raise ShapeMismatch(
                f"The SAE takes activations [n, {self._hp.d_in}], but got {list(x.shape)}. "
                "Choose the site or store that it was made for."
            )
        # scaled in float32 also where the parameters are bfloat16
        x = x.to(torch.promote_types(self.sae.dtype, torch.float32))
        return (x if self.normalizer is None else self.normalizer(x)).to(self.sae.dtype)

    def _watch(self, bad: Tensor) -> None:
        self._bad = bad if self._bad is None else self._bad | bad
        # on a GPU, looking means waiting: only where a value is read anyway
        if bad.device.type == "cpu" or self._log_now():
            self._raise_if_bad()

    def _log_now(self) -> bool:
        every = max(1, getattr(self.trainer, "log_every_n_steps", 1))
        return (self.global_step + 1) % every == 0 or self.trainer.is_last_batch

    def _log_step(self, out: MeasuredStep, n: int, n_global: int) -> None:
        from salve_lm.sae import ranks

        terms = {"loss": out.loss.detach(), **out.losses, "l0": out.l0}
        values = torch.stack([v.double() for v in terms.values() if v is not None])
        values = ranks.all_reduce(values * (n / n_global), "sum").float()
        for name, value in zip(terms, values, strict=True):
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=n_global)
        dead = self.firing.dead(self._hp.dead_after).float().mean()
        self.log("train/dead_fraction", dead, batch_size=n_global)
