from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from salve_lm.callbacks import CriticalThreshold, WeightEditing, threshold_samples
from salve_lm.edits import (
    DecoderGuided,
    DirectionalAblation,
    LatentContrastErasure,
    RankOneHead,
    Steering,
)
from salve_lm.errors import BadConfig, MissingFile, NotFinite, UnsupportedEdit
from tests.callbacks.tiny import Data, Studied, parts, trainer
from tests.edits.tiny import NAMES, Fixture, K


def rows_of(tiny: Fixture, *callbacks: Any, **options: Any) -> list[dict[str, Any]]:
    options = options or tiny.paths
    measuring = CriticalThreshold(**options)
    studied, data = parts(tiny)
    trainer(measuring, *callbacks).validate(studied, data, verbose=False)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in studied.modules())
    return measuring.rows


def flips_by_search(tiny: Fixture, k: int, latent: int, rows: str) -> np.ndarray:
    """The first strength on a fine grid at which class k is lost, for its own samples."""
    fc = tiny.studied.model.fc
    W, b = fc.weight.detach().double().numpy(), fc.bias.detach().double().numpy()
    c = np.abs(tiny.decoder[latent].numpy())
    c /= np.linalg.norm(c)
    x = tiny.x.double().numpy()[tiny.label.numpy() == k]
    x = x[(x @ W.T + b).argmax(1) == k]
    found = np.full(len(x), np.inf)
    for alpha in np.linspace(0, 40, 8001)[::-1]:
        edited = W.copy()
        chosen = [k] if rows == "class" else list(range(K))
        edited[chosen] *= np.maximum(0, 1 - alpha * c)
        found[(x @ edited.T + b).argmax(1) != k] = alpha
    return found


@pytest.mark.parametrize("rows", ["class", "all"])
def test_flips_against_a_search_of_edited_heads(tiny: Fixture, rows: str) -> None:
    found = rows_of(tiny, rows=rows, **tiny.paths)
    assert [r["class"] for r in found] == NAMES
    for k, row in enumerate(found):
        latent = tiny.table.dominant(k)
        assert row["feature"] == str(latent)
        assert row["samples"] == int((tiny.label == k).sum())
        searched = flips_by_search(tiny, k, latent, rows)
        finite = np.isfinite(searched)
        assert row["flip_no_root_share"] == pytest.approx(1 - finite.mean(), abs=0.04)
        if finite.mean() > 0.55:
            assert row["flip_median"] == pytest.approx(np.median(searched), abs=0.01)


def test_zero_logits_against_the_formula(tiny: Fixture) -> None:
    fc = tiny.studied.model.fc
    W, b = fc.weight.detach().double(), fc.bias.detach().double()
    for k, row in enumerate(rows_of(tiny)):
        c = tiny.decoder[tiny.table.dominant(k)].abs()
        c = c / c.norm()
        x = tiny.x.double()[tiny.label == k]
        for suffix, w, bias in (
            ("", W[k], b[k]),
            ("_centred", W[k] - W.mean(0), b[k] - b.mean()),
        ):
            z, r = x @ w + bias, x @ (w * c)
            alpha = torch.where(r > 0, z / r, math.inf)
            alpha = torch.where(z <= 0, 0.0, alpha)
            if torch.isfinite(alpha).double().mean() > 0.6:
                assert row[f"linear{suffix}_median"] == pytest.approx(np.median(alpha), rel=1e-6)
            assert row[f"linear{suffix}_no_root_share"] == pytest.approx(
                float(alpha.isinf().double().mean())
            )


def test_logged_and_written(tiny: Fixture, tmp_path: Path) -> None:
    measuring = CriticalThreshold(out=str(tmp_path / "run"), **tiny.paths)
    studied, data = parts(tiny)
    running = trainer(measuring)
    for _ in range(2):  # the second evaluation replaces the first one's tables
        (logged,) = running.validate(studied, data, verbose=False)
    for row in measuring.rows:
        name = f"alpha_crit/{row['class']}"
        assert logged[f"{name}/flip"] == pytest.approx(row["flip_median"], rel=1e-5)
        assert logged[f"{name}/no_root"] == pytest.approx(row["flip_no_root_share"], abs=1e-6)
        assert {f"{name}/exact", f"{name}/linear"} <= set(logged)
    with (tmp_path / "run" / "critical_thresholds.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(r["flip_median"]) for r in written] == [r["flip_median"] for r in measuring.rows]
    loaded = json.loads((tmp_path / "run" / "critical_thresholds.json").read_text())
    assert [r["class"] for r in loaded] == NAMES
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "critical_thresholds.csv",
        "critical_thresholds.json",
    ]


def test_in_fit_after_every_epoch_without_the_sanity_check(tiny: Fixture) -> None:
    measuring = CriticalThreshold(**tiny.paths)
    studied, data = parts(tiny)
    seen: list[int] = []
    report = measuring.report

    def noted(running: Any, module: Any, samples: Any) -> None:
        seen.append(sum(len(found.flip.alpha) for found in samples))
        report(running, module, samples)

    measuring.report = noted  # type: ignore[method-assign]
    trainer(measuring, max_epochs=2, num_sanity_val_steps=2).fit(studied, data)
    assert seen == [120, 120]


@pytest.mark.parametrize("module", ["fc", "hidden"])
def test_measured_on_the_unedited_model(tiny: Fixture, module: str) -> None:
    plain = rows_of(tiny)
    edit = DecoderGuided(module=module, feature=2, alpha=5.0, rows="all", sae=tiny.sae)
    assert str(rows_of(tiny, WeightEditing([edit]))) == str(plain)  # by text: NaN equals itself
    measuring = CriticalThreshold(**tiny.paths)
    studied, data = parts(tiny)
    trainer(WeightEditing([edit]), measuring).validate(studied, data)
    assert str(measuring.rows) == str(plain)


def test_given_edits(tiny: Fixture) -> None:
    edits = [
        DecoderGuided(feature="selective:tower", rows="all", **tiny.paths),
        LatentContrastErasure(target_class="tower", top_k=3, **tiny.paths),
        DirectionalAblation(feature="selective:tower", **tiny.paths),
    ]
    multiplicative, erasure, ablation = rows_of(tiny, edits=edits)
    assert {r["class"] for r in (multiplicative, erasure, ablation)} == {"tower"}
    assert "exact_median" in multiplicative
    assert "exact_median" not in erasure
    # against the folded head at strengths around each sample's own threshold
    from salve_lm.callbacks.critical_threshold import thresholds
    from salve_lm.edits import apply, plan_edit

    fc = tiny.studied.model.fc
    W, b = fc.weight.detach().double(), fc.bias.detach().double()
    x = tiny.x[tiny.label == 2]
    for edit in edits[1:]:
        plan = plan_edit(edit, tiny.studied, tiny.context)
        alphas = thresholds(x, W, b, plan, 2).flip.alpha
        checked = 0
        for row, alpha in zip(x, alphas.tolist(), strict=True):
            if not 0 < alpha < 100:
                continue
            for factor, kept in ((0.999, True), (1.001, False)):
                ops = plan.with_alpha(alpha * factor).ops
                new = apply({"fc.weight": W, "fc.bias": b}, ops)
                weight, bias = new["fc.weight"], new.get("fc.bias", b)
                assert (int((weight @ row.double() + bias).argmax()) == 2) == kept
                checked += 1
        assert checked > 10


def test_an_unedited_target_row_has_a_flip_but_no_zero(tiny: Fixture) -> None:
    edit = DecoderGuided(feature=1, target_class=0, rows=[1, 2], sae=tiny.sae)
    (row,) = rows_of(tiny, edits=[edit])
    assert row["exact_no_root_share"] == pytest.approx(
        float((tiny.studied.model.fc(tiny.x)[tiny.label == 0, 0] > 0).double().mean())
    )


def test_bad_input(tiny: Fixture, tmp_path: Path) -> None:
    studied, data = parts(tiny)

    def run(**options: Any) -> None:
        trainer(CriticalThreshold(**options)).validate(studied, data)

    with pytest.raises(BadConfig, match="rows is"):
        CriticalThreshold(rows="some")
    with pytest.raises(BadConfig, match="empty list"):
        CriticalThreshold(edits=[])
    with pytest.raises(BadConfig, match="needs an SAE"):
        run(features=tiny.features)
    with pytest.raises(MissingFile):
        run(sae=tiny.sae, features=str(tmp_path / "none"))
    for edit in (
        DecoderGuided(feature=[1, 2], target_class=0, sae=tiny.sae),
        DecoderGuided(feature=1, target_class=0, direction="enhance", sae=tiny.sae),
        DecoderGuided(feature=1, module="hidden", target_class=0, sae=tiny.sae),
        RankOneHead(target_class=0, features=tiny.features),
    ):
        with pytest.raises(UnsupportedEdit, match="no closed-form threshold"):
            run(edits=[edit])
    with pytest.raises(BadConfig, match="target_class"):
        run(edits=[Steering(feature=1, sae=tiny.sae)])


class Odd(Data):
    """Batches that are not (inputs, labels)."""

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.dataset.tensors[0], batch_size=32)


def test_models_and_data_that_do_not_fit(tiny: Fixture) -> None:
    class Alone(Studied):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch)

    measuring = CriticalThreshold(**tiny.paths)
    with pytest.raises(BadConfig, match=r"batches of \(inputs, labels\)"):
        trainer(measuring).validate(Alone(tiny.studied.model.fc), Odd(tiny.x, tiny.label))
    studied, data = parts(tiny)
    studied.head_name = None
    with pytest.raises(BadConfig, match="none is named"):
        trainer(measuring).validate(studied, data)
    studied.head_name = "relu"
    with pytest.raises(BadConfig, match="it is a ReLU"):
        trainer(measuring).validate(studied, data)
    compiled = torch.compile(parts(tiny)[0], backend="eager")
    with pytest.raises(UnsupportedEdit, match="compiled"):
        trainer(measuring).validate(compiled, data)


def test_a_few_samples_at_a_time_give_the_same(
    tiny: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows_of(tiny)
    monkeypatch.setattr(threshold_samples, "PENDING_BYTES", 7 * 4 * tiny.x.shape[1])
    held: list[int] = []
    gather = threshold_samples.ThresholdCapture.gather

    def weighed(self: Any, loaders: Any) -> Any:
        gathered = gather(self, loaders)
        parts = [part for of_edit in self._found for part in of_edit]
        held.append(sum(t.numel() * t.itemsize for part in parts for t in part))
        # 120 samples, 7 at a time
        assert max(len(part.place) for part in parts) <= 7
        assert self._x.shape == (7, tiny.x.shape[1])
        return gathered

    monkeypatch.setattr(threshold_samples.ThresholdCapture, "gather", weighed)
    few = rows_of(tiny)
    assert held == [49 * len(tiny.x)]
    for one, other in zip(whole, few, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, float):
                value = pytest.approx(value, rel=1e-12, nan_ok=True)
            assert other[name] == value, name


def test_damaged_inputs_are_named(tiny: Fixture) -> None:
    x = tiny.x.clone()
    x[70, 1] = float("nan")
    studied = Studied(tiny.studied.model.fc)
    with pytest.raises(NotFinite, match="fc:input"):
        trainer(CriticalThreshold(**tiny.paths)).validate(studied, Data(x, tiny.label))
