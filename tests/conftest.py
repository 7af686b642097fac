"""Shared fixtures: where the real data lie, and threads that do not fight over two cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# the same examples every time in CI: a failure there can be repeated
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with a reason, what this machine cannot run."""
    shared = os.environ.get("SALVE_DATA")
    for item in items:
        if "shared_data" in item.keywords and not (shared and Path(shared).is_dir()):
            item.add_marker(pytest.mark.skip(reason="SALVE_DATA names no folder of real data"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and models; tests that use it are marked `shared_data`."""
    return Path(os.environ["SALVE_DATA"])
