"""Places in a network where activations are read, and their textual form.

`MODULE[:input|output][:mean|cls|positions]`, for example `fc:input`, `layer4.1:output:mean` or
`encoder.ln:output:cls`; or the name of a ready site of the studied model, such as `pooled`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from salve_lm.errors import BadConfig, NameNotFound
from salve_lm.modules.studied import StudiedModel

Side = Literal["input", "output"]
Reduction = Literal["mean", "cls", "positions"]
SIDES: tuple[Side, ...] = ("input", "output")
REDUCTIONS: tuple[Reduction, ...] = ("mean", "cls", "positions")


@dataclass(frozen=True)
class Site:
    """One place in a network.

    A module that runs several times in one forward pass (a shared ReLU) is read at its first run.

    Attributes:
        module: name of the module, as `model.named_modules()` has it.
        io: whether its (first) input or its output is read.
        reduce: how positions are dealt with: averaged, only token 0 kept, or each one a row of its
            own. None where the activation has none (2-D, or 4-D with 1x1 positions).
    """

    module: str
    io: Side = "output"
    reduce: Reduction | None = None

    def __str__(self) -> str:
        """The canonical text of the site: `parse_site(str(site), model) == site`."""
        return ":".join([self.module, self.io, *([self.reduce] if self.reduce else [])])


def parse_site(text: str, studied: StudiedModel) -> Site:
    """Read a site, or the name of a ready one, and check that its module exists.

    Args:
        text: `MODULE[:input|output][:mean|cls|positions]` or a key of `studied.sites`. The module
            `head` stands for `studied.head_name`.
        studied: the model whose modules and ready sites are meant.

    Raises:
        NameNotFound: no such module, ready site or option; names the nearest.
        BadConfig: an option is given twice or out of order.
    """
    text = text.strip()
    module, *options = studied.sites.get(text, text).split(":")
    known = [name for name, _ in studied.model.named_modules() if name]
    if module == "head" and studied.head_name is not None:
        module = studied.head_name
    if module not in known:
        ready = [] if options else list(studied.sites)
        # ready names first: they are few, and the error lists only the first names it knows
        raise NameNotFound("module or ready site", module, [*ready, *known])
    for option in options:
        if option not in (*SIDES, *REDUCTIONS):
            raise NameNotFound(f"option of site {text!r}", option, [*SIDES, *REDUCTIONS])
    side = [s for s in SIDES if s in options]
    reduction = [r for r in REDUCTIONS if r in options]
    if len(side) > 1 or len(reduction) > 1 or options != [*side, *reduction]:
        raise BadConfig(
            f"Site {text!r} is not of the form MODULE[:input|output][:mean|cls|positions]."
        )
    return Site(
        module,
        side[0] if side else "output",
        reduction[0] if reduction else None,
    )


def reduce_positions(activation: Tensor, site: Site) -> Tensor:
    """Turn what a module gave into rows.

    Args:
        activation: [n, d], [n, d, height, width] or [n, tokens, d].
        site: names the reduction.

    Returns:
        [n, d], or [n * positions, d] (sample by sample) for `positions`.

    Raises:
        BadConfig: positions and no reduction, or a reduction that these axes do not have.
    """
    if activation.ndim == 2 and site.reduce != "cls":
        return activation
    if activation.ndim == 4 and site.reduce != "cls":
        if activation.shape[2:] == (1, 1):
            return activation.flatten(1)
        if site.reduce == "mean":
            return activation.mean(dim=(2, 3))
        if site.reduce == "positions":
            return activation.permute(0, 2, 3, 1).flatten(0, 2)
    if activation.ndim == 3:
        if site.reduce == "cls":
            return activation[:, 0]
        if site.reduce == "mean":
            return activation.mean(dim=1)
        if site.reduce == "positions":
            return activation.flatten(0, 1)
    shape = list(activation.shape)
    if activation.ndim == 3 or (activation.ndim == 4 and site.reduce is None):
        choices = ":mean or :positions" if activation.ndim == 4 else ":cls, :mean or :positions"
        raise BadConfig(
            f"Site {str(site)!r} gives activations of shape {shape}, with more than one position a "
            f"sample. Append {choices} to say what a row is."
        )
    raise BadConfig(
        f"Site {str(site)!r} gives activations of shape {shape}, of which "
        f"{f':{site.reduce}' if site.reduce else 'no row'} can be taken. "
        "Read [n, d], [n, channels, height, width] or (also with :cls) [n, tokens, d]."
    )
