"""Activations of tokens: windows of text run through a frozen language model, as rows per site."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from salve_lm.activations.ahead import Stopped, never
from salve_lm.activations.hooks import run_to
from salve_lm.activations.rows import RowBuffer
from salve_lm.activations.sites import Site
from salve_lm.data.tokens import PackedTokens
from salve_lm.errors import BadConfig
from salve_lm.modules.studied import StudiedModel


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


class ModelRows:
    """Rows made on the fly: a frozen model runs once over each window, as far as the deepest site.

    Rows are the tokens that `TokenBatch.keep` marks: no BOS, no padding, no first tokens.

    Args:
        studied: the language model; moved to the device it is run on.
        sites: name -> place to read.
        windows: what to run it on.
        sequences: windows in a forward pass.
        at_rest: held during each forward pass, so that no other thread runs the model meanwhile.

    Attributes:
        counts: rows that each window yields, int64 [windows].
        widths: site -> width of its activations.
        ids: `sample` and `position`.

    Raises:
        BadConfig: no token counts, or a site that does not yield one row a token.
    """

    def __init__(
        self,
        studied: StudiedModel,
        sites: Mapping[str, Site],
        windows: PackedTokens,
        sequences: int = 16,
        at_rest: threading.Lock | None = None,
    ) -> None:
        if sequences < 1:
            raise BadConfig(f"sequences must be at least 1, but is {sequences}.")
        self._studied, self._sites, self._windows = studied, dict(sites), windows
        self._sequences, self._at_rest = sequences, at_rest or threading.Lock()
        self.ids: tuple[str, ...] = ("sample", "position")
        self.counts = windows.n_kept.long()
        if not int(self.counts.sum()):
            raise BadConfig(
                "No token of the text counts: documents of one token, or nothing but BOS. Give "
                "longer documents."
            )
        self.widths = self._probe()

    def fill(self, out: RowBuffer, units: Tensor, skip: int, stopped: Stopped) -> None:
        """Fill `out` with the rows of windows `units`, leaving out the first `skip`.

        Raises:
            NotFinite: NaN or infinity at a site; names the site and the window.
        """
        filled, device = 0, next(iter(out.x.values())).device
        for part in self.read(units, device, stopped):
            # the first and the last unit may lie across the border of the chunk
            first, skip = min(skip, len(part.sample)), max(0, skip - len(part.sample))
            n = min(len(part.sample) - first, out.rows - filled)
            own, theirs = slice(filled, filled + n), slice(first, first + n)
            for site, x in part.x.items():
                out.x[site][own] = x[theirs].to(out.x[site].dtype)
            out.ids["sample"][own] = part.sample[theirs]
            out.ids["position"][own] = part.position[theirs]
            filled += n
        if filled != out.rows and not stopped():
            raise RuntimeError(f"The units of a chunk gave {filled} rows, not {out.rows}.")

    def read(
        self, units: Tensor, device: torch.device, stopped: Stopped = never
    ) -> Iterator[SiteRows]:
        """The rows of windows `units`, in order and in parts, on `device`, until `stopped`.

        Raises:
            NotFinite: NaN or infinity at a site; names the site and the window.
        """
        column = torch.arange(self._windows.context)
        for part in units.split(self._sequences):
            while not self._at_rest.acquire(timeout=0.1):
                if stopped():
                    return
            try:
                if stopped():
                    return
                if _device_of(self._studied) != device:
                    self._studied.model.to(device)
                found, keep, document = self._run(part, device)
            finally:
                self._at_rest.release()
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


def _device_of(studied: StudiedModel) -> torch.device:
    return next((p.device for p in studied.model.parameters()), torch.device("cpu"))
