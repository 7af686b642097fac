from __future__ import annotations

from typing import Any

import pytest
import torch

from salve_lm.errors import BadConfig, NameNotFound
from salve_lm.sae import ARCHITECTURES, architecture_traits, build_training_sae, option_defaults


def test_every_architecture_is_saelens_own(
    architecture: str, options: dict[str, dict[str, Any]]
) -> None:
    from sae_lens.registry import get_sae_training_class

    sae = build_training_sae(architecture, 12, 24, options[architecture], seed=0)
    assert isinstance(sae, get_sae_training_class(architecture)[0])
    assert sae.cfg.architecture() == architecture
    assert sae.W_enc.shape == (12, 24) and sae.W_dec.shape == (24, 12)
    for name, value in options[architecture].items():
        assert getattr(sae.cfg, name) == value


def test_the_seed_decides_the_weights_and_leaves_the_global_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b = (build_training_sae("standard", 12, 24, seed=7) for _ in range(2))
    other = build_training_sae("standard", 12, 24, seed=8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a.W_dec, b.W_dec)
    assert not torch.equal(a.W_dec, other.W_dec)


def test_importing_twice_registers_once() -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY

    from salve_lm.sae import linear_l1

    before = SAE_CLASS_REGISTRY["linear_l1"]
    linear_l1.register()
    assert SAE_CLASS_REGISTRY["linear_l1"] == before


def test_linear_l1_refuses_to_subtract_b_dec() -> None:
    with pytest.raises(BadConfig, match="fold it: b_enc - b_dec @ W_enc"):
        build_training_sae("linear_l1", 12, 24, {"apply_b_dec_to_input": True})


def test_matryoshka_widths_have_a_default_and_are_completed_on_a_copy() -> None:
    assert build_training_sae("matryoshka_batchtopk", 12, 24, {"k": 4}).cfg.matryoshka_widths == [
        3,
        6,
        12,
        24,
    ]
    mine = [4, 8]
    sae = build_training_sae("matryoshka_batchtopk", 12, 24, {"k": 4, "matryoshka_widths": mine})
    assert sae.cfg.matryoshka_widths == [4, 8, 24]
    assert mine == [4, 8]


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("standrad", {}, NameNotFound, r"No SAE architecture named 'standrad'.*'standard'"),
        ("vanilla", {}, NameNotFound, "Known: linear_l1, standard, topk"),
        ("standard", {"l1_coeficient": 1.0}, NameNotFound, "'l1_coefficient'"),
        ("topk", {"l1_coefficient": 1.0}, NameNotFound, "option of SAE architecture 'topk'"),
        ("topk", {"k": 25}, BadConfig, "k=25 does not fit d_sae=24"),
        ("topk", {}, BadConfig, "k=100 does not fit d_sae=24.*Set options k"),
        ("topk", {"k": 0}, BadConfig, "k=0 does not fit"),
        ("topk", {"k": 2.5}, BadConfig, "k of SAE architecture 'topk' must be of type int"),
        ("topk", {"k": True}, BadConfig, "must be of type int"),
        ("standard", {"l1_coefficient": "1e-3"}, BadConfig, "must be of type float, not '1e-3'"),
        ("standard", {"l1_coefficient": float("nan")}, BadConfig, "must be of type float, not nan"),
        ("standard", {"l1_coefficient": -1.0}, BadConfig, "must not be negative"),
        ("standard", {"lp_norm": 0.0}, BadConfig, "lp_norm must be positive"),
        ("standard", {"d_in": 3}, BadConfig, "Remove 'd_in'"),
        ("standard", {"normalize_activations": "none"}, BadConfig, "normalize_input"),
        ("jumprelu", {"jumprelu_sparsity_loss_mode": "sharp"}, BadConfig, "quadratic.*'sharp'"),
        ("jumprelu", {"jumprelu_sparsity_loss_mode": "quadratic"}, BadConfig, "target_l0"),
        ("jumprelu", {"target_l0": 99.0}, BadConfig, "target_l0=99.0 does not lie"),
        ("matryoshka_batchtopk", {"k": 4, "matryoshka_widths": [8, 4]}, BadConfig, "must grow"),
        ("matryoshka_batchtopk", {"k": 4, "matryoshka_widths": [4, 48]}, BadConfig, "d_sae=24"),
        ("matryoshka_batchtopk", {"k": 4, "matryoshka_widths": 8}, BadConfig, "must be a list"),
    ],
)  # fmt: skip
def test_bad_options_name_the_cure(
    name: str, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        build_training_sae(name, 12, 24, options)


@pytest.mark.parametrize("sizes", [(0, 24), (12, 0), (12, 2.0), (True, 24)])
def test_bad_sizes(sizes: tuple[Any, Any]) -> None:
    with pytest.raises(BadConfig, match="must be a whole number of at least 1"):
        build_training_sae("standard", *sizes)


def test_per_sample_scaling_and_the_auxiliary_loss_exclude_each_other() -> None:
    with pytest.raises(BadConfig, match="aux_loss_coefficient to 0"):
        build_training_sae("topk", 12, 24, {"k": 4}, normalize_activations="layer_norm")
    options = {"k": 4, "aux_loss_coefficient": 0.0}
    build_training_sae("topk", 12, 24, options, normalize_activations="layer_norm")


def test_traits() -> None:
    assert architecture_traits("linear_l1").exact_zeros is False
    assert architecture_traits("jumprelu").warm_up_option == "l0_warm_up_steps"
    assert architecture_traits("topk").warm_up_option is None
    assert architecture_traits("topk").has_aux_loss
    assert not architecture_traits("topk", {"aux_loss_coefficient": 0.0}).has_aux_loss
    assert not architecture_traits("jumprelu").has_aux_loss
    assert architecture_traits("jumprelu", {"pre_act_loss_coefficient": 1e-6}).has_aux_loss
    assert not architecture_traits("topk", {"rescale_acts_by_decoder_norm": False}).foldable
    assert all("d_in" not in option_defaults(name) for name in ARCHITECTURES)
