"""What holds for every stage of every script: it ends well, continues after SIGKILL with the same
weights, scores each item once on any number of processes, stops at NaN, and ends with one line if
the user made a mistake.

All stages run on the small world of world.py, each from the files that earlier stages have left.
"""

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
from running import quick

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
            continue
        if path.suffix in (".pt", ""):
            value = torch.load(path, weights_only=True)
            if path.suffix:
                del value["args"]                             # they tell the folder
        elif path.suffix == ".json":
            value = json.loads(path.read_text())
        elif path.suffix == ".npz":
            value = {k: torch.from_numpy(v) for k, v in np.load(path).items()}
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as z:
                value = {k: json.loads(z.read(k)) for k in z.namelist()}
        else:                                                 # text, and numbers with a point
            value = re.split(r"(-?\d+\.\d+(?:e[-+]\d+)?)", path.read_text())
            value[1::2] = map(float, value[1::2])
        found[str(path.relative_to(folder))] = value
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
    assert_same(contents(runs / name), contents(out))
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(steps) >= 4 and steps == [*range(len(steps))]


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
    kill, pattern = (("4.npz", 1), "*.npz") if name == "features" else (("TR004", 1), "TR0??")
    out = tmp_path / name
    assert run(name, out, data, runs,
               before=partial(running.kill_while_writing, *kill)).code == -9
    done = {path: path.stat().st_mtime_ns for path in out.rglob(pattern)}
    assert done
    r = run(name, out, data, runs, n=3)
    assert r.code == 0 and done.items() <= {p: p.stat().st_mtime_ns for p in out.rglob("*")}.items()
    assert_same(contents(runs / name, "metrics.json"), contents(out, "metrics.json"), 1e-5)


def test_a_finished_run_trains_nothing_and_scores_anew(data, runs, tmp_path):
    for name in ("linear", "f2c", "fine"):
        shutil.copytree(runs / name, tmp_path / name)
        (tmp_path / name / "metrics.json").unlink()
        assert run(name, tmp_path / name, data, runs).code == 0
        assert_same(contents(runs / name), contents(tmp_path / name))


# ---- any number of processes ---------------------------------------------------------------------

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


def test_nan_between_two_checks_never_reaches_a_checkpoint(data, runs, tmp_path):
    """Nor does it if only one of two processes has it."""
    flags = "--log_every", 3, "--save_every", 100
    for name, n in (("cpc", 1), ("pretrain", 2)):
        r = run(name, tmp_path / name, data, runs, *flags, n=n,
                before=partial(running.nan_in_step, 1, n - 1))
        assert "nan" in one_error(r)
        assert not [*(tmp_path / name).glob("*.pt")]


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
          "no text": lambda x: x[:-4] + b"\xff\xfe" + x[-4:]}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name, file", LISTS)
def test_a_broken_list_is_named(name, file, fault, data, runs, tmp_path):
    copy, path = world_with(data, tmp_path / "data", file,
                            lambda path: FAULTS[fault](path.read_bytes()))
    r = run(name, tmp_path / "out", copy, runs)
    if r.code == 0:                                           # rows that are left may be enough
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
    "a text as weights": ("f2c2v", "--init DATA/oops/annotations/val.txt", "val.txt"),
    "code as weights": ("linear", "--init OUT/code.pt", "code.pt: no checkpoint, damaged, or"),
    "no features": ("f2c", "--features OUT", "--stage features"),
    "too few samples": ("f2c", "--batch_size 600", "do not fill a batch of 600"),
    "other flags": ("cpc", "--lr 0.5", "was made with lr"),
    "bf16 on a CPU": ("ssdet", "--precision bf16", "bf16"),
    "a stream of another kind": ("detect", "--stream coarse", "--stream")}


@pytest.mark.parametrize("what, n", [
    *((what, 1) for what in MISTAKES),
    *((what, 2) for what in ("no videos", "code as weights", "other flags"))])
def test_a_mistake_is_one_line(what, n, data, runs, tmp_path):
    name, flags, words = MISTAKES[what]
    torch.save({"model": Code(tmp_path / "made")}, tmp_path / "code.pt")
    out = tmp_path / "out"
    if what == "other flags":
        shutil.copytree(runs / name, out)
    for k, v in {"DATA": data, "RUNS": runs, "OUT": tmp_path}.items():
        flags, words = flags.replace(k, str(v)), words.replace(k, str(v))
    before = contents(runs / name)
    assert words in one_error(run(name, out, data, runs, *flags.split(), n=n))
    assert not (tmp_path / "made").exists()
    assert what != "other flags" or assert_same(before, contents(out)) is None


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
    script, *flags = STAGES[name].replace("DATA", str(data)).replace("RUNS", str(runs)).split()
    if name != "f2c":
        flags.remove("--tiny")
    r = running.command(script, *flags, "--init", "none", "--epochs", 1, "--out", tmp_path / "out",
                        n=min(2, torch.cuda.device_count()), gpus=True, timeout=300)
    assert r.code == 0, r
    rows = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows)


def test_as_a_user_types_it(data, runs, tmp_path):
    """torchrun; everything else here is forked."""
    flags = STAGES["pretrain"].replace("DATA", str(data)).split()[1:]
    r = running.command("replai", *flags, "--out", tmp_path / "out", n=2, cwd=tmp_path)
    assert r.code == 0 and (tmp_path / "out/metrics.json").exists(), r
    r = running.command("replai", *flags, "--epochs", 9, "--out", tmp_path / "out", n=2)
    lines = [line for line in r.err.splitlines() if line.startswith("error: ")]
    assert r.code == 1 and len(lines) == 1 and "was made with epochs 2, now it is 9" in lines[0], r
