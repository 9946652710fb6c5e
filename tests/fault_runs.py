"""Runs that are killed, asked to stop, or lose one of their processes.

    kill      SIGKILL at random moments, of every script and its long preparation stages
    sigterm   training stops at the next step, on all processes; preparation just ends
    torchrun  two agents, a worker killed, a process that fails: bits, seconds, what is printed

Each part is a function (folder, seed, long) that yields rows for the table of promises. Restarted,
every run has to end in the bytes of one that nothing has disturbed. As a program, this file is a
script of which one process fails at a chosen place:

    torchrun ... fault_runs.py FUNCTION RANK SCRIPT FLAGS     in common.FUNCTION; RANK -1: all
"""

import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import running
import toy
from fault_rows import Row

import common

SMALL = "--tiny --workers 0 --log_every 1 --save_every 2"
LIMIT = 60                              # seconds for all processes to end after one has failed


# ---- what is run -------------------------------------------------------------------------------

class Stage(NamedTuple):
    """One command; `keep`: patterns of the files that must come out the same, seen from the world;
    `events`: of `running.arm`, to be killed at; `steps`: whether it trains.
    """
    script: str
    name: str
    flags: list
    keep: list
    events: list
    steps: bool

    def run(self, world, **how):
        """Run it in a world, the folder of everything it leaves."""
        return running.quick(world / "q", *self.flags, "--out", f"../{self.name}",
                             script=self.script, **how)       # in world/q: checkpoints hold flags


def train(script, name, flags, *keep):
    events = ["step", "line", "torn:last.pt", "torn:last.pt", "torn:best.pt", "renamed"]
    if script == "replai" and name == "linear":
        events.remove("torn:best.pt")
    return Stage(script, name, f"{SMALL} {flags}".split(), [
        f"{name}/last.pt", f"{name}/best.pt", f"{name}/metrics.json", *keep], events, True)


def other(script, name, flags, events, *keep):
    return Stage(script, name, f"--tiny --workers 0 {flags}".split(), list(keep), events, False)


def stages(data):
    """{script: its stages, each of which may need those before}."""
    ucf = f"--data {data}/ucf101 --batch_size 4"
    net = "--net resnet10 --width 8 --heads 2 --img_dim 32 --crop 32 --limit 16 --epochs 2"
    oops = f"--data {data}/oops --features ../features "
    kinetics = f"--data {data}/kinetics400 --crop 32 --num_frames 8 --batch_size 2"
    charades = f"--data {data}/charades --crop 32 --num_frames 8 --batch_size 2 --limit 4"
    sound = f"--data {data}/sound --moments ../moments --crop 32 --width 8 --batch_size 2"
    f2c, ssdet = "f2c_oops", "ssdet_coarsefine"
    return {
        "cpctrans": [
            train("cpctrans", "pretrain", f"{ucf} {net}"),
            train("cpctrans", "finetune", f"{ucf} {net} --stage finetune --pretrain "
                  "../pretrain/best.pt"),
            other("cpctrans", "test", f"--data {data}/ucf101 --test ../finetune/best.pt",
                  ["torn:.json"], "test/*.json", "!test/args.json")],
        f2c: [
            other(f2c, "extracted", f"--stage features {oops}", ["torn:.npz"],
                  "features/*/*.npz"),
            train(f2c, "pretext", f"{oops} --limit 8 --epochs 2 --batch_size 4 --dropout 0.1"),
            train(f2c, "classify", f"{oops} --limit 8 --stage classify --epochs 1 --batch_size 16 "
                  "--init ../pretext/best.pt --dropout 0.1"),
            other(f2c, "evaluate", f"{oops} --limit 8 --stage evaluate --init ../classify/best.pt",
                  ["torn:.csv"], "evaluate/*.csv")],
        ssdet: [
            train(ssdet, "detect", f"{kinetics} --lr 0.05 --iters 4 --aug_prob 1"),
            train(ssdet, "fine", f"{charades} --lr 0.05 --stage finetune --epochs 2 --stream fine "
                  "--init ../detect/last.pt"),
            other(ssdet, "extract", f"{charades} --stage extract --init ../fine/best.pt "
                  "--features ../features", [f"torn:{n}" for n in video_names(data)],
                  "features/layer*/*"),
            other(ssdet, "evaluate", f"{charades} --stage evaluate --init ../fine/best.pt",
                  ["torn:.csv", "torn:localization.txt"], "evaluate/*.csv", "evaluate/*.txt")],
        "replai": [
            other("replai", "detected", f"{sound} --stage moments", ["torn:moments.jsonl"],
                  "moments/moments.jsonl"),
            train("replai", "pretrain", f"{sound} --epochs 3"),
            other("replai", "cut", "--stage segments --data ../uncut --moments ../m2",
                  ["torn:.mp4"], "uncut/segments/*")]}


def video_names(data):
    """Of a few videos of Charades, as its features are named."""
    return sorted(f.stem for f in (data / "charades").rglob("*.mp4"))[:8]


def make_data(folder):
    """The smallest toy datasets, and videos with sound; what is there already is used."""
    for name in ("ucf101", "oops", "kinetics400", "charades"):
        if not (folder / name).exists():
            toy.make(name, folder, scale=0.01, workers=1)
    warm = running.context().Process(target=int)              # starts the server of forks
    warm.start()
    warm.join()
    rng = np.random.default_rng(0)
    for k in range(6 if not (folder / "sound").exists() else 0):
        x = 0.002 * rng.normal(size=6 * 16000)
        for t in rng.uniform(1, 5, 5):
            x[int(16000 * t):][:100] += rng.uniform(-0.6, 0.6, 100)
        frames = (wave(n + 40 * k) for n in range(6 * 16))
        toy.write_video(folder / "sound" / f"{k}.mp4", frames, 16, x[None].astype(np.float32),
                        16000)
    return folder


def wave(n):
    """A smooth picture that moves."""
    y, x = np.mgrid[:48, :64]
    grey = 128 + 60 * np.sin((x + 3 * n) / 7) * np.cos((y + 2 * n) / 9)
    return np.stack([grey, 255 - grey, grey], -1).astype(np.uint8)


def make_world(folder, data):
    """An empty folder for a chain of stages; videos to be cut lie in it."""
    (folder / "uncut").mkdir(parents=True)
    for f in (data / "sound").glob("*.mp4"):
        (folder / "uncut" / f.name).symlink_to(f)
    return folder


# ---- what is left ------------------------------------------------------------------------------

def left(world, keep):
    """{file: content} of the files of these patterns; of .npz the arrays, as zip notes the time."""
    found = {}
    for pattern in keep:
        for f in sorted(world.glob(pattern.removeprefix("!"))):
            name = str(f.relative_to(world))
            if pattern[0] == "!":
                found.pop(name)
            elif f.is_file() and ".tmp" not in f.name:
                found[name] = arrays(f) if f.suffix == ".npz" else f.read_bytes()
    return found


def arrays(path):
    with np.load(path) as z:
        return {k: (z[k].dtype.str, z[k].shape, z[k].tobytes()) for k in z}


def differ(world, whole, keep):
    """A line for what is not as in the undisturbed world."""
    ours, theirs = left(world, keep), left(whole, keep)
    if not theirs:
        return [f"{whole}: holds nothing of {keep}"]
    return [f"{world / name}: differs, is missing or too much"
            for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]


def half_written(world):
    """A line for each result that cannot be read; temporary files may be anything."""
    lines = []
    for f in sorted(world.rglob("*.*")):
        if f.is_symlink() or not f.is_file() or ".tmp" in f.name or ".part" in f.name:
            continue
        try:
            if f.suffix == ".pt":
                torch.load(f, weights_only=True)
            elif f.suffix == ".json":
                json.loads(f.read_text())
            elif f.name == "moments.jsonl":
                [json.loads(line) for line in f.read_text().splitlines()]
            elif f.suffix in (".npz", ".zip"):
                assert zipfile.ZipFile(f).testzip() is None
            elif f.suffix == ".mp4":
                assert common.count_frames(f) > 0
        except Exception as e:
            lines.append(f"{f}: half written ({type(e).__name__}: {e})")
    return lines


def litter(world):
    """A line for each temporary file that a finished stage has left; parts of a list of moments
    stay an hour, for another job may be writing them.
    """
    return [f"{f}: left behind" for f in sorted(world.rglob("*.tmp*")) if f.is_file()]


# ---- SIGKILL at any moment ---------------------------------------------------------------------

def undisturbed(folder, data, stage, n=1):
    """(a world in which nothing has disturbed this stage of n processes and those before it,
    seconds that it took); made once for all parts.
    """
    world = folder.parent / f"{stage.script}_whole{n}"
    note = world / f"{stage.name}.seconds"
    if not world.exists():
        make_world(world, data)
    if not note.exists():
        began = time.monotonic()
        r = stage.run(world, n=n)
        if r.code:
            raise RuntimeError(f"{stage.name}: {r}")
        note.write_text(str(time.monotonic() - began))
    return world, float(note.read_text())


def before(world, whole, *chain):
    """A copy of an undisturbed world, as it was before these stages."""
    shutil.copytree(whole, world, symlinks=True)
    for stage in chain:
        undo(world, stage)
        shutil.rmtree(world / stage.name, ignore_errors=True)
    return world


def undo(world, stage):
    """Take a stage's results away."""
    for name in left(world, stage.keep):
        (world / name).unlink()


def kill(folder, seed, long):
    """One chain of stages per script, killed again and again, ends as an undisturbed one."""
    data = make_data(folder.parent / "data")
    for script, chain in stages(data).items():
        rng = np.random.default_rng((seed, len(script)))
        ours, failed = make_world(folder / script, data), []
        figures = dict.fromkeys(("kills", "in_checkpoints", "in_preparation",
                                 "worst_recovery_s"), 0)
        first = next(stage for stage in chain if stage.steps)
        main = [s for s in chain if s is first or s.name in PREPARATION]
        total, few = (20, 3) if long else (10, 1)             # of all stages, of one not in `main`
        for stage in chain:
            whole, seconds = undisturbed(folder, data, stage)
            landed, tried, wanted = 0, 0, few if stage not in main else math.ceil(
                (total - few * (len(chain) - len(main))) / len(main))
            while landed < wanted and tried < 8 * wanted:
                tried += 1
                how, writing = moment(rng, stage, seconds)
                began = time.monotonic()
                r = stage.run(ours, **how)
                landed += r.code == -9
                figures["in_checkpoints"] += r.code == -9 and writing and stage.steps
                failed += half_written(ours)
                if r.code == 0:                               # it came too late
                    seconds = min(seconds, 0.8 * (time.monotonic() - began))
                    failed += differ(ours, whole, stage.keep)
                    undo(ours, stage)                         # that there be something to do
                elif r.code != -9:
                    failed.append(f"{stage.name}, killed {how}: {r}")
            for f in ours.rglob("*.tmp*"):                    # what runs share may be in work for
                os.utime(f, (1, 1))                           # others: it goes after an hour
            began = time.monotonic()
            r = stage.run(ours)
            figures["worst_recovery_s"] = max(figures["worst_recovery_s"],
                                              time.monotonic() - began)
            figures["kills"] += landed
            figures["in_preparation"] += 0 if stage.steps else landed
            failed += [f"{stage.name}, after {landed} kills: {r}"] if r.code else []
            failed += [f"{stage.name}: {line}" for line in differ(ours, whole, stage.keep)]
        yield Row(f"{script}: killed at any moment and started again, it ends in the same bytes",
                  figures, failed + litter(ours))


PREPARATION = ("extracted", "extract", "detected", "cut")     # stages that take days


def moment(rng, stage, seconds):
    """How to kill it: (arguments of `quick`, whether within the writing of a file)."""
    if rng.random() < 0.5:
        return {"kill": (Path(__file__), 0, float(rng.uniform(0, 0.9 * seconds)))}, False
    event = str(rng.choice(stage.events))
    k = int(rng.choice([1, 1, 2, 3])) if stage.steps or len(stage.events) > 1 else 1
    return {"die": (event, k)}, event.startswith(("torn", "renamed"))


# ---- SIGTERM -----------------------------------------------------------------------------------

def sigterm(folder, seed, long):
    """Of training loops with one and two processes, and of the stages that have no steps."""
    data = make_data(folder.parent / "data")
    for script, chain in stages(data).items():
        rng = np.random.default_rng((seed, len(script)))
        figures, failed = {"stopped": 0, "worst_s": 0.0}, []
        first = next(stage for stage in chain if stage.steps)
        for n in (1, 2):
            last = max(k for k, stage in enumerate(chain) if chosen(stage, first, n, long))
            for stage in chain[:last + 1]:
                whole, seconds = undisturbed(folder, data, stage, n)
                if not chosen(stage, first, n, long):
                    continue
                ours = before(folder / f"{script}_{stage.name}{n}", whole, stage)
                for _ in range(3 if long else 1 if n == 2 else 2):
                    stop = stop_training if stage.steps else stop_preparation
                    ended, lines = stop(stage, ours, n, rng, seconds)
                    figures["stopped"] += ended > 0
                    figures["worst_s"] = max(figures["worst_s"], ended)
                    failed += lines + half_written(ours)
                for f in ours.rglob("*.tmp*"):
                    os.utime(f, (1, 1))
                r = stage.run(ours, n=n)
                failed += [f"{stage.name}, again: {r}"] if r.code else []
                failed += [f"{stage.name}, {n} processes: {line}"
                           for line in differ(ours, whole, stage.keep)] + litter(ours)
        yield Row(f"{script}: SIGTERM stops training after a step, its checkpoint written, and "
                  "preparation at once", figures, failed)


def chosen(stage, first, n, long):
    """Whether this stage is stopped: the first that trains, preparation, or, if long, all loops."""
    return stage is first or (n == 1 and (long or stage.name in PREPARATION) and (
        stage.steps or stage.name in PREPARATION))


def stop_training(stage, world, n, rng, _):
    """(1.0 if it was stopped, what is wrong): to one process alone comes SIGTERM."""
    last, before = world / stage.name / "last.pt", 0
    if last.exists():
        before = torch.load(last, weights_only=True)["step"]
    k, rank = int(rng.integers(1, 3)), int(rng.integers(n))
    began = time.monotonic()
    r = stage.run(world, n=n, die=("term", k, rank))
    if r.code == 0:                                           # it came after the last step
        return 0.0, []
    told = re.findall(r"^stopped by SIGTERM after step (\d+) of \d+, checkpoint written; the same "
                      "command continues from it$", r.out, re.M)
    step = torch.load(last, weights_only=True)["step"] if last.exists() else 0
    if (r.code, told, r.err, step) == (143, [str(step)], "", before + k + 1):
        return time.monotonic() - began, []
    return 0.0, [f"{stage.name}, {n} processes, SIGTERM to {rank} after step {before + k}: "
                 f"checkpoint of {step}, {r}"]


def stop_preparation(stage, world, n, rng, seconds):
    """(seconds until it had ended, what is wrong): it may end at once, with nothing to say."""
    at = float(rng.uniform(0.1, 0.8) * seconds)
    began = time.monotonic()
    r = stage.run(world, n=n, kill=(Path(__file__), 0, at, signal.SIGTERM))
    if r.code == 0:
        return 0.0, []
    ok = r.code == -signal.SIGTERM and not r.err
    return time.monotonic() - began - at, [] if ok else [f"{stage.name}: {r}"]


# ---- torchrun ----------------------------------------------------------------------------------

def torchrun(folder, stage, agents=1, restarts=0, program=None):
    """Start a stage with two processes, by one agent or by two, as on two machines; what each
    prints goes to `folder`/AGENT.txt. program: in place of the script.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, started = running.free_port(), []
    program = program or [running.REPO / f"{stage.script}.py"]
    for k in range(agents):
        with open(folder / f"{k}.txt", "w") as out:
            started.append(subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(agents),
                 "--nproc_per_node", str(2 // agents), "--rdzv_backend", "c10d",
                 "--rdzv_endpoint", f"127.0.0.1:{port}", "--max_restarts", str(restarts),
                 *map(str, program), *stage.flags, "--out", f"../{stage.name}"],
                cwd=folder, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True))
    return started


def wait(started, seconds=240):
    """Exit statuses; whoever has not ended by then is killed, and its status None."""
    until, codes = time.monotonic() + seconds, []
    for p in started:
        try:
            codes.append(p.wait(max(0.1, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
    for p in started:
        try:
            os.killpg(p.pid, signal.SIGKILL)                  # what else is of its session
        except ProcessLookupError:
            pass
    return codes


def printed(folder):
    return "".join(f.read_text(errors="replace") for f in sorted(folder.glob("[0-9].txt")))


def torchruns(folder, seed, long):
    """Of the first training stage of two scripts; `long`: a worker of each script killed, more ways
    to fail.
    """
    data = make_data(folder.parent / "data")
    scripts = stages(data)
    names = list(scripts) if long else [list(scripts)[seed % 4], list(scripts)[(seed + 1) % 4]]
    for k, script in enumerate(names):
        chain = scripts[script]
        first = next(i for i, stage in enumerate(chain) if stage.steps)
        for stage in chain[:first + 1]:
            whole, _ = undisturbed(folder, data, stage, n=2)
        if k < 1 + long:
            yield two_agents(folder / f"{script}_agents", chain[first], whole)
        if long or k == 1:
            yield worker_killed(folder / f"{script}_restarts", chain[first], whole,
                                np.random.default_rng((seed, k)))
        if k < 1 + long:
            yield failing(folder / f"{script}_fails", chain[:first + 1], whole,
                          MORE if long and k == 0 else ())
    if long:
        yield told_to_all(folder / "told", data, scripts["cpctrans"][0])


def two_agents(world, stage, whole):
    """Two agents of one process each, against one process group of two on one machine."""
    before(world, whole, stage)
    began = time.monotonic()
    codes = wait(torchrun(world / "q", stage, agents=2))
    failed = differ(world, whole, stage.keep)
    return Row(f"{stage.script}: two agents of one process each end in the bytes of one of two",
               {"seconds": time.monotonic() - began},
               failed and [*failed, f"status {codes}", printed(world / "q")[-3000:]])


def workers(agent):
    """Process ids of the children of an agent that are scripts, in no order."""
    found = []
    for task in Path(f"/proc/{agent.pid}/task").glob("*/children"):
        try:
            found += [int(x) for x in task.read_text().split()]
        except OSError:
            pass
    return [pid for pid in found if b".py\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def worker_killed(world, stage, whole, rng):
    """One process or the other gets SIGKILL; torchrun starts both again."""
    before(world, whole, stage)
    log, failed, worst, killed = world / stage.name / "log.jsonl", [], 0.0, 0
    (agent,) = started = torchrun(world / "q", stage, restarts=2)
    until = time.monotonic() + 120
    while lines_of(log) < 2 and agent.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    if agent.poll() is None and (both := workers(agent)):
        os.kill(both[int(rng.integers(len(both)))], signal.SIGKILL)
        killed, began = 1, time.monotonic()
        while agent.poll() is None and time.monotonic() < until and (
                "continuing" not in printed(world / "q")):
            time.sleep(0.02)
        worst = time.monotonic() - began
    codes = wait(started)
    failed += differ(world, whole, stage.keep) + litter(world)
    failed += [] if killed else ["no worker was killed"]
    return Row(f"{stage.script}: a worker killed under --max_restarts 2: the same bytes",
               {"killed": killed, "worst_recovery_s": worst},
               failed and [*failed, f"status {codes}", printed(world / "q")[-3000:]])


PLANTED = "planted: no such luck"
MORE = (("Log.guard", 0), ("Log.guard", -1), ("gather", 1), ("start_run", 1))


def failing(world, chain, whole, more):
    """Of two processes one fails: all end, and the cause is told once."""
    stage, figures, failed = chain[-1], {"cases": 0, "worst_s": 0.0}, []
    before(world, whole, *chain[-1:])
    cases = [("Log.guard", 1, stage), ("flag", -1, stage), *((*case, stage) for case in more),
             *(("barrier", 1, s) for s in chain if s.name in PREPARATION)]
    for k, (where, rank, stage) in enumerate(cases):
        undo(world, stage)
        logs = world / f"q{k}"
        logs.mkdir()
        program = [Path(__file__).resolve(), where, rank, stage.script]
        bad = stage._replace(flags=[*stage.flags, "--epoch", "3"]) if where == "flag" else stage
        codes = wait(torchrun(logs, bad, program=None if where == "flag" else program))
        text, ended = printed(logs), time.time()
        times = [float(f.read_text()) for f in logs.glob("failed*")]
        told = [line for line in text.splitlines() if line.startswith("error: ")]
        want = "error: unrecognized arguments: --epoch 3" if where == "flag" else PLANTED
        if None in codes or 0 in codes or len(told) != 1 or want not in told[0] or (
                "Traceback (most recent call last):\n  File \"" + str(running.REPO) in text):
            failed.append(f"{stage.name}, {where} of {rank}: {codes}, {told}\n{text[-3000:]}")
        figures["cases"] += 1
        if times:
            figures["worst_s"] = max(figures["worst_s"], ended - min(times))
    if figures["worst_s"] > LIMIT:
        failed.append(f"{figures['worst_s']:.0f} s until all processes had ended")
    return Row(f"{stage.script}: one process of two fails, all end, the cause is told once",
               figures, failed)


def told_to_all(world, data, stage):
    """SIGTERM to torchrun and to every process of its session, as from SLURM: two for a worker."""
    make_world(world, data)
    stage = stage._replace(flags=[*stage.flags, "--workers", "2", "--epochs", "8"])
    log, failed = world / stage.name / "log.jsonl", []
    (agent,) = started = torchrun(world / "q", stage)
    until = time.monotonic() + 120
    while lines_of(log) < 3 and agent.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    began = time.monotonic()
    os.killpg(agent.pid, signal.SIGTERM)
    wait(started)
    seconds, text = time.monotonic() - began, printed(world / "q")
    told = re.findall(r"^stopped by SIGTERM after step (\d+) of", text, re.M)
    last = world / stage.name / "last.pt"
    step = torch.load(last, weights_only=True)["step"] if last.exists() else 0
    if told != [str(step)] or not 3 <= step < 32 or seconds > 25:
        failed = [f"checkpoint of step {step}", text[-3000:]]
    return Row("SIGTERM to torchrun, its workers and their loaders: one checkpoint, one line",
               {"seconds": seconds}, failed)


def plant(where, rank):
    """Let one process fail in a function of common.py."""
    owner, _, name = where.rpartition(".")
    owner = getattr(common, owner) if owner else common
    plain = getattr(owner, name)

    def planted(*args, **kwargs):
        if int(os.environ["RANK"]) == rank or rank < 0:
            Path(f"failed{os.environ['RANK']}").write_text(str(time.time()))
            raise common.UserError(PLANTED)
        return plain(*args, **kwargs)
    setattr(owner, name, planted)


def main():
    where, rank, script, *flags = sys.argv[1:]
    plant(where, int(rank))
    sys.argv = [f"{script}.py", *flags]
    module = importlib.import_module(script)
    common.launch(module.main, module.parse_args())


PARTS = {"kill": kill, "sigterm": sigterm, "torchrun": torchruns}

if __name__ == "__main__":
    main()
