from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from salve_lm.edits import PlainModel, ResidualAblation, ResidualScaling, plan_edit
from salve_lm.errors import EditConflict, UnsupportedEdit
from tests.edits.language import (
    BEFORE,
    BEHIND,
    FAMILIES,
    READERS,
    SANDWICH,
    WRITERS,
    Language,
    build,
)


@pytest.fixture(scope="module", params=FAMILIES)
def language(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Language:
    return build(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Language:
    return build(tmp_path_factory.mktemp("gemma"), "gemma3_text")


def projector(rows: Tensor, alpha: float) -> Tensor:
    """I - alpha P, P the orthogonal projector on the span of `rows`."""
    return torch.eye(rows.shape[1], dtype=torch.float64) - alpha * torch.linalg.pinv(rows) @ rows


def gain(norm: nn.Module, family: str) -> Tensor:
    return norm.weight.double() + (1.0 if family in SANDWICH else 0.0)


@pytest.mark.parametrize(("latents", "alpha"), [([1], 1.0), ([1, 5, 7], 0.6)])
def test_readers_equal_a_projected_stream(
    language: Language, latents: list[int], alpha: float
) -> None:
    edit = ResidualAblation(
        sae=language.sae, latents=latents, layers=[1, 2], reads=True, writes=False, alpha=alpha
    )
    done = language.edited(edit)
    gpt2 = language.family == "gpt2"
    modules = [f"{language.layers}.{n}.{r}" for n in (1, 2) for r in READERS[language.family]]
    expected_names = {f"{m}.weight" for m in modules}
    assert set(done.tensors) == expected_names | ({f"{m}.bias" for m in modules} if gpt2 else set())
    rows = language.decoder(1, latents)
    if gpt2:
        rows = rows - rows.mean(1, keepdim=True)  # a LayerNorm sees no mean
    p = projector(rows, alpha)

    def projected(norm: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        g = gain(norm, language.family)
        bias = norm.bias.double() if gpt2 else 0.0
        normal = (y.double() - bias) / g
        return (normal @ p * g + bias).float()

    norms = [f"{language.layers}.{n}.{b}" for n in (1, 2) for b in BEFORE[language.family]]
    with language.changed(norms, outputs=projected):
        expected = language.logits()
    assert torch.allclose(language.logits(done.tensors), expected, atol=2e-5)
    assert not torch.allclose(language.logits(), expected, atol=1e-2)


@pytest.mark.parametrize(("latents", "alpha"), [([1], 1.0), ([1, 5, 7], 0.6)])
def test_writers_equal_projected_outputs(
    language: Language, latents: list[int], alpha: float
) -> None:
    edit = ResidualAblation(sae=language.sae, latents=latents, layers="all", alpha=alpha)
    done = language.edited(edit)
    p = projector(language.decoder(1, latents), alpha)
    sandwich = language.family in SANDWICH
    epsilon = getattr(language.model.config.get_text_config(), "rms_norm_eps", 0.0)

    def projected(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not sandwich:
            return (y.double() @ p).float()
        g = gain(module, language.family)
        h = (x.double() * g) @ p / g  # what the norm is given in place of x
        return (g * h / (h.square().mean(-1, keepdim=True) + epsilon).sqrt()).float()

    where = BEHIND if sandwich else WRITERS[language.family]
    names = [f"{language.layers}.{n}.{w}" for n in range(3) for w in where]
    with language.changed(names, outputs=projected):
        expected = language.logits()
    assert torch.allclose(language.logits(done.tensors), expected, atol=2e-5)
    assert not torch.allclose(language.logits(), expected, atol=1e-2)


def test_nothing_along_the_direction_is_written(language: Language) -> None:
    edit = ResidualAblation(sae=language.sae, latents=[1, 3], layers=[2], tensors=["*mlp.*"])
    done = language.edited(edit)
    found = []
    name = BEHIND[1] if language.family in SANDWICH else WRITERS[language.family][1]
    rows = language.decoder(1, [1, 3]).float()

    def seen(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found.append((y @ rows.T).abs().max() / y.abs().max())
        return y

    with language.changed([f"{language.layers}.2.{name}"], outputs=seen):
        language.logits(done.tensors)
        language.logits()
    assert found[0] < 1e-5 and found[1] > 0.1


def test_edits_of_one_matrix_follow_each_other(language: Language) -> None:
    ablation = ResidualAblation(sae=language.sae, latents=[1], layers=[1])
    again = dataclasses.replace(ablation, latents=[2], alpha=0.5)
    scaling = ResidualScaling(
        sae=language.sae, latents=[4], layers=[1], alpha=2.0, reads=True, writes=True
    )
    at_once = language.edited(scaling, ablation, again).tensors
    model = build_copy(language)
    for edit in (scaling, ablation, again):
        model.load_state_dict(model.state_dict() | language._replace(model=model).edited(edit)[0])
    state = model.state_dict()
    assert set(at_once) >= set(language.edited(ablation).tensors)
    # gains are those of the unedited model: in the sandwich families they are scaled before
    if language.family not in SANDWICH:
        assert all(torch.allclose(t, state[n], atol=1e-6) for n, t in at_once.items())


def build_copy(language: Language) -> nn.Module:
    import copy

    return copy.deepcopy(language.model)


def test_the_unembedding(language: Language) -> None:
    edit = ResidualAblation(sae=language.sae, latents=[3], final=True)
    tied = language.model.config.tie_word_embeddings
    if tied:
        with pytest.raises(EditConflict, match="allow_tied"):
            plan_edit(edit, PlainModel(language.model, "lm_head"))
        edit = dataclasses.replace(edit, allow_tied=True)
    new = language.edited(edit).tensors["lm_head.weight"].double()
    g = gain(language.module(language.final_norm), language.family)
    rows = language.decoder(1, [3])
    if language.family == "gpt2":
        rows = rows - rows.mean(1, keepdim=True)
    old = language.model.lm_head.weight.double()
    assert torch.allclose(new * g, old * g @ projector(rows, 1.0), atol=1e-5)


def test_bad_input(gemma: Language) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(
        "stablelm", hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, vocab_size=9,
    )  # fmt: skip
    unknown = transformers.AutoModelForCausalLM.from_config(config)
    edit = ResidualAblation(sae=gemma.sae, latents=[1], layers=[0])
    with pytest.raises(UnsupportedEdit, match="stablelm"):
        plan_edit(edit, PlainModel(unknown, "lm_head"))
