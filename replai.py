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
Evaluate     torchrun --nproc_per_node 4 replai.py --stage linear --dataset epic --init CKPT
Prepare      python replai.py --stage segments --dataset epic      cut 10 s pieces (optional)
             python replai.py --stage moments --dataset ego4d      detect moments (else at start)
Try it       python replai.py --dataset ego4d --data data/toy/ego4d --tiny  (CPU; `make toy` first)

The paper's body could not be opened while this was written: files named here are those of the
official code. Where paper, official code and this file differ, grep NOTE in this file.
"""

import csv
import io
import json
import math
import os
import re
import socket
import time
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

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
common.FREE_FLAGS |= {"moments", "clips", "clip", "eval_resize"}
AVID = ("https://dl.fbaipublicfiles.com/avid-cma/checkpoints/"
        "AVID_Audioset_Cross-N1024_checkpoint.pth.tar")


# ---- arguments ---------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.Parser(__doc__)
    g = p.add_argument_group("data")
    g.add_argument("--stage", choices=["pretrain", "linear", "segments", "moments"],
                   default="pretrain", help="what to do")
    g.add_argument("--dataset", choices=["epic", "ego4d"], default="ego4d",
                   help="EPIC-KITCHENS-100 or Ego4D; sets the defaults below to its recipe")
    g.add_argument("--data", type=Path, metavar="DIR", help="its folder, official layout (README)")
    g.add_argument("--moments", type=Path, metavar="DIR", help="cache of detected moments")
    g.add_argument("--limit", type=int, metavar="N", help="use only N segments, or N rows a split")
    g.add_argument("--workers", type=int, default=8, help="decoding processes per GPU")

    g = p.add_argument_group("method")
    g.add_argument("--init", default="avid", metavar="FILE",
                   help="weights to start from: avid (AudioSet, fetched once; the paper's), none "
                        "(the paper's scratch row), or a RepLAI, AVID, linear-probe or bare file")
    g.add_argument("--moi", choices=["peaks", "random"], default="peaks",
                   help="moments from peaks in the sound, or at random (the paper's row w/o MoI)")
    g.add_argument("--prominence", type=float, default=1.0,
                   help="least height of a peak over its surroundings (audio_event_prominence)")
    g.add_argument("--delta_non_overlap", type=float, default=0.1, metavar="D",
                   help="seconds between the moment and either clip, d (commands/*.sh)")
    g.add_argument("--clr_coeff", type=float, default=0.5,
                   help="weight of L_AVC (commands/*.sh); 0: the row w/o AVC")
    g.add_argument("--aot_coeff", type=float, default=0.5,
                   help="weight of L_AStC (commands/*.sh); 0: the row w/o AStC")
    g.add_argument("--tau", type=float, default=0.07,
                   help="temperature of L_AVC, τ (ssrl_audiopeak_aotv2.py)")
    g.add_argument("--num_frames", type=int, default=8,
                   help="pictures per clip, T: half a second at 16 fps (configs/data_augm)")
    g.add_argument("--crop", type=int, default=112, help="pixels, H and W (configs/data_augm)")
    g.add_argument("--width", type=int, default=64,
                   help="channels of both networks' first stage (AVID, models/)")
    g.add_argument("--depth", type=int, choices=[10, 18], default=18,
                   help="layers of the R(2+1)D (AVID, models/video)")

    g = p.add_argument_group("linear evaluation")
    g.add_argument("--clips", type=int, default=1, metavar="N",
                   help="evenly spaced clips per action, softmax averaged; 1: the centre (ours)")
    g.add_argument("--clip", choices=["even", "random"], default="even",
                   help="random: at random places fixed by --seed (released protocol, with N 1)")
    g.add_argument("--eval_resize", choices=["nearest", "bilinear"], default="nearest",
                   help="interpolation in evaluation; nearest is what the release uses")
    g.add_argument("--normalize_feats", choices=["off", "l2", "sign"], default="off",
                   help="of pooled features; sign: what the release's switch did (off in its runs)")
    g.add_argument("--compat", choices=["fixed", "released"], default="fixed",
                   help="released: both switches below at once")
    g.add_argument("--legacy_aspect", action="store_true",
                   help="training pictures with width and height swapped, as released")
    g.add_argument("--legacy_bn", action="store_true",
                   help="batch statistics in the frozen backbone, as released")

    g = p.add_argument_group("optimization (SGD with momentum; published values: commands/*.sh)")
    g.add_argument("--epochs", type=int,
                   help="passes over the segments or action rows; OneCycle needs ten or more")
    g.add_argument("--batch_size", type=int,
                   help="samples per step over all GPUs; batch norm sees one GPU's share")
    g.add_argument("--lr", type=float,
                   help="peak of OneCycle; linear: first value, x0.1 at 3/5 and 4/5 of the epochs")
    g.add_argument("--weight_decay", type=float,
                   help="on every parameter, norms and biases too (configs/optim/sgd.yaml)")

    g = p.add_argument_group("run")
    g.add_argument("--out", type=Path, metavar="DIR",
                   help="run folder, continued if used before (runs/replai_DATASET_STAGE)")
    g.add_argument("--tiny", action="store_true",
                   help="CPU size: small pictures, narrow network, short recipe; not the paper's")
    g.add_argument("--seed", type=int, default=0, help="all randomness follows from it")
    g.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto",
                   help="of the networks; auto is bf16 on CUDA, fp32 elsewhere; losses are fp32")
    g.add_argument("--compile", action="store_true", help="torch.compile the networks")
    g.add_argument("--save_every", type=int, default=500, metavar="N",
                   help="steps between checkpoints; one more ends each epoch")
    g.add_argument("--log_every", type=int, default=20, metavar="N", help="steps between log lines")
    args = common.parse(p, recipe, argv)
    if args.stage == "linear" and args.dataset != "epic":
        p.error("--stage linear is EPIC-KITCHENS-100's verb and noun evaluation: --dataset epic")
    if not args.tau:
        p.error("--tau 0: a temperature must be above 0")
    if args.compat == "released":
        args.legacy_aspect = args.legacy_bn = True
    return args


def recipe(chosen):
    """Defaults of the published run that --stage and --dataset name; smaller ones for --tiny."""
    r = {"data": Path("data") / chosen.dataset,
         "moments": Path("runs") / f"replai_{chosen.dataset}_moments"}
    if chosen.stage in ("segments", "moments"):
        return r
    if chosen.stage == "linear":
        r |= {"epochs": 30, "batch_size": 128, "lr": 0.005, "weight_decay": 0.0,
              "init": f"runs/replai_{chosen.dataset}_pretrain/last.pt"}
    else:
        ego4d = chosen.dataset == "ego4d"
        r |= {"epochs": 100, "batch_size": 512 if ego4d else 128, "lr": 0.05 if ego4d else 0.005,
              "weight_decay": 1e-4}
    if chosen.tiny:
        r |= {"crop": 56, "width": 16, "depth": 10, "batch_size": 16, "workers": 2, "log_every": 5,
              "save_every": 20, "init": "none", "epochs": 60, "lr": 0.01}
        r |= {"epochs": 20, "lr": 0.05} if chosen.stage == "linear" else {}
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
    files = mp4_files(args.data, "segments/*") if pieces else []
    if args.dataset == "ego4d":
        whole = mp4_files(args.data, "*")
        uncut = {f.stem for f in whole} - {f.stem.rsplit("_", 2)[0] for f in files}
        if files and uncut:
            common.say(f"{len(uncut)} of {len(whole)} videos have no piece in segments/: not used")
        files = files or whole
    else:                                                     # EPIC: only videos of its train split
        train = set(read_actions(args.data, "train").video)
        named = {f: "_".join(f.stem.split("_")[:2])
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
    """Sorted paths, relative to `root`, of the .mp4 and .MP4 files that the patterns name."""
    return sorted({f.relative_to(root) for p in patterns for f in root.glob(p)
                   if f.suffix.lower() == ".mp4" and f.is_file()})


class ScanFiles(Dataset):
    """One record per media file: its 10 s segments as [start, stop, peak times or null]."""

    def __init__(self, args, files):
        self.root, self.files, self.prominence = args.data, files, args.prominence

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        path = self.root / self.files[i]
        record = {"file": str(self.files[i]), "bytes": path.stat().st_size,
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


def read_records(args):
    """{file: record} of the cache, without records of other settings and half-written lines."""
    records = {}
    for path in sorted(args.moments.glob("moments*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
                records[record["file"], record["bytes"], record["prominence"]] = record
            except (ValueError, KeyError, TypeError):
                continue
    return records


def scan(args):
    """Detect the moments of every file, each once, shared among the processes, and cache them.

    A line of `moments.jsonl` per file; killed at any time, a new start goes on with the rest.
    Returns the records in the order of `list_media`.
    """
    files, records = list_media(args)[:args.limit], read_records(args)
    keys = [(str(f), (args.data / f).stat().st_size, args.prominence) for f in files]
    missing = [f for f, key in zip(files, keys) if "segments" not in records.get(key, {})]
    plan = [f"{socket.gethostname()}-{os.getpid()}", missing]
    if common.world_size() > 1:           # one list for all: other jobs may be filling the cache
        dist.broadcast_object_list(plan)
    job, missing = plan
    part = args.moments / f"moments.part-{job}-{common.rank()}.jsonl"
    mine = missing[common.rank()::common.world_size()]
    if mine:
        part.parent.mkdir(parents=True, exist_ok=True)
        loader = DataLoader(ScanFiles(args, mine), batch_size=None, num_workers=args.workers)
        began = shown = time.perf_counter()
        with open(part, "w") as out:
            for n, record in enumerate(loader, 1):
                out.write(json.dumps(record) + "\n")
                out.flush()
                if time.perf_counter() - shown > 10:
                    shown = time.perf_counter()
                    left = (shown - began) / n * (len(mine) - n)
                    common.say(f"moments {n}/{len(mine)} files of process 0, ETA {left:.0f} s")
    common.barrier()
    records = read_records(args) if missing else records
    common.barrier()
    if common.rank() == 0 and missing:
        lines = (json.dumps(r) + "\n" for _, r in sorted(records.items()) if "segments" in r)
        common.write(args.moments / "moments.jsonl", "".join(lines))
        for f in args.moments.glob("moments.part-*.jsonl"):   # ours, and those of dead jobs
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
        rows = [(n, *s) for n, r in enumerate(records) for s in r.get("segments", ())]
        rows = rows[:args.limit]
        self.files = np.array([os.fsencode(r["file"]) for r in records])
        self.file = np.array([r[0] for r in rows], np.int32)
        self.start = np.array([r[1] for r in rows], np.float64)
        self.stop = np.array([r[2] for r in rows], np.float64)
        self.sound = np.array([r[3] is not None for r in rows], bool)
        peaks = [np.array(r[3] or [], np.float64) for r in rows]
        kept = [r[1] + p[admissible(p, r[2] - r[1], args.delta_non_overlap)]
                for r, p in zip(rows, peaks)]
        self.offset = np.cumsum([0] + [len(k) for k in kept])
        self.peaks = np.concatenate(kept + [np.zeros(0)])
        self.count = np.diff(self.offset)
        roomy = self.stop - self.start >= 2 * (args.delta_non_overlap + CLIP_SECONDS)
        self.has_moment = self.count > 0 if args.moi == "peaks" else self.sound & roomy
        self.usable = np.flatnonzero(self.has_moment)
        broken = [r["error"] for r in records if "segments" not in r]
        common.say(f"{len(rows)} segments of {len(records) - len(broken)} files, {len(self.peaks)} "
                   f"moments; {len(rows) - len(self.usable)} segments have none "
                   f"({int((~self.sound).sum())} of them no sound) and are replaced")
        if broken:
            common.say(f"warning: {len(broken)} files cannot be read: {'; '.join(broken[:3])}")
        if not len(self.usable):
            raise UserError(f"{args.data}: no segment has an audible moment to train on")

    def __len__(self):
        return len(self.file)


# ---- data: sound (official file: data/audio_transforms.py) -------------------------------------

@lru_cache
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


@lru_cache
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

def resize_crop_flip(frames, size, x, y, crop, flip, nearest=False):
    """Resize to `size` (width, height), crop, mirror.      (T, H, W, 3) -> (3, T, crop, crop)

    uint8 in and out, antialiased bilinear as PIL's BILINEAR, or as PIL's NEAREST.
    """
    v = torch.from_numpy(frames).permute(0, 3, 1, 2)                    # (T, 3, H, W), a view
    if (v.shape[3], v.shape[2]) != tuple(size):
        mode = {"mode": "nearest-exact"} if nearest else {"mode": "bilinear", "antialias": True}
        v = F.interpolate(v, size=(size[1], size[0]), **mode)
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


def centre(frames, crop, nearest=True):
    """Evaluation transform: short side to 128 (for crops of 112), centre crop."""
    size = short_side_to(frames.shape[2], frames.shape[1], int(SCALES[0] * crop + 1e-6))
    x, y = (round((side - crop) / 2) for side in size)
    return resize_crop_flip(frames, size, x, y, crop, False, nearest)


def normalize(clip):
    """uint8 (B, 3, T, H, W) to the networks' range, on the clip's device."""
    mean, std = (torch.tensor(c, device=clip.device).view(3, 1, 1, 1) for c in (MEAN, STD))
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


def read_table(path, columns):
    """Rows of an official CSV as dictionaries with `_line`; UserError names file and line."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it comes with the official annotations") from None
    except UnicodeDecodeError as e:
        line = data[:e.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: is not in UTF-8") from e
    if "\0" in text:
        line = text[:text.index("\0")].count("\n") + 1
        raise UserError(f"{path}:{line}: holds a NUL byte")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        lacking = [c for c in columns if c not in (reader.fieldnames or [])]
        if lacking:
            raise UserError(f"{path}:1: column {lacking[0]} is missing")
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}:{reader.line_num}: has another number of fields than "
                                f"the {len(reader.fieldnames)} columns")
            rows.append({**row, "_line": reader.line_num})
        return rows
    except csv.Error as e:
        raise UserError(f"{path}:{reader.reader.line_num}: not in CSV form ({e})") from e


def read_actions(root, split):
    """`Actions` of split train, validation or test."""
    path = root / "annotations" / f"EPIC_100_{split}{'_timestamps' * (split == 'test')}.csv"
    labels = [] if split == "test" else ["verb_class", "noun_class"]
    rows = read_table(path, ["narration_id", "participant_id", "video_id", "start_timestamp",
                             "stop_timestamp", *labels])
    kept, seen = [], set()
    for r in rows:
        def fault(column, why, row=r):
            return UserError(f"{path}:{row['_line']}: {column} {row[column]!r} {why}")
        if r["narration_id"] in seen or not r["narration_id"]:
            raise fault("narration_id", "is empty or there twice")
        seen.add(r["narration_id"])
        if not re.fullmatch(r"P\d+_\d+", r["video_id"]):      # it becomes a path
            raise fault("video_id", "is not of the form P01_01")
        times = []
        for column in ("start_timestamp", "stop_timestamp"):
            m = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d(?:\.\d+)?)", r[column], re.ASCII)
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
    def column(name, key, kind):
        path, values = root / "annotations" / f"EPIC_100_{name}.csv", set()
        for r in read_table(path, [key]):
            try:
                values.add(kind(r[key]))
            except ValueError:
                raise UserError(f"{path}:{r['_line']}: {key} {r[key]!r} is no number") from None
        return values
    return (column("tail_verbs", "verb", int), column("tail_nouns", "noun", int),
            column("unseen_participant_ids_validation", "participant_id", str))


def epic_videos(root):
    """{video id: path relative to root}, in any of the folder trees that downloads come in."""
    return {f.stem: f for f in mp4_files(root, "videos/*", "videos/*/*", "P*/videos/*", "P*/*")}


def locate(root, actions, split, limit):
    """Files and windows of the rows: ([row numbers], [path], (R, 2) start, stop in that file).

    A cut file of `action_segments/` is preferred to the whole video. Absent rows are counted.
    """
    cut = {f.stem: f for f in mp4_files(root, "action_segments/*")}
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
        nearest = self.args.eval_resize == "nearest"
        clips = [centre(c, self.args.crop, nearest) for c in clips]
        return torch.stack(clips)                             # (N, 3, T, H, W)


# ---- model -------------------------------------------------------------------------------------

def head(d_in, d_hidden, d_out):
    """Linear - ReLU - Linear, xavier-uniform weights."""
    layers = nn.Sequential(nn.Linear(d_in, d_hidden), nn.ReLU(), nn.Linear(d_hidden, d_out))
    for layer in (layers[0], layers[2]):
        nn.init.xavier_uniform_(layer.weight)
    return layers


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
        self.fc = nn.ModuleDict({k: nn.Linear(self.backbone.out_dim, n)
                                 for k, n in dict(num_classes).items()})
        for layer in self.fc.values():
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.zeros_(layer.bias)

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


# Naming schemes of checkpoints: ours and RepLAI's, AVID's, linear probes', forecasting's, bare.
PRETRAIN_LAYOUTS = [{"": ""},
                    {"video_model.": "backbone.video.", "audio_model.": "backbone.audio."}]
PROBE_LAYOUTS = [{"backbone.video.": "backbone."}, {"video_model.": "backbone."}, {"": ""},
                 {"model.backbone.": "backbone."}, {"model.": ""}, {"": "backbone."}]


def initialise(model, args, layouts):
    """Fill the networks as --init says."""
    if args.init == "none":
        return common.say("init none: random weights")
    path = fetch_avid() if args.init == "avid" else Path(args.init)
    common.load_weights(model, path, layouts, required="backbone.")


def fetch_avid():
    """Path of AVID's AudioSet checkpoint, downloaded once per machine."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / AVID.rsplit("/", 1)[1]
    failed = [None] * common.world_size()
    try:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not path.exists():
            common.say(f"fetching {AVID}")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(AVID, str(path), progress=False)
            import hashlib
            common.say(f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
        why = None
    except OSError as e:
        why = (f"{AVID} could not be fetched ({e}); put the file at {path}, or start from "
               "scratch with --init none")
    dist.all_gather_object(failed, why)
    if any(failed):
        raise UserError(next(filter(None, failed)))
    return path


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
    dataset = common.SkipBroken(AudibleClips(args, index), args.seed)
    per_epoch = len(dataset) // args.batch_size
    steps, schedule = args.epochs * per_epoch, one_cycle(args.lr, args.epochs)
    common.same_samples(saved, len(dataset), args.out)
    sampler = common.StepSampler(len(dataset), args.batch_size, args.seed, start, steps)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=args.workers,
                        pin_memory=device.type == "cuda", generator=torch.Generator())
    log = common.Log(args, start, steps, per_epoch)
    ddp.train()
    for step, batch in log.steps(loader):
        epoch, k = divmod(step, per_epoch)
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = schedule[epoch]
        v_l, v_r = (normalize(batch[c].to(device, non_blocking=True)) for c in ("before", "after"))
        with common.autocast(device, args.precision):
            out = ddp(v_l, v_r, batch["sound"].to(device, non_blocking=True))
        avc, astc = losses(out, args.tau)
        loss = args.clr_coeff * avc + args.aot_coeff * astc
        log.guard(step, avc=avc, astc=astc)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        ended = k + 1 == per_epoch
        saving = ended or (step + 1) % args.save_every == 0
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
    sampler = common.StepSampler(len(dataset), args.batch_size, args.seed, start, steps)
    loader = DataLoader(common.SkipBroken(dataset, args.seed), batch_sampler=sampler,
                        num_workers=args.workers, pin_memory=device.type == "cuda",
                        generator=torch.Generator())
    log = common.Log(args, start, steps, per_epoch)
    model.backbone.train(args.legacy_bn)
    for step, batch in log.steps(loader):
        lr = step_lr(args.lr, step // per_epoch, milestones)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if args.legacy_bn:                                    # as DDP does before each forward
            for buffer in model.backbone.buffers():
                dist.broadcast(buffer, 0)
        clips = batch["clip"].to(device, non_blocking=True)
        with common.autocast(device, args.precision):
            x = model.features(clips, chunk=len(clips) if args.legacy_bn else 8)
        x, verb, noun = (common.all_rows(t.to(device)) for t in (x, batch["verb"], batch["noun"]))
        logits = model.classify(x, args.normalize_feats)
        loss_verb = F.cross_entropy(logits["verb_class"], verb)
        loss_noun = F.cross_entropy(logits["noun_class"], noun)
        log.guard(step, verb=loss_verb, noun=loss_noun)
        loss = (loss_verb + loss_noun) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        saving = (step + 1) % per_epoch == 0 or (step + 1) % args.save_every == 0
        log(step, saving, loss=loss, verb=loss_verb, noun=loss_noun, lr=lr)
        if saving:
            common.save(args.out / "last.pt", step + 1, args, model=model, optimizer=optimizer,
                        samples=len(dataset))
    common.barrier()
    if common.rank() == 0:
        common.draw_curve(args.out, "linear evaluation on epic", ["loss", "verb", "noun", "lr"])
    evaluate(args, model, device, *held_out)


@torch.inference_mode()
def score(args, model, device, actions, split):
    """(row numbers, verb scores (R, 97), noun scores (R, 300)): each row once.

    A score is the log of the mean over clips of the softmax, so its softmax is that mean. Rows go
    through the network in fixed groups of 8, dealt out among the processes, so the numbers do not
    depend on how many there are.
    """
    located = locate(args.data, actions, split, args.limit)
    dataset, scores, group = TestClips(args, actions, located), {}, 8
    mine = [list(range(i, min(i + group, len(dataset))))
            for i in range(common.rank() * group, len(dataset), common.world_size() * group)]
    model.eval()
    began = shown = time.perf_counter()
    loader = DataLoader(dataset, batch_sampler=mine, num_workers=args.workers,
                        generator=torch.Generator())
    for n, (rows, clips) in enumerate(zip(mine, loader), 1):  # clips: (8, N, 3, T, H, W)
        with common.autocast(device, args.precision):
            x = model.features(clips.to(device).flatten(0, 1), chunk=group)
        logits = model.classify(x, args.normalize_feats)
        prob = [v.float().softmax(-1).unflatten(0, (len(rows), -1)).mean(1).clamp_min(1e-30)
                .log().cpu().numpy() for v in logits.values()]            # (8, 97), (8, 300)
        scores |= {i: (verb, noun) for i, verb, noun in zip(rows, *prob)}
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            left = (shown - began) / n * (len(mine) - n)
            common.say(f"{split} {n}/{len(mine)} groups of this process, ETA {left:.0f} s")
    scores = common.gather(scores, expect=len(dataset))
    return (located[0], *(np.stack([s[k] for s in scores.values()]) for k in (0, 1)))


def read_test_splits(args):
    """Validation rows and subsets, and the challenge's test rows (None without their file)."""
    test = (args.data / "annotations" / "EPIC_100_test_timestamps.csv").exists()
    return (read_actions(args.data, "validation"), read_subsets(args.data),
            read_actions(args.data, "test") if test else None)


def evaluate(args, model, device, actions, subsets, test):
    """Validation metrics, and submission files for validation and, if its videos exist, test."""
    for buffer in model.backbone.buffers():                   # of --legacy_bn: process 0's
        dist.broadcast(buffer, 0)
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


# ---- segments and pictures ---------------------------------------------------------------------

def encode(path, frames, fps, x, rate):
    """Write a piece: H.264 with a key frame per second, and AAC if there is sound."""
    def content(f):
        with av.open(f, "w", format="mp4") as c:
            v = c.add_stream("libx264", rate=fps, options={"g": str(fps), "crf": "20"})
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
                piece = folder / (f"{name.stem}_{int(start):06d}_{math.ceil(stop):06d}"
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

    image = Image.new("RGB", (900, 640), "white")
    draw = ImageDraw.Draw(image)
    title = f"{media.name}, {start:.0f}-{stop:.0f} s: {len(kept)} moments of interaction"
    draw.text((70, 8), title, "black", common.font(15))
    level = mel_power(resample(torch.from_numpy(x).mean(0), rate, 16000)).clamp(min=1e-10).log()
    level = (level - level.min()) / (level.max() - level.min() + 1e-9)
    grey = Image.fromarray((255 * (1 - level.flip(0))).byte().numpy())
    image.paste(grey.resize((810, 160), Image.Resampling.BILINEAR), (70, 34))
    for k, name in ((34, "8 kHz"), (186, "0")):
        draw.text((64, k), name, "#333333", common.font(), anchor="rt")
    common.draw_panel(draw, (70, 210, 880, 370), found.times, {"mean z-score": found.curve},
                      "s, lines: moments with both clips inside", kept)
    t = kept[len(kept) // 2] + start
    d = args.delta_non_overlap
    sides = common.read_clip(media, [Window(t - d - CLIP_SECONDS, CLIP_SECONDS, 4),
                                     Window(t + d, CLIP_SECONDS, 4)], 128)
    for k, (side, frames) in enumerate(zip((f"{d + CLIP_SECONDS:.1f}-{d:.1f} s before",
                                            f"{d:.1f}-{d + CLIP_SECONDS:.1f} s after"), sides)):
        strip = Image.fromarray(np.concatenate(list(frames), 1))
        strip = strip.resize((400, max(1, round(400 * strip.height / strip.width))))
        image.paste(strip, (70 + 410 * k, 430))
        draw.text((70 + 410 * k, 410), f"{side} {t - start:.2f} s", "#333333", common.font())
    common.save_picture(image.crop((0, 0, 900, 440 + strip.height)), path)


def main(args):
    if not args.data.is_dir():
        raise UserError(f"{args.data}: no such folder; --data is the {args.dataset} folder as "
                        "README lays it out (`make toy` writes a small one, data/toy)")
    device = common.start_run(args, gpu=args.stage in ("pretrain", "linear"))
    {"pretrain": pretrain, "linear": linear, "segments": segments,
     "moments": moments}[args.stage](args, device)


if __name__ == "__main__":
    arguments = parse_args()
    common.launch(main, arguments)
