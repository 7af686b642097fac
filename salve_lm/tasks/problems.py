"""Problems with answers: Hendrycks MATH in its usual layout, jsonl and parquet files, or your own.

A problem keeps its number in the whole source (`sample`) whatever subset is asked for, so that
runs over different subsets still join problem by problem.
"""

from __future__ import annotations

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from salve_lm.errors import BadConfig, CorruptFile, MissingFile, NameNotFound
from salve_lm.hashing import hash_plain

logger = logging.getLogger(__name__)

Unboxed = Literal["error", "skip"]


class Problem(NamedTuple):
    """A problem and how it is solved.

    sample: its number in the whole source.
    subject: what accuracies are grouped by.
    problem: the question.
    solution: worked, with the answer in it.
    answer: the bare answer, such as `\\frac{1}{2}`.
    level: of difficulty, or "".
    """

    sample: int
    subject: str
    problem: str
    solution: str
    answer: str
    level: str = ""

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that differ between different problems."""
        return hash_plain([self.subject, self.problem, self.solution, self.answer])[:16]


class ProblemSource(ABC):
    """Where problems come from. Derive from it to bring your own: a config names it by class_path.

    Keep each init argument as an attribute of the same name, so that results can record it.
    """

    @abstractmethod
    def problems(self) -> list[Problem]:
        """All problems, the same in the same order on every rank, `sample` unique."""


class MathProblems(ProblemSource):
    """Hendrycks MATH: one JSON list a subject, `FOLDER/SPLIT/SUBJECT.json`.

    The answer is what the solution boxes.

    Args:
        folder: Folder with the splits; environment variables and `~` are expanded.
        split: `train`, `val` or `test`.
        subjects: File names without ending, such as `number_theory`. All by default.
        limit: Only the first so many problems of each subject.
        unboxed: What to do about a solution without a boxed answer: `error`, or `skip` it and log
            how many were left out.
    """

    def __init__(
        self,
        folder: str,
        split: Literal["train", "val", "test"] = "test",
        subjects: list[str] | None = None,
        limit: int | None = None,
        unboxed: Unboxed = "error",
    ) -> None:
        _check_limit(limit)
        self.folder, self.split, self.subjects = folder, split, subjects
        self.limit, self.unboxed = limit, unboxed

    def problems(self) -> list[Problem]:
        """Problems by subject in alphabetical order, then in the order of the file.

        Raises:
            MissingFile: no such folder or split.
            NameNotFound: a subject without a file.
            CorruptFile: a file that is not a list of problems.
            BadConfig: problems without a boxed answer, unless they are skipped.
        """
        folder = expanded(self.folder) / self.split
        files = {p.stem: p for p in sorted(folder.glob("*.json"))} if folder.is_dir() else {}
        if not files:
            raise MissingFile(
                f"No problems in {folder}: it should hold one JSON file a subject. "
                "Give the folder that holds train/ and test/."
            )
        for subject in self.subjects or ():
            if subject not in files:
                raise NameNotFound("subject", subject, files)
        rows: list[tuple[str, str, Mapping[str, Any]]] = []
        for subject, path in files.items():
            for i, record in enumerate(_json_list(path)):
                if not isinstance(record, Mapping) or not {"problem", "solution"} <= set(record):
                    raise CorruptFile(path, f"entry {i} has no 'problem' and 'solution'")
                rows.append((f"{subject}[{i}]", subject, record))
        wanted = set(self.subjects or files)
        numbered = [(n, *row) for n, row in enumerate(rows) if row[1] in wanted]
        return _select(numbered, self.limit, self.unboxed, str(folder))


class ProblemFiles(ProblemSource):
    """Problems in jsonl, JSON (a list) or parquet files, one record a problem.

    A record has `problem`, and `answer` or a `solution` that boxes it; `subject` and `level` are
    optional.

    Args:
        files: Paths; environment variables and `~` are expanded.
        fields: Names in the files where they differ, such as `{problem: question}`.
        subjects: Only these subjects.
        limit: Only the first so many problems of each subject.
        unboxed: What to do about a record without `answer` whose solution boxes none: `error`, or
            `skip` it and log how many were left out.
    """

    def __init__(
        self,
        files: list[str],
        fields: dict[str, str] | None = None,
        subjects: list[str] | None = None,
        limit: int | None = None,
        unboxed: Unboxed = "error",
    ) -> None:
        _check_limit(limit)
        for name in fields or ():
            if name not in Problem._fields[1:]:
                raise NameNotFound("field of a problem", name, Problem._fields[1:])
        self.files, self.fields, self.subjects = files, fields, subjects
        self.limit, self.unboxed = limit, unboxed

    def problems(self) -> list[Problem]:
        """Problems in the order of the files.

        Raises:
            MissingFile: a file that is not there.
            NameNotFound: a subject that no record has.
            CorruptFile: a file that does not hold problems.
            BadConfig: problems without a boxed answer, unless they are skipped.
        """
        names = {name: (self.fields or {}).get(name, name) for name in Problem._fields[1:]}
        rows: list[tuple[str, str, Mapping[str, Any]]] = []
        for file in self.files:
            path = expanded(file)
            for i, record in enumerate(_records(path)):
                own = {ours: record[theirs] for ours, theirs in names.items() if theirs in record}
                if "problem" not in own or not {"solution", "answer"} & set(own):
                    raise CorruptFile(
                        path,
                        f"record {i} has {sorted(record)}, but a problem needs "
                        f"{names['problem']!r}, and {names['answer']!r} or {names['solution']!r}",
                        "Say what the fields are called with `fields: {problem: ...}`.",
                    )
                rows.append((f"{path.name}[{i}]", str(own.get("subject", "all")), own))
        known = dict.fromkeys(subject for _, subject, _ in rows)
        for subject in self.subjects or ():
            if subject not in known:
                raise NameNotFound("subject", subject, known)
        wanted = set(self.subjects or known)
        numbered = [(n, *row) for n, row in enumerate(rows) if row[1] in wanted]
        return _select(numbered, self.limit, self.unboxed, ", ".join(self.files))


def boxed_answer(text: str) -> str | None:
    """What the last `\\boxed{...}` (or `\\fbox{...}`) of `text` holds; None without one.

    `\\boxed 5` without braces ends at the next dollar sign, and comes first where both forms
    occur, as in lm-eval, whose gold answers these must equal.
    """
    _, mark, bare = text.rpartition("\\boxed ")
    if mark:
        return bare.split("$", 1)[0]
    start = text.rfind("\\boxed")
    if start < 0:
        start = text.rfind("\\fbox")
    opening = text.find("{", start) if start >= 0 else -1
    if opening < 0:
        return None
    depth = 0
    for i in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[opening + 1 : i]
    return None


def expanded(path: str) -> Path:
    """`path` with `~` and environment variables replaced."""
    return Path(os.path.expanduser(os.path.expandvars(path)))


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise BadConfig(f"limit is {limit}; give at least 1 problem a subject, or leave it out.")


def _select(
    rows: Iterable[tuple[int, str, str, Mapping[str, Any]]],
    limit: int | None,
    unboxed: Unboxed,
    where: str,
) -> list[Problem]:
    """The first `limit` problems of each subject among (number, place, subject, record)."""
    found: list[Problem] = []
    bad: list[str] = []
    taken: dict[str, int] = {}
    for sample, place, subject, record in rows:
        if limit is not None and taken.get(subject, 0) >= limit:
            continue
        solution = str(record.get("solution", record.get("answer", "")))
        answer = record.get("answer")
        answer = boxed_answer(solution) if answer is None else str(answer)
        if answer is None or not answer.strip():
            bad.append(place)
            continue
        taken[subject] = taken.get(subject, 0) + 1
        level = str(record.get("level", ""))
        found.append(Problem(sample, subject, str(record["problem"]), solution, answer, level))
    if bad and unboxed == "error":
        raise BadConfig(
            f"{len(bad)} problem(s) in {where} have no boxed answer: {', '.join(bad[:8])}"
            f"{' ...' if len(bad) > 8 else ''}. Add \\boxed{{...}} to these solutions, or set "
            "`unboxed: skip` to leave them out."
        )
    if bad:
        logger.warning("Left out %d problem(s) of %s without a boxed answer.", len(bad), where)
    if not found:
        raise BadConfig(f"No problems left in {where}.")
    return found


def _json_list(path: Path) -> Sequence[Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CorruptFile(path, f"no JSON ({e})") from e
    if not isinstance(value, list):
        raise CorruptFile(path, "not a JSON list of problems")
    return value


def _records(path: Path) -> Sequence[Mapping[str, Any]]:
    if not path.is_file():
        raise MissingFile(f"No file {path}. Give jsonl, json or parquet files of problems.")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            records: Sequence[Any] = pq.read_table(path).to_pylist()
        except (pa.ArrowException, OSError) as e:
            raise CorruptFile(path, f"no parquet ({e})") from e
    elif path.suffix == ".jsonl":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines if line.strip()]
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise CorruptFile(path, f"no jsonl ({e})") from e
    elif path.suffix == ".json":
        records = _json_list(path)
    else:
        raise CorruptFile(path, f"ending {path.suffix!r}", "Give .jsonl, .json or .parquet files.")
    for i, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise CorruptFile(path, f"entry {i} is no record")
    return records
