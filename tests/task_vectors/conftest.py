"""Quiet transformers."""

from __future__ import annotations

import pytest
from transformers.utils import logging


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    logging.disable_progress_bar()
