"""What holds for every stage: it continues after SIGKILL to the same weights, has the rates of its
schedule, scores each item once on any number of processes, stops at NaN, and ends with one line if
the user made a mistake. Stages run on the small world of world.py, from files that others left.
"""

import argparse
import json
import math
import os
import re
import shutil
import zipfile
from functools import partial

import av
import numpy as np
import pytest
import running
import torch
from PIL import Image
from running import SCRIPTS, quick
from torch.utils._pytree import tree_flatten_with_path

import common
from common import UserError

SHORT = "--tiny --workers 0 --log_every 1 --save_every 1"
TRAINING = f"{SHORT} --epochs 2 --batch_size 6"               # two steps per epoch
EGO4D = "replai {} --data DATA/ego4d --crop 32"
EPIC = "replai {} --dataset epic --data DATA/epic --crop 32"
UCF101 = "cpctrans {} --data DATA/ucf101"
OOPS = "f2c_oops {} --data DATA/oops --features RUNS/features/made"
KINETICS = "ssdet_coarsefine {} --data DATA/kinetics400 --crop 32 --num_frames 8"
CHARADES = "ssdet_coarsefine {} --dataset charades --data DATA/charades --crop 32 --num_frames 8"
TRAIN = {          # name: script and flags; DATA, RUNS and OUT are folders
    "pretrain": EGO4D,
    "pretrain_epic": f"{EPIC} --clr_coeff 0.25",
    "linear": f"{EPIC} --stage linear --init RUNS/pretrain/last.pt",
    "recognition": f"{EGO4D} --stage recognition --init none --limit 13",
    "anticipation": f"{EGO4D} --stage anticipation --init none --limit 13",
    "statechange": f"{EGO4D} --stage statechange --init none",
    "cpc": UCF101,
    "cpc_hmdb51": "cpctrans {} --dataset hmdb51 --data DATA/hmdb51",
    "cpc_finetune": f"{UCF101} --pretrain RUNS/cpc/best.pt",
    "cpc_probe": f"{UCF101} --pretrain RUNS/cpc/best.pt --train_what last",
    "f2c": OOPS,
    "f2c2v": f"{OOPS} --stage f2c2v --init RUNS/f2c/best.pt",
    "classify": f"{OOPS} --stage classify --init RUNS/f2c/best.pt --spacing 4",
    "classify_video": f"{OOPS} --stage classify --level video --init RUNS/f2c2v/best.pt",
    "ssdet": f"{KINETICS} --init none --bn_splits 1 --aug_prob 1",
    "kinetics": f"{KINETICS} --init none --task classify --bn_splits 1",
    "fine": f"{CHARADES} --stage finetune --stream fine --init RUNS/ssdet/last.pt",
    "coarse": f"{CHARADES} --stage finetune --stream coarse --init RUNS/ssdet/last.pt --features "
              "RUNS/extract/made",
    "two": f"{CHARADES} --stage finetune --stream two --init RUNS/coarse/best.pt RUNS/fine/best.pt",
    "x3d": f"{CHARADES} --stage finetune --stream x3d --init RUNS/kinetics/last.pt",
    "slowfast": f"{CHARADES} --stage finetune --stream slowfast --init none",
    "thumos": "ssdet_coarsefine {} --dataset multithumos --data DATA/multithumos --crop 32 "
              "--num_frames 8 --stage finetune --stream fine --init none"}
PREPARE = {        # skip what is done
    "moments": f"{EGO4D} --stage moments",
    "features": "f2c_oops {} --stage features --data DATA/oops --features OUT/made",
    "extract": f"{CHARADES} --stage extract --init RUNS/fine/best.pt --features OUT/made"}
SCORE = {
    "cpc_test": f"{UCF101} --test RUNS/cpc_finetune/best.pt",
    "localize": f"{OOPS} --stage localize --init RUNS/classify/best.pt",
    "evaluate": f"{OOPS} --stage evaluate --init RUNS/classify/best.pt",
    "evaluate_video": f"{OOPS} --stage evaluate --level video --init RUNS/classify_video/best.pt",
    "detect": f"{CHARADES} --stage evaluate --init RUNS/fine/best.pt",
    "ensemble": f"{CHARADES} --stage evaluate --init RUNS/fine/best.pt RUNS/fine/last.pt"}
CONVERT = {"convert": "replai {} --stage convert --init RUNS/pretrain/last.pt"}
ORDER = ["moments", "features", *TRAIN, *SCORE, *CONVERT]     # one leaves files for the next
ORDER.insert(ORDER.index("coarse"), "extract")
STAGES = {**{k: v.format(TRAINING) for k, v in TRAIN.items()},
          **{k: v.format(SHORT) for k, v in {**PREPARE, **SCORE, **CONVERT}.items()}}
PRETRAINING = ["pretrain", "cpc", "f2c", "ssdet"]             # the default stages of the scripts


def words(line, data, runs, out):
    """The words of a line, with the folders for which DATA, RUNS and OUT stand."""
    for name, folder in {"DATA": data, "RUNS": runs, "OUT": out}.items():
        line = line.replace(name, str(folder))
    return line.split()


def run(name, out, data, runs, *more, **how):
    """Run a stage, with more flags behind, into the folder `out`."""
    return quick(*words(STAGES[name], data, runs, out), *more, "--out", out, **how)


@pytest.fixture(scope="session")
def runs(data, tmp_path_factory):
    """A folder with what each stage leaves, run on one process."""
    root = tmp_path_factory.mktemp("runs")
    for name in ORDER:
        r = run(name, root / name, data, root)
        assert r.code == 0 and r.err == "", (name, r)
    return root


def content(path):
    """Values of a file of a run."""
    if path.suffix == ".png":
        assert np.asarray(Image.open(path)).std() > 1         # something is drawn
        return None
    if path.suffix in (".pt", ""):
        value = torch.load(path, weights_only=True)
        return {k: x for k, x in value.items() if k != "args"} if path.suffix else value
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".npz":
        return {k: torch.from_numpy(x) for k, x in np.load(path).items()}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as z:
            return {k: json.loads(z.read(k)) for k in z.namelist()}
    parts = re.split(r"(-?\d+\.\d+(?:e[-+]\d+)?)", path.read_text())      # and numbers with a point
    return [float(x) if k % 2 else x for k, x in enumerate(parts)]


def contents(folder, *without):
    """{file: content} of the files of a run, but for its flags and log, which differ."""
    skip = "args.json", "log.jsonl", *without
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in skip}


def assert_same(a, b, tolerance=0.0):
    """Values of JSON files or checkpoints are equal, numbers as nearly as `tolerance` says."""
    (a, form), (b, other) = tree_flatten_with_path(a), tree_flatten_with_path(b)
    assert form == other
    for (where, x), (_, y) in zip(a, b):
        if torch.is_tensor(x):
            assert torch.allclose(x.double(), y.double(), rtol=tolerance, atol=tolerance), where
        else:
            assert x == y or isinstance(x, float) and math.isclose(
                x, y, rel_tol=tolerance, abs_tol=tolerance), (where, x, y)


def one_error(r, code=1):
    """The message of a run that ended with one line."""
    errors = [line for line in r.err.splitlines() if not line.startswith("warning: ")]
    assert r.code == code and len(errors) == 1 and errors[0].startswith("error: "), r
    return errors[0][7:]


# ---- killed and started again, and on any number of processes ------------------------------------

@pytest.mark.parametrize("name, n", [*((x, 1) for x in TRAIN), *((x, 2) for x in PRETRAINING)])
def test_a_killed_training_ends_in_the_same_weights(name, n, data, runs, tmp_path):
    """Killed in mid-epoch after a step, and when half of a checkpoint was written."""
    whole, out = runs / name if n == 1 else tmp_path / "whole", tmp_path / "killed"
    if n > 1:
        assert run(name, whole, data, runs, n=n).code == 0
    for kill in (partial(running.kill_after_step, 2),
                 partial(running.kill_while_writing, "last.pt", 2)):
        assert run(name, out, data, runs, n=n, before=kill).code == -9
    r = run(name, out, data, runs, n=n)
    assert r.code == 0 and "continuing" in r.out, r
    assert_same(contents(whole), contents(out))
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(steps) >= 4 and steps == [*range(len(steps))]


@pytest.mark.parametrize("name", ["features", "extract"])
def test_a_killed_preparation_goes_on_where_it_was(name, data, runs, tmp_path):
    kill, pattern = (("4.npz", 1), "*.npz") if name == "features" else (("TR004", 1), "TR0??")
    out = tmp_path / name
    assert run(name, out, data, runs, before=partial(running.kill_while_writing, *kill)).code == -9
    done = {path: path.stat().st_mtime_ns for path in out.rglob(pattern)}
    assert done
    r = run(name, out, data, runs, n=3)
    assert r.code == 0 and done.items() <= {p: p.stat().st_mtime_ns for p in out.rglob("*")}.items()
    assert_same(contents(runs / name, "metrics.json"), contents(out, "metrics.json"), 1e-5)


@pytest.mark.parametrize("name, n", [
    *((name, 3) for name in [*SCORE, *TRAIN] if not name.startswith("pretrain")),
    *((name, 2) for name in [*SCORE, "linear", "cpc_finetune", "f2c", "fine"])])
def test_numbers_do_not_depend_on_the_number_of_processes(name, n, data, runs, tmp_path):
    """A finished training scores anew. There are 13 items, so that each process has some."""
    out = tmp_path / name
    if name in TRAIN:
        shutil.copytree(runs / name, out, ignore=lambda folder, names: [
            x for x in names if not x.endswith((".pt", "args.json", "log.jsonl"))])
    r = run(name, out, data, runs, n=n)
    assert r.code == 0, r
    assert_same(*(contents(folder, "last.pt", "best.pt") for folder in (runs / name, out)), 1e-4)


# ---- what stops a run ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", TRAIN)
def test_nan_stops_before_the_update(name, data, runs, tmp_path):
    r = run(name, tmp_path / "out", data, runs, before=partial(running.nan_in_step, 2, 0))
    message = one_error(r)
    assert "nan" in message and "step 1" in message
    state = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert state["step"] == 1 and all(x.isfinite().all() for x in state["model"].values())


def unnoticed(rank):
    """NaN in the first step, and no check of gradients."""
    common.check_finite = lambda *_: None
    running.nan_in_step(1, 0, rank)


@pytest.mark.parametrize("name, n, before, word", [
    ("cpc", 1, partial(running.nan_in_step, 1, 0), "loss nan"),
    ("pretrain", 2, partial(running.nan_in_step, 1, 1), "gradient nan"),
    ("pretrain", 1, unnoticed, "not finite; no checkpoint was written")])
def test_nan_between_two_checks_never_reaches_a_checkpoint(name, n, before, word, data, runs,
                                                           tmp_path):
    """Nor does it if only one of two processes has it."""
    r = run(name, tmp_path / "out", data, runs, "--log_every", 3, "--save_every", 100, n=n,
            before=before)
    assert word in one_error(r) and not [*(tmp_path / "out").glob("*.pt")]


# ---- what the loops do ---------------------------------------------------------------------------

COSINE = [[(1 + math.cos(math.pi * k / 4)) / 2] for k in range(4)]
CYCLE = np.array(running.MODULES[0].one_cycle(0.01, 2)).repeat(2, 0)      # (rate, momentum)
GROUPS = {         # name: rates (steps, groups), weight decay and momentum of each group
    "pretrain": (CYCLE[:, :1], [1e-4], CYCLE[:, 1:]),
    "linear": (0.05 * np.array([[1, 1], [1, 1], [0.01, 0.01], [0.01, 0.01]]), [0, 0], 0.9),
    "statechange": (0.01 * np.repeat(COSINE, 2, 1), [1e-4, 0], 0.9),
    "cpc": (1e-3 * np.array([[1], [1], [0.5], [0.5]]), [1e-5], 0),
    "cpc_finetune": (np.array([[1], [1], [0.1], [0.1]]) * [5e-3, 5e-4], [1e-5] * 2, 0),
    "cpc_probe": ([[5e-3]], [1e-5], 0),
    "f2c": ([[1e-3], [1e-3], [5.005e-4], [5.005e-4]], [1e-4], 0),         # down to 1e-6
    "ssdet": (np.array(COSINE) * [[1], [2], [3], [4]] / 20 * [0.01, 0.1], [5e-5] * 2, 0.9),
    "fine": (np.array(COSINE) * [0.01, 0.1], [1e-5] * 2, 0.9),
    "coarse": (np.array(COSINE) * [0.005, 0.5], [1e-5] * 2, 0.9)}


@pytest.mark.parametrize("name", GROUPS)
def test_each_step_has_the_rates_of_its_schedule(name, data, runs, tmp_path):
    r = run(name, tmp_path / "out", data, runs, before=running.told)
    groups = [json.loads(line[7:]) for line in r.out.splitlines() if line.startswith("groups ")]
    want = np.broadcast_arrays(*GROUPS[name], np.zeros((4, len(groups[-1]))))[:3]
    assert np.allclose(groups[-4:], np.stack(want, 2), rtol=1e-6, atol=0), groups


def test_the_losses_of_replai_have_their_weights(runs):
    for name, share in ("pretrain", 0.5), ("pretrain_epic", 0.25):        # --clr_coeff
        for line in (runs / name / "log.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert row["loss"] == pytest.approx(share * row["avc"] + row["astc"] / 2, rel=1e-4)


@pytest.mark.parametrize("name, key, sign", [
    ("cpc", "top1", 1), ("f2c", "top1", 1), ("f2c2v", "top1", 1), ("recognition", "noun@1", 1),
    ("statechange", "StCC acc", 1), ("anticipation", "verb ED@20", -1), ("fine", "mAP", 1)])
def test_the_best_epoch_of_the_validation_set_is_kept(name, key, sign, runs):
    rows = map(json.loads, (runs / name / "log.jsonl").read_text().splitlines())
    rows = [row for row in rows if f"val_{key}" in row]
    best = max(rows, key=lambda row: sign * row[f"val_{key}"])
    saved = torch.load(runs / name / "best.pt", weights_only=True)
    assert len(rows) == 2 and saved["step"] == best["step"] + 1
    metrics = json.loads((runs / name / "metrics.json").read_text())
    found = {metrics.get(k) for k in (key, f"val_{key}", f"best_val_{key}")} - {None}
    assert min(abs(x - best[f"val_{key}"]) for x in found) < 1e-3, (metrics, rows)


# ---- the order of samples ------------------------------------------------------------------------

def make(args, items, i, rng):
    if items[i] == "broken":
        raise common.VideoError("a.mp4: broken")
    return {"index": i}


def drawn(rank=0, start=0, seed=0, plan=None):
    """[[index of a sample]] of this process's batches from step `start` to 5, of 14 samples."""
    args = argparse.Namespace(seed=seed, workers=0, batch_size=6)
    return [batch["index"].tolist() for batch in common.batches(
        args, common.Samples(args, range(14), make), torch.device("cpu"), start, 6, plan=plan)]


def test_an_epoch_is_a_permutation_without_its_last_partial_batch_on_all_processes(tmp_path):
    batches = drawn()
    epochs = np.array(batches).reshape(3, 12)
    assert {len({*epoch}) for epoch in epochs} == {12} and len({tuple(e) for e in epochs}) == 3
    assert drawn(start=3) == batches[3:] and drawn(seed=1) != batches
    for n in (2, 3):
        (tmp_path / str(n)).mkdir()
        shares = running.processes(drawn, n, tmp_path / str(n))
        assert [sum(parts, []) for parts in zip(*shares)] == batches


def test_a_plan_of_batch_sizes_goes_through_all_samples_without_a_gap():
    plan = [(6,), (4,), (10,), (4,), (4,)]
    batches = drawn(plan=plan)
    assert [(len(batch),) for batch in batches] == plan and drawn(start=2, plan=plan) == batches[2:]
    first, second = np.split(np.concatenate(batches), 2)
    assert {*first} == {*second} == {*range(14)} and (first != second).any()


def test_a_limit_takes_one_item_of_each_part():
    """Not always the first of three, which could be of one kind."""
    chosen = common.spread(range(192), 64)
    assert [k // 3 for k in chosen] == [*range(64)] and {k % 3 for k in chosen} == {0, 1, 2}
    assert chosen == common.spread(range(192), 64) and len({*common.spread(range(101), 70)}) == 70
    assert common.spread("abc", None) == common.spread("abc", 9) == ["a", "b", "c"]


def results_of_one_item(rank):
    with pytest.raises(RuntimeError, match="2 results for 2 items"):
        common.gather({0: rank}, 2)


def test_what_is_wrong_is_refused_not_guessed(tmp_path):
    """An item that two processes have, another network's checkpoint, a place that is a file."""
    running.processes(results_of_one_item, 2, tmp_path)
    args, path = argparse.Namespace(lr=1.0), tmp_path / "last.pt"
    common.save(path, 1, args, samples=3, model=torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="last.pt: is of another network or stage; choose"):
        common.resume(path, args, 3, model=torch.nn.Linear(3, 2))
    with pytest.raises(UserError, match=r"last.pt/x: cannot be written \(.*last.pt"):
        common.write(path / "x", "")
    with pytest.raises(UserError, match="x: cannot be written"):
        common.write(tmp_path / "x", lambda f: f.write(b"half") and torch.save({}, "/dev/full"))
    assert [p.name for p in tmp_path.glob("x*")] == []        # not even a part of it


# ---- broken videos and lists ---------------------------------------------------------------------

def world_with(data, folder, name, change):
    """(copy of the world with another content of a file, that file). change: path -> content."""
    shutil.copytree(data, folder, copy_function=os.link)
    path = folder / name
    path.unlink()                                             # the link alone
    path.write_bytes(change(data / name))
    return folder, path


def damaged(path):
    """A video in which all frames but the first are zeros: only reading them shows the fault."""
    with av.open(str(path)) as c:
        head = 8 if c.format.name == "avi" else 0             # bytes of a packet's header
        places = [(p.pos + head, p.size) for p in c.demux(video=0) if p.size]
    content = bytearray(path.read_bytes())
    for at, size in places[1:]:
        content[at:at + size] = bytes(size)
    return content


BROKEN = [("linear", "epic/videos/P01/P01_03.mp4", "epic/videos/P02/P02_03.mp4"),
          ("recognition", "ego4d/clips/clip-train3.mp4", "ego4d/clips/clip-val3.mp4"),
          ("statechange", "ego4d/videos/video-train3.mp4", "ego4d/videos/video-val3.mp4"),
          ("cpc_finetune", "ucf101/UCF-101/YoYo/v_YoYo_g11_c04.avi",
           "ucf101/UCF-101/YoYo/v_YoYo_g24_c04.avi"),
          ("ssdet", "kinetics400/train/climbing_a_rope/-----train3_000000_000010.mp4",
           "kinetics400/val/climbing_a_rope/-------val3_000000_000010.mp4"),
          ("fine", "charades/Charades_v1/TR003.mp4", "charades/Charades_v1/TE003.mp4")]


@pytest.mark.parametrize("name, train, val", BROKEN)
def test_a_broken_video_is_replaced_in_training_and_named_in_evaluation(name, train, val, data,
                                                                        runs, tmp_path):
    copy, path = world_with(data, tmp_path / "train", train, damaged)
    r = run(name, tmp_path / "out", copy, runs)
    assert r.code == 0 and f"warning: {path}" in r.err + r.out, r
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    replaced = metrics["broken_training_samples"]             # cpctrans finds it when it counts
    assert replaced == r.err.count("sample replaced") and (replaced or name == "cpc_finetune")
    copy, path = world_with(data, tmp_path / "val", val, damaged)
    assert str(path) in one_error(run(name, tmp_path / "no", copy, runs))


def test_samples_that_are_all_broken_end_the_training():
    samples = common.Samples(argparse.Namespace(seed=0), ["broken"] * 3, make)
    with pytest.raises(common.VideoError, match=r"^a\.mp4: broken \(20 samples in a row"):
        samples[0, 1]


LISTS = [("linear", "epic/annotations/EPIC_100_train.csv"),
         ("recognition", "ego4d/annotations/fho_lta_train.json"),
         ("statechange", "ego4d/annotations/fho_oscc-pnr_train.json"),
         ("cpc", "ucf101/ucfTrainTestlist/trainlist01.txt"),
         ("cpc_hmdb51", "hmdb51/testTrainMulti_7030_splits/wave_test_split1.txt"),
         ("classify", "oops/annotations/transition_times.json"),
         ("ssdet", "kinetics400/train.csv"),
         ("fine", "charades/Charades/Charades_v1_train.csv"),
         ("thumos", "multithumos/annotations/Run.txt")]
FAULTS = {"empty": lambda x: b"", "cut": lambda x: x[:len(x) * 2 // 3 - 1],
          "a word": lambda x: re.sub(rb"\d+(\D*)$", rb"one\1", x),
          "no text": lambda x: x[:-4] + b"\xff\xfe" + x[-4:],
          "of Windows": lambda x: b"\xef\xbb\xbf" + x.replace(b"\n", b"\r\n")}       # no fault


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name, file", LISTS)
def test_a_broken_list_is_named_and_one_of_windows_is_read(name, file, fault, data, runs, tmp_path):
    copy, path = world_with(data, tmp_path / "data", file,
                            lambda path: FAULTS[fault](path.read_bytes()))
    r = run(name, tmp_path / "out", copy, runs)
    if fault == "of Windows":
        assert r.code == 0, r
    elif r.code == 0:                                         # rows that are left may be enough
        assert fault == "cut" or path.suffix == ".txt" and fault in ("empty", "a word")
    else:
        assert str(path) in one_error(r)


# ---- mistakes ------------------------------------------------------------------------------------

class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


MISTAKES = {       # what is wrong: (stage, flags, words of the error)
    "no data": ("pretrain", "--data OUT/nowhere", "nowhere"),
    "no videos": ("cpc", "--data OUT", "OUT"),
    "no checkpoint": ("fine", "--init OUT/no.pt", "no.pt: no such checkpoint"),
    "weights of another network": ("fine", "--init RUNS/cpc/best.pt", "cpc/best.pt: "),
    "weights of another size": ("linear", "--init OUT/thin.pt", "1 tensors have another shape"),
    "weights that are NaN": ("linear", "--init OUT/nan.pt", "nan.pt: 1 tensors are not finite"),
    "a text as weights": ("f2c2v", "--init DATA/oops/annotations/val.txt", "val.txt"),
    "code as weights": ("linear", "--init OUT/code.pt", "code.pt: no checkpoint, damaged, or"),
    "no features": ("f2c", "--features OUT", "--stage features"),
    "features of another network": ("extract", "--init RUNS/thumos/best.pt --features "
                                    "RUNS/extract/made", "settings (sum_of_weights); choose"),
    "too few samples": ("f2c", "--batch_size 600", "do not fill a batch of 600"),
    "other flags": ("cpc", "--lr 0.5", "was made with lr"),
    "other videos": ("cpc", "--data OUT/few", "was made with samples 13, now it is 12"),
    "bf16 on a CPU": ("ssdet", "--precision bf16", "bf16"),
    "a stream of another kind": ("detect", "--stream coarse", "--stream")}


@pytest.mark.parametrize("what, n", [
    *((what, 1) for what in MISTAKES),
    *((what, 2) for what in ("no videos", "code as weights", "other flags"))])
def test_a_mistake_is_one_line(what, n, data, runs, tmp_path):
    name, flags, error = MISTAKES[what]
    torch.save({"model": Code(tmp_path / "made")}, tmp_path / "code.pt")
    weights = torch.load(runs / "pretrain/last.pt", weights_only=True)["model"]
    norm = weights["backbone.video.conv5x.0.out_bn.weight"]
    for file, x in (("nan.pt", norm * math.nan), ("thin.pt", norm[:8])):
        torch.save({**weights, "backbone.video.conv5x.0.out_bn.weight": x}, tmp_path / file)
    shutil.copytree(data / "ucf101", tmp_path / "few", copy_function=os.link,
                    ignore=shutil.ignore_patterns("*_g09_*"))
    out = tmp_path / "out"
    if what.startswith("other"):
        shutil.copytree(runs / name, out)
    r = run(name, out, data, runs, *words(flags, data, runs, tmp_path), n=n)
    assert error.replace("OUT", str(tmp_path)) in one_error(r)
    assert not (tmp_path / "made").exists()
    if what.startswith("other"):
        assert_same(contents(runs / name), contents(out))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_flag_is_one_line_and_status_2(script, tmp_path):
    for flags in ("--epoch 3", "--epochs 0", "--batch_size x", "--stage everything"):
        assert flags.split()[0] in one_error(quick(script, *flags.split(), cwd=tmp_path), 2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_within_five_seconds(script, tmp_path):
    start = os.times().children_user                          # CPU time, for a busy machine
    r = running.command(script, "--help", cwd=tmp_path)
    assert r.code == 0 and os.times().children_user - start < 5
    assert r.out.count("(default: ") > 15 and max(map(len, r.out.splitlines())) <= 100
    for flag in ("--stage", "--dataset", "--as_released", "--init", "--batch_size", "--tiny"):
        assert flag in r.out
    assert not [*tmp_path.iterdir()]


# ---- GPUs ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*TRAIN, "features", "extract", *SCORE])
def test_networks_and_losses_leave_no_tensor_on_the_cpu(name, data, runs, tmp_path):
    """Forward on a GPU that does not exist, see running.fake_cuda."""
    k = 2 if name in TRAIN else 0
    r = run(name, tmp_path / "out", data, runs, before=partial(running.fake_cuda, k))
    assert r.code == 0 and f"done, {k} training steps" in r.out, r


@pytest.mark.parametrize("name", TRAIN)
def test_two_steps_run_under_bfloat16_autocast(name, data, runs, tmp_path):
    r = run(name, tmp_path / "out", data, runs, before=partial(running.bf16_on_the_cpu, 2))
    assert r.code == 0 and "done, 2 training steps" in r.out, r


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PRETRAINING)
def test_two_steps_of_each_default_stage_run_on_gpus(name, data, runs, tmp_path):
    """With the published networks; F2C's is as small as the features of this world."""
    script, *flags = words(STAGES[name], data, runs, tmp_path)
    if name != "f2c":
        flags.remove("--tiny")
    r = running.command(script, *flags, "--init", "none", "--epochs", 1, "--out", tmp_path / "out",
                        n=min(2, torch.cuda.device_count()), gpus=True, timeout=300)
    assert r.code == 0, r
    rows = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows)


def test_as_a_user_types_it(data, runs, tmp_path):
    """torchrun; everything else here is forked."""
    flags = words(STAGES["pretrain"], data, runs, tmp_path)
    r = running.command(*flags, "--out", tmp_path / "out", n=2, cwd=tmp_path)
    assert r.code == 0 and (tmp_path / "out/metrics.json").exists(), r
    r = running.command(*flags, "--epochs", 9, "--out", tmp_path / "out", n=2, cwd=tmp_path)
    lines = [line for line in r.err.splitlines() if line.startswith("error: ")]
    assert r.code == 1 and len(lines) == 1 and "was made with epochs 2, now it is 9" in lines[0], r
