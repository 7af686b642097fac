"""Packed text on disk: encoded once, read row by row, so that memory does not hold the corpus.

The format is described in `docs/formats/packed-text.md`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from salve_lm.atomic import atomic_folder
from salve_lm.data.corpus import Corpus
from salve_lm.data.packing import Packing, Rows, Tally, pack_stream, row_type
from salve_lm.data.tokens import PackedTokens, count, stream_corpora
from salve_lm.errors import CorruptFile, StaleStore
from salve_lm.hashing import hash_plain
from salve_lm.ranges import read_range, runs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "salve-packed-text"
VERSION = 1
ROWS, COUNTS, INDEX = "rows.bin", "counts.npy", "index.json"
_CURE = "Remove the folder, and it is made again."


def write_tokens(
    folder: Path,
    corpora: Corpus | Sequence[Corpus],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    packing: Packing,
) -> None:
    """Encode, pack and write `corpora`; `folder` appears when everything is written.

    Raises:
        BadConfig: see `PackedTokens`.
        OutputExists, OutputUnwritable: the folder is there already, or cannot be written.
    """
    tally, bos, counts = Tally(), tokenizer.bos_token_id, []
    with atomic_folder(folder) as out:
        with open(out / ROWS, "wb") as file:
            text = stream_corpora(corpora)
            for rows in pack_stream(text, tokenizer, context, packing, True, False, tally):
                file.write(rows.data)
                counts.append(count(rows, bos))
        np.save(out / COUNTS, np.concatenate(counts))
        index: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "made_from": {"text": _hash_text(corpora), **_settings(tokenizer, context, packing)},
            "bos": bos,
            "n_documents": tally.n_documents,
            "n_tokens": tally.n_tokens,
            "n_targets": tally.n_targets,
        }
        # the last file: a folder without it is not finished
        written = _Opened(out, {**index, "fingerprint": ""})
        index["fingerprint"] = PackedTokens.fingerprint(written)
        (out / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def check_text(folder: Path, corpora: Corpus | Sequence[Corpus]) -> None:
    """Compare what `folder` was made from with `corpora`, which are read once for it.

    Raises:
        StaleStore: it was made from another text.
    """
    if _read_index(folder)["made_from"]["text"] != _hash_text(corpora):
        raise StaleStore(
            f"The packed text {folder} was made from another text than this. Remove it, or name "
            "another folder as `tokens`, and it is made anew."
        )


class _Opened(PackedTokens):
    """The packed text in a folder whose index was read."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        context = index["made_from"]["context"]
        counts = np.load(folder / COUNTS)
        tally = Tally(index["n_documents"], index["n_tokens"], index["n_targets"])
        rows = _RowFile(folder / ROWS, context, len(counts))
        self._hold(rows, counts, context, index["bos"], tally)
        self._fingerprint: str = index["fingerprint"]

    def fingerprint(self) -> str:
        """As computed when it was written."""
        return self._fingerprint


class StoredTokens(_Opened):
    """The packed text that `write_tokens` wrote; memory holds some bytes a row.

    Args:
        folder: where it is.
        tokenizer: with which it was to be made.
        context: tokens in a row.
        packing: how documents were to fill rows.

    Raises:
        CorruptFile: a file is missing or damaged.
        StaleStore: it was made with other settings.
    """

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, context: int, packing: Packing
    ) -> None:
        index = _read_index(folder)
        wanted = _settings(tokenizer, context, packing)
        differing = [
            f"{name} (was {index['made_from'].get(name)}, is {value})"
            for name, value in wanted.items()
            if index["made_from"].get(name) != value
        ]
        if differing:
            raise StaleStore(
                f"The packed text {folder} was made with other settings: {', '.join(differing)}. "
                "Remove it, or name another folder as `tokens`, and it is made anew."
            )
        try:
            super().__init__(folder, index)
        except (OSError, ValueError, KeyError) as e:
            if isinstance(e, CorruptFile):
                raise
            raise CorruptFile(folder, f"it is damaged ({e})", _CURE) from e


class _RowFile:
    """Rows of `row_type` in a file."""

    def __init__(self, path: Path, context: int, rows: int) -> None:
        self._path, self._type, self._rows = path, row_type(context), rows
        if path.stat().st_size != rows * self._type.itemsize:
            raise CorruptFile(path, f"it does not hold {rows} rows of {context} tokens", _CURE)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> Rows:
        found, at, size = np.empty(len(rows), self._type), 0, self._type.itemsize
        raw = found.view(np.uint8).data
        for first, last in runs(rows):
            end = at + (last - first + 1) * size
            read_range(self._path, first * size, raw[at:end])
            at = end
        return found


def _settings(tokenizer: PreTrainedTokenizerBase, context: int, packing: Packing) -> dict[str, Any]:
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    fast = getattr(tokenizer, "backend_tokenizer", None)
    written = tokenizer.get_vocab() if fast is None else fast.to_str()
    identity = hash_plain([written, special, tokenizer.chat_template])
    return {"tokenizer": identity, "context": context, "packing": packing}


def _hash_text(corpora: Corpus | Sequence[Corpus]) -> str:
    several = [corpora] if isinstance(corpora, Corpus) else corpora
    return hash_plain([corpus.fingerprint() for corpus in several])


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    if not file.is_file():
        raise CorruptFile(folder, f"it is no packed text (it has no {INDEX})", "Check the path.")
    try:
        index: dict[str, Any] = json.loads(file.read_text())
        if (index["format"], index["version"]) != (FORMAT, VERSION):
            raise CorruptFile(
                file,
                f"its format is {index['format']!r}, version {index['version']}; this package "
                f"reads {FORMAT!r}, version {VERSION}",
                _CURE,
            )
        index["made_from"]["text"], index["fingerprint"]
    except (ValueError, KeyError, TypeError) as e:
        if isinstance(e, CorruptFile):
            raise
        raise CorruptFile(file, f"it is damaged ({e!r})", _CURE) from e
    return index
