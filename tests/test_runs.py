"""What holds for every stage of every script: it ends well, continues after SIGKILL with the same
weights, scores each item once on any number of processes, stops at NaN, and ends with one line if
the user made a mistake.

All stages run on the small world of world.py, each from the files that earlier stages have left.
"""

import importlib
import json
import math
import os
import re
import shutil
import time
from functools import partial

import numpy as np
import pytest
import running
import torch
from PIL import Image
from running import quick

import common

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
    "pretrain_epic": EPIC,
    "linear": f"{EPIC} --stage linear --init RUNS/pretrain/last.pt",
    "recognition": f"{EGO4D} --stage recognition --init none",
    "anticipation": f"{EGO4D} --stage anticipation --init none",
    "statechange": f"{EGO4D} --stage statechange --init none",
    "cpc": UCF101,
    "cpc_hmdb51": "cpctrans {} --dataset hmdb51 --data DATA/hmdb51",
    "cpc_finetune": f"{UCF101} --pretrain RUNS/cpc/best.pt",
    "cpc_probe": f"{UCF101} --pretrain RUNS/cpc/best.pt --train_what last",
    "f2c": OOPS,
    "f2c2v": f"{OOPS} --stage f2c2v --init RUNS/f2c/best.pt",
    "classify": f"{OOPS} --stage classify --init RUNS/f2c/best.pt --spacing 4",
    "classify_video": f"{OOPS} --stage classify --level video --init RUNS/f2c2v/best.pt",
    "ssdet": f"{KINETICS} --init none --bn_splits 1",
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
    "ensemble": f"{CHARADES} --stage evaluate --init RUNS/fine/best.pt RUNS/x3d/best.pt"}
CONVERT = {"convert": "replai {} --stage convert --init RUNS/pretrain/last.pt"}
ORDER = ["moments", "features", *TRAIN, *SCORE, *CONVERT]     # one leaves files for the next
ORDER.insert(ORDER.index("coarse"), "extract")
STAGES = {**{k: v.format(TRAINING) for k, v in TRAIN.items()},
          **{k: v.format(SHORT) for k, v in {**PREPARE, **SCORE, **CONVERT}.items()}}
PRETRAINING = ["pretrain", "cpc", "f2c", "ssdet"]             # the default stages of the scripts
SCRIPTS = ["replai", "cpctrans", "f2c_oops", "ssdet_coarsefine"]


def run(name, out, data, runs, *more, **how):
    """Run a stage, with more flags behind, into the folder `out`."""
    script, *flags = STAGES[name].split()
    for k, v in {"DATA": data, "RUNS": runs, "OUT": out}.items():
        flags = [f.replace(k, str(v)) for f in flags]
    return quick(script, *flags, *more, "--out", out, **how)


@pytest.fixture(scope="session")
def runs(data, tmp_path_factory):
    """A folder with what each stage leaves, run on one process."""
    root = tmp_path_factory.mktemp("runs")
    for name in ORDER:
        r = run(name, root / name, data, root)
        assert r.code == 0 and r.err == "", (name, r)
    return root


def contents(folder, *without):
    """{file: content} of the files of a run, but for flags, log and figures."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name in ("args.json", "log.jsonl", *without):
            continue
        if path.suffix == ".png":
            assert np.asarray(Image.open(path)).std() > 1     # something is drawn
        elif path.suffix == ".pt":
            found[path.name] = torch.load(path, weights_only=True)
            found[path.name].pop("args")                      # tell its folder
        elif path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())
        elif path.suffix == ".npz":
            found[path.name] = {k: v.tolist() for k, v in np.load(path).items()}
        else:
            found[path.name] = path.read_bytes()
    return found


def assert_same(a, b, tolerance=0.0, where=""):
    """Values of JSON files or checkpoints are equal, numbers as nearly as `tolerance` says."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], tolerance, f"{where}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, tolerance, f"{where}/{k}")
    elif isinstance(a, torch.Tensor):
        assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance), where
    elif isinstance(a, float) and isinstance(b, float):
        assert a == b or math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance), (where, a, b)
    else:
        assert a == b, where


def one_error(r, code=1):
    """The message of a run that ended with one line."""
    errors = [line for line in r.err.splitlines() if not line.startswith("warning: ")]
    assert r.code == code and len(errors) == 1 and errors[0].startswith("error: "), r
    return errors[0][7:]


# ---- killed and started again --------------------------------------------------------------------

@pytest.mark.parametrize("name", TRAIN)
def test_a_killed_training_ends_in_the_same_weights(name, data, runs, tmp_path):
    """Killed in mid-epoch after a step, and when half of a checkpoint was written."""
    out = tmp_path / name
    for kill in (partial(running.kill_after_step, 2),
                 partial(running.kill_while_writing, "last.pt", 2)):
        assert run(name, out, data, runs, before=kill).code == -9
    r = run(name, out, data, runs)
    assert r.code == 0 and "continuing" in r.out, r
    assert_same(contents(runs / name), contents(out, "last.pt.tmp"))
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize("name", PRETRAINING)
def test_so_does_a_training_on_two_processes(name, data, runs, tmp_path):
    kill = partial(running.kill_after_step, 2)
    assert run(name, tmp_path / "killed", data, runs, n=2, before=kill).code == -9
    for out in ("killed", "whole"):
        r = run(name, tmp_path / out, data, runs, n=2)
        assert r.code == 0 and ("continuing" in r.out) == (out == "killed"), r
    assert_same(*(contents(tmp_path / out)["last.pt"] for out in ("whole", "killed")))


@pytest.mark.parametrize("name", ["features", "extract"])
def test_a_killed_preparation_goes_on_where_it_was(name, data, runs, tmp_path):
    kill = partial(running.kill_while_writing, ".npz" if name == "features" else ".npy", 3)
    out = tmp_path / name
    assert run(name, out, data, runs, before=kill).code == -9
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*.np?")}
    r = run(name, out, data, runs, n=3)
    assert r.code == 0 and done.items() <= {p: p.stat().st_mtime_ns for p in out.rglob("*")}.items()
    assert_same(contents(runs / name), contents(out), 1e-5)


def test_a_finished_run_trains_nothing_and_scores_anew(data, runs, tmp_path):
    for name in ("linear", "f2c", "fine"):
        shutil.copytree(runs / name, tmp_path / name)
        (tmp_path / name / "metrics.json").unlink()
        assert run(name, tmp_path / name, data, runs).code == 0
        assert_same(contents(runs / name), contents(tmp_path / name))


# ---- any number of processes ---------------------------------------------------------------------

@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", [*SCORE, *TRAIN])
def test_numbers_do_not_depend_on_the_number_of_processes(name, n, data, runs, tmp_path):
    """A finished training scores anew. Each process has two items or more, so it has work."""
    out = tmp_path / name
    if name in TRAIN:
        shutil.copytree(runs / name, out)
    r = run(name, out, data, runs, n=n)
    assert r.code == 0, r
    one, many = (contents(f, "last.pt", "best.pt") for f in (runs / name, out))
    assert_same(one, many, 1e-4)


# ---- what stops a run ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", TRAIN)
def test_nan_stops_before_the_update(name, data, runs, tmp_path):
    r = run(name, tmp_path / "out", data, runs, before=partial(running.nan_in_step, 2, 0))
    message = one_error(r)
    assert "nan" in message and "step 1" in message
    state = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert state["step"] == 1 and all(x.isfinite().all() for x in state["model"].values())
