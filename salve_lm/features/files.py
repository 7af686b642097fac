"""A feature table on disk: the format of `docs/formats/features.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import salve_lm
from salve_lm.atomic import atomic_folder
from salve_lm.errors import CorruptFile, MissingFile, ShapeMismatch
from salve_lm.features.table import RANKINGS, FeatureTable
from salve_lm.hashing import hash_file

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "salve_lm.features"
VERSION = 1
WEIGHTS = "features.safetensors"
LISTED_PER_CLASS = 10
AGAIN = "Run discover again."


def save(
    table: FeatureTable,
    folder: str | Path,
    extra_tables: Mapping[str, pd.DataFrame] | None = None,
) -> Path:
    """Write `table` to the new folder `folder`; see `FeatureTable.save`."""
    from safetensors import __version__ as safetensors_version
    from safetensors.torch import save_file

    with atomic_folder(folder) as out:
        # one metadata key only: safetensors writes several in no fixed order
        save_file(tensors_of(table), out / WEIGHTS, {"format": "pt"})
        classes = classes_frame(table)
        classes.to_csv(out / "classes.csv", index=False)
        frames = {"latents": latents_frame(table), "classes": classes, **(extra_tables or {})}
        for name, frame in frames.items():
            frame.to_parquet(out / f"{name}.parquet", index=False)
        index = {
            "format": FORMAT,
            "version": VERSION,
            "class_names": list(table.class_names),
            "d_in": table.d_in,
            "d_sae": table.d_sae,
            "provenance": table.provenance,
            "sha256": {p.name: hash_file(p) for p in sorted(out.iterdir())},
            "versions": {
                "salve_lm": salve_lm.__version__,
                "torch": torch.__version__,
                "safetensors": safetensors_version,
            },
        }
        (out / "index.json").write_text(json.dumps(index, indent=2) + "\n")
    return Path(folder)


def load(folder: str | Path) -> FeatureTable:
    """Read a folder written by `save`; see `FeatureTable.load`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = _read_index(Path(folder))
    weights = Path(folder) / WEIGHTS
    if not weights.is_file():
        raise CorruptFile(folder, f"{WEIGHTS} is missing", AGAIN)
    if index["sha256"].get(WEIGHTS) != hash_file(weights):
        raise CorruptFile(weights, "it was changed or cut off after it was written", AGAIN)
    try:
        tensors = {n: t if n == "counts" else t.double() for n, t in load_file(weights).items()}
        return FeatureTable(index["class_names"], **tensors, provenance=index["provenance"])
    except (SafetensorError, TypeError, ShapeMismatch) as e:
        raise CorruptFile(weights, f"it does not hold a feature table ({e})", AGAIN) from e


def tensors_of(table: FeatureTable) -> dict[str, Tensor]:
    """The tensors of `table` by field name."""
    named = {f.name: getattr(table, f.name) for f in fields(table)}
    return {n: t.contiguous() for n, t in named.items() if isinstance(t, Tensor)}


def latents_frame(table: FeatureTable) -> pd.DataFrame:
    """One row a latent: norm, firing rate, mean, and the class it is most selective for."""
    import pandas as pd

    selective = torch.stack([table.scores(k, "selective") for k in range(table.n_classes)])
    best = selective.max(dim=0)
    names = [table.class_names[k] for k in best.indices.tolist()]
    alive = (best.values > 0).tolist()
    return pd.DataFrame(
        {
            "latent": range(table.d_sae),
            "decoder_norm": table.decoder_norm.numpy(),
            "firing_rate": table.firing_rate.numpy(),
            "mean": table.mean_all.numpy(),
            "selective_class": [n if a else "" for n, a in zip(names, alive, strict=True)],
            "selective_score": best.values.numpy(),
        }
    )


def classes_frame(table: FeatureTable, n: int = LISTED_PER_CLASS) -> pd.DataFrame:
    """The first `n` latents of each class and ranking, one row each."""
    import pandas as pd

    rows = []
    for k, name in enumerate(table.class_names):
        rest = table.mean[k] - table.mean_contrast(k)
        for ranking in RANKINGS:
            scores = table.scores(k, ranking)
            for rank, latent in enumerate(table.ranked(k, ranking)[:n].tolist()):
                rows.append(
                    {
                        "class": name,
                        "label": k,
                        "samples": int(table.counts[k]),
                        "ranking": ranking,
                        "rank": rank,
                        "latent": latent,
                        "score": scores[latent].item(),
                        "mean": table.mean[k, latent].item(),
                        "mean_rest": rest[latent].item(),
                        "sign": table.sign(k, latent),
                        "decoder_norm": table.decoder_norm[latent].item(),
                        "firing_rate": table.firing_rate[latent].item(),
                    }
                )
    return pd.DataFrame(rows)


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    if not path.is_file():
        raise MissingFile(f"No feature table at {folder}. Make one with `salve-lm discover`.")
    try:
        index = json.loads(path.read_text())
    except (ValueError, OSError) as e:
        raise CorruptFile(path, f"not readable as JSON ({e})", AGAIN) from e
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CorruptFile(path, f"not a {FORMAT} index", "Give the folder that discover wrote.")
    if index.get("version") != VERSION:
        why = f"format version {index.get('version')}, this salve_lm reads {VERSION}"
        raise CorruptFile(path, why, "Run discover again with this version.")
    for key in ("class_names", "provenance", "sha256"):
        if key not in index:
            raise CorruptFile(path, f"{key!r} is missing", AGAIN)
    return index
