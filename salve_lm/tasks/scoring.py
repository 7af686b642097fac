"""Are two mathematical answers the same? By sympy, and by math-verify."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from salve_lm.errors import BadConfig
from salve_lm.tasks.problems import Problem, boxed_answer

logger = logging.getLogger(__name__)

SECONDS = 5  # as lm-eval and math-verify give a comparison
_CURE = "Install what scores mathematics: pip install 'salve-lm[eval]'."


class _TimeUp(Exception):
    """A comparison took too long."""


def equivalent(first: str, second: str) -> bool:
    """Whether two normalised LaTeX answers are equal as text, or their difference simplifies to 0.

    What sympy cannot parse or subtract, and what takes it longer than 5 seconds, counts as
    different. The limit holds in the main thread of a Unix process only.

    Raises:
        BadConfig: sympy's LaTeX parser is not installed.
    """
    if first and first == second:
        return True
    try:
        import antlr4  # noqa: F401  (sympy says so only when it parses, as an error of parsing)
        from sympy import simplify
        from sympy.parsing.latex import parse_latex
    except ImportError as e:
        raise BadConfig(f"exact_match needs sympy and antlr4-python3-runtime. {_CURE}") from e
    try:
        with _limited(SECONDS):
            return bool(simplify(parse_latex(first) - parse_latex(second)) == 0)
    except ImportError as e:
        raise BadConfig(f"sympy cannot parse LaTeX here: {e} {_CURE}") from e
    except Exception as e:  # whatever a model wrote: sympy raises anything on it
        logger.debug("Cannot compare %r with %r: %s", first, second, e)
        return False


def math_verified(problem: Problem, output: str) -> bool:
    """What math-verify says of the whole `output` against the whole solution.

    A solution that boxes nothing is replaced by the answer.

    Raises:
        BadConfig: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as e:
        raise BadConfig(f"math_verify needs the package math-verify. {_CURE}") from e
    gold = problem.solution
    if boxed_answer(gold) is None:
        gold = f"${problem.answer}$"
    # its time limits are alarm signals, which only the main thread may set
    seconds = SECONDS if _may_set_alarm() else None
    return bool(
        verify(
            parse(gold, parsing_timeout=seconds),
            parse(output, parsing_timeout=seconds),
            timeout_seconds=seconds,
        )
    )


def _may_set_alarm() -> bool:
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and hasattr(signal, "SIGALRM")


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise `_TimeUp` in the block after `seconds`, where alarms can be set."""
    if not _may_set_alarm():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
