from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from salve_lm.activations.sites import REDUCTIONS, SIDES, Site, parse_site, reduce_positions
from salve_lm.errors import BadConfig, NameNotFound
from tests.activations.tiny import TinyStudied

STUDIED = TinyStudied()


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("fc:input", Site("fc", "input")),
        ("pooled", Site("fc", "input")),
        ("head:input", Site("fc", "input")),
        ("head", Site("fc", "output")),
        ("conv", Site("conv", "output")),
        ("conv:mean", Site("conv", "output", "mean")),
        ("conv:input:positions", Site("conv", "input", "positions")),
        (" relu:output:cls ", Site("relu", "output", "cls")),
    ],
)
def test_parse(text: str, site: Site) -> None:
    assert parse_site(text, STUDIED) == site


@given(
    st.sampled_from(["conv", "norm", "relu", "pool", "drop", "fc", "after"]),
    st.sampled_from(SIDES),
    st.sampled_from([None, *REDUCTIONS]),
)
def test_canonical_text_is_read_back(module: str, io: str, reduce: str | None) -> None:
    site = Site(module, io, reduce)  # type: ignore[arg-type]
    assert parse_site(str(site), STUDIED) == site


def test_all_spellings_of_one_place_have_one_canonical_text() -> None:
    assert {str(parse_site(t, STUDIED)) for t in ("pooled", "head:input", "fc:input")} == {
        "fc:input"
    }


@pytest.mark.parametrize(
    ("text", "candidate"),
    [("convv", "conv"), ("poold", "pooled"), ("fc:inptu", "input"), ("conv:meen", "mean")],
)
def test_typos_suggest_the_nearest(text: str, candidate: str) -> None:
    with pytest.raises(NameNotFound, match="Did you mean") as e:
        parse_site(text, STUDIED)
    assert candidate in e.value.candidates


def test_a_model_without_head_has_no_head_site() -> None:
    headless = TinyStudied()
    headless.head_name = None
    with pytest.raises(NameNotFound, match="'head'"):
        parse_site("head", headless)


@pytest.mark.parametrize("text", ["fc:input:output", "conv:mean:output", "conv:mean:cls"])
def test_misplaced_options(text: str) -> None:
    with pytest.raises(BadConfig, match=r"MODULE\[:input\|output\]"):
        parse_site(text, STUDIED)


def site(reduce: str | None) -> Site:
    return Site("m", "output", reduce)  # type: ignore[arg-type]


def test_reductions() -> None:
    flat = torch.randn(2, 5)
    image = torch.randn(2, 5, 3, 4)
    tokens = torch.randn(2, 7, 5)
    for reduce in (None, "mean", "positions"):
        assert torch.equal(reduce_positions(flat, site(reduce)), flat)
        one = image[:, :, :1, :1]
        assert torch.equal(reduce_positions(one, site(reduce)), one[:, :, 0, 0])
    torch.testing.assert_close(
        reduce_positions(image, site("mean")), torch.einsum("nchw->nc", image) / 12
    )
    rows = reduce_positions(image, site("positions"))
    assert torch.equal(rows[1 * 12 + 2 * 4 + 3], image[1, :, 2, 3])
    assert torch.equal(reduce_positions(tokens, site("cls")), tokens[:, 0])
    torch.testing.assert_close(
        reduce_positions(tokens, site("mean")), torch.einsum("ntd->nd", tokens) / 7
    )
    assert torch.equal(reduce_positions(tokens, site("positions"))[1 * 7 + 4], tokens[1, 4])


@pytest.mark.parametrize(
    ("shape", "reduce", "message"),
    [
        ((2, 5, 3, 3), None, ":mean or :positions"),
        ((2, 7, 5), None, ":cls, :mean or :positions"),
        ((2, 5, 3, 3), "cls", "of which :cls can be taken"),
        ((2, 5), "cls", "of which :cls can be taken"),
        ((5,), None, "no row can be taken"),
        ((1, 2, 3, 4, 5), "mean", r"of shape \[1, 2, 3, 4, 5\]"),
    ],
)
def test_reductions_that_are_not_there(
    shape: tuple[int, ...], reduce: str | None, message: str
) -> None:
    with pytest.raises(BadConfig, match=message):
        reduce_positions(torch.zeros(shape), site(reduce))
