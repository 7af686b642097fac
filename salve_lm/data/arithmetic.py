"""Seven kinds of generated arithmetic problems, with held-out splits and a reference corpus.

They stand in for the seven subjects of MATH where a model must be tiny: short questions, answers of
at most three digits, the same few tokens everywhere for a tokenizer that splits numbers into
digits. Nothing is drawn at random: the problems of a subject are all that its ranges allow, in the
order of a hash of the seed and the problem. So the splits are a pure function of the seed, on every
machine and every version of Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

from salve_lm.data.corpus import Corpus, Document
from salve_lm.errors import BadConfig, NameNotFound

Split = Literal["train", "val", "test"]
Form = Literal["question", "equation", "no_task"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
TEMPLATE = "Problem: {problem}\nAnswer:"


class ArithmeticProblem(NamedTuple):
    """One question and its answer."""

    subject: str
    problem: str
    answer: str

    @property
    def text(self) -> str:
        """The problem as a document to train on."""
        return f"{question(self.problem)} {self.answer}"


Pair = tuple[str, str]  # problem, answer


def _addition() -> Iterator[Pair]:
    for a in range(10, 60):
        for b in range(10, 60):
            yield f"{a} + {b}", str(a + b)


def _subtraction() -> Iterator[Pair]:
    for a in range(10, 70):
        for b in range(10, a + 1):
            yield f"{a} - {b}", str(a - b)


def _multiplication() -> Iterator[Pair]:
    for a in range(2, 6):
        for b in range(2, 152):
            yield f"{a} * {b}", str(a * b)


def _remainder() -> Iterator[Pair]:
    for a in range(10, 150):
        for b in range(2, 7):
            yield f"{a} mod {b}", str(a % b)


def _maximum() -> Iterator[Pair]:
    # every 331st triple: all of them would be 729,000
    for n in range(0, 90**3, 331):
        a, b, c = 10 + n % 90, 10 + n // 90 % 90, 10 + n // 8100
        yield f"max of {a} {b} {c}", str(max(a, b, c))


def _sequence() -> Iterator[Pair]:
    for start in range(1, 100):
        for step in range(2, 10):
            shown = " ".join(str(start + k * step) for k in range(3))
            yield f"next of {shown}", str(start + 3 * step)


def _digit_sum() -> Iterator[Pair]:
    for n in range(100, 1000):
        yield f"digit sum of {n}", str(sum(map(int, str(n))))


_SUBJECTS: dict[str, Callable[[], Iterator[Pair]]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "multiplication": _multiplication,
    "remainder": _remainder,
    "maximum": _maximum,
    "sequence": _sequence,
    "digit_sum": _digit_sum,
}
SUBJECTS = tuple(_SUBJECTS)


def arithmetic_problems(
    subject: str,
    split: Split,
    *,
    seed: int = 0,
    n_test: int = 120,
    n_val: int = 60,
    limit: int | None = None,
) -> list[ArithmeticProblem]:
    """The problems of one subject and split: unique, and in no other split.

    Args:
        subject: One of `SUBJECTS`.
        split: train, val or test.
        seed: Shuffles the problems before they are split.
        n_test: Problems held out for testing.
        n_val: Problems held out for choosing options; all others are for training.
        limit: Only the first so many of the split.

    Raises:
        NameNotFound: no such subject or split.
        BadConfig: a size out of range, or nothing left for training.
    """
    if subject not in _SUBJECTS:
        raise NameNotFound("arithmetic subject", subject, SUBJECTS)
    if split not in SPLITS:
        raise NameNotFound("split", split, SPLITS)
    if n_test < 1 or n_val < 1 or (limit is not None and limit < 1):
        raise BadConfig("n_test, n_val and limit must be at least 1.")
    made = [ArithmeticProblem(subject, *pair) for pair in _SUBJECTS[subject]()]
    if n_test + n_val >= len(made):
        raise BadConfig(
            f"{subject} has {len(made)} problems, of which n_test={n_test} and n_val={n_val} leave "
            "none to train on. Lower them."
        )
    made.sort(key=lambda p: _hash(seed, p.subject, p.problem))
    starts = {"test": 0, "val": n_test, "train": n_test + n_val}
    stops = {"test": n_test, "val": n_test + n_val, "train": len(made)}
    return made[starts[split] : stops[split]][:limit]


def numbers_without_task(problem: ArithmeticProblem, seed: int = 0) -> str:
    """`problem.text` with its words, signs and numbers in another order: the surface, not the task.

    The multiset of words, and so nearly that of tokens, is the problem's: what tells the two apart
    has found more than digits (METHODS 6: reference corpora matched on the surface).
    """
    words = problem.text.split()
    order = sorted(range(len(words)), key=lambda i: _hash(seed, problem.problem, str(i)))
    return " ".join(words[i] for i in order)


class ArithmeticText(Corpus):
    """Generated arithmetic problems as documents; the question is the prompt.

    Args:
        split: `train`, `val` or `test`; no problem is in two of them.
        subjects: Kinds of problems; all seven by default.
        limit: Only the first so many problems of each subject.
        form: `question` as the tests ask it (`Problem: 2 + 3`, `Answer: 5`), `equation`
            (`2 + 3 = 5`), or `no_task`, the question's words and numbers in another order: a
            reference corpus with the same surface and no task.
        repeat: Give all documents so many times: their share beside other corpora.
        seed: Of the splits; that of the task.
    """

    def __init__(
        self,
        split: Split = "train",
        subjects: list[str] | None = None,
        limit: int | None = None,
        form: Form = "question",
        repeat: int = 1,
        seed: int = 0,
    ) -> None:
        if form not in get_args(Form):
            raise NameNotFound("form", form, get_args(Form))
        if repeat < 1:
            raise BadConfig(f"repeat is {repeat}; give at least 1.")
        self.split, self.subjects, self.limit = split, subjects, limit
        self.form, self.repeat, self.seed = form, repeat, seed

    def documents(self) -> Sequence[Document]:
        """One document a problem, by subject; `group` is the subject.

        Raises:
            NameNotFound: no such subject or split.
            BadConfig: sizes that leave nothing to train on.
        """
        found = [
            self._document(p)
            for subject in self.subjects or SUBJECTS
            for p in arithmetic_problems(subject, self.split, seed=self.seed, limit=self.limit)
        ]
        return found * self.repeat

    def _document(self, problem: ArithmeticProblem) -> Document:
        if self.form == "no_task":
            return Document(numbers_without_task(problem, self.seed), group=problem.subject)
        asked = question(problem.problem) if self.form == "question" else f"{problem.problem} ="
        return Document(f" {problem.answer}", asked, problem.subject)


def question(problem: str) -> str:
    """The prompt of a problem; its answer follows after a blank."""
    return TEMPLATE.replace("{problem}", problem)


def _hash(seed: int, *parts: str) -> bytes:
    return hashlib.sha256("\x00".join((str(seed), *parts)).encode()).digest()
