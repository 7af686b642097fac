"""Generated problems: right, unique, held out, and the same everywhere."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest

from salve_lm.data.arithmetic import (
    SPLITS,
    SUBJECTS,
    ArithmeticProblem,
    ArithmeticText,
    arithmetic_problems,
    numbers_without_task,
)
from salve_lm.errors import BadConfig, NameNotFound
from salve_lm.tasks.arithmetic import ArithmeticProblems


def solved(p: ArithmeticProblem) -> int:
    """The answer, read from the problem's text."""
    n = [int(x) for x in re.findall(r"\d+", p.problem)]
    return {
        "addition": lambda: n[0] + n[1],
        "subtraction": lambda: n[0] - n[1],
        "multiplication": lambda: n[0] * n[1],
        "remainder": lambda: n[0] - n[1] * (n[0] // n[1]),
        "maximum": lambda: sorted(n)[-1],
        "sequence": lambda: 2 * n[2] - n[1],
        "digit_sum": lambda: n[0] // 100 + n[0] // 10 % 10 + n[0] % 10,
    }[p.subject]()


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("seed", [0, 7])
def test_splits_are_right_unique_and_apart(subject: str, seed: int) -> None:
    splits = {s: arithmetic_problems(subject, s, seed=seed) for s in SPLITS}
    everything = [p for made in splits.values() for p in made]
    assert all(str(solved(p)) == p.answer and len(p.answer) <= 3 for p in everything)
    assert len({p.problem for p in everything}) == len(everything)
    assert (len(splits["test"]), len(splits["val"])) == (120, 60)
    assert len(splits["train"]) >= 300


def test_another_seed_holds_out_other_problems() -> None:
    a, b = (arithmetic_problems("addition", "test", seed=s) for s in (0, 1))
    assert a != b
    assert a == arithmetic_problems("addition", "test", seed=0)


def test_the_test_problems_are_those_the_shipped_models_never_saw() -> None:
    """Another order would put training problems of the checkpoints into the test set."""
    made = [tuple(p) for s in SUBJECTS for p in arithmetic_problems(s, "test")]
    assert hashlib.sha256(repr(made).encode()).hexdigest() == (
        "b3fd4f37430ad78b56375a47b4874b4a176a2c91fbc7f71f61e576c3503832f3"
    )


def test_a_limit_takes_the_first() -> None:
    whole = arithmetic_problems("maximum", "train")
    assert arithmetic_problems("maximum", "train", limit=5) == whole[:5]


def test_the_reference_has_the_surface_of_the_problem() -> None:
    made = arithmetic_problems("sequence", "train", limit=200)
    shuffled = [numbers_without_task(p) for p in made]
    assert all(
        Counter(s.split()) == Counter(p.text.split()) for s, p in zip(shuffled, made, strict=True)
    )
    same = sum(s == " ".join(p.text.split()) for s, p in zip(shuffled, made, strict=True))
    assert same <= 2
    assert shuffled == [numbers_without_task(p) for p in made]


def test_documents_of_each_form() -> None:
    question, equation = (
        ArithmeticText(form=f, subjects=["addition"], limit=3).documents()
        for f in ("question", "equation")
    )
    for q, e in zip(question, equation, strict=True):
        asked = re.fullmatch(r"Problem: (.+)\nAnswer:", q.prompt)
        assert asked is not None
        assert e.prompt == f"{asked[1]} ="
        a, b = asked[1].split(" + ")
        assert q.text == e.text == f" {int(a) + int(b)}"
        assert q.group == e.group == "addition"
    reference = ArithmeticText(form="no_task", subjects=["addition"], limit=3).documents()
    assert [sorted(r.text.split()) for r in reference] == [
        sorted((q.prompt + q.text).split()) for q in question
    ]


def test_repeat_gives_all_documents_again() -> None:
    once = ArithmeticText(limit=2).documents()
    assert len(once) == 14
    assert ArithmeticText(limit=2, repeat=3).documents() == list(once) * 3


def test_training_text_and_test_problems_are_apart() -> None:
    seen = {d.prompt for d in ArithmeticText().documents()}
    asked = {f"Problem: {p.problem}\nAnswer:" for p in ArithmeticProblems().problems()}
    assert len(asked) == 840
    assert not seen & asked


def test_bad_options_name_the_cure() -> None:
    with pytest.raises(NameNotFound, match="Did you mean 'addition'"):
        arithmetic_problems("adition", "test")
    with pytest.raises(NameNotFound, match="split"):
        arithmetic_problems("addition", "tests")  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match="leave none to train on"):
        arithmetic_problems("multiplication", "train", n_test=590, n_val=10)
    with pytest.raises(BadConfig, match="at least 1"):
        arithmetic_problems("multiplication", "train", limit=0)
    with pytest.raises(NameNotFound, match="Did you mean 'equation'"):
        ArithmeticText(form="equations")  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match="repeat"):
        ArithmeticText(repeat=0)
