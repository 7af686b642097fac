"""Tables of `select_layers`: the ranking of the layers, and their latents with texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from salve_lm.data.tokens import PackedTokens
from salve_lm.specificity.features import TaskLatent
from salve_lm.specificity.latents import LayerSums
from salve_lm.specificity.selection import LayerRanking
from salve_lm.specificity.windows import TopPlaces, text_window

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase


def ranking_table(
    rankings: Sequence[LayerRanking], chosen: Sequence[int], layers: Sequence[LayerSums]
) -> pd.DataFrame:
    """One row a (score, layer), the highest first.

    Args:
        rankings: every score; the first one chose.
        chosen: the selection.
        layers: what was measured.
    """
    import pandas as pd

    tokens = {at.layer: (at.task.d_sae, float(at.task.tokens.sum())) for at in layers}
    rows = []
    for ranking in rankings:
        where = {n: i for i, n in enumerate(ranking.layers)}
        for rank, n in enumerate(ranking.ranked(), start=1):
            score, contrast = ranking.scores[where[n]], ranking.contrasts[where[n]]
            rows.append(
                {
                    "score": ranking.name,
                    "rank": rank,
                    "layer": n,
                    "estimate": score.estimate,
                    "low": score.low,
                    "high": score.high,
                    "bootstrap_bias": score.bias,
                    "contrast": contrast.estimate,
                    "contrast_low": contrast.low,
                    "contrast_high": contrast.high,
                    "selected": n in chosen,
                    "d_sae": tokens[n][0],
                    "task_tokens": int(tokens[n][1]),
                }
            )
    return pd.DataFrame(rows)


def feature_table(
    latents: Mapping[int, Sequence[TaskLatent]],
    places: Mapping[int, TopPlaces],
    packed: PackedTokens,
    tokenizer: PreTrainedTokenizerBase,
    windows: int,
) -> pd.DataFrame:
    """One row a (layer, latent, window): the latent, and a text that fires it, the token marked.

    Args:
        latents: layer -> its latents, in order.
        places: layer -> where they are strongest.
        packed: the task corpus.
        tokenizer: decodes it.
        windows: rows a latent.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for layer, found in sorted(latents.items()):
        for rank, latent in enumerate(found):
            for window, (activation, place, document) in enumerate(
                places[layer].of(latent.latent)[:windows]
            ):
                ids, at = _tokens_around(packed, place, document, tokenizer.bos_token_id)
                text = text_window(ids, at, tokenizer)
                rows.append(
                    {
                        "layer": layer,
                        "rank": rank,
                        **latent._asdict(),
                        "window": window,
                        "activation": activation,
                        "document": document,
                        "token": text.token,
                        "text": text.text,
                    }
                )
    return pd.DataFrame(rows)


def _tokens_around(
    packed: PackedTokens, place: int, document: int, bos: int | None
) -> tuple[list[int], int]:
    """The document's tokens in the row of `place`, without BOS, and the place among them."""
    row, column = divmod(place, packed.context)
    batch = packed.batch(torch.tensor([row]))
    mine = batch.document[0] == document
    if bos is not None:
        mine &= batch.input_ids[0] != bos
    return batch.input_ids[0][mine].tolist(), int(mine[:column].sum())


def show(ranking: LayerRanking, chosen: Sequence[int], out: str) -> None:
    """Print the layers in order of the score that chose."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"Layers by {ranking.name}  ({out})", title_justify="left")
    for column in ("layer", "score", "interval", "minus mean", "chosen"):
        shown.add_column(column, justify="right")
    where = {n: i for i, n in enumerate(ranking.layers)}
    for n in ranking.ranked():
        score, contrast = ranking.scores[where[n]], ranking.contrasts[where[n]]
        shown.add_row(
            str(n),
            f"{score.estimate:.3f}",
            f"{score.low:.3f} .. {score.high:.3f}",
            f"{contrast.low:+.3f} .. {contrast.high:+.3f}",
            "yes" if n in chosen else "",
        )
    Console().print(shown)
