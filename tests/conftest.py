"""The small world that tests share."""

import pytest
import running  # noqa: F401                                    one thread; finds the scripts
import world


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """DATA/epic, DATA/ego4d and so on: see world.py."""
    return world.make(tmp_path_factory.mktemp("world"))
