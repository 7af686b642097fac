"""`TaskVectorInjection` under the editing contract: purity, variants, export, folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse import _common as jsonargparse_settings
from torch import Tensor, nn
from transformers.utils import logging

import salve_lm.edits.plan as plan_module
import salve_lm.task_vectors.blocks as blocks
from salve_lm.edits import (
    DirectionalAblation,
    EditContext,
    EditSpec,
    PlainModel,
    TaskVectorInjection,
    apply_named,
    plan_edit,
    plan_edits,
)
from salve_lm.edits.export import export, rebuild
from salve_lm.edits.spec import spec_to_dict
from salve_lm.errors import (
    BadConfig,
    EditConflict,
    NameNotFound,
    NoEffect,
    NotFinite,
    SalveError,
    ShapeMismatch,
    StaleStore,
)
from salve_lm.language import decoder_prefix, load_causal_lm, new_causal_lm
from salve_lm.language.residual import residual_role
from salve_lm.task_vectors.energy import account
from salve_lm.task_vectors.folder_plan import named_deltas, plan_folder
from salve_lm.task_vectors.projection import folded, orthonormal_basis, project
from salve_lm.task_vectors.weights import FolderWeights, GivenWeights
from salve_lm.task_vectors.writer import write_edited
from tests.edits.tiny import D_SAE, write_sae
from tests.language.tiny_models import CONFIGS, save_model
from tests.task_vectors.pair import FAMILIES, Pair, build_pair

LATENTS = {0: [1], 1: [2, 5, 7], 2: [0, 3]}


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    logging.disable_progress_bar()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return build_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return build_pair(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("saes")
    for layer in range(3):
        write_sae(folder / f"layer_{layer}", seed=layer, d_in=16)
    return str(folder / "layer_{layer}")


def injected(pair: Pair, spec: TaskVectorInjection, context: EditContext | None = None) -> Any:
    plan = plan_edit(spec, PlainModel(pair.model), context)
    return apply_named(pair.theta, [plan.named])


def inside(pair: Pair, layer: int) -> set[str]:
    prefix = f"{decoder_prefix(pair.model.config)}.{layer}."
    return {n for n in pair.theta if n.startswith(prefix)}


@pytest.mark.parametrize("own_base", [True, False])
@pytest.mark.parametrize("alpha", [1.0, -0.5])
def test_raw_is_the_formula(pair: Pair, own_base: bool, alpha: float) -> None:
    base = pair.base if own_base else None
    spec = TaskVectorInjection(finetuned=pair.tuned, base=base, layers=[1], alpha=alpha)
    before = {n: t.clone() for n, t in pair.theta.items()}
    applied = injected(pair, spec)
    assert set(applied.tensors) == inside(pair, 1)
    for name, tensor in applied.tensors.items():
        assert torch.equal(tensor, pair.theta[name] + alpha * pair.tau[name])
        change = applied.changes[name]
        assert change.requested == pytest.approx(
            float((tensor - pair.theta[name]).double().square().sum())
        )
        assert change.cosine == pytest.approx(1)
    assert all(torch.equal(t, before[n]) for n, t in pair.theta.items())


def test_patterns_and_full_names(llama: Pair) -> None:
    spec = TaskVectorInjection(
        finetuned=llama.tuned, layers=[0, 2], tensors=["*proj.weight", "model.norm.weight"]
    )
    found = set(injected(llama, spec).tensors)
    assert found == {
        "model.norm.weight",
        *(n for i in (0, 2) for n in inside(llama, i) if n.endswith("proj.weight")),
    }
    plan = plan_edit(spec, PlainModel(llama.model))
    assert set(plan.tensors) == found  # what is printed
    every = TaskVectorInjection(finetuned=llama.tuned, layers="all")
    assert len(plan_edit(every, PlainModel(llama.model)).tensors) == len(llama.theta) - 3


def test_bfloat16_is_cast_once(tmp_path: Path) -> None:
    save_model(tmp_path / "tuned", "gemma3_text", seed=4)
    model = new_causal_lm(CONFIGS["gemma3_text"], 0).to(torch.bfloat16)
    theta = dict(model.named_parameters())
    tuned = dict(load_causal_lm(tmp_path / "tuned").named_parameters())
    spec = TaskVectorInjection(finetuned=str(tmp_path / "tuned"), layers=[0], alpha=0.3)
    plan = plan_edit(spec, PlainModel(model))
    applied = apply_named(theta, [plan.named])
    for name, tensor in applied.tensors.items():
        tau = tuned[name].detach() - theta[name].detach().float()
        assert torch.equal(tensor, (theta[name].float() + tau * 0.3).bfloat16())
    some = applied.changes["model.layers.0.mlp.up_proj.weight"]
    assert 0.9 < some.applied_energy < 1.1
    assert 0.99 < some.cosine < 1


@pytest.mark.parametrize("rescaled", [False, True])
def test_projected_against_the_formula(pair: Pair, saes: str, rescaled: bool) -> None:
    spec = TaskVectorInjection(
        finetuned=pair.tuned, layers=[1, 2], alpha=0.7, sae=saes, latents=LATENTS,
        variant="projected_rescaled" if rescaled else "projected",
    )  # fmt: skip
    context = EditContext()
    applied = injected(pair, spec, context)
    config = pair.model.config
    roles = {n: residual_role(n, config) for i in (1, 2) for n in inside(pair, i)}
    assert set(applied.tensors) == {n for n, role in roles.items() if role is not None}
    for name, tensor in applied.tensors.items():
        role, layer = roles[name], 1 if name in inside(pair, 1) else 2
        assert role is not None
        decoder = context.sae(saes.format(layer=layer)).decoder()
        basis = orthonormal_basis(decoder[LATENTS[layer]])
        gain = torch.ones(16) if role.norm is None else role.gain(pair.theta[role.norm])
        tau = pair.tau[name]
        change = project(tau, basis, role.axis, gain, role.centred)
        seen = [folded(t, gain, role.axis, role.centred).norm() for t in (tau, change)]
        factor = seen[0] / seen[1] if rescaled else 1.0
        expected = pair.theta[name] + (0.7 * factor * change).float()
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    plan = plan_edit(spec, PlainModel(pair.model), context)
    assert plan.features == (0, 2, 3, 5, 7)
    with_norms = dataclasses.replace(spec, unprojected="raw")
    more = injected(pair, with_norms, context).tensors
    assert set(more) == inside(pair, 1) | inside(pair, 2)
    rest = set(more) - set(applied.tensors)
    assert all(torch.equal(more[n], pair.theta[n] + 0.7 * pair.tau[n]) for n in rest)
    assert all(torch.equal(more[n], t) for n, t in applied.tensors.items())


@pytest.mark.parametrize(
    "variant",
    ["random_subspace", "random_subspace_rescaled", "random_latents", "random_direction"],
)
def test_controls(pair: Pair, saes: str, variant: Any) -> None:
    def run(seed: int, **options: Any) -> Any:
        spec = TaskVectorInjection(
            finetuned=pair.tuned, layers=[1], variant=variant, seed=seed,
            **({"sae": saes, "latents": {1: [2, 5, 7]}} | options),
        )  # fmt: skip
        return injected(pair, spec)

    first, again, other = run(0), run(0), run(1)
    assert all(torch.equal(t, again.tensors[n]) for n, t in first.tensors.items())
    assert not any(torch.equal(t, other.tensors[n]) for n, t in first.tensors.items())
    for name, tensor in first.tensors.items():
        change = (tensor - pair.theta[name]).double()
        if variant == "random_direction":
            assert float(change.norm()) == pytest.approx(float(pair.tau[name].norm()), rel=1e-4)
        elif change.ndim == 2:
            role = residual_role(name, pair.model.config)
            assert role is not None
            gain = torch.ones(16) if role.norm is None else role.gain(pair.theta[role.norm])
            s = torch.linalg.svdvals(folded(change, gain, role.axis))
            assert int((s > 1e-5 * s[0]).sum()) == 3  # the rank of the selected latents
    if variant == "random_subspace":
        by_rank = run(0, sae=None, latents=None, rank=3)
        assert all(torch.equal(t, by_rank.tensors[n]) for n, t in first.tensors.items())


@pytest.mark.parametrize("variant", ["raw", "projected_rescaled", "random_direction"])
def test_blocks_do_not_change_a_bit(
    pair: Pair, saes: str, variant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The live edit's own blocks; those of `row_blocks` fix the bits of products."""
    monkeypatch.setattr(blocks, "BLOCK", 100)
    spec = TaskVectorInjection(
        finetuned=pair.tuned, layers=[1], variant=variant, sae=saes, latents=LATENTS
    )
    whole = injected(pair, spec).tensors
    for block, count in ((40, 1), (1 << 18, 1), (1 << 18, 5)):
        monkeypatch.setattr(plan_module, "BLOCK", block)
        monkeypatch.setattr(plan_module, "BLOCKS", count)
        other = injected(pair, spec).tensors
        assert all(torch.equal(t, other[n]) for n, t in whole.items())


@pytest.mark.parametrize("variant", ["raw", "projected", "random_subspace", "random_direction"])
def test_folder_and_live_edit_agree_bit_for_bit(pair: Pair, saes: str, variant: Any) -> None:
    spec = TaskVectorInjection(
        finetuned=pair.tuned, layers=[0, 1], variant=variant, sae=saes, latents=LATENTS, alpha=0.3
    )
    base = FolderWeights(pair.base)
    folder_plan = plan_folder(base, [spec])
    plan = folder_plan.plans[0]
    live = plan_edit(spec, PlainModel(pair.model))
    records = [sorted(p.to_dict()["ops"], key=str) for p in (plan, live)]
    assert records[0] == records[1]  # in another order: of the files, of the model
    deltas = named_deltas([(spec.title, plan.ops)], folder_plan.tied, base)[0].deltas
    edited = apply_named(pair.theta, [live.named]).tensors
    assert {base.disk_name(n) for n in edited} == set(deltas)
    for name, tensor in edited.items():
        delta = deltas[base.disk_name(name)]
        summed = [
            base.rows(name, start, stop) + delta.rows(start, stop)
            for start, stop in blocks.row_blocks(tensor.shape)
        ]
        assert torch.equal(torch.cat(summed), tensor)


@pytest.mark.parametrize("variant", ["raw", "projected"])
def test_written_folder_loads_and_equals_the_live_edit(
    pair: Pair, saes: str, variant: Any, tmp_path: Path
) -> None:
    spec = TaskVectorInjection(
        finetuned=pair.tuned, layers=[2], variant=variant, sae=saes, latents=LATENTS, alpha=1.5
    )
    base = FolderWeights(pair.base)
    plan = plan_folder(base, [spec])
    written = named_deltas([(spec.title, plan.plans[0].ops)], plan.tied, base)
    write_edited(base.files, written, tmp_path / "out")
    model = load_causal_lm(tmp_path / "out", dtype="float32")
    edited = {**pair.theta, **injected(pair, spec).tensors}
    loaded = dict(model.named_parameters(remove_duplicate=False))
    assert all(torch.equal(loaded[n], t) for n, t in edited.items())


def test_a_sweep_opens_nothing_again(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_edit(
        TaskVectorInjection(finetuned=llama.tuned, layers=[1]), PlainModel(llama.model)
    )
    monkeypatch.setattr("salve_lm.edits.context.open_source", None)
    for alpha in (-1.0, 0.25, 2.0):
        at = plan.with_alpha(alpha)
        assert f"alpha={alpha:g}" in at.spec.title
        for name, tensor in apply_named(llama.theta, [at.named]).tensors.items():
            assert torch.equal(tensor, llama.theta[name] + llama.tau[name] * alpha)


def test_composes_with_other_edits(pair: Pair, tmp_path: Path) -> None:
    """Task vector first, another edit of the same layer after it (Conv1D too)."""
    prefix = decoder_prefix(pair.model.config)
    last = "attn.c_attn" if pair.model.config.model_type == "gpt2" else "self_attn.q_proj"
    sae = write_sae(tmp_path / "sae", d_in=16)
    module = f"{prefix}.1.{last}"
    edits: list[EditSpec] = [
        TaskVectorInjection(finetuned=pair.tuned, layers=[1]),
        DirectionalAblation(feature=2, module=module, sae=sae),
    ]
    plans = plan_edits(edits, PlainModel(pair.model))
    both = apply_named(pair.theta, [p.named for p in plans]).tensors
    moved = {**pair.theta, **injected(pair, edits[0]).tensors}  # type: ignore[arg-type]
    second = apply_named(moved, [plans[1].named]).tensors[f"{module}.weight"]
    torch.testing.assert_close(both[f"{module}.weight"], second)


@pytest.mark.parametrize("variant", ["raw", "projected", "random_latents_rescaled"])
def test_export_and_rebuild(pair: Pair, saes: str, variant: Any, tmp_path: Path) -> None:
    spec = TaskVectorInjection(
        finetuned=pair.tuned, base=pair.base, layers=[1], variant=variant, sae=saes,
        latents=LATENTS, alpha=-0.4,
    )  # fmt: skip
    exported = export(PlainModel(pair.model), [spec], tmp_path / "out")
    record = json.loads((exported.path / "edit.json").read_text())
    op = record["edits"][0]["ops"][0]
    assert op["source"] == {"finetuned": pair.tuned, "base": pair.base}
    assert set(op["sha256"]) == {"finetuned", "base"}
    assert len(json.dumps(op)) < 1500  # by reference
    state = pair.model.state_dict()
    assert rebuild(exported.path, state, tmp_path / "again") == exported.sha256


def test_rebuilding_from_other_files(tmp_path: Path) -> None:
    pair = build_pair(tmp_path, "llama")
    spec = TaskVectorInjection(finetuned=pair.tuned, layers=[1])
    exported = export(PlainModel(pair.model), [spec], tmp_path / "out")
    model = new_causal_lm(CONFIGS["llama"], 9)
    for file in Path(pair.tuned).glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(pair.tuned)
    with pytest.raises(StaleStore, match="is not what this edit was made from"):
        rebuild(exported.path, pair.model.state_dict(), tmp_path / "again")


def test_an_adapter_is_exported_without_a_merged_copy(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = new_causal_lm(CONFIGS["llama"], 0)
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    tuned = get_peft_model(new_causal_lm(CONFIGS["llama"], 0), LoraConfig(**options))  # type: ignore[arg-type]
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1 * p.requires_grad)
    tuned.save_pretrained(tmp_path / "adapter")
    spec = TaskVectorInjection(finetuned=str(tmp_path / "adapter"), layers="all")
    exported = export(PlainModel(base), [spec], tmp_path / "out")
    merged = dict(tuned.merge_and_unload().named_parameters())
    live = {n: p.detach() for n, p in base.named_parameters()}
    plan = exported.plans[0]
    assert plan.tensors == tuple(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3))
    for name, tensor in apply_named(live, [plan.named]).tensors.items():
        torch.testing.assert_close(tensor, merged[name].detach())
    state = base.state_dict()
    assert rebuild(exported.path, state, tmp_path / "again") == exported.sha256
    narrow = dataclasses.replace(spec, tensors=["mlp.*"])
    with pytest.raises(BadConfig, match=r"changes none of the 9 tensors.*q_proj"):
        plan_edit(narrow, PlainModel(base))


def test_tied_tensors(tmp_path: Path) -> None:
    pair = build_pair(tmp_path, "llama_tied")
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    for tensors in (names, names[:1], names[1:]):
        spec = TaskVectorInjection(finetuned=pair.tuned, tensors=tensors)
        with pytest.raises(EditConflict, match="allow_tied"):
            plan_edit(spec, PlainModel(pair.model))
        with pytest.raises(EditConflict, match="allow_tied"):
            plan_folder(FolderWeights(pair.base), [spec])
        allowed = dataclasses.replace(spec, allow_tied=True)
        plan = plan_edit(allowed, PlainModel(pair.model))
        assert plan.tensors == (names[0],)  # once, under its first name
        new = apply_named(pair.theta, [plan.named]).tensors[names[0]]
        assert torch.equal(new, pair.theta[names[0]] + pair.tau[names[0]])
        folder = FolderWeights(pair.base)
        planned = plan_folder(folder, [allowed])
        deltas = named_deltas([("tied", planned.plans[0].ops)], planned.tied, folder)[0].deltas
        assert set(deltas) == {names[0]}
    layers = TaskVectorInjection(finetuned=pair.tuned, layers="all")
    assert not set(plan_edit(layers, PlainModel(pair.model)).tensors) & set(names)


def test_no_effect_and_not_finite(llama: Pair, tmp_path: Path) -> None:
    for changes in ({"alpha": 0.0}, {"finetuned": llama.base}):
        spec = dataclasses.replace(
            TaskVectorInjection(finetuned=llama.tuned, layers=[1]), **changes
        )
        with pytest.raises(NoEffect):
            injected(llama, spec)
    broken = load_causal_lm(llama.tuned)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    spec = TaskVectorInjection(finetuned=str(tmp_path / "nan"), layers=[1])
    with pytest.raises(NotFinite, match="up_proj"):
        injected(llama, spec)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, BadConfig, "Which layers"),
        ({"layers": [3]}, NameNotFound, "0 to 2"),
        ({"layers": [1], "tensors": ["q_proj"]}, NameNotFound, "only a part of"),
        ({"layers": [1], "alpha": float("nan")}, BadConfig, "finite"),
        ({"layers": [1], "variant": "projected"}, BadConfig, "needs `sae`"),
        ({"layers": [1], "variant": "random_subspace"}, BadConfig, "either a `rank`"),
        ({"layers": [1], "variant": "random_subspace", "rank": 17}, BadConfig, "does not fit"),
        ({"layers": [1], "rank": 0}, BadConfig, "at least 1"),
        (
            {"layers": [1], "tensors": ["*norm.weight"], "variant": "random_subspace", "rank": 2},
            BadConfig,
            "nothing to project",
        ),
        (
            {"layers": [1], "tensors": ["mlp.*", "lm_head.weight"], "variant": "random_subspace",
             "rank": 2},
            BadConfig,
            "belongs to no layer",
        ),
        ({"layers": [1], "finetuned": "nowhere"}, SalveError, "No fine-tuned model"),
    ],
)  # fmt: skip
def test_bad_options(
    llama: Pair, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        plan_edit(
            TaskVectorInjection(**{"finetuned": llama.tuned, **options}), PlainModel(llama.model)
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sae": "{folder}/narrow"}, "width 8, but they are 16 wide here"),
        ({"latents": {1: [D_SAE]}}, r"No latent named '12'"),
        ({"latents": {0: [1]}}, r"No latents are given for layers \[1\]"),
        ({"latents": None}, "Which latents"),
        ({"layers": [0, 1], "sae": "{folder}/narrow", "latents": LATENTS}, "One SAE"),
        ({"sae": "{folder}/dead"}, r"rows \[1\] are zero"),
    ],
)
def test_saes_that_do_not_fit(
    llama: Pair, saes: str, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    write_sae(tmp_path / "narrow")
    write_sae(tmp_path / "dead", d_in=16, zero_row=2)
    options = {k: v.format(folder=tmp_path) if k == "sae" else v for k, v in options.items()}
    base: dict[str, Any] = {"layers": [1], "sae": saes, "latents": {1: [0, 2]}}
    spec = TaskVectorInjection(finetuned=llama.tuned, variant="projected", **(base | options))
    with pytest.raises(SalveError, match=words):
        plan_edit(spec, PlainModel(llama.model))


def test_other_models_are_refused(llama: Pair, tmp_path: Path) -> None:
    save_model(tmp_path / "gemma", "gemma3_text")
    spec = TaskVectorInjection(finetuned=str(tmp_path / "gemma"), layers=[1])
    with pytest.raises(ShapeMismatch, match="model_type gemma3_text against llama"):
        plan_edit(spec, PlainModel(llama.model))
    with pytest.raises(BadConfig, match="language model of transformers"):
        plan_edit(spec, PlainModel(nn.Linear(2, 2)))


def test_energy_accounting(llama: Pair, saes: str) -> None:
    spec = TaskVectorInjection(
        finetuned=llama.tuned, layers=[0, 1], variant="projected", sae=saes, latents=LATENTS
    )
    context = EditContext()
    plan = plan_edit(spec, PlainModel(llama.model), context)
    decoders = {i: context.sae(saes.format(layer=i)).decoder() for i in (0, 1)}
    moments = {i: torch.diag(torch.arange(16.0)) for i in (0, 1)}
    rows = account(
        plan.ops,  # type: ignore[arg-type]
        GivenWeights(llama.theta),
        decoders=decoders, second_moments=moments, samples=30,
    )  # fmt: skip
    assert len(rows) == 2 * (7 + 1)
    by_name = {row.name: row for row in rows}
    name = "model.layers.1.mlp.down_proj.weight"
    row, tau = by_name[name], llama.tau[name].double()
    q = orthonormal_basis(decoders[1][LATENTS[1]])
    assert row.rho == pytest.approx(float((q.T @ tau).square().sum() / tau.square().sum()))
    assert (row.rank, row.width, row.expected) == (3, 16, 3 / 16)
    assert row.ratio == pytest.approx(row.rho * 16 / 3)
    assert row.random_subspace.mean == pytest.approx(3 / 16)
    top = tau[-3:].square().sum() / tau.square().sum()
    assert row.principal_components == pytest.approx(float(top))
    pooled = by_name["layer 1"]
    parts = [r for r in rows if r.name.startswith("model.layers.1.")]
    assert pooled.energy == pytest.approx(sum(r.energy for r in parts))
    assert pooled.retained == pytest.approx(sum(r.retained for r in parts))
    assert pooled.random_latents is not None
    assert pooled.random_latents.low <= pooled.random_latents.high


def test_in_a_config(llama: Pair) -> None:
    before = dict(jsonargparse_settings.parsing_settings)
    set_parsing_settings(subclasses_enabled=[EditSpec])
    try:
        parser = ArgumentParser()
        parser.add_argument("--edits", type=list[EditSpec])
        text = f"""
        - class_path: TaskVectorInjection
          init_args:
            finetuned: {llama.tuned}
            layers: [0, 1]
            tensors: ["self_attn.*", "mlp.down_proj.weight"]
            alpha: -0.5
            variant: projected
            sae: saes/layer_{{layer}}
            latents: {{0: [1], 1: [2, 5]}}
        """
        parsed = parser.parse_args([f"--edits={yaml.safe_load(text)}"])
        (spec,) = parser.instantiate_classes(parsed).edits
        assert spec == TaskVectorInjection(
            finetuned=llama.tuned, layers=[0, 1], tensors=["self_attn.*", "mlp.down_proj.weight"],
            alpha=-0.5, variant="projected", sae="saes/layer_{layer}", latents={0: [1], 1: [2, 5]},
        )  # fmt: skip
        again = parser.parse_string(parser.dump(parsed))
        assert parser.instantiate_classes(again).edits == [spec]
        assert "module" not in spec_to_dict(spec)["init_args"]
    finally:
        jsonargparse_settings.parsing_settings.update(before)


def test_the_source_reads_only_what_is_edited(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    from salve_lm.task_vectors.weights import Weights

    real = Weights.rows

    def note(self: Weights, name: str, start: int, stop: int) -> Tensor:
        read.add(name)
        return real(self, name, start, stop)

    monkeypatch.setattr(Weights, "rows", note)
    found = injected(llama, TaskVectorInjection(finetuned=llama.tuned, layers=[2])).tensors
    assert read == set(found)
