"""Roles and gains against the models themselves: edit a direction, watch what passes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from salve_lm.errors import UnsupportedEdit
from salve_lm.language import decoder_prefix
from salve_lm.language.residual import residual_role, stores_inputs_first
from salve_lm.task_vectors.projection import centred_basis, project, random_basis
from tests.task_vectors.pair import FAMILIES, build_pair

READS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_attn", "c_fc"}
WRITES = {"o_proj", "down_proj", "c_proj"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_has_its_role(family: str, tmp_path: Path) -> None:
    pair = build_pair(tmp_path, family)
    config = pair.model.config
    for name, tensor in pair.theta.items():
        role = residual_role(name, config)
        module = name.split(".")[-2]
        in_layer = name.startswith(decoder_prefix(config))
        if in_layer and tensor.ndim == 2:
            assert role is not None
            assert role.reads == (module in READS)
            assert (module in WRITES) == (not role.reads)
        elif role is not None:  # the bias of a writing layer
            assert in_layer
            assert module in WRITES
        if role is not None:
            assert tensor.shape[role.axis] == 16
            assert (role.norm is None) or pair.theta[role.norm].shape == (16,)
            assert role.centred == (family == "gpt2" and role.reads)
            assert role.offset == (1.0 if "gemma3" in family and role.norm else 0.0)
            conv1d = family == "gpt2" and tensor.ndim == 2
            assert role.axis == ((0 if conv1d else 1) if role.reads else int(conv1d))
            assert stores_inputs_first(name, tensor.ndim, config) == conv1d


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projected_reader_sees_only_the_subspace(family: str, tmp_path: Path) -> None:
    """A reading change projected on Q gives nothing for a stream orthogonal to Q."""
    pair = build_pair(tmp_path, family)
    layer = pair.model.get_submodule(f"{decoder_prefix(pair.model.config)}.1")
    first, norm = (
        ("attn.c_attn", layer.ln_1) if family == "gpt2"
        else ("self_attn.v_proj", layer.input_layernorm)
    )  # fmt: skip
    name = f"{decoder_prefix(pair.model.config)}.1.{first}.weight"
    role = residual_role(name, pair.model.config)
    assert role is not None
    assert role.norm is not None
    basis = random_basis(16, 4, 0)
    gain = role.gain(pair.theta[role.norm])
    change = project(pair.tau[name], basis, role.axis, gain, role.centred).float()
    q = centred_basis(basis) if role.centred else basis
    stream = torch.randn(5, 16, dtype=torch.float64)
    if role.centred:
        stream -= stream.mean(1, keepdim=True)
    orthogonal = (stream - stream @ q @ q.T).float()
    inside = (stream @ q @ q.T).float()
    matrix = change if role.axis == 0 else change.T
    bias = norm.bias if family == "gpt2" else 0
    with torch.no_grad():
        assert ((norm(orthogonal) - bias) @ matrix).abs().max() < 1e-5
        assert ((norm(inside) - bias) @ matrix).abs().max() > 1e-3
        # without the gain most of it would pass
        plain = project(pair.tau[name], basis, role.axis).float()
        plain = plain if role.axis == 0 else plain.T
        assert ((norm(orthogonal) - bias) @ plain).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projected_writer_writes_only_into_the_subspace(family: str, tmp_path: Path) -> None:
    pair = build_pair(tmp_path, family)
    layer = pair.model.get_submodule(f"{decoder_prefix(pair.model.config)}.1")
    inside = "mlp.c_proj" if family == "gpt2" else "mlp.down_proj"
    name = f"{decoder_prefix(pair.model.config)}.1.{inside}.weight"
    role = residual_role(name, pair.model.config)
    assert role is not None
    gain = torch.ones(16) if role.norm is None else role.gain(pair.theta[role.norm])
    basis = random_basis(16, 4, 0)
    change = project(pair.tau[name], basis, role.axis, gain).float()
    matrix = change if role.axis == 1 else change.T  # [inputs, stream]
    written = torch.randn(5, matrix.shape[0]) @ matrix
    if "gemma3" in family:
        with torch.no_grad():
            written = layer.post_feedforward_layernorm(written)
    left = written.double() - written.double() @ basis @ basis.T
    assert left.abs().max() < 1e-5
    assert written.abs().max() > 1e-3


def test_unknown_families_are_refused() -> None:
    config = AutoConfig.for_model("stablelm")
    with pytest.raises(UnsupportedEdit, match="variant: raw"):
        residual_role("model.layers.0.self_attn.q_proj.weight", config)
    assert residual_role("model.norm.weight", config) is None
