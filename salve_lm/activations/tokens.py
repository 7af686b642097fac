"""Activations of tokens: windows of text run through a frozen language model, as rows per site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from salve_lm.activations.hooks import run_to
from salve_lm.activations.sites import Site
from salve_lm.data.tokens import PackedTokens
from salve_lm.errors import BadConfig
from salve_lm.hashing import hash_plain, hash_tensors
from salve_lm.modules.studied import StudiedModel

_AT_ONCE = 4096
"""Windows that are looked at together, where all of them are."""


class SiteRows(NamedTuple):
    """Rows of one or several units, in their order.

    Attributes:
        x: site -> activations [n, d_in of the site].
        sample: index of each row's document, int64 [n].
        position: place of each row's token in the packed text, int64 [n]: its window times
            `context`, plus its column.
    """

    x: dict[str, Tensor]
    sample: Tensor
    position: Tensor


class RowSource(Protocol):
    """Where the rows of units come from: a model, or a store.

    Attributes:
        counts: rows that each unit yields, int64 [units].
        widths: site -> width of its activations.
    """

    counts: Tensor
    widths: dict[str, int]

    def read(self, units: Tensor, device: torch.device) -> Iterator[SiteRows]:
        """The rows of `units`, in order and in parts, on `device`."""


class ModelRows:
    """Rows made on the fly: a frozen model runs once over each window, as far as the deepest site.

    Rows are the tokens that `TokenBatch.keep` marks: no BOS, no padding, no first tokens.

    Args:
        studied: the language model; moved to the device it is run on.
        sites: name -> place to read.
        windows: what to run it on.
        sequences: windows in a forward pass.

    Attributes:
        counts: rows that each window yields, int64 [windows].
        widths: site -> width of its activations.

    Raises:
        BadConfig: no token counts, or a site that does not yield one row a token.
    """

    def __init__(
        self,
        studied: StudiedModel,
        sites: Mapping[str, Site],
        windows: PackedTokens,
        sequences: int = 16,
    ) -> None:
        if sequences < 1:
            raise BadConfig(f"sequences must be at least 1, but is {sequences}.")
        self._studied, self._sites, self._windows = studied, dict(sites), windows
        self._sequences = sequences
        self.counts = kept_tokens(windows)
        if not int(self.counts.sum()):
            raise BadConfig(
                "No token of the text counts: documents of one token, or nothing but BOS. Give "
                "longer documents."
            )
        self.widths = self._probe()

    def read(self, units: Tensor, device: torch.device) -> Iterator[SiteRows]:
        """The rows of windows `units`, in order and in parts, on `device`.

        Raises:
            NotFinite: NaN or infinity at a site; names the site and the window.
        """
        if _device_of(self._studied) != device:
            self._studied.model.to(device)
        column = torch.arange(self._windows.context)
        for part in units.split(self._sequences):
            found, keep, document = self._run(part, device)
            place = part[:, None] * self._windows.context + column
            there = keep.to(device)
            yield SiteRows(
                {name: rows[there] for name, rows in found.items()},
                document[keep],
                place.flatten()[keep],
            )

    def _run(self, part: Tensor, device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Activations of every token, the tokens to keep, and every token's document."""
        batch = self._windows.batch(part)
        inputs = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in batch.model_inputs().items()
        }
        found = run_to(
            self._studied.model, self._sites, inputs, lambda row: f"window {int(part[row])}"
        )
        return found, batch.keep.flatten().nonzero().flatten(), batch.document.flatten()

    def _probe(self) -> dict[str, int]:
        found, _, document = self._run(torch.tensor([0]), _device_of(self._studied))
        for name, rows in found.items():
            if len(rows) != len(document):
                raise BadConfig(
                    f"Site {name!r} yields {len(rows)} rows for {len(document)} tokens. Read one a "
                    "token: append ':positions' to the site."
                )
        return {name: rows.shape[1] for name, rows in found.items()}


def kept_tokens(windows: PackedTokens) -> Tensor:
    """How many tokens of each window count, int64 [windows]."""
    every = torch.arange(len(windows))
    return torch.cat([windows.batch(part).keep.sum(1) for part in every.split(_AT_ONCE)])


def fingerprint(windows: PackedTokens) -> str:
    """A hash of the tokens, of where documents begin, and of which tokens count."""
    parts = []
    for part in torch.arange(len(windows)).split(_AT_ONCE):
        batch = windows.batch(part)
        fields = {"ids": batch.input_ids, "position": batch.position_ids, "keep": batch.keep}
        parts.append(hash_tensors(fields))
    return hash_plain(parts)


def _device_of(studied: StudiedModel) -> torch.device:
    return next((p.device for p in studied.model.parameters()), torch.device("cpu"))
