"""What a store was made from, so that a stale one cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, cast

from torch import Tensor

from salve_lm.activations.sites import Site
from salve_lm.data.labelled import LabelledData, Split
from salve_lm.errors import StaleStore
from salve_lm.hashing import hash_tensors
from salve_lm.modules.studied import StudiedModel


class StoreKey(TypedDict):
    """Identity of a store.

    `backbone`: SHA-256 of the network's state dict. `site`: canonical text of the site. `data`:
    split -> fingerprint of its samples and transform. `dtype`: in which x is stored.
    """

    backbone: str
    site: str
    data: dict[str, str]
    dtype: str


def hash_backbone(studied: StudiedModel) -> str:
    """SHA-256 of the state dict of the network itself."""
    state = studied.model.state_dict()
    return hash_tensors({k: v for k, v in state.items() if isinstance(v, Tensor)})


def make_key(
    studied: StudiedModel, data: LabelledData, site: Site, splits: Sequence[str], dtype: str
) -> StoreKey:
    """The key of a store made from these. `data` must be set up."""
    return {
        "backbone": hash_backbone(studied),
        "site": str(site),
        "data": {split: data.fingerprint(cast(Split, split)) for split in splits},
        "dtype": dtype,
    }


def check_fresh(
    path: object,
    found: StoreKey,
    backbone: str | None = None,
    site: str | None = None,
    data: dict[str, str] | None = None,
    dtype: str | None = None,
) -> None:
    """Compare a store's key with what is wanted now; what is None is not compared.

    Raises:
        StaleStore: says which parts differ, how, and the cure.
    """
    differing = []
    if backbone is not None and found["backbone"] != backbone:
        differing.append(
            f"backbone (made from weights {found['backbone'][:12]}, now {backbone[:12]})"
        )
    if site is not None and found["site"] != site:
        differing.append(f"site (made at {found['site']!r}, now {site!r})")
    for split, fingerprint in (data or {}).items():
        if split not in found["data"]:
            differing.append(f"data (has no split {split!r})")
        elif found["data"][split] != fingerprint:
            differing.append(f"data (other samples or another transform in split {split!r})")
    if dtype is not None and found["dtype"] != dtype:
        differing.append(f"dtype (stored as {found['dtype']}, now {dtype})")
    if differing:
        raise StaleStore(
            f"The activation store {path} is stale. It differs in: {'; '.join(differing)}. "
            "Remove it, or name another folder as `store`, and it is harvested anew; or restore "
            "what it was made from."
        )
