"""Full and read-only disks, numbers that are no numbers, and any number of processes.

`disk` ends every write of a run as a full disk would: before each file that a run writes, the
process forks; in the copy the disk is full from the first, second, ... operation on, and the copy
has to end with one line and to leave the folder as it was. `numbers` puts NaN and Inf into losses,
gradients and parameters. `equality` runs every stage that predicts or writes something for each
item on 1, 2 and 3 processes, and compares what they leave.

This file is also the script that the forked processes run, see `parse_args`: many cases, one after
the other, in one group of processes.
"""

import argparse
import builtins
import collections
import contextlib
import errno
import importlib
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))      # as torchrun starts it

import numpy as np  # noqa: E402
import running  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import toy  # noqa: E402
from fault_rows import Row  # noqa: E402

import common  # noqa: E402

ITEMS = 7                                                     # of every split: a prime number
SECONDS, FPS = 8.4, 15


# ---- a small world: the same seven videos under the names of every dataset -------------------

def picture(k, t, w=64, h=48):
    """Picture t of video k: waves of its own length, direction and colour."""
    x, y = np.arange(w), np.arange(h)[:, None]
    waves = [np.sin((x * (1 + k % 3) + (3 + k) * t) / (7 + c)) * np.cos((y + (k - 3) * t) / (5 + c))
             for c in range(3)]
    return (128 + 90 * np.stack(waves, -1)).astype(np.uint8)


def write_videos(folder):
    """v0.mp4 .. v6.mp4 with clicks at times of their own."""
    for k in range(ITEMS):
        rng, rate = np.random.default_rng(k), 16000
        sound = 0.002 * rng.normal(size=(1, round(SECONDS * rate)))
        for t in 1.5 + 0.3 * k + np.arange(3) * (1.3 + 0.1 * k):
            n = round(t * rate)
            sound[:, n:n + 120] += 0.6 * rng.uniform(-1, 1, 120) * np.exp(-np.arange(120) / 40)
        toy.write_video(folder / f"v{k}.mp4", (picture(k, t) for t in range(round(SECONDS * FPS))),
                        FPS, sound.astype(np.float32), rate)


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def world(folder):
    """The folder of all datasets, made once."""
    root = folder / "world"
    if (root / "made").exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    write_videos(root / "videos")

    def link(k, *parts):
        path = root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(root / "videos" / f"v{k}.mp4", path)

    notes, stamp = root / "epic" / "annotations", "00:00:0{:.2f}".format
    head = ("narration_id,participant_id,video_id,start_timestamp,stop_timestamp,verb_class,"
            "noun_class")
    for p, split in enumerate(("train", "validation", "test_timestamps"), 1):
        for k in range(ITEMS):
            link(k, "epic", "videos", f"P0{p}", f"P0{p}_0{k}.MP4")
        text(notes / f"EPIC_100_{split}.csv", head, *(
            f"P0{p}_0{k}_0,P0{p},P0{p}_0{k},{stamp(1.5 + k / 4)},{stamp(3 + k / 4)},{k},{2 * k}"
            for k in range(ITEMS)))
    text(notes / "EPIC_100_tail_verbs.csv", "verb", 3, 4)
    text(notes / "EPIC_100_tail_nouns.csv", "noun", 2)
    text(notes / "EPIC_100_unseen_participant_ids_validation.csv", "participant_id", "P02")

    rng, ego = np.random.default_rng(0), root / "ego4d"
    for split, s in (("train", "t"), ("val", "v"), ("test_unannotated", "x")):
        lta, oscc = [], []
        for k in range(ITEMS):
            link(k, "ego4d", "clips", f"clip-{s}{k}.mp4")
            link(k, "ego4d", "videos", f"video-{s}{k}.mp4")
            ids = {"video_uid": f"video-{s}{k}", "clip_uid": f"clip-{s}{k}"}
            for i in range(25):
                labels = {"verb_label": int(rng.integers(5)), "noun_label": int(rng.integers(7))}
                lta.append({**ids, "clip_id": 7, **toy.span("clip_parent", 0, 8.4),
                            **toy.span("interval", 0, 8.4), "action_idx": i,
                            **toy.span("action_clip", 0.2 * i, 0.2 * i + 2), "verb": "wash",
                            "noun": "cup", **(labels if s != "x" else {})})
            state = {"state_change": k % 2 == 0, "pnr_frame": None,
                     **({"parent_pnr_frame": 40 + 20 * k} if k % 2 == 0 else {})}
            oscc.append({**ids, "clip_id": str(k), "unique_id": f"id-{s}{k}",
                         **toy.span("parent", 0.1 * k, 7.5 + 0.1 * k),
                         **(state if s != "x" else {})})
        text(ego / "annotations" / f"fho_lta_{split}.json", json.dumps({"clips": lta}))
        text(ego / "annotations" / f"fho_oscc-pnr_{split}.json", json.dumps({"clips": oscc}))
    text(ego / "annotations" / "fho_lta_taxonomy.json", json.dumps(
        {"verbs": [f"v{i}" for i in range(5)], "nouns": [f"n{i}" for i in range(7)]}))

    lists, classes = root / "ucf101" / "ucfTrainTestlist", ("Archery", "YoYo")
    rows = collections.defaultdict(list)
    for k, (part, g) in itertools.product(range(ITEMS), (("test", 1), ("train", 8), ("train", 24))):
        name = classes[k % 2]
        file = f"{name}/v_{name}_g{g if g == 24 else g + k:02d}_c{k + 1:02d}.avi"
        link(k, "ucf101", "UCF-101", file)
        rows[part].append(file + f" {1 + k % 2}" * (part == "train"))
    text(lists / "classInd.txt", *(f"{n} {c}" for n, c in enumerate(classes, 1)))
    for part, split in itertools.product(rows, (1, 2, 3)):
        text(lists / f"{part}list0{split}.txt", *rows[part])

    times = {}
    for part, k in itertools.product(("train", "val"), range(ITEMS)):
        link(k, "oops", "oops_video", part, f"{part} fail {k}.mp4")
        t = [2 + k / 2 + j / 10 for j in range(3)]
        times[f"{part} fail {k}"] = {"t": t, "len": SECONDS, "rel_t": [x / SECONDS for x in t],
                                     "stdev": 0.1, "rel_stdev": 0.01, "n_notfound": 0}
    for part in ("train", "val"):
        text(root / "oops" / "annotations" / f"{part}.txt",
             *(f"{part} fail {k}" for k in range(ITEMS)))
    text(root / "oops" / "annotations" / "transition_times.json", json.dumps(times))

    for part in ("train", "val"):
        rows = []
        for k in range(ITEMS):
            name, video = ("abseiling", "climbing a rope")[k % 2], f"{part:->10}{k}"
            link(k, "kinetics400", part, name.replace(" ", "_"), f"{video}_000000_000010.mp4")
            rows.append(f"{name},{video},0,10,{'validate' if part == 'val' else part}")
        text(root / "kinetics400" / f"{part}.csv", "label,youtube_id,time_start,time_end,split",
             *rows)
    text(root / "kinetics400" / "labels.txt", "abseiling", "climbing a rope")

    for part in ("train", "test"):
        for k in range(ITEMS):
            link(k, "charades", "Charades_v1", f"{part[:2].upper()}00{k}.mp4")
        text(root / "charades" / "Charades" / f"Charades_v1_{part}.csv", "id,actions,length", *(
            f"{part[:2].upper()}00{k},c00{k % 3} 0.50 {2 + k / 2:.2f};c001 {k / 2:.2f} 7.00,8.40"
            for k in range(ITEMS)))
    text(root / "charades" / "Charades" / "Charades_v1_classes.txt", "c000 Holding a cup",
         "c001 Taking a cup", "c002 Throwing a cup")
    text(root / "made")
    return root


# ---- every stage -----------------------------------------------------------------------------

class Stage(NamedTuple):
    """A command line; OUT stands for the run's folder, FEW for how many items there shall be."""
    script: str
    flags: str
    trains: bool = False
    before: str = ""                                          # begins as a copy of this run
    items: bool = True                                        # predicts or writes item by item


SHORT = "--tiny --workers 0 --log_every 1 --save_every 1 --epochs 2 --batch_size 6 --limit 12 "
LISTED = SHORT.replace("12", "FEW")


def stages(root):
    """{name: Stage}, in an order in which each finds what it needs under `root`/runs."""
    runs = root / "runs"
    replai = "--crop 32 --width 8 --groups 6 "
    ssdet = "--crop 32 --num_frames 8 --groups 6 "
    epic, ego = f"--dataset epic --data {root}/epic ", f"--dataset ego4d --data {root}/ego4d "
    ucf, oops = f"--data {root}/ucf101 ", f"--data {root}/oops "
    feats = oops + f"--features {runs}/f2c_features/features "
    kinetics, charades = f"--data {root}/kinetics400 ", f"--data {root}/charades "
    tasks = ("statechange", "recognition", "anticipation")
    return {
        "replai_moments": Stage("replai", f"{LISTED}{replai}--stage moments --dataset ego4d "
                                f"--data {root}/videos --moments OUT/moments"),
        "replai_segments": Stage("replai", f"{LISTED}{replai}--stage segments --dataset ego4d "
                                 "--data OUT/data"),
        "replai_pretrain": Stage("replai", f"{SHORT}{replai}--dataset ego4d --data {root}/videos "
                                 "--moments OUT/moments --limit 6", True, items=False),
        "replai_linear": Stage("replai", f"{SHORT}{replai}--stage linear --init none {epic}", True,
                               "replai_linear"),
        **{f"replai_{t}": Stage("replai", f"{SHORT}{replai}--stage {t} --init none {ego}", True,
                                f"replai_{t}") for t in tasks},
        "cpctrans_pretrain": Stage("cpctrans", SHORT + ucf, True, "cpctrans_pretrain"),
        "cpctrans_finetune": Stage("cpctrans", f"{SHORT}{ucf}--stage finetune --pretrain "
                                   f"{runs}/cpctrans_pretrain/best.pt", True, "cpctrans_finetune"),
        "cpctrans_test": Stage("cpctrans", f"--workers 0 {ucf}--test "
                               f"{runs}/cpctrans_finetune/best.pt"),
        "f2c_features": Stage("f2c_oops", f"{LISTED}{oops}--stage features --features "
                              "OUT/features"),
        "f2c_f2c": Stage("f2c_oops", SHORT + feats, True, "f2c_f2c"),
        "f2c_classify": Stage("f2c_oops", f"{SHORT}{feats}--stage classify --batch_size 60 --init "
                              f"{runs}/f2c_f2c/best.pt", True, "f2c_classify"),
        "f2c_localize": Stage("f2c_oops", f"{SHORT}{feats}--stage localize --init "
                              f"{runs}/f2c_classify/best.pt"),
        "f2c_evaluate": Stage("f2c_oops", f"{SHORT}{feats}--stage evaluate --init "
                              f"{runs}/f2c_classify/best.pt"),
        "ssdet_pretrain": Stage("ssdet_coarsefine", f"{SHORT}{ssdet}{kinetics}--init none", True,
                                "ssdet_pretrain"),
        "ssdet_finetune": Stage("ssdet_coarsefine", f"{SHORT}{ssdet}{charades}--stage finetune "
                                "--stream fine --init none", True, "ssdet_finetune"),
        "ssdet_extract": Stage("ssdet_coarsefine", f"{LISTED}{ssdet}{charades}--stage extract "
                               f"--init {runs}/ssdet_finetune/best.pt --features OUT/features"),
        "ssdet_evaluate": Stage("ssdet_coarsefine", f"{SHORT}{ssdet}{charades}--stage evaluate "
                                f"--init {runs}/ssdet_finetune/best.pt")}


def case(root, name, out, few=ITEMS, copy=False, **more):
    """What `cases` needs to run a stage into `out`."""
    stage = stages(root)[name]
    if copy and stage.before:
        shutil.copytree(root / "runs" / stage.before, out)
    if "OUT/data" in stage.flags:
        (out / "data").mkdir(parents=True)
        for f in (root / "videos").iterdir():
            (out / "data" / f.name).symlink_to(f)
    flags = stage.flags.replace("OUT", str(out)).replace("FEW", str(few)).split()
    return {"name": name, "script": stage.script, "few": few,
            "flags": [*flags, "--out", str(out)], **more}


def run_cases(folder, todo, n=1, timeout=240):
    """[what came of each case, by process]; folder: of what the processes print."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps({"mode": "cases", "cases": todo}))
    r = running.quick(folder, folder / "task.json", n=n, timeout=timeout, script="fault_limits")
    assert r.code == 0, r.err[-3000:]
    every = [json.loads((folder / f"result{k}.json").read_text()) for k in range(n)]
    return list(zip(*every))


def trained(folder):
    """The world, with a run of each stage that trains, and of what these need."""
    root = world(folder)
    if not (root / "runs" / "made").exists():
        shutil.rmtree(root / "runs", ignore_errors=True)
        wanted = [k for k, s in stages(root).items() if s.trains or k == "f2c_features"]
        found = run_cases(root / "runs", [case(root, k, root / "runs" / k) for k in wanted])
        faults = [f"{k}: {x['fault']}" for k, (x,) in zip(wanted, found) if x["fault"]]
        assert not faults, faults
        text(root / "runs" / "made")
    return root


def contents(folder):
    """{file: bytes} of what a run has left, but for links, times and the number of processes."""
    found = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*"))
             if f.is_file() and not f.is_symlink() and f.name != "args.json"}
    if "log.jsonl" in found:
        rows = map(json.loads, found["log.jsonl"].decode().splitlines())
        found["log.jsonl"] = [{k: v for k, v in row.items() if k not in (
            "clips_per_s", "data_wait", "eta_s")} for row in rows]
    return found


# ---- the script that the processes run -------------------------------------------------------

def parse_args():
    """The one argument is a file with what to do."""
    return argparse.Namespace(**json.loads(Path(sys.argv[1]).read_text()))


def main(task):
    common.versions = dict                                    # a commit meanwhile is no fault
    {"cases": cases, "disk": disk_probes, "full": full_from, "stdout": broken_stdout}[task.mode](
        task)


def run_script(script, flags):
    module, sys.argv = importlib.import_module(script), [f"{script}.py", *flags]
    if script == "common":
        module.prepare(module.parse_command(flags))
    else:
        module.main(module.parse_args(flags))


def limited(function, place=1):
    """`function` with --limit for training and, else, as few items as the case says."""
    def wrapper(*args):
        if args[place] == "train":
            return function(*args)
        if isinstance(args[0], argparse.Namespace):
            return function(argparse.Namespace(**{**vars(args[0]), "limit": FEW[0]}), *args[1:])
        return function(*args[:-1], FEW[0])                   # replai.locate
    return wrapper


FEW, STEP = [ITEMS], [-1]


def few_items(stack, few):
    """Evaluation of so few items, training as ever: --limit is for both."""
    import cpctrans
    import f2c_oops
    import replai
    import ssdet_coarsefine
    FEW[0] = few
    places = [(replai, "locate", 2), (cpctrans, "choose", 2), (f2c_oops, "scan", 1),
              (ssdet_coarsefine, "read_videos", 1), (ssdet_coarsefine, "read_kinetics", 1)]
    for module, name, place in places:
        stack.enter_context(mock.patch.object(module, name, limited(getattr(module, name), place)))
    stack.enter_context(mock.patch.dict(replai.TASKS, {
        k: t._replace(data=limited(t.data)) for k, t in replai.TASKS.items()}))


def keep_books(stack):
    """What is predicted and what is written, to see that each comes once."""
    predicted, written = collections.defaultdict(list), []
    predict, write = common.predict, common.write

    def counted_predict(args, device, dataset, network, what, *rest, **more):
        key = f"{what} {len(predicted)}"                      # a stage may predict several times
        predicted[key] = []

        def counted(items, batch):
            predicted[key] += items
            return network(items, batch)
        return predict(args, device, dataset, counted, what, *rest, **more)

    def counted_write(path, content):
        written.append(path.name)
        return write(path, content)
    stack.enter_context(mock.patch.object(common, "predict", counted_predict))
    stack.enter_context(mock.patch.object(common, "write", counted_write))
    return predicted, written


def poison(stack, kind, step, value, rank=0):
    """NaN or Inf in the loss, in a gradient or in a parameter, at a step of one process."""
    steps, mine, value = common.Log.steps, common.rank() == rank, float(value)

    def followed(self, loader):
        for k, batch in steps(self, loader):
            STEP[0] = k
            yield k, batch

    def now():
        return mine and STEP[0] == step

    def spoiled(function):
        return lambda *a, **k: function(*a, **k) * (value if now() else 1)
    STEP[0] = -1
    stack.enter_context(mock.patch.object(common.Log, "steps", followed))
    if kind == "loss":
        for name in ("cross_entropy", "binary_cross_entropy_with_logits"):
            stack.enter_context(mock.patch.object(F, name, spoiled(getattr(F, name))))
        return
    init = torch.optim.Optimizer.__init__

    def spoil(x):
        x[(0,) * x.dim()] = value
        return x

    def made(self, *args):
        init(self, *args)
        first = next((p for p in self.param_groups[0]["params"] if p.requires_grad), None)
        if first is None:                                     # of replai.one_cycle: a mere schedule
            return
        if kind == "gradient":
            first.register_hook(lambda g: spoil(g.clone()) if now() else g)
        else:
            self.register_step_post_hook(lambda *_: spoil(first.data) if now() else None)
    stack.enter_context(mock.patch.object(torch.optim.Optimizer, "__init__", made))


def cases(task):
    """Every case of the task, one after the other."""
    done = []
    for c in task.cases:
        fault, began, cpu = None, time.perf_counter(), time.process_time()
        with contextlib.ExitStack() as stack:
            common.init_distributed()
            few_items(stack, c["few"])
            predicted, written = keep_books(stack)
            if "poison" in c:
                poison(stack, **c["poison"])
            try:
                run_script(c["script"], c["flags"])
            except common.UserError as e:
                fault = str(e)
            except Exception:
                fault = traceback.format_exc()
        done.append({"fault": fault, "seconds": time.perf_counter() - began,
                     "cpu": time.process_time() - cpu, "predicted": predicted, "written": written})
    Path(f"result{common.rank()}.json").write_text(json.dumps(done))


# ---- a disk that is full ---------------------------------------------------------------------

DONE = 99                                                     # exit status: nothing was refused


class Raw(io.FileIO):
    """A file below the folder that a Disk watches."""

    def __init__(self, disk, path, mode):
        self.disk, self.appends = disk, "a" in mode
        super().__init__(path, mode)

    def write(self, data):
        self.disk.event("write", self.name, half=lambda: super(Raw, self).write(
            bytes(data)[:len(data) // 2]))
        return super().write(data)

    def close(self):
        if not self.closed:
            super().close()
            if self.appends:
                self.disk.file_is_done()


def on_its_own():
    """In a copy of a single process: its group lacks the threads that the original has."""
    def gather(parts, x):
        parts[0] = x
    dist.all_gather_object, dist.all_reduce = gather, lambda x, *_: None
    dist.broadcast_object_list = dist.barrier = lambda *_: None


class Disk:
    """Stands between a process and the files below `root`.

    Before each file that is begun the process is forked, so that in the copy the 1st, 2nd, ...
    operation on it is refused, and all that follow, as of a disk that is full; what the copy says
    and leaves is checked, and undone. Operations: mkdir, open to write, write, fsync, replace.
    """

    def __init__(self, root, most):
        self.root, self.most, self.rows = str(root), most, []
        self.at = self.error = None                           # of a copy: which operation, why
        self.seen, self.refused = 0, False

    def install(self):
        plain, real = {"open": builtins.open, "unlink": os.unlink}, {}
        self.plain = plain

        def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest):
            path = file if isinstance(file, int) else os.fspath(file)
            if not set(mode) & set("wax+") or not self.mine(path):
                return plain["open"](file, mode, buffering, encoding, errors, newline, *rest)
            self.event("open", path, begins="r" not in mode)
            raw = Raw(self, path, mode.replace("b", "").replace("t", ""))
            f = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw, 2 ** 20)
            return f if "b" in mode else io.TextIOWrapper(f, encoding, errors, newline)
        builtins.open = io.open = opened

        def patch(name, begins=False):
            real[name] = getattr(os, name)

            def called(path, *args, **kwargs):
                there = args[0] if name == "replace" else path
                if name == "fsync":
                    there = os.readlink(f"/proc/self/fd/{path}")
                if not (name == "mkdir" and os.path.isdir(path)) and not os.path.isdir(there):
                    self.event(name, os.fspath(there), begins)
                return real[name](path, *args, **kwargs)
            setattr(os, name, called)
        patch("mkdir", begins=True)
        for name in ("replace", "fsync", "unlink"):
            patch(name)

    def mine(self, path):
        return isinstance(path, str) and path.startswith(self.root)

    def event(self, kind, path, begins=False, half=None):
        if not self.mine(path) or (self.at is None and not (begins and self.probe(path))):
            return
        named = (path,) if kind in ("mkdir", "open", "replace", "unlink") else ()
        why = OSError(self.error, os.strerror(self.error), *named)
        if kind == "unlink":                                  # of a full disk one may remove
            if self.refused and self.error == errno.EROFS:
                raise why
            return
        if self.refused:
            raise why
        if begins and self.seen:
            self.file_is_done()
        self.seen += 1
        if self.seen >= self.at:
            self.refused = True
            if half:
                half()
            raise why
        if kind == "replace":                                 # only the original may do it
            self.file_is_done()

    def file_is_done(self):
        if self.at is not None and not self.refused:
            os._exit(DONE)

    def look(self):
        found = {}
        for folder, _, files in os.walk(self.root):
            for path in (os.path.join(folder, f) for f in files):
                s = os.lstat(path)
                found[path] = s.st_ino, s.st_size, s.st_mtime_ns
        return found

    def probe(self, path):
        """True in a copy that is to be refused its operation number `at`; False, afterwards, in
        the original.
        """
        for error, ats in ((errno.EROFS, (1,)), (errno.ENOSPC, range(1, self.most + 1))):
            for at in ats:
                if self.forked(path, f"operation {at}, {errno.errorcode[error]}",
                               os.strerror(error)):
                    self.at, self.error, self.seen = at, error, 0
                    return True
                if self.code == DONE:
                    break
        return False

    def forked(self, path, what, words):
        """True in the copy; in the original, once that has ended, was checked and undone, False."""
        before, began = self.look(), time.perf_counter()
        ear, mouth = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(mouth, 2)
            on_its_own()
            return True
        os.close(mouth)
        status = None
        while status is None and time.perf_counter() < began + 60:
            done, code = os.waitpid(pid, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if done else None
            time.sleep(0.001)
        if status is None:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        self.code = status
        with os.fdopen(ear) as f:
            said = f.read()
        if status != DONE:
            fault = self.judge(before, status, said, words)
            self.rows.append({"file": os.path.relpath(path, self.root), "what": what,
                              "seconds": time.perf_counter() - began, "fault": fault})
        self.undo(before)
        return False

    def judge(self, before, status, said, words):
        """What is wrong with the end of a copy, "" if nothing."""
        lines = said.splitlines()
        if status != 1 or len(lines) != 1:
            return f"exit status {status}, said {said[-1500:]!r}"
        line, after = lines[0], self.look()
        if not line.startswith(f"error: {self.root}") or words not in line or ".tmp" in line:
            return f"said {line!r}"
        for f in sorted(before.keys() | after.keys()):
            if before.get(f) != after.get(f) and not (
                    f.endswith(".jsonl") and (f not in before and ".part-" in f or f in before
                                              and f in after and after[f][1] >= before[f][1])):
                return f"{f} was {before.get(f)}, is {after.get(f)}"
        return ""

    def undo(self, before):
        for f, (_, size, _) in self.look().items():
            if f not in before:
                self.plain["unlink"](f)
            elif size > before[f][1]:
                os.truncate(f, before[f][1])


def disk_probes(task):
    """A run that is refused each of its operations once, and then ends as if nothing had been."""
    disk = Disk(task.root, task.most)
    disk.install()
    if task.script == "common":                               # FFmpeg writes by itself
        common.reencode = by_the_byte(disk, common.reencode)
    try:
        run_script(task.script, task.flags)
    finally:
        if disk.at is None:
            Path("result.json").write_text(json.dumps(disk.rows))


def by_the_byte(disk, reencode):
    """`reencode`, of which copies may write only so many bytes into a file: the same error, but
    for its number, at any place.
    """
    left = [2]                                                # videos to do this with

    def limited(source, target, *args):
        left[0] -= 1
        if left[0] < 0:
            return reencode(source, target, *args)
        trial = Path(f"trial{target.suffix}").absolute()
        reencode(source, trial, *args)
        size = trial.stat().st_size
        for limit in sorted({0, 1, 48, size - 1, *(size * k // disk.most for k in range(
                disk.most))}):
            if disk.forked(target, f"byte {limit}", os.strerror(errno.EFBIG)):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                disk.at, disk.error = math.inf, 0
                reencode(source, target, *args)
                os._exit(0)
        return reencode(source, target, *args)
    return limited


def full_from(task):
    """A run whose disk is full, on process 0, from the `at`-th writing of a file on."""
    disk = Disk(task.root, 0)
    disk.install()
    disk.at, disk.error, event, opened = math.inf, errno.ENOSPC, disk.event, itertools.count(1)

    def counted(kind, path, *args, **kwargs):
        name = re.sub(r"[.]tmp\d+$", "", Path(path).name)
        if kind == "open" and re.fullmatch(task.file, name) and next(opened) == task.at:
            disk.at = disk.seen + 2                           # its first write
        event(kind, path, **{**kwargs, "begins": False})
    disk.event, disk.file_is_done = counted, lambda: None
    if common.rank() != 0:
        disk.mine = lambda path: False
    run_script(task.script, task.flags)


def broken_stdout(task):
    """A run whose standard output is full, or a pipe that nobody reads any more."""
    fd = os.open("/dev/full", os.O_WRONLY)
    if task.pipe:
        other, fd = os.pipe()
        os.close(other)
    os.dup2(fd, 1)
    sys.stdout = open(1, "w", closefd=False)                  # the other one was a file
    run_script(task.script, task.flags)


# ---- what is promised ------------------------------------------------------------------------

PROBED = ("replai_segments", "replai_linear", "cpctrans_finetune", "f2c_features", "f2c_f2c",
          "ssdet_extract", "ssdet_evaluate", "prepare")
PROBED_LONG = (*PROBED, "replai_moments", "replai_pretrain", "replai_statechange", "cpctrans_test",
               "cpctrans_pretrain", "f2c_evaluate", "ssdet_finetune", "ssdet_pretrain")
ONE_EACH = ("replai_statechange", "cpctrans_finetune", "f2c_f2c", "ssdet_finetune")
# Trainings and preparations, and the file of which not the first writing fails, but a later one.
REFUSED = {"replai_pretrain": "last.pt", "replai_segments": r".*\.mp4",
           "cpctrans_finetune": "last.pt", "f2c_f2c": "last.pt", "f2c_features": r".*\.npz",
           "ssdet_finetune": "last.pt", "ssdet_extract": r"TE.*"}


def start(folder, root, name, mode, n=1, how=running.quick, **more):
    """Run one stage in one of the modes of `main`, below `folder`/out; the result and its time."""
    out = folder / "out"
    if name == "prepare":
        todo = {"script": "common", "flags": ["prepare", str(root / "charades"), str(out)]}
        todo["flags"] += ["--short_side", "32"]
    else:
        if out.exists():                                      # continued
            todo = json.loads((folder / "case.json").read_text())
        else:
            todo = case(root, name, out, few=2)
            text(folder / "case.json", json.dumps(todo))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps({**todo, "mode": mode, "root": str(out), **more}))
    began = time.perf_counter()
    if how is running.quick:
        r = how(folder, folder / "task.json", n=n, script="fault_limits", timeout=300)
    else:
        r = how(folder / "task.json", n=n, script="tests/fault_limits", cwd=folder)
    return r, time.perf_counter() - began


def one_line(r, words):
    """What is wrong with a run that had to stop with one line, "" if nothing."""
    lines = [x for x in r.err.splitlines() if x.startswith("error: ")]
    if r.code != 1 or "Traceback" in r.err or len(lines) != 1 or not re.search(words, lines[0]):
        return f"exit status {r.code}, {r.err[-1500:]!r}"
    return ""


def differing(a, b):
    """Names of the files that two runs did not leave alike."""
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


def disk(folder, seed, long):
    """Every write of short runs of every kind of stage, refused once."""
    root = trained(folder.parent)
    failed, points, files, slowest, bytewise = [], 0, 0, 0.0, 0
    probed = PROBED_LONG if long else PROBED
    for name in probed:
        where = folder / "disk" / name
        r, _ = start(where, root, name, "disk", most=6 if long else 3)
        if r.code:
            failed.append(f"{name}: exit status {r.code}, {r.err[-1500:]}")
            continue
        rows = json.loads((where / "result.json").read_text())
        failed += [f"{name}: {x['file']}, {x['what']}: {x['fault']}" for x in rows if x["fault"]]
        points += len(rows)
        bytewise += sum(x["what"].startswith("byte") for x in rows)
        files += len({x["file"] for x in rows})
        slowest = max(slowest, *(x["seconds"] for x in rows))
        if stages(root).get(name, Stage("", "")).trains:
            whole, left = contents(root / "runs" / name), contents(where / "out")
            failed += [f"{name}: {k} is not that of a run without faults"
                       for k in differing(whole, left)]
    yield Row("each write refused in turn: one line, the folder as it was", {
        "operations refused": points, "of them inside FFmpeg": bytewise, "files": files,
        "stages": len(probed), "worst seconds": slowest}, failed)

    failed, worst = [], 0.0
    refused = [k for k in REFUSED if long or k in (*ONE_EACH, "f2c_features")]
    for name, file in ((k, REFUSED[k]) for k in refused):
        where = folder / "refused" / name
        at = 2 if file == "last.pt" or name == "replai_segments" else 3
        r, seconds = start(where, root, name, "full", file=file, at=at)
        worst = max(worst, seconds)
        if fault := one_line(r, f"{file}: could not be written .No space left on device.$"):
            failed.append(f"{name}: {fault}")
        if file == "last.pt" and common.load_file(where / "out/last.pt")["step"] != 1:
            failed.append(f"{name}: the checkpoint is not that of the first step")
        failed += [f"{name}: left {f}" for f in (where / "out").rglob("*.tmp*")]
        r, _ = start(where, root, name, "full", file="none", at=1)
        trains = stages(root)[name].trains
        whole = root / "runs" / name if trains else folder / "disk" / name / "out"
        other = differing(contents(whole), contents(where / "out"))
        if r.code or r.err:
            failed.append(f"{name}: does not go on: {r.err[-1500:]}")
        failed += [f"{name}: {k} differs after going on" for k in other
                   if trains or Path(k).name not in ("metrics.json", "index.json")]      # how many
    yield Row("with room again the same command ends in the same bits", {
        "runs refused and continued": len(refused), "worst seconds": worst}, failed)

    failed, worst = [], 0.0
    both = ("replai_pretrain", "f2c_f2c")[:2 if long else 1]
    for name in both:
        where = folder / "two" / name
        r, seconds = start(where, root, name, "full", n=2, how=running.command, file="last.pt",
                           at=2)
        worst = max(worst, seconds)
        if fault := one_line(r._replace(err=re.sub("(?s)Traceback.*", "", r.err)),
                             "last.pt: could not be written"):
            failed.append(f"{name}: {fault}")
    yield Row("a disk that is full for process 0 ends both, the cause told once", {
        "runs by torchrun": len(both), "worst seconds": worst}, failed)

    failed, runs = [], 0
    for name in ("replai_moments", "cpctrans_finetune", "f2c_f2c", "ssdet_finetune"):
        ways = (("full", "No space left on device"), ("pipe", "Broken pipe"))
        for how, words in ways if long else ways[runs % 2:][:1]:
            where, runs = folder / f"stdout_{how}" / name, runs + 1
            r, _ = start(where, root, name, "stdout", pipe=how == "pipe")
            if fault := one_line(r, f"standard output: could not be written .{words}"):
                failed.append(f"{name}: {fault}")
            failed += [f"{name}: left {f}" for f in (where / "out").rglob("*.tmp*")]
    yield Row("a standard output that is full, or a pipe that is closed: one line", {
        "runs": runs}, failed)


def numbers(folder, seed, long):
    """NaN and Inf in the loss, in a gradient, in parameters, and a learning rate beyond all."""
    root, failed, worst, count = trained(folder.parent), [], 0.0, 0
    loops = [k for k, s in stages(root).items() if s.trains]
    kinds = {1: [("loss", "inf"), ("gradient", "nan"), ("update", "inf")], 2: [("loss", "nan")]}
    if long:
        kinds = {1: [*itertools.product(("loss", "gradient", "update"), ("nan", "inf", "-inf"))],
                 2: [("loss", "nan"), ("gradient", "inf")]}
    for n in (1, 2):
        todo = []
        some = loops if long or n == 1 else ONE_EACH
        for name, (kind, value) in itertools.product(some, kinds[n]):
            out = folder / "numbers" / f"{name}_{kind}_{value}_{n}"
            todo.append(case(root, name, out, poison={
                "kind": kind, "value": value, "step": 1, "rank": n - 1}))
        for c, found in zip(todo, run_cases(folder / f"numbers{n}", todo, n)):
            out, poisoned = Path(c["flags"][-1]), c["poison"]
            count, worst = count + 1, max(worst, *(x["seconds"] for x in found))
            words = {"loss": r"step 1: (?!gradient)\w+ is (nan|-?inf);",
                     "gradient": r"step 1: gradient is (nan|-?inf);",
                     "update": r"step 1: [\w.]+ is nan or inf after the update|"
                               r"val: the network's output is not finite"}
            for x in found:
                if not re.match(words[poisoned["kind"]], x["fault"] or ""):
                    failed.append(f"{out.name}: {x['fault']}")
            if not (out / "last.pt").exists():
                failed.append(f"{out.name}: has no last.pt")
                continue
            state = common.load_file(out / "last.pt")
            if state["step"] != 1:
                failed.append(f"{out.name}: last.pt is after step {state['step']}")
            failed += [f"{out.name}: last.pt holds {k}" for k, x in common._tensors(state)
                       if x.is_floating_point() and not x.isfinite().all()]
    yield Row("NaN or Inf in loss or gradient stops before the update, in parameters before the "
              "checkpoint; the last good one stays", {
                  "runs": count, "loops": len(loops), "worst seconds": worst}, failed)

    failed, todo, stopped = [], [], 0
    for name in loops if long else ONE_EACH:
        c = case(root, name, folder / "huge" / name)
        todo.append({**c, "flags": [*c["flags"], "--lr", "4e9"]})
    for c, (x,) in zip(todo, run_cases(folder / "hugely", todo)):
        stopped += x["fault"] is not None                     # the others' losses stay finite
        if x["fault"] and not re.match(r"step [0-3]: [\w.]+ is (nan|-?inf)|"
                                       r"\w+: the network's output is not finite", x["fault"]):
            failed.append(f"{c['name']}: {x['fault']}")
        for f in Path(c["flags"][-3]).glob("*.pt"):
            failed += [f"{f}: {k}" for k, x in common._tensors(common.load_file(f))
                       if x.is_floating_point() and not x.isfinite().all()]
    yield Row("with a learning rate of 4e9 no checkpoint holds NaN, and a run ends in one line", {
        "runs": len(todo), "stopped": stopped}, failed)

    failed = []
    some = [k for k in loops if long or k in ("f2c_f2c", "cpctrans_finetune")]
    todo = [case(root, k, folder / "numbers" / f"{k}_loss_inf_1") for k in some]
    for c, (x,) in zip(todo, run_cases(folder / "again", todo)):
        name, left = c["name"], contents(folder / "numbers" / f"{c['name']}_loss_inf_1")
        failed += [f"{name}: {x['fault']}"] if x["fault"] else []
        failed += [f"{name}: {k}" for k in differing(contents(root / "runs" / name), left)]
    yield Row("continued from the checkpoint before NaN, a run ends in the same bits", {
        "runs": len(todo)}, failed)


def once(found, of):
    """What is wrong with the shares of the processes in one case, "" if each item came once."""
    for what in found[0]["predicted"]:
        items = sorted(itertools.chain.from_iterable(x["predicted"][what] for x in found))
        if items != list(range(len(items))):
            return f"{what}: predicted {items}"
    written = collections.Counter(itertools.chain.from_iterable(x["written"] for x in found))
    if written != collections.Counter(of["written"]):
        return f"wrote {written}, not {of['written']}"
    for what, items in of["predicted"].items():
        if len(items) != sum(len(x["predicted"].get(what, ())) for x in found):
            return f"{what}: not {len(items)} items"
    return ""


def equality(folder, seed, long):
    """Every stage that goes item by item: 7 items, a number that none divides, on 1, 2 and 3
    processes; fewer items than processes, 2 on three for one stage of each script, and 1 and 2 for
    all if `long`.
    """
    root, failed, worst, items, count, files = trained(folder.parent), [], 0.0, 0, 0, 0
    named, unlike = [k for k, s in stages(root).items() if s.items], 0
    left, base = {}, {}
    few_too = ("replai_linear", "cpctrans_test", "f2c_evaluate", "ssdet_extract")
    for n in (1, 2, 3):
        grid = [(name, few) for name in named for few in (1, 2, ITEMS)
                if few == ITEMS or n != 2 and (long or few == 2 and name in few_too)]
        count += len(grid)
        todo = [case(root, name, folder / f"by{n}" / f"{name}_{few}" / "out", few, copy=True)
                for name, few in grid]
        found = run_cases(folder / f"by_{n}", todo, n)
        base = base or {key: x for key, (x,) in zip(grid, found)}
        for c, key, shares in zip(todo, grid, found):
            alone = base[key]
            here = contents(Path(c["flags"][-1]))
            worst = max(worst, *(x["seconds"] for x in shares))
            what = f"{key[0]}, {key[1]} items, {n} processes"
            failed += [f"{what}: {x['fault']}" for x in shares if x["fault"]]
            if fault := once(shares, alone):
                failed.append(f"{what}: {fault}")
            items += sum(map(len, alone["predicted"].values()))
            left.setdefault(key, here)
            files += len(here) * (n > 1)
            strange = differing(left[key], here)
            unlike += len(strange)
            failed += [f"{what}: {k} differs" for k in strange]
    yield Row("1, 2 and 3 processes leave the same bytes, each item computed once", {
        "stages": len(named), "cases": count, "items predicted": items,
        "files compared": files, "files that differ": unlike,
        "worst seconds": worst}, failed)


PARTS = {"disk": disk, "numbers": numbers, "equality": equality}


if __name__ == "__main__":
    common.launch(main, parse_args())
