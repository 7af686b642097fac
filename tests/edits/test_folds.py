"""Edits that fold a map of the input into the layer, and the other comparators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from salve_lm.edits import (
    DirectionalAblation,
    DiscriminantErasure,
    EditSpec,
    LatentContrastErasure,
    LowerClassBias,
    PlainModel,
    RankOneHead,
    ShrinkClassRow,
    Steering,
    apply,
    plan_edit,
)
from salve_lm.edits.ops import FoldInput
from salve_lm.errors import BadConfig, NameNotFound, SalveError, ShapeMismatch, UnsupportedEdit
from tests.edits.tiny import D_IN, D_SAE, NAMES, Fixture, K, Net, state, write_table


def head_after(tiny: Fixture, spec: EditSpec) -> tuple[np.ndarray, np.ndarray]:
    """W and b of the edited head, float64."""
    plan = plan_edit(spec, tiny.studied, tiny.context, NAMES)
    after = state(tiny.studied.model) | apply(state(tiny.studied.model), plan.ops)
    return after["fc.weight"].double().numpy(), after["fc.bias"].double().numpy()


def head_before(tiny: Fixture) -> tuple[np.ndarray, np.ndarray]:
    fc = tiny.studied.model.fc
    return fc.weight.detach().double().numpy(), fc.bias.detach().double().numpy()


def erasure_oracle(tiny: Fixture, i: int, top_k: int, shrinkage: float = 0.1) -> Any:
    """METHODS 3b from the samples themselves, in latents: returns (S, T) with T(x, alpha)."""
    x, y = tiny.x.double().numpy(), tiny.label.numpy()
    sae = tiny.context.sae(tiny.sae)
    from salve_lm.sae import load_sae

    b_enc = load_sae(sae.path).b_enc.detach().double().numpy()
    enc, dec = tiny.encoder.numpy(), tiny.decoder.numpy()
    z = x @ enc + b_enc
    mu = np.stack([z[y == k].mean(0) for k in range(K)])
    mu_rest = np.delete(mu, i, axis=0).mean(0)
    rows, _ = head_before(tiny)
    scores = (dec @ (rows[i] - rows.mean(0))) * (mu[i] - mu_rest)
    chosen = np.argsort(-scores, kind="stable")[:top_k]
    delta = mu[i, chosen] - mu_rest[chosen]
    within = (z - mu[y])[:, chosen]
    cov = within.T @ within / len(z)
    n = len(chosen)
    cov = (1 - shrinkage) * cov + shrinkage * np.trace(cov) / n * np.eye(n)
    solved = np.linalg.solve(cov, delta)
    u = solved / (delta @ solved)
    v = delta @ dec[chosen]

    def transform(x: np.ndarray, alpha: float) -> np.ndarray:
        s = (x @ enc[:, chosen] + b_enc[chosen] - mu_rest[chosen]) @ u
        return x - alpha * s[:, None] * v

    return chosen, transform


@pytest.mark.parametrize("top_k", [1, 3, D_SAE, 1000])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_erasure_folds_exactly(tiny: Fixture, top_k: int, alpha: float) -> None:
    spec = LatentContrastErasure(target_class="tower", top_k=top_k, alpha=alpha, **tiny.paths)
    chosen, transform = erasure_oracle(tiny, 2, top_k)
    plan = plan_edit(spec, tiny.studied, tiny.context)
    assert plan.features == tuple(chosen)
    assert plan.target == 2
    w, b = head_before(tiny)
    new_w, new_b = head_after(tiny, spec)
    # new inputs, not only the samples the statistics came from
    x = np.random.default_rng(0).normal(size=(50, D_IN)) * 3
    np.testing.assert_allclose(
        x @ new_w.T + new_b, transform(x, alpha) @ w.T + b, rtol=1e-4, atol=1e-4
    )
    (op,) = plan.ops
    assert isinstance(op, FoldInput)
    np.testing.assert_allclose(op.transform(torch.from_numpy(x)), transform(x, alpha), rtol=1e-7)
    assert np.linalg.matrix_rank(new_w - w, tol=1e-4) == 1


def test_full_erasure_takes_the_class_mean_where_the_others_are(tiny: Fixture) -> None:
    spec = LatentContrastErasure(target_class=1, top_k=5, **tiny.paths)
    (op,) = plan_edit(spec, tiny.studied, tiny.context).ops
    table = tiny.table
    chosen = list(plan_edit(spec, tiny.studied, tiny.context).features)
    rest = table.x_mean_rest(1)
    torch.testing.assert_close(op.transform(rest[None])[0], rest)
    moved = table.x_mean[1] - op.transform(table.x_mean[1:2])[0]
    delta = table.mean_contrast(1)[chosen]
    torch.testing.assert_close(moved, delta @ tiny.decoder[chosen])


def test_erasure_of_random_latents_folds_those(tiny: Fixture) -> None:
    def latents(seed: int, choose: str = "random") -> tuple[int, ...]:
        spec = LatentContrastErasure(
            target_class=1,
            top_k=4,
            choose=choose,
            seed=seed,
            **tiny.paths,  # type: ignore[arg-type]
        )
        return plan_edit(spec, tiny.studied, tiny.context).features

    drawn = {latents(seed) for seed in range(8)}
    assert len(drawn) > 4
    assert all(len(set(d)) == 4 for d in drawn)
    assert latents(3) == latents(3)
    assert latents(0, "best") == latents(1, "best") == tuple(erasure_oracle(tiny, 1, 4)[0])
    everything = LatentContrastErasure(target_class=1, top_k=99, **tiny.paths)
    shuffled = LatentContrastErasure(target_class=1, top_k=99, choose="random", **tiny.paths)
    for a, b in zip(head_after(tiny, everything), head_after(tiny, shuffled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # all of them in another order


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_discriminant_erasure_is_linear_discriminant_analysis(tiny: Fixture, alpha: float) -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    i = 2
    spec = DiscriminantErasure(
        target_class="tower", alpha=alpha, shrinkage=1e-9, features=tiny.features
    )
    (op,) = plan_edit(spec, tiny.studied, tiny.context).ops
    assert isinstance(op, FoldInput)
    x, y = tiny.x.double().numpy(), tiny.label.numpy()
    means = np.stack([x[y == k].mean(0) for k in range(K)])
    rest = np.delete(means, i, axis=0).mean(0)
    # the oracle: centre every class, then put the two clouds at the two means
    two = np.concatenate([x - means[y] + rest, x - means[y] + means[i]])
    lda = LinearDiscriminantAnalysis(solver="lsqr").fit(two, np.repeat([0, 1], len(x)))
    q = lda.coef_[0] / (lda.coef_[0] @ (means[i] - rest))
    fresh = np.random.default_rng(1).normal(size=(40, D_IN)) * 2
    moved = fresh - alpha * ((fresh - rest) @ q)[:, None] * (means[i] - rest)
    np.testing.assert_allclose(op.transform(torch.from_numpy(fresh)), moved, rtol=1e-4, atol=1e-6)
    w, b = head_before(tiny)
    new_w, new_b = head_after(tiny, spec)
    np.testing.assert_allclose(fresh @ new_w.T + new_b, moved @ w.T + b, rtol=1e-3, atol=1e-3)


def test_erasure_with_a_relu_sae_reads_pre_activations(tiny: Fixture, tmp_path: Path) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE))
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in sae.parameters():
            tensor.copy_(torch.randn_like(tensor))
    sae.save_model(tmp_path / "relu")
    features = write_table(tmp_path / "features", str(tmp_path / "relu"), tiny.x, tiny.label)
    spec = LatentContrastErasure(
        target_class=1, top_k=4, sae=str(tmp_path / "relu"), features=features
    )
    plan = plan_edit(spec, tiny.studied)
    enc = sae.W_enc.detach().double()[:, list(plan.features)]
    pre = (tiny.x - sae.b_dec.detach()).double() @ enc + sae.b_enc.detach()[list(plan.features)]
    means = torch.stack([pre[tiny.label == k].mean(0) for k in range(K)])
    rest = (means.sum(0) - means[1]) / (K - 1)
    (op,) = plan.ops
    score = tiny.x.double() @ op.q + op.offset
    # s is linear in the pre-activations, 0 at the others' mean and 1 at the class's own
    coefficients = torch.linalg.lstsq(pre - rest, score[:, None]).solution
    torch.testing.assert_close((pre - rest) @ coefficients, score[:, None])
    torch.testing.assert_close(score[tiny.label == 1].mean(), torch.tensor(1.0).double())


def test_directional_ablation(tiny: Fixture) -> None:
    w, b = head_before(tiny)
    d = tiny.decoder[3].numpy()
    d /= np.linalg.norm(d)
    new_w, new_b = head_after(tiny, DirectionalAblation(feature=3, sae=tiny.sae))
    np.testing.assert_allclose(new_w @ d, 0, atol=1e-5)
    np.testing.assert_allclose(new_w, w - np.outer(w @ d, d), atol=1e-5)
    np.testing.assert_array_equal(new_b, b)
    half, _ = head_after(tiny, DirectionalAblation(feature=3, sae=tiny.sae, alpha=0.5))
    np.testing.assert_allclose(half @ d, (w @ d) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 1])
def test_directional_ablation_of_a_convolution(tiny: Fixture, padding: int) -> None:
    conv = nn.Conv2d(D_IN, 3, 3, padding=padding)
    model = PlainModel(nn.Sequential(conv))
    spec = DirectionalAblation(module="0", feature=3, alpha=1.5, sae=tiny.sae)
    plan = plan_edit(spec, model, tiny.context)
    after = apply(state(model.model), plan.ops)
    image = torch.randn(2, D_IN, 6, 6)
    moved = plan.ops[0].transform(image.movedim(1, -1).double()).movedim(-1, 1).float()
    seen = nn.functional.conv2d(image, after["0.weight"], conv.bias, padding=padding)
    torch.testing.assert_close(seen, conv(moved), rtol=1e-4, atol=1e-5)


def steering_direction(tiny: Fixture, latent: int, k: int | None) -> Tensor:
    d = tiny.decoder[latent] / tiny.decoder[latent].norm()
    return d if k is None else tiny.table.sign(k, latent) * d


@pytest.mark.parametrize("direction", ["suppress", "enhance"])
@pytest.mark.parametrize("target", [None, 0, 1, 2, 3])
def test_steering_is_a_bias_edit(tiny: Fixture, direction: str, target: int | None) -> None:
    w, b = head_before(tiny)
    spec = Steering(feature=2, direction=direction, target_class=target, alpha=2.5, **tiny.paths)  # type: ignore[arg-type]
    new_w, new_b = head_after(tiny, spec)
    sign = 1 if direction == "enhance" else -1
    d = sign * steering_direction(tiny, 2, target).numpy()
    np.testing.assert_array_equal(new_w, w)
    np.testing.assert_allclose(new_b, b + 2.5 * w @ d, rtol=1e-5, atol=1e-6)


def test_steering_suppresses_what_the_class_has_more_of(tiny: Fixture) -> None:
    table = tiny.table
    for k in range(K):
        latent = table.selective(k)
        _, v = Steering(target_class=k, feature=latent, **tiny.paths).vector(plan_scope(tiny))
        # W_dec[l] z_l is what the latent writes; the class has sign * z_l more of it
        assert float(v @ tiny.decoder[latent]) * float(table.mean_contrast(k)[latent]) < 0


def plan_scope(tiny: Fixture) -> Any:
    from salve_lm.edits.scope import Scope

    model = tiny.studied.model
    return Scope("fc", model.fc, model, True, tiny.context)


def test_rank_one_head(tiny: Fixture) -> None:
    w, b = head_before(tiny)
    x, y = tiny.x.double().numpy(), tiny.label.numpy()
    key = x[y == 1].mean(0)
    moment = x.T @ x / len(x)
    moment += 1e-3 * np.trace(moment) / D_IN * np.eye(D_IN)
    solved = np.linalg.solve(moment, key)
    z = w @ key + b
    for against, rest in (("max", np.delete(z, 1).max()), ("mean", np.delete(z, 1).mean())):
        spec = RankOneHead(target_class=1, alpha=1.5, against=against, features=tiny.features)  # type: ignore[arg-type]
        new_w, new_b = head_after(tiny, spec)
        expected = w.copy()
        expected[1] -= 1.5 * (z[1] - rest) * solved / (key @ solved)
        np.testing.assert_allclose(new_w, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(new_b, b)
    level, _ = head_after(tiny, RankOneHead(target_class=1, features=tiny.features))
    after = level @ key + b
    np.testing.assert_allclose(after[1], np.delete(z, 1).max(), rtol=1e-5)
    # least change elsewhere: no smaller squared change over the inputs reaches the same value
    other = w[1] - (z[1] - after[1]) * key / (key @ key)
    ours = np.mean((x @ (level[1] - w[1])) ** 2)
    assert ours <= np.mean((x @ (other - w[1])) ** 2) * (1 + 1e-6)


def test_trivial_controls(tiny: Fixture) -> None:
    w, b = head_before(tiny)
    new_w, new_b = head_after(tiny, LowerClassBias(target_class="tower", alpha=2.0))
    np.testing.assert_array_equal(new_w, w)
    np.testing.assert_allclose(new_b - b, [0, 0, -2, 0], atol=1e-6)
    _, raised = head_after(tiny, LowerClassBias(target_class="tower", alpha=-2.0))
    np.testing.assert_allclose(raised - b, [0, 0, 2, 0], atol=1e-6)
    for alpha, factor in ((0.25, 0.75), (1.0, 0.0), (3.0, 0.0)):
        new_w, new_b = head_after(tiny, ShrinkClassRow(target_class="tower", alpha=alpha))
        np.testing.assert_allclose(new_w, w * np.array([1, 1, factor, 1])[:, None], rtol=1e-6)
        np.testing.assert_array_equal(new_b, b)


def test_with_alpha_scales_every_edit(tiny: Fixture) -> None:
    specs: list[EditSpec] = [
        LatentContrastErasure(target_class=1, **tiny.paths),
        DirectionalAblation(target_class=1, **tiny.paths),
        Steering(target_class=1, **tiny.paths),
        RankOneHead(target_class=1, features=tiny.features),
        LowerClassBias(target_class=1),
        ShrinkClassRow(target_class=1),
    ]
    import dataclasses

    for spec in specs:
        base = state(tiny.studied.model)
        for alpha in type(spec).default_alphas:
            swept = plan_edit(spec, tiny.studied, tiny.context).with_alpha(alpha)
            again = dataclasses.replace(spec, alpha=alpha)
            fresh = plan_edit(again, tiny.studied, tiny.context)
            a, b = apply(base, swept.ops), apply(base, fresh.ops)
            assert swept.spec == again
            assert a.keys() == b.keys()
            assert all(torch.equal(a[n], b[n]) for n in a)


def test_edits_in_order_compose(tiny: Fixture) -> None:
    """A fold reads the weights that the edits before it left: W (I - a d d^T) (I - b e e^T)."""
    from salve_lm.edits import apply_named, plan_edits

    w, _ = head_before(tiny)
    specs = [
        DirectionalAblation(name="first", feature=3, sae=tiny.sae),
        DirectionalAblation(name="second", feature=4, alpha=0.5, sae=tiny.sae),
    ]
    plans = plan_edits(specs, tiny.studied, tiny.context)
    after = apply_named(state(tiny.studied.model), [p.named for p in plans]).tensors["fc.weight"]
    d, e = (tiny.decoder[n].numpy() / np.linalg.norm(tiny.decoder[n].numpy()) for n in (3, 4))
    eye = np.eye(D_IN)
    expected = w @ (eye - np.outer(d, d)) @ (eye - 0.5 * np.outer(e, e))
    np.testing.assert_allclose(after.numpy(), expected, atol=1e-5)


def unusual(tiny: Fixture, **layers: nn.Module) -> PlainModel:
    return PlainModel(nn.ModuleDict(layers), "fc")


def test_bad_input(tiny: Fixture, tmp_path: Path) -> None:
    paths, table = tiny.paths, {"features": tiny.features}
    no_bias = PlainModel(Net(bias=False), "fc")
    padded = unusual(tiny, fc=nn.Conv2d(D_IN, K, 1, padding=1))
    wide = unusual(tiny, fc=nn.Conv2d(D_IN, K, 3))
    other = unusual(tiny, fc=nn.Linear(D_IN, K), a=nn.Linear(D_IN, K))
    cases: list[tuple[EditSpec, Any, type[SalveError], str]] = [
        (LatentContrastErasure(**paths), tiny.studied, BadConfig, "target_class"),
        (LatentContrastErasure(target_class=1, **paths), padded, UnsupportedEdit, "pads"),
        (LatentContrastErasure(target_class=1, **paths), wide, UnsupportedEdit, "kernel"),
        (LatentContrastErasure(target_class=1, module="a", **paths), other, UnsupportedEdit, "head"),  # noqa: E501
        (LatentContrastErasure(target_class=1, sae=tiny.sae), tiny.studied, BadConfig, "features"),
        (LatentContrastErasure(target_class=1, **paths), no_bias, UnsupportedEdit, "fc.bias"),
        (DiscriminantErasure(target_class=1), tiny.studied, BadConfig, "features"),
        (DiscriminantErasure(**table), tiny.studied, BadConfig, "target_class"),
        (DiscriminantErasure(target_class=1, **table), padded, UnsupportedEdit, "pads"),
        (DiscriminantErasure(contrast="pmp", **table), tiny.studied, NameNotFound, "'pump'"),
        (DiscriminantErasure(target_class=1, module="hidden", **table), tiny.studied, ShapeMismatch, "fc"),  # noqa: E501
        (Steering(feature=1, **paths), no_bias, UnsupportedEdit, "no bias"),
        (Steering(feature=1, **paths), padded, UnsupportedEdit, "pads"),
        (Steering(feature=1, module="hidden", **paths), tiny.studied, ShapeMismatch, "fc"),
        (Steering(**paths), tiny.studied, BadConfig, "Name a `feature`"),
        (Steering(feature=1, target_class="tower", sae=tiny.sae), tiny.studied, BadConfig, "set `features`"),  # noqa: E501
        (DirectionalAblation(feature=77, **paths), tiny.studied, NameNotFound, "0 to 11"),
        (RankOneHead(target_class="twer", features=tiny.features), tiny.studied, NameNotFound, "'tower'"),  # noqa: E501
        (RankOneHead(target_class=1), tiny.studied, BadConfig, "features"),
        (LowerClassBias(target_class=1), no_bias, UnsupportedEdit, "ShrinkClassRow"),
        (LowerClassBias(), tiny.studied, BadConfig, "target_class"),
        (LowerClassBias(target_class="tower"), tiny.studied, BadConfig, "without class names"),
        (ShrinkClassRow(target_class=4), tiny.studied, NameNotFound, "4 classes"),
        (ShrinkClassRow(target_class=0, module="a"), other, UnsupportedEdit, "not classes"),
    ]  # fmt: skip
    for spec, model, error, message in cases:
        with pytest.raises(error, match=message):
            plan = plan_edit(spec, model, tiny.context)
            apply(state(model.model), plan.ops)
    for make in (
        lambda: LatentContrastErasure(top_k=0),
        lambda: LatentContrastErasure(shrinkage=0.0),
        lambda: DiscriminantErasure(shrinkage=1.5),
        lambda: RankOneHead(ridge=0.0),
    ):
        with pytest.raises(BadConfig):
            make()
    with pytest.raises(NameNotFound, match="Did you mean 'random'"):
        LatentContrastErasure(choose="randm")  # type: ignore[arg-type]


def test_rank_one_needs_a_class_that_is_recognised(tiny: Fixture) -> None:
    model = Net()
    model.load_state_dict(tiny.studied.model.state_dict())
    with torch.no_grad():
        model.fc.bias[1] -= 100
    spec = RankOneHead(target_class=1, features=tiny.features)
    with pytest.raises(UnsupportedEdit, match=r"'golf ball' lies .* below the others"):
        plan_edit(spec, PlainModel(model, "fc"), tiny.context)


def test_a_normalising_encoder_is_refused(tiny: Fixture, tmp_path: Path) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig

    config = StandardSAEConfig(d_in=D_IN, d_sae=D_SAE, normalize_activations="layer_norm")
    sae = StandardSAE(config)
    sae.save_model(tmp_path / "ln")
    features = write_table(tmp_path / "features", str(tmp_path / "ln"), tiny.x, tiny.label)
    spec = LatentContrastErasure(target_class=1, sae=str(tmp_path / "ln"), features=features)
    with pytest.raises(UnsupportedEdit, match="normalisation 'layer_norm'"):
        plan_edit(spec, tiny.studied)
