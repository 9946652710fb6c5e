"""RepLAI: Learning State-Aware Visual Representations from Audible Interactions (Mittal, Morgado,
Jain, Gupta), NeurIPS 2022, arXiv:2209.13583.   Official code: HimangiM/RepLAI, commit 9561802.

First-person video is long and mostly uneventful, but where hands touch things it can be heard.
RepLAI finds these moments of interaction in the sound, takes a short clip before and one after,
and trains a video and an audio network to tell (a) which clip goes with which sound and (b) that
the change from before to after, not the reversed change, agrees with the sound.

    t             a peak of the z-scored log spectrogram's mean over frequencies
    v_l, v_r, a   clips [t-d-0.5, t-d] and [t+d, t+d+0.5], sound [t-1, t+1], d = 0.1 s
    z, y          = n(h(f_V(v))), n(h'(f_A(a)))      n(x) = x / |x|; h two-layer heads
    L_AVC         = ½ mean -log softmax_m(z·Y_m / τ)_own + ½ mean -log softmax_m(y·Z_m / τ)_own
    p_fwd, p_bwd  = n(g(s_r - s_l))·n(q) / κ,  n(g(s_l - s_r))·n(q) / κ     two-layer heads s, q, g
    L_AStC        = ½ mean [-log σ(p_fwd) - log(1 - σ(p_bwd))]
    L             = ½ L_AVC + ½ L_AStC

Pre-train    torchrun --nproc_per_node 8 replai.py --dataset ego4d --data data/ego4d
             torchrun --nproc_per_node 4 replai.py --dataset epic --data data/epic
EPIC         torchrun --nproc_per_node 4 replai.py --stage linear --dataset epic --init FILE
Ego4D        torchrun --nproc_per_node 8 replai.py --stage statechange --init FILE
             ... --stage recognition, --stage anticipation         the same way
Prepare      python replai.py --stage segments --dataset epic      cut 10 s pieces (optional)
             python replai.py --stage moments --dataset ego4d      detect moments (else at start)
Exchange     python replai.py --stage convert --init FILE          for AVID's and Ego4D's tools
Try it       python replai.py --data data/toy/ego4d --tiny         (CPU, minutes; `make toy` first)

The paper's text was not at hand, only its abstract: files named here are those of the official
code, `ours` is from neither. Where the sources and this file differ, grep NOTE in this file.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import socket
import time
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset

import common
from common import UserError, VideoError, Window

CLIP_SECONDS = 0.5              # of the clip before and of the clip after
SOUND_SECONDS = 2.0             # of the sound across the moment
SEGMENT_SECONDS = 10.0          # pieces that training videos are cut into
KAPPA = 0.2                     # temperature of AStC, hard-coded in the official criterion
SCALES = (128 / 112, 180 / 112)                # range of the short side, in crops
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VERBS, NOUNS = 97, 300          # classes of EPIC-KITCHENS-100
GREY = (0.45,) * 3, (0.225,) * 3               # mean and std that the forecasting tools use
FPS = 30                        # of Ego4D's canonical videos, which its frame numbers count
ACTION_SECONDS = 32 * 2 / FPS   # of a clip for recognition and anticipation
INPUTS, FUTURE = 4, 20          # actions that anticipation sees, and Z, those that it foretells
TEST = "test_unannotated"       # the split whose labels nobody has
EGO4D_STAGES = ("statechange", "recognition", "anticipation")
common.FREE_FLAGS |= {"moments", "clips", "clip", "eval_resize", "pnr_frame"}
AVID = ("https://dl.fbaipublicfiles.com/avid-cma/checkpoints/"
        "AVID_Audioset_Cross-N1024_checkpoint.pth.tar")


# ---- arguments ---------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.Parser(__doc__, ["pretrain", "linear", *EGO4D_STAGES, "segments", "moments",
                                "convert"], ["ego4d", "epic"])
    p.data.add_argument("--moments", type=Path, metavar="DIR", help="cache of detected moments")
    tools = "configs/data_augm; Ego4D's tasks: ego4d-forecasting/, hands-and-objects/"

    g = p.add_argument_group("clips")
    g.add_argument("--num_frames", type=int, default=8, metavar="T",
                   help="frames per clip, T, half a second at 16 fps; Ego4D's tasks 32, "
                        f"statechange 16 (default: %(default)s, {tools})")
    g.add_argument("--crop", type=int, default=112, metavar="N",
                   help="height and width in pixels; Ego4D's tasks 224, statechange 225 (default: "
                        f"%(default)s, {tools})")

    g = p.add_argument_group("method")
    g.add_argument("--init", default="avid", metavar="FILE",
                   help="weights to start from: none (the paper's scratch row), avid (AudioSet, "
                        "fetched once; the paper's), or a file: ours, RepLAI's, AVID's, a linear "
                        "probe or bare weights")
    g.add_argument("--moi", choices=["peaks", "random"], default="peaks",
                   help="moments of interaction: peaks in the sound; random: the paper's row w/o "
                        "MoI, inferred (default: %(default)s, the paper's)")
    g.add_argument("--prominence", type=float, default=1.0, metavar="X",
                   help="least height of a peak over its surroundings, in z-scores (default: "
                        "%(default)s, official audio_event_prominence)")
    g.add_argument("--delta_non_overlap", type=float, default=0.1, metavar="SECONDS",
                   help="from the moment to either clip, d (default: %(default)s, commands/*.sh)")
    g.add_argument("--clr_coeff", type=float, default=0.5, metavar="X",
                   help="weight of L_AVC; 0: the row w/o AVC, inferred (default: %(default)s, "
                        "commands/*.sh)")
    g.add_argument("--aot_coeff", type=float, default=0.5, metavar="X",
                   help="weight of L_AStC; 0: the row w/o AStC, inferred (default: %(default)s, "
                        "commands/*.sh)")
    g.add_argument("--tau", type=float, default=0.07, metavar="X",
                   help="temperature of L_AVC, τ (default: %(default)s, ssrl_audiopeak_aotv2.py)")
    g.add_argument("--depth", type=int, choices=[10, 18], default=18,
                   help="layers of the R(2+1)D (default: %(default)s, AVID's, models/video)")
    g.add_argument("--width", type=int, default=64, metavar="N",
                   help="channels of both networks' first stage (default: %(default)s, AVID's, "
                        "models/)")

    g = p.add_argument_group("Ego4D's tasks")
    g.add_argument("--aggregator", choices=["transformer", "concat", "mean"],
                   default="transformer", help="what joins anticipation's 4 input clips (default: "
                                               "%(default)s, lta_models.py)")
    g.add_argument("--samples", type=int, default=5, metavar="K",
                   help="futures that anticipation draws, the best counts; 1: the likeliest "
                        "(default: %(default)s, ego4d-forecasting/)")
    g.add_argument("--extra_window", action="store_true",
                   help="anticipation trains on each clip's last window, too, as its later tools")
    g.add_argument("--pnr_frame", choices=["absolute", "relative"], default="absolute",
                   help="submitted key frames count in the video, or from the clip's start; which "
                        "the challenge wants is unverified (default: %(default)s, ours)")

    g = p.add_argument_group("optimization", "SGD with momentum, for anticipation Adam")
    scripts = "commands/*.sh; statechange: the benchmark's"
    g.add_argument("--epochs", type=int, metavar="N",
                   help="passes over the training segments or annotations; OneCycle needs ten or "
                        f"more (default: %(default)s, {scripts})")
    g.add_argument("--batch_size", type=int, metavar="N",
                   help="samples per step over all GPUs; batch norm sees one GPU's share (default: "
                        f"%(default)s, {scripts})")
    g.add_argument("--groups", type=int, default=8, metavar="N",
                   help="parts of a batch that batch norm sees apart in Ego4D's tasks, as far as "
                        "batch and processes divide (default: %(default)s, the release's GPUs)")
    g.add_argument("--lr", type=float, metavar="X",
                   help="learning rate. pretrain: peak of OneCycle; linear: first value, x0.1 at "
                        "3/5 and 4/5 of the epochs; Ego4D's tasks: first value of a cosine, after "
                        "1000 steps of warm-up (at most a tenth of all) but in statechange "
                        f"(default: %(default)s, {scripts})")
    g.add_argument("--weight_decay", type=float, metavar="X",
                   help="on all parameters, norms and biases, too; Ego4D's tasks: none on "
                        "parameters named bn (default: %(default)s, configs/optim/sgd.yaml; other "
                        "stages: their official recipes)")

    g = p.add_argument_group("evaluation")
    g.add_argument("--clips", type=int, default=1, metavar="N",
                   help="evenly spaced clips per action, scores averaged, in linear and "
                        "recognition; 1: the centre (default: %(default)s, ours)")
    g.add_argument("--clip", choices=["even", "random"], default="even",
                   help="where these are; random: fixed by --seed, the released protocol with "
                        "--clips 1 (default: %(default)s, ours)")
    g.add_argument("--eval_resize", choices=["nearest", "bilinear"], default="nearest",
                   help="how linear's evaluation scales frames (default: %(default)s, as released)")
    g.add_argument("--normalize_feats", choices=["off", "l2", "sign"], default="off",
                   help="features of the linear evaluation; sign: what the release's switch does "
                        "(default: %(default)s, as in the release's runs)")

    g = p.add_argument_group("faults of the release")
    g.add_argument("--compat", choices=["fixed", "released"], default="fixed",
                   help="released: with all faults below, and `state_change: null` counts as a "
                        "change (default: %(default)s, ours)")
    g.add_argument("--legacy_aspect", action="store_true",
                   help="training frames with width and height swapped")
    g.add_argument("--legacy_bn", action="store_true", help="batch statistics in frozen networks")
    g.add_argument("--raw_pixels", action="store_true",
                   help="statechange on frames of 0..255, not normalised")
    args = common.parse(p, recipe, argv)
    if args.stage == "linear" and args.dataset != "epic":
        p.error("--stage linear is EPIC-KITCHENS-100's verb and noun evaluation: --dataset epic")
    if not args.tau:
        p.error("--tau 0: a temperature must be above 0")
    if args.stage in EGO4D_STAGES and args.dataset != "ego4d":
        p.error(f"--stage {args.stage} is a task of Ego4D: --dataset ego4d")
    if args.compat == "released":
        args.legacy_aspect = args.legacy_bn = args.raw_pixels = True
    return args


PUBLISHED = {      # NOTE: of statechange the benchmark's, its config was never released
    "pretrain": {"epochs": 100, "batch_size": 512, "lr": 0.05, "weight_decay": 1e-4},
    "linear": {"epochs": 30, "batch_size": 128, "lr": 0.005, "weight_decay": 0.0},
    "statechange": {"epochs": 100, "batch_size": 256, "lr": 1e-4, "weight_decay": 1e-4,
                    "num_frames": 16, "crop": 225},
    "recognition": {"epochs": 30, "batch_size": 32, "lr": 0.01, "weight_decay": 1e-4,
                    "num_frames": 32, "crop": 224},
    "anticipation": {"epochs": 50, "batch_size": 32, "lr": 0.01, "weight_decay": 1e-4,
                     "num_frames": 32, "crop": 224, "features": 2048, "layers": 6,
                     "save_every": 5000}}                     # 2 GB each time
TINY = {
    "pretrain": {"epochs": 60, "lr": 0.01}, "linear": {"epochs": 20, "lr": 0.05},
    "statechange": {"epochs": 20, "lr": 0.01},
    "recognition": {"epochs": 10, "lr": 0.02, "num_frames": 16},
    "anticipation": {"epochs": 60, "lr": 3e-3, "num_frames": 8, "features": 64, "layers": 1}}


def recipe(chosen):
    """Defaults of the published run that --stage and --dataset name; smaller ones for --tiny."""
    stage, dataset = chosen.stage, chosen.dataset
    r = {"data": Path("data") / dataset, "moments": Path("runs") / f"replai_{dataset}_moments",
         **PUBLISHED.get(stage, {})}
    if (stage, dataset) == ("pretrain", "epic"):
        r |= {"batch_size": 128, "lr": 0.005}
    if stage in ("linear", *EGO4D_STAGES):
        r["init"] = f"runs/replai_{dataset}_pretrain/last.pt"
    if chosen.tiny and stage in TINY:
        r |= {"crop": 56, "width": 16, "depth": 10, "batch_size": 16, "workers": 2, "log_every": 5,
              "save_every": 20, "init": "none", "groups": 2, **TINY[stage]}
    return r


# ---- moments of interaction (official file: data/video_audiopeak_dataset.py) -------------------

class Moments(NamedTuple):
    """`times` (K,) s and z-scored `curve` (K,) of a sound; `peaks` are indices into both."""
    times: np.ndarray
    curve: np.ndarray
    peaks: np.ndarray
    prominences: np.ndarray


def find_moments(x, rate, prominence, distance=10):
    """Moments of interaction: sharp rises over all frequencies at once.    x: (channels, n)

        c_k = mean_f [ (L_fk - mean_k L_f) / (std_k L_f + 1e-5) ],   L = log10(spectrogram + 1e-5)

    Bins k are 224 samples apart (5 ms at 44.1 kHz), so peaks of c are 50 ms apart or more. The
    floor of 1e-5 makes the result depend on loudness: x must stay in [-1, 1] as decoded.
    """
    from scipy import signal  # slow to import: --help can wait less
    x = x.mean(0)                                                       # (n,)
    if len(x) < 256:
        return Moments(*(np.zeros(0),) * 2, np.zeros(0, int), np.zeros(0))
    _, times, power = signal.spectrogram(x, rate)                       # (129, K)
    level = np.log10(power + 1e-5)
    z = (level - level.mean(1, keepdims=True)) / (level.std(1, keepdims=True) + 1e-5)
    curve = z.mean(0)                                                   # (K,)
    peaks, found = signal.find_peaks(curve, distance=distance, prominence=prominence)
    return Moments(times, curve, peaks, found["prominences"])


def admissible(times, duration, delta, clip_seconds=CLIP_SECONDS):
    """Mask of the times around which both clips lie inside a segment of `duration` seconds."""
    margin = delta + clip_seconds
    return (margin <= times) & (times <= duration - margin)


def list_media(args, pieces=True):
    """Paths, relative to --data, of the files to pre-train on: 10 s pieces if any, else videos.

    pieces=False: the videos in any case.
    """
    if pieces and (args.data / "segments" / ".cutting").exists():
        raise UserError(f"{args.data}/segments: not all videos are cut yet; let "
                        "`--stage segments` finish")
    files = mp4_files(args.data, "segments") if pieces else []
    if args.dataset == "ego4d":
        whole = mp4_files(args.data, "") or mp4_files(args.data, "clips")
        uncut = {stem(f) for f in whole}
        uncut -= {stem(f).rsplit("_", 2)[0] for f in files if uncut}
        if files and uncut:
            common.say(f"{len(uncut)} of {len(whole)} videos have no piece in segments/: not used")
        files = files or whole
    else:                                                     # EPIC: only videos of its train split
        train = set(read_actions(args.data, "train").video)
        named = {f: "_".join(stem(f).split("_")[:2])
                 for f in files or epic_videos(args.data).values()}
        files = [f for f in named if named[f] in train]
        absent = train - set(named.values())
        if absent:
            common.say(f"{len(absent)} of {len(train)} training videos are absent from "
                       f"{args.data}, the first is {min(absent)}")
    if not files:
        raise UserError(f"{args.data}: no training videos (*.mp4) in it; see README for the layout")
    return files


def mp4_files(root, *patterns):
    """Sorted paths, relative to `root`, of the .mp4 and .MP4 files in folders of these patterns.

    As text, and without asking for each file: they may be a million.
    """
    found = set()
    for pattern in patterns:
        for folder in filter(Path.is_dir, root.glob(pattern) if pattern else [root]):
            before = "" if folder == root else f"{folder.relative_to(root)}/"
            with os.scandir(folder) as entries:
                found |= {before + e.name for e in entries if e.name[1:][-4:].lower() == ".mp4"
                          and e.is_file()}
    return sorted(found, key=lambda f: f.replace("/", "\0"))  # as paths are


def stem(file):
    """The name of a file, without its folder and ending."""
    return file[file.rfind("/") + 1:].rpartition(".")[0]


class ScanFiles(Dataset):
    """One record per media file: its 10 s segments as [start, stop, peak times or null]."""

    def __init__(self, args, files):
        self.root, self.files, self.prominence = args.data, files, args.prominence

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        path = self.root / self.files[i]
        record = {"file": self.files[i], "bytes": path.stat().st_size,
                  "prominence": self.prominence, "segments": []}
        try:
            media = common.probe(path)
            for start, stop in cut_times(media.duration):
                x, rate = np.zeros((1, 0), np.float32), 0
                if media.channels:
                    x, rate = common.read_audio(path, start, stop)
                found = find_moments(x, rate, self.prominence) if x.any() else None
                peaks = None if found is None else found.times[found.peaks].round(6).tolist()
                record["segments"].append([round(start, 6), round(stop, 6), peaks])
        except VideoError as e:                               # not cached: it is tried again
            del record["segments"]
            record["error"] = str(e)
        return record


def cut_times(duration):
    """[(start, stop)] of the 10 s segments of a video; a rest too short for a moment is dropped."""
    starts = np.arange(0, max(duration, 1e-3), SEGMENT_SECONDS)
    ends = np.minimum(starts + SEGMENT_SECONDS, duration)
    return [(float(a), float(b)) for a, b in zip(starts, ends) if a == 0 or b - a >= 1.2]


@common.no_collector()
def read_records(args):
    """{file: record} of the cache, without records of other settings and half-written lines."""
    records = {}
    for path in sorted(args.moments.glob("moments*.jsonl")):
        lines = path.read_text(errors="replace").splitlines()
        try:
            rows = json.loads(f"[{','.join(lines)}]")         # a third of the time of one by one
        except (ValueError, RecursionError):
            rows = map(parsed, lines)
        for record in rows:
            with contextlib.suppress(KeyError, TypeError):
                records[record["file"], record["bytes"], record["prominence"]] = record
    return records


def parsed(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def scan(args):
    """Detect the moments of every file, each once, shared among the processes, and cache them.

    A line of `moments.jsonl` per file; killed at any time, a new start goes on with the rest.
    Returns the records in the order of `list_media`.
    """
    files, records = list_media(args)[:args.limit], read_records(args)
    with common.no_collector():
        keys = [(f, os.stat(f"{args.data}/{f}").st_size, args.prominence) for f in files]
        missing = [f for f, key in zip(files, keys) if "segments" not in records.get(key, {})]
    plan = [f"{socket.gethostname()}-{os.getpid()}", missing]
    if common.world_size() > 1:           # one list for all: other jobs may be filling the cache
        dist.broadcast_object_list(plan)
    job, missing = plan
    part = args.moments / f"moments.part-{job}-{common.rank()}.jsonl"
    mine = missing[common.rank()::common.world_size()]
    if mine:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)                          # of a dead job of the same number
        loader = DataLoader(ScanFiles(args, mine), batch_size=None, num_workers=args.workers)
        began = shown = time.perf_counter()
        for n, record in enumerate(loader, 1):
            with common.blame(part), open(part, "a") as out:
                out.write(json.dumps(record) + "\n")
            if time.perf_counter() - shown > 10:
                shown = time.perf_counter()
                left = (shown - began) / n * (len(mine) - n)
                common.say(f"moments {n}/{len(mine)} files of process 0, ETA {left:.0f} s")
    common.barrier()
    records = read_records(args) if missing else records
    common.barrier()
    parts = list(args.moments.glob("moments.part-*.jsonl"))
    if common.rank() == 0 and (missing or parts):             # or of a job killed before this
        kept = sorted(((k, r) for k, r in records.items() if "segments" in r
                       and isinstance(k[0], str) and all(type(x) in (int, float) for x in k[1:])),
                      key=lambda item: item[0])
        lines = (json.dumps(r) + "\n" for _, r in kept)
        common.write(args.moments / "moments.jsonl", "".join(lines))
        common.remove_stale(args.moments, "moments.jsonl", age=3600)
        for f in parts:                                       # ours, and those of dead jobs
            if job in f.name or time.time() - f.stat().st_mtime > 3600:
                f.unlink(missing_ok=True)
    changed = [key[0] for key in keys if key not in records]
    if changed:
        raise UserError(f"{args.data / changed[0]}: changed while it was scanned; start again")
    return [records[key] for key in keys]


class SegmentIndex:
    """All segments in flat arrays: file, start, stop, sound?, and their moments (s, in the file).

    The moments of segment i are peaks[offset[i]:offset[i+1]], already admissible for --delta.
    """

    def __init__(self, args, records):
        try:
            self.fill(args, records)
            sound = all(np.isfinite(x).all() for x in (self.start, self.stop, self.peaks))
        except (TypeError, ValueError, KeyError, IndexError, OverflowError):
            sound = False
        if not sound:
            raise UserError(f"{args.moments / 'moments.jsonl'}: holds a record that is not of its "
                            "form; delete the file, and it is made anew")
        self.tell(args, records)

    @common.no_collector()
    def fill(self, args, records):
        rows = [(n, *s) for n, r in enumerate(records) for s in r.get("segments", ())]
        rows = rows[:args.limit]
        self.files = np.array([os.fsencode(r["file"]) for r in records])
        self.file = np.array([r[0] for r in rows], np.int32)
        self.start = np.array([r[1] for r in rows], np.float64)
        self.stop = np.array([r[2] for r in rows], np.float64)
        self.sound = np.array([r[3] is not None for r in rows], bool)
        count = [len(r[3] or ()) for r in rows]
        peaks = np.fromiter(itertools.chain.from_iterable(r[3] or () for r in rows), np.float64)
        of = np.repeat(np.arange(len(rows)), count)           # (peaks,) their segments
        kept = admissible(peaks, (self.stop - self.start)[of], args.delta_non_overlap)
        self.peaks = (self.start[of] + peaks)[kept]
        self.count = np.bincount(of[kept], minlength=len(rows))
        self.offset = np.concatenate([[0], np.cumsum(self.count)])
        roomy = self.stop - self.start >= 2 * (args.delta_non_overlap + CLIP_SECONDS)
        self.has_moment = self.count > 0 if args.moi == "peaks" else self.sound & roomy
        self.usable = np.flatnonzero(self.has_moment)

    def tell(self, args, records):
        broken = [r["error"] for r in records if "segments" not in r]
        common.say(f"{len(self)} segments of {len(records) - len(broken)} files, {len(self.peaks)} "
                   f"moments; {len(self) - len(self.usable)} segments have none "
                   f"({int((~self.sound).sum())} of them no sound) and are replaced")
        if broken:
            common.say(f"warning: {len(broken)} files cannot be read: {'; '.join(broken[:3])}")
        if not len(self.usable):
            raise UserError(f"{args.data}: no segment has an audible moment to train on")

    def __len__(self):
        return len(self.file)


# ---- data: sound (official file: data/audio_transforms.py) -------------------------------------

@functools.lru_cache
def sinc_kernel(o, n, width=6, rolloff=0.99):
    """Windowed-sinc filters from rate o to rate n (coprime), one per output phase: (n, 1, taps).

    k[j, i] = sinc(u) cos²(πu / 2·width) base / o,   u = clamp((i/o - j/n)·base, -width, width)
    """
    base = rolloff * min(o, n)
    w = math.ceil(width * o / base)
    if n * (o + 2 * w) > 5e7:                                 # 0.4 GB; 44.1 -> 16 kHz: 8e4
        raise VideoError(f"sound at {o}/{n} of the wanted sample rate is not supported")
    i = torch.arange(-w, w + o, dtype=torch.float64) / o
    j = torch.arange(n, dtype=torch.float64)[:, None] / n
    u = ((i - j) * base).clamp(-width, width)                           # (n, taps)
    k = torch.sinc(u) * torch.cos(math.pi * u / (2 * width)) ** 2 * base / o
    return k.float()[:, None], w


def resample(x, old, new):
    """Change the sample rate by a Hann-windowed sinc.    x: (n,) float32 -> (ceil(n·new/old),)"""
    if old == new or not len(x):
        return x
    o, n = old // math.gcd(old, new), new // math.gcd(old, new)
    kernel, w = sinc_kernel(o, n)
    y = F.conv1d(F.pad(x, (w, w + o))[None, None], kernel, stride=o)    # (1, n, frames)
    return y[0].T.flatten()[:math.ceil(n * len(x) / o)]                 # phases interleaved


@functools.lru_cache
def mel_filterbank(bins, n_mels, low, high):
    """(bins, n_mels) triangles on the HTK scale m = 2595 log10(1 + f/700), of height 1."""
    f = torch.linspace(0, high, bins, dtype=torch.float64)[:, None]     # (bins, 1)
    m = torch.linspace(*(2595 * math.log10(1 + f / 700) for f in (low, high)), n_mels + 2,
                       dtype=torch.float64)
    hz = 700 * (10 ** (m / 2595) - 1)
    left, mid, right = hz[:-2], hz[1:-1], hz[2:]
    up, down = (f - left) / (mid - left), (right - f) / (right - mid)
    return torch.minimum(up, down).clamp(min=0).float()


def mel_power(x, n_fft=512, hop=256, n_mels=80, rate=16000):
    """Mel power spectrogram without centring.    x: (n,) -> (n_mels, 1 + (n - n_fft) // hop)"""
    x = F.pad(x, (0, max(0, n_fft - len(x))))
    spectrum = torch.stft(x, n_fft, hop, window=torch.hann_window(n_fft), center=False,
                          return_complex=True)                          # (n_fft/2 + 1, frames)
    return mel_filterbank(n_fft // 2 + 1, n_mels, 0.0, rate / 2).T @ spectrum.abs().square()


def log_mel(x, rate, num_frames=125, mean=-7.03, std=4.66, floor=1e-10, new_rate=16000, **mel):
    """Network input from a waveform: (channels, n) float32 -> (1, num_frames, 80).

    NOTE: the configuration says 128 time steps, the training script overrides it with
    1000 · 2 s / 16 ms = 125; so do we. A window cut by the segment's border is stretched to them.
    """
    x = resample(torch.as_tensor(x).mean(0), rate, new_rate)            # (n,)
    level = mel_power(x, rate=new_rate, **mel).clamp(min=floor).log()   # (80, frames)
    level = level.T[None, common.subsample(level.shape[1], num_frames)]  # (1, num_frames, 80)
    return (level - mean) / std


# ---- data: pictures (official file: data/video_transforms.py) ----------------------------------

RESIZE = {"bilinear": {"mode": "bilinear", "antialias": True},          # as PIL's BILINEAR
          "nearest": {"mode": "nearest-exact"},                         # as PIL's NEAREST
          "tensor": {"mode": "bilinear", "antialias": False}}           # as torch's and OpenCV's


def resize_crop_flip(frames, size, x, y, crop, flip, how="bilinear"):
    """Resize to `size` (width, height), crop, mirror.      (T, H, W, 3) -> (3, T, crop, crop)

    uint8 in and out; `how` names one of RESIZE.
    """
    v = torch.from_numpy(frames).permute(0, 3, 1, 2)                    # (T, 3, H, W), a view
    if (v.shape[3], v.shape[2]) != tuple(size):
        v = F.interpolate(v, size=(size[1], size[0]), **RESIZE[how])
    v = v[..., y:y + crop, x:x + crop]
    return (v.flip(-1) if flip else v).transpose(0, 1).contiguous()     # (3, T, crop, crop)


def short_side_to(width, height, side, swap=False):
    """New (width, height) whose short side is `side`, a real number; `swap` as released.

    NOTE: the release exchanges the two sides here, in training only, and so squeezes landscape
    pictures threefold. We keep the aspect; --legacy_aspect reproduces it.
    """
    short = min(width, height)
    w, h = int(width / short * side), int(height / short * side)
    return (h, w) if swap else (w, h)


def augment(frames, rng, crop, swap):
    """Training transform: one random scale, place and mirroring for all pictures of a clip."""
    size = short_side_to(frames.shape[2], frames.shape[1], rng.uniform(*SCALES) * crop, swap)
    x, y = (int(rng.integers(0, side - crop + 1)) for side in size)
    return resize_crop_flip(frames, size, x, y, crop, rng.random() < 0.5)


def centre(frames, crop, how="nearest"):
    """Evaluation transform: short side to 128 (for crops of 112, 256 for 224), centre crop."""
    size = short_side_to(frames.shape[2], frames.shape[1], int(SCALES[0] * crop + 1e-6))
    x, y = (round((side - crop) / 2) for side in size)
    return resize_crop_flip(frames, size, x, y, crop, False, how)


def normalize(clip, mean=MEAN, std=STD):
    """uint8 (B, 3, T, H, W) to the networks' range, on the clip's device."""
    mean, std = (torch.tensor(c, device=clip.device).view(3, 1, 1, 1) for c in (mean, std))
    return (clip / 255 - mean) / std


def decode_side(crop):
    """Larger pictures are scaled to this short side while decoding (256 for crops of 112).

    NOTE: the release resizes what it decodes, files of 240 in its recipe, and so do we; only for
    larger files this comes first, so that pixels that nobody sees are not converted.
    """
    return math.ceil(256 / 112 * crop)


class AudibleClips(Dataset):
    """A random moment of a segment: the clips before and after it and the sound across it.

    NOTE: the release ends when a file has no sound, and draws again at random where no peak is
    found. Here (seed, epoch, index) draws the substitute from the segments that have a moment.
    """

    def __init__(self, args, index):
        self.args, self.index = args, index

    def __len__(self):
        return len(self.index)

    def moment(self, rng, i):
        """Segment and time: those of segment i, or of a substitute if it has no moment."""
        ix, margin = self.index, self.args.delta_non_overlap + CLIP_SECONDS
        if not ix.has_moment[i]:
            i = int(rng.choice(ix.usable))
        if self.args.moi == "random":
            return i, rng.uniform(ix.start[i] + margin, ix.stop[i] - margin)
        return i, ix.peaks[rng.integers(ix.offset[i], ix.offset[i + 1])]

    def __getitem__(self, key):
        a, ix, (epoch, i) = self.args, self.index, key
        rng = np.random.default_rng((a.seed, epoch, i))       # same sample on any rank or restart
        i, t = self.moment(rng, i)
        d, half = a.delta_non_overlap, SOUND_SECONDS / 2
        before = Window(t - d - CLIP_SECONDS, CLIP_SECONDS, a.num_frames)
        after = Window(t + d, CLIP_SECONDS, a.num_frames)
        clips, (x, rate) = common.read_clip(
            a.data / os.fsdecode(ix.files[ix.file[i]]), [before, after], decode_side(a.crop),
            sound=(max(ix.start[i], t - half), min(ix.stop[i], t + half)))
        v_l, v_r = (augment(c, rng, a.crop, a.legacy_aspect) for c in clips)
        return {"before": v_l, "after": v_r, "sound": log_mel(x, rate), "t": t, "segment": i}


# ---- data: EPIC-KITCHENS-100 annotations -------------------------------------------------------

class Actions(NamedTuple):
    """Rows of an EPIC_100 annotation file, in its order; labels are -1 in the test file."""
    id: np.ndarray
    participant: np.ndarray
    video: np.ndarray
    stamps: np.ndarray                                        # (R, 2) "HH:MM:SS.ss" as written
    seconds: np.ndarray                                       # (R, 2) start, stop
    verb: np.ndarray
    noun: np.ndarray


def read_actions(root, split):
    """`Actions` of split train, validation or test."""
    path = root / "annotations" / f"EPIC_100_{split}{'_timestamps' * (split == 'test')}.csv"
    labels = [] if split == "test" else ["verb_class", "noun_class"]
    rows = common.read_table(path, ["narration_id", "participant_id", "video_id", "start_timestamp",
                             "stop_timestamp", *labels])
    kept, seen = [], set()
    for r in rows:
        def fault(column, why, row=r):
            return UserError(f"{path}:{row['_line']}: {column} {row[column]!r:.80} {why}")
        if r["narration_id"] in seen or not r["narration_id"]:
            raise fault("narration_id", "is empty or there twice")
        seen.add(r["narration_id"])
        if not re.fullmatch(r"P\d+_\d+", r["video_id"]):      # it becomes a path
            raise fault("video_id", "is not of the form P01_01")
        times = []
        for column in ("start_timestamp", "stop_timestamp"):
            m = re.fullmatch(r"(\d{1,4}):([0-5]\d):([0-5]\d(?:\.\d+)?)", r[column], re.ASCII)
            if not m:
                raise fault(column, "is not HH:MM:SS.ss")
            times.append(int(m[1]) * 3600 + int(m[2]) * 60 + float(m[3]))
        if times[1] <= times[0]:
            raise fault("stop_timestamp", "is not after the start")
        classes = [-1, -1]
        for k, (column, n) in enumerate(zip(labels, (VERBS, NOUNS))):
            if not re.fullmatch(r"\d{1,3}", r[column], re.ASCII) or int(r[column]) >= n:
                raise fault(column, f"is no class number below {n}")
            classes[k] = int(r[column])
        kept.append((r["narration_id"], r["participant_id"], r["video_id"],
                     (r["start_timestamp"], r["stop_timestamp"]), times, *classes))
    if not kept:
        raise UserError(f"{path}: has no rows")
    return Actions(*(np.array(column) for column in zip(*kept)))


def read_subsets(root):
    """(tail verb classes, tail noun classes, unseen participants) of the validation split."""
    def column(name, key, form, why):
        path = root / "annotations" / f"EPIC_100_{name}.csv"
        rows = common.read_table(path, [key])
        if not rows:
            raise UserError(f"{path}: has no rows")
        for r in rows:
            if not form(r[key]):
                raise UserError(f"{path}:{r['_line']}: {key} {r[key]!r:.60} is {why}")
        return {r[key] for r in rows}

    def classes(name, key, n):
        return set(map(int, column(name, key, lambda x: re.fullmatch(r"[0-9]{1,3}", x)
                                   and int(x) < n, f"no class number below {n}")))
    return (classes("tail_verbs", "verb", VERBS), classes("tail_nouns", "noun", NOUNS),
            column("unseen_participant_ids_validation", "participant_id",
                   re.compile(r"P\d+").fullmatch, "not of the form P01"))


def epic_videos(root):
    """{video id: path relative to root}, in any of the folder trees that downloads come in."""
    return {stem(f): f for f in mp4_files(root, "videos", "videos/*", "P*/videos", "P*")}


def locate(root, actions, split, limit):
    """Files and windows of the rows: ([row numbers], [path], (R, 2) start, stop in that file).

    A cut file of `action_segments/` is preferred to the whole video. Absent rows are counted.
    """
    cut = {stem(f): f for f in mp4_files(root, "action_segments")}
    whole = epic_videos(root)
    rows, paths, spans = [], [], []
    for i in range(len(actions.id)):
        stem = "_".join([actions.video[i], *(re.sub(r"[:.]", "", s) for s in actions.stamps[i])])
        start, stop = actions.seconds[i]
        if stem in cut:
            found, start, stop = cut[stem], 0.0, stop - start
        else:
            found = whole.get(str(actions.video[i]))
        if found is not None:
            rows.append(i)
            paths.append(os.fsencode(found))
            spans.append((start, stop))
    absent = sorted({str(actions.video[i]) for i in set(range(len(actions.id))) - set(rows)})
    common.say(f"{split}: {len(rows)} of {len(actions.id)} rows" + (
        f"; {len(absent)} videos are absent ({', '.join(absent[:5])})" if absent else ""))
    if not rows:
        raise UserError(f"{root}: none of the {split} videos is there; see README for the layout")
    return np.array(rows[:limit]), np.array(paths[:limit]), np.array(spans[:limit])


class ActionClips(Dataset):
    """One random half second of each action, augmented (training), by (epoch, row)."""

    def __init__(self, args, actions, located):
        self.args, (self.rows, self.paths, self.spans) = args, located
        self.verb, self.noun = actions.verb[self.rows], actions.noun[self.rows]

    def __len__(self):
        return len(self.rows)

    def read(self, i, starts):
        windows = [Window(t, CLIP_SECONDS, self.args.num_frames) for t in starts]
        return common.read_clip(self.args.data / os.fsdecode(self.paths[i]), windows,
                                decode_side(self.args.crop))

    def __getitem__(self, key):
        epoch, i = key
        rng = np.random.default_rng((self.args.seed, epoch, i))
        start, stop = self.spans[i]
        frames = self.read(i, [rng.uniform(start, max(start, stop - CLIP_SECONDS))])[0]
        clip = augment(frames, rng, self.args.crop, self.args.legacy_aspect)
        return {"clip": clip, "verb": self.verb[i], "noun": self.noun[i]}


class TestClips(ActionClips):
    """The clips of one action for evaluation: --clips of them, evenly spaced or at random."""

    def __getitem__(self, i):
        start, stop = self.spans[i]
        room, n = max(0.0, stop - start - CLIP_SECONDS), self.args.clips
        place = (np.arange(n) + 0.5) / n                      # N = 1: the centre
        if self.args.clip == "random":
            place = np.random.default_rng((self.args.seed, i)).random(n)
        clips = self.read(i, start + place * room)
        clips = [centre(c, self.args.crop, self.args.eval_resize) for c in clips]
        return torch.stack(clips)                             # (N, 3, T, H, W)


# ---- data: Ego4D annotations (FHO: state change, recognition, anticipation) --------------------

def fho_file(root, name, split):
    """Path of the official `fho_<name>_<split>.json`, or of the `<split>.json` of older dumps."""
    paths = [root / "annotations" / f for f in (f"fho_{name}_{split}.json", f"{split}.json")]
    return next((f for f in paths if f.exists()), paths[0])


def read_fho(root, name, split):
    """(path, entries) of an annotation file: an object with the list `clips`, or a bare list."""
    path = fho_file(root, name, split)
    value = common.read_json(path)
    entries = value.get("clips") if isinstance(value, dict) else value
    if not isinstance(entries, list):
        raise UserError(f"{path}: is neither a list nor an object with the list `clips`")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: clips[{i}] is no object")
    if not entries:
        raise UserError(f"{path}: has no clips")
    return path, entries


def span(fields, name):
    """(start, stop) seconds of `<name>_start_sec` and `_end_sec`, else of the frames at 30 fps."""
    start, stop = (
        fields.number(f"{name}_{end}_frame") / FPS
        if fields.entry.get(f"{name}_{end}_sec") is None else fields.number(f"{name}_{end}_sec")
        for end in ("start", "end"))
    if stop <= start:
        raise fields.fault(f"{name}_end_sec", f"is not after the start, {start:g} s")
    return start, stop


class FhoActions(NamedTuple):
    """Annotated actions, clip by clip and by action_idx in each; labels are -1 where unknown."""
    clip: np.ndarray                                          # (R,) clip_uid
    index: np.ndarray                                         # (R,) action_idx
    seconds: np.ndarray                                       # (R, 2) start, stop in the clip
    verb: np.ndarray
    noun: np.ndarray


def read_taxonomy(root):
    """(number of verbs, number of nouns): 115 and 478 in Ego4D v1, 117 and 521 in v2."""
    path = root / "annotations" / "fho_lta_taxonomy.json"
    table = common.read_json(path)
    for key in ("verbs", "nouns"):
        if not isinstance(table, dict) or not isinstance(table.get(key), list) or not table[key]:
            raise UserError(f"{path}: has no list `{key}`")
    return len(table["verbs"]), len(table["nouns"])


def read_fho_actions(root, split, num_classes):
    """(path, `FhoActions`) of fho_lta_<split>.json."""
    path, entries = read_fho(root, "lta", split)
    rows = {}
    for i, entry in enumerate(entries):
        f = common.Fields(f"{path}: clips[{i}]", entry)
        key = f.name("clip_uid"), int(f.number("action_idx"))
        if key[1] != entry["action_idx"]:
            raise f.fault("action_idx", "is no whole number")
        rows.setdefault(key, (*key, span(f, "action_clip"), *(
            f.label(k, n) for k, n in zip(("verb_label", "noun_label"), num_classes))))
    if len(rows) < len(entries):
        common.say(f"warning: {path}: {len(entries) - len(rows)} actions are there twice (the same "
                   "clip_uid and action_idx), the first counts")
    order = {clip: n for n, clip in enumerate(dict.fromkeys(clip for clip, _ in rows))}
    table = sorted(rows.values(), key=lambda r: (order[r[0]], r[1]))      # clips as in the file
    return path, FhoActions(*(np.array(column) for column in zip(*table)))


def ego4d_files(root, *folders):
    """{uid: path relative to root} of the first of these folders that holds it; "" is root."""
    found = {}
    for folder in folders:
        for f in mp4_files(root, folder):
            found.setdefault(stem(f), f)
    return found


def tell_here(path, what, uids, here, kept):
    """Say how many annotations are used and which videos are absent; False: all, of the test split.

    UserError if they are all absent in train or val. Of annotations that are there twice the
    first is kept.
    """
    absent, twice = sorted({str(u) for u, ok in zip(uids, here) if not ok}), sum(here) - kept
    common.say(f"{path.name}: {kept} of {len(here)} {what}"
               + (f"; {twice} are there twice" if twice else "")
               + (f"; videos absent: {len(absent)} ({', '.join(absent[:5])})" if absent else ""))
    if not kept and TEST not in path.name:
        raise UserError(f"{path}: none of its videos is there; see README for the layout")
    return kept > 0


def tell_labels(path, labelled):
    """Say how many annotations have no labels; UserError: none has."""
    if not labelled.all():
        common.say(f"warning: {path}: {int((~labelled).sum())} without labels are not used")
    if not labelled.any():
        raise UserError(f"{path}: no annotation whose video is there has a label")


def action_windows(clips, inputs, future, extra=False):
    """(N, inputs + future) rows of the sliding windows over the actions of each clip.

    clips: (R,) their uids, clip by clip. NOTE: a clip of n actions has n - inputs - future
    windows, the challenge's convention; one more fits, which its tools later used in training.
    """
    borders = np.flatnonzero(clips[1:] != clips[:-1]) + 1     # where another clip begins
    starts = [np.arange(a, b - inputs - future + bool(extra))
              for a, b in zip((0, *borders), (*borders, len(clips)))]
    return np.concatenate(starts)[:, None] + np.arange(inputs + future)


class Changes(NamedTuple):
    """Clips of about 8 s in which an object may change its state. Frames are those at 30 fps."""
    id: np.ndarray                                            # (R,) unique_id
    file: np.ndarray                                          # (R,) path in --data, as bytes
    seconds: np.ndarray                                       # (R, 2) start, stop in the video
    frames: np.ndarray                                        # (R, 2) the same in frames
    state: np.ndarray                                         # 1 change, 0 none, -1 not known
    pnr: np.ndarray                                           # frame of no return, -1 for none


def read_change(f, null_is_change):
    """(unique_id, seconds, frames, state, pnr) of one entry, checked.

    NOTE: the benchmark asserts that the key frame is in its clip; here it counts as not known.
    """
    name, state, seconds = f.entry.get("unique_id"), f.entry.get("state_change"), span(f, "parent")
    if not isinstance(name, str) or "\0" in name:             # which NumPy would cut off
        raise f.fault("unique_id", "is no text")
    if state not in (True, False, None):
        raise f.fault("state_change", "is neither true, false nor null")
    first, last = (int(f.number(f"parent_{end}_frame", math.floor(FPS * second + 1e-6)))
                   for end, second in zip(("start", "end"), seconds))
    if last - first < 2:
        raise f.fault("parent_end_frame", "leaves no frames")
    state = int(null_is_change if state is None else state) if "state_change" in f.entry else -1
    pnr = f.number("parent_pnr_frame", -1) if state else -1
    return name, seconds, (first, last), state, int(pnr) if first <= pnr <= last else -1


def read_changes(args, split):
    """`Changes` of fho_oscc-pnr_<split>.json whose video is there; None for an absent test split.

    NOTE: the release takes everything but `false` for a change, null too (--compat released).
    """
    path, entries = read_fho(args.data, "oscc-pnr", split)
    files = ego4d_files(args.data, "videos", "full_scale")
    rows, videos, lost = {}, [], 0
    for i, entry in enumerate(entries):
        f = common.Fields(f"{path}: clips[{i}]", entry)
        name, *row = read_change(f, args.compat == "released")
        videos.append(f.name("video_uid"))
        lost += row[2] == 1 and row[3] < 0
        if videos[-1] in files:
            rows.setdefault(name, (name, os.fsencode(files[videos[-1]]), *row))
    if lost:
        common.say(f"warning: {path}: {lost} changes have no key frame in their clip")
    if not tell_here(path, "clips", videos, [v in files for v in videos], len(rows)):
        return None
    changes = Changes(*(np.array(column) for column in zip(*rows.values())))
    known = (changes.state >= 0) | (split == TEST)
    tell_labels(path, known)
    return Changes(*(x[known][:args.limit] for x in changes))


# ---- data: Ego4D clips (official files: ptv_dataset_helper.py, StateChange...Localisation.py) --

class ActionWindows(Dataset):
    """Clips of 2.13 s, one in each of a sample's actions: one for recognition, 4 for anticipation.

    rows (N, inputs): of `actions`; verb, noun: (N,) or (N, 20) labels. In training at a random
    place; scale, crop and mirroring are one choice for all clips of a sample, as released.
    NOTE: for anticipation the release reduces a clip to 64 pictures and these to 32; at 30 fps
    they are the same. It normalises before it resizes, we after: half a grey level of rounding.
    """

    def __init__(self, args, actions, files, rows, verb, noun, absent=()):
        self.args, self.actions, self.files, self.rows = args, actions, files, rows
        self.verb, self.noun, self.absent = verb, noun, absent

    def __len__(self):
        return len(self.rows)

    def ids(self):
        """<clip_uid>_<action_idx> of each sample's last action."""
        a = self.actions
        return [f"{a.clip[r]}_{a.index[r]}" for r in self.rows[:, -1]]

    def read(self, i, places):
        """Pictures of each of the sample's actions; places: 0 its earliest clip, 1 its latest."""
        start, stop = self.actions.seconds[self.rows[i]].T                  # (inputs,) each
        room = np.maximum(0.0, stop - start - ACTION_SECONDS)
        windows = [Window(t, ACTION_SECONDS, self.args.num_frames) for t in start + places * room]
        path = self.args.data / self.files[str(self.actions.clip[self.rows[i][0]])]
        return common.read_clip(path, windows, math.ceil(320 / 224 * self.args.crop))

    def __getitem__(self, key):
        epoch, i = key
        rng, crop = np.random.default_rng((self.args.seed, epoch, i)), self.args.crop
        clips = self.read(i, rng.random(len(self.rows[i])))
        side = rng.integers(round(256 / 224 * crop), round(320 / 224 * crop) + 1)
        size = short_side_to(clips[0].shape[2], clips[0].shape[1], side)
        x, y = (int(rng.integers(0, s - crop + 1)) for s in size)
        flip = rng.random() < 0.5
        clip = torch.stack([resize_crop_flip(c, size, x, y, crop, flip, "tensor") for c in clips])
        clip = clip[0] if len(clip) == 1 else clip            # (inputs, 3, T, H, W)
        return {"clip": clip, "verb": self.verb[i], "noun": self.noun[i]}


class TestWindows(ActionWindows):
    """The clips of one sample for evaluation: --clips in its one action, or one in each of 4.

    NOTE: the release's test sampler skipped or shifted clips; the centre of each is what its
    benchmark later settled on.
    """

    def __getitem__(self, i):
        single = len(self.rows[i]) == 1
        places = (np.arange(self.args.clips) + 0.5) / self.args.clips if single else np.array(0.5)
        if self.args.clip == "random":
            n = self.args.clips if single else len(self.rows[i])
            places = np.random.default_rng((self.args.seed, i)).random(n)
        return torch.stack([centre(c, self.args.crop, "tensor") for c in self.read(i, places)])


def action_data(args, split):
    """`ActionWindows` of recognition or anticipation; None: the test split is not there.

    Samples without labels are left out in train and val, those without their video everywhere.
    """
    if split == TEST and not fho_file(args.data, "lta", split).exists():
        return None
    path, actions = read_fho_actions(args.data, split, read_taxonomy(args.data))
    files = ego4d_files(args.data, "clips", "")
    if args.stage == "recognition":
        rows = targets = np.arange(len(actions.clip))[:, None]
    else:
        extra = args.extra_window and split == "train"
        windows = action_windows(actions.clip, INPUTS, FUTURE, extra)
        rows, targets = windows[:, :INPUTS], windows[:, INPUTS:]
    if not len(rows) and split != TEST:
        raise UserError(f"{path}: no clip has the {INPUTS} + {FUTURE + 1} actions of a window")
    verb, noun, clips = actions.verb[targets], actions.noun[targets], actions.clip[rows[:, 0]]
    here = np.array([c in files for c in clips], bool)
    if not tell_here(path, "samples", clips, here, int(here.sum())):
        return None
    labelled = ((verb >= 0) & (noun >= 0)).all(1) | (split == TEST)
    tell_labels(path, labelled[here])
    use = np.flatnonzero(here & labelled)[:args.limit]
    absent = [f"{actions.clip[r]}_{actions.index[r]}" for r in rows[~here, -1]]
    if args.stage == "recognition":
        verb, noun = verb[:, 0], noun[:, 0]
    return ActionWindows(args, actions, files, rows[use], verb[use], noun[use], absent)


def sample_frames(start, stop, wanted):
    """`wanted` frame numbers of start .. stop-1: the first multiples of a step that fit.

    The step is ceil(n / wanted); where too few of its multiples fit, floor(n / wanted).
    """
    n = stop - start
    for step in (-(-n // wanted), max(1, n // wanted)):
        frames = np.arange(-(-start // step) * step, stop, step)
        if len(frames) >= wanted:
            return frames[:wanted]
    return frames[common.pad(len(frames), wanted)]            # fewer pictures than wanted


def keyframe_index(frames, pnr):
    """Which of the frames is the first nearest to the point of no return."""
    return int(np.abs(frames - pnr).argmin())


class StateClips(Dataset):
    """16 pictures of 5 to 8 s (training), squeezed to a square, and where the change happens."""

    def __init__(self, args, changes):
        self.args, self.changes = args, changes

    def __len__(self):
        return len(self.changes.id)

    def read(self, i, frames):
        """Pictures of the clip's video at frame numbers (30 fps) -> (3, T, crop, crop) uint8.

        NOTE: as released, the aspect is not kept; its frames were stored 384 high before.
        """
        crop, times = self.args.crop, (frames + 0.5) / FPS    # the middle of each picture's time
        path = self.args.data / os.fsdecode(self.changes.file[i])
        pictures = common.read_clip(path, [times], math.ceil(384 / 225 * crop))[0]
        return resize_crop_flip(pictures, (crop, crop), 0, 0, crop, False, "tensor")

    def part(self, rng, i):
        """First and last frame of a random part, 5 to 8 s, of the clip that keeps the key frame.

        NOTE: the benchmark calls np.random.uniform(8 - length), which draws the start between
        8 - length and 1 s; surely between 0 and 8 - length was meant, and is what we draw.
        """
        (first, last), pnr = self.changes.frames[i], self.changes.pnr[i]
        length = rng.uniform(5, 8)
        begin = self.changes.seconds[i, 0] + rng.uniform(0, 8 - length)
        start, stop = math.floor(FPS * begin), min(math.floor(FPS * (begin + length)), last)
        if stop - start < self.args.num_frames:               # of a clip much shorter than 8 s
            return first, last
        return first if 0 <= pnr < start else start, last if pnr > stop else stop

    def __getitem__(self, key):
        epoch, i = key
        frames = sample_frames(*self.part(np.random.default_rng((self.args.seed, epoch, i)), i),
                               self.args.num_frames)
        c = self.changes
        return {"clip": self.read(i, frames), "state": c.state[i],
                "keyframe": keyframe_index(frames, c.pnr[i]), "has_keyframe": c.pnr[i] >= 0}


class TestStates(StateClips):
    """16 pictures of the whole clip, for evaluation: (3, T, H, W)."""

    def __getitem__(self, i):
        return self.read(i, sample_frames(*self.changes.frames[i], self.args.num_frames))


def statechange_data(args, split):
    """`StateClips`; None: the test split is not there."""
    if split == TEST and not fho_file(args.data, "oscc-pnr", split).exists():
        return None
    changes = read_changes(args, split)
    return changes and StateClips(args, changes)


# ---- model -------------------------------------------------------------------------------------

def head(d_in, d_hidden, d_out):
    """Linear - ReLU - Linear, xavier-uniform weights."""
    layers = nn.Sequential(nn.Linear(d_in, d_hidden), nn.ReLU(), nn.Linear(d_hidden, d_out))
    for layer in (layers[0], layers[2]):
        nn.init.xavier_uniform_(layer.weight)
    return layers


def classifier(d_in, d_out):
    """Linear layer with weights N(0, 0.01) and no bias to begin with."""
    layer = nn.Linear(d_in, d_out)
    nn.init.normal_(layer.weight, 0, 0.01)
    nn.init.zeros_(layer.bias)
    return layer


def fan_out_normal(trunk):
    """MSRA's initialisation, which the forecasting tools give the trunk before its checkpoint."""
    for m in trunk.modules():
        if isinstance(m, nn.Conv3d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


class RepLAI(nn.Module):
    """The two networks and the five heads; names as in the released checkpoints."""

    def __init__(self, width=64, depth=18, out_dim=128):
        super().__init__()
        self.backbone = nn.ModuleDict({"video": common.R2Plus1D(width, depth),        # f_V
                                       "audio": common.SpectrogramCNN(width)})        # f_A
        d = self.backbone["video"].out_dim
        self.mlp = nn.ModuleDict({
            "video_clr": head(d, d, out_dim), "audio_clr": head(d, d, out_dim),       # AVC
            "video_aot": head(d, d, out_dim), "audio_aot": head(d, d, out_dim),       # AStC
            "aot_diff": head(out_dim, d, out_dim)})                                   # g

    def encode(self, v_l, v_r, a):
        """Clips (B, 3, T, H, W), sound (B, 1, 125, 80) -> pooled (2B, D) left then right, (B, D).

        Both sides go through f_V in one pass, so batch norm sees them together.
        """
        v = self.backbone["video"](torch.cat([v_l, v_r])).amax((2, 3, 4))             # (2B, D)
        return v, self.backbone["audio"](a).amax((2, 3))                              # (B, D)

    def change(self, s_l, s_r):
        """g of the change of state and of its reversal. NOTE: g is not odd, so it runs twice."""
        return self.mlp["aot_diff"](s_r - s_l), self.mlp["aot_diff"](s_l - s_r)

    def forward(self, v_l, v_r, a):
        """The embeddings that the losses compare, (B, 128) each and `z` (2, B, 128)."""
        v, a = self.encode(v_l, v_r, a)
        s_l, s_r = self.mlp["video_aot"](v).chunk(2)
        forth, back = self.change(s_l, s_r)
        return {"z": self.mlp["video_clr"](v).unflatten(0, (2, -1)),
                "y": self.mlp["audio_clr"](a), "forth": forth, "back": back,
                "q": self.mlp["audio_aot"](a)}


class LinearProbe(nn.Module):
    """Verb and noun classifiers on the frozen f_V; names as in the released checkpoints."""

    def __init__(self, width=64, depth=18,
                 num_classes=(("verb_class", VERBS), ("noun_class", NOUNS))):
        super().__init__()
        self.backbone = common.R2Plus1D(width, depth)
        self.fc = nn.ModuleDict({k: classifier(self.backbone.out_dim, n)
                                 for k, n in dict(num_classes).items()})

    @torch.no_grad()
    def features(self, clips, chunk=8):
        """(B, 3, T, H, W) uint8 -> (B, D), computed `chunk` clips at a time.

        Chunks of a fixed size give a clip the same bits however the batch is shared out.
        """
        return torch.cat([self.backbone(normalize(c)).amax((2, 3, 4)).float()
                          for c in clips.split(chunk)])

    def classify(self, features, normalize_feats="off"):
        """{"verb_class": (B, 97), "noun_class": (B, 300)} logits of pooled features (B, D).

        NOTE: the release's switch normalises over an axis of size 1, which leaves signs ("sign").
        """
        if normalize_feats == "l2":
            features = F.normalize(features, dim=1)
        elif normalize_feats == "sign":
            features = F.normalize(features[..., None], dim=-1)[..., 0]
        return {k: layer(features) for k, layer in self.fc.items()}


class Recognition(common.R2Plus1D):
    """Verb and noun of a clip; names as in the forecasting tools (ego4d-forecasting/ego4d/models).

    NOTE: average pooling here, maximum in pre-training and in the linear evaluation.
    """

    def __init__(self, width=64, depth=18, num_classes=(115, 478)):
        super().__init__(width, depth)
        fan_out_normal(self)
        self.head = nn.Module()
        self.head.projections = nn.ModuleList(classifier(self.out_dim, n) for n in num_classes)

    def forward(self, clip):
        """(B, 3, T, H, W) -> logits (B, verbs), (B, nouns)"""
        x = super().forward(clip).mean((2, 3, 4))                                     # (B, D)
        x = F.dropout(x, 0.5, self.training)
        return tuple(project(x) for project in self.head.projections)


class ClipEncoder(common.R2Plus1D):
    """The frozen trunk, and a layer on its averaged features, which is trained."""

    def __init__(self, width, depth, features):
        super().__init__(width, depth)
        fan_out_normal(self)
        self.requires_grad_(False)                            # of all but what follows
        self.head = nn.Module()
        self.head.projection = classifier(self.out_dim, features)

    def forward(self, clip):
        """(B, 3, T, H, W) -> (B, features)"""
        x = super().forward(clip).mean((2, 3, 4))             # (B, D), of frozen weights
        return self.head.projection(F.dropout(x, 0.5, self.training))


class PositionEncoding(nn.Module):
    """Adds pe[t, 2i] = sin(t / 10000^(2i/D)), pe[t, 2i+1] = cos(same) to (T, B, D)."""

    def __init__(self, features, longest=1000):
        super().__init__()
        angle = torch.arange(longest)[:, None] * torch.exp(
            torch.arange(0, features, 2) * (-math.log(10000.0) / features))           # (1000, D/2)
        pe = torch.stack([angle.sin(), angle.cos()], 2).flatten(1)                    # (1000, D)
        self.register_buffer("pe", pe[:, None])

    def forward(self, x):
        return F.dropout(x + self.pe[:len(x)], 0.2, self.training)


class Aggregator(nn.Module):
    """Features of the input clips into one vector: (B, inputs, D) -> (B, out_dim)."""

    def __init__(self, kind, features, inputs, layers, heads=8):
        super().__init__()
        self.kind, self.out_dim = kind, features * (inputs if kind == "concat" else 1)
        if kind == "transformer":
            layer = nn.TransformerEncoderLayer(features, heads, 2048, 0.1)            # post-norm
            self.pos_encoder = PositionEncoding(features)
            self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(features),
                                                 enable_nested_tensor=False)

    def forward(self, x):
        if self.kind == "concat":
            return x.flatten(1)
        if self.kind == "mean":
            return x.mean(1)
        return self.encoder(self.pos_encoder(x.transpose(0, 1)))[-1]      # of the latest clip


class Anticipation(nn.Module):
    """The next Z actions from 4 observed ones; names as in the forecasting tools.

    NOTE: the release leaves the frozen trunk's batch norm in training mode; --legacy_bn.
    """

    def __init__(self, width=64, depth=18, num_classes=(115, 478), aggregator="transformer",
                 features=2048, layers=6, heads=8, inputs=INPUTS, future=FUTURE, legacy_bn=False):
        super().__init__()
        self.num_classes, self.legacy_bn = list(num_classes), legacy_bn
        self.backbone = ClipEncoder(width, depth, features)
        self.clip_aggregator = Aggregator(aggregator, features, inputs, layers, heads)
        self.decoder = nn.Module()
        self.decoder.head = nn.Module()
        self.decoder.head.projections = nn.ModuleList(
            classifier(self.clip_aggregator.out_dim, sum(num_classes)) for _ in range(future))

    def train(self, mode=True):
        super().train(mode)
        for name, module in self.backbone.named_children():
            module.train(mode and (self.legacy_bn or name == "head"))
        return self

    def encode(self, clips):
        """(B, inputs, 3, T, H, W) -> (B, inputs, D)"""
        return self.backbone(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])

    def forward(self, clips):
        """(B, inputs, 3, T, H, W) -> logits (B, Z, verbs), (B, Z, nouns)"""
        x = F.dropout(self.clip_aggregator(self.encode(clips)), 0.5, self.training)
        return torch.stack([p(x) for p in self.decoder.head.projections], 1).split(
            self.num_classes, 2)


class StateHeads(nn.Module):
    """Where, and whether, an object changes its state; names as in the hands-and-objects benchmark.

    Both average the last map over windows of `pool` x `pool`, which leaves 2 x 2 places of the
    8 x 8, and the second over time, too.
    """

    def __init__(self, channels, side=8, pool=7, dropout=0.5):
        super().__init__()
        self.pool, self.dropout, d = pool, dropout, channels * (side - pool + 1) ** 2
        self.Keyframe_localisation_head, self.State_detection_head = nn.Module(), nn.Module()
        self.Keyframe_localisation_head.projection = classifier(d, 1)
        self.State_detection_head.projection = classifier(d, 2)

    def forward(self, x):
        """(B, C, T, side, side) -> logits (B, 1, T) of the key frame, (B, 2, 1) none, change"""
        x = F.avg_pool3d(x, (1, self.pool, self.pool), 1)                 # (B, C, T, 2, 2)

        def places(x):                                                    # (B, T, 2·2·C)
            return F.dropout(x, self.dropout, self.training).permute(0, 2, 3, 4, 1).flatten(2)
        keyframe = self.Keyframe_localisation_head.projection(places(x))              # (B, T, 1)
        state = self.State_detection_head.projection(places(x.mean(2, keepdim=True)))  # (B, 1, 2)
        return keyframe.transpose(1, 2), state.transpose(1, 2)


class StateChange(StateHeads):
    """f_V without strides in time, so that 16 pictures stay 16, and the two heads.

    NOTE: the release holds the unmodified benchmark, an I3D-ResNet-50; how RepLAI's R(2+1)D kept
    time is not known. Strides of 1 leave every weight as it is: our design, not a reproduction.
    """

    def __init__(self, width=64, depth=18, crop=225):
        side = -(-crop // 32)                                 # 8 for 225, five halvings
        super().__init__(8 * width, side, max(1, side - 1))
        self.backbone = common.R2Plus1D(width, depth, temporal_stride=1)

    def forward(self, clip):
        """(B, 3, T, H, W) -> (B, 1, T), (B, 2, 1)"""
        return super().forward(self.backbone(clip))


# Naming schemes of checkpoints: ours and RepLAI's, AVID's, linear probes', forecasting's, bare.
PRETRAIN_LAYOUTS = [{"": ""},
                    {"video_model.": "backbone.video.", "audio_model.": "backbone.audio."}]
PROBE_LAYOUTS = [{"backbone.video.": "backbone."}, {"video_model.": "backbone."}, {"": ""},
                 {"model.backbone.": "backbone."}, {"model.": ""}, {"": "backbone."}]
BARE_LAYOUTS = [{old: new.removeprefix("backbone.") for old, new in scheme.items()}
                for scheme in PROBE_LAYOUTS] + [{"backbone.": ""}]


def initialise(model, args, layouts, required="backbone."):
    """Fill the networks as --init says; every tensor below `required` must come."""
    if args.init == "none":
        return common.say("init none: random weights")
    path = (common.fetch(AVID, "start from scratch with --init none") if args.init == "avid"
            else Path(args.init))
    common.load_weights(model, path, layouts, required)


# ---- loss (official file: criterions/ssrl_audiopeak_aotv2.py) ----------------------------------

def avc_loss(z, y, z_all, y_all, own, tau):
    """Audio-visual correspondence.      z: (2, B, D) clips before and after, y: (B, D) sounds

        L_va = mean -log softmax_m(z·Y_m / τ)_own          clip against all sounds
        L_av = mean -log softmax_m(y·Z_s,m / τ)_own        sound against all clips of side s
        L_AVC = (L_va + L_av) / 2                          means over both sides and B

    z_all (2, N, D), y_all (N, D): the candidates of all processes; `own` is where this process's
    rows begin. All are L2-normalised here, in float32.
    """
    z, y, z_all, y_all = (F.normalize(x.float(), dim=-1) for x in (z, y, z_all, y_all))
    target = own + torch.arange(y.shape[0], device=y.device).repeat(2)
    va = (z @ y_all.T / tau).flatten(0, 1)                    # (2B, N)
    av = (y @ z_all.transpose(1, 2) / tau).flatten(0, 1)      # (2B, N), side by side
    return (F.cross_entropy(va, target) + F.cross_entropy(av, target)) / 2


def astc_loss(forth, back, q, kappa):
    """Audible state change.      forth, back: (B, D) g(s_r - s_l), g(s_l - s_r);  q: (B, D) sound

        L_AStC = ½ mean_i [ -log σ(p_fwd,i) - log(1 - σ(p_bwd,i)) ],     p = n(g)·n(q) / κ

    All three are L2-normalised here, in float32. No other sample takes part, hence no gather.
    NOTE: the paper writes two log terms; the code averages 2B numbers, which halves their sum.
    """
    forth, back, q = (F.normalize(x.float(), dim=-1) for x in (forth, back, q))
    p_fwd, p_bwd = (forth * q).sum(-1) / kappa, (back * q).sum(-1) / kappa            # (B,) each
    return (F.softplus(-p_fwd).mean() + F.softplus(p_bwd).mean()) / 2


def candidates(x):
    """The rows of every process, as constants; on one process x itself, with its gradient.

    NOTE: as released, the gathered block carries no gradient, this process's own rows included,
    while a single process lets it through. x: (..., B, D) -> (..., W·B, D)
    """
    return x if common.world_size() == 1 else common.all_rows(x.detach(), dim=-2)


def losses(out, tau):
    """(L_AVC, L_AStC) of a forward pass's embeddings."""
    z, y = out["z"].float(), out["y"].float()
    own = common.rank() * y.shape[0]
    avc = avc_loss(z, y, candidates(z), candidates(y), own, tau)
    return avc, astc_loss(out["forth"], out["back"], out["q"], KAPPA)


def recognition_losses(out, batch):
    """{part: loss}, to be added up.      out: (B, verbs), (B, nouns) logits; labels (B,)"""
    return {"verb": F.cross_entropy(out[0].float(), batch["verb"]),
            "noun": F.cross_entropy(out[1].float(), batch["noun"])}


def anticipation_losses(out, batch):
    """The same for (B, Z, verbs), (B, Z, nouns) and (B, Z): summed over the Z actions to come."""
    return {k: F.cross_entropy(x.float().flatten(0, 1), batch[k].flatten()) * x.shape[1]
            for k, x in zip(("verb", "noun"), out)}


def statechange_losses(out, batch):
    """The same for (B, 1, T), (B, 2, 1) and state, keyframe, has_keyframe (B,)

        keyframe = mean_b state_b · CE(logits_b, nearest frame to the point of no return)

    The mean is over ALL clips, those without a change, or without a known key frame, as zeros.
    """
    keyframe, state = out[0].float().flatten(1), out[1].float().flatten(1)
    each = F.cross_entropy(keyframe, batch["keyframe"], reduction="none")
    return {"keyframe": (batch["state"] * batch["has_keyframe"] * each).mean(),
            "state": F.cross_entropy(state, batch["state"])}


# ---- pre-training ------------------------------------------------------------------------------

def one_cycle(max_lr, epochs):
    """(lr, momentum) of each epoch: torch's OneCycleLR stepped once per epoch, before it begins.

    NOTE: as released, momentum is cycled between 0.95 and 0.85 (the 0.9 asked for is never used),
    and the last epoch overruns the cycle by one step, back to a small positive lr.
    """
    sgd = torch.optim.SGD([torch.zeros(1)], lr=max_lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr, total_steps=max(2, epochs))
    values = []
    for _ in range(epochs):
        sgd.step()
        schedule.step()
        values.append((sgd.param_groups[0]["lr"], sgd.param_groups[0]["momentum"]))
    return values


def loader(args, dataset, device, start, steps):
    """The batches of the steps start .. steps-1; broken samples are replaced."""
    sampler = common.StepSampler(len(dataset), args.batch_size, args.seed, start, steps)
    return DataLoader(common.SkipBroken(dataset, args.seed), batch_sampler=sampler,
                      num_workers=args.workers, pin_memory=device.type == "cuda",
                      generator=torch.Generator())


def pretrain(args, device):
    """Self-supervised training of both networks on audible moments."""
    torch.manual_seed(args.seed)                              # the same weights on every process
    model = RepLAI(args.width, args.depth).to(device)
    if not (args.out / "last.pt").exists():
        initialise(model, args, PRETRAIN_LAYOUTS)
    if args.compile:
        model.compile()
    ddp = DDP(model, gradient_as_bucket_view=True)            # NOTE: batch norm is per process
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9,
                                weight_decay=args.weight_decay)
    b = args.batch_size // common.world_size()
    clip = torch.zeros(b, 3, args.num_frames, args.crop, args.crop, device=device)
    common.settle(ddp, clip, clip, torch.zeros(b, 1, 125, 80, device=device))
    saved = common.resume(args.out / "last.pt", args, model=model, optimizer=optimizer)
    start, means, best = saved["step"], saved.get("means", {}), saved.get("best", math.inf)

    index = SegmentIndex(args, scan(args))
    dataset = AudibleClips(args, index)
    per_epoch = len(dataset) // args.batch_size
    steps, schedule = args.epochs * per_epoch, one_cycle(args.lr, args.epochs)
    common.same_samples(saved, len(dataset), args.out)
    log = common.Log(args, start, steps, per_epoch)
    ddp.train()
    for step, batch in log.steps(loader(args, dataset, device, start, steps)):
        epoch, k = divmod(step, per_epoch)
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = schedule[epoch]
        v_l, v_r = (normalize(batch[c].to(device, non_blocking=True)) for c in ("before", "after"))
        with common.autocast(device, args.precision):
            out = ddp(v_l, v_r, batch["sound"].to(device, non_blocking=True))
        avc, astc = losses(out, args.tau)
        loss = args.clr_coeff * avc + args.aot_coeff * astc
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        log.guard(step, optimizer, avc=avc, astc=astc)
        optimizer.step()

        ended = k + 1 == per_epoch
        saving = ended or (step + 1) % args.save_every == 0 or log.stopping
        log(step, saving, loss=loss, avc=avc, astc=astc, lr=schedule[epoch][0])
        parts = common.mean({"loss": loss, "avc": avc, "astc": astc})
        means = {n: v + (means.get(n, 0.0) if k else 0.0) for n, v in parts.items()}
        if ended and means["loss"] < best:                    # best: lowest loss over an epoch
            best = means["loss"]
            common.save(args.out / "best.pt", step + 1, args, model=model)
        if saving:
            common.save(args.out / "last.pt", step + 1, args, model=model, optimizer=optimizer,
                        means=means, best=best, samples=len(dataset))
    common.barrier()
    if common.rank() == 0:
        common.write_json(args.out / "metrics.json", {
            **{n: v / per_epoch for n, v in means.items()}, "steps": steps,
            "segments": len(index), "moments": len(index.peaks),
            "segments_without_moment": len(index) - len(index.usable),
            "samples_broken": log.total("broken")})
        common.draw_curve(args.out, f"RepLAI on {args.dataset}", ["loss", "avc", "astc", "lr"])
        draw_moments(args, index, args.out / "moments.png")
    common.say(f"done: {args.out}/last.pt, metrics.json, curve.png, moments.png")


# ---- linear evaluation on EPIC-KITCHENS-100 ----------------------------------------------------

def step_lr(lr, epoch, milestones, gamma=0.1):
    """Learning rate of an epoch: times 0.1 at each milestone that has been reached."""
    return lr * gamma ** sum(epoch >= m for m in milestones)


def linear(args, device):
    """Verb and noun classifiers on the frozen video network, then the metrics of the benchmark.

    NOTE: instead of DDP, every process computes the features of its share, gathers all of them
    and makes the same update of the two small classifiers: the result does not depend on the
    number of processes. NOTE: the release leaves the frozen backbone's batch norm in training
    mode, so that it adapts to EPIC; ours is in evaluation mode, --legacy_bn reproduces it.
    """
    torch.manual_seed(args.seed)
    model = LinearProbe(args.width, args.depth).to(device)
    if not (args.out / "last.pt").exists():
        initialise(model, args, PROBE_LAYOUTS)
    if args.compile:
        model.backbone.compile()
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=args.lr, momentum=0.9,
                                weight_decay=args.weight_decay)
    saved = common.resume(args.out / "last.pt", args, model=model, optimizer=optimizer)
    start = saved["step"]

    actions, held_out = read_actions(args.data, "train"), read_test_splits(args)
    dataset = ActionClips(args, actions, locate(args.data, actions, "train", args.limit))
    per_epoch = len(dataset) // args.batch_size
    steps, milestones = args.epochs * per_epoch, (int(0.6 * args.epochs), int(0.8 * args.epochs))
    common.same_samples(saved, len(dataset), args.out)
    log = common.Log(args, start, steps, per_epoch)
    model.backbone.train(args.legacy_bn)
    for step, batch in log.steps(loader(args, dataset, device, start, steps)):
        lr = step_lr(args.lr, step // per_epoch, milestones)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if args.legacy_bn:                                    # as DDP does before each forward
            common.share_buffers(model.backbone)
        clips = batch["clip"].to(device, non_blocking=True)
        with common.autocast(device, args.precision):
            x = model.features(clips, chunk=len(clips) if args.legacy_bn else 8)
        x, verb, noun = (common.all_rows(t.to(device)) for t in (x, batch["verb"], batch["noun"]))
        logits = model.classify(x, args.normalize_feats)
        loss_verb = F.cross_entropy(logits["verb_class"], verb)
        loss_noun = F.cross_entropy(logits["noun_class"], noun)
        loss = (loss_verb + loss_noun) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        log.guard(step, optimizer, verb=loss_verb, noun=loss_noun)
        optimizer.step()
        saving = (step + 1) % per_epoch == 0 or (step + 1) % args.save_every == 0 or log.stopping
        log(step, saving, loss=loss, verb=loss_verb, noun=loss_noun, lr=lr)
        if saving:
            common.save(args.out / "last.pt", step + 1, args, model=model, optimizer=optimizer,
                        samples=len(dataset))
    common.barrier()
    if common.rank() == 0:
        common.draw_curve(args.out, "linear evaluation on epic", ["loss", "verb", "noun", "lr"])
    evaluate(args, model, device, *held_out)


def score(args, model, device, actions, split):
    """(row numbers, verb scores (R, 97), noun scores (R, 300)): each row once.

    A score is the log of the mean over clips of the softmax, so its softmax is that mean.
    """
    located = locate(args.data, actions, split, args.limit)
    model.eval()

    def network(_, clips):
        x = model.features(clips.flatten(0, 1))
        return [v.float().softmax(-1).unflatten(0, clips.shape[:2]).mean(1).clamp_min(1e-30).log()
                for v in model.classify(x, args.normalize_feats).values()]
    dataset = TestClips(args, actions, located)
    return located[0], *common.predict(args, device, dataset, network, split)


def read_test_splits(args):
    """Validation rows and subsets, and the challenge's test rows (None without their file)."""
    test = (args.data / "annotations" / "EPIC_100_test_timestamps.csv").exists()
    return (read_actions(args.data, "validation"), read_subsets(args.data),
            read_actions(args.data, "test") if test else None)


def evaluate(args, model, device, actions, subsets, test):
    """Validation metrics, and submission files for validation and, if its videos exist, test."""
    common.share_buffers(model.backbone)                             # of --legacy_bn: process 0's
    rows, verb, noun = score(args, model, device, actions, "validation")
    metrics = {"rows": len(rows), "rows_absent": len(actions.id) - len(rows), **epic_metrics(
        verb, noun, actions.verb[rows], actions.noun[rows], actions.participant[rows], *subsets)}
    if common.rank() == 0:
        write_submission(args.out / "validation.zip", actions.id[rows], verb, noun)
        common.write_json(args.out / "metrics.json", metrics)
    protocol = f"{args.clips} {args.clip} clip{'s' * (args.clips > 1)} per action"
    common.say(f"validation, {metrics['rows']} rows, {protocol}: " + "  ".join(
        f"{k} {metrics[k]:.2f}" for k in ("verb@1", "noun@1", "verb@5", "noun@5")))
    if test and set(test.video) & set(epic_videos(args.data)):
        rows, verb, noun = score(args, model, device, test, "test")
        if common.rank() == 0:
            write_submission(args.out / "submission.zip", test.id[rows], verb, noun)


def top_k(scores, labels, k):
    """Percent of rows whose label is among the k highest scores; None without rows."""
    if not len(labels):
        return None
    best = torch.as_tensor(scores).topk(min(k, scores.shape[1]), dim=1).indices.numpy()
    return 100.0 * float((best == np.asarray(labels)[:, None]).any(1).mean())


def action_top_k(verb, noun, verb_class, noun_class, k):
    """Percent of rows whose (verb, noun) is among the k best pairs by softmax(verb)·softmax(noun).

    The k best pairs are made of the k best verbs and the k best nouns, so only these are paired.
    """
    if not len(verb_class):
        return None
    v, vi = torch.as_tensor(verb).double().log_softmax(1).topk(min(k, verb.shape[1]), 1)
    n, ni = torch.as_tensor(noun).double().log_softmax(1).topk(min(k, noun.shape[1]), 1)
    pair = (v[:, :, None] + n[:, None]).flatten(1)            # (R, k·k)
    best = pair.topk(min(k, pair.shape[1]), 1).indices
    hit = (vi.gather(1, best // ni.shape[1]) == torch.as_tensor(verb_class)[:, None]) & (
        ni.gather(1, best % ni.shape[1]) == torch.as_tensor(noun_class)[:, None])
    return 100.0 * float(hit.any(1).double().mean())


def epic_metrics(verb, noun, verb_class, noun_class, participant, tail_verbs, tail_nouns, unseen):
    """The benchmark's accuracies and the paper's columns, in percent.

    verb (R, 97) and noun (R, 300): scores. Tail rows: class in the tail list, for actions of
    either; unseen rows: participant in the list. NOTE: the release's own subsets `head` and
    `unseen` do not select what they say; ours are the rows not in the tail and the true unseen.
    """
    tail_v, tail_n = np.isin(verb_class, list(tail_verbs)), np.isin(noun_class, list(tail_nouns))
    new, either = np.isin(participant, list(unseen)), tail_v | tail_n
    everything = np.ones(len(verb_class), bool)
    m = {"verb@1": None, "noun@1": None, "verb@5": None, "noun@5": None}
    for part, of_v, of_n, of_a in (("all", everything, everything, everything),
                                   ("tail", tail_v, tail_n, either), ("unseen", new, new, new)):
        for k in (1, 5) if part == "all" else (1,):
            m[f"{part}_verb_accuracy_at_{k}"] = top_k(verb[of_v], verb_class[of_v], k)
            m[f"{part}_noun_accuracy_at_{k}"] = top_k(noun[of_n], noun_class[of_n], k)
            m[f"{part}_action_accuracy_at_{k}"] = action_top_k(
                verb[of_a], noun[of_a], verb_class[of_a], noun_class[of_a], k)
    for name, of in (("head", ~either), ("tail", either), ("unseen", new)):
        for kind, scores, label in (("verb", verb, verb_class), ("noun", noun, noun_class)):
            m |= {f"{name} {kind}@{k}": top_k(scores[of], label[of], k) for k in (1, 5)}
    return m | {f"{kind}@{k}": m[f"all_{kind}_accuracy_at_{k}"]
                for kind in ("verb", "noun") for k in (1, 5)}


def write_submission(path, ids, verb, noun):
    """The challenge's zip: `test.json` with a score per class and row (levels 4, 3, 3: ours)."""
    results = {str(i): {"verb": {str(c): float(f"{s:.6g}") for c, s in enumerate(v)},
                        "noun": {str(c): float(f"{s:.6g}") for c, s in enumerate(n)}}
               for i, v, n in zip(ids, verb, noun)}
    text = json.dumps({"version": "0.2", "challenge": "action_recognition", "sls_pt": 4,
                       "sls_tl": 3, "sls_td": 3, "results": results})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(zipfile.ZipInfo("test.json"), text, zipfile.ZIP_DEFLATED)   # no time of day
    common.write(path, buffer.getvalue())


# ---- Ego4D: state change, recognition, anticipation (Tab. 2) -----------------------------------

def cosine(lr, step, steps):
    """Learning rate that falls from lr to 0 along half a cosine."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def warmup_cosine(lr, step, warmup, steps):
    """Linear from 0 during the warm-up, then `cosine` over the steps that remain."""
    return lr * step / warmup if step < warmup else cosine(lr, step - warmup, steps - warmup)


def optimizer_of(args, model):
    """Adam for anticipation, else Nesterov SGD; no decay on parameters with `bn` in their name.

    NOTE: as released: `conv1.1`, the stem's batch norm, has none and so decays.
    """
    trained = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for k, p in trained if "bn" not in k],
               "weight_decay": args.weight_decay},
              {"params": [p for k, p in trained if "bn" in k], "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    if args.stage == "anticipation":
        return torch.optim.Adam(groups, lr=args.lr, betas=(0.9, 0.999))
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)


def parts_of(args, batch, device):
    """This process's share of a batch as [(number of the part, part)], on the device.

    As many parts as --groups says in all, or the nearest number that divides the shares evenly.
    """
    share = len(batch["clip"])
    n = math.gcd(share, max(1, args.groups // common.world_size()))
    tensors = {k: x.split(share // n) for k, x in batch.items() if torch.is_tensor(x)}
    return [(common.rank() * n + i, {k: x[i].to(device, non_blocking=True)
                                     for k, x in tensors.items()}) for i in range(n)]


def pixels(args, clips):
    """uint8 clips (..., 3, T, H, W) in the range that the task's network expects."""
    if args.stage != "statechange":
        return normalize(clips, *GREY)
    return clips.float() if args.raw_pixels else normalize(clips)


def finetune(args, device):
    """Train on one of Ego4D's tasks; after each epoch measure val; keep and submit the best.

    A batch is computed in --groups parts, each with its own batch-norm statistics and dropout,
    as on the release's GPUs; their gradients are averaged. NOTE: the checkpoint is chosen on val,
    which is also what the paper reports.
    """
    task = TASKS[args.stage]
    train, val, test = (task.data(args, split) for split in ("train", "val", TEST))
    torch.manual_seed(args.seed)                              # the same weights on every process
    model = task.model(args).to(device)
    if not (args.out / "last.pt").exists():
        initialise(model, args, *task.layouts)
        if args.stage == "anticipation" and args.init == "none":
            common.say("warning: its network is frozen and stays random: --init a trained one")
    if args.compile:
        model.compile()
    ddp = DDP(model, gradient_as_bucket_view=True)
    optimizer = optimizer_of(args, model)
    sample = (3, args.num_frames, args.crop, args.crop)
    sample = (INPUTS, *sample) if args.stage == "anticipation" else sample
    common.settle(ddp, torch.zeros(2, *sample, device=device))
    saved = common.resume(args.out / "last.pt", args, model=model, optimizer=optimizer)
    start, best = saved["step"], saved.get("best")

    per_epoch = len(train) // args.batch_size
    steps = args.epochs * per_epoch
    # NOTE: at most a tenth of a run, which is less than the published 1000 steps in short runs.
    warmup = 0 if args.stage == "statechange" else min(1000, steps // 10)
    common.same_samples(saved, len(train), args.out)
    log = common.Log(args, start, steps, per_epoch)
    ddp.train()
    for step, batch in log.steps(loader(args, train, device, start, steps)):
        lr = warmup_cosine(args.lr, step, warmup, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        parts, means = parts_of(args, batch, device), {}
        for n, (number, part) in enumerate(parts, 1):
            common.seed_step(args.seed, step, number)
            with ddp.no_sync() if n < len(parts) else contextlib.nullcontext():
                with common.autocast(device, args.precision):
                    out = ddp(pixels(args, part["clip"]))
                terms = task.losses(out, part)
                (sum(terms.values()) / len(parts)).backward()
            means = {k: means.get(k, 0.0) + v.detach() / len(parts) for k, v in terms.items()}
        log.guard(step, optimizer, **means)
        optimizer.step()

        ended = (step + 1) % per_epoch == 0
        saving, measured = ended or (step + 1) % args.save_every == 0 or log.stopping, {}
        if ended:
            began = time.perf_counter()
            if args.stage != "anticipation":
                estimate_norms(args, model, device, loader(args, train, device,
                                                           step + 1 - per_epoch, step + 1))
            measured = assess(args, model, device, train, val, selecting=True)
            if best is None or task.sign * (measured[task.best] - best) > 0:
                best = measured[task.best]
                common.save(args.out / "best.pt", step + 1, args, model=model)
            ddp.train()
            log.since += time.perf_counter() - began          # not part of the training speed
        log(step, saving, loss=sum(means.values()), **means, lr=lr,
            **{k: v for k, v in measured.items() if k == task.best})
        if saving:
            common.save(args.out / "last.pt", step + 1, args, model=model, optimizer=optimizer,
                        best=best, samples=len(train))
    common.barrier()
    model.load_state_dict(common.load_file(args.out / "best.pt")["model"])
    metrics = assess(args, model, device, train, val, test)
    if common.rank() == 0:
        common.write_json(args.out / "metrics.json", {
            **metrics, "samples": len(val), "training_samples_broken": log.total("broken")})
        common.draw_curve(args.out, f"{args.stage} on {args.dataset}",
                          ["loss", *task.terms, task.best, "lr"])
    common.say(f"val, {len(val)} samples, best epoch, seed {args.seed}: " + "  ".join(
        f"{k} {v:.4g}" for k, v in metrics.items() if v is not None))


@torch.no_grad()
def estimate_norms(args, model, device, batches):
    """Batch-norm statistics for evaluation: means over the epoch's first 6400 samples (tiny: 64).

    Each part of a batch gives one set; averaging them in order makes the result independent of
    the number of processes. NOTE: the release does this for recognition; for statechange, whose
    benchmark keeps running means of one GPU, it is ours.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    rows = {}
    for m in norms:
        m.momentum = 1.0                                      # running statistics = this part's
    most = max(1, (64 if args.tiny else 6400) // args.batch_size)         # released: 200 of 32
    for k, batch in enumerate(itertools.islice(batches, most)):
        parts = parts_of(args, batch, device)
        for number, part in parts:
            with common.autocast(device, args.precision):
                model(pixels(args, part["clip"]))
            rows[k * len(parts) * common.world_size() + number] = torch.cat(
                [torch.cat([m.running_mean, m.running_var]) for m in norms]).cpu()
    rows = common.gather(rows, len(rows) * common.world_size())
    mean = torch.stack(list(rows.values())).mean(0).to(device)
    for m, x in zip(norms, mean.split([2 * m.num_features for m in norms])):
        m.momentum = 0.1
        m.running_mean.copy_(x[:m.num_features])
        m.running_var.copy_(x[m.num_features:])


def assess(args, model, device, train, val, test=None, selecting=False):
    """Metrics on val, and submissions; `selecting`: metrics alone, always on the centre clips."""
    task = TASKS[args.stage]
    if selecting:
        args = argparse.Namespace(**{**vars(args), "clips": 1, "clip": "even"})
    common.share_buffers(model)                               # of --legacy_bn: process 0's
    model.eval()
    for split, suffix, dataset in (("val", "_val", val), ("test", "", test)):
        if dataset is None:
            continue

        def network(items, clips):
            return task.outputs(args, model, items, pixels(args, clips))
        out = common.predict(args, device, task.for_test(args, dataset), network, split)
        if dataset is val:
            metrics = task.metrics(train, val, *out)
        if not selecting and common.rank() == 0:
            for name, value in task.submission(args, dataset, *out).items():
                common.write_json(args.out / f"{name}{suffix}.json", value)
    return metrics


# ---- Ego4D: metrics (official files: lta_metrics.py, metrics.py) and submissions ---------------

def recognition_outputs(args, model, items, clips):
    """Logits, averaged over the clips of an action: the release's test adds them up."""
    return [x.float().unflatten(0, clips.shape[:2]).mean(1) for x in model(clips.flatten(0, 1))]


def recognition_metrics(train, val, verb, noun):
    """Percent of actions whose label is the best, or one of the five best.

    Prior: train's commonest.
    """
    metrics = {f"{kind}@{k}": top_k(scores, labels, k) for k in (1, 5) for kind, scores, labels in
               (("verb", verb, val.verb), ("noun", noun, val.noun))}
    metrics["action@1"] = action_top_k(verb, noun, val.verb, val.noun, 1)
    for kind, seen, labels in (("verb", train.verb, val.verb), ("noun", train.noun, val.noun)):
        usual = np.bincount(seen).argmax()
        metrics[f"{kind}@1 of prior"] = 100.0 * float((labels == usual).mean())
    return metrics


def recognition_submission(args, dataset, verb, noun):
    """{"<clip_uid>_<action_idx>": the five best classes}: ours, no official form exists."""
    best = [np.argsort(-x, 1, kind="stable")[:, :5].tolist() for x in (verb, noun)]
    return {"outputs": {name: {"verb": v, "noun": n} for name, v, n in zip(dataset.ids(), *best)}}


def draw_futures(logits, samples, seed, items):
    """K futures per item from logits (B, Z, C): each step by itself, drawn from its softmax.

    Drawn by (seed, item), by the Gumbel trick; the likeliest where K is 1.   -> (B, Z, K)
    """
    if samples == 1:
        return logits.argmax(-1, keepdim=True)
    noise = np.stack([np.random.default_rng((*seed, i)).gumbel(
        size=(logits.shape[1], samples, logits.shape[2])) for i in items])
    return (logits.double().cpu()[:, :, None] + torch.from_numpy(noise)).argmax(-1)


def anticipation_outputs(args, model, items, clips):
    """Futures of verbs and of nouns, (B, Z, K) each, drawn apart from one another."""
    return [draw_futures(x.float(), args.samples, (args.seed, k), items)
            for k, x in enumerate(model(clips))]


def edit_distances(pred, label):
    """Levenshtein distances of the first z actions, z = 1 .. Z.  (N, Z, K), (N, Z) -> (N, Z, K)

    NOTE: a comment of the benchmark names Damerau's distance; in effect a swap costs 2.
    """
    n, length, k = pred.shape
    d = np.zeros((length + 1, length + 1, n, k), np.int16)    # of the first i and the first j
    d[:, 0] = d[0] = np.arange(length + 1)[:, None, None]
    for i, j in itertools.product(range(1, length + 1), repeat=2):
        differ = pred[:, i - 1] != label[:, j - 1, None]
        d[i, j] = np.minimum(np.minimum(d[i - 1, j], d[i, j - 1]) + 1, d[i - 1, j - 1] + differ)
    return np.stack([d[z, z] for z in range(1, length + 1)], 1)


def edit_metrics(pred, label):
    """ED@z = mean_n min_k distance / z as (Z,), and AUED, the area under it by trapezoids / (Z-1).

    NOTE: a mean over samples; the release averages the means of batches.
    """
    z = np.arange(1, label.shape[1] + 1)
    ed = (edit_distances(pred, label).min(2) / z).mean(0)
    return ed, float((ed[:-1] + ed[1:]).sum() / 2 / max(1, len(ed) - 1))


def anticipation_metrics(train, val, verb, noun):
    """ED@Z and AUED of verbs, nouns and pairs; prior: futures drawn from train's actions."""
    metrics, pairs = {}, 1 << 20                              # one number for verb and noun
    verb, noun = verb.astype(np.int64), noun.astype(np.int64)
    drawn = np.random.default_rng(0).integers(train.verb.size, size=verb.shape)
    for kind, pred, label, prior in (
            ("verb", verb, val.verb, train.verb.ravel()[drawn]),
            ("noun", noun, val.noun, train.noun.ravel()[drawn]),
            ("action", verb * pairs + noun, val.verb * pairs + val.noun,
             (train.verb * pairs + train.noun).ravel()[drawn])):
        ed, area = edit_metrics(pred, label)
        metrics |= {f"{kind} ED@{len(ed)}": float(ed[-1]), f"{kind} AUED": area,
                    f"{kind} ED@{len(ed)} of prior": float(edit_metrics(prior, label)[0][-1])}
    return metrics


def anticipation_submission(args, dataset, verb, noun):
    """outputs.json: {"<clip_uid>_<action_idx of the last input>": K lists of Z verbs and nouns}.

    The challenge wants every window: those whose clip is absent get the commonest prediction.
    """
    verb, noun = (x.astype(int).transpose(0, 2, 1) for x in (verb, noun))             # (N, K, Z)
    futures = {name: {"verb": v.tolist(), "noun": n.tolist()}
               for name, v, n in zip(dataset.ids(), verb, noun)}
    if dataset.absent:
        common.say(f"warning: {len(dataset.absent)} windows of absent clips are filled in, the "
                   f"first is {dataset.absent[0]}")
        fill = {k: np.full(x.shape[1:], np.bincount(x.ravel()).argmax()).tolist()
                for k, x in (("verb", verb), ("noun", noun))}
        futures |= dict.fromkeys(dataset.absent, fill)
    return {"outputs": futures}


def probabilities(keyframe, state):
    """Logits (B, 1, T), (B, 2, 1) -> of the key frame (B, T), of no change and change (B, 2)."""
    return [x.float().flatten(1).softmax(1) for x in (keyframe, state)]


def keyframe_errors(keyframe, start, stop, seconds, pnr):
    """Seconds between the likeliest of T frames, (R, T) scores, and the point of no return.

    NOTE: as in the benchmark frame k stands for k/T of the clip, the start of its share.
    """
    frame = keyframe.argmax(1) * (stop - start) / keyframe.shape[1]
    return np.abs(frame - (pnr - start)) / ((stop - start + 1) / seconds)


def statechange_metrics(train, val, keyframe, state):
    """Accuracy in percent, key-frame error in seconds over the clips with an annotated one.

    Prior: train's commoner state, and its commonest place of the key frame.
    """
    def error(scores, c):
        counts = (c.state == 1) & (c.pnr >= 0)
        each = keyframe_errors(scores, *c.frames.T, c.seconds[:, 1] - c.seconds[:, 0], c.pnr)
        return float(each[counts].mean()) if counts.any() else None
    t, c, one_hot = train.changes, val.changes, np.eye(keyframe.shape[1])
    always = [error(np.tile(row, (len(t.id), 1)), t) or 0.0 for row in one_hot]
    usual = np.tile(one_hot[int(np.argmin(always))], (len(c.id), 1))
    return {"StCC acc": 100.0 * float((state.argmax(1) == c.state).mean()),
            "PNR err (s)": error(keyframe, c),
            "StCC acc of prior": 100.0 * float((c.state == np.bincount(t.state).argmax()).mean()),
            "PNR err (s) of prior": error(usual, c)}


def statechange_submission(args, dataset, keyframe, state):
    """oscc.json and pnr.json. NOTE: whether the challenge counts key frames from the start of the
    video or of the clip could not be verified; --pnr_frame chooses.
    """
    c = dataset.changes
    start, stop = c.frames.T
    frame = keyframe.argmax(1) * (stop - start) / keyframe.shape[1]
    frame += start if args.pnr_frame == "absolute" else 0
    return {"oscc": [{"unique_id": str(i), "state_change": bool(s)}
                     for i, s in zip(c.id, state.argmax(1))],
            "pnr": [{"unique_id": str(i), "pnr_frame": float(f)} for i, f in zip(c.id, frame)]}


class Task(NamedTuple):
    """What tells the three tasks apart; the rest is `finetune`."""
    data: Callable         # (args, split) -> dataset of training; None: no test split
    for_test: Callable     # (args, dataset) -> the same for evaluation
    model: Callable        # (args) -> network
    layouts: tuple         # naming schemes that --init knows, prefix of what it has to fill
    losses: Callable       # (outputs, batch) -> {part: loss}, to be added up
    outputs: Callable      # (args, model, items, clips) -> [(B, ...) tensors]
    metrics: Callable      # (train, val, *outputs) -> {name: number}
    submission: Callable   # (args, dataset, *outputs) -> {name of the file: value}
    terms: tuple           # names of the loss parts
    best: str              # the metric that chooses the checkpoint
    sign: int              # +1: more is better, -1: less


TASKS = {
    "statechange": Task(
        statechange_data, lambda args, d: TestStates(args, d.changes),
        lambda args: StateChange(args.width, args.depth, args.crop),
        (PROBE_LAYOUTS, "backbone."), statechange_losses,
        lambda args, model, items, clips: probabilities(*model(clips)),
        statechange_metrics, statechange_submission, ("keyframe", "state"), "StCC acc", 1),
    "recognition": Task(
        action_data, lambda args, d: TestWindows(args, d.actions, d.files, d.rows, d.verb, d.noun),
        lambda args: Recognition(args.width, args.depth, read_taxonomy(args.data)),
        (BARE_LAYOUTS, "conv"), recognition_losses, recognition_outputs,
        recognition_metrics, recognition_submission, ("verb", "noun"), "noun@1", 1),
    "anticipation": Task(
        action_data, lambda args, d: TestWindows(args, d.actions, d.files, d.rows, d.verb, d.noun),
        lambda args: Anticipation(args.width, args.depth, read_taxonomy(args.data),
                                  args.aggregator, args.features, args.layers,
                                  legacy_bn=args.legacy_bn),
        (PROBE_LAYOUTS, "backbone.conv"), anticipation_losses, anticipation_outputs,
        anticipation_metrics, anticipation_submission, ("verb", "noun"), "verb ED@20", -1)}


# ---- conversion --------------------------------------------------------------------------------

def convert(args, device):
    """Write the networks of --init in every layout that other code reads, all into --out:

    checkpoint_latest-ego.pth   {"state_dict": video}: the Ego4D tools
    avid.pth.tar                {"model": module.video_model.*, module.audio_model.*}: AVID
    replai.pth.tar              {"model": module.backbone.*, module.mlp.*}: the official RepLAI
    replai.pt                   {"model": backbone.*, mlp.*}: this script, which reads all four

    What the source does not hold (audio, heads) is left out, and a layout that needs it, too.
    """
    if args.init in ("none", "avid"):
        raise UserError("convert: --init FILE names the checkpoint to convert")
    path = Path(args.init)
    tensors = common.find_weights(path)
    stem = next((k for k, v in tensors.items() if k.endswith("conv1.0.weight") and v.dim() == 5),
                None)
    if stem is None:
        raise UserError(f"{path}: holds no video network of this kind")
    deep = stem.replace("conv1.0", "conv2x.1.out_bn") in tensors
    model = RepLAI(len(tensors[stem]), 18 if deep else 10)
    loaded = common.load_weights(model, path, [*PRETRAIN_LAYOUTS, *(
        {a: f"backbone.video.{b}" for a, b in s.items()} for s in BARE_LAYOUTS)], "backbone.video.")

    def part(old, new):
        names = [k for k in model.state_dict() if k.startswith(old)]
        missing = [k for k in names if k not in loaded]
        if missing and len(missing) < len(names):
            raise UserError(f"{path}: tensors are missing, the first is {missing[0]}")
        return {} if missing else {new + k[len(old):]: model.state_dict()[k] for k in names}
    video, audio, heads = "backbone.video.", "backbone.audio.", "mlp."
    files = {"checkpoint_latest-ego.pth": {"state_dict": part(video, "")},
             "replai.pt": {"model": part(video, video) | part(audio, audio) | part(heads, heads)}}
    if part(audio, ""):
        files["avid.pth.tar"] = {"epoch": 0, "model": {
            **part(video, "module.video_model."), **part(audio, "module.audio_model.")}}
    if part(audio, "") and part(heads, ""):
        files["replai.pth.tar"] = {"epoch": 0, "model": part("", "module.")}
    for name, content in files.items():
        common.write(args.out / name, functools.partial(torch.save, content))
    common.say(f"done: {', '.join(files)} in {args.out}" + "; the others need the audio network "
               "and the heads" * (len(files) < 4))


# ---- segments and pictures ---------------------------------------------------------------------

def encode(path, frames, fps, x, rate):
    """Write a piece: H.264 with a key frame per second, and AAC if there is sound.

    One thread: x264's bytes depend on their number.
    """
    def content(f):
        with av.open(f, "w", format="mp4") as c:
            v = c.add_stream("libx264", rate=fps, options={"g": str(fps), "crf": "20",
                                                           **common.SAME_BYTES})
            v.codec_context.thread_count = 1
            v.height, v.width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
            v.pix_fmt = "yuv420p"
            a = c.add_stream("aac", rate=rate, layout="mono" if len(x) == 1 else "stereo") \
                if x.size else None
            for image in frames[:, :v.height, :v.width]:
                image = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                c.mux(v.encode(image))
            c.mux(v.encode(None))
            if a:
                sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(x[:2]), format="fltp",
                                                   layout=a.layout.name)
                sound.sample_rate, sound.pts = rate, 0
                c.mux(a.encode(sound))
                c.mux(a.encode(None))
    common.write(path, content)


def segments(args, device, fps=16, short_side=240, rate=44100):
    """Cut every training video into 10 s pieces, `segments/ID_<start>_<stop>.MP4` in --data.

    The official script was not released; size, rates and key frames are those that the released
    comments name. Pieces that exist are kept, so this can be killed and spread over machines.
    """
    folder, files = args.data / "segments", list_media(args, pieces=False)[:args.limit]
    if common.rank() == 0:
        folder.mkdir(exist_ok=True)
        common.remove_stale(folder)
        (folder / ".cutting").touch()                         # pre-training waits until it is gone
    common.barrier()
    made = kept = broken = 0
    for n, name in enumerate(files[common.rank()::common.world_size()]):
        try:
            media = common.probe(args.data / name)
            for start, stop in cut_times(media.duration):
                piece = folder / (f"{stem(name)}_{int(start):06d}_{math.ceil(stop):06d}"
                                  f"{'.MP4' if args.dataset == 'epic' else '.mp4'}")
                if piece.exists():
                    kept += 1
                    continue
                times = start + np.arange(math.ceil((stop - start) * fps - 1e-6)) / fps
                x = np.zeros((0, 0), np.float32)
                frames = common.read_clip(args.data / name, [times], short_side)[0]
                if media.channels:
                    x, old = common.read_audio(args.data / name, start, stop)
                    x = torch.stack([resample(c, old, rate) for c in torch.from_numpy(x)]).numpy()
                encode(piece, frames, fps, x, rate)
                made += 1
        except VideoError as e:
            broken += 1
            print(f"warning: {e}; not cut", flush=True)
        common.say(f"segments: {n + 1} videos done by this process, {made} pieces written")
    totals = torch.tensor([made, kept, broken], device=device)
    dist.all_reduce(totals)
    if common.rank() == 0:
        (folder / ".cutting").unlink(missing_ok=True)
        made, kept, broken = totals.tolist()
        common.write_json(args.out / "metrics.json", {
            "videos": len(files), "pieces_written": made, "pieces_kept": kept,
            "videos_unreadable": broken})
        common.say(f"done: {made + kept} pieces in {folder}, {broken} videos unreadable")


def moments(args, device):
    """Detect and cache the moments of interaction; draw the first segment that has several."""
    index = SegmentIndex(args, scan(args))
    if common.rank() == 0:
        common.write_json(args.out / "metrics.json", {
            "files": len(index.files), "segments": len(index), "moments": len(index.peaks),
            "segments_without_sound": int((~index.sound).sum()),
            "segments_without_moment": int((index.count == 0).sum())})
        draw_moments(args, index, args.out / "moments.png")
    common.say(f"done: {args.moments}/moments.jsonl, {args.out}/moments.png")


def draw_moments(args, index, path):
    """Spectrogram, score curve and moments of one segment; pictures before and after one."""
    best = np.argsort(np.abs(index.count - 4), kind="stable")[:20]      # about four moments
    for i in best[index.count[best] > 0]:
        try:
            return draw_segment(args, index, int(i), path)
        except VideoError:                                    # training has named it already
            continue


def draw_segment(args, index, i, path):
    """`draw_moments` for segment i; VideoError if its pictures or its sound cannot be read."""
    from PIL import Image, ImageDraw
    media = args.data / os.fsdecode(index.files[index.file[i]])
    start, stop = index.start[i], index.stop[i]
    x, rate = common.read_audio(media, start, stop)
    found = find_moments(x, rate, args.prominence)
    kept = index.peaks[index.offset[i]:index.offset[i + 1]] - start

    image = Image.new("RGB", (900, 660), "white")
    draw = ImageDraw.Draw(image)
    title = f"{media.name}, {start:.0f}-{stop:.0f} s: {len(kept)} moments of interaction"
    draw.text((70, 8), title, "black", common.font(15))
    level = mel_power(resample(torch.from_numpy(x).mean(0), rate, 16000)).clamp(min=1e-10).log()
    level = (level - level.min()) / (level.max() - level.min() + 1e-9)
    grey = Image.fromarray((255 * (1 - level.flip(0))).byte().numpy())
    image.paste(grey.resize((810, 160), Image.Resampling.BILINEAR), (70, 34))
    for k, name in ((34, "8 kHz"), (186, "0")):
        draw.text((64, k), name, "#333333", common.font(), anchor="rt")
    common.draw_panel(draw, (70, 222, 880, 376), found.times, {"mean z-score": found.curve},
                      "seconds; upright lines: moments with both clips inside", kept)
    t = kept[len(kept) // 2] + start
    d = args.delta_non_overlap
    sides = common.read_clip(media, [Window(t - d - CLIP_SECONDS, CLIP_SECONDS, 4),
                                     Window(t + d, CLIP_SECONDS, 4)], 128)
    for k, (side, frames) in enumerate(zip((f"{d + CLIP_SECONDS:.1f}-{d:.1f} s before",
                                            f"{d:.1f}-{d + CLIP_SECONDS:.1f} s after"), sides)):
        strip = Image.fromarray(np.concatenate(list(frames), 1))
        strip = strip.resize((400, max(1, round(400 * strip.height / strip.width))))
        image.paste(strip, (70 + 410 * k, 442))
        draw.text((70 + 410 * k, 422), f"{side} {t - start:.2f} s", "#333333", common.font())
    common.save_picture(image.crop((0, 0, 900, 452 + strip.height)), path)


def main(args):
    if not args.data.is_dir() and args.stage != "convert":
        raise UserError(f"{args.data}: no such folder; --data is the {args.dataset} folder as "
                        "README lays it out (`make toy` writes a small one, data/toy)")
    device = common.start_run(args, gpu=args.stage in ("pretrain", "linear", *EGO4D_STAGES))
    {"pretrain": pretrain, "linear": linear, **dict.fromkeys(EGO4D_STAGES, finetune),
     "segments": segments, "moments": moments, "convert": convert}[args.stage](args, device)


if __name__ == "__main__":
    arguments = parse_args()
    common.launch(main, arguments)
