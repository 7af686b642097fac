"""Activations of tokens for training autoencoders: many sites of a language model in one pass."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule

from salve_lm.activations.batch import SitesBatch
from salve_lm.activations.key import check_fresh, hash_backbone
from salve_lm.activations.packed_corpora import PackedCorpora
from salve_lm.activations.rows import RowSource
from salve_lm.activations.shard import DTYPES, StoreDtype
from salve_lm.activations.shuffle import ShuffledRows
from salve_lm.activations.shuffle_buffer import BufferedLoader
from salve_lm.activations.sites import parse_site
from salve_lm.activations.tokens import ModelRows
from salve_lm.activations.tokens_store import TokenStore, harvest_tokens, rows_of
from salve_lm.data.corpus import Corpus
from salve_lm.data.labelled import Split
from salve_lm.data.packing import Packing
from salve_lm.data.tokens import PackedTokens
from salve_lm.errors import BadConfig, OutputExists
from salve_lm.modules.studied import StudiedModel

_RESID_POST = re.compile(r"resid_post\.(\d+)")


class TokenActivationData(LightningDataModule):
    """Yields `SitesBatch`es: the same tokens at every site, each site's activations from one pass.

    With `store: null` the frozen model runs over the text while autoencoders train, once over each
    window, as far as the deepest site; it is in no checkpoint. With `store`, all sites are written
    to disk first, where the folder is missing, and read from there. Either way rows are drawn from
    a shuffle buffer whose order depends on seed and epoch only. Tokens that do not count (BOS,
    padding, a document's first) are left out.

    Args:
        model: The language model whose activations are studied.
        train: Corpus to train on, or several, one after the other.
        val: Held-out text, or several.
        test: Text of the `test` stage, or several.
        sites: Where to read, each `MODULE[:input|output]:positions` or a ready site such as
            `resid_post.3`; `all` stands for every `resid_post` site of the model.
        store: Folder of the activation store; null for activations made on the fly.
        context: Tokens in a window.
        packing: How documents fill windows, see `salve_lm.data.tokens.PackedTokens`.
        batch_size: Rows (tokens) in a global batch, summed over all processes.
        buffer_rows: Rows in the shuffle buffers of all processes together; each row takes the
            widths of all sites times the size of `buffer_dtype`, and 16 bytes.
        buffer_dtype: Of the rows in the buffer; batches are float32 always.
        sequences: Windows in a forward pass.
        seed: Of the order of the training rows.
        dtype: In which a store is written.
        shard_rows: Rows in a file of the store.
        prefetch: Let a thread fill a second buffer while batches are drawn from the first.
        tokens: Folder for the packed text, written where it is missing. Memory then grows by 64
            bytes a window, and a later start does not read the text with the tokenizer again. Null
            keeps the packed text in memory, 13 bytes a token.
    """

    def __init__(
        self,
        model: StudiedModel | None = None,
        train: Corpus | list[Corpus] | None = None,
        val: Corpus | list[Corpus] | None = None,
        test: Corpus | list[Corpus] | None = None,
        sites: Literal["all"] | list[str] = "all",
        store: str | None = None,
        context: int = 128,
        packing: Packing = "cut",
        batch_size: int = 2048,
        buffer_rows: int = 65536,
        buffer_dtype: StoreDtype = "float32",
        sequences: int = 16,
        seed: int = 0,
        dtype: StoreDtype = "float32",
        shard_rows: int = 65536,
        prefetch: bool = True,
        tokens: str | None = None,
    ) -> None:
        super().__init__()
        if store is None and (model is None or train is None):
            raise BadConfig(
                "TokenActivationData needs a `store`, or a `model` and a `train` corpus to make "
                "the activations with."
            )
        if sites != "all" and (not sites or len(set(sites)) < len(sites)):
            raise BadConfig(f"Give `all`, or one or more different sites, not {sites}.")
        self.model, self.store = model, store
        self.corpora: dict[str, Corpus | list[Corpus]] = {
            split: corpus
            for split, corpus in (("train", train), ("val", val), ("test", test))
            if corpus is not None
        }
        self.context, self.packing, self.sequences = context, packing, sequences
        self.batch_size, self.buffer_rows, self.seed = batch_size, buffer_rows, seed
        self.buffer_dtype, self.dtype, self.shard_rows = buffer_dtype, dtype, shard_rows
        self.prefetch = prefetch
        self.predict_split: Split = "train"
        self._sites = sites
        self._opened: TokenStore | None = None
        self._text = PackedCorpora(self.corpora, model, context, packing, tokens)
        self._sources: dict[str, RowSource] = {}
        self._backbone: str | None = None

    # ------------------------------------------------------------- what it is

    @property
    def sites(self) -> list[str]:
        """The sites that batches hold; with a store and no model, `all` is known after `setup`."""
        if self._sites != "all":
            return list(self._sites)
        if self.model is not None:
            return [s for s in self.model.sites if _RESID_POST.fullmatch(s)]
        if self._opened is not None:
            return list(self._opened.sites)
        raise BadConfig("The sites of a store are known after TokenActivationData.setup().")

    def d_in_of(self, site: str) -> int:
        """Width of the activations at `site`; known after `setup`."""
        if self._opened is not None:
            return self._opened.at(site).d_in
        return self._source("train").widths[site]

    def provenance_of(self, site: str, split: str) -> dict[str, str]:
        """What the activations of `site` in `split` are made from: backbone, site, data, split."""
        if self._opened is not None:
            key = self._opened.at(site).key
            backbone, place, data = key["backbone"], key["site"], key["data"].get(split, "")
        else:
            model = self._studied()
            if self._backbone is None:
                self._backbone = hash_backbone(model)
            backbone, place = self._backbone, str(parse_site(site, model))
            data = self._text.fingerprint(split)
        return {"backbone": backbone, "site": place, "data": data, "split": split}

    def metadata_of(self, site: str) -> dict[str, Any]:
        """What SAELens' metadata say of where an autoencoder belongs, as far as is known."""
        layer = _RESID_POST.fullmatch(site)
        known: dict[str, Any] = {"site": site, "context_size": self.context, "prepend_bos": True}
        if layer is not None:
            # the name under which SAELens and TransformerLens know it
            known |= {"layer": int(layer[1]), "hook_name": f"blocks.{layer[1]}.hook_resid_post"}
        if self.model is not None:
            config = getattr(self.model.model, "config", None)
            name = getattr(config, "name_or_path", None)
            if name:
                known |= {"model_name": str(name), "hf_model_name": str(name)}
            dtype = next((p.dtype for p in self.model.model.parameters()), None)
            known["model_dtype"] = str(dtype).removeprefix("torch.")
        return known

    @functools.cached_property
    def _at_rest(self) -> threading.Lock:
        # made where it is used: data modules travel to spawned processes, locks do not
        return threading.Lock()

    @contextlib.contextmanager
    def model_at_rest(self) -> Iterator[None]:
        """Scope in which no thread runs the model, for other code to do so (its hooks are shared).

        No activations must be asked for inside.
        """
        with self._at_rest:
            yield

    def windows(self, split: str) -> PackedTokens:
        """The packed text of `split`.

        Raises:
            BadConfig: no corpus was given for it, or a model without tokenizer.
        """
        return self._text.windows(split)

    # ----------------------------------------------------------------- set-up

    def prepare_data(self) -> None:
        """Pack the text into `tokens` and harvest the store, where they are missing.

        Lightning calls this on one process only.

        Raises:
            StaleStore: `tokens` was made from another text.
        """
        if self.model is None or not self.corpora:
            return
        self._text.prepare()
        if self.store is not None and not Path(self.store).exists():
            # a second node with the same disk may have written it meanwhile; setup compares the key
            with contextlib.suppress(OutputExists):
                harvest_tokens(
                    self.model,
                    {split: self.windows(split) for split in self.corpora},
                    self.sites,
                    self.store,
                    dtype=self.dtype,
                    shard_rows=self.shard_rows,
                    sequences=self.sequences,
                    device=self._device(),
                )

    def setup(self, stage: str) -> None:
        """Open the store and compare it with model and text; or read the text.

        Raises:
            MissingStore: there is no store, and `model` or `train` is missing.
            StaleStore: the store was made from other weights, sites or text.
            NameNotFound: a site that the model or the store does not have.
            CorruptFile: a file of the store is damaged.
        """
        if self.store is not None and self._opened is None:
            opened = TokenStore(self.store)
            backbone = hash_backbone(self.model) if self.model else None
            data = {s: self._text.fingerprint(s) for s in self.corpora} if self.model else None
            self._opened = opened
            for site in self.sites:
                place = str(parse_site(site, self.model)) if self.model else None
                key = opened.at(site).key
                dtype = self.dtype if self.model and self.corpora else None
                check_fresh(opened.path, key, backbone, place, data, dtype)
        elif self.store is None:
            self._source("train")

    def train_dataloader(self) -> BufferedLoader[SitesBatch]:
        """Shuffled by (seed, epoch); its position is in Lightning's checkpoints."""
        # Lightning turns shuffling off for this only in DataLoaders
        overfit = getattr(self.trainer, "overfit_batches", 0)
        return self._loader("train", shuffle=not overfit)

    def val_dataloader(self) -> BufferedLoader[SitesBatch] | list[Any]:
        """The held-out text in order, each token once over all ranks; none without `val`."""
        return self._loader("val", shuffle=False) if self._has("val") else []

    def test_dataloader(self) -> BufferedLoader[SitesBatch]:
        """The test text in order, each token once over all ranks."""
        return self._loader("test", shuffle=False)

    def predict_dataloader(self) -> BufferedLoader[SitesBatch]:
        """The split named by `predict_split` in order, each token once over all ranks."""
        return self._loader(self.predict_split, shuffle=False)

    # ------------------------------------------------------------------ parts

    def _has(self, split: str) -> bool:
        return split in (self._opened.splits if self._opened is not None else self.corpora)

    def _loader(self, split: str, shuffle: bool) -> BufferedLoader[SitesBatch]:
        rank, world = (0, 1)
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
        source = self._source(split)
        # in order there is nothing to shuffle; a few forward passes at a time, because the windows
        # at the borders of chunks are read twice
        few = 8 * self.sequences * self.context * world
        buffer = self.buffer_rows if shuffle else max(self.batch_size, min(self.buffer_rows, few))
        order = ShuffledRows(
            source.counts, self.batch_size, buffer, self.seed, rank, world, shuffle
        )
        device = self._device()
        return BufferedLoader(
            source, order, SitesBatch.of, device, device, DTYPES[self.buffer_dtype], self.prefetch
        )

    def _source(self, split: str) -> RowSource:
        if split not in self._sources:
            if self._opened is not None:
                self._sources[split] = rows_of(self._opened, split, self.sites)
            else:
                model = self._studied()
                places = {site: parse_site(site, model) for site in self.sites}
                windows = self.windows(split)
                self._sources[split] = ModelRows(
                    model, places, windows, self.sequences, self._at_rest
                )
        return self._sources[split]

    def _studied(self) -> StudiedModel:
        if self.model is None:
            raise BadConfig("Activations cannot be made without a `model`.")
        return self.model

    def _device(self) -> torch.device:
        if self.trainer is not None:
            return self.trainer.strategy.root_device
        return torch.device("cpu")
