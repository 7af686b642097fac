"""The subspace of the residual stream that a layer's task vector is projected on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salve_lm.errors import BadConfig, NameNotFound, StaleStore
from salve_lm.task_vectors.projection import orthonormal_basis, random_basis, seed_of

if TYPE_CHECKING:
    from salve_lm.edits.context import EditContext, SaeView


@dataclass(frozen=True, eq=False)
class Subspace:
    """A subspace and what it was made from.

    Attributes:
        basis: orthonormal, float64 [d, k].
        origin: plain data from which `subspace_from_dict` makes it again.
    """

    basis: Tensor
    origin: dict[str, Any]

    @property
    def rank(self) -> int:
        """Its dimension."""
        return self.basis.shape[1]


def latents_subspace(sae: SaeView, latents: Sequence[int]) -> Subspace:
    """The span of the decoder rows of `latents`.

    Raises:
        NameNotFound: a latent that the SAE does not have.
        BadConfig: no latents.
        UnsupportedEdit: a dead latent.
    """
    if not latents:
        raise BadConfig(
            f"No latents selected for {sae.path}. Name at least one, or drop the layer."
        )
    for latent in latents:
        if not 0 <= latent < sae.d_sae:
            cure = f"{sae.path} has {sae.d_sae} latents, counted from 0."
            raise NameNotFound("latent", str(latent), [], cure)
    chosen = sorted(set(latents))
    origin = {"sae": sae.path, "sha256": sae.sha256, "latents": chosen}
    return Subspace(orthonormal_basis(sae.decoder(torch.tensor(chosen))), origin)


def random_latents_subspace(sae: SaeView, n: int, seed: int) -> Subspace:
    """The span of `n` live decoder rows drawn at random; a row is live if it is not zero.

    Raises:
        BadConfig: fewer live rows than that.
    """
    live = sae.decoder().norm(dim=1).nonzero()[:, 0]
    if n > len(live):
        raise BadConfig(f"{sae.path} has {len(live)} live latents; {n} cannot be drawn.")
    generator = torch.Generator().manual_seed(seed)
    drawn = live[torch.randperm(len(live), generator=generator)[:n]]
    return latents_subspace(sae, drawn.tolist())


def random_subspace(d: int, k: int, seed: int, layer: int) -> Subspace:
    """A uniformly random subspace of dimension k; another one for every layer."""
    basis = random_basis(d, k, seed_of("subspace", seed, layer))
    return Subspace(basis, {"d": d, "rank": k, "seed": seed, "layer": layer})


def subspace_from_dict(data: Mapping[str, Any], context: EditContext) -> Subspace:
    """Make the subspace again from its `origin`.

    Raises:
        StaleStore: the SAE is not the one it was made from.
        SalveError: the SAE cannot be read.
    """
    if "sae" not in data:
        return random_subspace(data["d"], data["rank"], data["seed"], data["layer"])
    sae = context.sae(data["sae"])
    if sae.sha256 != data["sha256"]:
        raise StaleStore(
            f"The SAE {sae.path} is not the one this edit was made with. Give that one, or make "
            "the edit again."
        )
    return latents_subspace(sae, data["latents"])
