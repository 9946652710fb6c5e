"""How a list of a million clips starts, and what it costs each worker: a row per script and length.

    python tests/bench_lists.py [--cases cpctrans replai ...] [--lengths 1000 1000000]
                                [--context forkserver] [--folder DIR]

The lists are made here: hard links of one small file under as many names, official annotations,
and the caches that a first run leaves (numbers of pictures, moments, headers of feature files): the
one look at every file that these save is not measured. Each measurement has a fresh process. It
runs the script's own `main` up to its first batch's keys, which is the start-up time (without the
imports), then has two workers go through items, reading left out, and asks the kernel for their
private memory: what they do not share with the first process or with one another.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

LENGTHS = (1_000, 10_000, 100_000, 1_000_000)
ITEMS = 10_000                                                # that each worker goes through


# ---- lists -------------------------------------------------------------------------------------

def plant(content, folder, names):
    """Files of the same content and time: links, since writing each would take minutes."""
    folder.mkdir(parents=True, exist_ok=True)
    source = None
    for k, name in enumerate(names):
        if k % 50_000 == 0:                                   # ext4 allows 65000 links
            source = folder / name
            source.write_bytes(content)
            os.utime(source, ns=(10 ** 18, 10 ** 18))
        else:
            os.link(source, f"{folder}/{name}")


def cpctrans(folder, n):
    """UCF101: 100 classes, a training list and the cache of numbers of pictures."""
    lists, files = folder / "ucfTrainTestlist", []
    lists.mkdir()
    classes = [f"Class{c:03d}" for c in range(100)]
    (lists / "classInd.txt").write_text("".join(f"{k} {c}\n" for k, c in enumerate(classes, 1)))
    rows = []
    for k, c in enumerate(classes, 1):
        names = [f"v_{c}_g{1 + i % 23 if i > 1 else 24:02d}_c{i:05d}.avi"    # 24: held out
                 for i in range(2 + n // 100)]
        plant(b"x", folder / c, names)
        rows += [f"{c}/{v} {k}\n" for v in names]
        files += [f"{c}/{v}" for v in names]
    (lists / "trainlist01.txt").write_text("".join(rows))
    (folder / "runs").mkdir()
    (folder / "runs" / "cpctrans_ucf101_frames.json").write_text(json.dumps({
        str(folder): {"files": files, "stamps": [f"1 {10 ** 18}"] * len(files),
                      "frames": [180] * len(files)}}))
    return ["--dataset", "ucf101"]


def replai(folder, n):
    """Ego4D cut into pieces of 10 s, 60 of each video, with the cache of moments."""
    names = [f"{i // 60:08x}-0000-4000-8000-000000000000_{i % 60 * 10:06d}_{i % 60 * 10 + 10:06d}"
             ".mp4" for i in range(n)]
    plant(b"x", folder / "segments", names)
    moments(folder, [f"segments/{name}" for name in names], [10.0])
    return ["--dataset", "ego4d", "--moments", folder / "moments"]


def replai_whole(folder, n):
    """Ego4D's whole videos, of 1000 s: a hundredth as many files as segments."""
    names = [f"{i:08x}-0000-4000-8000-000000000000.mp4" for i in range(n // 100)]
    plant(b"x", folder, names)
    moments(folder, names, np.arange(10.0, 1001, 10).tolist())
    return ["--dataset", "ego4d", "--moments", folder / "moments"]


def moments(folder, names, ends):
    (folder / "moments").mkdir()
    segments = [[end - 10, end, [1.25, 3.75, 6.125, 8.001234]] for end in ends]
    rest = json.dumps({"bytes": 1, "prominence": 1.0, "segments": segments})[1:]
    (folder / "moments" / "moments.jsonl").write_text(
        "".join(f'{{"file": "{name}", {rest}\n' for name in names))


def f2c_oops(folder, n):
    """Oops!: a feature file of each training video in one folder, the index of their headers."""
    import io
    made = io.BytesIO()
    np.savez(made, arr_0=np.zeros((100, 4), np.float32), fps=25.0, times=np.arange(100) / 25)
    names = [f"A film of failures number {i:07d}" for i in range(n)]
    val = [f"{i}" for i in range(20)]
    features = folder / "features" / "vit_b16"
    for part, some in (("train", names), ("val", val)):
        plant(made.getvalue(), features / part, [f"{v}.npz" for v in some])
        entry = [len(made.getvalue()), 10 ** 18, 100, 4, "<f4", 128]
        (features / part / "index.json").write_text(json.dumps({f"{v}.npz": entry for v in some}))
        (folder / f"{part}.txt").write_text("".join(f"{v}.mp4\n" for v in some))
    return []


def f2c_classify(folder, n):
    """The same, annotated: a hundredth as many videos as clips, which are 0.25 s apart."""
    import io
    made = io.BytesIO()
    np.savez(made, arr_0=np.zeros((650, 4), np.float32), fps=25.0, times=np.arange(650) / 25)
    notes = {"t": [12.0, 13.0, 14.0], "len": 26.0, "rel_t": [12 / 26, 13 / 26, 14 / 26]}
    names = {"train": [f"Film {i:07d}" for i in range(n // 50)], "val": ["1", "2"]}
    for part, some in names.items():
        plant(made.getvalue(), folder / "features" / "vit_b16" / part, [f"{v}.npz" for v in some])
        (folder / f"{part}.txt").write_text("".join(f"{v}.mp4\n" for v in some))
    (folder / "transition_times.json").write_text(
        json.dumps(dict.fromkeys(names["train"] + names["val"], notes)))
    return ["--stage", "classify", "--unbalanced"]


def ssdet_coarsefine(folder, n):
    """Kinetics: 400 classes in folders, a CSV of each split."""
    classes = [f"class number {c:03d}" for c in range(min(400, n))]
    for split, count in (("train", n), ("val", len(classes))):
        rows = ["label,youtube_id,time_start,time_end,split,is_cc\n"]
        for c, label in enumerate(classes):
            names = [f"id{i:09d}" for i in range(c, count, len(classes))]
            plant(b"x", folder / split / label.replace(" ", "_"),
                  [f"{v}_000010_000020.mp4" for v in names])
            rows += [f"{label},{v},10,20,{split},0\n" for v in names]
        (folder / f"{split}.csv").write_text("".join(rows))
    return ["--dataset", "kinetics400"]


def ssdet_finetune(folder, n):
    """Charades: untrimmed videos with their actions, a CSV of each split."""
    for split, first, count in (("train", 0, n), ("test", n, 20)):
        names = [f"A{i:07d}" for i in range(first, first + count)]
        plant(b"x", folder / "Charades_v1_480", [f"{v}.mp4" for v in names])
        (folder / f"Charades_v1_{split}.csv").write_text("id,actions,length\n" + "".join(
            f"{v},c092 11.90 21.20;c147 0.00 12.60;c001 3.00 9.00,30.5\n" for v in names))
    return ["--stage", "finetune", "--dataset", "charades"]


def replai_linear(folder, n):
    """EPIC-KITCHENS-100's actions, 100 in each whole video."""
    columns = ("narration_id,participant_id,video_id,start_timestamp,stop_timestamp,verb_class,"
               "noun_class\n")
    videos = max(1, n // 100)
    plant(b"x", folder / "videos", [f"P{1 + v % 37:02d}_{v:05d}.MP4" for v in range(videos)])
    (folder / "annotations").mkdir()
    for split, count in (("train", n), ("validation", 100)):
        (folder / "annotations" / f"EPIC_100_{split}.csv").write_text(columns + "".join(
            f"P{1 + i // 100 % 37:02d}_{i // 100:05d}_{i % 100},P{1 + i // 100 % 37:02d},"
            f"P{1 + i // 100 % 37:02d}_{i // 100:05d},00:00:{i % 60:02d}.10,00:01:{i % 60:02d}.50,"
            f"{i % 97},{i % 300}\n" for i in range(count)))
    for name, row in (("tail_verbs", "verb\n3"), ("tail_nouns", "noun\n3"),
                      ("unseen_participant_ids_validation", "participant_id\nP09")):
        (folder / "annotations" / f"EPIC_100_{name}.csv").write_text(f"{row}\n")
    return ["--stage", "linear", "--dataset", "epic"]


def ego4d(folder, n, stage, name, entry):
    """A task's annotations, 100 in each of n / 100 videos; the tables that all tasks read."""
    (folder / "annotations").mkdir()
    (folder / "annotations" / "fho_lta_taxonomy.json").write_text(
        json.dumps({"verbs": ["v"] * 115, "nouns": ["n"] * 478}))
    for split, count in (("train", n), ("val", 1000)):
        (folder / "annotations" / f"fho_{name}_{split}.json").write_text(
            json.dumps({"clips": [entry(i) for i in range(count)]}))
    uids = [f"{v:08x}-0000-4000-8000-000000000000.mp4" for v in range(max(10, n // 100))]
    plant(b"x", folder / ("videos" if stage == "statechange" else "clips"), uids)
    return ["--stage", stage, "--dataset", "ego4d"]


def replai_anticipation(folder, n):
    return ego4d(folder, n, "anticipation", "lta", lambda i: {
        "clip_uid": f"{i // 100:08x}-0000-4000-8000-000000000000", "action_idx": i % 100,
        "action_clip_start_sec": i % 100 * 3.0, "action_clip_end_sec": i % 100 * 3.0 + 2.5,
        "verb_label": i % 115, "noun_label": i % 478})


def replai_recognition(folder, n):
    return ["--stage", "recognition", *replai_anticipation(folder, n)[2:]]


def replai_statechange(folder, n):
    return ego4d(folder, n, "statechange", "oscc-pnr", lambda i: {
        "unique_id": f"{i:08x}-0000-4000-8000-000000000001", "state_change": i % 2 == 0,
        "video_uid": f"{i // 100:08x}-0000-4000-8000-000000000000",
        "parent_start_sec": i % 100 * 8.0, "parent_end_sec": i % 100 * 8.0 + 8,
        "parent_start_frame": i % 100 * 240, "parent_end_frame": i % 100 * 240 + 240,
        "parent_pnr_frame": i % 100 * 240 + 99})


class Case(NamedTuple):
    """make: (folder, clips) -> flags; script, and the function of it that reads an item's file."""
    make: object
    script: str
    reads: str


READS = {"cpctrans": "pictures", "replai": "common.read_clip", "f2c_oops": "read_rows",
         "ssdet_coarsefine": "Film"}
SCRIPTS = tuple(READS)                                        # their pre-training
CASES = {make.__name__: Case(make, script, READS[script]) for make, script in (
    *((globals()[s], s) for s in SCRIPTS), (replai_whole, "replai"), (replai_linear, "replai"),
    (replai_recognition, "replai"), (replai_anticipation, "replai"),
    (replai_statechange, "replai"), (f2c_classify, "f2c_oops"),
    (ssdet_finetune, "ssdet_coarsefine"))}


# ---- one measurement, in a process of its own ----------------------------------------------------

class Ready(Exception):
    """The script asks for its first batch."""


class NotRead(Exception):
    """An item is known but for what is in its file."""


def not_read(*_, **__):
    raise NotRead


def private_mb():
    """Memory of this process that no other one shares; NaN where the system does not tell."""
    try:
        rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return float("nan")
    return sum(int(row.split()[1]) for row in rows if row.startswith("Private")) / 1024


class Touched:
    """A script's dataset, whose items are gone through in a worker: its number, its memory."""

    def __init__(self, dataset, script, reads, keys):
        self.dataset, self.script, self.reads, self.keys = dataset, script, reads, keys

    def __len__(self):
        return 2

    def __getitem__(self, k):
        import torch
        owner = importlib.import_module(self.script)
        *path, name = self.reads.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, not_read)
        torch.set_num_threads(1)
        for i in np.random.default_rng(k).integers(0, len(self.dataset), ITEMS).tolist():
            try:
                self.dataset[(*self.keys, i)]
            except NotRead:
                pass
        return torch.tensor([torch.utils.data.get_worker_info().id, private_mb()])


def plainly(folder):
    """Seconds that it takes to look at every file and to read every list and cache, in the plainest
    Python: nothing is checked, chosen or kept.
    """
    began = time.perf_counter()
    for where, _, names in os.walk(folder):
        for name in names:
            path = f"{where}/{name}"
            os.stat(path)
            kind = name.rpartition(".")[2]
            if kind in ("txt", "csv", "json", "jsonl"):
                text = Path(path).read_text()
                rows = [json.loads(text)] if kind == "json" else [
                    json.loads(line) if kind == "jsonl" else line.split(",")
                    for line in text.splitlines()]
                del rows
    return time.perf_counter() - began


def measure(name, folder, flags, context):
    """{startup_s, plain_s, worker_mb} of a script on lists that are there."""
    script, reads = CASES[name].script, CASES[name].reads
    module = importlib.import_module(script)
    import torch

    import common
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)], lr=0.1)                 # imports, a second's worth
    Loader, seen = torch.utils.data.DataLoader, {}

    def loader(dataset, batch_sampler=None, **flags):
        if batch_sampler is None:                             # of files that are looked at
            return Loader(dataset, **flags)
        seen["keys"], seen["dataset"] = next(iter(batch_sampler)), dataset
        seen["seconds"], seen["cpu"] = time.perf_counter() - began, time.process_time() - busy
        raise Ready
    module.DataLoader = loader
    argv = [*flags, "--data", folder, "--out", folder / "runs" / "one", "--tiny", "--init", "none"]
    began, busy = time.perf_counter(), time.process_time()
    try:
        module.main(module.parse_args(list(map(str, argv))))
    except Ready:
        pass
    dataset, keys = seen["dataset"].dataset, seen["keys"][0][:-1]
    data = Touched(dataset, script, reads, keys)
    rows = torch.stack(list(Loader(data, batch_size=None, num_workers=2,
                                   multiprocessing_context=context)))
    common.dist.destroy_process_group()
    return {"script": name, "clips": len(dataset), "startup_s": round(seen["seconds"], 2),
            "cpu_s": round(seen["cpu"], 2), "plain_s": round(plainly(folder), 2),
            "worker_mb": [round(mb, 1) for _, mb in sorted(rows.tolist()) if mb == mb]}


# ---- all of them ---------------------------------------------------------------------------------

def rows(cases=SCRIPTS, lengths=LENGTHS, context="fork", where=None):
    """A dictionary of each script and length: script, clips, startup_s, plain_s of reading and
    looking alone, worker_mb of two workers
    (empty where the system does not tell), and made_s, the time that making the list took.
    """
    for name in cases:
        for n in lengths:
            folder = Path(tempfile.mkdtemp(prefix="lists_", dir=where))
            try:
                began = time.perf_counter()
                flags = CASES[name].make(folder, n)
                made = time.perf_counter() - began
                words = [name, str(folder), json.dumps(flags, default=str), context]
                found = subprocess.run([sys.executable, __file__, "--one", *words], check=False,
                                       capture_output=True, text=True)
                if found.returncode:
                    raise RuntimeError(f"{name}, {n} clips: {found.stdout}{found.stderr}")
                yield {**json.loads(found.stdout.splitlines()[-1]), "made_s": round(made, 1)}
            finally:
                shutil.rmtree(folder)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", nargs="+", choices=list(CASES), default=SCRIPTS, help="which lists")
    p.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="clips in each")
    p.add_argument("--context", choices=["fork", "forkserver", "spawn"], default="fork",
                   help="how workers start: PyTorch's way up to Python 3.13, and since")
    p.add_argument("--folder", type=Path, help="where to make them (the system's)")
    p.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        name, folder, flags, context = args.one
        print(json.dumps(measure(name, Path(folder), json.loads(flags), context)), flush=True)
        return
    began = time.perf_counter()
    for row in rows(args.cases, args.lengths, args.context, args.folder):
        print(row, f"  {time.perf_counter() - began:.0f} s so far", flush=True)


if __name__ == "__main__":
    main()
