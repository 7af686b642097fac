"""The SAE of a layer of the residual stream, as edits of language models name it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salve_lm.language.names import d_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from salve_lm.edits.context import EditContext, SaeView

LAYER = "{layer}"


def stream_sae(
    source: str, layer: int | None, config: PreTrainedConfig, context: EditContext
) -> SaeView:
    """The SAE of `layer` (of whichever layer where None), checked to fit the stream.

    Raises:
        ShapeMismatch: it has another width.
        BadConfig: it was trained on another layer, another place in it, or another public model.
        SalveError: it cannot be read.
    """
    from salve_lm.sae.pretrained import check_belongs

    sae = context.sae(source if layer is None else source.replace(LAYER, str(layer)))
    check_belongs(
        sae, sae.path, d_in=d_model(config), layer=layer, model_name=config.name_or_path or None
    )
    return sae
