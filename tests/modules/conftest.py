"""A saved tiny model of each family, a text, and one thread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from tests.language.tiny_models import save_model
from tests.modules.tiny_fits import write_text


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # forked processes have no OpenMP threads of their own


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_model(tmp_path / "llama", "llama_tied")
    return tmp_path / "llama"


@pytest.fixture
def text(tmp_path: Path) -> str:
    return write_text(tmp_path)
