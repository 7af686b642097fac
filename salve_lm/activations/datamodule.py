"""Activations for training an autoencoder: from a store, or made on the fly."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import default_collate

from salve_lm.activations.batch import ActivationBatch
from salve_lm.activations.harvest import harvest
from salve_lm.activations.hooks import run_to
from salve_lm.activations.key import check_fresh, hash_backbone, make_key
from salve_lm.activations.loaders import GlobalBatchLoader, InputBatch, InputLoader, StoreLoader
from salve_lm.activations.rows import blocks_of
from salve_lm.activations.sampler import GlobalBatches
from salve_lm.activations.shard import StoreDtype
from salve_lm.activations.shuffle import ShuffledRows
from salve_lm.activations.shuffle_buffer import BufferedLoader
from salve_lm.activations.sites import Site, parse_site
from salve_lm.activations.store import ActivationStore
from salve_lm.data.labelled import LabelledData, Split
from salve_lm.errors import BadConfig, OutputExists
from salve_lm.modules.studied import StudiedModel


class ActivationData(LightningDataModule):
    """Yields `ActivationBatch`es of the train, validation and test split of labelled data.

    With `store`, activations are read from disk; where the store is missing and `model` and
    `source` are given, it is harvested first, and where it is there it is compared with them. With
    `store: null`, the images travel through the loader and the frozen `model` runs on the device
    that trains; it is in no checkpoint.

    Args:
        store: Folder of the activation store; null for activations made on the fly.
        model: The network whose activations are studied.
        source: The labelled data to run it on.
        site: Where to read, `MODULE[:input|output][:mean|cls|positions]`, or a ready site of the
            model such as `pooled`.
        batch_size: Rows in a global batch, summed over all processes.
        seed: Of the order of the training rows.
        num_workers: Loader processes that read images on the fly.
        dtype: In which a store is written; batches are float32 always.
        shard_rows: Rows in a file of the store.
        splits: Splits that a new store holds.
        buffer_rows: A stored training split of more rows is shuffled in buffers of so many, those
            of all processes together, each row the width times the size of the store's dtype, and
            16 bytes. It is then read in blocks of 1 MiB, whose order is random, and rows are drawn
            at random within a buffer. A smaller split is shuffled as a whole.
        prefetch: Read ahead of the training, in a thread: a second buffer, or the next batches.
    """

    def __init__(
        self,
        store: str | None = None,
        model: StudiedModel | None = None,
        source: LabelledData | None = None,
        site: str = "pooled",
        batch_size: int = 1024,
        seed: int = 0,
        num_workers: int = 0,
        dtype: StoreDtype = "float32",
        shard_rows: int = 65536,
        splits: Sequence[Split] = ("train", "val"),
        buffer_rows: int = 65536,
        prefetch: bool = True,
    ) -> None:
        super().__init__()
        if store is None and (model is None or source is None):
            raise BadConfig(
                "ActivationData needs a `store`, or a `model` and a `source` to make the "
                "activations with."
            )
        if batch_size < 1 or num_workers < 0:
            raise BadConfig("batch_size must be at least 1 and num_workers at least 0.")
        self.store, self.model, self.source = store, model, source
        self.site, self.dtype, self.shard_rows = site, dtype, shard_rows
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.splits: tuple[Split, ...] = tuple(splits)
        self.buffer_rows, self.prefetch = buffer_rows, prefetch
        self.predict_split: Split = "train"
        self._opened: ActivationStore | None = None
        self._d_in: int | None = None
        self._positions = 1

    @property
    def d_in(self) -> int:
        """Width of the activations; known after `setup`."""
        if self._d_in is None:
            raise BadConfig("The width of the activations is known after ActivationData.setup().")
        return self._d_in

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that labels count; known after `setup`."""
        if self._opened is not None:
            return self._opened.class_names
        if self.source is None:
            raise BadConfig("The classes are known after ActivationData.setup().")
        return list(self.source.class_names)

    def provenance(self, split: Split) -> dict[str, str]:
        """What the activations of `split` are made from: backbone, site, data, split."""
        if self._opened is not None:
            key = self._opened.key
        else:
            model, source, site = self._makers()
            key = make_key(model, source, site, [split], self.dtype)
        return {
            "backbone": key["backbone"],
            "site": key["site"],
            "data": key["data"].get(split, ""),
            "split": split,
        }

    def describe(self, split: Split, index: int) -> str:
        """Where sample `index` of `split` comes from, as far as is known."""
        return self.source.describe(split, index) if self.source else f"{split}/{index}"

    def prepare_data(self) -> None:
        """Prepare the source, and harvest the store if it is missing and can be made.

        Lightning calls this on one process only. Raises what `harvest` and opening a store raise.
        """
        if self.source is not None:
            self.source.prepare_data()
        if self.store is None or self.model is None or self.source is None:
            return
        if not Path(self.store).exists():
            self._set_up_source()
            # a second node with the same disk may have written it meanwhile; setup compares the key
            with contextlib.suppress(OutputExists):
                harvest(
                    self.model,
                    self.source,
                    self.site,
                    self.store,
                    self.splits,
                    self.dtype,
                    self.shard_rows,
                    device=self.trainer.strategy.root_device if self.trainer else "auto",
                )

    def setup(self, stage: str) -> None:
        """Open the store and compare it with model and source; or run one sample to learn `d_in`.

        Raises:
            MissingStore: there is no store, and `model` or `source` is missing.
            StaleStore: the store was made from other weights, site or data.
            CorruptFile: a file of the store is damaged.
        """
        self._set_up_source()
        if self.store is not None:
            self._opened = ActivationStore(self.store)
            self._check_fresh(self._opened)
            self._d_in = self._opened.d_in
        elif self._d_in is None:
            model, source, site = self._makers()
            inputs = default_collate([source.eval_dataset("train")[0][0]])
            rows = run_to(model.model, {"site": site}, inputs.to(_device_of(model)))["site"]
            self._positions, self._d_in = rows.shape

    def train_dataloader(self) -> GlobalBatchLoader[Any]:
        """Shuffled by (seed, epoch); its position is in Lightning's checkpoints."""
        # Lightning turns shuffling off for this only in DataLoaders
        overfit = getattr(self.trainer, "overfit_batches", 0)
        return self._loader("train", shuffle=not overfit)

    def val_dataloader(self) -> GlobalBatchLoader[Any]:
        """The validation split in order, each sample once over all ranks."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> GlobalBatchLoader[Any]:
        """The test split in order, each sample once over all ranks."""
        return self._loader("test", shuffle=False)

    def predict_dataloader(self) -> GlobalBatchLoader[Any]:
        """The split named by `predict_split` in order, each sample once over all ranks."""
        return self._loader(self.predict_split, shuffle=False)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Run the frozen network on a batch of inputs; leave a batch of activations as it is."""
        if not isinstance(batch, InputBatch):
            return batch
        model, _, site = self._makers()
        if len(batch.inputs) == 0:
            x = torch.empty(0, self.d_in, device=batch.inputs.device)
        else:
            if _device_of(model) != batch.inputs.device:
                model.model.to(batch.inputs.device)
            x = run_to(model.model, {"site": site}, batch.inputs)["site"].float()
        return ActivationBatch(
            x,
            batch.label.repeat_interleave(self._positions),
            batch.sample.repeat_interleave(self._positions),
            batch.n_global * self._positions,
        )

    def _loader(self, split: Split, shuffle: bool) -> GlobalBatchLoader[Any]:
        if self._opened is not None:
            return self._store_loader(self._opened, split, shuffle)
        _, source, _ = self._makers()
        return self._input_loader(source, split, shuffle)

    def _store_loader(
        self, store: ActivationStore, split: Split, shuffle: bool
    ) -> GlobalBatchLoader[Any]:
        device = self._device()
        if not shuffle or store.rows(split) <= self.buffer_rows:
            sampler = self._sampler(store.rows(split), self.batch_size, shuffle)
            return StoreLoader(store, split, sampler, self.prefetch, device)
        blocks = blocks_of(store, split)
        order = ShuffledRows(
            blocks.counts, self.batch_size, self.buffer_rows, self.seed, *self._place()
        )
        return BufferedLoader(
            blocks, order, ActivationBatch.of, device, torch.device("cpu"), store.dtype,
            self.prefetch,
        )  # fmt: skip

    def _input_loader(self, source: LabelledData, split: Split, shuffle: bool) -> InputLoader:
        dataset = source.eval_dataset(split)
        n_samples = max(1, self.batch_size // self._positions)
        sampler = self._sampler(len(dataset), n_samples, shuffle)  # type: ignore[arg-type]
        return InputLoader(dataset, sampler, self.num_workers)

    def _sampler(self, n: int, batch_size: int, shuffle: bool) -> GlobalBatches:
        return GlobalBatches(n, batch_size, self.seed, *self._place(), shuffle)

    def _place(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _makers(self) -> tuple[StudiedModel, LabelledData, Site]:
        if self.model is None or self.source is None:
            raise BadConfig("Activations cannot be made without a `model` and a `source`.")
        return self.model, self.source, parse_site(self.site, self.model)

    def _set_up_source(self) -> None:
        if self.source is not None:
            self.source.setup("fit")
            if "test" in (*self.splits, self.predict_split):
                self.source.setup("test")

    def _check_fresh(self, store: ActivationStore) -> None:
        source = self.source
        known = [s for s in self.splits if source is not None]
        check_fresh(
            store.path,
            store.key,
            backbone=hash_backbone(self.model) if self.model else None,
            site=str(parse_site(self.site, self.model)) if self.model else None,
            data={s: cast(LabelledData, source).fingerprint(s) for s in known},
            dtype=self.dtype if self.model and source else None,
        )


def _device_of(studied: StudiedModel) -> torch.device:
    return next((p.device for p in studied.model.parameters()), torch.device("cpu"))
