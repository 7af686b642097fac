"""Activations of tokens on disk: every site harvested in one pass over the text.

A folder that holds one ordinary activation store for each site, whose rows are tokens and whose
samples are documents, and beside them, once for all sites, the place of each row's token in the
text. The format is described in `docs/formats/activation-store.md`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salve_lm import __version__
from salve_lm.activations import store as site_store
from salve_lm.activations.columns import Column, Piece
from salve_lm.activations.key import hash_backbone
from salve_lm.activations.rows import StoredRows
from salve_lm.activations.shard import DTYPES, StoreDtype
from salve_lm.activations.shard_writer import ShardWriter
from salve_lm.activations.sites import parse_site
from salve_lm.activations.store import ActivationStore, SplitEntry, write_index
from salve_lm.activations.tokens import ModelRows
from salve_lm.atomic import atomic_folder, check_writable_target
from salve_lm.data.tokens import PackedTokens
from salve_lm.errors import BadConfig, CorruptFile, MissingStore, NameNotFound, NotFinite
from salve_lm.modules.studied import StudiedModel
from salve_lm.task_vectors.safetensors_header import layout, read_header

FORMAT = "salve-token-activations"
VERSION = 1
INDEX = "tokens.json"

_log = logging.getLogger(__name__)
_COLUMNS = ("counts", "sample", "position")
_CURE = "Remove the store and harvest it again."


def harvest_tokens(
    studied: StudiedModel,
    windows: Mapping[str, PackedTokens],
    sites: Sequence[str],
    out: str | Path,
    *,
    dtype: StoreDtype = "float32",
    shard_rows: int = 65536,
    sequences: int = 16,
    device: torch.device | None = None,
    progress: bool = True,
) -> TokenStore:
    """Run `studied.model` once over all windows and keep what passes `sites`.

    Args:
        studied: the language model, frozen for this.
        windows: split -> its windows.
        sites: where to read, see `parse_site`.
        out: folder of the store; must not exist. It appears when everything is written.
        dtype: of the stored activations; float32 keeps their bits, bfloat16 halves the disk.
        shard_rows: rows a file.
        sequences: windows in a forward pass.
        device: where to run; that of the model where None.
        progress: show a progress bar for each split.

    Raises:
        OutputExists, OutputUnwritable: `out` is there already; cannot be written; the disk is full.
        NotFinite: NaN or infinity; names the site.
        NameNotFound: no such site.
        BadConfig: sizes below 1, a site that does not yield one row a token, no text.
    """
    check_writable_target(out)
    if shard_rows < 1:
        raise BadConfig(f"shard_rows must be at least 1, but is {shard_rows}.")
    places = {site: parse_site(site, studied) for site in sites}
    backbone = hash_backbone(studied)
    data = {split: w.fingerprint() for split, w in windows.items()}
    if device is None:
        device = next((p.device for p in studied.model.parameters()), torch.device("cpu"))
    entries: dict[str, dict[str, SplitEntry]] = {site: {} for site in sites}
    splits: dict[str, dict[str, int]] = {}
    with atomic_folder(out) as folder:
        for site in sites:
            (folder / _folder_of(site)).mkdir()
        for split, of_split in windows.items():
            rows = ModelRows(studied, places, of_split, sequences)
            written = _write_split(folder, split, rows, DTYPES[dtype], shard_rows, device, progress)
            splits[split] = {"windows": len(rows.counts), "rows": int(rows.counts.sum())}
            for site, entry in written.items():
                entries[site][split] = entry
        for site, place in places.items():
            index: site_store.Index = {
                "format": site_store.FORMAT,
                "version": site_store.VERSION,
                "key": {"backbone": backbone, "site": str(place), "data": data, "dtype": dtype},
                "class_names": [],
                "d_in": rows.widths[site],
                "dtype": dtype,
                "splits": entries[site],
                "versions": {"salve_lm": __version__, "torch": str(torch.__version__)},
            }
            write_index(folder / _folder_of(site), index)
        whole = {
            "format": FORMAT,
            "version": VERSION,
            "sites": {site: _folder_of(site) for site in sites},
            "splits": splits,
        }
        (folder / INDEX).write_text(json.dumps(whole, indent=1) + "\n")
    _log.info("Harvested %s at %d sites to %s", ", ".join(windows), len(sites), out)
    return TokenStore(out)


def _write_split(
    folder: Path,
    split: str,
    rows: ModelRows,
    dtype: torch.dtype,
    shard_rows: int,
    device: torch.device,
    progress: bool,
) -> dict[str, SplitEntry]:
    from tqdm import tqdm

    n = int(rows.counts.sum())
    writers = {
        site: ShardWriter(folder / _folder_of(site), split, dtype, shard_rows)
        for site in rows.widths
    }
    # the first writer asks for the space of all
    next(iter(writers.values())).check_space(n, sum(rows.widths.values()))
    kept = _TokenColumns(folder / f"{split}.safetensors", rows.counts)
    with kept, tqdm(total=n, desc=f"harvest {split}", unit="token", disable=not progress) as bar:
        for part in rows.read(torch.arange(len(rows.counts)), device):
            unknown = torch.full_like(part.sample, -1)
            for site, x in part.x.items():
                stored = x.to(dtype).cpu()
                if not bool(stored.isfinite().all()):
                    raise NotFinite(
                        site, f"split {split!r}, as {dtype}",
                        "It does not fit this dtype; store as bfloat16 or float32.",
                    )  # fmt: skip
                writers[site].add(stored, unknown, part.sample)
            kept.add(part.sample, part.position)
            bar.update(len(part.sample))
    entries: dict[str, SplitEntry] = {}
    for site, writer in writers.items():
        shards = writer.finish()
        entries[site] = {"samples": kept.samples, "rows": n, "shards": shards}
    return entries


class _TokenColumns:
    """Writes `SPLIT.safetensors` part by part.

    Attributes:
        samples: documents seen so far, which come in order.
    """

    def __init__(self, path: Path, counts: Tensor) -> None:
        n = int(counts.sum())
        shapes = {name: (torch.int64, (len(counts) if name == "counts" else n,))
                  for name in _COLUMNS}  # fmt: skip
        self.samples = 0
        self._header, self._counts = layout(path.name, shapes, {}), counts
        self._path, self._row, self._last = path, 0, -1

    def __enter__(self) -> None:
        self._file = open(self._path, "wb")
        self._file.write(self._header.raw)
        self._write("counts", 0, self._counts)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, sample: Tensor, position: Tensor) -> None:
        """The next rows."""
        self._write("sample", self._row, sample)
        self._write("position", self._row, position)
        self._row += len(sample)
        if len(sample):
            self.samples += int((sample.diff() != 0).sum()) + (int(sample[0]) != self._last)
            self._last = int(sample[-1])

    def _write(self, name: str, row: int, values: Tensor) -> None:
        self._file.seek(self._header.tensors[name].offset + 8 * row)
        self._file.write(values.contiguous().numpy().data)


class TokenStore:
    """Reads what `harvest_tokens` wrote.

    Attributes:
        path: the folder.
        sites: site -> the activation store of that site.
        splits: names of the splits it holds.

    Raises:
        MissingStore: there is no folder `path`.
        CorruptFile: the folder is not such a store, or a file of it is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = _read_index(self.path)
        self.sites = {
            site: ActivationStore(self.path / name) for site, name in index["sites"].items()
        }
        self.splits: tuple[str, ...] = tuple(index["splits"])

    def at(self, site: str) -> ActivationStore:
        """The activation store of `site`; raises NameNotFound for one that was not harvested."""
        if site not in self.sites:
            raise NameNotFound(
                f"site in the activation store {self.path}", site, self.sites,
                "Choose one of them, or harvest again with it among the sites.",
            )  # fmt: skip
        return self.sites[site]

    def tokens(self, split: str) -> dict[str, Column]:
        """What `split` is made of: `counts` of rows by window; `sample` and `position` of rows.

        Raises:
            BadConfig: the split was not harvested.
            CorruptFile: the file is missing or damaged.
        """
        if split not in self.splits:
            raise BadConfig(
                f"The activation store {self.path} has the splits {', '.join(self.splits)}, not "
                f"{split!r}. Harvest a new one with {split!r} among its `splits`."
            )
        file = self.path / f"{split}.safetensors"
        try:
            with open(file, "rb") as opened:
                found = read_header(file, opened.fileno()).tensors
            return {
                name: Column([Piece(file, found[name].offset, *found[name].shape)], (), torch.int64)
                for name in _COLUMNS
            }
        except (OSError, KeyError, TypeError) as e:
            raise CorruptFile(file, f"it is damaged ({e})", _CURE) from e


def rows_of(store: TokenStore, split: str, sites: Sequence[str]) -> StoredRows:
    """The rows of `sites` in `split`, in units of one window.

    Raises:
        NameNotFound: a site that was not harvested.
        BadConfig, CorruptFile: as `TokenStore.tokens`.
    """
    tokens = store.tokens(split)
    counts = tokens["counts"].read(0, len(tokens["counts"]))
    x = {site: store.at(site).column(split, "x") for site in sites}
    rows = len(next(iter(x.values())))
    if not int(counts.sum()) == len(tokens["sample"]) == len(tokens["position"]) == rows:
        file = store.path / f"{split}.safetensors"
        raise CorruptFile(file, "it does not fit the activations beside it", _CURE)
    return StoredRows(counts, x, {name: tokens[name] for name in ("sample", "position")})


def _folder_of(site: str) -> str:
    return site.replace(":", "+").replace("/", "+")


def _read_index(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise MissingStore(
            f"No activation store at {path}. Give `model` and `text` beside `store` and it is "
            "harvested there; or check the path."
        )
    file = path / INDEX
    if not file.is_file():
        raise CorruptFile(
            path, f"it is not a store of token activations (it has no {INDEX})", "Check the path."
        )
    try:
        index: dict[str, Any] = json.loads(file.read_text())
        if index["format"] != FORMAT or index["version"] != VERSION:
            raise CorruptFile(
                file,
                f"its format is {index['format']!r}, version {index['version']}; this package "
                f"reads {FORMAT!r}, version {VERSION}",
                "Update this package, or harvest the store again.",
            )
        index["sites"].items(), index["splits"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, CorruptFile):
            raise
        raise CorruptFile(file, f"it is damaged ({e!r})", _CURE) from e
    return index
