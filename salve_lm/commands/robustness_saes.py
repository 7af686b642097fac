"""The autoencoders of a robustness study: their settings, features, and how alike they are."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salve_lm.errors import BadConfig, MissingFile, StaleStore
from salve_lm.features import FeatureTable
from salve_lm.features.similarity import guide_cosine, mean_max_cosine, random_directions
from salve_lm.features.table import RANKINGS, Ranking

if TYPE_CHECKING:
    from salve_lm.edits.context import EditContext

METRICS = ("explained_variance", "l0", "dead_fraction")
# what a study calls a setting, in this order; the architecture's own options follow
_PLAIN = ("architecture", "d_sae")
_SEED = re.compile(r"(^|-)seed_[^-]+")


@dataclass(frozen=True)
class StudiedSAE:
    """One autoencoder.

    Attributes:
        name: of its folder.
        path: the folder.
        seed: it was trained with; None where its metadata do not tell.
        settings: architecture, width, and the architecture's options.
        metrics: explained variance, L0, dead fraction on the validation split, as far as known.
        signed: its latents have both signs.
    """

    name: str
    path: str
    seed: int | None
    settings: dict[str, Any]
    metrics: dict[str, float]
    signed: bool


def find_saes(folder: str) -> list[StudiedSAE]:
    """The autoencoders in the folders below `folder`, by settings and then seed.

    Raises:
        MissingFile: no such folder, or no autoencoder in it.
        BadConfig: only one, which compares with nothing.
    """
    root = Path(folder)
    paths = [p.parent for p in sorted(root.glob("*/cfg.json"))] if root.is_dir() else []
    if not paths:
        raise MissingFile(
            f"No autoencoders in folders below {folder}. Give the folder that SAEGroupTraining "
            "wrote (its argument `out`)."
        )
    if len(paths) < 2:
        raise BadConfig(
            f"There is one autoencoder in {folder}; a study of robustness compares several. Train "
            "them with a sweep, such as `sweep: {seed: [0, 1, 2]}`."
        )
    found = [_read(path) for path in paths]
    return sorted(found, key=lambda s: (_order(s.settings), s.seed is None, s.seed or 0, s.name))


def group_by_setting(saes: Sequence[StudiedSAE]) -> dict[str, list[StudiedSAE]]:
    """Setting -> the autoencoders that differ in nothing but their seeds.

    A setting is called by what differs between them (`l1_coefficient 0.5, d_sae 256`), and `all`
    where nothing does. Two of one seed differ in something that their folders do not tell, such as
    the learning rate; their own names tell them apart then.
    """
    every = [s.settings for s in saes]
    keys = list(dict.fromkeys(key for settings in every for key in settings))
    varied = [k for k in keys if len({json.dumps(s.get(k)) for s in every}) > 1]
    groups: dict[str, list[StudiedSAE]] = {}
    for sae in saes:
        name = ", ".join(f"{k} {sae.settings[k]}" for k in varied if k in sae.settings)
        groups.setdefault(name or "all", []).append(sae)
    seeds = [[s.seed for s in same] for same in groups.values()]
    if any(len(set(mine)) < len(mine) for mine in seeds):
        groups = {}
        for sae in saes:
            groups.setdefault(_SEED.sub("", sae.name).strip("-") or "all", []).append(sae)
    return groups


def check_made_from(saes: Iterable[StudiedSAE], backbone: str) -> None:
    """Refuse autoencoders of another network, where their metadata name one.

    Raises:
        StaleStore: says which.
    """
    from salve_lm.sae import read_metadata

    for sae in saes:
        made_from = (read_metadata(sae.path).get("activations") or {}).get("backbone")
        if made_from not in (None, backbone):
            raise StaleStore(
                f"{sae.path} was trained on activations of other weights "
                f"({str(made_from)[:12]}) than the data's model has ({backbone[:12]}). Give the "
                "autoencoders of this model, or train them again."
            )


def feature_rows(sae: StudiedSAE, table: FeatureTable) -> list[dict[str, Any]]:
    """The first latent of each class and ranking, one row each."""
    rows = []
    for k, name in enumerate(table.class_names):
        for ranking in RANKINGS:
            latent = int(table.ranked(k, ranking)[0])
            rows.append(
                {
                    "sae": sae.name,
                    "class": name,
                    "ranking": ranking,
                    "latent": latent,
                    "score": float(table.scores(k, ranking)[latent]),
                    "sign": table.sign(k, latent),
                    "decoder_norm": float(table.decoder_norm[latent]),
                    "firing_rate": float(table.firing_rate[latent]),
                }
            )
    return rows


def live_latents(table: FeatureTable) -> Tensor:
    """Latents that fire and write something, int64."""
    return ((table.firing_rate > 0) & (table.decoder_norm > 0)).nonzero().squeeze(1)


def similarity(
    saes: Sequence[StudiedSAE],
    tables: Mapping[str, FeatureTable],
    context: EditContext,
    seed: int = 0,
) -> dict[str, Any]:
    """How alike the features of autoencoders of one setting are, over all pairs of them.

    Returns:
        `decoder`: mean max cosine of live decoder rows, and `decoder_random` that of as many random
        directions. For both rankings, cosines of |c| of the class's first latent: `same_class`
        (mean, and by class), `other_class` (with the first latents of the other classes),
        `random_latents`; `recognised`, the share of (pair, class) in which the class's latent of
        the one resembles the same class's of the other more than any other class's. Empty for a
        single autoencoder.
    """
    if len(saes) < 2:
        return {}
    decoders = {s.name: context.sae(s.path).decoder() for s in saes}
    live = {name: d[live_latents(tables[name])] for name, d in decoders.items()}
    signed = any(s.signed for s in saes)
    pairs = list(itertools.permutations([s.name for s in saes], 2))
    n, d = next(iter(live.values())).shape
    one, other = (random_directions(n, d, seed + i) for i in range(2))
    found: dict[str, Any] = {
        "decoder": fmean(mean_max_cosine(live[a], live[b], signed) for a, b in pairs),
        "decoder_random": mean_max_cosine(one, other, signed),
    }
    names = tables[saes[0].name].class_names
    once = list(itertools.combinations([s.name for s in saes], 2))
    draw = torch.Generator().manual_seed(seed)
    for ranking in RANKINGS:
        first = {s.name: _first(tables[s.name], ranking) for s in saes}
        # [pair, class of the one, class of the other]
        cosines = torch.tensor(
            [
                [[guide_cosine(decoders[a][i], decoders[b][j]) for j in first[b]] for i in first[a]]
                for a, b in once
            ]
        )
        same = cosines.diagonal(dim1=1, dim2=2)
        others = cosines[:, ~torch.eye(len(names), dtype=torch.bool)]
        chance = [
            guide_cosine(*(live[m][torch.randint(len(live[m]), (), generator=draw)] for m in pair))
            for pair in once
            for _ in names
        ]
        found[ranking] = {
            "same_class": float(same.mean()),
            "by_class": dict(zip(names, same.mean(0).tolist(), strict=True)),
            "other_class": float(others.mean()),
            "random_latents": fmean(chance),
            "recognised": float((same >= cosines.amax(2)).float().mean()),
        }
    return found


def _first(table: FeatureTable, ranking: Ranking) -> list[int]:
    return [int(table.ranked(k, ranking)[0]) for k in range(table.n_classes)]


def _read(path: Path) -> StudiedSAE:
    from salve_lm.report.material import read_json
    from salve_lm.sae import read_metadata

    config, about = read_json(path / "cfg.json"), read_metadata(path)
    # what it was trained as: batch-top-k is saved as jump-ReLU
    architecture = about.get("training_architecture", config.get("architecture"))
    details = about.get("training_architecture_details") or {}
    settings = {"architecture": architecture, "d_sae": config.get("d_sae")}
    settings |= {k: v for k, v in details.items() if isinstance(v, str | int | float)}
    metrics = {k: float(about[k]) for k in METRICS if isinstance(about.get(k), int | float)}
    seed = about.get("seed")
    return StudiedSAE(
        name=path.name,
        path=str(path),
        seed=seed if isinstance(seed, int) else None,
        settings=settings,
        metrics=metrics,
        signed=architecture == "linear_l1",
    )


def _order(settings: Mapping[str, Any]) -> list[tuple[bool, float, str]]:
    """Sorts numbers by value and beside them whatever is no number."""
    keys = [*_PLAIN, *sorted(k for k in settings if k not in _PLAIN)]
    numbers = [settings.get(k) for k in keys]
    return [
        (False, float(v), "") if isinstance(v, int | float) else (True, 0.0, str(v))
        for v in numbers
    ]
