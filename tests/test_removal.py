"""What an edit left behind: data whose truth is known by construction, and brute-force figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from salve_lm.edits import DecoderGuided, LowerClassBias, PlainModel, apply, plan_edit
from salve_lm.edits.ops import FoldInput, Op, RankOneUpdate, ScaleChannels, ShiftBias
from salve_lm.errors import BadConfig, EmptyClass, NotFinite, ShapeMismatch, UnsupportedEdit
from salve_lm.removal import (
    FeatureFigures,
    ProbeSettings,
    Proportion,
    Thresholds,
    assess,
    feature_map,
    judge,
    measure_features,
    runner_up_share,
)

K, D, TARGET = 4, 8, 0
E0 = torch.eye(D, dtype=torch.float64)[0]


class World(NamedTuple):
    """Features, and a head that reads them."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    weight: Tensor
    bias: Tensor


def samples(n: int, seed: int, ring: float, centred: bool = False) -> tuple[Tensor, Tensor]:
    """Class 0 is marked by channel 0 alone, and wears the marks (1-3) of another class at random.

    Args:
        n: samples a class.
        seed: of the noise.
        ring: class 0 also lies on a circle of this radius in channels 4-5: readable, not linearly.
        centred: class 0 wears a third of every other class's mark instead.
    """
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(K).repeat_interleave(n)
    own = label == TARGET
    worn = torch.where(own, 1 + torch.arange(len(label)) % (K - 1), label)
    x = 0.5 * torch.randn(len(label), D, generator=generator)
    marks = nn.functional.one_hot(worn, D) * 4.0
    if centred:
        marks[own] = torch.tensor([0.0, 4, 4, 4, 0, 0, 0, 0]) / 3
    x += marks
    x[own, 0] += 4
    angle = 2 * torch.pi * torch.rand(int(own.sum()), generator=generator)
    x[own, 4] += ring * angle.cos()
    x[own, 5] += ring * angle.sin()
    return x, label


def world(ring: float = 0.0, centred: bool = False) -> World:
    from sklearn.linear_model import LogisticRegression

    train, val = (samples(120, seed, ring, centred) for seed in (0, 1))
    head = LogisticRegression(max_iter=300).fit(train[0].numpy(), train[1].numpy())
    return World(
        train,
        val,
        torch.as_tensor(head.coef_, dtype=torch.float32),
        torch.as_tensor(head.intercept_, dtype=torch.float32),
    )


def edit(w: World, ops: Sequence[Op], **options: object):  # type: ignore[no-untyped-def]
    new = apply({"fc.weight": w.weight, "fc.bias": w.bias}, ops)
    edited = (new.get("fc.weight", w.weight), new.get("fc.bias", w.bias))
    mapped = feature_map(ops, "fc", K)
    return assess(w.train, w.val, (w.weight, w.bias), edited, TARGET, feature_map=mapped, **options)


def fold(v: Tensor = E0, q: Tensor | None = E0, alpha: float = 1.0, offset: float = 0.0) -> Op:
    return FoldInput(module="fc", output_dim=0, alpha=alpha, v=v, q=q, offset=offset)


def gate(f: Sequence[float], rows: tuple[int, ...] | None = None) -> Op:
    c = 1 - torch.tensor([list(f)], dtype=torch.float64)
    return ScaleChannels(module="fc", output_dim=0, alpha=1.0, c=c, sign=-1, rows=rows)


def lower_bias(amount: float) -> Op:
    delta = torch.zeros(K, dtype=torch.float64)
    delta[TARGET] = -1
    return ShiftBias(module="fc", output_dim=0, alpha=amount, delta=delta)


# ------------------------------------------------------------------------ the labels


def test_a_lowered_bias_suppresses_and_leaves_everything_readable() -> None:
    report = edit(world(), [lower_bias(50)])
    assert report.label == "suppressed"
    assert report.recoverability == 1
    assert report.runner_up.share == 1 and report.runner_up.n >= 115
    assert report.target_before.share > 0.95 and report.target_after.successes == 0
    assert report.after is report.before
    assert report.after.refit.share > 0.95 and report.after.knn.share > 0.9
    assert min(report.after.few_shot) > 0.9


def test_a_projection_that_leaves_a_curved_trace_erases_linearly() -> None:
    report = edit(world(ring=4.0), [fold()])
    assert report.before.auroc > 0.99
    assert abs(report.recoverability) < 0.2
    assert report.after.refit.share < 0.2
    assert report.after.knn.share > 0.6  # neighbours still find the circle
    assert report.label == "linearly erased"


def test_what_leaves_no_trace_removes() -> None:
    report = edit(world(), [fold()])
    assert abs(report.recoverability) < 0.2
    assert report.after.refit.high < 0.35 and report.after.knn.high < 0.35
    assert max(report.after.few_shot) < 0.5 < min(report.before.few_shot)
    assert report.label == "removed"


def test_a_closed_gate_on_all_rows_is_the_same_projection() -> None:
    w = world()
    gated, folded = edit(w, [gate([0.0] + [1.0] * (D - 1))]), edit(w, [fold()])
    assert gated.after == folded.after and gated.label == "removed"


def test_a_gate_nearly_closed_hides_nothing_from_a_refitted_probe() -> None:
    w = world()
    report = edit(w, [gate([1e-4] + [1.0] * (D - 1))])
    assert report.label == "suppressed"
    assert report.recoverability == pytest.approx(1, abs=1e-6)


def test_the_same_scaling_of_the_class_row_alone_is_the_identity() -> None:
    report = edit(world(), [gate([0.0] + [1.0] * (D - 1), rows=(TARGET,))])
    assert report.after is report.before and report.recoverability == 1


def test_a_class_moved_into_the_middle_is_linearly_erased_yet_a_softmax_head_finds_it() -> None:
    # one-vs-rest against classes on all sides fails; a head with a row for each side does not
    report = edit(world(centred=True), [fold()])
    assert abs(report.recoverability) < 0.2
    assert report.after.refit.share > 0.9
    assert report.label == "linearly erased"


def test_an_edit_too_weak_is_no_suppression() -> None:
    report = edit(world(), [lower_bias(1e-3)])
    assert report.label == "not suppressed"
    assert report.runner_up.n == 0 and np.isnan(report.runner_up.share)
    assert (report.runner_up.low, report.runner_up.high) == (0, 1)


def test_edits_of_layers_before_the_head_go_through_judge() -> None:
    w = world()
    before = measure_features(w.train, w.val, TARGET)
    op = fold()
    assert isinstance(op, FoldInput)
    x = [op.transform(x.double()) for x, _ in (w.train, w.val)]
    after = measure_features((x[0], w.train[1]), (x[1], w.val[1]), TARGET)
    logits = w.val[0] @ w.weight.T + w.bias
    edited = x[1].float() @ w.weight.T + w.bias
    assert judge(before, after, logits, edited, w.val[1]) == edit(w, [op])


def figures(auroc: float, recall: Proportion) -> FeatureFigures:
    return FeatureFigures(0, auroc, (recall.share,), recall, recall, chance=0.1)


def verdict(n: int, auroc: float = 0.5, kept: int = 0, recall: int = 0, original: float = 1.0):  # type: ignore[no-untyped-def]
    """The label of `n` samples of class 0, `kept` still called so, `recall` found by refits."""
    label = torch.tensor([0] * n + [1] * 5)
    before = torch.eye(2)[label]
    after = torch.eye(2)[torch.tensor([0] * kept + [1] * (n - kept + 5))]
    found = figures(auroc, Proportion.of(recall, n))
    report = judge(figures(original, Proportion.of(n, n)), found, before, after, label)
    return report.label


@pytest.mark.parametrize(
    ("case", "label"),
    [
        ({"n": 16}, "linearly erased"),  # 0 of 16 may still be 20.6 %
        ({"n": 17}, "removed"),
        ({"n": 100, "recall": 20}, "linearly erased"),
        ({"n": 100, "auroc": 0.61}, "suppressed"),
        ({"n": 100, "auroc": 0.59}, "removed"),
        ({"n": 100, "auroc": 0.3}, "removed"),
        ({"n": 100, "kept": 10}, "removed"),
        ({"n": 100, "kept": 11}, "not suppressed"),
        ({"n": 100, "original": 0.55}, "suppressed"),  # nothing to erase: the weakest claim
    ],
)
def test_where_one_label_ends_and_the_next_begins(case: dict, label: str) -> None:
    assert verdict(**case) == label


def test_a_class_that_was_never_called_cannot_be_suppressed() -> None:
    label = torch.tensor([0, 0, 1, 1])
    logits = torch.eye(2)[[1, 1, 1, 1]]
    found = figures(0.5, Proportion.of(0, 2))
    report = judge(figures(1.0, Proportion.of(2, 2)), found, logits, logits, label)
    assert report.label == "not suppressed"


# ------------------------------------------------------------------------ the figures


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 5, generator=generator)
    y = (x[:, 0] + 1.5 * torch.randn(300, generator=generator) > 0).long()
    found = measure_features((x[:200], y[:200]), (x[200:], y[200:]), 1)
    scaler = StandardScaler().fit(x[:200].double().numpy())
    probe = LogisticRegression().fit(scaler.transform(x[:200].double().numpy()), y[:200].numpy())
    score = probe.decision_function(scaler.transform(x[200:].double().numpy()))
    own = (y[200:] == 1).numpy()
    pairs = [(a > b) + 0.5 * (a == b) for a in score[own] for b in score[~own]]
    assert found.auroc == pytest.approx(np.mean(pairs), abs=2e-3)
    assert 0.6 < found.auroc < 0.9


def test_neighbours_and_chance_against_a_plain_loop() -> None:
    train, val = samples(20, 0, 2.0), samples(10, 1, 2.0)
    found = measure_features(train, val, TARGET, ProbeSettings(neighbours=3))
    mean, std = train[0].double().mean(0), train[0].double().std(0, correction=0)
    x, q = (train[0].double() - mean) / std, (val[0].double() - mean) / std
    hits = 0
    for row in q[val[1] == TARGET]:
        nearest = train[1][(x - row).norm(dim=1).argsort()[:3]]
        hits += int(nearest.bincount(minlength=K).argmax() == TARGET)
    assert found.knn == Proportion.of(hits, 10)
    assert found.chance == 0.25


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=D, max_size=D), st.integers(0, 3))
def test_figures_do_not_depend_on_the_scale_of_channels(scale: list[float], seed: int) -> None:
    train, val = samples(15, seed, 2.0), samples(15, seed + 9, 2.0)
    f = torch.tensor(scale, dtype=torch.float64)
    quick = ProbeSettings(seeds=(0,))
    plain = measure_features(train, val, TARGET, quick)
    scaled = measure_features((train[0] * f, train[1]), (val[0] * f, val[1]), TARGET, quick)
    assert scaled.auroc == pytest.approx(plain.auroc, abs=5e-3)
    assert abs(scaled.knn.successes - plain.knn.successes) <= 1


def test_constant_channels_and_a_constant_everything() -> None:
    train, val = samples(20, 0, 0.0), samples(20, 1, 0.0)
    nothing = (torch.zeros_like(train[0]), train[1]), (torch.zeros_like(val[0]), val[1])
    assert measure_features(*nothing, TARGET).auroc == 0.5


def test_few_shots_take_that_many_of_each_class_and_the_cap_holds() -> None:
    from salve_lm.removal.probes import _draw

    label = torch.tensor([0] * 50 + [1] * 30 + [2] * 5)
    rows = _draw(label, 10, seed=1)
    assert label[rows].bincount().tolist() == [10, 10, 5]
    assert len(rows.unique()) == 25 and rows.tolist() == sorted(rows.tolist())
    assert not torch.equal(rows, _draw(label, 10, seed=2))
    assert torch.equal(rows, _draw(label, 10, seed=1))
    train, val = samples(40, 0, 0.0), samples(10, 1, 0.0)
    capped = measure_features(train, val, TARGET, ProbeSettings(per_class=10, seeds=(0,)))
    assert capped.few_shot == (capped.refit.share,)  # ten a class, both times


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_runner_up_share_against_a_plain_loop(seed: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.randint(0, 6, (2, 12, classes), generator=generator).float()
    changed = to_second = 0
    for old, new in zip(before.tolist(), after.tolist(), strict=True):
        first = old.index(max(old))
        rest = [v if k != first else float("-inf") for k, v in enumerate(old)]
        if (now := new.index(max(new))) != first:
            changed += 1
            to_second += now == rest.index(max(rest))
    assert runner_up_share(before, after)[:2] == (to_second, changed)


def test_original_figures_are_used_where_given() -> None:
    w = world()
    before = measure_features(w.train, w.val, TARGET)
    assert edit(w, [lower_bias(50)], original=before).before is before


def test_a_report_is_plain_json() -> None:
    report = edit(world(), [lower_bias(1e-3)])
    back = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert back["label"] == "not suppressed" and back["recoverability"] == 1
    assert back["runner_up_share"] is None and back["runner_up"]["n"] == 0
    assert back["target_after"]["high"] <= 1
    assert len(back["before"]["few_shot"]) == 5 and back["after"]["knn"]["n"] == 120


def test_the_same_data_give_the_same_report() -> None:
    w = world(ring=3.0)
    assert edit(w, [fold()]) == edit(w, [fold()])


# ------------------------------------------------------------------------ T


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["fold", "shift", "gate"]), min_size=1, max_size=4),
    st.integers(0, 9999),
)
def test_the_edited_head_on_x_is_the_original_head_on_mapped_x(kinds: list[str], s: int) -> None:
    generator = torch.Generator().manual_seed(s)
    ops: list[Op] = []
    for kind in kinds:
        v, q = torch.randn(2, D, generator=generator, dtype=torch.float64)
        if kind == "gate":
            ops.append(gate(torch.rand(D, generator=generator).tolist()))
        else:
            ops.append(fold(0.3 * v, 0.3 * q if kind == "fold" else None, 0.7, offset=0.4))
    weight, bias = torch.randn(K, D, generator=generator), torch.randn(K, generator=generator)
    x = torch.randn(5, D, generator=generator)
    new = {"fc.weight": weight, "fc.bias": bias}
    new |= apply(new, ops)
    mapped = feature_map(ops, "fc", K)
    assert mapped is not None
    want = mapped(x.double()) @ weight.double().T + bias
    got = x.double() @ new["fc.weight"].double().T + new["fc.bias"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_single_rows_biases_and_outputs_leave_the_inputs_alone() -> None:
    unit = torch.ones(K, dtype=torch.float64)
    outputs = ScaleChannels(
        module="fc", output_dim=0, alpha=0.5, c=unit[None], sign=-1, axis="output"
    )
    update = RankOneUpdate(module="fc", output_dim=0, alpha=1.0, left=unit, right=E0)
    rows = gate([0.5] * D, rows=(1, 2))
    for op in (lower_bias(1), outputs, update, rows):
        assert feature_map([op], "fc", K) is None
    assert feature_map([gate([0.5] * D, rows=(3, 1, 0, 2))], "fc", K) is not None


def test_plans_of_specs_give_their_map() -> None:
    model = nn.Sequential(nn.Linear(D, K))
    studied = PlainModel(model, "0")
    bias = plan_edit(LowerClassBias(target_class=1, alpha=2.0), studied)
    assert feature_map(bias.ops, "0", K) is None
    for rows, whole in (("all", True), ("class", False)):
        spec = DecoderGuided(target_class=1, alpha=1.0, guide="head_row", rows=rows)
        mapped = feature_map(plan_edit(spec, studied).ops, "0", K)
        assert (mapped is not None) == whole
        if mapped is not None:
            new = apply(dict(model.named_parameters()), plan_edit(spec, studied).ops)
            x = torch.rand(3, D)
            want = nn.functional.linear(x, new["0.weight"], model[0].bias)
            torch.testing.assert_close(model(mapped(x)), want)


# ------------------------------------------------------------------------ bad input


def test_an_edit_of_another_layer_is_refused_with_the_way_out() -> None:
    op = dataclasses.replace(fold(), module="layer4.conv")
    with pytest.raises(UnsupportedEdit, match=r"'layer4.conv'.*measure_features and judge"):
        feature_map([op], "fc", K)


def test_bad_features() -> None:
    train, val = samples(5, 0, 0.0), samples(5, 1, 0.0)
    own = train[1] == TARGET
    with pytest.raises(EmptyClass, match=r"'7' has no samples in the train features"):
        measure_features(train, val, 7)
    with pytest.raises(EmptyClass, match="the val features"):
        measure_features(train, (val[0][~own], val[1][~own]), TARGET)
    with pytest.raises(BadConfig, match="train features are all of class 0"):
        measure_features((train[0][own], train[1][own]), val, TARGET)
    with pytest.raises(ShapeMismatch, match="expected \\[n, d_in\\]"):
        measure_features((train[0], train[1][1:]), val, TARGET)
    with pytest.raises(ShapeMismatch, match="8 channels, held-out ones 7"):
        measure_features(train, (val[0][:, 1:], val[1]), TARGET)
    with pytest.raises(NotFinite, match="features of val"):
        measure_features(train, (val[0] / 0, val[1]), TARGET)


def test_bad_logits() -> None:
    found = figures(1.0, Proportion.of(1, 1))
    label, z = torch.tensor([0, 1]), torch.zeros(2, 2)
    with pytest.raises(ShapeMismatch, match="same samples"):
        judge(found, found, z, z[:1], label)
    with pytest.raises(ShapeMismatch, match="same samples"):
        judge(found, found, z, z, label[:1])
    with pytest.raises(EmptyClass, match="held-out samples"):
        judge(found, found, z, z, label + 1)
    with pytest.raises(BadConfig, match="class 0 before and of 1"):
        judge(found, dataclasses.replace(found, target=1), z, z, label)
    with pytest.raises(ShapeMismatch, match="2 or more"):
        runner_up_share(z[:, :1], z[:, :1])


def test_bad_settings() -> None:
    with pytest.raises(BadConfig, match="at least one seed"):
        ProbeSettings(seeds=())
    with pytest.raises(BadConfig, match="at least 1"):
        ProbeSettings(neighbours=0)
    for wrong in ({"low_recall": 1.5}, {"min_auroc": 0.5}):
        with pytest.raises(BadConfig, match="between 0 and 1"):
            Thresholds(**wrong)
