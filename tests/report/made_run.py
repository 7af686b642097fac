"""A small run folder as the stages would leave it, made up in milliseconds."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

DIGITS = ("zero", "one", "two", "three")
ALPHAS = (0.0, 1.0, 5.0, 20.0, 100.0)
# name -> kind, control?, direction, held-out target accuracy at the chosen strength, others' change
EDITS = {
    "suppress": ("DecoderGuided", False, "suppress", 0.0, 0.0),
    "erase": ("LatentContrastErasure", False, "suppress", 0.01, -0.02),
    "enhance": ("DecoderGuided", False, "enhance", 0.99, 0.0),
    "class row zeroed": ("ShrinkClassRow", True, "suppress", 0.0, 0.0),
    "steering": ("Steering", True, "suppress", 0.8, -0.1),
}
Kinds = dict[str, tuple[str, bool, str, float, float]]


def make_run(
    run: Path, classes: Sequence[str] = DIGITS, edits: Kinds = EDITS, labelled: bool = True
) -> Path:
    """Write all that `report` needs into `run`, for `edits` of `classes`."""
    for folder in ("sae", "features", "sweep", "thresholds", "exported", "backbone"):
        (run / folder).mkdir(parents=True)
    _json(run / "sae/cfg.json", {"architecture": "linear_l1"})
    _json(run / "sae/metrics.json", {"explained_variance": 0.97, "l0": 12.5, "dead_fraction": 0.0})
    _json(
        run / "features/index.json",
        {"format": "salve_lm.features", "version": 1, "d_sae": 64, "provenance": {"site": "fc:in"},
         "sha256": {}, "versions": {"torch": "2"}},
    )  # fmt: skip
    before = np.full(len(classes), 0.95)
    accuracy = {"accuracy": 0.95, "per_class": dict(zip(classes, before.tolist(), strict=True))}
    _json(run / "sweep/baseline.json", {"train": accuracy, "val": accuracy})
    rows, points = [], []
    for edit, (kind, control, direction, target, cost) in edits.items():
        for k, name in enumerate(classes):
            rows.append(
                {"edit": edit, "kind": kind, "control": control, "direction": direction,
                 "target_class": name, "features": str(k), "rows": "class", "alpha": 20.0,
                 "floor": 0.0 if edit == "suppress" else None}
                | {f"{s}_{who}_{when}": v for s in ("train", "val")
                   for who, when, v in (("target", "before", 0.95), ("target", "after", target),
                                        ("others", "before", 0.95),
                                        ("others", "after", 0.95 + cost))}
            )  # fmt: skip
            after = before + cost
            after[k] = target
            points += [
                {"edit": edit, "target_class": name, "direction": direction, "split": split,
                 "alpha": a, "target": target if a >= 20 else 0.95, "others": 0.95 + cost,
                 "target_logit": 5 - a, "per_class": after if a >= 20 else before}
                for split in ("train", "val") for a in ALPHAS
            ]  # fmt: skip
    pd.DataFrame(rows).to_csv(run / "sweep/results.csv", index=False)
    pd.DataFrame(points).to_parquet(run / "sweep/curves.parquet", index=False)
    _json(
        run / "thresholds/critical_thresholds.json", [_threshold(*kn) for kn in enumerate(classes)]
    )
    _json(
        run / "exported/edit.json",
        {"format": "salve_lm.edit", "version": 1, "model": {"name": "resnet18"},
         "base": {"sha256": "ab" * 32}, "versions": {"salve_lm": "0.1.0"},
         "edits": [{"title": f"suppress:{classes[0]}", "spec": {"class_path": "DecoderGuided"}}],
         "check": {"matches_live": True, "checked_on": "all tensors"},
         "sha256": {"model.safetensors": "cd" * 32}},
    )  # fmt: skip
    (run / "backbone/config.yaml").write_text(
        "# lightning.pytorch==2.6.6\nseed_everything: 0\ndata:\n  class_path: vision.data.Digits\n"
    )
    if labelled:
        _json(
            run / "sweep/removal.json",
            [
                _removal(e, name)
                for e in ("suppress", "class row zeroed")
                if e in edits
                for name in classes
            ],
        )
    return run


def make_cards(run: Path, count: int, image: bytes | None = None) -> Path:
    """Add `count` cards with two images each, and return their folder."""
    folder = run / "cards"
    folder.mkdir()
    for name in ("top.png", "fam.png", "crop.png", "max.png"):
        (folder / name).write_bytes(image or png(8))
    cards = [
        {"latent": i, "class": DIGITS[i % 4], "sign": -1 if i % 2 else 1, "maximised": "max.png",
         "top": [{"image": "top.png", "overlay": "fam.png", "crop": "crop.png",
                  "sample": i, "source": f"digits/{i}", "activation": 1.5, "class": "three"}] * 2,
         "deletion_auc": 0.3, "insertion_auc": None, "random_deletion_auc": 0.5}
        for i in range(count)
    ]  # fmt: skip
    _json(folder / "cards.json", {"format": "salve_lm.cards", "version": 1, "latents": cards})
    return folder


def png(size: int) -> bytes:
    """A square RGB image of noise, which does not compress, as PNG."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    )


def _threshold(k: int, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"class": name, "feature": str(k), "samples": 90}
    for definition in ("flip", "exact", "linear", "exact_centred"):
        found |= {f"{definition}_{q}": v for q, v in (("q25", 6.0), ("median", 8.0), ("q75", 12.0))}
        found[f"{definition}_no_root_share"] = 0.0
    # the class whose logit never reaches zero
    if k == 1:
        found |= {"exact_median": float("inf"), "exact_q75": float("inf")}
        found["exact_no_root_share"] = 0.625
    return found | {"re_entry_share": 0.0, "left_out_share": 0.0}


def _removal(edit: str, name: str) -> dict[str, Any]:
    share = {"successes": 0, "n": 89, "share": 0.0, "low": 0.0, "high": 0.0406}
    figures = {"auroc": 0.99, "few_shot": [0.9, 0.8], "refit": share, "knn": share, "chance": 0.25}
    return {"edit": edit, "target_class": name, "label": "suppressed", "target": 0,
            "recoverability": 1.0, "runner_up_share": 0.98, "target_before": share,
            "target_after": share, "runner_up": share, "before": figures,
            "after": figures}  # fmt: skip


def _json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
