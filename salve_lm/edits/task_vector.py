"""The raw task vector injected into chosen layers, and its controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from salve_lm.edits.add_task_vector import AddTaskVector
from salve_lm.edits.scope import Scope
from salve_lm.edits.spec import EditSpec, Resolved
from salve_lm.edits.stream_sae import stream_sae
from salve_lm.errors import BadConfig
from salve_lm.language.names import d_model, layer_of, n_layers
from salve_lm.language.residual import residual_role, stores_inputs_first
from salve_lm.task_vectors.patterns import ALL, read_latents, read_layers, select_tensors
from salve_lm.task_vectors.projection import seed_of
from salve_lm.task_vectors.subspaces import (
    Subspace,
    latents_subspace,
    random_latents_subspace,
    random_subspace,
)
from salve_lm.task_vectors.variants import Projected, RandomDirection, Raw, Variant
from salve_lm.task_vectors.weights import GivenWeights, Weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from salve_lm.edits.context import EditContext
    from salve_lm.edits.lookup import ModelIndex

VariantName = Literal[
    "raw", "projected", "projected_rescaled", "random_subspace", "random_subspace_rescaled",
    "random_latents", "random_latents_rescaled", "random_direction",
]  # fmt: skip
NEED_SAE = ("projected", "random_latents")


@dataclass(frozen=True, kw_only=True)
class TaskVectorInjection(EditSpec):
    """theta' = theta + alpha * tau on chosen layers, tau = theta_finetuned - theta_base.

    `alpha` is the paper's lambda; it may be negative. Computed in float32, cast back to the dtype
    of the weights at the end. tau is read from disk by rows as it is added: nothing of the
    fine-tuned model's size is ever held.

    Beside tau itself (`raw`) there are the controls of METHODS 6. `projected` keeps what lies in
    the span of selected decoder rows of a layer's SAE, as the residual stream sees it: gains of
    norms between a tensor and the stream are folded in. `random_subspace` takes a uniformly random
    subspace of the same rank in its place, `random_latents` as many random live decoder rows.
    With `_rescaled` behind it, every tensor's change gets the norm tau has, again as the stream
    sees it. `random_direction` is noise with the stored norm of each tensor's tau.

    Args:
        finetuned: Hugging Face folder of the fine-tuned model, folder of a LoRA adapter (peft), or
            Lightning checkpoint of a `LanguageModel`.
        base: Hugging Face folder of the model the fine-tuning began from. When absent, the
            unedited weights of the model under edit.
        layers: Decoder layers by number, `all`, or the path of a JSON file with a list `layers`.
            May be left out where `tensors` holds full names only.
        tensors: Names inside a layer, `*` for any text (`self_attn.*`, `mlp.down_proj.weight`);
            all of a layer (attention, MLP and norms) when absent. Embeddings, output head and
            final norm are reached by full names only (`model.embed_tokens.weight`).
        variant: What of tau is added. The options from `sae` to `unprojected` are for projections
            only; beside `raw` they serve the controls that `salve-lm inject` runs.
        sae: SAE folders by layer, such as `runs/x/saes/layer_{layer}`.
        latents: Selected latents of each layer's SAE: layer -> list, the path of a JSON file with
            that, or a list where there is one layer. When absent, `latents` of the file that
            `layers` names.
        rank: Rank of the random subspace, where it is not that of selected latents.
        unprojected: What becomes of tensors that no projection on the stream applies to (gains of
            norms, norms inside heads, biases of reading layers): `drop` leaves them unedited,
            `raw` adds their tau.
        seed: Of everything random.
        other_base: Accept an adapter that names another base than the model under edit.
    """

    module: str = field(default="", init=False)
    target_class: str | int | None = field(default=None, init=False)

    finetuned: str
    base: str | None = None
    layers: list[int] | str | None = None
    tensors: list[str] | None = None
    variant: VariantName = "raw"
    sae: str | None = None
    latents: dict[int, list[int]] | list[int] | str | None = None
    rank: int | None = None
    unprojected: Literal["drop", "raw"] = "drop"
    seed: int = 0
    other_base: bool = False

    default_alphas: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0, 1.5)
    signed_alpha: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = self.variant.removesuffix("_rescaled")
        if kind in NEED_SAE and self.sae is None:
            raise BadConfig(f"`variant: {self.variant}` needs `sae`, such as saes/layer_{{layer}}.")
        if kind == "random_subspace" and (self.rank is None) == (self.sae is None):
            raise BadConfig(
                f"`variant: {self.variant}` needs either a `rank`, or `sae` and `latents` to take "
                "the rank from."
            )
        if self.rank is not None and self.rank < 1:
            raise BadConfig(f"`rank` is {self.rank}; it must be at least 1.")

    def resolve(self, scope: Scope) -> Resolved:
        """See `EditSpec.resolve`: the part of the edit that falls on one layer."""
        from salve_lm.edits.lookup import ModelIndex

        whole = self.resolve_model(scope.model, ModelIndex(scope.model), scope.context)
        return Resolved(tuple(op for op in whole.ops if op.module == scope.name))

    def resolve_model(self, model: nn.Module, index: ModelIndex, context: EditContext) -> Resolved:
        """See `EditSpec.resolve_model`.

        Raises:
            BadConfig: not a transformers model; options that contradict each other.
            NameNotFound: a layer or a pattern that matches nothing.
            ShapeMismatch: the fine-tuned model (or adapter) belongs to another one.
            StaleStore: the layers were chosen for another model.
            SalveError: see `open_source`.
        """
        config = getattr(model, "config", None)
        if config is None or not hasattr(config, "get_text_config"):
            raise BadConfig(
                "A task vector is injected into a language model of transformers; this is a "
                f"{type(model).__name__} without a configuration. Use salve_lm's LanguageModel."
            )
        if isinstance(self.layers, str) and self.layers != ALL:
            context.check_selection(self.layers, model)
        owned = {
            n: o.tensor for n, o in index.tensors.items() if isinstance(o.tensor, nn.Parameter)
        }
        first = {id(tensor): n for n, tensor in reversed(owned.items())}
        aliases = {n: first[id(tensor)] for n, tensor in owned.items()}
        weights = GivenWeights(owned, config)
        return self.resolve_weights(weights, config, list(owned), aliases, context)

    def resolve_weights(
        self,
        weights: Weights,
        config: PreTrainedConfig,
        names: Sequence[str],
        aliases: Mapping[str, str],
        context: EditContext,
    ) -> Resolved:
        """The ops on weights in memory or on disk.

        Args:
            weights: the unedited ones.
            config: of the model.
            names: of its parameters.
            aliases: name -> the name under which the same (tied) tensor is edited.
            context: keeps SAEs and task vectors open.

        Raises:
            SalveError: see `resolve_model`.
        """
        layers = read_layers(self.layers, n_layers(config))
        source = context.task_vector(
            self.finetuned, self.base, config=config, other_base=self.other_base
        )
        chosen = select_tensors(names, config, layers, self.tensors)
        source.check(weights)
        known = set(source.names)  # an adapter leaves most tensors alone
        changed = [n for n in dict.fromkeys(aliases[n] for n in chosen) if n in known]
        if not changed:
            some = ", ".join(sorted(known)[:4])
            raise BadConfig(
                f"{self.finetuned} changes none of the {len(chosen)} tensors chosen; it changes "
                f"{some}, ... Choose among those by `layers` and `tensors`."
            )
        variants = self._variants(changed, config, context)
        if not variants:
            raise BadConfig(
                "None of the tensors chosen reads or writes the residual stream, so there is "
                "nothing to project. Choose matrices of attention or MLP, or `unprojected: raw`."
            )
        ops = []
        for name, variant in variants.items():
            module, _, key = name.rpartition(".")
            inputs_first = stores_inputs_first(name, len(weights.shape(name)), config)
            ops.append(
                AddTaskVector(
                    module=module,
                    output_dim=int(inputs_first),
                    alpha=self.alpha,
                    key=key,
                    source=source,
                    variant=variant,
                )
            )
        subspaces = [v.subspace for v in variants.values() if isinstance(v, Projected)]
        latents = {i for s in subspaces for i in s.origin.get("latents", ())}
        return Resolved(tuple(ops), tuple(sorted(latents)))

    def _variants(
        self, names: Sequence[str], config: PreTrainedConfig, context: EditContext
    ) -> dict[str, Variant]:
        """What is done to each tensor; those left out stay unedited."""
        kind = self.variant.removesuffix("_rescaled")
        if kind == "raw":
            return dict.fromkeys(names, Raw())
        if kind == "random_direction":
            return dict.fromkeys(names, RandomDirection(self.seed))
        numbers = {name: layer_of(name, config) for name in names}
        outside = next((n for n, layer in numbers.items() if layer is None), None)
        if outside is not None:
            raise BadConfig(
                f"{outside!r} belongs to no layer, so there is no SAE to project it with. Use "
                "`variant: raw` for it, as an edit of its own."
            )
        layers = sorted({i for i in numbers.values() if i is not None})
        by_layer = self._latents(layers)
        subspaces = {i: self._subspace(i, by_layer, config, context) for i in layers}
        found: dict[str, Variant] = {}
        for name, layer in numbers.items():
            role = residual_role(name, config)
            if role is not None and layer is not None:
                rescale = self.variant.endswith("_rescaled")
                found[name] = Projected(role, subspaces[layer], rescale)
            elif self.unprojected == "raw":
                found[name] = Raw()
        return found

    def _subspace(
        self,
        layer: int,
        latents: Mapping[int, list[int]],
        config: PreTrainedConfig,
        context: EditContext,
    ) -> Subspace:
        width = d_model(config)
        kind = self.variant.removesuffix("_rescaled")
        if self.sae is None:
            return random_subspace(width, self.rank or 0, self.seed, layer)
        sae = stream_sae(self.sae, layer, config, context)
        selected = latents_subspace(sae, latents[layer])
        if kind == "random_subspace":
            return random_subspace(width, selected.rank, self.seed, layer)
        if kind == "random_latents":
            n = len(selected.origin["latents"])
            return random_latents_subspace(sae, n, seed_of("latents", self.seed, layer))
        return selected

    def _latents(self, layers: Sequence[int]) -> dict[int, list[int]]:
        """The selected latents of each of `layers`; empty where none are needed."""
        if self.sae is None:
            return {}
        if len(layers) > 1 and "{layer}" not in self.sae:
            raise BadConfig(
                f"One SAE, {self.sae}, for layers {list(layers)}: write {{layer}} where its folder "
                "has the layer's number."
            )
        return read_latents(self.latents, self.layers, layers)

    def sources(self, context: EditContext) -> dict[str, Any]:
        """See `EditSpec.sources`; hashes stand with each op."""
        found: dict[str, Any] = {"finetuned": {"path": self.finetuned}}
        if self.base is not None:
            found["base"] = {"path": self.base}
        return found

    @property
    def title(self) -> str:
        """`name`, or a short description."""
        if self.name is not None:
            return self.name
        where = "" if self.layers is None else f"layers {self.layers}, "
        return f"TaskVectorInjection({self.variant}, {where}alpha={self.alpha:g})"
