"""Loss recovered by autoencoders of a data module's sites, on its own held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from salve_lm.activations.sites import parse_site
from salve_lm.activations.tokens_data import TokenActivationData
from salve_lm.errors import BadConfig

if TYPE_CHECKING:
    from sae_lens import SAE

    from salve_lm.data.tokens import TokenBatch


def loss_recovered(
    data: object,
    saes: Mapping[str, tuple[str, SAE[Any]]],
    split: str,
    n_windows: int,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Splice each autoencoder into the language model, alone, and measure what the loss becomes.

    Args:
        data: a `TokenActivationData` with a model and text of `split`.
        saes: name -> (site, autoencoder for inference, on `device`).
        split: of the text.
        n_windows: windows from its beginning, summed over all ranks.
        device: where to run.

    Returns:
        name -> `loss_clean`, `loss_spliced`, `loss_zero` (nats per token) and `loss_recovered`;
        see `salve_lm.sae.spliced`.

    Raises:
        BadConfig: no language model, or no text of `split`.
        ShapeMismatch: an autoencoder of another width.
    """
    from salve_lm.sae import ranks
    from salve_lm.sae.spliced import Splice, spliced_losses

    if not isinstance(data, TokenActivationData) or data.model is None:
        raise BadConfig(
            "The loss recovered needs a TokenActivationData with a `model` and held-out text "
            f"(`{split}`). Give them, or set loss_recovered_windows to 0."
        )
    windows = data.windows(split)
    rank, world = ranks.rank(), ranks.world_size()
    rows = torch.arange(rank, min(n_windows, len(windows)), world)
    batches: list[torch.Tensor] = list(rows.split(data.sequences)) if len(rows) else []
    places = {name: parse_site(site, data.model) for name, (site, _) in saes.items()}
    splices = {
        name: Splice(places[name].module, places[name].io, sae) for name, (_, sae) in saes.items()
    }
    text: list[TokenBatch] = [windows.batch(part) for part in batches]
    with data.model_at_rest():
        data.model.model.to(device)
        losses = spliced_losses(data.model.model, splices, text, device)
    return {
        name: {
            "loss_clean": found.clean,
            "loss_spliced": found.spliced,
            "loss_zero": found.zero,
            "loss_recovered": found.recovered,
        }
        for name, found in losses.items()
    }
