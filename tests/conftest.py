"""One thread, the repository's root on the path, and the small world that tests share."""

import os
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"                           # sums in the same order everywhere
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import world  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """DATA/epic, DATA/ego4d and so on: see world.py."""
    return world.make(tmp_path_factory.mktemp("world"))
