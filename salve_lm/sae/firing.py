"""When each latent last fired, counted alike on all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from salve_lm.sae import ranks


class FiringRecord(nn.Module):
    """Samples seen since each latent last fired.

    The counter is a buffer, so checkpoints hold it. It is the same on every rank after every
    update; DDP's `broadcast_buffers` would otherwise overwrite each rank's counts with rank 0's.
    """

    since_fired: Tensor

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.register_buffer("since_fired", torch.zeros(d_sae, dtype=torch.int64))

    @torch.no_grad()
    def update(self, fired: Tensor, flags: Tensor, n_global: int) -> Tensor:
        """Count one global batch, in a single collective and without waiting for the device.

        Args:
            fired: latents that fired on this rank [d_sae], bool.
            flags: anything else that ranks must agree on [m], bool.
            n_global: rows of the global batch.

        Returns:
            `flags`, each true where it was on any rank.
        """
        if ranks.world_size() > 1:
            both = ranks.all_reduce(torch.cat([fired, flags]).to(torch.uint8), "max").bool()
            fired, flags = both[: fired.numel()], both[fired.numel() :]
        self.since_fired += n_global
        self.since_fired.masked_fill_(fired, 0)
        return flags

    def dead(self, after: int) -> Tensor:
        """Latents that have not fired for `after` samples [d_sae], bool."""
        return self.since_fired >= after

    def reset(self, latents: Tensor) -> None:
        """Count `latents` (indices) anew."""
        self.since_fired[latents] = 0
