"""One thread, the repository's root on the path, and data for all tests."""

import os
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"                           # sums in one order on any machine
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import world  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The small world: DATA/epic, DATA/ego4d and so on, see world.py."""
    return world.make(tmp_path_factory.mktemp("world"))


def smallest(name, tmp_path_factory, workers=2):
    import toy
    folder = tmp_path_factory.mktemp(f"toy_{name}")
    toy.make(name, folder, scale=0.01, workers=workers)
    return folder / name


@pytest.fixture(scope="session")
def epic(tmp_path_factory):
    """The smallest toy EPIC-KITCHENS-100: 3 + 2 + 1 videos."""
    return smallest("epic", tmp_path_factory)


@pytest.fixture(scope="session")
def ego4d(tmp_path_factory):
    """The four training clips of the smallest toy Ego4D: one has no sound, one is silent."""
    import toy

    def maker(root, *rest):
        def pooled(path):
            return path.parent == root
        for task in plain(root, *rest):
            parts = [(path, start, [x for x in links if pooled(x)])
                     for path, start, links in task["files"] if any(map(pooled, links))]
            if parts:
                yield {**task, "files": parts}

    plain = toy.MAKERS["ego4d"]
    with pytest.MonkeyPatch.context() as m:
        m.setitem(toy.MAKERS, "ego4d", lambda *a: list(maker(*a)))
        return smallest("ego4d", tmp_path_factory)


@pytest.fixture(scope="session")
def ucf101(tmp_path_factory):
    """The smallest toy UCF101: 8 classes, one clip in each of the groups 1, 8, 15, 22, 24, 25."""
    return smallest("ucf101", tmp_path_factory)


@pytest.fixture(scope="session")
def hmdb51(tmp_path_factory):
    """The smallest toy HMDB51: 6 classes, one clip of each of four films."""
    return smallest("hmdb51", tmp_path_factory)


@pytest.fixture(scope="session")
def oops(tmp_path_factory):
    """The smallest toy Oops!: 24 + 12 videos, 17 + 10 of them annotated, up to 8 s long."""
    import toy
    plain = toy.MAKERS["oops"]
    with pytest.MonkeyPatch.context() as m:
        m.setitem(toy.MAKERS, "oops", lambda *a: plain(*a, seconds=(4.5, 8)))
        return smallest("oops", tmp_path_factory)


@pytest.fixture(scope="session")
def kinetics400(tmp_path_factory):
    """The smallest toy Kinetics-400: 2 + 1 clips of 8 classes, and a short one in each split."""
    return smallest("kinetics400", tmp_path_factory, workers=1)


@pytest.fixture(scope="session")
def charades(tmp_path_factory):
    """The smallest toy Charades: 6 + 5 videos, of which 1 + 2 are short and 1 + 1 are idle."""
    return smallest("charades", tmp_path_factory, workers=1)


@pytest.fixture(scope="session")
def multithumos(tmp_path_factory):
    """The smallest toy MultiTHUMOS: 4 + 3 videos."""
    return smallest("multithumos", tmp_path_factory, workers=1)


@pytest.fixture(scope="session")
def weights():
    """State of a RepLAI as --tiny --width 8 makes it, its statistics not those of a fresh one."""
    import torch

    import replai
    torch.manual_seed(3)
    model = replai.RepLAI(8, 10)
    for k, v in model.state_dict().items():
        if k.endswith("running_mean"):
            v.normal_()
    return {k: v.clone() for k, v in model.state_dict().items()}
