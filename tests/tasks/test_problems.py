"""Reading problems: MATH's layout, files, subsets, and what is wrong with them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from salve_lm.errors import BadConfig, CorruptFile, MissingFile, NameNotFound
from salve_lm.tasks.arithmetic import ArithmeticProblems
from salve_lm.tasks.problems import MathProblems, ProblemFiles, boxed_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"$\boxed{1}$ or $\boxed{\text{all } \{2\}}$", r"\text{all } \{2\}"),
        (r"is $\boxed 5$ as said", "5"),
        (r"is \fbox{3}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{1", None),
        ("none", None),
        ("\\boxed", None),
    ],
)
def test_boxed_answers(text: str, answer: str | None) -> None:
    assert boxed_answer(text) == answer


@pytest.fixture
def math_folder(tmp_path: Path) -> Path:
    def record(i: int, boxed: bool = True) -> dict[str, Any]:
        end = f"$\\boxed{{{i}}}$" if boxed else "clear"
        return {"problem": f"What is {i}?", "solution": f"It is {end}.", "level": "Level 1"}

    folder = tmp_path / "math" / "test"
    folder.mkdir(parents=True)
    (folder / "b.json").write_text(json.dumps([record(i) for i in range(4)]))
    (folder / "a.json").write_text(json.dumps([record(i, i != 1) for i in range(3)]))
    return folder.parent


def test_numbers_survive_subsets(
    math_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MATH_FOLDER", str(math_folder))
    with caplog.at_level(logging.WARNING):
        every = MathProblems("$MATH_FOLDER", unboxed="skip").problems()
    assert "Left out 1 problem" in caplog.text
    assert [(p.sample, p.subject, p.answer) for p in every][:3] == [
        (0, "a", "0"), (2, "a", "2"), (3, "b", "0"),
    ]  # fmt: skip
    part = MathProblems(str(math_folder), subjects=["b"], limit=2).problems()
    assert part == [p for p in every if p.subject == "b"][:2]
    assert len({p.fingerprint for p in every}) == len(every)


def test_unboxed_problems_are_named(math_folder: Path) -> None:
    with pytest.raises(BadConfig, match=r"1 problem.*a\[1\].*unboxed: skip"):
        MathProblems(str(math_folder)).problems()


def test_bad_folders(math_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="train/ and test/"):
        MathProblems(str(tmp_path)).problems()
    with pytest.raises(NameNotFound, match="subject named 'c'"):
        MathProblems(str(math_folder), subjects=["c"]).problems()
    with pytest.raises(BadConfig, match="limit is 0"):
        MathProblems(str(math_folder), limit=0)
    (math_folder / "test" / "b.json").write_text("[1")
    with pytest.raises(CorruptFile, match="no JSON"):
        MathProblems(str(math_folder)).problems()
    (math_folder / "test" / "b.json").write_text('[{"question": 1}]')
    with pytest.raises(CorruptFile, match="entry 0 has no 'problem'"):
        MathProblems(str(math_folder)).problems()


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_files_of_three_kinds(tmp_path: Path, ending: str) -> None:
    records = [
        {"question": "2 + 2", "answer": "4", "subject": "sum"},
        {"question": "2 * 3", "answer": "6", "subject": "product"},
    ]
    path = tmp_path / f"problems.{ending}"
    if ending == "parquet":
        pd.DataFrame(records).to_parquet(path)
    elif ending == "json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    source = ProblemFiles([str(path)], fields={"problem": "question"})
    assert [(p.subject, p.problem, p.answer) for p in source.problems()] == [
        ("sum", "2 + 2", "4"), ("product", "2 * 3", "6"),
    ]  # fmt: skip
    one = ProblemFiles([str(path)], {"problem": "question"}, subjects=["product"]).problems()
    assert [p.sample for p in one] == [1]
    with pytest.raises(CorruptFile, match=r"record 0 has .*fields: \{problem"):
        ProblemFiles([str(path)]).problems()
    with pytest.raises(NameNotFound, match=r"'products'.*'product'"):
        ProblemFiles([str(path)], {"problem": "question"}, subjects=["products"]).problems()


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(NameNotFound, match="field of a problem"):
        ProblemFiles(["x"], fields={"question": "problem"})
    with pytest.raises(MissingFile, match="jsonl, json or parquet"):
        ProblemFiles([str(tmp_path / "x.jsonl")]).problems()
    for name, text, message in (
        ("a.jsonl", "{", "no jsonl"),
        ("a.parquet", "{", "no parquet"),
        ("a.json", "{}", "not a JSON list"),
        ("b.json", "[3]", "entry 0 is no record"),
        ("a.txt", "x", "'.txt'"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(CorruptFile, match=message):
            ProblemFiles([str(tmp_path / name)]).problems()


def test_arithmetic_numbers_survive_subsets() -> None:
    every = ArithmeticProblems(limit=2).problems()
    assert len(every) == 14
    assert len({p.sample for p in every}) == 14
    part = ArithmeticProblems(limit=2, subjects=["maximum", "addition"]).problems()
    assert part == [p for p in every if p.subject in ("addition", "maximum")]
    with pytest.raises(NameNotFound, match="'additions'"):
        ArithmeticProblems(subjects=["additions"]).problems()


@pytest.mark.shared_data
def test_math_as_it_is(shared_data: Path) -> None:
    test = MathProblems(str(shared_data / "math")).problems()
    counts = pd.Series([p.subject for p in test]).value_counts()
    assert counts.sort_index().tolist() == [1187, 474, 479, 903, 540, 871, 546]
    # two training solutions box nothing: \boxed{}
    with pytest.raises(BadConfig, match=r"number_theory\[148\], number_theory\[392\]"):
        MathProblems(str(shared_data / "math"), split="train").problems()
