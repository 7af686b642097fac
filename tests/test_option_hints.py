"""Mistyped values of options with a fixed set of values."""

from __future__ import annotations

import pytest

from salve_lm.cli import main
from salve_lm.option_hints import hint


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--model.init_args.schedule=cosin", "'cosine'"),
        ("--data.init_args.augment=shft", "'shift'"),
    ],
)
def test_the_command_line_says_what_was_meant(
    option: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "demo/1_backbone", option])
    assert f"Did you mean {meant}" in capsys.readouterr().err


def test_nothing_is_guessed_without_a_near_value() -> None:
    refused = "Expected a typing.Literal['a b', 'constant', 3]. Got value: "
    assert hint(refused + "constnt\n- Expected a <class 'NoneType'>").endswith("'constnt'?")
    assert hint(refused + "zzzz") == ""
    assert hint("something else") == ""
    assert hint("Expected a typing.Literal[broken. Got value: x") == ""
