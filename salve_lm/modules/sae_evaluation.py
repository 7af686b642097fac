"""Evaluation of trained autoencoders, one's own or public ones, on the activations of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule

from salve_lm.activations.batch import ActivationBatch, SitesBatch
from salve_lm.errors import BadConfig, NameNotFound

if TYPE_CHECKING:
    # SAELens takes seconds to import: everything of salve_lm.sae is imported where it is used
    from sae_lens import SAE

    from salve_lm.sae.evaluate import Evaluation


class SAEEvaluation(LightningModule):
    """Measures autoencoders with `validate` or `test`: every site of the data in one pass.

    Logs `SITE/val/explained_variance`, `l0`, `dead_fraction`, and for a language model
    `SITE/val/loss_recovered` with the losses that it is made from.

    Args:
        saes: site -> folder in SAELens' format, or `RELEASE:ID` of SAELens.
        fire_threshold: a latent is active above this; taken from each autoencoder's metadata where
            not given, and 0 where they say nothing.
        loss_recovered_windows: windows of the text on which each autoencoder is spliced into the
            language model; 0 for none.
    """

    def __init__(
        self,
        saes: dict[str, str],
        fire_threshold: float | None = None,
        loss_recovered_windows: int = 0,
    ) -> None:
        super().__init__()
        if not saes:
            raise BadConfig("Name one or more `saes`: site -> folder or RELEASE:ID.")
        if loss_recovered_windows < 0:
            raise BadConfig("loss_recovered_windows must not be negative.")
        self._sources, self._threshold = dict(saes), fire_threshold
        self._windows = loss_recovered_windows
        self._saes: dict[str, SAE[Any]] = {}
        self._evaluations: dict[str, Evaluation] = {}

    def setup(self, stage: str) -> None:
        """Open the autoencoders and compare each with its site.

        Raises:
            NameNotFound: a site that the data do not have; no such release or id.
            ShapeMismatch, BadConfig: an autoencoder of another width, layer or model.
            MissingFile: no such folder, or a release that cannot be downloaded.
        """
        from salve_lm.sae.pretrained import check_belongs, open_sae

        data = self._data()
        for site, source in self._sources.items():
            if site not in data.sites:
                raise NameNotFound("site of the data", site, data.sites)
            metadata = data.metadata_of(site)
            sae = open_sae(source)
            check_belongs(
                sae,
                source,
                d_in=data.d_in_of(site),
                layer=metadata.get("layer"),
                model_name=metadata.get("model_name"),
            )
            self._saes[site] = sae

    def on_validation_epoch_start(self) -> None:
        """Begin anew."""
        from salve_lm.sae.evaluate import Evaluation

        for site, sae in self._saes.items():
            threshold = self._threshold
            if threshold is None:
                threshold = float(sae.cfg.metadata.get("fire_threshold") or 0.0)
            self._evaluations[site] = Evaluation(sae.to(self.device), threshold)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: SitesBatch | ActivationBatch, batch_idx: int) -> None:
        """Add a batch to the metrics of every site."""
        for site, evaluation in self._evaluations.items():
            x = batch.x[site] if isinstance(batch, SitesBatch) else batch.x
            evaluation.update(x)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation split, and the loss recovered on it."""
        self._log("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test split, and the loss recovered on it."""
        self._log("test")

    def _log(self, split: str) -> None:
        from salve_lm.modules.loss_recovered import loss_recovered

        values = {site: evaluation.compute() for site, evaluation in self._evaluations.items()}
        self._evaluations = {}
        if self._windows and not self.trainer.sanity_checking:
            saes = {site: (site, sae) for site, sae in self._saes.items()}
            losses = loss_recovered(self._data(), saes, split, self._windows, self.device)
            for site, found in losses.items():
                values[site] |= found
        for site, found in values.items():
            for name, value in found.items():
                # equal on all ranks already; without sync_dist Lightning warns that it may not be
                self.log(f"{site}/{split}/{name}", value, sync_dist=True)

    def _data(self) -> Any:
        data = getattr(self._trainer, "datamodule", None)
        if data is None or not hasattr(data, "metadata_of"):
            raise BadConfig("SAEEvaluation needs a data module with sites: TokenActivationData.")
        return data
