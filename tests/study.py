"""`make demo` and `make claims`: the four papers at toy size, from drawing the videos to a table.

    python tests/study.py demo   [--seed 0] [--out runs/demo]
    python tests/study.py claims [--seeds 0 1 2] [--only replai ...] [--out runs/claims]

demo    every paper once, from pre-training to evaluation, beside the same without pre-training
claims  each paper's own main comparisons over several seeds, mean ± standard error. The learning
        rate of each side is chosen before, among the same ones for all sides, on other toy videos
        than those of the table

Every step is one command line of a script, which --list prints; what it says is in a log beside its
folder. Steps that wait for nothing run side by side, one per core. The same command continues where
it was stopped; what other code, other flags or other input have made is made anew. Table and
figures are in results.json. The exit status is 1 if a step failed.
"""

import argparse
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
sys.path.insert(0, str(REPO / "tests"))
from measure import machine  # noqa: E402

import common  # noqa: E402

CODE = ("common.py", "cpctrans.py", "f2c_oops.py", "replai.py", "ssdet_coarsefine.py",
        "tests/toy.py")
OTHER = 1000                              # added to the seed: of the toy on which rates are chosen
PAPERS = {"cpctrans": "CPCTrans", "f2c_oops": "F2C", "ssdet_coarsefine": "SSDet",
          "replai": "RepLAI"}


# ---- steps -------------------------------------------------------------------------------------

FIELD = re.compile(r"\{(?:(rate|best):)?([^{}]+)\}")


class Job(NamedTuple):
    """A command line. {NAME} in `flags` stands for the folder of that job, which must have ended
    before unless it is this one, {rate:SIDE} for the rate that was chosen for a side, {best:SIDE}
    for the folder of that side's run at this rate when rates were chosen. seconds: about, on one
    core, for the order and the ETA.
    """
    script: str
    what: str
    flags: str
    seconds: float


class Plan:
    """What is to be done.

    jobs   {name: Job}, each with the folder OUT/name
    rates  {side: {rate: (keys, job)}}: the rate with the highest mean of these metrics is chosen
    seeds  {side: the seeds of its runs}
    lost   names of jobs that have failed or will not run; what lies in their folders is not theirs
    """

    def __init__(self, out):
        self.out, self.jobs, self.rates, self.seeds, self.lost = Path(out), {}, {}, {}, []

    def add(self, name, script, what, flags, seconds):
        """Its name; what it waits for must have been added before."""
        self.jobs[name] = Job(script, what, flags, seconds)
        if unknown := self.before(name) - self.jobs.keys():
            raise KeyError(f"{name} waits for {unknown}")
        return name

    def draw(self, world, dataset, seed, seconds, flags=""):
        """The job that draws a toy dataset: OUT/world/dataset."""
        return self.add(f"{world}/{dataset}", "tests/toy", f"draw {dataset}, seed {seed}",
                        f"{dataset} --seed {seed} --workers 1 {flags}", seconds)

    def before(self, name):
        """The jobs that a job waits for."""
        fields = FIELD.findall(self.jobs[name].flags)
        return ({job for kind, job in fields if not kind} - {name}) | {
            job for kind, side in fields if kind for _, job in self.rates[side].values()}

    def metrics(self, name):
        """What a job has measured, {} if nothing."""
        if name in self.lost:
            return {}
        try:
            return json.loads((self.out / name / "metrics.json").read_text())
        except OSError:
            return {}

    def scores(self, side):
        """{rate: mean of the metrics that choose it}, of the jobs that have them."""
        found = {rate: [self.metrics(job).get(k) for k in keys]
                 for rate, (keys, job) in self.rates[side].items()}
        return {rate: statistics.fmean(x) for rate, x in found.items() if None not in x}

    def chosen(self, side):
        """The rate with the highest score, the first of equals."""
        scores = self.scores(side)
        return max(self.rates[side], key=lambda rate: scores.get(rate, -math.inf))

    def words(self, name):
        """A job's command line; the rates that it names must be known."""
        job, out = self.jobs[name], self.out / name

        def value(field):
            kind, of = field.groups()
            if kind == "rate":
                return self.chosen(of)
            return str(self.out / (f"{of}_rate_{self.chosen(of)}" if kind else of))

        flags = [FIELD.sub(value, word) for word in job.flags.split()]
        return [os.path.relpath(REPO / f"{job.script}.py"), *flags, "--out",
                str(out.parent if job.script == "tests/toy" else out)]

    def lengths(self):
        """{name: seconds of the longest chain of jobs that begins with it}"""
        long = dict.fromkeys(self.jobs, 0.0)
        for name in reversed(self.jobs):                      # what waits for it comes before it
            long[name] += self.jobs[name].seconds
            for b in self.before(name):
                long[b] = max(long[b], long[name])
        return long


def clock(seconds):
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}" if seconds >= 0 else ""


def last_line(path):
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


class Runner:
    """Runs a Plan, `lanes` jobs at a time, those first that have the longest chain behind them.

    OUT/NAME.log is what a job prints. OUT/NAME.json: its words; its key, a checksum of these, of
    the code, and of the keys of all that it waited for; and the seconds if it has ended well.
    """

    def __init__(self, plan, lanes):
        self.plan, self.lanes, self.length = plan, lanes, plan.lengths()
        self.code = crc32(b"".join((REPO / name).read_bytes() for name in CODE))
        self.waiting, self.running, self.took, self.keys = list(plan.jobs), {}, {}, {}
        self.fresh, self.began = [], time.time()
        plan.lost.clear()

    def __call__(self):
        """The names of jobs that failed, and of those that waited for one of them."""
        try:
            while self.waiting or self.running:
                self.drop()
                ready = [n for n in self.waiting if self.plan.before(n) <= self.took.keys()]
                for name in sorted(ready, key=lambda n: -self.length[n]):
                    if len(self.running) < self.lanes:
                        self.waiting.remove(name)
                        self.start(name)
                time.sleep(0.05)
                for name in [n for n, (p, _) in self.running.items() if p.poll() is not None]:
                    self.end(name)
        finally:
            for process, _ in self.running.values():
                process.terminate()                           # training writes a checkpoint first
            for process, _ in self.running.values():
                process.wait()
        return self.plan.lost

    def drop(self):
        """Give up what waits for a lost job."""
        for name in [n for n in self.waiting if self.plan.before(n) & {*self.plan.lost}]:
            self.waiting.remove(name)
            self.plan.lost.append(name)
            self.tell(name, "not run, an earlier step failed")

    def start(self, name):
        """Begin a job, or continue it; it is done if one with the same key has ended well."""
        words, folder = self.plan.words(name), self.plan.out / name
        note, log = folder.parent / f"{folder.name}.json", folder.parent / f"{folder.name}.log"
        before = json.loads(note.read_text()) if note.exists() else {}
        made_of = [self.keys[n] for n in sorted(self.plan.before(name))]
        self.keys[name] = crc32(json.dumps([
            self.code, self.plan.jobs[name].script, words[1:], made_of]).encode())
        same = before.get("key") == self.keys[name]
        if same and "seconds" in before and folder.is_dir():
            self.took[name] = before["seconds"]
            return self.tell(name, "done before")
        if before and not same:                               # never what others have made
            shutil.rmtree(folder, ignore_errors=True)
        common.write_json(note, {"key": self.keys[name], "words": words})
        with open(log, "w") as f:                             # Ctrl-C is for the runner alone
            process = subprocess.Popen([sys.executable, *words], stdout=f, process_group=0,
                                       stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.running[name] = process, time.time()

    def end(self, name):
        """Note that a job has ended, and how."""
        process, began = self.running.pop(name)
        seconds, log = round(time.time() - began, 1), self.plan.out / f"{name}.log"
        if process.returncode:
            self.plan.lost.append(name)
            return self.tell(name, f"FAILED: {last_line(log)} ({log})")
        self.took[name] = seconds
        self.fresh.append(name)
        common.write_json(log.with_suffix(".json"), {
            "key": self.keys[name], "words": self.plan.words(name), "seconds": seconds})
        self.tell(name, f"took {clock(seconds)}")

    def tell(self, name, end):
        """A line: the time so far, how many steps are over, which one is, when all will be."""
        total, job = len(self.plan.jobs), self.plan.jobs[name]
        over = len(self.took) + len(self.plan.lost)
        print(f"{clock(time.time() - self.began):>6}  [{over:{len(str(total))}}/{total}]  "
              f"{PAPERS.get(job.script, 'toy'):8}  {job.what}: {end}{self.eta()}", flush=True)

    def eta(self):
        """The longest chain that is left, or all that is left on all lanes, at the speed so far."""
        gone = {n: time.time() - began for n, (_, began) in self.running.items()}
        left = {n: max(0.0, self.plan.jobs[n].seconds - gone.get(n, 0.0))
                for n in (*self.waiting, *self.running)}
        if not left:
            return ""
        guessed = sum(self.plan.jobs[n].seconds for n in self.fresh)
        slower = sum(self.took[n] for n in self.fresh) / guessed if guessed else 1.0
        chain = max(left[n] + self.length[n] - self.plan.jobs[n].seconds for n in left)
        return f", {clock(slower * max(chain, sum(left.values()) / self.lanes))} left"


# ---- demo --------------------------------------------------------------------------------------

class Figure(NamedTuple):
    """A row of the demo's table: a metric of two jobs, and of the first one what is reached without
    looking (a number, or the metric's name).
    """
    paper: str
    stage: str
    metric: str
    key: str
    trained: str
    scratch: str | None
    blind: float | str | None = None


def demo(out, seed):
    """(Plan, [Figure]): every paper once."""
    p, tiny = Plan(out), f"--tiny --seed {seed} "

    # CPCTrans: UCF101, 64 labelled videos
    p.draw("toy", "ucf101", seed, 5)
    ucf = f"--data {{toy/ucf101}} {tiny}"
    p.add("cpctrans/pretrain", "cpctrans", "pre-training", f"{ucf}--attn frame --epochs 40", 60)
    for side, init in (("pretrained", "--pretrain {cpctrans/pretrain}/best.pt"),
                       ("scratch", "--attn frame --pretrain random")):
        p.add(f"cpctrans/{side}", "cpctrans", f"fine-tuning, {side}",
              f"{ucf}--limit 64 --epochs 50 --lr 1e-2 {init}", 45)
        p.add(f"cpctrans/{side}_test", "cpctrans", f"test, {side}",
              f"--data {{toy/ucf101}} --tiny --test {{cpctrans/{side}}}/best.pt", 6)

    # F2C and F2C2V: Oops!, whole videos
    p.draw("toy", "oops", seed, 8)
    oops = f"--data {{toy/oops}} {tiny}--features {{f2c/features}}/features "
    p.add("f2c/features", "f2c_oops", "features of all frames", f"{oops}--stage features", 20)
    p.add("f2c/f2c", "f2c_oops", "pre-training on clips (F2C)",
          f"{oops}--select last --epochs 30", 23)
    p.add("f2c/f2c2v", "f2c_oops", "pre-training on videos (F2C2V)",
          f"{oops}--stage f2c2v --select last --epochs 12 --init {{f2c/f2c}}/best.pt", 24)
    for side, init in (("pretrained", "{f2c/f2c2v}/best.pt"),
                       ("scratch", "none --finetune_frames")):
        p.add(f"f2c/{side}", "f2c_oops", f"classification of clips, {side}", f"{oops}--stage "
              f"classify --level video --select last --init {init}", 27)
        p.add(f"f2c/{side}_test", "f2c_oops", f"evaluation, localization, {side}",
              f"{oops}--stage evaluate --init {{f2c/{side}}}/best.pt", 4)

    # SSDet and Coarse-Fine: Kinetics-400, then Charades
    p.draw("toy", "kinetics400", seed, 7)
    p.draw("toy", "charades", seed, 7)
    charades = f"--data {{toy/charades}} {tiny}--select last "
    p.add("ssdet/pretrain", "ssdet_coarsefine", "pre-training on Kinetics-400 (SSDet)",
          f"--data {{toy/kinetics400}} {tiny}--select last --iters 160", 54)
    for side, init in (("pretrained", "{ssdet/pretrain}/last.pt"), ("scratch", "none")):
        p.add(f"ssdet/{side}", "ssdet_coarsefine", f"fine stream on Charades, {side}",
              f"{charades}--stage finetune --stream fine --epochs 16 --init {init}", 34)
    p.add("ssdet/features", "ssdet_coarsefine", "features of the fine stream",
          "--stage extract --data {toy/charades} --tiny --init {ssdet/pretrained}/last.pt "
          "--features {ssdet/features}/features", 5)
    p.add("ssdet/coarse", "ssdet_coarsefine", "coarse stream (Coarse-Fine)",
          f"{charades}--stage finetune --stream coarse --epochs 10 "
          "--init {ssdet/pretrain}/last.pt --features {ssdet/features}/features", 35)
    p.add("ssdet/coarse_test", "ssdet_coarsefine", "evaluation of Coarse-Fine",
          "--stage evaluate --data {toy/charades} --tiny --init {ssdet/coarse}/last.pt "
          "--features {ssdet/features}/features", 4)

    # RepLAI: Ego4D, then EPIC-KITCHENS-100 and the state change
    p.draw("toy", "ego4d", seed, 42)
    p.draw("toy", "epic", seed, 24)
    p.add("replai/pretrain", "replai", "pre-training on Ego4D's moments",
          f"--dataset ego4d --data {{toy/ego4d}} {tiny}--epochs 30 "
          "--moments {replai/pretrain}/moments", 60)
    for side, init in (("pretrained", "{replai/pretrain}/last.pt"), ("scratch", "none")):
        p.add(f"replai/{side}", "replai", f"linear verbs and nouns of EPIC, {side}",
              f"--stage linear --dataset epic --data {{toy/epic}} {tiny}--init {init}", 27)
        p.add(f"replai/{side}_state", "replai", f"Ego4D's state change, {side}",
              f"--stage statechange --data {{toy/ego4d}} {tiny}--epochs 3 --init {init}", 33)

    figures = [
        Figure("CPCTrans", "test on UCF101", "top-1, %", "top1", "cpctrans/pretrained_test",
               "cpctrans/scratch_test", 12.5),
        Figure("F2C2V", "clips of 1 s on Oops!", "accuracy, %", "step_1s_accuracy",
               "f2c/pretrained_test", "f2c/scratch_test"),
        Figure("F2C2V", "transition within 1 s", "videos, %", "within_1s", "f2c/pretrained_test",
               "f2c/scratch_test", "random_within_1s"),
        Figure("SSDet", "fine stream on Charades", "mAP at 25 times, %", "val_mAP_25",
               "ssdet/pretrained", "ssdet/scratch"),
        Figure("Coarse-Fine", "Charades", "mAP at 25 times, %", "mAP_25", "ssdet/coarse_test",
               None),
        Figure("RepLAI", "linear, EPIC", "verb@1, %", "verb@1", "replai/pretrained",
               "replai/scratch", 100 / 6),
        Figure("RepLAI", "linear, EPIC", "noun@1, %", "noun@1", "replai/pretrained",
               "replai/scratch", 25.0),
        Figure("RepLAI", "state change, Ego4D", "StCC acc, %", "StCC acc",
               "replai/pretrained_state", "replai/scratch_state", "StCC acc of prior"),
        Figure("RepLAI", "key frame, Ego4D", "PNR err, s (less is better)", "PNR err (s)",
               "replai/pretrained_state", "replai/scratch_state", "PNR err (s) of prior")]
    return p, figures


class Picture(NamedTuple):
    """What a step of the demo draws, and how many of its pixels from the top README shows."""
    path: str
    name: str
    what: str
    height: int


PICTURES = (
    Picture("cpctrans/pretrained_test/retrieval.png", "cpctrans.png",
            "test videos and the training videos nearest to them", 560),
    Picture("f2c/pretrained_test/timeline.png", "f2c.png",
            "intention over time, and where it is lost", 650),
    Picture("ssdet/coarse_test/timeline.png", "ssdet.png",
            "activities over time, truth and prediction", 556),
    Picture("replai/pretrain/moments.png", "replai.png",
            "sound, score, and moments of interaction", 700))


def copy_pictures(pictures, out, folder):
    """Small copies of the demo's pictures, as README shows them."""
    from PIL import Image
    folder.mkdir(parents=True, exist_ok=True)
    for p in pictures:
        image = Image.open(out / p.path).convert("RGB")
        image = image.crop((0, 0, image.width, min(p.height, image.height)))
        common.save_picture(image.quantize(128), folder / p.name)


def number(x):
    return "" if x is None else f"{x:.3g}" if abs(x) < 10 else f"{x:.1f}"


def table(head, rows):
    """Markdown, in columns of equal width."""
    rows = [head, ["-" * 3] * len(head), *rows]
    wide = [max(len(r[k]) for r in rows) for k in range(len(head))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(r, wide)) + " |" for r in rows)


def demo_table(plan, figures):
    """(text, rows of results.json)"""
    rows = []
    for f in figures:
        one, other = plan.metrics(f.trained), plan.metrics(f.scratch) if f.scratch else {}
        blind = one.get(f.blind) if isinstance(f.blind, str) else f.blind
        rows.append({**f._asdict(), "trained": one.get(f.key), "scratch": other.get(f.key),
                     "blind": blind})
    text = table(("paper", "stage", "metric", "pre-trained", "scratch", "without looking"), [
        (r["paper"], r["stage"], r["metric"],
         "failed" if r["trained"] is None else number(r["trained"]),
         "failed" if r["scratch"] is None and f.scratch else number(r["scratch"]),
         number(r["blind"])) for r, f in zip(rows, figures)])
    return text, rows


# ---- claims ------------------------------------------------------------------------------------

class Claim(NamedTuple):
    """A comparison: on `key`, side `better` is claimed to beat side `other`.

    Jobs of a side: SIDE_SEED, or SIDE_SEED_test where `tested`, for the seeds that it has in Plan.
    """
    paper: str
    what: str
    key: str
    better: str
    other: str
    published: str
    tested: bool = False
    main: bool = False


def claims(out, seeds, only=tuple(PAPERS)):
    """(Plan, [Claim]): all comparisons of these papers."""
    p, found = Plan(out), []
    for paper in only:
        found += {"cpctrans": claims_cpctrans, "f2c_oops": claims_f2c, "replai": claims_replai,
                  "ssdet_coarsefine": claims_ssdet}[paper](p, seeds)
    return p, found


def sides(p, paper, prefix, flags, seeds, rates, inits, keys, seconds, test="", test_seconds=0):
    """Jobs of several sides: one per rate with the first seed, then one per seed at the chosen one.

    inits: {side: flags}; flags: the others. In both, WORLD becomes `other`, the toy on which rates
    are chosen, then `toy`; SEED the seed. keys: metrics whose mean chooses. test: flags of a job
    that evaluates each of these, if not they themselves do; JOB becomes the job's name.
    """
    def add(name, init, world, seed, rate, what):
        words = f"{flags} {init} --seed {seed} --lr {rate}"
        p.add(name, paper, what, words.replace("WORLD", world).replace("SEED", str(seed)), seconds)
        if not test:
            return name
        return p.add(f"{name}_test", paper, f"test of {what}",
                     test.replace("WORLD", world).replace("JOB", name), test_seconds)

    for side, init in inits.items():
        name = f"{prefix}/{side}"
        p.rates[name] = {
            rate: (keys, add(f"{name}_rate_{rate}", init, "other", seeds[0], rate,
                             f"{name}, rate {rate}, to choose it")) for rate in rates}
        p.seeds[name] = seeds
        for s in seeds:
            add(f"{name}_{s}", init, "toy", s, f"{{rate:{name}}}", f"{name}, seed {s}")


def claims_cpctrans(p, seeds):
    """Pre-training against scratch: UCF101, 64 labelled videos."""
    for world, k in (("toy", 0), ("other", OTHER)):
        p.draw(world, "ucf101", seeds[0] + k, 10, "--scale 2")
    data = "--data {WORLD/ucf101} --tiny"
    for s in seeds:
        p.add(f"cpctrans/pretrain_{s}", "cpctrans", f"pre-training, seed {s}",
              f"--data {{toy/ucf101}} --tiny --attn frame --epochs 30 --seed {s}", 90)
    inits = {"cpc": "--pretrain {cpctrans/pretrain_SEED}/best.pt",
             "scratch": "--attn frame --pretrain random"}
    sides(p, "cpctrans", "cpctrans", f"{data} --limit 64 --epochs 50", seeds,
          ("3e-3", "1e-2", "3e-2"), inits, ["top1"], 48, f"{data} --test {{JOB}}/best.pt", 6)
    return [Claim("CPCTrans", "pre-trained vs scratch, top-1", "top1", "cpctrans/cpc",
                  "cpctrans/scratch", "63.5 vs 43.6", tested=True, main=True)]


def claims_f2c(p, seeds):
    """F2C against scratch, F2C2V against F2C: clips and transitions of Oops!.

    F2C2V's second pre-training comes after F2C's. At video level scratch trains the frame encoder,
    too, which the others keep as it was pre-trained.
    """
    for world, k in (("toy", 0), ("other", OTHER)):
        p.draw(world, "oops", seeds[0] + k, 8)
        p.add(f"f2c/{world}", "f2c_oops", f"features of {world}", f"--stage features --data "
              f"{{{world}/oops}} --tiny --features {{f2c/{world}}}/features", 20)

    def data(world):
        return (f"--data {{{world}/oops}} --tiny --features {{f2c/{world}}}/features "
                "--select last")
    for s in seeds:
        p.add(f"f2c/f2c_{s}", "f2c_oops", f"pre-training on clips, seed {s}",
              f"{data('toy')} --epochs 45 --seed {s}", 40)
        p.add(f"f2c/f2c2v_{s}", "f2c_oops", f"pre-training on videos, seed {s}",
              f"{data('toy')} --stage f2c2v --epochs 20 --seed {s} "
              f"--init {{f2c/f2c_{s}}}/best.pt", 40)
    inits = {
        "clip": {"scratch": "--init none", "f2c": "--init {f2c/f2c_SEED}/best.pt"},
        "video": {"scratch": "--init none --finetune_frames",
                  "f2c": "--init {f2c/f2c_SEED}/best.pt",
                  "f2c2v": "--init {f2c/f2c2v_SEED}/best.pt"}}
    for level, step, epochs in (("clip", "0.25s", 6),         # an epoch is all clips of all videos
                                ("video", "1s", 20)):
        sides(p, "f2c_oops", f"f2c/{level}", f"{data('WORLD')} --stage classify --level {level} "
              f"--epochs {epochs}", seeds, ("3e-4", "1e-3", "3e-3"), inits[level],
              [f"step_{step}_accuracy", "within_1s"], 25,
              f"{data('WORLD')} --stage evaluate --init {{JOB}}/best.pt", 4)

    def claim(level, better, other, what, key, published, main=False):
        return Claim("F2C", f"{level} level, {what}", key, f"f2c/{level}/{better}",
                     f"f2c/{level}/{other}", published, tested=True, main=main)
    return [
        claim("clip", "f2c", "scratch", "F2C vs scratch, accuracy", "step_0.25s_accuracy",
              "64.2 to 65.3 vs 60.3 to 62.2", main=True),
        claim("clip", "f2c", "scratch", "F2C vs scratch, transitions within 1 s", "within_1s",
              "not known"),
        claim("video", "f2c", "scratch", "F2C vs scratch, accuracy", "step_1s_accuracy",
              "not known"),
        claim("video", "f2c", "scratch", "F2C vs scratch, transitions within 1 s", "within_1s",
              "not known"),
        claim("video", "f2c2v", "scratch", "F2C2V vs scratch, accuracy", "step_1s_accuracy",
              "66.3 to 76.2 vs 69.6"),
        claim("video", "f2c2v", "scratch", "F2C2V vs scratch, transitions within 1 s", "within_1s",
              "not known"),
        claim("video", "f2c2v", "f2c", "F2C2V vs F2C, accuracy", "step_1s_accuracy",
              "not known"),
        claim("video", "f2c2v", "f2c", "F2C2V vs F2C, transitions within 1 s", "within_1s",
              "69.5 vs not known")]


def claims_ssdet(p, seeds):
    """Detection against classification pre-training and scratch, Coarse-Fine against Fine.

    As in the official code SSDet goes on from a trained classifier, one for all seeds, with a
    tenth of the rate for its backbone; its rival goes on classifying in the same way. Both have
    twice as many seeds, since their runs scatter. Coarse-Fine and Fine, two networks, have rates
    and epochs of their own.
    """
    twice = [*seeds, *(max(seeds) + 1 + k for k in range(len(seeds)))]
    p.draw("toy", "kinetics400", seeds[0], 7)
    for world, k in (("toy", 0), ("other", OTHER)):
        p.draw(world, "charades", seeds[0] + k, 14, "--scale 2")
    kinetics = "--data {toy/kinetics400} --tiny --select last"
    p.add("ssdet/first", "ssdet_coarsefine", "classifier from which all go on",
          f"{kinetics} --task classify --iters 480 --seed {seeds[0]}", 160)
    for s, task in itertools.product(twice, ("detect", "classify")):
        p.add(f"ssdet/{task}_{s}", "ssdet_coarsefine", f"from there, {task}, seed {s}",
              f"{kinetics} --task {task} --iters 170 --backbone_lr 0.1 --init {{ssdet/first}}"
              f"/last.pt --seed {s + OTHER}", 57)            # not the first one's clips again
    inits = {"ssdet": "--init {ssdet/detect_SEED}/last.pt",
             "classify": "--init {ssdet/classify_SEED}/last.pt", "scratch": "--init none"}
    charades = "--data {WORLD/charades} --tiny --select last --stage finetune"
    for side, init in inits.items():
        sides(p, "ssdet_coarsefine", "ssdet/fine", f"{charades} --stream fine --epochs 3",
              seeds if side == "scratch" else twice, ("0.1", "0.2", "0.4", "0.8"),
              {side: init}, ["val_mAP_25"], 18)
    fine = {("other", seeds[0]): "best:ssdet/fine/ssdet",
            **{("toy", s): f"ssdet/fine/ssdet_{s}" for s in seeds}}
    for (world, s), job in fine.items():
        p.add(f"ssdet/features_{world}_{s}", "ssdet_coarsefine", f"features of {world}, seed {s}",
              f"--stage extract --data {{{world}/charades}} --tiny --init {{{job}}}/last.pt "
              f"--features {{ssdet/features_{world}_{s}}}/features", 9)
    sides(p, "ssdet_coarsefine", "ssdet/coarse", f"{charades} --stream coarse --epochs 5 "
          "--features {ssdet/features_WORLD_SEED}/features", seeds, ("0.1", "0.2", "0.4"),
          {"ssdet": inits["ssdet"]}, ["val_mAP_25"], 50)

    def claim(better, other, what, published, main=False):
        return Claim("SSDet", f"{what}, mAP at 25 times", "val_mAP_25", f"ssdet/{better}",
                     f"ssdet/{other}", published, main=main)
    return [
        claim("fine/ssdet", "fine/classify", "Fine: SSDet vs classification",
              "22.57 vs 20.66 (X3D)", main=True),
        claim("fine/ssdet", "fine/scratch", "Fine: SSDet vs scratch", "not known"),
        claim("coarse/ssdet", "fine/ssdet", "SSDet: Coarse-Fine vs Fine",
              "26.29 vs 22.57 (X3D)")]


def claims_replai(p, seeds):
    """RepLAI against its parts and scratch: verbs and nouns of EPIC-KITCHENS-100."""
    p.draw("toy", "ego4d", seeds[0], 42)
    for world, k in (("toy", 0), ("other", OTHER)):
        p.draw(world, "epic", seeds[0] + k, 24)
    parts = {"replai": "", "no_astc": "--aot_coeff 0", "no_moi": "--moi random"}
    p.add("replai/moments", "replai", "moments of interaction", "--stage moments --dataset ego4d "
          "--data {toy/ego4d} --tiny --moments {replai/moments}/found", 10)
    for part, s in itertools.product(parts, seeds):
        p.add(f"replai/{part}_pretrain_{s}", "replai", f"pre-training, {part}, seed {s}",
              f"--dataset ego4d --data {{toy/ego4d}} --tiny --epochs 30 --seed {s} "
              f"{parts[part]} --moments {{replai/moments}}/found", 75)
    inits = {part: f"--init {{replai/{part}_pretrain_SEED}}/last.pt" for part in parts}
    sides(p, "replai", "replai", "--stage linear --dataset epic --data {WORLD/epic} --tiny "
          "--epochs 10", seeds, ("0.02", "0.05", "0.15"), inits | {"scratch": "--init none"},
          ["verb@1", "noun@1"], 22)
    # The paper's "scratch" is RepLAI without AVID's weights, which no side has here.
    words = {"scratch": ("RepLAI vs no pre-training", "not known", "not known"),
             "no_moi": ("RepLAI vs w/o MoI", "31.71 vs 28.71", "11.25 vs 8.33"),
             "no_astc": ("RepLAI vs w/o AStC", "31.71 vs 29.29", "11.25 vs 9.67")}
    return [Claim("RepLAI", f"{what}, {key}", key, "replai/replai", f"replai/{other}", published,
                  main=(other, key) == ("scratch", "verb@1"))
            for other, (what, *both) in words.items()
            for key, published in zip(("verb@1", "noun@1"), both)]


def spread(values):
    """(mean, standard error); of a single value the error is not known."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def verdict(one, other):
    """(difference, its standard error, in words) of the values of two sides."""
    (a, da), (b, db) = spread(one), spread(other)
    gain, error = a - b, math.hypot(da, db)
    if gain > 2 * error:
        return gain, error, "holds"
    return gain, error, "does not hold" if gain < -2 * error else "not clear"


def claims_table(plan, found):
    """(text, rows of results.json)"""
    rows, lines = [], []
    for c in found:
        seeds = [plan.seeds[side] for side in (c.better, c.other)]
        values = [[plan.metrics(f"{side}_{s}{'_test' * c.tested}").get(c.key) for s in of]
                  for side, of in zip((c.better, c.other), seeds)]
        row = {**c._asdict(), "seeds": seeds, "values": values}
        if any(v is None for side in values for v in side):
            texts = ["failed"] * 4
        else:
            gain, error, word = verdict(*values)
            row |= {"difference": gain, "standard_error": None if error != error else error,
                    "verdict": word}
            texts = [*("{:.1f} ± {:.1f}".format(*spread(side)) for side in values),
                     f"{gain:+.1f} ± {error:.1f}", word]
        rows.append(row)
        lines.append((c.paper, c.what + " *" * c.main, c.published, *texts))
    return table(("paper", "comparison", "published", "first", "second", "difference", ""),
                 lines), rows


# ---- both --------------------------------------------------------------------------------------

def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, prog="study.py",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["demo", "claims"])
    p.add_argument("--seed", type=int, help="demo: of everything (0)")
    p.add_argument("--seeds", type=int, nargs="+", metavar="S",
                   help="claims: one run of everything each; the first draws the toy, too; SSDet "
                        "takes as many more, those after the highest (0 1 2)")
    p.add_argument("--only", nargs="+", choices=list(PAPERS), metavar="SCRIPT",
                   help=f"claims: some of {' '.join(PAPERS)}")
    p.add_argument("--out", type=Path, metavar="DIR", help="runs/demo or runs/claims")
    p.add_argument("--lanes", type=int, default=cores(),
                   help="steps side by side (one per core)")
    p.add_argument("--list", action="store_true", help="print the command lines, run nothing")
    p.add_argument("--pictures", type=Path, metavar="DIR",
                   help="demo: also copy the four pictures that README shows to DIR")
    args = p.parse_args(argv)
    for name in ("seeds", "only") if args.what == "demo" else ("seed", "pictures"):
        if getattr(args, name) is not None:
            p.error(f"--{name} is not a flag of {args.what}")
    args.out = args.out or Path("runs") / args.what
    args.seeds = args.seeds or ([args.seed or 0] if args.what == "demo" else [0, 1, 2])
    if args.lanes < 1 or min(args.seeds) < 0 or len({*args.seeds}) < len(args.seeds):
        p.error("--lanes must be at least 1, seeds at least 0 and all different")
    return args


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def list_commands(plan):
    """All command lines in an order in which they can be run; chosen rates are `RATE`."""
    plan.chosen = lambda side: "RATE"
    for name in plan.jobs:
        print(f"# {name}: {plan.jobs[name].what}\npython {' '.join(plan.words(name))}")


def main(argv=None):
    """The exit status."""
    args = parse_args(argv)
    plan, rows = demo(args.out, args.seeds[0]) if args.what == "demo" else claims(
        args.out, args.seeds, args.only or tuple(PAPERS))
    if args.list:
        return list_commands(plan)
    began, words = time.time(), f"python tests/study.py {' '.join(map(str, argv or sys.argv[1:]))}"
    print(f"{len(plan.jobs)} steps, {args.lanes} side by side; what they print and leave is in "
          f"{args.out}\n{machine()}", flush=True)
    runner = Runner(plan, args.lanes)
    lost = runner()
    text, rows = (demo_table(plan, rows) if args.what == "demo" else
                  claims_table(plan, rows))
    minutes = round((time.time() - began) / 60, 1)
    rates = {side: {"scores": plan.scores(side), "chosen": plan.chosen(side)}
             for side, all_rates in plan.rates.items() if len(plan.scores(side)) == len(all_rates)}
    common.write_json(args.out / "results.json", {
        "command": words, "machine": machine(), "minutes": minutes, "steps": len(plan.jobs),
        "steps_run_now": len(runner.fresh), "failed": lost, "seeds": args.seeds, "rates": rates,
        "rows": rows})
    print(f"\n{text}\n")
    for side, r in rates.items():
        scores = ", ".join(f"{rate}: {number(x)}" for rate, x in r["scores"].items())
        print(f"rate of {side}: {r['chosen']} (of {scores})")
    if args.what == "demo":
        drawn = [p for p in PICTURES if Path(p.path).parent.as_posix() not in lost]
        print("\n".join(f"{args.out / p.path}: {p.what}" for p in drawn)
              + f"\n{args.out}/*/*/curve.png: loss and metrics of each training")
        if args.pictures:
            copy_pictures(drawn, args.out, args.pictures)
    print(f"{minutes} minutes; {args.out}/results.json"
          + f"; FAILED: {', '.join(lost)}" * bool(lost))
    return int(bool(lost))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
