"""`discover`: class means, dominant and selective features, and top samples of every latent."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from salve_lm.activations.batch import ActivationBatch
from salve_lm.activations.datamodule import ActivationData
from salve_lm.atomic import check_writable_target
from salve_lm.commands.inputs import check_activations
from salve_lm.data.labelled import Split
from salve_lm.errors import ShapeMismatch
from salve_lm.features import FeatureTable, StreamingFeatureStatistics

if TYPE_CHECKING:
    import pandas as pd
    from sae_lens import SAE

logger = logging.getLogger(__name__)


class TopSamples:
    """The `k` samples that activate each latent most, in both directions, in constant memory.

    A LinearL1 latent is signed, so its strongest negative samples are kept too; for latents that
    are never negative only the positive ones are listed.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._best: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def update(self, z: Tensor, sample: Tensor, label: Tensor) -> None:
        """Take in latents `z` [n, d_sae] of samples `sample` [n] with labels `label` [n]."""
        sample, label = sample.cpu(), label.cpu()
        for sign in (1, -1):
            value = sign * z.float().cpu()
            at = _first(value, sample[:, None], self.k)
            # the batch's best alone are merged: sorting all of it again would take most of the time
            self._merge(sign, value.gather(0, at), sample[at], label[at])

    def merge(self, other: TopSamples) -> None:
        """Take in what another rank found."""
        for sign, found in other._best.items():
            self._merge(sign, *found)

    def _merge(self, sign: int, value: Tensor, sample: Tensor, label: Tensor) -> None:
        if sign in self._best:
            old = self._best[sign]
            value, sample, label = (
                torch.cat(pair) for pair in zip(old, (value, sample, label), strict=True)
            )
        at = _first(value, sample, self.k)
        self._best[sign] = (value.gather(0, at), sample.gather(0, at), label.gather(0, at))

    def table(self, class_names: list[str], source: list[str] | None = None) -> pd.DataFrame:
        """One row a (latent, direction, rank) with a strictly positive activation."""
        import pandas as pd

        frames = []
        for sign, (value, sample, label) in self._best.items():
            rank = torch.arange(value.shape[0])[:, None].expand_as(value)
            latent = torch.arange(value.shape[1])[None].expand_as(value)
            fires = value > 0
            frames.append(
                pd.DataFrame(
                    {
                        "latent": latent[fires].numpy(),
                        "direction": "+" if sign > 0 else "-",
                        "rank": rank[fires].numpy(),
                        "sample": sample[fires].numpy(),
                        "activation": (sign * value[fires]).numpy(),
                        "label": label[fires].numpy(),
                    }
                )
            )
        table = pd.concat(frames).sort_values(["latent", "direction", "rank"], ignore_index=True)
        table["class"] = [class_names[i] if i >= 0 else "" for i in table["label"]]
        return table


def _first(value: Tensor, sample: Tensor, k: int) -> Tensor:
    """Rows of the k largest positive values of each column, int64 [<= k, d_sae].

    Of equal values the one of the lower sample comes first, on any number of ranks. Which rows
    follow the positive ones is left open.

    Args:
        value: [n, d_sae], float32.
        sample: [n, d_sae] or [n, 1], below 2**32.
        k: how many.
    """
    # the bits of positive floats have the order of their values
    bits = (value.clamp(min=0) + 0.0).view(torch.int32).long()
    order = (bits << 32) | (0xFFFFFFFF - sample)
    return order.T.contiguous().topk(min(k, len(value)), dim=1).indices.T


class _Discovery(LightningModule):
    """The pass over the activations; Lightning's predict loop shards it over ranks."""

    def __init__(
        self, sae: SAE, fire_threshold: float | None, data: ActivationData, top_samples: int
    ) -> None:
        super().__init__()
        self.sae, self._fire_threshold = sae, fire_threshold
        self.top = TopSamples(top_samples)
        self._data = data

    def setup(self, stage: str) -> None:
        d_sae, d_in = self.sae.W_dec.shape
        if d_in != self._data.d_in:
            raise ShapeMismatch(
                f"The SAE reads activations of width {d_in}, the data's are {self._data.d_in} "
                "wide. Give the SAE that was trained at this site of this model."
            )
        threshold = self._fire_threshold
        if threshold is None:  # an SAE trained elsewhere
            from salve_lm.sae.resolve import LINEAR_FIRE_THRESHOLD

            linear = self.sae.cfg.architecture() == "linear_l1"
            threshold = LINEAR_FIRE_THRESHOLD if linear else 0.0
        self.norm = self.sae.W_dec.detach().norm(dim=1).cpu()
        self.statistics = StreamingFeatureStatistics(
            d_in,
            d_sae,
            len(self._data.class_names),
            firing_threshold=threshold,
            decoder_norm=self.norm,
        )

    def predict_step(self, batch: ActivationBatch, batch_idx: int) -> None:
        if len(batch.x) == 0:
            return
        z = self.sae.encode(batch.x)
        self.statistics.update(batch.x, z, batch.label)
        self.top.update(z, batch.sample, batch.label)

    def on_predict_epoch_end(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            return
        mine = (self.statistics, self.top)
        everyone = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        for rank, (statistics, top) in enumerate(everyone):
            if rank != dist.get_rank():
                self.statistics.merge(statistics)
                self.top.merge(top)


def discover(
    trainer: Trainer,
    datamodule: LightningDataModule,
    sae: str,
    out: str,
    split: Split = "train",
    top_samples: int = 16,
) -> FeatureTable | None:
    """Run `SalveTrainer.discover`; see there."""
    check_writable_target(out)
    found = find_features(trainer, datamodule, sae, split, top_samples)
    if found is None:
        return None
    table, top = found
    table.save(out, extra_tables={"top_samples": top})
    _print_classes(table, out)
    return table


def find_features(
    trainer: Trainer,
    datamodule: LightningDataModule,
    sae: str,
    split: Split = "train",
    top_samples: int = 16,
) -> tuple[FeatureTable, pd.DataFrame] | None:
    """The feature table of the SAE in folder `sae`, and its top samples; on rank zero only.

    Raises:
        BadConfig: the data are no activations.
        ShapeMismatch: they are of another width than the SAE's.
    """
    from salve_lm.sae import hash_sae, load_sae, read_metadata

    data = check_activations(datamodule, "discover")
    loaded = load_sae(sae)
    data.predict_split = split
    fire_threshold = read_metadata(sae).get("fire_threshold")
    discovery = _Discovery(loaded, fire_threshold, data, top_samples)
    trainer.predict(discovery, datamodule=data, return_predictions=False)
    if not trainer.is_global_zero:
        return None
    table = discovery.statistics.finalize(
        class_names=data.class_names,
        decoder_norm=discovery.norm,
        provenance={"sae": hash_sae(sae), **data.provenance(split)},
    )
    top = discovery.top.table(data.class_names)
    top["source"] = [data.describe(split, int(i)) for i in top["sample"]]
    return table, top


def _print_classes(table: FeatureTable, out: str) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"Features of each class  ({out})", title_justify="left")
    for column in ("class", "samples", "dominant", "selective"):
        shown.add_column(column, justify="left" if column == "class" else "right")
    for name in table.class_names[:50]:
        n = int(table.counts[table.class_index(name)])
        shown.add_row(name, str(n), str(table.dominant(name)), str(table.selective(name)))
    Console().print(shown)
    logger.info(json.dumps(table.provenance))
