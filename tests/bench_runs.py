"""The parts `data` and `scale` of `make bench`: training samples, whole runs, several processes."""

import csv
import io
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import av
import bench_lists
import numpy as np
import torch
import torch.distributed as dist
from bench_media import HD, OOPS, UCF, make_file, pillow, prepared
from measure import Row, busy, compare, cpu_paired, without_gpu
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import cpctrans
import f2c_oops
import replai
import ssdet_coarsefine

REPO = Path(common.__file__).resolve().parent


# ---- datasets in the official layouts, all their files links to a few --------------------------

def link(target, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target.resolve())


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def ego4d(root, video, n=32):
    """Pieces of ten seconds for replai.py."""
    for k in range(n):
        link(video, root / "segments" / f"{k:08d}-0000-0000-0000-000000000000_000000_000010.mp4")


def ucf101(root, video, n=32):
    """Two classes for cpctrans.py; groups 24 and 25 are held out."""
    names = [f"{c}/v_{c}_g{g:02d}_c01" for c in ("Swim", "Walk") for g in range(1, n // 2 + 1)]
    names += [f"{c}/v_{c}_g25_c01" for c in ("Swim", "Walk")]
    for name in names:
        link(video, root / "UCF-101" / f"{name}.avi")
    lists = root / "ucfTrainTestlist"
    text(lists / "classInd.txt", "1 Swim", "2 Walk")
    text(lists / "trainlist01.txt", *(f"{x}.avi {1 + x.startswith('W')}" for x in names))


def oops(root, n=32, frames=300, channels=768):
    """Features of random numbers for f2c_oops.py, as one run of --stage features leaves them."""
    x, t = np.random.default_rng(0).standard_normal((frames, channels), np.float32), 1 / 30
    for part, count in (("train", n), ("val", 4)):
        folder = root / "features" / "vit_b16" / part
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"{part} {k}" for k in range(count)]
        for name in names:
            np.savez(folder / f"{name}.npz", arr_0=x, times=np.arange(frames) * t, fps=30.0)
        text(root / f"{part}.txt", *names)


def kinetics(root, video, n=32):
    """Two classes for ssdet_coarsefine.py."""
    for part in ("train", "val"):
        rows = [(("walking", "swimming")[k % 2], f"{part}{k:07d}", 0, 10, part) for k in range(n)]
        for label, name, *_ in rows:
            link(video, root / part / label / f"{name}_000000_000010.mp4")
        table = io.StringIO()
        csv.writer(table).writerows([("label", "youtube_id", "time_start", "time_end", "split"),
                                     *rows])
        text(root / f"{part}.csv", table.getvalue().rstrip())


# ---- training samples --------------------------------------------------------------------------

def quiet(function, *arguments):
    """A function's result; what it says to the user is left out."""
    said, common.say = common.say, lambda *words: None
    try:
        return function(*arguments)
    finally:
        common.say = said


def samples_of_replai(data, runs, *flags):
    args = replai.parse_args(["--data", str(data), "--moments", str(runs / data.name / "moments"),
                              "--workers", "0", *flags])
    return replai.AudibleClips(args, replai.SegmentIndex(args, replai.scan(args)))


def samples_of_cpctrans(data, runs, *flags):
    args = cpctrans.parse_args(["--data", str(data), "--workers", "0", "--out", str(
        runs / data.name / "cpctrans"), *(flags or ("--img_dim", "128"))])
    cpctrans.fill_from(args, None)
    return cpctrans.TrainClips(args, cpctrans.read_videos(args, "train")[0],
                               cpctrans.distort_pretrain)


def samples_of_f2c(data, runs, *flags):
    args = f2c_oops.parse_args(["--data", str(data), "--workers", "0", *flags])
    return f2c_oops.ClipPretext(f2c_oops.scan(args, "train"), args)


def samples_of_ssdet(data, runs, *flags):
    args = ssdet_coarsefine.parse_args(["--data", str(data), "--workers", "0", *flags])
    tree, files, labels, _ = ssdet_coarsefine.read_kinetics(args, "train")
    clips = ssdet_coarsefine.KineticsClips(args, tree, files, labels)
    return Keyed(clips, args.num_frames, args.crop)


class Keyed:
    """A dataset whose keys hold the shape of the clip."""

    def __init__(self, clips, *shape):
        self.clips, self.shape = clips, shape

    def __getitem__(self, key):
        return self.clips[(key[0], *self.shape, key[1])]


def keys(n=32):
    """Those of all samples, epoch by epoch."""
    return ((k // n, k % n) for k in itertools.count())


def drawn(samples, *arguments):
    """A function that makes the next sample of a script's training."""
    dataset = quiet(samples, *arguments)
    draw = map(dataset.__getitem__, keys())
    return lambda: next(draw)


def from_the_start(path, times, side, crop, rng):
    """A naive way to a clip: decode from the first picture on, wanted ones one by one in Pillow."""
    wanted, pictures = list(times), []
    with av.open(str(path)) as c:
        for n, f in enumerate(c.decode(video=0)):
            if wanted and n / c.streams.video[0].average_rate >= wanted[0]:
                pictures.append(f.to_ndarray(format="rgb24"))
                del wanted[0]
            if not wanted:
                break
    pillow(np.stack(pictures), side, crop, rng)


def naive_replai(path, rng):
    """As released: the whole sound for the moments, two seconds of it again, then two clips."""
    x, rate = common.read_audio(path)
    replai.find_moments(x, rate, 1.0)
    t = rng.uniform(1, 8)
    replai.log_mel(*common.read_audio(path, t - 1, t + 1))
    for begin in (t - 0.6, t + 0.1):
        from_the_start(path, begin + np.arange(8) / 16, 128, 112, rng)


def naive_cpctrans(path, rng):
    from_the_start(path, rng.uniform(0, 6) + np.arange(5) * 3 / 25, 240, 224, rng)


def naive_ssdet(path, rng):
    from_the_start(path, rng.uniform(0, 7) + np.arange(16) * 5 / 30, 256, 224, rng)


def naive_f2c(path, rng):
    """All features of a video, whatever is needed of them."""
    with np.load(path) as z:
        torch.from_numpy(z["arr_0"])


def data_rows(folder, repeats):
    """One training sample of each script, decoded, cut and ready for the batch, on one core."""
    made, runs = prepared((UCF, OOPS, HD), folder), folder / "runs"
    oops(folder / "oops")
    feature = folder / "oops/features/vit_b16/train/train 0.npz"
    colours = "the naive one changes colours, too, ours does on the device"
    for script, kind, layout, samples, naive, note in (
            ("replai.py", HD, ego4d, samples_of_replai, naive_replai, "the naive one seeks moments "
             "in the whole sound for each sample, as released, ours once for all; " + colours),
            ("cpctrans.py", UCF, ucf101, samples_of_cpctrans, naive_cpctrans, colours),
            ("ssdet_coarsefine.py", OOPS, kinetics, samples_of_ssdet, naive_ssdet, colours),
            ("f2c_oops.py", None, None, samples_of_f2c, naive_f2c, "the naive one takes all rows")):
        sources = [("features", feature)] if kind is None else [
            (kind.name, make_file(kind, folder)), (f"{kind.name}, prepared", made[kind.name])]
        for name, path in sources:
            root = folder / (f"{script[:-3]}_{'prepared' in name}" if layout else "oops")
            if layout:
                layout(root, path)
            table = cpu_paired(drawn(samples, root, runs), partial(
                naive, path, np.random.default_rng(0)), repeats=2 * repeats, least=0, warm=2)
            row = compare("data", f"{script}: {name}", table, "naive: from the start, Pillow"
                          if kind else "naive: all features of the video")
            yield row._replace(note=f"{1000 / row.ours:.0f} samples/s per core; {note}")


# ---- whole runs --------------------------------------------------------------------------------

def run(script, *flags):
    """A script in a process of its own; raises with its last words if it failed."""
    done = subprocess.run([sys.executable, str(REPO / script), *map(str, flags)], text=True,
                          capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script}: {(done.stdout + done.stderr)[-800:]}")


class Drawn(torch.utils.data.Dataset):
    """Samples of a script's training, epoch by epoch, one by one."""

    def __init__(self, dataset, n):
        self.dataset, self.n = dataset, n

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        return self.dataset[next(itertools.islice(keys(), k, None))]


def loading_rate(samples, loaders, *arguments, n=160):
    """Samples per second of the clock that so many processes bring, with nothing else to do."""
    data = Drawn(quiet(samples, *arguments), n)
    loader = iter(torch.utils.data.DataLoader(data, batch_size=None, num_workers=loaders))
    for _ in range(n // 4):                                   # until they are at work
        next(loader)
    began = time.perf_counter()
    return sum(1 for _ in loader) / (time.perf_counter() - began)


def wait_rows(folder, repeats):
    """The share of a tiny training run in which it waits for data; a core computes, others load."""
    made, loaders = prepared((UCF, OOPS, HD), folder), max(1, os.cpu_count() - 1)
    ego4d(folder / "wait_replai", made[HD.name])
    ucf101(folder / "wait_cpctrans", made[UCF.name])
    kinetics(folder / "wait_ssdet", made[OOPS.name])
    oops(folder / "oops")
    for script, samples, data, *flags in (
            ("replai.py", samples_of_replai, "wait_replai", "--dataset", "ego4d", "--epochs", 4),
            ("cpctrans.py", samples_of_cpctrans, "wait_cpctrans", "--epochs", 8),
            ("f2c_oops.py", samples_of_f2c, "oops", "--epochs", 10),
            ("ssdet_coarsefine.py", samples_of_ssdet, "wait_ssdet", "--iters", 8)):
        out, others = folder / "runs" / f"{data}_run", busy(1 + loaders)
        shutil.rmtree(out, ignore_errors=True)
        run(script, "--data", folder / data, "--tiny", "--workers", loaders, "--out", out,
            "--log_every", 2, *flags)
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][1:]
        shares = [100 * row["data_wait"] for row in rows]     # the first: workers had to begin
        load = loading_rate(samples, loaders, folder / data, folder / "runs", "--tiny")
        step = statistics.median(row["clips_per_s"] / max(0.01, 1 - row["data_wait"])
                                 for row in rows)
        slow = f"{loaders} loading: {load:.0f} samples/s at most, a step takes {step:.0f}"
        yield Row("data", f"{script} --tiny: time spent waiting for data",
                  f"{loaders} loading beside the training", statistics.median(shares), None, "%",
                  low=min(shares), high=max(shares), target=5,
                  excuse=slow if load < 1.1 * step else others)


# ---- several processes -------------------------------------------------------------------------

def example(script):
    """(network of the default pre-training at paper size, a small batch) for one process."""
    torch.manual_seed(0)
    if script == "replai.py":
        clip = torch.randn(1, 3, 8, 112, 112)
        return replai.RepLAI(), (clip, clip, torch.randn(1, 1, 125, 80))
    if script == "cpctrans.py":
        args = cpctrans.parse_args(["--img_dim", "128"])
        cpctrans.fill_from(args, None)
        return cpctrans.CPC(args), (torch.randn(2, args.num_seq, 3, 128, 128),)
    if script == "f2c_oops.py":
        return f2c_oops.F2C(768, 8), (torch.randn(48, 20, 768),)
    model = common.X3D("M", 401, norm=common.SplitBatchNorm)
    common.set_splits(model, 2)                               # one part of the batch per process
    return model, (ssdet_coarsefine.quick(torch.randn(2, 3, 8, 112, 112)),)


def two_ranks(rank, script, folder, repeats):
    """Seconds of a step by itself and of one under DDP, side by side with the other process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, inputs = example(script)
    ddp, table = DDP(model, gradient_as_bucket_view=True), []

    def step(network):
        out = network(*inputs)
        out = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else [out]
        sum(x.float().square().mean() for x in out).backward()
        model.zero_grad(set_to_none=True)

    for r in range(repeats + 1):                              # the first does not count
        row = [0.0, 0.0]
        for k in (0, 1) if r % 2 else (1, 0):
            dist.barrier()
            began = time.perf_counter()
            step((ddp, model)[k])
            dist.barrier()
            row[k] = time.perf_counter() - began
        table.append(row)
    if rank == 0:
        common.write(Path(folder) / "table.json", json.dumps(table[1:]))
    dist.barrier()
    os._exit(0)


def rank_rows(folder, repeats):
    """A step of two processes under DDP against the same step without."""
    others = busy(2)
    for script in ("replai.py", "cpctrans.py", "f2c_oops.py", "ssdet_coarsefine.py"):
        with tempfile.TemporaryDirectory() as meet:
            spawn(two_ranks, script, meet, repeats)
            table = json.loads((Path(meet) / "table.json").read_text())
        yield compare("scale", f"{script}: step of two processes", table, "without DDP", 1, 1.35,
                      excuse=others)


def gather_gradient(rank, folder):
    """Largest difference of the gradient of the gathered rows from that of one process, float64."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    z_hat, z = (torch.randn(8, 3, 4, 16, dtype=torch.float64, requires_grad=True)
                for _ in range(2))
    own = slice(4 * rank, 4 * rank + 4)
    whole, target = score(z_hat, z), torch.arange(8 * 12)
    part = score(z_hat[own], cpctrans.Gather.apply(z[own].contiguous()))
    loss = nn.functional.cross_entropy(part, target[48 * rank:48 * rank + 48])
    own_grad, = torch.autograd.grad(loss, z)
    want, = torch.autograd.grad(nn.functional.cross_entropy(whole, target), z)
    grad = own_grad / 2                                       # DDP's mean over the processes
    common.write(Path(folder) / f"{rank}.json", json.dumps(
        float((grad[own] - want[own]).abs().max())))
    dist.barrier()
    os._exit(0)


def score(z_hat, z):
    return z_hat.flatten(0, 2) @ z.flatten(0, 2).T


def ending(folder, n, kill):
    """The bytes of last.pt of a run of n processes, killed by SIGKILL after so many lines of log
    (0: not at all), then gone on with.
    """
    from running import quick
    out = folder / "runs" / f"equal{n}" / ("killed" if kill else "whole")
    shutil.rmtree(out, ignore_errors=True)
    start = partial(quick, out.parent / "q", "--data", folder / "equal", "--tiny", "--width", 8,
                    "--epochs", 6, "--batch_size", 4, "--workers", 0, "--log_every", 1,
                    "--save_every", 3, "--out", out, n=n, script="cpctrans")
    log = out / "log.jsonl"
    with without_gpu():
        if kill:
            code, seen = start(kill=(log, kill, 0)).code, len(log.read_bytes().splitlines())
            if not code:
                raise RuntimeError(f"{out}: the run ended before it could be killed")
        done = start()
    if done.code:
        raise RuntimeError(done.err[-800:])
    if kill and seen >= len(log.read_bytes().splitlines()):  # one line per step
        raise RuntimeError(f"{out}: was killed after its last step")
    return (out / "last.pt").read_bytes()


def equality_rows(folder, repeats):
    """A run of 2 and of 4 processes, killed half way, ends in the bytes of one that was not."""
    ucf101(folder / "equal", make_file(UCF, folder), 16)
    for n in (2, 4):                                          # of one: the tests, of all scripts
        whole, killed = (ending(folder, n, kill) for kill in (0, 10))
        differ = sum(a != b for a, b in zip(whole, killed)) + abs(len(whole) - len(killed))
        yield Row("scale", f"cpctrans.py, processes: {n}; bytes of last.pt that differ",
                  "one run killed after ten steps", differ, None, "", target=0)
    with tempfile.TemporaryDirectory() as meet:
        spawn(gather_gradient, meet)
        worst = max(json.loads((Path(meet) / f"{r}.json").read_text()) for r in (0, 1))
    yield Row("scale", "gradient of gathered rows, two processes, float64", "one process", worst,
              None, "", target=1e-12)


def spawn(function, *arguments):
    """function(rank, *arguments) in two processes; they leave files, no results."""
    context = torch.multiprocessing.get_context("spawn")
    both = [context.Process(target=function, args=(r, *arguments)) for r in (0, 1)]
    with without_gpu():
        for p in both:
            p.start()
    while any(p.is_alive() for p in both):
        time.sleep(0.05)
        if any(p.exitcode for p in both):
            for p in both:
                p.kill()
            raise RuntimeError(f"{function.__name__} failed")


# ---- long lists --------------------------------------------------------------------------------

def list_rows(folder, repeats):
    """From a thousand clips to a million: seconds until the first batch's keys, and the private
    memory of the second loading process, where the system tells it. Then of one script's loading
    processes that are not forked, which get copies of everything.
    """
    where, others = folder / "lists", busy(1)
    shutil.rmtree(where, ignore_errors=True)                  # of a run that was killed
    where.mkdir()
    for case, what, n in (("cpctrans", "cpctrans.py, a million videos", 1_000_000),
                          ("replai_whole", "replai.py, a million pieces of videos", 1_000_000),
                          ("ssdet_coarsefine", "ssdet_coarsefine.py, a million clips", 1_000_000),
                          ("f2c_oops", "f2c_oops.py, a million clips of videos", 1_000_000 // 6)):
        few, many = lists(where, case, (1_000, n))
        slow = ("as slow as this machine is: twice as long as looking at its files and reading its "
                "lists must do" if many["startup_s"] < 2 * many["plain_s"] else "")
        yield Row("scale", f"{what}: start-up", "files looked at, lists read, nothing done with it",
                  many["startup_s"], many["plain_s"], "s", target=10,
                  excuse=others or slow, note=f"target in seconds; of {n:,} items whose files are "
                  f"known; {many['cpu_s']:.3g} s of CPU time; 1000 items: {few['startup_s']:.2g} s")
        if many["worker_mb"]:
            yield Row("scale", f"{what}: a worker's own memory", "with 1000 items",
                      many["worker_mb"][1], few["worker_mb"][1], "MB", target=50)
    few, many = lists(where, "cpctrans", (1_000, 100_000), "forkserver")
    if many["worker_mb"]:
        more = many["worker_mb"][1] - few["worker_mb"][1]
        yield Row("scale", "cpctrans.py, 100,000 clips: memory that a worker has beyond 1000 clips",
                  "forkserver, Python's choice from 3.14 on", more, None, "MB", target=50,
                  note=f"with 1000 clips {few['worker_mb'][1]:.0f} MB, PyTorch's included")


def lists(where, script, lengths, context="fork"):
    with without_gpu():
        return list(bench_lists.rows([script], lengths, context, where))
