from __future__ import annotations

import pytest

from tests.edits.tiny import Fixture, build


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    """Shared and never changed: tests that edit weights in place copy the model first."""
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    """The same with activations that can be negative."""
    return build(tmp_path_factory.mktemp("signed"), lowest=-9.0)
