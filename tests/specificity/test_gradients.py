from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from salve_lm.errors import BadConfig, NotFinite
from salve_lm.language import decoder_prefix, new_causal_lm
from salve_lm.specificity.gradients import attribute_latents, layer_gradients
from tests.language.tiny_models import CONFIGS


def loss_with(model, inputs, target, name=None, change=None):
    def hook(_module, _args, output):
        return change(output[0] if isinstance(output, tuple) else output)

    handle = dict(model.named_modules())[name].register_forward_hook(hook) if name else None
    logits = model(**inputs).logits
    if handle is not None:
        handle.remove()
    logp = F.log_softmax(logits[:, :-1].double(), dim=-1)
    own = logp.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return -(own * target[:, 1:]).sum()


@pytest.mark.parametrize("family", ["gemma3_text", "llama", "gpt2"])
@pytest.mark.parametrize("inference", [True, False])
def test_gradients_equal_finite_differences(family: str, inference: bool) -> None:
    model = new_causal_lm(CONFIGS[family])
    torch.manual_seed(0)
    before = [p.requires_grad for p in model.parameters()]
    with torch.inference_mode(inference):
        inputs = {"input_ids": torch.randint(3, 200, (2, 7)), "use_cache": False}
        target = torch.rand(2, 7) > 0.3
        modules = {n: f"{decoder_prefix(model.config)}.{n}" for n in range(3)}
        found = layer_gradients(model, modules, inputs, target)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    model.double()
    # small against the curvature, large against the norms of Gemma, which stay float32
    step = 3e-4
    with torch.no_grad():
        for n, (x, gradient) in found.items():
            direction = torch.randn(x.shape, dtype=torch.float64)
            sides = [
                loss_with(model, inputs, target, modules[n], lambda h, change=change: h + change)
                for change in (step * direction, -step * direction)
            ]
            expected = float(sides[0] - sides[1]) / (2 * step)
            found_here = float((gradient.double() * direction).sum())
            assert found_here == pytest.approx(expected, rel=5e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("standard", {"normalize_activations": "none"}),
        ("standard", {"normalize_activations": "layer_norm"}),
        ("linear_l1", {}),
        ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    ],
)
def test_attribution_equals_the_gradient_of_the_spliced_model(architecture, options) -> None:
    from salve_lm.sae import build_training_sae, to_inference

    per_sample = options.pop("normalize_activations", "none")
    sae = to_inference(
        build_training_sae(architecture, 16, 12, options, normalize_activations=per_sample, seed=0)
    ).requires_grad_(False)
    model = new_causal_lm(CONFIGS["llama"])
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 200, (2, 5)), "use_cache": False}
    target = torch.ones(2, 5, dtype=torch.bool)
    name = f"{decoder_prefix(model.config)}.1"
    x, gradient = layer_gradients(model, {1: name}, inputs, target)[1]
    flat = x.flatten(0, 1)
    with torch.inference_mode():
        z, found = attribute_latents(sae, flat, gradient.flatten(0, 1))
    leaf = sae.encode(flat).requires_grad_()
    torch.testing.assert_close(z, leaf)
    decoded = sae.decode(leaf)
    # the value is the model's own; the gradient goes through the latents
    spliced = (decoded + (flat - decoded).detach()).view_as(x)
    loss = loss_with(model, inputs, target, name, lambda _: spliced)
    (expected,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(found, (z * expected).abs(), rtol=1e-4, atol=1e-6)
    assert not bool(found[z == 0].any())
    assert float(found.sum()) > 0


def test_what_cannot_be_differentiated() -> None:
    model = new_causal_lm(CONFIGS["llama"])
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "use_cache": False}
    target = torch.ones(1, 3, dtype=torch.bool)
    with torch.no_grad():
        model.lm_head.weight[4, 0] = torch.nan
    with pytest.raises(NotFinite, match="loss"):
        layer_gradients(model, {0: "model.layers.0"}, inputs, target)
    unused = torch.nn.ModuleDict({"model": model, "other": torch.nn.Linear(1, 1)})
    unused.forward = lambda **given: model(**given)
    with pytest.raises(BadConfig, match="'other' did not run"):
        layer_gradients(unused, {0: "other"}, inputs, target)
