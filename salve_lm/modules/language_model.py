"""A causal language model of transformers: trained whole or by LoRA, evaluated, edited."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from salve_lm.errors import BadConfig, NotFinite, UnsupportedStrategy
from salve_lm.fault_tolerance.exact_resume import exact_resume
from salve_lm.language.folder import check_out
from salve_lm.language.loading import Dtype, load_causal_lm, load_tokenizer, new_causal_lm
from salve_lm.language.names import HEAD, decoder_prefix, n_layers, text_config
from salve_lm.modules.frozen import freeze, freeze_images
from salve_lm.modules.language_checkpoints import LanguageCheckpoints
from salve_lm.modules.learning_rate import Schedule, learning_rate_factor, total_steps
from salve_lm.modules.lora import LoraOptions, add_lora

if TYPE_CHECKING:
    from salve_lm.data.tokens import TokenBatch


class LanguageModel(LanguageCheckpoints):
    """A causal language model that is trained (AdamW), evaluated on tasks, studied and edited.

    Logs `train/loss` (nats per token), and in validation and test `TASK/METRIC` for every task of
    `LanguageData`. Ready sites are `resid_post.N`, the residual stream behind decoder layer N.

    No hyper-parameters are stored in checkpoints: Lightning would let them win over the command
    line without a word. A checkpoint holds only what is trained (with LoRA, only the adapter) and
    says which model it belongs to; loading it into another one is an error.

    Gradients are clipped by the trainer's `gradient_clip_val`.

    Args:
        source: Hugging Face folder (environment variables and `~` are expanded) or public name of
            the model (`google/gemma-3-4b-it`).
        config: In place of a source, a model with random weights: `model_type` and sizes as in a
            config.json, or the path of one.
        tokenizer: Folder or public name of the tokenizer; that of `source` when absent.
        dtype: Of the weights; `auto` takes that of the checkpoint. Train in `float32`, with the
            trainer's `precision: bf16-mixed` to go faster: bfloat16 weights lose small updates.
        device_map: Where to put what, for evaluation of models that do not fit on one device:
            `auto`, or module name -> device.
        revision: Branch, tag or commit of a public model.
        lora: Train low-rank matrices instead of the weights themselves.
        frozen: Parameters to leave as they are, by full name, with `*` for any text
            (`model.embed_tokens.*`); the task vector is then 0 there.
        learning_rate: Of AdamW, at its peak.
        weight_decay: Of matrices; norms and biases have none.
        betas: AdamW's decay rates.
        warmup_steps: Optimiser steps over which the learning rate rises.
        schedule: What follows, per step over the whole fit: `cosine`, `linear` or `constant`.
        final_learning_rate: Share of the learning rate that is left at the end.
        gradient_checkpointing: Compute activations again in the backward pass: less memory, about
            a third more time.
        out: Folder for the result, written when training ends: a Hugging Face folder, or with LoRA
            the adapter's. Must not exist.
        seed: Of random weights, of LoRA's matrices and of dropout.

    Raises:
        BadConfig: neither or both of source and config, or options out of range; for the others
            see `salve_lm.language.load_causal_lm`.
    """

    def __init__(
        self,
        source: str | None = None,
        config: dict[str, Any] | str | None = None,
        tokenizer: str | None = None,
        dtype: Dtype = "auto",
        device_map: str | dict[str, Any] | None = None,
        revision: str | None = None,
        lora: LoraOptions | None = None,
        frozen: list[str] | None = None,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 0,
        schedule: Schedule = "cosine",
        final_learning_rate: float = 0.0,
        gradient_checkpointing: bool = False,
        out: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (source is None) == (config is None):
            raise BadConfig("A LanguageModel takes either a `source` or a `config`.")
        if learning_rate <= 0 or warmup_steps < 0 or not 0 <= final_learning_rate <= 1:
            raise BadConfig(
                "learning_rate must be positive, warmup_steps not negative, and "
                "final_learning_rate a share from 0 to 1."
            )
        hparams = {
            "source": source, "config": config, "tokenizer": tokenizer, "dtype": dtype,
            "revision": revision, "lora": None if lora is None else asdict(lora),
            "frozen": frozen,
            "learning_rate": learning_rate, "weight_decay": weight_decay, "betas": list(betas),
            "warmup_steps": warmup_steps, "schedule": schedule,
            "final_learning_rate": final_learning_rate, "out": out, "seed": seed,
        }  # fmt: skip
        self.save_hyperparameters(hparams)
        source, tokenizer = _expanded(source), _expanded(tokenizer)
        if source is not None:
            self.model = load_causal_lm(
                source, dtype=dtype, device_map=device_map, revision=revision
            )
        else:
            self.model = new_causal_lm(config or {}, seed)
            if dtype != "auto":
                nn.Module.to(self.model, dtype=getattr(torch, dtype))
        self._tokens_from = where = tokenizer or source
        self.tokenizer = None if where is None else load_tokenizer(where, revision=revision)
        self.head_name = HEAD
        prefix = decoder_prefix(self.model.config)
        self.sites = {
            f"resid_post.{n}": f"{prefix}.{n}:output:positions"
            for n in range(n_layers(self.model.config))
        }
        self.max_context = int(text_config(self.model.config).max_position_embeddings)
        self._learning_rate, self._weight_decay, self._betas = learning_rate, weight_decay, betas
        self._warmup, self._schedule, self._floor = warmup_steps, schedule, final_learning_rate
        self._out, self._seed, self._source = out, seed, source
        if lora is not None:
            self._adapter.append(add_lora(self.model, lora, seed))
        else:
            freeze_images(self.model)
        freeze(self.model, frozen or ())
        if any(not p.requires_grad for p in self.model.parameters()):
            self.strict_loading = False
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    # ---------------------------------------------------------------- set-up

    def setup(self, stage: str) -> None:
        """Refuse now what would fail later: strategies that shard, models that are spread out."""
        if stage != "fit":
            return
        self._resumed = self._written = False
        if not isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise UnsupportedStrategy(
                f"LanguageModel does not train under {type(self.trainer.strategy).__name__}: the "
                "result is written from whole weights. Use strategy 'auto' or 'ddp'."
            )
        if self._spread:
            raise BadConfig(
                "A model that device_map puts on several devices cannot be trained. Leave "
                "device_map out, and use LoRA if memory is short."
            )

    def configure_callbacks(self) -> list[Callback]:
        """Stop at SIGTERM with a checkpoint, and resume exactly from any."""
        return exact_resume()

    def configure_optimizers(self) -> Any:
        """AdamW with weight decay on matrices, and the schedule."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self._weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        # Lightning refuses to clip a fused optimiser's gradients under mixed precision
        mixed = "mixed" in str(self.trainer.precision)
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=self._learning_rate,
            betas=self._betas,
            fused=not (mixed and self.trainer.gradient_clip_val),
        )
        total = self._total_steps()
        factor = partial(
            learning_rate_factor,
            warmup=self._warmup,
            total=total,
            schedule=self._schedule,
            floor=self._floor,
        )
        schedule = LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _total_steps(self) -> float:
        n_batches = getattr(getattr(self.trainer, "datamodule", None), "n_train_batches", None)
        if n_batches is None:
            raise BadConfig("A LanguageModel is trained on a LanguageData with a `train` corpus.")
        total = total_steps(self.trainer, n_batches)
        if self._schedule != "constant" and math.isinf(total):
            raise BadConfig(
                "A schedule needs an end: set trainer.max_epochs or max_steps, or schedule: "
                "constant."
            )
        if self._warmup > total:
            raise BadConfig(
                f"warmup_steps={self._warmup} does not fit into {total:.0f} training steps. "
                "Shorten it, or train longer."
            )
        return total

    def on_fit_start(self) -> None:
        """Check the output folder; put the model in training mode, as Lightning does not."""
        if self._writes:
            check_out(str(self._out), self._run_hash(), self._resumed)
        self.train()

    # -------------------------------------------------------------- training

    def on_train_batch_start(self, batch: TokenBatch, batch_idx: int) -> None:
        """Make dropout a function of seed, epoch, batch and rank: a resumed run draws the same."""
        if any(isinstance(m, nn.Dropout) and m.p for m in self.model.modules()):
            text = f"{self._seed}|{self.current_epoch}|{batch_idx}|{self.global_rank}"
            digest = hashlib.sha256(text.encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """The loss, weighted so that DDP's mean over ranks is the mean over all targets.

        Raises:
            NotFinite: a loss that is NaN or infinite, on all ranks at once.
        """
        if len(batch.input_ids):
            logits = self.model(**batch.model_inputs()).logits
            learned = batch.target[:, 1:]
            labels = batch.input_ids[:, 1:][learned]
            total = F.cross_entropy(logits[:, :-1][learned].float(), labels, reduction="sum")
        else:
            # DDP waits for every rank's gradients; this one has no rows
            one = batch.input_ids.new_zeros(1, 1)
            total = 0.0 * self.model(input_ids=one, use_cache=False).logits.float().sum()
        loss = total / max(batch.n_targets, 1)
        shown = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="sum")
        if not bool(torch.isfinite(shown)):
            raise NotFinite(
                "loss",
                f"training step {self.global_step}",
                "Lower learning_rate, set the trainer's gradient_clip_val to 1.0, or use dtype: "
                "float32.",
            )
        self.log("train/loss", shown, prog_bar=True, batch_size=max(len(batch.input_ids), 1))
        return loss * self.trainer.world_size

    # --------------------------------------------------------------- devices

    @property
    def _spread(self) -> bool:
        return len(set(getattr(self.model, "hf_device_map", {}).values())) > 1

    def _apply(self, fn: Any, recurse: bool = True) -> LanguageModel:
        # a model that accelerate spread over devices must stay where it is
        return self if self._spread else super()._apply(fn, recurse)


def _expanded(path: str | None) -> str | None:
    return None if path is None else os.path.expanduser(os.path.expandvars(path))
