"""The run of a language model that the tests of its report share."""

from __future__ import annotations

from pathlib import Path

import pytest

from salve_lm.report.summary import report
from tests.report.made_language_run import make_language_run


@pytest.fixture(scope="session")
def language_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report; copy it to change it."""
    run = make_language_run(tmp_path_factory.mktemp("language"))
    report(run)
    return run
