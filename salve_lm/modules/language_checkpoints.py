"""What `LanguageModel` leaves behind: checkpoints, and the written model or adapter."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from salve_lm import __version__
from salve_lm.errors import BadConfig, NotFinite
from salve_lm.hashing import hash_plain
from salve_lm.language.folder import write_folder
from salve_lm.language.names import d_model, n_layers, text_config
from salve_lm.modules.language_evaluation import LanguageEvaluation

if TYPE_CHECKING:
    from peft import PeftModel

_log = logging.getLogger(__name__)
_STATE = "language_model"


class LanguageCheckpoints(LanguageEvaluation):
    """A language model that can be checkpointed, resumed, and saved when training ends."""

    _source: str | None
    _tokens_from: str | None
    _out: str | None

    def __init__(self) -> None:
        super().__init__()
        self._resumed = self._written = False
        # in a list: as a submodule it would double every entry of the state dict
        self._adapter: list[PeftModel] = []

    def describe(self) -> dict[str, Any]:
        """Plain values that say which model this is."""
        text = text_config(self.model.config)
        return {
            "library": "transformers",
            "source": self._source,
            "model_type": self.model.config.model_type,
            "n_layers": n_layers(self.model.config),
            "d_model": d_model(self.model.config),
            "vocabulary": int(text.vocab_size),
            "lora": self.hparams["lora"],
            "frozen": self.hparams["frozen"],
        }

    # ----------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is not trained; refuse to store weights with NaN in them."""
        frozen = set()
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if not p.requires_grad:
                frozen.add(f"model.{name}")
            elif not bool(p.detach().sum().isfinite()) and not bool(p.isfinite().all()):
                raise NotFinite(name, "a checkpoint", "Lower learning_rate and train again.")
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k not in frozen}
        checkpoint[_STATE] = self.describe()
        for key in (self.CHECKPOINT_HYPER_PARAMS_KEY, self.CHECKPOINT_HYPER_PARAMS_NAME):
            checkpoint.pop(key, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another model with a message that says which.

        Raises:
            BadConfig: a checkpoint of another model or adapter, or of no language model.
        """
        found, own = checkpoint.get(_STATE), self.describe()
        if found is None:
            raise BadConfig(
                "This checkpoint is not of a LanguageModel. Name one that its fit wrote."
            )
        other = [k for k in own if k != "source" and found.get(k) != own[k]]
        if other:
            raise BadConfig(
                "The checkpoint holds another model: "
                + ", ".join(f"{k} {found.get(k)!r}, here {own[k]!r}" for k in other)
                + ". Use the model options that it was trained with."
            )
        self._resumed = True

    # ---------------------------------------------------------------- result

    def on_train_end(self) -> None:
        """Write the result."""
        self._write()

    def on_fit_end(self) -> None:
        """Write it here where `on_train_end` never came: a run resumed after its last step."""
        self._write()

    def _write(self) -> None:
        if not self._writes or self._written:
            return
        if self.trainer.is_global_zero:
            record = {
                "run": self._run_hash(),
                "training_steps": self.global_step,
                "options": dict(self.hparams),
                "salve_lm_version": __version__,
            }
            write_folder(
                self._adapter[0] if self._adapter else self.model,
                self.tokenizer,
                str(self._out),
                source=self._source,
                tokenizer_source=self._tokens_from,
                record=record,
                replace=self._resumed,
            )
            _log.info("Trained %s saved to %s.", "adapter" if self._adapter else "model", self._out)
        self._written = True
        self.trainer.strategy.barrier("the trained model is saved")

    @property
    def _writes(self) -> bool:
        return self._out is not None and not getattr(self.trainer, "fast_dev_run", False)

    def _run_hash(self) -> str:
        options = {k: v for k, v in self.hparams.items() if k != "out"}
        return hash_plain([self.describe(), options])
