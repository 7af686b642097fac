"""From the arguments of `SAETraining` to the modules that it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule

from salve_lm.errors import BadConfig, ShapeMismatch
from salve_lm.modules.sae_memory import Demand
from salve_lm.modules.sae_strategy import check_strategy, sharding_mesh

if TYPE_CHECKING:
    # SAELens takes seconds to import: everything of salve_lm.sae is imported where it is used
    from sae_lens import TrainingSAE

    from salve_lm.sae.firing import FiringRecord
    from salve_lm.sae.normalize import InputNormalizer
    from salve_lm.sae.resolve import Plan


class BuiltSAE(LightningModule):
    """An autoencoder that is built from hyper-parameters once its input's width is known.

    Attributes:
        plan: the settled arguments.
        sae: the autoencoder in training; its inputs are scaled by `normalizer`.
        normalizer: scaling that is folded into the weights when the autoencoder is saved.
        firing: samples since each latent last fired.
    """

    plan: Plan
    sae: TrainingSAE[Any]
    normalizer: InputNormalizer | None
    firing: FiringRecord

    def configure_model(self) -> None:
        """Build the autoencoder, once the width of the activations is known."""
        if hasattr(self, "sae"):
            return
        from salve_lm.sae.firing import FiringRecord
        from salve_lm.sae.normalize import InputNormalizer

        self._settle()
        mesh = None if self._trainer is None else sharding_mesh(self.trainer)
        if mesh is None:
            self.sae = self._make("cpu")
        else:
            from salve_lm.sae.shards import build_sharded

            self.sae = build_sharded(self._make, mesh, self.trainer.strategy.root_device)
        self.firing = FiringRecord(self._hp.d_sae)
        folded = self.plan.folded
        self.normalizer = InputNormalizer(folded, self._hp.d_in) if folded else None

    def demand(self) -> Demand:
        """Settle and check the arguments, and say what training takes; nothing is allocated.

        Raises:
            BadConfig, NameNotFound: arguments that contradict each other or the data.
            UnsupportedStrategy: see `check_strategy`.
        """
        from salve_lm.sae.measured_step import check_chunkable, is_chunkable
        from salve_lm.sae.memory import parameter_count
        from salve_lm.sae.step import check_sparse

        self._settle()
        hp = self._hp
        check_strategy(self.trainer, self.plan, hp.dtype, hp.chunk_rows)
        empty = self._make("meta")
        if hp.chunk_rows is not None:
            check_chunkable(empty)
        if hp.sparse == "always":
            check_sparse(empty)
        return Demand(
            hp.architecture,
            parameter_count(empty),
            hp.d_sae,
            hp.dtype,
            hp.chunk_rows,
            is_chunkable(empty),
        )

    def _settle(self) -> None:
        from salve_lm.sae.resolve import resolve

        hp = self._hp
        self.plan = resolve(
            hp.architecture,
            hp.options,
            l1_warm_up_steps=hp.l1_warm_up_steps,
            normalize_input=hp.normalize_input,
            fold_decoder_norm=hp.fold_decoder_norm,
            dead_feature_handling=hp.dead_feature_handling,
            fire_threshold=hp.fire_threshold,
        )
        # in the hyper-parameters, so that `load_from_checkpoint` needs no data module
        hp.d_in = self._resolve_d_in()

    def _make(self, device: str) -> TrainingSAE[Any]:
        from salve_lm.sae import build_training_sae

        hp = self._hp
        return build_training_sae(
            hp.architecture,
            hp.d_in,
            hp.d_sae,
            self.plan.options,
            device=device,
            dtype=hp.dtype,
            normalize_activations=self.plan.per_sample,
            seed=hp.seed,
        )

    def _resolve_d_in(self) -> int:
        found = getattr(self._datamodule(), "d_in", None)
        given = self._hp.d_in
        if found is None and given is None:
            raise BadConfig(
                "The width of the activations is not known. Train with a data module that has "
                "d_in (ActivationData), or set the SAE's d_in."
            )
        if found is not None and given is not None and found != given:
            raise ShapeMismatch(
                f"The SAE has d_in={given}, but the activations are {found} wide. Remove d_in to "
                "take their width, or choose the site or store that the SAE was made for."
            )
        return int(given if found is None else found)

    @property
    def _hp(self) -> Any:
        return self.hparams

    def _datamodule(self) -> Any:
        # `self.trainer` raises where there is none, as in `load_from_checkpoint`
        return getattr(self._trainer, "datamodule", None)
