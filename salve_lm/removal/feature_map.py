"""T, the change of a head's inputs that an edit of its weights amounts to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from salve_lm.edits.ops import FoldInput, Op, ScaleChannels
from salve_lm.errors import UnsupportedEdit

# T on rows [n, d_in]
FeatureMap = Callable[[Tensor], Tensor]


def feature_map(ops: Sequence[Op], head: str, n_classes: int) -> FeatureMap | None:
    """The part of an edit that every row of the head sees alike, as a map of its inputs.

    A fold is its own `transform`; scaling the input channels of all rows by f gates them,
    T(x) = f * x. Everything else (single rows, rank-one updates, biases) leaves the inputs as they
    are and changes what is made of them. With W' = W o T for each op in turn, ops that come later
    act on x first.

    Args:
        ops: of one edit, or of several in order.
        head: full name of the head.
        n_classes: its rows; a list that names all of them is all rows.

    Returns:
        T, or None where it is the identity.

    Raises:
        UnsupportedEdit: an op on another layer. Its effect on the head's inputs shows only when
            the edited network runs: collect those inputs and use `measure_features` and `judge`.
    """
    maps: list[FeatureMap] = []
    for op in ops:
        if op.module != head:
            raise UnsupportedEdit(
                f"The edit changes {op.module!r}, which comes before the head {head!r}. Collect "
                "the head's inputs in the edited network and use measure_features and judge."
            )
        if isinstance(op, FoldInput):
            maps.append(op.transform)
        elif isinstance(op, ScaleChannels) and _gates_inputs(op, n_classes):
            maps.append(_gate(op.factors))
    if not maps:
        return None

    def apply_maps(x: Tensor) -> Tensor:
        for one in reversed(maps):
            x = one(x)
        return x

    return apply_maps


def _gates_inputs(op: ScaleChannels, n_classes: int) -> bool:
    whole = op.rows is None or set(op.rows) == set(range(n_classes))
    return whole and op.axis == "input"


def _gate(factors: Tensor) -> FeatureMap:
    return lambda x: x * factors.to(x.device, x.dtype)
