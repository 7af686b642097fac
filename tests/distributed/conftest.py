from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.training import activation_data


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Forked processes must not use the OpenMP threads that their parent started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store in it."""
    folder = tmp_path_factory.mktemp("activations")
    activation_data(folder).prepare_data()
    return folder
