"""The same model through lm-eval's own Minerva Math tasks, on local files (extra `eval`).

lm-eval's tasks fetch their data by name; here each is included from the installed package, pointed
at the problems given, and run with its own prompt, generation and scoring.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salve_lm.errors import BadConfig
from salve_lm.tasks.base import Row
from salve_lm.tasks.problems import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# all subjects share prompt and scoring: this file differs from the others in its data alone
_INCLUDED = "minerva_math_algebra.yaml"
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int = 512,
    batch_size: int = 16,
) -> list[Row]:
    """Evaluate `model` on `problems` with lm-eval's `minerva_math`, on this process alone.

    Args:
        model: a causal language model of transformers, in eval mode.
        tokenizer: its tokenizer.
        problems: what to ask; their solutions must box the answer.
        max_new_tokens: lm-eval's `max_gen_toks`; its own default would cut outputs at 256 tokens.
        batch_size: prompts decoded at once.

    Returns:
        Rows as `Generation` makes them: `sample`, `subject`, `level`, `problem_id`, `answer`,
        `output`, `exact_match`, `math_verify`; and `prompt`, the text that the model saw. Sorted by
        `sample`.

    Raises:
        BadConfig: lm-eval is not installed.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise BadConfig("lm-eval is not installed: pip install 'salve-lm[eval]'.") from e
    with tempfile.TemporaryDirectory() as scratch, _environment(_OFFLINE):
        names = _write_tasks(Path(scratch), problems, max_new_tokens)
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(names),
            task_manager=TaskManager(include_path=scratch, include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    rows = [
        _row(group[logged["doc_id"]], logged)
        for name, group in names.items()
        for logged in results["samples"][name]
    ]
    return sorted(rows, key=lambda row: row["sample"])


def lm_eval_version() -> str:
    """Version of the installed lm-eval; its `minerva_math` changed with 0.4.13."""
    return metadata.version("lm_eval")


def _write_tasks(
    folder: Path, problems: Sequence[Problem], max_new_tokens: int
) -> dict[str, list[Problem]]:
    """One task file and one data file a subject; task name -> its problems in order."""
    import lm_eval
    import yaml

    package = Path(lm_eval.__file__).parent / "tasks" / "minerva_math"
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(f"local_minerva_{problem.subject}", []).append(problem)
    for name, group in groups.items():
        data = folder / f"{name}.jsonl"
        records = [{"problem": p.problem, "solution": p.solution} for p in group]
        data.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        task: dict[str, Any] = {
            "include": str(package / _INCLUDED),
            "task": name,
            "tag": [],
            "dataset_path": "json",
            "dataset_name": None,
            "training_split": None,
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(folder / "cache"),
            },
            "generation_kwargs": {
                "until": ["Problem:"],
                "do_sample": False,
                "temperature": 0,
                "max_gen_toks": max_new_tokens,
            },
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return groups


def _row(problem: Problem, logged: dict[str, Any]) -> Row:
    return {
        "sample": problem.sample,
        "subject": problem.subject,
        "level": problem.level,
        "problem_id": problem.fingerprint,
        "answer": problem.answer,
        "output": logged["resps"][0][0],
        "exact_match": bool(logged["exact_match"]),
        "math_verify": bool(logged["math_verify"]),
        "prompt": logged["arguments"][0][0],
    }


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables in the block: lm-eval and datasets read nothing else."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
