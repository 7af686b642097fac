"""What edits of a language model's residual stream have in common: where, and which latents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from salve_lm.edits.ops import Op
from salve_lm.edits.scope import Scope
from salve_lm.edits.spec import EditSpec, Resolved
from salve_lm.edits.stream_norm import config_of
from salve_lm.edits.stream_sae import LAYER, stream_sae
from salve_lm.errors import BadConfig
from salve_lm.language.names import layer_of, n_layers
from salve_lm.language.residual import (
    ResidualRole,
    head_role,
    residual_role,
    stores_inputs_first,
)
from salve_lm.task_vectors.patterns import ALL, read_latents, read_layers, select_tensors

if TYPE_CHECKING:
    from collections.abc import Collection

    from transformers import PreTrainedConfig

    from salve_lm.edits.context import EditContext, SaeView
    from salve_lm.edits.lookup import ModelIndex

HEAD = "lm_head"


class Place(NamedTuple):
    """One matrix that touches the residual stream.

    Attributes:
        module: full name of its layer.
        output_dim: dimension of its weight that runs over outputs.
        role: how it touches the stream.
        has_bias: whether it has a bias.
        norm: full name of the norm between it and the stream; None where there is none.
        norm_has_bias: whether that norm has a bias.
        sae: the autoencoder whose latents count here.
        latents: those latents, in order.
    """

    module: str
    output_dim: int
    role: ResidualRole
    has_bias: bool
    norm: str | None
    norm_has_bias: bool
    sae: SaeView
    latents: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ResidualEdit(EditSpec):
    """An edit of matrices that read or write the residual stream, by latents of SAEs on it."""

    module: str = field(default="", init=False)
    target_class: str | int | None = field(default=None, init=False)

    latents: dict[int, list[int]] | list[int] | str | None = None
    layers: list[int] | str | None = None
    tensors: list[str] | None = None
    reads: bool = False
    writes: bool = True
    final: bool = False
    top: int | None = None
    sae: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top is not None and self.top < 1:
            raise BadConfig(f"`top` is {self.top}; it must be at least 1.")
        if self.layers is None and not self.final:
            raise BadConfig("Where? Set `layers` to numbers or `all`, or `final: true`.")
        if self.layers is not None and not (self.reads or self.writes):
            raise BadConfig(
                "`layers` without `reads` and `writes`: set one to true, or leave `layers` out."
            )
        if self.layers is None and self.tensors is not None:
            raise BadConfig("`tensors` are those inside of `layers`: set these too.")

    @abstractmethod
    def ops_at(self, place: Place) -> tuple[Op, ...]:
        """What the edit does to one matrix of a layer."""

    @abstractmethod
    def final_ops(self, place: Place) -> tuple[Op, ...]:
        """What it does before the unembedding, which `place` is."""

    def resolve(self, scope: Scope) -> Resolved:
        """See `EditSpec.resolve`: the part of the edit that falls on one layer."""
        from salve_lm.edits.lookup import ModelIndex

        whole = self.resolve_model(scope.model, ModelIndex(scope.model), scope.context)
        return Resolved(tuple(op for op in whole.ops if op.module == scope.name), whole.features)

    def resolve_model(self, model: nn.Module, index: ModelIndex, context: EditContext) -> Resolved:
        """See `EditSpec.resolve_model`. Reads no values of the model.

        Raises:
            BadConfig: not a transformers model; options that contradict each other; an SAE of
                another layer or model.
            NameNotFound: a layer, tensor or latent that there is not.
            ShapeMismatch: the SAE has another width than the residual stream.
            StaleStore: the layers were chosen for another model.
            UnsupportedEdit: a family whose layers are not known; a dead latent.
        """
        config = config_of(model)
        if config is None:
            raise BadConfig(
                f"{type(self).__name__} edits a language model of transformers; this is a "
                f"{type(model).__name__} without a configuration. Use salve_lm's LanguageModel."
            )
        for path in {p for p in (self.layers, self.latents) if isinstance(p, str) and p != ALL}:
            context.check_selection(path, model)
        names = {n for n, o in index.tensors.items() if isinstance(o.tensor, nn.Parameter)}
        layers = read_layers(self.layers, n_layers(config)) or ()
        roles = self._roles(list(index.tensors), names, config, layers)
        chosen = self._latents(layers, config, context)
        ops: list[Op] = []
        for name, role in roles.items():
            layer = layer_of(name, config)
            ndim = index.tensors[name].tensor.ndim
            inputs_first = stores_inputs_first(name, ndim, config)
            place = _place(name, int(inputs_first), role, names, *chosen[layer])
            ops += self.ops_at(place)
        if self.final:
            head = _place(f"{HEAD}.weight", 0, head_role(config), names, *chosen[None])
            ops += self.final_ops(head)
        latents = dict.fromkeys(i for _, some in chosen.values() for i in some)
        return Resolved(tuple(ops), tuple(latents))

    def _roles(
        self,
        order: Sequence[str],
        names: Collection[str],
        config: PreTrainedConfig,
        layers: tuple[int, ...],
    ) -> dict[str, ResidualRole]:
        """The matrices meant, and how each touches the stream."""
        if not layers:
            return {}
        inside = select_tensors([n for n in order if n in names], config, layers, self.tensors)
        found = {}
        for name in inside:
            role = residual_role(name, config)
            if role is None or not name.endswith(".weight"):
                continue
            if self.reads if role.reads else self.writes:
                found[name] = role
        if not found:
            how = " or ".join(w for w in ("reads", "writes") if getattr(self, w))
            raise BadConfig(
                f"None of the tensors that `tensors` names in layers {list(layers)} is a matrix "
                f"that {how} the residual stream. Name such, or leave `tensors` out."
            )
        return found

    def _latents(
        self, layers: tuple[int, ...], config: PreTrainedConfig, context: EditContext
    ) -> Mapping[int | None, tuple[SaeView, tuple[int, ...]]]:
        """SAE and latents of each layer; under None those of the final norm."""
        source = context.sae_path(self.sae)
        if LAYER in source:
            if not layers:
                raise BadConfig(
                    f"Which layer's SAE is meant at the end of the model? Set `layers`, or write "
                    f"its number in place of {LAYER} in {source}."
                )
            by_layer = read_latents(self.latents, self.layers, layers)
            found: dict[int | None, tuple[SaeView, tuple[int, ...]]] = {
                i: (stream_sae(source, i, config, context), self._first(by_layer[i]))
                for i in layers
            }
            # the last of them is the nearest to the end
            return {**found, None: found[layers[-1]]}
        if isinstance(self.latents, list):
            latents = self.latents
        elif len(layers) == 1:
            latents = read_latents(self.latents, self.layers, layers)[layers[0]]
        else:
            raise BadConfig(
                f"One SAE, {source}, for layers {list(layers)}: give `latents` as one list, or "
                f"write {LAYER} where the SAE's folder has the layer's number."
            )
        if not latents:
            raise BadConfig("`latents` is empty: name at least one.")
        one = stream_sae(source, None, config, context), self._first(latents)
        return dict.fromkeys((*layers, None), one)

    def _first(self, latents: Sequence[int]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(latents))[: self.top]

    def sources(self, context: EditContext) -> dict[str, Any]:
        """See `EditSpec.sources`."""
        return {"saes": context.saes_like(self.sae)}

    @property
    def title(self) -> str:
        """`name`, or a short description."""
        if self.name is not None:
            return self.name
        where = [] if self.layers is None else [f"layers {self.layers}"]
        return f"{type(self).__name__}({', '.join((*where, *self._parts()))}alpha={self.alpha:g})"

    def _parts(self) -> list[str]:
        """The options in the title that say on which side the edit is, each with its comma."""
        sides = [s for s in ("reads", "writes") if getattr(self, s) and self.layers is not None]
        return ["+".join([*sides, *(["final"] if self.final else [])]) + ", "]


def _place(
    name: str,
    output_dim: int,
    role: ResidualRole,
    names: Collection[str],
    sae: SaeView,
    latents: tuple[int, ...],
) -> Place:
    module = name.removesuffix(".weight")
    norm = None if role.norm is None else role.norm.removesuffix(".weight")
    return Place(
        module, output_dim, role, f"{module}.bias" in names, norm, f"{norm}.bias" in names,
        sae, latents,
    )  # fmt: skip
