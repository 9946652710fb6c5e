"""Long lists: what common.Packed is, and that neither it nor an array costs a worker anything."""

import gc
import json
import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import common

ITEMS = [1, "a", b"\xff\0", ("x", 2.5, None), {"k": [1, 2]}, np.float64(0.1), []]


@pytest.mark.parametrize("items", [ITEMS, [], ["ä" * 1000], list(range(1000))], ids=len)
def test_a_packed_list_is_the_list(items):
    packed = common.Packed(iter(items))
    assert len(packed) == len(items) and list(packed) == items == [*reversed(packed)][::-1]
    assert list(pickle.loads(pickle.dumps(packed))) == items
    for i in [*range(-len(items), len(items))][:50]:
        assert packed[i] == items[i] and packed[np.int64(i)] == items[i]
    for i in (slice(None), slice(1, None, 2), slice(None, None, -1), slice(-3, 2), slice(5, 99)):
        assert packed[i] == items[i]
    for i in (len(items), -len(items) - 1):
        with pytest.raises(IndexError):
            packed[i]
    with pytest.raises(TypeError):
        packed["a"]


def test_its_objects_are_made_anew():
    packed = common.Packed([["a"]])
    packed[0].append("b")
    assert packed[0] == ["a"] and packed[0] is not packed[0]


ARRAYS = {"numbers": np.arange(30_000.0), "names": np.array([b"%05d" % i for i in range(20_000)]),
          "truths": np.arange(100_000) % 3 == 0, "every other": np.arange(90_000)[::2],
          "turned": np.arange(60_000).reshape(300, 200).T, "text": np.array(["é", "bc"] * 20_000),
          "small": np.arange(3), "none": np.zeros((0, 2)), "objects": np.array([None] * 10_000)}


class Kept(Dataset):
    """Arrays and a packed list; an item is this process's private memory in KB, and one of them."""

    def __init__(self, n, arrays=None):
        self.arrays, self.n = arrays or {}, n
        self.numbers = np.arange(n * 20.0)
        self.rows = common.Packed((f"folder/file {i:07d}.mp4", i, (i / 2, i / 3)) for i in range(n))

    def __len__(self):
        return 4

    def __getitem__(self, k):
        if k == 0:
            return {"arrays": pickle.dumps(self.arrays)}
        before = private_kb()
        for i in range(k - 1, self.n, 3):
            name, j, _ = self.rows[i]
            assert name.endswith(f"{i:07d}.mp4") and i == j and self.numbers[i] == i
        return {"kb": (before, private_kb()), "pid": os.getpid()}


def private_kb():
    with open("/proc/self/smaps_rollup") as f:
        return sum(int(line.split()[1]) for line in f if line.startswith("Private"))


def items_of(dataset, context, workers=1):
    return list(DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=list_of,
                           multiprocessing_context=context))


def list_of(item):
    return item


def test_arrays_reach_forked_workers_as_they_are():
    found = pickle.loads(items_of(Kept(1, ARRAYS), "fork")[0]["arrays"])
    assert all(np.array_equal(found[k], x) for k, x in ARRAYS.items())


def test_workers_that_are_not_forked_share_arrays_and_packed_lists():
    """100000 rows and 16 MB of numbers: a worker has no more than with a list of ten. What was
    sent is forgotten with its owner.
    """
    data = Kept(100_000, dict(ARRAYS))
    (first, *large), small = items_of(data, "forkserver"), items_of(Kept(10), "forkserver")
    assert large[0]["kb"][1] - small[1]["kb"][1] < 5_000, (small, large)
    assert large[-1]["kb"][1] - large[0]["kb"][0] < 5_000, large
    found = pickle.loads(first["arrays"])
    for k, x in ARRAYS.items():
        assert found[k].dtype == x.dtype and np.array_equal(found[k], x), k
    assert {id(data.numbers), id(data.rows.data)} <= set(common._sent)
    assert all(x.is_shared() for x in common._sent.values())
    kept = {id(x) for x in ARRAYS.values()}
    del data
    gc.collect()
    assert set(common._sent) <= kept


def test_forked_workers_share_them_too():
    rows = items_of(Kept(100_000), "fork", 2)[1:]
    assert len({x["pid"] for x in rows}) == 2
    assert all(x["kb"][1] - x["kb"][0] < 5_000 for x in rows), rows


# ---- the scripts, imported where they are needed: workers above import this file -----------------

def slow_index(args, records):
    """offset and peaks of replai.SegmentIndex, segment by segment."""
    import replai
    rows = [s for r in records for s in r["segments"]]
    kept = []
    for start, stop, peaks in rows:
        p = np.array(peaks or [], np.float64)
        kept.append(start + p[replai.admissible(p, stop - start, args.delta_non_overlap)])
    return np.cumsum([0] + [len(k) for k in kept]), np.concatenate([*kept, np.zeros(0)])


def test_moments_are_indexed_as_one_by_one(tmp_path):
    import replai
    args = replai.parse_args(["--data", str(tmp_path)])
    rng = np.random.default_rng(0)
    records = [{"file": f"{n}.mp4", "segments": [
        [10.0 * k, 10.0 * k + rng.uniform(0.5, 10), None if rng.random() < 0.2 else np.sort(
            rng.uniform(0, 10, rng.integers(0, 6))).round(6).tolist()]
        for k in range(rng.integers(0, 5))]} for n in range(200)]
    offset, peaks = slow_index(args, records)
    index = replai.SegmentIndex(args, records)
    assert index.offset.tolist() == offset.tolist() and index.peaks.tolist() == peaks.tolist()
    assert index.count.tolist() == np.diff(offset).tolist()


def test_media_are_found_in_the_order_of_their_paths(tmp_path):
    import replai
    names = ["a-b/x.mp4", "a/x.mp4", "a/y.MP4", "a/z.txt", "a/.mp4", "P01/1.mp4",
             "P01/videos/2.MP4", "top.mp4"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "folder.mp4").mkdir()
    assert replai.mp4_files(tmp_path, "*") == ["P01/1.mp4", "a/x.mp4", "a/y.MP4", "a-b/x.mp4"]
    assert replai.mp4_files(tmp_path, "", "P*/videos") == ["P01/videos/2.MP4", "top.mp4"]
    assert replai.mp4_files(tmp_path, "nothing") == replai.mp4_files(tmp_path / "none", "") == []
    assert replai.stem("a.b/c.d.mp4") == "c.d"


def write_feature(path, T, D=4, pack=np.savez):
    path.parent.mkdir(parents=True, exist_ok=True)
    pack(path, arr_0=np.ones((T, D), np.float32))


@pytest.fixture
def features(tmp_path):
    """f2c_oops's `scan`, as it looks at three feature files, and their folder."""
    import f2c_oops
    (tmp_path / "train.txt").write_text("a.mp4\nb.mp4\nc.mp4\nlost.mp4\n")
    folder = tmp_path / "features" / "vit_b16" / "train"
    for name, T in (("a", 40), ("b.mp4", 50)):
        write_feature(folder / f"{name}.npz", T)
    write_feature(folder / "c.npz", 60, pack=np.savez_compressed)
    args = f2c_oops.parse_args(["--data", str(tmp_path), "--init", "none"])
    return lambda: f2c_oops.scan(args, "train"), folder


def test_feature_files_are_opened_once(features, monkeypatch):
    import f2c_oops
    scan, folder = features
    first, opened, look = scan(), [], f2c_oops.look
    assert {*json.loads((folder / "index.json").read_text())} == {"a.npz", "b.mp4.npz"}
    monkeypatch.setattr(f2c_oops, "look", lambda *a: opened.append(a[0].name) or look(*a))
    assert scan() == first and opened == ["c.npz"]      # the packed one
    write_feature(folder / "a.npz", 70)
    opened.clear()
    assert [v.frames for v in scan()] == [70, 50, 60]
    assert sorted(opened) == ["a.npz", "c.npz"]
    opened.clear()
    assert [v.frames for v in scan()] == [70, 50, 60] and opened == ["c.npz"]
    (folder / "a.npz").unlink()
    assert [v.frames for v in scan()] == [50, 60]


@pytest.mark.parametrize("content", [
    "", "[]", "{", '{"a.npz": 5}', '{"a.npz": []}', "dtype |O", "T 0", "offset -1", "dtype 3"])
def test_an_index_of_feature_files_that_is_not_ours_is_made_anew(features, content):
    scan, folder = features
    first = scan()
    index = json.loads((folder / "index.json").read_text())
    if " " in content and "{" not in content:
        what, value = content.split()
        k = {"T": 2, "dtype": 4, "offset": 5}[what]
        index["a.npz"][k] = int(value) if value[-1].isdigit() else value
        content = json.dumps(index)
    (folder / "index.json").write_text(content)
    assert scan() == first
    assert "a.npz" in json.loads((folder / "index.json").read_text())


def test_a_folder_of_features_that_cannot_be_written_is_read_all_the_same(features, monkeypatch):
    scan, folder = features

    def refuse(path, content):
        raise common.UserError("read only")
    monkeypatch.setattr(common, "write", refuse)
    assert len(scan()) == 3 and not (folder / "index.json").exists()


def test_samplers_of_a_million_begin_at_once_and_visit_each_once():
    import ssdet_coarsefine
    n = 1_000_000
    a = common.StepSampler(n, 1000, 0, 999, 1001)
    last, first = a
    assert {e for e, _ in last} == {0} and {e for e, _ in first} == {1}
    keys = [i for step in common.StepSampler(n, 50_000, 0, 0, 20) for _, i in step]
    assert len(set(keys)) == n
    shape = ssdet_coarsefine.Shape(50_000, 8, 32, 1.0, 1)
    keys = [i for step in ssdet_coarsefine.CycleSampler(n, lambda k: shape, 0, 0, 20)
            for _, _, _, i in step]
    assert len(set(keys)) == n
    assert torch.tensor(keys).max() == n - 1
