"""The contract of weight editing (ARCHITECTURE), line by line; purity is in tests/edits."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from salve_lm.callbacks import WeightEditing
from salve_lm.edits import (
    DecoderGuided,
    DirectionalAblation,
    EditContext,
    EditSpec,
    LatentContrastErasure,
    LowerClassBias,
    apply_named,
    plan_edits,
)
from salve_lm.edits.export import export
from salve_lm.errors import (
    BadConfig,
    EditConflict,
    NameNotFound,
    NoEffect,
    NotFinite,
    UnsupportedStrategy,
)
from tests.callbacks.tiny import Studied, parts, trainer
from tests.edits.tiny import NAMES, Fixture, state

EDITED_AT = {
    "on_validation_start", "validation_step", "on_validation_epoch_end", "test_step",
    "predict_step",
}  # fmt: skip


def specs(tiny: Fixture) -> list[EditSpec]:
    return [
        DecoderGuided(feature="dominant:tower", alpha=3.0, **tiny.paths),
        DirectionalAblation(feature=2, module="hidden", sae=tiny.sae),
        LatentContrastErasure(target_class="church", top_k=3, **tiny.paths),
    ]


def expected(tiny: Fixture, studied: Studied, edits: list[EditSpec] | None = None) -> Any:
    """What the pure functions make of the model's present weights."""
    plans = plan_edits(edits or specs(tiny), studied, EditContext(), NAMES)
    return apply_named(state(studied.model), [p.named for p in plans]).tensors


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_edited_inside_and_original_bits_after(
    tiny: Fixture, run: str, inference_mode: bool
) -> None:
    studied, data = parts(tiny)
    before, parameters = state(studied.model), list(studied.model.parameters())
    new = expected(tiny, studied)
    editing = WeightEditing(specs(tiny))
    running = trainer(editing, inference_mode=inference_mode)
    for _ in range(2):
        studied.seen.clear()
        getattr(running, run)(studied, data)
        seen = [w for where, w in studied.seen if where in EDITED_AT]
        assert seen
        assert all(torch.equal(w, new["fc.weight"]) for w in seen)
        assert all(torch.equal(t, before[n]) for n, t in studied.model.state_dict().items())
        assert not editing.edited
        assert editing.originals == {}
    # the same parameters, normal tensors still, and nothing left hooked
    assert all(a is b for a, b in zip(parameters, studied.model.parameters(), strict=True))
    assert not any(p.is_inference() for p in parameters)
    assert not any(m._state_dict_hooks for m in studied.modules())
    studied.model(torch.randn(2, 8)).sum().backward()


def test_training_is_untouched_to_the_bit(tiny: Fixture) -> None:
    """Validation with edits after every batch; the weights learned are those without any."""
    finals = []
    for callbacks in ([], [WeightEditing(specs(tiny))]):
        torch.manual_seed(0)
        studied, data = parts(tiny)
        options = {"max_epochs": 2, "val_check_interval": 1, "num_sanity_val_steps": 2}
        running = trainer(*callbacks, **options)
        running.fit(studied, data)
        finals.append(state(studied.model))
        trained = [w for where, w in studied.seen if where == "training_step"]
        checked = [w for where, w in studied.seen if where == "validation_step"]
        assert len(trained) == 8
        # two batches of sanity check, then four of validation after each batch
        assert len(checked) == 2 + 8 * 4
        assert torch.equal(checked[0], checked[1])
        assert torch.equal(checked[0], trained[0])  # the sanity check runs unedited
        ends = [w for where, w in studied.seen if where == "on_validation_end"]
        for i, weight in enumerate(ends[1:-1]):
            if i < 7:
                assert torch.equal(weight, trained[i + 1])  # already restored
        same = torch.equal(checked[2], ends[1])
        assert same == (not callbacks)
    assert all(torch.equal(finals[0][n], finals[1][n]) for n in finals[0])


def test_edits_follow_the_weights_as_they_learn(tiny: Fixture) -> None:
    studied, data = parts(tiny)
    originals: list[dict[str, Tensor]] = []

    class Note(Callback):
        def on_validation_start(self, *_: Any) -> None:
            originals.append(dict(editing.originals))

    editing = WeightEditing(specs(tiny))
    trainer(editing, Note(), max_epochs=2).fit(studied, data)
    first, second = originals
    assert not torch.equal(first["fc.weight"], second["fc.weight"])
    checked = [w for where, w in studied.seen if where == "validation_step"]
    oracle = copy.deepcopy(studied)
    oracle.model.load_state_dict(second, strict=False)
    assert torch.equal(checked[-1], expected(tiny, oracle)["fc.weight"])


def test_a_loaded_checkpoint_is_edited_not_overwritten(tiny: Fixture, tmp_path: Path) -> None:
    studied, data = parts(tiny)
    with torch.no_grad():
        studied.model.fc.weight.mul_(1.5)
    stored = state(studied.model)
    running = trainer()
    running.strategy.connect(studied)
    running.save_checkpoint(tmp_path / "a.ckpt")
    new = expected(tiny, studied)
    fresh, data = parts(tiny)
    trainer(WeightEditing(specs(tiny))).validate(fresh, data, ckpt_path=str(tmp_path / "a.ckpt"))
    seen = [w for where, w in fresh.seen if where == "validation_step"]
    assert all(torch.equal(w, new["fc.weight"]) for w in seen)
    assert torch.equal(fresh.model.fc.weight, stored["fc.weight"])


class Boom(BaseException):
    """Neither an Exception nor anything that is expected."""


@pytest.mark.parametrize("error", [ValueError, Boom])
@pytest.mark.parametrize("where", ["validation_step", "on_validation_start", "on_train_epoch_end"])
def test_restored_after_an_exception(
    tiny: Fixture, error: type[BaseException], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    studied, data = parts(tiny)

    def fail(*_: Any) -> None:
        raise error("now")

    monkeypatch.setattr(studied, where, fail)
    editing = WeightEditing(specs(tiny))
    last: list[dict[str, Tensor]] = []

    class Note(Callback):
        def on_exception(self, *_: Any) -> None:
            last.append(state(studied.model))

    # before the editing callback, so that its notes are of a model that is still edited
    with pytest.raises(error, match="now"):
        trainer(Note(), editing).fit(studied, data)
    assert not editing.edited
    trained = [w for w_, w in studied.seen if w_ == "training_step"]
    assert torch.equal(studied.model.fc.weight, last[0]["fc.weight"])  # the state dict never lied
    assert not torch.equal(studied.model.fc.weight, trained[0])
    assert not any(m._state_dict_hooks for m in studied.modules())


def test_teardown_restores_what_was_left(tiny: Fixture) -> None:
    studied, data = parts(tiny)
    before = state(studied.model)
    editing = WeightEditing(specs(tiny))
    running = trainer(editing)
    running.validate(studied, data)
    editing._apply(running, studied)
    assert editing.edited
    editing.teardown(running, studied, "validate")
    assert torch.equal(studied.model.fc.weight, before["fc.weight"])


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("when", ["on_validation_batch_end", "on_validation_epoch_end"])
def test_no_checkpoint_holds_edited_weights(
    tiny: Fixture, tmp_path: Path, weights_only: bool, when: str
) -> None:
    studied, data = parts(tiny)
    path = tmp_path / "inside.ckpt"
    nested: list[Tensor] = []

    def save(self: Callback, running: Any, *_: Any) -> None:
        assert editing.edited
        assert not torch.equal(studied.model.fc.weight, editing.originals["fc.weight"])
        running.save_checkpoint(path, weights_only=weights_only)
        nested.append(studied.model.fc.state_dict()["weight"])
        nested.append(studied.model.state_dict(prefix="x.")["x.fc.weight"])

    saving = type("Saving", (Callback,), {when: save})()
    editing = WeightEditing(specs(tiny))
    trainer(editing, saving).fit(studied, data)
    saved = torch.load(path, weights_only=True)["state_dict"]
    trained = state(studied.model)
    assert all(torch.equal(saved[f"model.{n}"], trained[n]) for n in trained)
    assert all(torch.equal(t, trained["fc.weight"]) for t in nested)


def test_model_checkpoint_stores_the_originals(tiny: Fixture, tmp_path: Path) -> None:
    studied, data = parts(tiny)
    keeper = ModelCheckpoint(tmp_path, "best", save_last=True)
    trainer(WeightEditing(specs(tiny)), keeper, enable_checkpointing=True).fit(studied, data)
    for file in ("best.ckpt", "last.ckpt"):
        saved = torch.load(tmp_path / file, weights_only=True)["state_dict"]
        assert torch.equal(saved["model.fc.weight"], studied.model.fc.weight)


def test_suspended_shows_the_originals(tiny: Fixture) -> None:
    studied, data = parts(tiny)
    before = state(studied.model)
    new = expected(tiny, studied)
    shown: list[bool] = []

    class Peek(Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            with editing.suspended():
                shown.append(torch.equal(studied.model.fc.weight, before["fc.weight"]))
            shown.append(torch.equal(studied.model.fc.weight, new["fc.weight"]))
            with pytest.raises(KeyError), editing.suspended():
                raise KeyError
            shown.append(torch.equal(studied.model.fc.weight, new["fc.weight"]))

    editing = WeightEditing(specs(tiny))
    with editing.suspended():  # nothing to suspend
        pass
    trainer(editing, Peek()).validate(studied, data)
    assert len(shown) == 12
    assert all(shown)


@pytest.mark.parametrize("how", ["whole", "network", "layer"])
def test_compiled_models(tiny: Fixture, how: str) -> None:
    """In-place values are honoured by graphs compiled before, and the original ones after."""
    studied, data = parts(tiny)
    plain, _ = parts(tiny)
    trainer(WeightEditing(specs(tiny))).validate(plain, data)
    before = state(studied.model)
    run: Any = studied
    if how == "whole":
        run = torch.compile(studied, backend="aot_eager")
    elif how == "network":
        studied.model = torch.compile(studied.model, backend="aot_eager")  # type: ignore[assignment]
    else:
        studied.model.fc = torch.compile(studied.model.fc, backend="aot_eager")
    with torch.no_grad():
        unedited = studied.model(tiny.x)  # compiled now, before any edit
    running = trainer(WeightEditing(specs(tiny)))
    for _ in range(2):
        studied.logits.clear()
        running.validate(run, data)
        torch.testing.assert_close(torch.cat(studied.logits), torch.cat(plain.logits))
    with torch.no_grad():
        assert torch.equal(studied.model(tiny.x), unedited)
    after = {n.replace("_orig_mod.", ""): t for n, t in studied.model.state_dict().items()}
    assert all(torch.equal(after[n], before[n]) for n in before)
    torch._dynamo.reset()


def test_live_equals_exported(tiny: Fixture, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    studied, data = parts(tiny)
    trainer(WeightEditing(specs(tiny))).validate(studied, data)
    done = export(studied, specs(tiny), tmp_path / "out", class_names=NAMES)
    exported, _ = parts(tiny)
    exported.model.load_state_dict(load_file(done.path / "model.safetensors"))
    trainer().validate(exported, data)
    assert torch.equal(torch.cat(exported.logits), torch.cat(studied.logits))


def test_no_export_of_an_edited_model(tiny: Fixture, tmp_path: Path) -> None:
    studied, data = parts(tiny)

    class ExportNow(Callback):
        def on_validation_epoch_end(self, *_: Any) -> None:
            with pytest.raises(EditConflict, match=r"'fc\.bias' is edited at this moment"):
                export(studied, [LowerClassBias(target_class=0)], tmp_path / "inside")
            with editing.suspended():
                export(studied, [LowerClassBias(target_class=0)], tmp_path / "inside")

    editing = WeightEditing([LowerClassBias(target_class=0)])
    trainer(editing, ExportNow()).validate(studied, data)
    outside = export(studied, [LowerClassBias(target_class=0)], tmp_path / "outside")
    inside = (tmp_path / "inside" / "model.safetensors").read_bytes()
    assert inside == (outside.path / "model.safetensors").read_bytes()


class EMA(Callback):
    """A callback of somebody else's, known by its name."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightAveraging(),
        lambda: EMAWeightAveraging(),
        lambda: StochasticWeightAveraging(swa_lrs=0.1),
        lambda: ModelPruning("l1_unstructured"),
        lambda: WeightEditing([LowerClassBias(target_class=1)]),
        lambda: EMA(),
    ],
)
def test_conflicting_callbacks(tiny: Fixture, make: Any) -> None:
    studied, data = parts(tiny)
    other = make()
    with pytest.raises(EditConflict, match=f"WeightEditing and {type(other).__name__}"):
        trainer(WeightEditing(specs(tiny)), other).validate(studied, data)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_sharded_strategies(tiny: Fixture, kind: type) -> None:
    editing = WeightEditing(specs(tiny))
    # a real one needs a GPU or another package: an instance without its constructor is enough
    running: Any = SimpleNamespace(strategy=kind.__new__(kind), callbacks=[editing])
    with pytest.raises(UnsupportedStrategy, match=kind.__name__):
        editing.setup(running, parts(tiny)[0], "validate")


def test_errors_come_before_the_fit(tiny: Fixture) -> None:
    studied, data = parts(tiny)
    for edits, error in [
        ([DecoderGuided(feature="dominant:twer", **tiny.paths)], NameNotFound),
        ([LowerClassBias(target_class="chruch")], NameNotFound),
        ([LowerClassBias(target_class=0, module="fcc")], NameNotFound),
        ([DecoderGuided(feature=1)], BadConfig),
    ]:
        with pytest.raises(error):
            trainer(WeightEditing(edits)).fit(studied, data)
    assert studied.seen == []
    with pytest.raises(BadConfig, match="at least one"):
        WeightEditing([])


def test_class_names_come_from_the_data(tiny: Fixture) -> None:
    studied, data = parts(tiny)
    editing = WeightEditing([LowerClassBias(target_class="tower", alpha=50.0)])
    trainer(editing).validate(studied, data)
    assert editing.plans[0].target == NAMES.index("tower")
    assert not (torch.cat(studied.logits).argmax(1) == 2).any()


def test_default_artefacts(tiny: Fixture) -> None:
    studied, data = parts(tiny)
    editing = WeightEditing([DecoderGuided(target_class="tower")], tiny.sae, tiny.features)
    trainer(editing).validate(studied, data)
    assert editing.plans[0].features == (tiny.table.dominant("tower"),)


def test_an_edit_without_effect_stops_the_run(tiny: Fixture) -> None:
    studied, data = parts(tiny)
    edits = [*specs(tiny), DecoderGuided(name="nil", feature=1, alpha=0.0, sae=tiny.sae)]
    before = state(studied.model)
    with pytest.raises(NoEffect, match="'nil'"):
        trainer(WeightEditing(edits)).validate(studied, data)
    assert torch.equal(studied.model.fc.weight, before["fc.weight"])
    with torch.no_grad():
        studied.model.hidden.weight[0, 0] = torch.inf
    with pytest.raises(NotFinite, match=r"'hidden\.weight'"):
        trainer(WeightEditing(specs(tiny))).validate(studied, data)
    assert torch.equal(studied.model.fc.weight, before["fc.weight"])


def test_other_modules_are_refused(tiny: Fixture) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    with pytest.raises(BadConfig, match="needs a StudiedModel"):
        trainer(WeightEditing(specs(tiny))).validate(BoringModel())


def test_the_change_is_logged(tiny: Fixture, caplog: pytest.LogCaptureFixture) -> None:
    studied, data = parts(tiny)
    new, old = expected(tiny, studied), state(studied.model)
    with caplog.at_level(logging.INFO):
        (logged,) = trainer(WeightEditing(specs(tiny))).validate(studied, data, verbose=False)
    assert set(logged) == {f"edit/{n}" for n in new}
    for name, tensor in new.items():
        relative = float((tensor - old[name]).norm() / old[name].norm())
        assert logged[f"edit/{name}"] == pytest.approx(relative, rel=1e-5)
        assert f"Edited {name}" in caplog.text


class Storages(TorchDispatchMode):
    """The most bytes held at once by tensors of a given size and above, made while it is on."""

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.at_least, self.peak = at_least, 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().nbytes() >= self.at_least:
            storage = out.untyped_storage()
            if storage.data_ptr() not in given:
                self._alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_most_two_extra_copies(tiny: Fixture, dtype: torch.dtype) -> None:
    from salve_lm.edits.live import LiveEdit
    from salve_lm.edits.lookup import ModelIndex
    from salve_lm.edits.plan import NamedOps
    from tests.edits.test_plan import _at, all_ops

    model = torch.nn.ModuleDict({"m": torch.nn.Linear(5, 400_000, dtype=dtype)})
    size = model["m"].weight.numel() * model["m"].weight.element_size()
    ops = [_at(op, rows=None) if hasattr(op, "rows") else op for op in all_ops()[:2]]
    ops += [_at(all_ops()[4], offset=1.0), _at(all_ops()[3])]
    with Storages(size // 2) as seen:
        index = ModelIndex(model)
        applied = apply_named(index.values, [NamedOps("e", ops)])
        live = LiveEdit(index, applied.tensors)
        del applied
        live.restore()
    assert size < seen.peak <= 2 * size * 1.2  # the bias is a fifth of the weight
