"""The packed text of each split: in memory, or in a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from salve_lm.data.corpus import Corpus
from salve_lm.data.packing import Packing
from salve_lm.data.stored_tokens import StoredTokens, check_text, write_tokens
from salve_lm.data.tokens import PackedTokens, stream_corpora
from salve_lm.errors import BadConfig, OutputExists
from salve_lm.modules.studied import StudiedModel


class PackedCorpora:
    """Corpora by split, packed when they are asked for.

    Args:
        corpora: split -> its corpus, or several.
        model: whose tokenizer reads them.
        context: tokens in a row.
        packing: how documents fill rows.
        folder: where the packed text is kept, each split in a folder of its own; None for memory.
    """

    def __init__(
        self,
        corpora: Mapping[str, Corpus | list[Corpus]],
        model: StudiedModel | None,
        context: int,
        packing: Packing,
        folder: str | None,
    ) -> None:
        self.corpora = dict(corpora)
        self._model, self._context, self._packing = model, context, packing
        self._folder = None if folder is None else Path(folder)
        self._windows: dict[str, PackedTokens] = {}
        self._fingerprints: dict[str, str] = {}

    def windows(self, split: str) -> PackedTokens:
        """The packed text of `split`.

        Raises:
            BadConfig: no corpus was given for it, or no model with a tokenizer.
        """
        if split not in self.corpora:
            raise BadConfig(f"No text of split {split!r}: give TokenActivationData `{split}`.")
        if split not in self._windows:
            self._windows[split] = self._packed(split)
        return self._windows[split]

    def fingerprint(self, split: str) -> str:
        """A hash of the packed text; empty where there is none."""
        if split not in self.corpora:
            return ""
        if split not in self._fingerprints:
            self._fingerprints[split] = self.windows(split).fingerprint()
        return self._fingerprints[split]

    def prepare(self) -> None:
        """Write what is missing in the folder, and compare what is there with the text.

        Raises:
            StaleStore: it was made from another text, or with other settings.
        """
        if self._folder is None:
            return
        for split, corpora in self.corpora.items():
            self.windows(split)
            check_text(self._folder / split, corpora)

    def _packed(self, split: str) -> PackedTokens:
        if self._model is None:
            raise BadConfig("Activations cannot be made without a `model`.")
        tokenizer = getattr(self._model, "tokenizer", None)
        if tokenizer is None:
            raise BadConfig("The model has no tokenizer to read text with: give it one.")
        corpora, context, packing = self.corpora[split], self._context, self._packing
        if self._folder is None:
            return PackedTokens(stream_corpora(corpora), tokenizer, context, packing)
        folder = self._folder / split
        if not folder.exists():
            # another process may write it at the same time
            with contextlib.suppress(OutputExists):
                write_tokens(folder, corpora, tokenizer, context, packing)
        return StoredTokens(folder, tokenizer, context, packing)
