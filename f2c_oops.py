"""F2C and F2C2V: Leveraging Self-Supervised Training for Unintentional Action Recognition (Duka,
Kukleva, Schiele), ECCV 2022 workshops, arXiv:2209.11870.   Official code:
dukaenea/unintentional_actions, commit fdde674.   Data and benchmark: Oops! (arXiv:1911.11206),
cvlab-columbia/oops, commit ef2d93f.

Something goes wrong in a video: intention, then a transition, then the unintended. Before it sees
a label, a transformer over frozen frame features learns which temporal transformation a clip went
through (sped up, shuffled, turned round, warped), hence what orderly motion is; a second one over
clip embeddings learns the same of whole videos. Then both learn to tell 0 intentional, 1
transition, 2 unintentional clips apart, to find the transition in time, and to see it coming.

    f_t = φ(I_t)                                      one vector per picture, φ frozen: (D,)
    z   = Enc_frame([c, f_1 ... f_L])_0               clip embedding: the class token's row
    L_F2C   = mean_i CE(Head(z_i), y_i)               y: which of 8 transformations of the clip
    v   = Enc_clip([c', z_1 ... z_N])_0               z_j of 16 pictures each, Enc_frame frozen
    L_F2C2V = mean_i CE(Head(v_i), y_i)               y: which of 6 transformations of the video

    q_j = Head_3(z_j), or Head_3(Enc_clip(...)_j)     clip level, video level: CE over all clips,
    or a CRF over a video's clips, s(q, y) = a_y1 + b_yN + Σ_j q_j[y_j] + Σ_j A[y_j-1, y_j]:
    L = log Σ_y' exp s(q, y') - s(q, y);   t̂ = middle of the clip with the largest softmax(q_j)_1

Features     python f2c_oops.py --stage features --data data/oops --weights vit.pth
F2C          torchrun --nproc_per_node 8 f2c_oops.py
F2C2V        torchrun --nproc_per_node 8 f2c_oops.py --stage f2c2v
Classify     torchrun --nproc_per_node 8 f2c_oops.py --stage classify --level video
Localize     python f2c_oops.py --stage localize --init FILE
Anticipate   torchrun --nproc_per_node 8 f2c_oops.py --stage classify --anticipate 1.5
Evaluate     python f2c_oops.py --stage evaluate --init FILE
Try it       python f2c_oops.py --stage features --data data/toy/oops --tiny, then
             python f2c_oops.py --data data/toy/oops --tiny      (CPU, minutes; `make toy` first)

The paper's text was not at hand, only its abstract: files named here are those of the official
code, `ours` is from neither. Where the sources and this file differ, grep NOTE in this file.
"""

import contextlib
import copy
import csv
import functools
import io
import json
import math
import os
import re
import statistics
import struct
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset, IterableDataset

import common
from common import UserError, VideoError

LABELS = ("intentional", "transition", "unintentional")
SPEEDS = ("normal", "x2", "x4", "x8")                         # NOTE: the configs say x2, x3, x4
CLIP_TRANSFORMS = (*SPEEDS, "shuffle", "flip", "point", "warp")
VIDEO_TRANSFORMS = ("speed", "normal", "point", "flip", "shuffle", "warp")
FPS = 16                             # of clips that have labels; pre-training takes every picture
FASTER = 3                           # speed of the sped-up videos of F2C2V
RATIOS = (1, 0.93, 1 / 0.93)         # of the labels in balanced training
PUBLISHED_WEIGHTS = (19670 / 18069, 19670 / 4137, 1.0)        # of the labels, clips 1 s apart
HALF = ((0.5,) * 3, (0.5 + 1e-8,) * 3)      # mean and std of timm's ViT; the ε is the release's
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
KINETICS = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
DENSE = 450                          # tokens up to which one masked attention beats blocks
PAD = -1
SHAPE = {"layers": 3, "heads": 16, "window": 32, "ff": 3072, "mlp": 1024, "positions": 7200}
common.FREE_FLAGS |= {"features", "list", "val_list", "allow_missing", "tolerance"}


# ---- arguments ---------------------------------------------------------------------------------

TESTS = ["localize", "evaluate"]
STAGES = ["f2c", "f2c2v", "features", "classify", *TESTS]
OF_CLIPS = ["r2plus1d_18", "r3d_18", "r2plus1d_152"]          # backbones with kernels in time
BACKBONES = ["vit_b16", "resnet50", "resnet18", *OF_CLIPS]


def parse_args(argv=None):
    p = common.Parser(__doc__, STAGES, ["oops"])
    p.data.add_argument("--list", type=Path, metavar="FILE",
                        help="names of the videos to pre-train on, .txt or .csv (default: "
                             "train_all_org.csv of --data, else its train.txt)")
    p.data.add_argument("--val_list", type=Path, metavar="FILE",
                        help="and of those to validate the pre-training on (default: "
                             "val_all_org.csv of --data, else its val.txt)")

    g = p.add_argument_group("clips")
    g.add_argument("--clip_len", type=int, default=20, metavar="L",
                   help="frames per clip of f2c, at the video's own rate (default: %(default)s, "
                        "configs/)")
    g.add_argument("--step", type=float, metavar="SECONDS",
                   help="from one labelled clip to the next; 0.25 at clip level, 1 at video level "
                        "(default: %(default)s, as released)")
    g.add_argument("--crops", choices=["half", "full"], default="half",
                   help="clips begin in the first half of the possible places, or anywhere "
                        "(default: %(default)s, as released)")

    g = p.add_argument_group("method")
    g.add_argument("--init", metavar="FILE",
                   help="weights to start from: none, or a file: ours or of the release's form "
                        "(default: none; else the run before in the chain)")
    g.add_argument("--transforms", type=str, metavar="LIST",
                   help="what the pre-training tells apart. f2c: "
                        f"{','.join(CLIP_TRANSFORMS)}; f2c2v: {','.join(VIDEO_TRANSFORMS)}; leave "
                        "some out for the ablations (default: all, as released)")
    for key, text, source in (
            ("layers", "layers of each encoder", "configs/"),
            ("heads", "heads of its attention", "configs/"),
            ("window", "tokens that attention reaches, half of them to each side", "configs/"),
            ("ff", "width of the feed-forward layers", "configs/"),
            ("mlp", "width of the head", "as released"),
            ("positions", "rows of the position table", "configs/")):
        g.add_argument(f"--{key}", type=int, metavar="N", help=f"{text} (default: {SHAPE[key]} or "
                       f"the checkpoint's, {source})")
    g.add_argument("--dropout", type=float, default=0.1, metavar="X",
                   help="share dropped in the encoders; 0: also none in the head, which has 0.2 "
                        "(default: %(default)s, configs/)")
    g.add_argument("--init_std", type=float, default=0.02, metavar="X",
                   help="standard deviation of the encoders' first weights (default: %(default)s, "
                        "Longformer's)")

    g = p.add_argument_group("features")
    g.add_argument("--features", type=Path, metavar="DIR",
                   help="features, in train/ and val/: written by --stage features, read by the "
                        "others")
    g.add_argument("--backbone", choices=BACKBONES, default=BACKBONES[0],
                   help="φ, frozen; the last three make vectors of clips, not of frames (default: "
                        "%(default)s, models/vit.py)")
    g.add_argument("--weights", metavar="W",
                   help="of φ: none, torchvision, timm (vit_b16: 21k, then 1k, as models/vit.py; "
                        "the official README says 21k) or a file; which of them the paper used is "
                        "unverified")
    g.add_argument("--naming", choices=["plain", "mp4"], default="plain",
                   help="files NAME.npz or NAME.mp4.npz; both are read (default: %(default)s, "
                        "ours; the release has both)")
    g.add_argument("--float16", action="store_true", help="half precision, half the size on disk")

    g = p.add_argument_group("classification", "localize and evaluate take --level, --loss and "
                             "--step from the checkpoint")
    g.add_argument("--level", choices=["clip", "video"],
                   help="one clip at a time, or all clips of a video (default: %(default)s, ours)")
    g.add_argument("--loss", choices=["ce", "crf", "regression"],
                   help="ce: cross entropy; crf: over a video's clips; regression: of the "
                        "transition time by one number per video (default: %(default)s, ours; "
                        "configs/ have crf at video level)")
    g.add_argument("--class_weights", choices=["none", "computed", "published"],
                   help="of the labels in ce. none: clip level, as released; computed: from the "
                        "training labels, ours at video level; published: transformer2x/vtn.py's")
    g.add_argument("--unbalanced", action="store_true",
                   help="clip level: without the copies of clips of rarer labels")
    g.add_argument("--freeze", action="store_true", help="train head and CRF alone")
    g.add_argument("--finetune_frames", action="store_true",
                   help="f2c2v and video level: the frame encoder learns, too")
    g.add_argument("--anticipate", type=float, metavar="SECONDS",
                   help="foresee the label of what follows so much later; 0.5, 1, 1.5 or 2 in the "
                        "official code, 1.5 in the benchmark; which the paper has is unverified")
    g.add_argument("--anticipate_protocol", choices=["paper", "oops"], default="paper",
                   help="which clips count, and how they are labelled (README); oops: the "
                        "benchmark's (default: %(default)s, the official code)")

    g = p.add_argument_group("optimization", "AdamW, gradients cut to norm 1")
    g.add_argument("--epochs", type=int, metavar="N",
                   help="passes over the training videos (default: %(default)s, configs/)")
    g.add_argument("--batch_size", type=int, metavar="N",
                   help="videos, at clip level clips, per step over all GPUs (default: "
                        "%(default)s, configs/; video level: the official code)")
    g.add_argument("--lr", type=float, metavar="X",
                   help="learning rate, first value; half a cosine to 1e-6, by epoch (default: "
                        "%(default)s, configs/)")
    g.add_argument("--weight_decay", type=float, default=1e-4, metavar="X",
                   help="on all parameters, norms and biases, too (default: %(default)s, configs/; "
                        "backbones of clips: r21d/mainr21d.py)")
    g.add_argument("--select", choices=["val", "last"], default="val",
                   help="best.pt is of the best validation, or of the last (default: %(default)s, "
                        "as published)")

    g = p.add_argument_group("evaluation")
    g.add_argument("--tolerance", type=float, nargs="+", default=[0.25, 1.0], metavar="SECONDS",
                   help="localization counts a time that is so near to one of the annotated "
                        "(default: %(default)s, the benchmark's)")
    g.add_argument("--allow_missing", action="store_true",
                   help="go on though some validation videos have no features")

    g = p.add_argument_group("faults of the release")
    g.add_argument("--compat", choices=["fixed", "released"], default="fixed",
                   help="released: with the faults of the release (README), for its checkpoints "
                        "(default: %(default)s, ours)")
    args = common.parse(p, recipe, argv)
    check(p, args)
    return args


def recipe(chosen):
    """Defaults of the published run that the flags name; smaller ones for --tiny."""
    stage, runs = chosen.stage, Path("runs")
    level, loss = chosen.level or "clip", chosen.loss or "ce"
    level = "video" if loss == "regression" else level
    before = {"f2c2v": "f2c", "classify": {"clip": "f2c", "video": "f2c2v"}[level]}.get(stage)
    data = chosen.data or Path("data") / chosen.dataset
    r = {"data": data, "features": data / "features" / chosen.backbone, "lr": 1e-4}
    if chosen.weights is None:
        r["weights"] = ("none" if chosen.tiny else "timm" if chosen.backbone == "vit_b16"
                        else "torchvision")
    if before and chosen.backbone in OF_CLIPS:
        r["init"] = "none"                                    # there is no encoder to start from
    elif before:
        r["init"] = str(runs / f"f2c_oops_{chosen.dataset}_{before}" / "best.pt")
    if stage in ("classify", *TESTS):
        seconds = f"_anticipate{chosen.anticipate:g}" if chosen.anticipate else ""
        kind = "_video" * (level == "video") + f"_{loss}" * (loss != "ce") + (
            f"_{chosen.backbone}" * (chosen.backbone in OF_CLIPS))
        folder = runs / f"f2c_oops_{chosen.dataset}_classify{kind}{seconds}"
        r |= {"out": folder} if stage == "classify" else {"init": str(folder / "best.pt")}
    if stage not in TESTS:                                    # these ask the checkpoint
        r |= {"level": level, "loss": loss, "step": 1.0 if level == "video" else 0.25}
        r["class_weights"] = ("none" if level == "clip" or loss != "ce" else "computed" if
                              chosen.compat == "fixed" or chosen.anticipate else "published")
    sequences = level == "video" or loss == "crf"
    r |= {"f2c": {"epochs": 100, "batch_size": 128}, "f2c2v": {"epochs": 100, "batch_size": 16},
          "classify": {"epochs": 50, "batch_size": 8 if sequences else 256}}.get(stage, {})
    if chosen.backbone in OF_CLIPS:
        r["weight_decay"] = 1e-8                              # r21d/mainr21d.py
    if chosen.tiny:
        r |= {"workers": 2, "log_every": 20, "save_every": 100, "lr": 1e-3, "dropout": 0.0}
        r |= {"f2c": {"epochs": 60, "batch_size": 16}, "f2c2v": {"epochs": 30, "batch_size": 8},
              "classify": {"epochs": 15 if sequences else 10}}.get(stage, {})
        if stage == "f2c" or (chosen.init or r.get("init")) == "none":
            r |= {"layers": 2, "heads": 4, "ff": 256, "mlp": 128, "positions": 1000}
        r |= {"init_std": 0.08}           # a narrow network attends sooner than with 0.02
    return r


def check(p, args):
    """Flags that do not go together."""
    allowed = VIDEO_TRANSFORMS if args.stage == "f2c2v" else CLIP_TRANSFORMS
    chosen = allowed if args.transforms is None else args.transforms.split(",")
    args.transforms = ",".join(n for n in allowed if n in chosen)
    crf, at_video = args.loss == "crf", args.level == "video"
    faults = {
        f"--transforms: two at least of {','.join(allowed)}, none twice":
            len(set(chosen)) < max(2, len(chosen)) or not set(chosen) <= set(allowed),
        f"--clip_len {args.clip_len}: must be at least 8": args.clip_len < 8,
        f"--positions {args.positions}: must be at least 3": (args.positions or 3) < 3,
        f"--step {args.step}: must be a multiple of 1/{FPS} s, above 0":
            args.step is not None and not (args.step > 0 and (args.step * FPS).is_integer()),
        f"--tolerance {args.tolerance}: must be seconds, 0 or more":
            not all(0 <= x < 1e6 for x in args.tolerance),
        f"--anticipate {args.anticipate}: must be seconds, above 0 and below 60":
            args.anticipate is not None and not 0 < args.anticipate < 60,
        f"--dropout {args.dropout}: must be below 1": not args.dropout < 1,
        "--loss regression is of whole videos (--level video), without --anticipate":
            args.loss == "regression" and bool(args.level == "clip" or args.anticipate),
        "--class_weights go with --loss ce": args.class_weights not in (None, "none")
            and args.loss in ("crf", "regression"),
        "--unbalanced goes with --level clip --loss ce": args.unbalanced and (crf or at_video),
        "--finetune_frames goes with --stage f2c2v and --level video":
            args.finetune_frames and args.stage == "classify" and not at_video,
        "--freeze and --finetune_frames exclude each other": args.freeze and args.finetune_frames,
        "--init: names a trained classifier": args.stage in TESTS and args.init == "none",
        "--anticipate has no time to localize": args.stage == "localize" and bool(args.anticipate)}
    for fault, there in faults.items():
        if there:
            p.error(fault)
    steps = (args.anticipate or 0) / (args.step or 1)
    if args.anticipate_protocol == "oops" and args.stage == "classify" and steps % 1:
        p.error(f"--anticipate {args.anticipate}: must be a multiple of --step {args.step} in the "
                "protocol of oops, which shows another clip")


# ---- annotations (official files: Oops annotations; resources/metadata/oops) --------------------

class Annotation(NamedTuple):
    """Transition times of a video by several annotators, sorted, -1 where one saw none; its
    length in seconds; the times relative to it.
    """
    t: tuple
    len: float
    rel_t: tuple


def checked(where, name):
    """NAME, if it can be the name of a file and nothing else."""
    bad = name in ("", ".", "..") or re.search(r"[/\\\x00-\x1f\ud800-\udfff]", name)
    if bad or len(name.encode()) > 230:                       # file systems take 255 bytes
        raise UserError(f"{where}: {name!r:.80} is no file name")
    return name


def read_names(path):
    """Names of videos, without .mp4: the rows of a .txt, the column `filename` of a .csv."""
    if path.suffix == ".csv":
        rows = [(row["_line"], row["filename"]) for row in common.read_table(path, ["filename"])]
    else:
        data = path.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            line = data[:e.start].count(b"\n") + 1
            raise UserError(f"{path}:{line}: is not in UTF-8") from e
        rows = [(n, r.rstrip("\r")) for n, r in enumerate(text.split("\n"), 1) if r.strip()]
    found = [checked(f"{path}:{line}", name.removesuffix(".mp4")) for line, name in rows]
    if not found:
        raise UserError(f"{path}: holds no names of videos")
    if len(set(found)) < len(found):
        common.say(f"note: {path}: {len(found) - len(set(found))} names stand there twice")
    return list(dict.fromkeys(found))


def read_notes(path, heldout=False):
    """{name: Annotation} of transition_times.json, or of heldout_transition_times.json, where one
    annotator gives one time, without a length (0 here) or a relative time.
    """
    table, notes, odd = common.read_json(path), {}, []
    if not isinstance(table, dict):
        raise UserError(f"{path}: holds no object of videos")
    for name, value in table.items():
        where = f"{path}: {checked(path, name)!r:.80}"
        if not isinstance(value, dict):
            raise UserError(f"{where}: is no object")
        t, fields = read_times(where, value, "t", 1 if heldout else 3), common.Fields(where, value)
        if heldout:
            notes[name.removesuffix(".mp4")] = Annotation(t, 0.0, ())
            continue
        length, rel_t = float(fields.number("len")), read_times(where, value, "rel_t", 3)
        if length <= 0:
            raise fields.fault("len", "is no length in seconds")
        if t[2] > length + 1 or max(abs(r * length - x) for r, x in zip(rel_t, t)) > 0.1:
            odd.append(name)
        notes[name.removesuffix(".mp4")] = Annotation(t, length, rel_t)
    if odd:
        common.say(f"warning: {path}: t, len and rel_t of {len(odd)} videos contradict each "
                   f"other, the first is {odd[0]!r:.80}")
    return notes


def read_times(where, value, key, count):
    """A sorted list of numbers of an entry."""
    x = value.get(key)
    if not isinstance(x, list) or len(x) != count:
        raise UserError(f"{where}.{key}: {x!r:.80} is no list of {count} numbers")
    fields = common.Fields(f"{where}.{key}", dict(enumerate(x)))
    return tuple(sorted(fields.number(i) for i in range(count)))


def names_of(args, part, labelled):
    """Names of the videos of a part, from its official list."""
    given = {"train": args.list, "val": args.val_list}[part]
    official = [f"{part}.txt", f"{part}.csv"] if labelled else [f"{part}_all_org.csv",
                                                                f"{part}.txt"]
    path = given if given and not labelled else next(
        filter(None, (common.find(args.data, name) for name in official)), None)
    if path is None or not path.is_file():
        raise UserError(f"{path or args.data / official[-1]}: no such file; it comes with the "
                        "official annotations")
    return read_names(path)


def official_counts(notes, names):
    """What the release's loss weights and the benchmark's chance row tell of the official files:
    {what: (published, ours from the lengths alone)}.
    """
    published = {16: (18069, 4137, 19670), 4: (61320, 16097, 83023)}
    checks = {}
    for step, level in ((16, "video"), (4, "clip")):
        counts = np.zeros(3, int)
        for note in (notes[n] for n in names["train"] if n in notes):
            if usable(note, "train", level):
                T = int(note.len * FPS)
                _, spans = cut_clips(T, FPS, np.arange(T) / FPS, step)
                counts += np.bincount(run_labels(spans, note.t[1], released=True), minlength=3)
        for c, label in enumerate(LABELS):
            checks[f"{label} clips {step / FPS:g} s apart"] = published[step][c], int(counts[c])
    val = [notes[n] for n in names["val"] if n in notes and usable(notes[n], "val", "clip")]
    checks["chance localization, %"] = 6.80, 100 * float(np.mean(
        [chance(v.len, v.t[1], 0.25) for v in val]))
    return checks


def self_check(notes, names):
    """Print how far `official_counts` are off, where these are the official annotations."""
    if len(notes) != 10961:
        return
    for what, (published, ours) in official_counts(notes, names).items():
        off = abs(ours - published) > (0.05 if "chance" in what else 0.005 * published)
        common.say(f"self-check {'DIFFERS' if off else 'ok'}: {what}: published {published}, "
                   f"from the annotations {ours:.6g} ({100 * (ours / published - 1):+.2f} %)")


# ---- feature files ------------------------------------------------------------------------------

class Video(NamedTuple):
    """A video's feature file: T vectors of D numbers, when they are seen, and its annotation.

    dtype, offset: how and where they lie in the file; offset None: packed, to be read as a whole.
    times: (T,) seconds of the frames; spans: (T, 2), where the vectors are of clips, else None.
    """
    name: str
    path: str
    frames: int
    dim: int
    dtype: str
    offset: int
    fps: float
    times: np.ndarray
    spans: np.ndarray
    note: Annotation


def video_file(args, part, name):
    """Where a video lies in the official folders."""
    return args.data / "oops_video" / part / f"{name}.mp4"


@contextlib.contextmanager
def readable(path):
    """Whatever is wrong with a feature file becomes a VideoError."""
    try:
        yield
    except VideoError:
        raise
    except Exception as e:                                    # zip, lzma, tokenize, NumPy's own ...
        why = " ".join(str(e).split())[:80] or type(e).__name__
        raise VideoError(f"{path}: no feature file ({why})") from e


@functools.lru_cache(4096)
def npy_header(data):
    """(shape, order, data type) of an .npy file's first bytes: NumPy parses Python, slowly."""
    f = io.BytesIO(data)
    return {(1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0}[np.lib.format.read_magic(f)](f)


def array(z, name):
    """An array of an archive; objects are refused."""
    data = z.read(f"{name}.npy")
    start = header_size(data)
    shape, fortran, dtype = npy_header(data[:start])
    if fortran or dtype.hasobject:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)


def header_size(data):
    """Of an .npy file's first bytes."""
    return 10 + int.from_bytes(data[8:10], "little") if data[6:7] == b"\x01" else (
        12 + int.from_bytes(data[8:12], "little"))


def layout(z):
    """(shape, data type, offset in the file or None) of the features of an archive."""
    info = z.getinfo("arr_0.npy")
    with z.open(info) as f:
        data = f.read(12)
        inside = header_size(data)
        shape, fortran, dtype = npy_header(data + f.read(inside - 12))
    if len(shape) != 2 or 0 in shape or dtype.kind != "f":
        raise ValueError(f"arr_0 is {dtype} {shape}, not T vectors of D numbers")
    if info.compress_type != zipfile.ZIP_STORED or fortran:
        return shape, dtype, None
    z.fp.seek(info.header_offset + 26)                        # of the local header
    name, extra = struct.unpack("<HH", z.fp.read(4))
    return shape, dtype, info.header_offset + 30 + name + extra + inside


def look(path, video, name, note=None):
    """A Video from its feature file; times only with an annotation. Files that lack them take them
    from the video itself, which may have up to two pictures more or less.
    """
    with readable(path), zipfile.ZipFile(path) as z:
        (T, D), dtype, offset = layout(z)
        there = {n.removesuffix(".npy") for n in z.namelist()}
        spans = array(z, "spans") if "spans" in there else None
        times, fps = None, 0.0
        if note and spans is None and {"times", "fps"} <= there:
            times, fps = array(z, "times"), float(array(z, "fps"))
        elif note and spans is None:
            if not video.is_file():
                raise VideoError(f"{path}: has no times, and {video} is not there to take them "
                                 "from")
            times, fps = common.clock(video)
            if abs(len(times) - T) > 2:
                raise VideoError(f"{path}: has {T} vectors, {video} {len(times)} pictures")
            T = min(T, len(times))
            times = times[:T]
        for x, shape in ((times, (T,)), (spans, (T, 2))):
            if x is not None and (x.shape != shape or x.dtype.kind not in "fiu"
                                  or not np.isfinite(x).all() or not -1 < x.min() < x.max()
                                  or (np.diff(x, axis=0) < 0).any()):
                raise ValueError("its times do not fit its vectors, or do not ascend")
        if times is not None and not 0.2 < fps * np.median(np.diff(times)) < 5:
            raise ValueError(f"its times are not those of {fps} pictures per second")
    made = Video(name, str(path), T, D, dtype.str, offset, fps, times, spans, note)
    if note and not len(cut(made, 4)[0]):
        raise VideoError(f"{path}: is shorter than a clip of one second")
    return made


def read_rows(video, rows):
    """Vectors `rows` of a video's feature file, float32: only these are read.   (n,) -> (n, D)"""
    with readable(video.path):
        if video.offset is None:
            with zipfile.ZipFile(video.path) as z:
                x = array(z, "arr_0")
        else:
            x = np.memmap(video.path, video.dtype, "r", video.offset, (video.frames, video.dim))
        with np.errstate(over="ignore"):                      # of float64: found below
            x = torch.from_numpy(x[rows].astype(np.float32))
    if not torch.isfinite(x).all():
        raise VideoError(f"{video.path}: holds NaN or Inf")
    return x


@common.no_collector()
def listing(folder, stamped):
    """{file: [bytes, time]} of a folder's .npz files; {file: None} if not `stamped`."""
    found = {}
    with os.scandir(folder) if folder.is_dir() else contextlib.nullcontext([]) as entries:
        for e in entries:
            if e.name.endswith(".npz"):
                try:
                    found[e.name] = [e.stat().st_size, e.stat().st_mtime_ns] if stamped else None
                except FileNotFoundError:                     # just gone
                    continue
    return found


@common.no_collector()
def read_index(folder, here):
    """{file: [bytes, time, T, D, dtype, offset]} of feature files that hold vectors of pictures
    and are as they were. Files that are packed, so without an offset, are not in it.
    """
    try:
        index = json.loads((folder / "index.json").read_bytes())
        form = [int, int, str, int]
        return {f: row for f, row in index.items() if here.get(f) == row[:2]
                and [type(x) for x in row[2:]] == form and min(row[2], row[3]) > 0 <= row[5]
                and row[4] in ("<f2", "<f4", "<f8")}          # no objects: these run code
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}                                             # not there, or not ours: made anew


def write_index(folder, index, videos):
    """Bring index.json up to date, where the folder can be written. videos: [(Video, stamp)]"""
    new = {v.path.rpartition("/")[2]: [*stamp, v.frames, v.dim, v.dtype, v.offset]
           for v, stamp in videos if stamp and v.spans is None and v.offset is not None}
    if new:
        with contextlib.suppress(UserError):
            common.write(folder / "index.json", json.dumps({**index, **new}))


def look_at_all(args, part, folder, chosen, notes):
    """[Video, or what is wrong] of the videos of these names, shared among the processes.

    Without annotations, what `look` finds is kept in index.json beside the files, so that a file
    is opened again only when it has changed: there may be many.
    """
    here = listing(folder, stamped=notes is None)
    index = read_index(folder, here) if notes is None else {}

    def file_of(name):
        return next((f for f in (f"{name}.npz", f"{name}.mp4.npz") if f in here), "")

    def examine(name):                                        # -> (Video or fault, stamp to keep)
        file, video = file_of(name), video_file(args, part, name)
        if not file:
            return f"{folder / name}.npz: no such file", None
        try:
            return look(folder / file, video, name, (notes or {}).get(name)), here[file]
        except VideoError as e:
            return str(e), None

    mine, found = range(common.rank(), len(chosen), common.world_size()), {}
    with common.no_collector():
        for i in mine:
            row = index.get(file_of(chosen[i]))
            if row:
                found[i] = Video(chosen[i], f"{folder}/{file_of(chosen[i])}", *row[2:], 0.0, None,
                                 None, None), None
    rest = [i for i in mine if i not in found]
    with ThreadPoolExecutor(16) as pool:                      # on a network disk each file waits
        found |= zip(rest, pool.map(examine, (chosen[i] for i in rest)))
    found = common.gather(found, expect=len(chosen)).values()
    if common.rank() == 0:
        write_index(folder, index, [(v, s) for v, s in found if isinstance(v, Video)])
    return [v for v, _ in found]


def scan(args, part, notes=None):
    """The videos of a part that have features, as [Video]; with annotations only labelled ones.

    Training goes on without a file that is missing or broken, and says how many there are;
    evaluation stops, unless --allow_missing.
    """
    chosen = names_of(args, part, notes is not None)
    chosen = (chosen if notes is None else with_labels(args, part, chosen, notes))[:args.limit]
    folder = args.features / part if (args.features / part).is_dir() else args.features
    found = look_at_all(args, part, folder, chosen, notes)
    videos = [x for x in found if isinstance(x, Video)]
    faults = [x for x in found if not isinstance(x, Video)]
    if not videos:
        raise UserError(f"{folder}: holds no features of the {part} videos; --stage features makes "
                        f"them ({faults[0]})")
    if faults and part == "val" and notes is not None and not args.allow_missing:
        raise UserError(f"{faults[0]} ({len(faults)} of {len(chosen)} validation videos; "
                        "--allow_missing leaves them out)")
    same_kind(videos)
    other = [v for v in videos if v.times is not None and abs(v.times[-1] - v.note.len) > 1]
    if other:
        common.say(f"warning: {len(other)} of the {part} videos are not as long as annotated, the "
                   f"first is {other[0].path}: {other[0].times[-1]:.2f} s, not {other[0].note.len}")
    common.say(f"{part}: {len(videos)} of {len(chosen)} videos have features"
               + "".join(f"; the first without: {fault}" for fault in faults[:1]))
    return videos


def with_labels(args, part, chosen, notes):
    """Those of the names that have usable labels; says how many have not, and why."""
    annotated = [n for n in chosen if n in notes]
    good = [n for n in annotated if usable(notes[n], part, args.level)]
    unseen = sum(notes[n].t[1] < 0 for n in annotated)
    common.say(f"{part}: {len(chosen)} videos, {len(annotated)} annotated, {len(good)} usable "
               f"(in {unseen} two annotators saw no transition; the others: too near to an end of "
               "the video, or by its length)")
    if not good:
        raise UserError(f"{args.data}: none of the {len(chosen)} names of the {part} list has "
                        "usable times in transition_times.json")
    return good


def same_kind(videos):
    """Refuse features of different networks."""
    kinds = {}
    for v in videos:
        kinds.setdefault((f"of {'pictures' if v.spans is None else 'clips'}", v.dim), v.path)
    (first, *others) = kinds.items()
    for (what, dim), path in others:
        raise UserError(f"{path}: its features are {what}, {dim} numbers, those of {first[1]} "
                        f"{first[0][0]}, {first[0][1]} numbers")


def cut(video, step):
    """Clips of a Video: rows of its feature file (N, 16), or (N, 1) of clips, and their spans."""
    if video.spans is None:
        return cut_clips(video.frames, video.fps, video.times, step)
    if step % 4:
        raise UserError(f"--step {step / FPS:g}: {video.path} has clips 0.25 s apart")
    return np.arange(video.frames)[::step // 4, None], video.spans[::step // 4]


# ---- features of frames (official files: dataloaders/dl_utils.py, utils/py12transforms.py) ------

def normalise(x, mean, std):
    """uint8 (n, H, W, 3) -> (n, 3, H, W) float."""
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (mean, std))
    return (x.permute(0, 3, 1, 2) / 255 - mean) / std


def clip_pictures(x, size=(128, 171), crop=112):
    """Pictures for a 3-D network: scaled without antialiasing, normalised, the centre cut out.

    uint8 (T, H, W, 3) -> (T, 3, crop, crop)
    """
    x = F.interpolate(x.permute(0, 3, 1, 2) / 255, size, mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v)[:, None, None] for v in KINETICS)
    top, left = (round((s - crop) / 2) for s in size)
    return ((x - mean) / std)[..., top:top + crop, left:left + crop]


# ---- transformations of a clip (official file: dataloaders/oops_ttibua_loader.py) ---------------

def random_start(rng, n, size, reach="half"):
    """First of `size` consecutive frames out of n.

    NOTE: the release draws from the first half of the possible places, so that a crop hardly ever
    reaches a video's end; `reach` full draws from all of them.
    """
    return int(rng.integers((n - size) // (2 if reach == "half" else 1) + 1))


def max_speed(T, size):
    """The largest M <= 3 for which T frames hold a clip of `size` frames, each 2^M apart."""
    return int(min(math.log2(T / size), 3))


def speed_up(T, k, start, size):
    """`size` of the frames 0, 2^k, 2·2^k, ..., from number `start` of these on."""
    return np.arange(0, T, 2 ** k)[start:start + size]


def shuffle(start, order):
    """The frames from `start` on in another order. NOTE: the release shuffles 19 of 20."""
    return start + np.asarray(order)


def double_flip(start, offset, size):
    """Forward, then back: part of x_1 ... x_L x_L ... x_1."""
    x = start + np.arange(size)
    return np.concatenate([x, x[::-1]])[offset:offset + size]


def random_point(normal, fast, offset, size):
    """Frames at normal speed, from a random point on sped-up ones."""
    return np.concatenate([normal, fast])[offset:offset + size]


def warp(start, steps=None, order=None, size=20):
    """Frames at uneven distances: after each of the `steps`, or the sorted first of an `order`."""
    picked = np.cumsum(steps) if steps is not None else np.sort(order[:size])
    return start + picked


def warp_extent(T, M, size, released):
    """(frames that a warp chooses from, is it by steps?).

    NOTE: the release crops 19·2^M frames, of which steps may lead out (it crashes then), and which
    are 19, all of them, for M = 0: no warp, and its length betrays it. We choose from 20·2^M; for
    M <= 1 from up to 40, so that short videos are warped as well.
    """
    if released:
        return (size - 1) * 2 ** M, M > 1
    return (size * 2 ** M, True) if M > 1 else (min(T, 2 * size), False)


def draw_clip_choices(rng, T, names, size=20, reach="half", released=False):
    """Everything random about the transformed clips of a video of T > size frames."""
    M = max_speed(T, size)
    speeds = [k for k in range(M + 1) if SPEEDS[k] in names]
    c = {"speed": int(rng.choice(speeds or M + 1)), "sped": bool(speeds)}
    left = len(range(0, T, 2 ** c["speed"]))
    c["speed_start"] = random_start(rng, left, size, reach) if left > size else 0
    c["normal_start"] = random_start(rng, T, size, reach)
    c["shuffle_start"] = random_start(rng, T, size, reach)
    c["shuffle_order"] = rng.permutation(size - released)
    c["flip_start"] = random_start(rng, T, size, reach)
    c["flip_offset"] = int(rng.integers(2, size))
    c["point_offset"] = int(rng.integers(5, max(6, size - 4)))
    extent, by_steps = warp_extent(T, M, size, released)
    c["warp_start"] = random_start(rng, T, extent, reach)
    steps, order = rng.integers(1, 2 ** M + 1, size), rng.permutation(extent)
    if by_steps and released:                                 # NOTE: clamped, not crashed
        steps = np.diff(np.minimum(np.cumsum(steps), T - 1 - c["warp_start"]), prepend=0)
    elif by_steps:
        steps[0] -= 1                                         # the first frame of the crop, too
    c["warp"] = {"steps": steps} if by_steps else {"order": order}
    return c


def transform_clips(T, c, names, size=20):
    """[(name, frames)] of the transformed clips of a video, for the choices `c`, in the order of
    the release: sped up, normal, shuffled, flipped, from a random point on, warped.
    """
    fast = speed_up(T, c["speed"], c["speed_start"], size)
    normal = c["normal_start"] + np.arange(size)
    made = [(SPEEDS[c["speed"]], fast)] if c["sped"] else []
    made += [("normal", normal), ("shuffle", shuffle(c["shuffle_start"], c["shuffle_order"])),
             ("flip", double_flip(c["flip_start"], c["flip_offset"], size)),
             ("point", random_point(normal, fast, c["point_offset"], size)),
             ("warp", warp(c["warp_start"], **c["warp"], size=size))]
    return [(name, frames) for name, frames in made if name in names]


# ---- transformations of a video (official file: dataloaders/oops_ttibua_loader.py) --------------

def split_clips(frames, size=16):
    """Cut a sequence of frames into clips, the rest dropped.    (n,) -> (n // size, size)"""
    return frames[:len(frames) // size * size].reshape(-1, size)


def long_enough(T, size=16):
    """Has a sped-up video at least four clips?"""
    return T > 4 * FASTER * size


def split_points(T, size=16):
    """Where a video may be turned round or cut in two: from a quarter to three quarters of it."""
    whole = T // size * size
    return range(int(0.25 * whole), int(0.75 * whole), size)


def draw_video_choices(rng, T, size=16, released=False):
    """Everything random about the transformed versions of a video of T >= size frames."""
    c = {"speed": not released or rng.integers(7) < 2}        # NOTE: 2 of 7 times in the release
    for name in ("flip", "warp"):
        c[name] = int(rng.choice(split_points(T, size)))
    c["order"] = rng.permutation(T // size)
    return c


def transform_video(T, c, names, size=16):
    """[(name, frames (N, size))] of the transformed versions of a video, for the choices `c`."""
    x, long = np.arange(T // size * size), long_enough(T, size)
    half = len(x) // size // 2 * size
    made = [("speed", split_clips(x[::FASTER], size))] if long and c["speed"] else []
    made += [("normal", split_clips(x, size))]
    made += [("point", np.concatenate([split_clips(x[:half], size),
                                       split_clips(x[half::FASTER], size)]))] if long else []
    made += [("flip", split_clips(np.concatenate([x[:c["flip"]], x[c["flip"]:][::-1]]), size)),
             ("shuffle", split_clips(x, size)[c["order"]]),
             ("warp", split_clips(np.concatenate([x[c["warp"]:], x[:c["warp"]]]), size))]
    return [(name, clips) for name, clips in made if name in names]


def possible(T, names, video, size, released=False):
    """Do T frames suffice for one of the named transformations, whatever is drawn?"""
    if video:
        always = {"normal", "flip", "shuffle", "warp"} | (
            set() if not long_enough(T) else {"point"} if released else {"point", "speed"})
        return T >= 16 and not always.isdisjoint(names)
    slow = {SPEEDS[k] for k in range(max_speed(T, size) + 1)} if T > size else set()
    return T > size and not ({*CLIP_TRANSFORMS[4:], *slow}).isdisjoint(names)


def label_of(name, names, released=False):
    """Number of a transformation. NOTE: F2C2V as released gives the random point the label of the
    double flip, 3, and 2 to nobody (which it does only for the whole list).
    """
    if released and name == "point" and len(names) == len(VIDEO_TRANSFORMS):
        name = "flip"
    return names.index(name)


# ---- clips and their labels (official files: transformer2x/my_oops_loader.py, Oops dataloader.py)

def cut_clips(T, fps, times, step):
    """Clips of 16 frames on a grid of 16 fps: frames (N, 16), first and last second (N, 2).

    step: positions of the grid from one clip to the next, 4 or 16 for 0.25 and 1 s. Position k is
    frame ⌊k·fps/16⌋; T frames have ⌊16·T/fps⌋ positions. A tail shorter than a clip is dropped.
    NOTE: the release goes from frames to times and back, now and then one frame early.
    """
    ratio = float(fps) / FPS
    if ratio.is_integer():
        grid = np.arange(0, T, int(ratio))
    else:
        k = np.arange(math.floor(T * float(FPS) / float(fps)), dtype=np.float32)
        grid = np.floor(k * np.float32(ratio)).astype(np.int64)
    starts = np.arange(0, len(grid) - FPS + 1, step)
    frames = grid[starts[:, None] + np.arange(FPS)].reshape(-1, FPS)          # (N, 16)
    return frames, np.asarray(times)[frames[:, [0, -1]]].reshape(-1, 2)


def raw_labels(spans, t):
    """Of each clip by itself: 1 if it holds the time t, 2 if it begins after t, else 0."""
    start, stop = spans.T
    return np.where((start <= t) & (t <= stop), 1, np.where(start > t, 2, 0))


def run_labels(spans, t, released=False):
    """Labels 0 ... 0 1 ... 1 2 ... 2 of a video's clips, from its transition time t.

    NOTE: as released a video is all 0 if t falls between two clips (4 of 100 when these lie 1 s
    apart); we give the clip nearer to t the label 1. After the last clip both are all 0.
    """
    labels = raw_labels(spans, t)
    if not (labels == 1).any():
        if released or not (labels == 2).any():
            return np.zeros_like(labels)
        labels[np.abs(spans - t).min(1).argmin()] = 1
    first, out = int((labels == 1).argmax()), np.zeros_like(labels)
    out[first:] = 1
    after = np.flatnonzero(labels[first:] == 2)
    if len(after):
        out[first + after[0]:] = 2
    return out


def anticipation(spans, t, ahead, protocol, step, released=False):
    """(which clips are shown, their labels) to foresee what is `ahead` seconds later.

    paper: every clip is labelled as if it were seen `ahead` seconds later, each by itself. oops,
    the benchmark's: the clip `ahead` seconds before one, with that one's label; clips without such
    a predecessor are left out.
    """
    if protocol == "paper":
        return np.arange(len(spans)), raw_labels(spans + ahead, t)
    back = round(ahead * FPS / step)
    return np.arange(max(0, len(spans) - back)), run_labels(spans, t, released)[back:]


def balanced(labels, rng):
    """Clips of one video for training: all, then copies of the rarer labels, cycling through them
    in a random order, until they are as many as the most frequent one times RATIOS.
    """
    counts = [int((labels == c).sum()) for c in range(3)]
    most = max(counts)
    picked = [np.arange(len(labels))]
    for c, (n, ratio) in enumerate(zip(counts, RATIOS)):
        if 0 < n and c != counts.index(most):
            copies = max(0, round(n * (most * ratio / n - 1)))
            picked.append(np.resize(rng.permutation(np.flatnonzero(labels == c)), copies))
    return np.concatenate(picked)


def usable(note, part, level):
    """Has a video labels? Not without a middle annotation well inside of it, nor by its length."""
    shortest, longest = (3.0, math.inf) if (part, level) == ("train", "video") else (3.2, 30.0)
    inside = note.t[1] >= 0 and 0.01 <= statistics.median(note.rel_t) <= 0.99
    return inside and shortest <= note.len <= longest


# ---- model (official files: models/pm_vtn.py, transformer2x/vtn.py) -----------------------------

class Layer(nn.Module):
    """One layer of the Longformer (arXiv:2004.05150): each frame attends to its neighbours and to
    the class token, the class token to all, by projections of its own. Norm after the sum.
    """

    def __init__(self, dim, heads, window, ff, dropout):
        super().__init__()
        self.heads, self.reach, self.p = heads, window // 2, dropout          # reach: one-sided
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.query_global, self.key_global, self.value_global = (
            nn.Linear(dim, dim) for _ in range(3))
        self.out, self.norm1 = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=1e-12)
        self.fc1, self.fc2 = nn.Linear(dim, ff), nn.Linear(ff, dim)
        self.norm2, self.drop = nn.LayerNorm(dim, eps=1e-12), nn.Dropout(dropout)

    def near(self, h, seen):
        """Attention of every token over its neighbours and the class token: (B, n, E)."""
        q, k, v = (p(h).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for p in (self.query, self.key, self.value))               # (B, H, n, E/H)
        p = self.p if self.training else 0.0
        attend = whole_attention if h.shape[1] <= DENSE else block_attention
        return attend(q, k, v, seen, self.reach, p).transpose(1, 2).flatten(2)

    def far(self, h, seen):
        """Attention of the class token over all tokens: (B, 1, E).

        With one query, q·(W h_j + b) = (Wᵀq)·h_j + q·b and Σ a_j (V h_j + b) = V Σ a_j h_j +
        b Σ a_j: keys and values need not be computed for every token.
        """
        q = self.query_global(h[:, 0]).unflatten(1, (self.heads, -1))         # (B, H, d)
        W, V = (x.weight.unflatten(0, q.shape[1:]) for x in (self.key_global, self.value_global))
        b, c = (x.bias.unflatten(0, q.shape[1:]) for x in (self.key_global, self.value_global))
        score = torch.einsum("bhd,hde->bhe", q, W) @ h.mT + (q * b).sum(2, keepdim=True)
        score = score.float() / q.shape[2] ** 0.5                             # (B, H, n)
        if seen is not None:
            score = score.masked_fill(~seen[:, None], -math.inf)
        a = self.drop(score.softmax(2)).to(h.dtype)
        mixed = torch.einsum("bhe,hde->bhd", a @ h, V)
        return (mixed + c * a.sum(2, keepdim=True)).flatten(1)[:, None]

    def forward(self, h, seen=None, only_class=False):
        """(B, n, E) -> the same; only_class: (B, 1, E), the one row that will be read."""
        rows = self.far(h, seen)
        if only_class:
            h = h[:, :1]
        else:
            rows = torch.cat([rows, self.near(h, seen)[:, 1:]], 1)
        h = self.norm1(self.drop(self.out(rows)) + h)
        return self.norm2(self.drop(self.fc2(F.gelu(self.fc1(h)))) + h)


def whole_attention(q, k, v, seen, reach, p=0.0):
    """softmax(q·k/√d) v over |i - j| <= reach and j = 0, of tokens that may be seen.

    q, k, v: (B, H, n, d); seen: (B, n) bool or None; p: dropout.
    """
    i = torch.arange(q.shape[2], device=q.device)
    mask = ((i[:, None] - i).abs() <= reach) | (i == 0)                       # (n, n)
    if seen is not None:
        mask = (mask & seen[:, None])[:, None]                                # (B, 1, n, n)
    return F.scaled_dot_product_attention(q, k, v, mask, p)


def block_attention(q, k, v, seen, reach, p=0.0):
    """The same in memory and time linear in n: blocks of queries, each with its own block of keys,
    the two beside it, and the class token.
    """
    B, _, n, _ = q.shape
    size = max(reach, 64)
    blocks = -(-n // size)
    tail = blocks * size - n
    seen = q.new_ones(1, n, dtype=torch.bool) if seen is None else seen

    def around(x):                                            # (..., n, d) -> (..., blocks, 3s, d)
        return F.pad(x, (0, 0, size, size + tail)).unfold(-2, 3 * size, size).mT

    i = torch.arange(size, device=q.device)[:, None]
    j = torch.arange(3 * size, device=q.device) - size
    there = around(seen[..., None].float())[..., 0].bool()                    # (B, blocks, 3s)
    there[:, 0, :size + 1] = False                            # the class token has its own column
    if blocks > 1:
        there[:, 1, 0] = False                                # the second block reaches it, too
    mask = ((i - j).abs() <= reach) & there[:, :, None]                       # (B, blocks, s, 3s)
    mask = F.pad(mask, (1, 0), value=True)[:, None]           # (B, 1, blocks, s, 1 + 3s)
    k, v = (torch.cat([x[:, :, None, :1].expand(-1, -1, blocks, -1, -1), around(x)], 3)
            for x in (k, v))                                  # (B, H, blocks, 1 + 3s, d)
    q = F.pad(q, (0, 0, 0, tail)).unflatten(2, (blocks, size))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))            # (B·blocks, H, s, d)
    mask = mask.expand(B, *mask.shape[1:]).transpose(1, 2).flatten(0, 1)      # (B·blocks, 1, s, ·)
    out = F.scaled_dot_product_attention(q, k, v, mask, p).unflatten(0, (B, blocks))
    return out.transpose(1, 2).flatten(2, 3)[:, :, :n]                        # (B, H, n, d)


class Encoder(nn.Module):
    """Class token and frames, or clips, through the layers ("VTN", models/pm_vtn.py).

    NOTE: the release pads to a multiple of twice the window, 21 tokens to 64; that changes nothing
    and is left out.
    """

    def __init__(self, dim, layers=3, heads=16, window=32, ff=3072, positions=7200, dropout=0.1,
                 init_std=0.02):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Embedding(positions, dim, padding_idx=positions - 1)
        self.kind = nn.Embedding(2, dim)                      # 1: the class token, 0: the others
        self.norm, self.drop = nn.LayerNorm(dim, eps=1e-12), nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(dim, heads, window, ff, dropout) for _ in range(layers))
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=init_std)
                if isinstance(m, nn.Linear):
                    nn.init.zeros_(m.bias)
        nn.init.zeros_(self.position.weight[-1:].detach())

    def forward(self, x, lengths=None, every=False):
        """x: (B, n, E); lengths: (B,), how many rows of x may be seen, None: all.

        Returns the class token's row (B, E), or `every` row (B, 1 + n, E), of which those past the
        lengths mean nothing.
        """
        B, n, _ = x.shape
        last = self.position.num_embeddings - 2
        place = torch.arange(n, device=x.device) % last
        place = torch.cat([place.new_tensor([last]), place])  # the class token comes first
        kind = (place == last).long()
        h = torch.cat([self.cls_token.expand(B, -1, -1).to(x.dtype), x], 1)   # (B, 1 + n, E)
        h = self.drop(self.norm(h + self.position(place) + self.kind(kind)))
        seen = None
        if lengths is not None:
            seen = torch.arange(1 + n, device=x.device) <= lengths[:, None]
        for layer in self.layers[:-1]:
            h = layer(h, seen)
        h = self.layers[-1](h, seen, only_class=not every)
        return h if every else h[:, 0]


def head(dim, mlp, classes, dropout):
    """Classifier of an embedding; places in it are those of the release."""
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, mlp), nn.GELU(),
                         nn.Dropout(0.2 if dropout else 0.0), nn.Linear(mlp, classes))


def restack(rows, order):
    """Rows (U, ...) in the order of each video's clips, zeros where that is PAD: (B, N, ...)."""
    stacked = rows[order.clamp(min=0)]
    return stacked * (order != PAD).view(*order.shape, *[1] * (rows.dim() - 1)).to(rows.dtype)


def quieten(model):
    """After `.train()`: encoders that do not learn have no dropout. NOTE: as released, they do."""
    for part in model.children():
        if isinstance(part, Encoder) and not part.cls_token.requires_grad and not model.released:
            part.eval()
    return model


class F2C(nn.Module):
    """Frames to clip: Enc_frame and a head.

    NOTE: `released` counts the class token among the L frames that may be seen, so that the last
    frame is never seen; but with a CRF, by another fault of it, all are.
    """

    takes = "length"                                          # beside the clips, of a batch

    def __init__(self, dim, classes, mlp=1024, released=False, crf=False, dropout=0.1, **shape):
        super().__init__()
        self.released, self.hide_last = released, released and not crf
        self.frames = Encoder(dim, dropout=dropout, **shape)
        self.head = head(dim, mlp, classes, dropout)
        self.crf = CRF(classes) if crf else None
        for part in (self.frames.layers[-1].query, self.frames.layers[-1].key,
                     self.frames.layers[-1].value):
            part.requires_grad_(False)                        # only the class token's row is read

    def embed(self, x, lengths=None):
        """Clip embeddings z.    x: (B, L, D), lengths: (B,) -> (B, D)"""
        if self.hide_last:
            full = torch.full((len(x),), x.shape[1], device=x.device)
            lengths = (full if lengths is None else lengths) - 1
        return self.frames(x.float(), lengths)

    def train(self, mode=True):
        return quieten(super().train(mode))

    def forward(self, x, lengths=None):
        """Logits of each clip, (B, C)."""
        return self.head(self.embed(x, lengths))


class F2C2V(nn.Module):
    """Clips to video: Enc_frame, from F2C and frozen, Enc_clip and a head.

    per_clip: logits of every clip, else of the video. tune: Enc_frame learns, too. NOTE: as
    `released` the last clip of a video is never seen, and the logits of clip j are read from the
    row of clip j - 1, those of the first from the class token; the dropout of Enc_frame, frozen as
    it is, stays active.
    """
    takes = "order"

    def __init__(self, dim, classes, mlp=1024, released=False, crf=False, per_clip=False,
                 tune=False, dropout=0.1, **shape):
        super().__init__()
        self.released, self.per_clip, self.tune = released, per_clip, tune
        self.hide_last = released
        self.frames, self.clips = (Encoder(dim, dropout=dropout, **shape) for _ in range(2))
        self.head = head(dim, mlp, classes, dropout)
        self.crf = CRF(classes) if crf else None
        self.frames.requires_grad_(tune)
        for part in [self.frames.layers[-1]] + [self.clips.layers[-1]] * (not per_clip):
            for p in (part.query, part.key, part.value):
                p.requires_grad_(False)                       # only the class token's row is read

    embed = F2C.embed

    def train(self, mode=True):
        return quieten(super().train(mode))

    def forward(self, x, order):
        """x: (U, 16, D) clips; order: (B, N), which of them each video consists of, then PAD.

        Returns (B, C), or, per clip, (B, N, C).
        """
        with torch.set_grad_enabled(self.tune and torch.is_grad_enabled()):
            z = self.embed(x)                                 # (U, D)
        z, n = restack(z, order), (order != PAD).sum(1)       # (B, N, D), (B,)
        v = self.clips(z, n - int(self.released), every=self.per_clip)
        if self.per_clip:
            v = v[:, :-1] if self.released else v[:, 1:]      # (B, N, D)
        return self.head(v)


class CRF(nn.Module):
    """Scores of label sequences: a (start), b (end), A (transitions, from row to column)."""

    def __init__(self, tags):
        super().__init__()
        self.start_transitions = nn.Parameter(torch.empty(tags).uniform_(-0.1, 0.1))
        self.end_transitions = nn.Parameter(torch.empty(tags).uniform_(-0.1, 0.1))
        self.transitions = nn.Parameter(torch.empty(tags, tags).uniform_(-0.1, 0.1))

    def forward(self):
        return self.start_transitions, self.end_transitions, self.transitions


def crf_score(q, y, n, a, b, A):
    """s(q, y) = a_y1 + b_yn + Σ_j q_j[y_j] + Σ_j>1 A[y_j-1, y_j].

    q: (B, N, K) logits, y: (B, N) labels, n: (B,) lengths >= 1 -> (B,)
    """
    there = torch.arange(q.shape[1], device=q.device) < n[:, None]            # (B, N)
    y = y.masked_fill(~there, 0)
    emitted = (q.gather(2, y[..., None])[..., 0] * there).sum(1)
    passed = (A[y[:, :-1], y[:, 1:]] * there[:, 1:]).sum(1)
    last = y.gather(1, n[:, None] - 1)[:, 0]
    return a[y[:, 0]] + b[last] + emitted + passed


def crf_log_partition(q, n, a, b, A):
    """log Σ_y exp s(q, y) over all sequences of n labels, by the forward recursion: (B,)"""
    alpha = a + q[:, 0]                                                       # (B, K)
    for j in range(1, q.shape[1]):
        following = torch.logsumexp(alpha[:, :, None] + A, 1) + q[:, j]
        alpha = torch.where((j < n)[:, None], following, alpha)
    return torch.logsumexp(alpha + b, 1)


def crf_nll(q, y, n, crf):
    """-log p(y | q) of each video: (B,). The logits come in float32, n >= 1."""
    return crf_log_partition(q, n, *crf()) - crf_score(q, y, n, *crf())


def crf_viterbi(q, n, crf):
    """The most probable labels of each video: [(n_i,)]."""
    a, b, A = crf()
    best, back = a + q[:, 0], []
    for j in range(1, q.shape[1]):
        values, where = (best[:, :, None] + A).max(1)                         # (B, K)
        best = torch.where((j < n)[:, None], values + q[:, j], best)
        back.append(where)
    tags = []
    for i, length in enumerate(n.tolist()):
        path = [int((best[i] + b).argmax())]
        for where in reversed(back[:length - 1]):
            path.append(int(where[i, path[-1]]))
        tags.append(torch.tensor(path[::-1]))
    return tags


def crf_marginals(q, n, crf):
    """p(y_j = k | q), (B, N, K): the gradient of the log partition function by the logits."""
    with torch.inference_mode(False), torch.enable_grad():
        q = q.detach().clone().requires_grad_()
        parts = [p.detach().clone() for p in crf()]
        return torch.autograd.grad(crf_log_partition(q, n, *parts).sum(), q)[0]


# ---- loss (official files: rep_learning/train.py, transformer2x/train.py) -----------------------

def cross_entropy(logits, labels, weights=None):
    """(Σ_i w_yi CE_i, Σ_i w_yi): a mean is their quotient.    (M, C), (M,); labels PAD are not
    counted.
    """
    total = F.cross_entropy(logits.float(), labels, weights, ignore_index=PAD, reduction="sum")
    each = labels != PAD
    if weights is not None:
        each = each * weights[labels.clamp(min=0)]
    return total, each.sum()


def over_all(total, count):
    """Σ total / Σ count over all processes, as DDP, which takes the mean of the gradients, needs
    it: the loss of a global batch does not depend on how it is shared out.
    """
    count = count.detach().clone().float()
    dist.all_reduce(count)
    return total * common.world_size() / count.clamp(min=1e-12)


def learning_rate(lr, epoch, epochs, end=1e-6):
    """Of an epoch, from 0: half a cosine from lr to `end`, no warm-up (utils/util_functions.py)."""
    return end + (lr - end) * (math.cos(math.pi * epoch / epochs) + 1) / 2


# ---- metrics (official files: action_localization/test.py, Oops eval_results.py) ----------------

def accuracy(labels, predicted):
    """(overall, [per true class]) of clips; nan for a class without clips."""
    hit = labels == predicted
    return float(hit.mean()), [float(hit[labels == c].mean()) if (labels == c).any() else math.nan
                               for c in range(3)]


def predicted_time(prob, spans):
    """t̂: middle of the clip that most probably holds the transition, the first such; 0 if none
    can.    prob, (N,): p(label 1)
    """
    j = int(prob.argmax())
    return float(spans[j].mean()) if prob[j] > 0 else 0.0


def distance(t_hat, t):
    """Seconds to the nearest of the annotated times. Entries of -1 match nothing in practice."""
    return min(abs(t_hat - x) for x in t)


def localization(errors, lengths, tolerances=(0.25, 1.0)):
    """Share of videos, in %, found within each tolerance, and mean, median and sample standard
    deviation of the error in seconds; mean and median relative to the length.
    """
    e = np.asarray(errors, dtype=np.float64)
    metrics = {f"within_{k:g}s": 100 * float((e <= k).mean()) for k in tolerances}
    relative = e / np.asarray(lengths)
    return {**metrics, "mean_error_s": float(e.mean()), "median_error_s": float(np.median(e)),
            "std_error_s": float(e.std(ddof=1)) if len(e) > 1 else 0.0,
            "mean_relative_error": float(relative.mean()),
            "median_relative_error": float(np.median(relative))}


def regression_loss(out, relative):
    """Σ SmoothL1, β 0.01, of the predicted and the true transition time relative to the length.

    out: (B,) logits, relative: (B,). The optional variant of action_localization.
    """
    return F.smooth_l1_loss(out.float().sigmoid(), relative, reduction="sum", beta=0.01)


def chance(length, t, tolerance):
    """Probability that a uniformly random time lies within the tolerance of t."""
    return (min(length, t + tolerance) - max(0.0, t - tolerance)) / length


# ---- weights (official files: models/pm_vtn.py, transformer2x/vtn.py) ---------------------------

def released_names(theirs, ours, layers):
    """{names of the release: our names} of an encoder, as beginnings."""
    t = f"{theirs}temporal_encoder."
    names = {f"{theirs}cls_token": "cls_token",
             f"{t}embeddings.position_embeddings.": "position.",
             f"{t}embeddings.token_type_embeddings.": "kind.", f"{t}embeddings.LayerNorm.": "norm."}
    for i in range(layers):
        parts = {f"attention.self.{p}.": f"{p}." for p in (
            "query", "key", "value", "query_global", "key_global", "value_global")}
        parts |= {"attention.output.dense.": "out.", "attention.output.LayerNorm.": "norm1.",
                  "intermediate.dense.": "fc1.", "output.dense.": "fc2.",
                  "output.LayerNorm.": "norm2."}
        names |= {f"{t}encoder.layer.{i}.{a}": f"layers.{i}.{b}" for a, b in parts.items()}
    return {a: ours + b for a, b in names.items()}


def layouts(layers, heads=True):
    """Naming schemes of checkpoints: ours; the release's of one level and of two. heads: with
    classifier and CRF, which do not pass from one stage to the next.
    """
    one = released_names("", "frames.", layers)
    two = (released_names("local_model.", "frames.", layers)
           | released_names("global_model.", "clips.", layers))
    if not heads:
        return [{"frames.": "frames.", "clips.": "clips."}, one, two]
    crf = {"crf.": "crf."}
    return [{"": ""}, one | {"mlp_head.": "head."} | crf,
            two | {"global_model.mlp_head.": "head."} | crf]


def timm_names(layers):
    """{names of timm's vision transformers: torchvision's names}, as beginnings."""
    names = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding",
             "patch_embed.proj.": "conv_proj.", "norm.": "encoder.ln."}
    parts = {"norm1.": "ln_1.", "norm2.": "ln_2.", "mlp.fc1.": "mlp.0.", "mlp.fc2.": "mlp.3.",
             "attn.qkv.": "self_attention.in_proj_", "attn.proj.": "self_attention.out_proj."}
    return names | {f"blocks.{i}.{a}": f"encoder.layers.encoder_layer_{i}.{b}"
                    for i in range(layers) for a, b in parts.items()}


def describe(path):
    """What is known of a checkpoint: flags of ours; of the release's what the tensors tell.

    NOTE: these do not tell heads and window: --heads and --window may, else 16 and 32.
    """
    found, tensors = common.load_file(path), common.find_weights(path)
    video = any(k.startswith(("clips.", "global_model.")) for k in tensors)
    if isinstance(found, dict) and isinstance(found.get("args"), dict) and "step" in found:
        known = found["args"]
        dim = tensors.get("frames.cls_token", tensors.get("head.0.weight"))   # the latter: ClipMLP
    else:
        t = "local_model." if video else ""
        depth = [int(m[1]) + 1 for k in tensors if (
            m := re.match(rf"{t}temporal_encoder\.encoder\.layer\.(\d+)\.", k))]
        rows = {"ff": f"{t}temporal_encoder.encoder.layer.0.intermediate.dense.weight",
                "mlp": f"{t.replace('local', 'global')}mlp_head.1.weight",
                "positions": f"{t}temporal_encoder.embeddings.position_embeddings.weight"}
        dim = tensors.get(f"{t}cls_token")
        known = {"layers": max(depth, default=None),
                 **{k: len(tensors[name]) for k, name in rows.items() if name in tensors}}
        known["loss"] = "crf" if "crf.transitions" in tensors else "ce"
    if dim is None or dim.dim() < 2:
        raise UserError(f"{path}: no checkpoint of this method: it has no class token")
    known = {**known, "dim": dim.shape[-1], "level": "video" if video else "clip"}
    legal = {**{k: lambda x: isinstance(x, int) and 0 < x < 10 ** 6 for k in SHAPE},
             "layers": lambda x: isinstance(x, int) and 0 < x <= len(tensors),
             "positions": lambda x: isinstance(x, int) and 2 < x < 10 ** 6,
             "loss": lambda x: x in ("ce", "crf", "regression"),
             "compat": lambda x: x in ("fixed", "released"),
             "step": lambda x: isinstance(x, float) and x > 0 and (x * FPS).is_integer(),
             "anticipate": lambda x: isinstance(x, float) and 0 < x < 60}
    for key, right in legal.items():
        if known.get(key) is not None and not right(known[key]):
            raise UserError(f"{path}: its --{key} {known[key]!r:.40} is not possible")
    return known


# ---- stage features (official files: feat_exteact/, r21d/extr_r21d_feats.py) --------------------

TIMM = ("https://huggingface.co/timm/vit_base_patch16_224.augreg_in21k_ft_in1k/resolve/main/"
        "pytorch_model.bin")


class Pictures(IterableDataset):
    """What φ needs of each video, in pieces of bounded size, by as many processes as there are.

    Yields (video, fps, times or spans, pieces for φ, is it the last one?), or the video's number
    and what is wrong with it. Pictures: uint8 (n, S, S, 3), short side scaled to S, the centre of
    the long side; clips: (n, 3, 16, S, S), each 0.25 s after the one before.
    NOTE: the release cuts the picture up to 56 pixels off its centre.
    """

    def __init__(self, paths, clips, side):
        self.paths, self.clips, self.side = paths, clips, side

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, every = (info.id, info.num_workers) if info else (0, 1)
        for i in range(first, len(self.paths), every):
            try:
                fps = common.probe(Path(self.paths[i])).fps
                pieces = self.clips_of if self.clips else self.pictures_of
                held = None                                   # one behind, to know the last
                for piece in pieces(Path(self.paths[i]), fps):
                    if held:
                        yield i, fps, *held, False
                    held = piece
                if held is None:
                    raise VideoError(f"{self.paths[i]}: is shorter than a clip")
                yield i, fps, *held, True
            except VideoError as e:
                yield i, str(e)

    def pictures_of(self, path, _):
        def size(w, h):
            return tuple(int(s * self.side / min(w, h)) for s in (w, h))

        for times, x in common.stream(path, size):
            top, left = ((s - self.side) // 2 for s in x.shape[1:3])
            x = x[:, top:top + self.side, left:left + self.side]
            yield times, torch.from_numpy(np.ascontiguousarray(x))

    def clips_of(self, path, fps):
        ratio, k, n = fps / FPS, 0, 0                         # position on the grid, picture
        kept, made = [], []                                   # (time, picture), (span, clip)
        size = (round(self.side * 128 / 112), round(self.side * 171 / 112))

        def cut_off(last):                                    # a position is sure once one follows
            while len(kept) >= FPS + (not last):
                part = kept[:FPS]
                made.append(((part[0][0], part[-1][0]), torch.stack([x for _, x in part], 1)))
                del kept[:4]
            while len(made) >= 8 or (last and made):
                spans, clips = zip(*made[:8])
                del made[:8]
                yield np.array(spans), torch.stack(clips)

        for times, x in common.stream(path, chunk=16):
            while (j := math.floor(np.float32(k) * np.float32(ratio)) - n) < len(times):
                picture = clip_pictures(torch.from_numpy(x[j:j + 1]), size, self.side)[0]
                kept.append((times[j], picture))
                k += 1
            n += len(times)
            yield from cut_off(False)
        if not ratio.is_integer() and k > math.floor(n / ratio):
            kept.pop()                                        # as `cut_clips` counts
        yield from cut_off(True)


def backbone(args):
    """(φ, mean and std of its pictures, what its weights are)."""
    torch.manual_seed(args.seed)
    net, name = common.feature_network(args.backbone, args.tiny), args.backbone
    clips = name in OF_CLIPS
    if args.weights == "none":
        return net, HALF, f"none, seed {args.seed}"
    if args.tiny:
        raise UserError("--tiny makes its own small backbone: --weights none")
    path = Path(args.weights)
    if args.weights == "torchvision" and name != "r2plus1d_152":
        from torchvision.models import get_model_weights
        url = next(iter(get_model_weights(name.replace("vit_b16", "vit_b_16")))).url
        path = common.fetch(url, "use --weights FILE, or none")
    elif args.weights == "timm" and name == "vit_b16":
        path = common.fetch(TIMM, "use --weights torchvision, FILE or none")
    elif args.weights in ("torchvision", "timm"):
        raise UserError(f"--weights {args.weights}: has none of {name}; a FILE is needed")
    layouts = [{"": ""}] + [timm_names(12)] * (name == "vit_b16")
    common.load_weights(net, path, layouts)
    timm = "pos_embed" in common.find_weights(path)
    norm = KINETICS if clips else HALF if timm else IMAGENET
    return net, norm, f"{path.name}, pictures {'(x - 0.5) / 0.5' if timm else 'as torchvision'}"


@torch.inference_mode()
def calibrate(net, norm, paths, clips, side, spread=0.1):
    """Centre and scale the channels of a small untrained network by what it makes of some videos:
    as they are, they hardly differ from one picture to the next, and nothing is learned from them.
    """
    made = {}
    for i, *piece in Pictures(paths, clips, side):
        if i not in made and len(piece) == 4:                 # the first pictures of each
            made[i] = net(piece[2] if clips else normalise(piece[2], *norm))
    if not made:
        raise UserError(f"{paths[0]}: can not be read, nor can the {len(paths) - 1} after it")
    z = torch.cat(list(made.values()))
    net.shift.copy_(z.mean(0))
    net.scale.copy_(spread / z.std(0).clamp(min=1e-6))


def save_features(args, path, fps, parts):
    """One video's .npz: arr_0 (T, D), fps, and times (T,), or spans (T, 2) of clips."""
    seen, x = (np.concatenate(p) for p in zip(*parts))
    x = x.astype(np.float16 if args.float16 else np.float32)
    if not np.isfinite(x).all():
        raise UserError(f"{path}: its features are not finite; nothing was written")
    kind = "spans" if seen.ndim == 2 else "times"
    common.write(path, lambda f: np.savez(f, arr_0=x, fps=fps, **{kind: seen}))


def extract_part(args, device, network, part, files, clips, side):
    """Features of the videos that have none yet, shared out: ({name: fault}, how many made)."""
    folder, ending = args.features / part, ".mp4.npz" if args.naming == "mp4" else ".npz"
    if common.rank() == 0 and folder.is_dir():
        common.remove_stale(folder)
    common.barrier()
    mine, failed = [], {}
    for f in files[common.rank()::common.world_size()]:
        try:
            checked(f.parent, f.stem)
            if not any((folder / f"{f.stem}{e}").exists() for e in (".npz", ".mp4.npz")):
                mine.append(f)
        except UserError as e:
            failed[f"{part}/{f.name!r}"] = str(e)
    common.barrier()
    loader = DataLoader(Pictures([str(f) for f in mine], clips, side), batch_size=None,
                        num_workers=min(args.workers, len(mine)), generator=torch.Generator())
    done, parts, began = 0, {}, time.perf_counter()
    shown = began
    for i, *piece in loader:
        if len(piece) == 1:
            failed[f"{part}/{mine[i].name}"] = piece[0]
            parts.pop(i, None)
            print(f"warning: {' '.join(piece[0].split())}; left out", flush=True)
            continue
        fps, seen, x, last = piece
        parts.setdefault(i, []).append((np.asarray(seen), network(x.to(device))))
        if last:
            save_features(args, folder / f"{mine[i].stem}{ending}", fps, parts.pop(i))
            done += 1
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            left = (shown - began) / max(1, done) * (len(mine) - done)
            common.say(f"{part} {done}/{len(mine)} videos of this process, ETA {left:.0f} s")
    return failed, done


def extract(args, device):
    """Features of every video in oops_video/train and val, each once; killed, it goes on."""
    files = {}
    for part in ("train", "val"):
        folder = args.data / "oops_video" / part
        files[part] = sorted(folder.glob("*.mp4"))
        if not files[part]:
            raise UserError(f"{folder}: holds no .mp4 videos")
        other = len(os.listdir(folder)) - len(files[part])
        if other:
            common.say(f"note: {folder}: {other} entries are no .mp4 and passed over")
    net, norm, weights = backbone(args)
    clips = args.backbone in OF_CLIPS
    side = 32 if args.tiny else 112 if clips else 224
    common.claim(args.features, net, {"backbone": args.backbone, "weights": weights, "side": side,
                                      "tiny": args.tiny})
    if args.tiny:
        calibrate(net, norm, [str(f) for f in files["train"][:16]], clips, side)
    net = net.to(device)
    if args.compile:
        net.compile()

    @torch.inference_mode()
    def network(x):
        with common.autocast(device, args.precision):
            return net(x if clips else normalise(x, *norm)).float().cpu().numpy()

    failed, totals = {}, {}
    for part in files:
        some = files[part][:args.limit]
        broken, done = extract_part(args, device, network, part, some, clips, side)
        every = [(broken, done)] * common.world_size()
        if common.world_size() > 1:
            dist.all_gather_object(every, (broken, done))
        failed |= {k: v for faults, _ in every for k, v in sorted(faults.items())}
        totals |= {f"{part}_videos": len(some),
                   f"{part}_made": sum(made for _, made in every)}
    if common.rank() == 0:
        common.write_json(args.out / "metrics.json", {**totals, "unreadable": failed,
                                                      "weights": weights, "dim": net.out_dim})
    common.say("  ".join(f"{k} {v}" for k, v in totals.items()) + f"  dim {net.out_dim}  "
               f"unreadable {len(failed)}  in {args.features}")


# ---- samples -----------------------------------------------------------------------------------

class ClipPretext(Dataset):
    """F2C: the transformed clips of each video, up to six of them."""

    def __init__(self, videos, args):
        self.videos, self.args = common.Packed(videos), args
        self.names = args.transforms.split(",")

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (-1, key)               # -1: validation
        a, v = self.args, self.videos[i]
        rng = np.random.default_rng((a.seed, epoch + 1, i, 2))               # 2: this dataset's own
        c = draw_clip_choices(rng, v.frames, self.names, a.clip_len, a.crops,
                              a.compat == "released")
        made = transform_clips(v.frames, c, self.names, a.clip_len)
        x = read_rows(v, np.concatenate([frames for _, frames in made]))
        return {"clips": x.split([len(frames) for _, frames in made]),
                "label": torch.tensor([self.names.index(name) for name, _ in made])}


class VideoPretext(ClipPretext):
    """F2C2V: the transformed versions of each video, up to six, of clips of 16 frames.

    Versions share most of their clips, so each clip is read, and embedded, once.
    """

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (-1, key)
        v, released = self.videos[i], self.args.compat == "released"
        rng = np.random.default_rng((self.args.seed, epoch + 1, i, 3))       # 3: likewise
        made = transform_video(v.frames, draw_video_choices(rng, v.frames, released=released),
                               self.names)
        clips, order = np.unique(np.concatenate([frames for _, frames in made]), axis=0,
                                 return_inverse=True)
        x = read_rows(v, clips.ravel())
        return {"pool": x.view(*clips.shape, -1),                             # (U, 16, D)
                "order": torch.from_numpy(order.ravel()).split([len(f) for _, f in made]),
                "label": torch.tensor([label_of(n, self.names, released) for n, _ in made])}


class LabelledClips(Dataset):
    """Clip level: single clips of all videos. table: (M, 3) of video, clip and label."""

    def __init__(self, videos, table, step):
        self.videos, self.table, self.step = common.Packed(videos), table, step

    def __len__(self):
        return len(self.table)

    def __getitem__(self, key):
        i, j, label = self.table[key[1]]
        video = self.videos[i]
        return {"x": read_rows(video, cut(video, self.step)[0][j]), "label": label}


class LabelledVideos(Dataset):
    """All clips of each video, in their order, cut into `phases` sequences: the clips 0, p, 2p ...,
    the clips 1, p + 1, ... So a model trained on clips 1 s apart reads clips 0.25 s apart.
    """

    def __init__(self, videos, args, step, phases=1):
        self.videos, self.args = common.Packed(videos), args
        self.step, self.phases = step, phases

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, key):
        video = self.videos[key[1] if isinstance(key, tuple) else key]
        frames, spans = cut(video, self.step)
        which, labels = targets(self.args, video, spans, self.step)
        frames = frames[which]                                # what may not be seen is not
        x = read_rows(video, frames.ravel())
        return {"pool": x.view(*frames.shape, -1), "label": torch.from_numpy(labels),
                "order": [torch.arange(p, len(frames), self.phases)
                          for p in range(min(self.phases, len(frames)))],
                "time": torch.tensor([video.note.t[1], video.note.len])}


def targets(args, video, spans, step):
    """(clips to be shown, their labels) of a video, as --anticipate and --compat say."""
    t, released = video.note.t[1], args.compat == "released"
    if args.anticipate:
        return anticipation(spans, t, args.anticipate, args.anticipate_protocol, step, released)
    return np.arange(len(spans)), run_labels(spans, t, released)


def collate_clips(items):
    """Clips of all items, shorter ones filled with PAD: x (S, L, D); labels (S,); length (S,), if
    there are shorter ones.
    """
    clips = [clip for item in items for clip in item["clips"]]
    length = torch.tensor([len(c) for c in clips])
    return {"x": nn.utils.rnn.pad_sequence(clips, True, PAD), "label": torch.cat(
        [item["label"] for item in items]), "broken": [item.get("broken", "") for item in items],
        **({"length": length} if length.min() < length.max() else {})}


def collate_videos(items):
    """The clips of all items one behind the other: x (U, 16, D); which of them each sequence has:
    order (S, N), then PAD; labels, of the sequences (S,) or of their clips (S, N).
    """
    order, first, labels = [], 0, [item["label"] for item in items]
    for item in items:
        order += [first + o for o in item["order"]]
        first += len(item["pool"])
    batch = {"x": torch.cat([item["pool"] for item in items]),
             "order": nn.utils.rnn.pad_sequence(order, True, PAD),
             "broken": [item.get("broken", "") for item in items]}
    if "time" not in items[0]:
        return {**batch, "label": torch.cat(labels)}
    return {**batch, "label": nn.utils.rnn.pad_sequence(labels, True, PAD),
            "time": torch.stack([item["time"] for item in items])}


# ---- training ----------------------------------------------------------------------------------

def prepare(args, path):
    """Take from the checkpoint what the flags leave open of the network's shape; returns what is
    known of it. None for `--init none`.
    """
    known = None if path in (None, "none") else describe(Path(path))
    wanted = dict(SHAPE)
    if args.stage in TESTS:                                   # the classifier, as it was trained
        wanted |= {"level": None, "loss": "ce", "anticipate": None,
                   "step": 1.0 if known["level"] == "video" else 0.25}
    for key, default in [*wanted.items(), ("compat", args.compat)]:
        given, made = getattr(args, key), (known or {}).get(key)
        if given is None:
            setattr(args, key, default if made is None else made)
        elif made is not None and given != made:
            raise UserError(f"{path}: was made with --{key} {made}, now it is {given}")
    if args.stage == "localize" and args.anticipate:
        raise UserError(f"{path}: foresees labels, it has no time to localize; --stage evaluate")
    return known


def build(args, dim, classes, level, per_clip=False, crf=False):
    """The model of a stage."""
    if dim % args.heads:
        raise UserError(f"--heads {args.heads} do not divide the {dim} channels of the features")
    options = {k: getattr(args, k) for k in ("layers", "heads", "window", "ff", "positions",
                                             "dropout", "mlp", "init_std")}
    options |= {"released": args.compat == "released", "crf": crf}
    if level == "clip":
        return F2C(dim, classes, **options)
    return F2C2V(dim, classes, **options, per_clip=per_clip, tune=args.finetune_frames)


def initialise(args, model, known, dim):
    """Fill the encoders: of F2C the frame encoder alone, of F2C2V both; heads are new."""
    if known is None:
        return common.say("init none: random weights")
    if known["dim"] != dim:
        raise UserError(f"{args.init}: is of features of {known['dim']} numbers, those of "
                        f"{args.features} have {dim}")
    both = known["level"] == "video" and isinstance(model, F2C2V)
    common.load_weights(model, Path(args.init), layouts(args.layers, heads=False),
                        ("frames.", "clips.") if both else "frames.")


def train(args, device, model, dataset, collate, losses, validate):
    """The loop of all stages. losses: (output, batch) -> terms; validate: model -> metrics, of
    which `val_top1` may choose the checkpoint.
    """
    names = "\n".join(v.name for v in dataset.videos)
    samples = f"{len(dataset)} (list {zlib.crc32(names.encode()):08x})"
    dataset = common.SkipBroken(dataset, args.seed)
    if args.compile:
        model.compile()
    ddp = DDP(model, gradient_as_bucket_view=True)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=args.lr, weight_decay=args.weight_decay)
    if common.world_size() > 2:
        common.settle(ddp, *inputs(model, to_device(collate([dataset[0, 0]]), device)))
    saved = common.resume(args.out / "last.pt", args, model=model, optimizer=optimizer)
    start, best = saved["step"], saved.get("best", -math.inf)
    common.same_samples(saved, samples, args.out)

    per_epoch = len(dataset) // args.batch_size
    steps = args.epochs * per_epoch
    sampler = common.StepSampler(len(dataset), args.batch_size, args.seed, start, steps)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=args.workers,
                        pin_memory=device.type == "cuda", collate_fn=collate,
                        generator=torch.Generator())
    log = common.Log(args, start, steps, per_epoch)
    ddp.train()
    for step, batch in log.steps(loader):
        lr = learning_rate(args.lr, step // per_epoch, args.epochs, min(1e-6, args.lr))
        for group in optimizer.param_groups:
            group["lr"] = lr
        common.seed_step(args.seed, step, common.rank())      # dropout repeats after a restart
        batch = to_device(batch, device)
        with common.autocast(device, args.precision):
            out = ddp(*inputs(model, batch))
        terms = losses(out, batch)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        norm = log.guard(step, optimizer, loss=terms["loss"])
        nn.utils.clip_grads_with_norm_(learned, 1.0, norm)
        optimizer.step()

        ended, measured = (step + 1) % per_epoch == 0, {}
        saving = ended or (step + 1) % args.save_every == 0 or log.stopping
        if ended:
            began = time.perf_counter()
            measured = validate(model.eval())
            if args.select == "last" or measured["val_top1"] > best:
                best = measured["val_top1"]
                common.save(args.out / "best.pt", step + 1, args, model=model)
            ddp.train()
            log.since += time.perf_counter() - began          # not part of the training speed
        log(step, saving, **terms, gradient=norm, lr=lr, **measured)
        if saving:
            common.save(args.out / "last.pt", step + 1, args, model=model, optimizer=optimizer,
                        best=best, samples=samples)
    common.barrier()
    if common.rank() == 0:
        common.draw_curve(args.out, f"{args.stage} on {args.dataset}",
                          ["loss", "top1", "val_loss", "val_top1", "lr"])
    model.load_state_dict(common.load_file(args.out / "best.pt")["model"])
    return {**validate(model.eval()), "training_samples_broken": log.total("broken")}


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}


def inputs(model, batch):
    """What a model takes of a batch: clips, and their lengths, or their order in videos."""
    return [batch["x"], *(batch[k] for k in [model.takes] if k in batch)]


def finish(args, metrics):
    """metrics.json and a line of the console."""
    if common.rank() == 0:
        common.write_json(args.out / "metrics.json", metrics)
    common.say("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()
                         if isinstance(v, (int, float))))


# ---- stages f2c and f2c2v (official files: rep_learning/main.py, train.py) ----------------------

def pretext_videos(args, part):
    """The videos of a part of which at least one transformation can be made."""
    videos, names = scan(args, part), args.transforms.split(",")
    if videos[0].spans is not None:
        raise UserError(f"{args.features}: holds features of clips; the pre-training needs those "
                        "of pictures")
    long = [v for v in videos if possible(v.frames, names, args.stage == "f2c2v", args.clip_len,
                                          args.compat == "released")]
    common.say(f"{part}: {len(videos) - len(long)} videos are too short and left out")
    if not long:
        raise UserError(f"{args.features}: no {part} video is long enough")
    return long


def pretrain(args, device, known):
    """F2C or F2C2V: tell the transformations apart, on labelled and unlabelled videos alike."""
    video = args.stage == "f2c2v"
    dataset, checked = ((VideoPretext if video else ClipPretext)(pretext_videos(args, part), args)
                        for part in ("train", "val"))
    same_kind([dataset.videos[0], checked.videos[0]])
    dim = checked.videos[0].dim
    collate, names = collate_videos if video else collate_clips, args.transforms.split(",")
    torch.manual_seed(args.seed)                              # the same weights on every process
    model = build(args, dim, len(names), "video" if video else "clip").to(device)
    if not (args.out / "last.pt").exists():
        initialise(args, model, known, dim)

    def losses(logits, batch):
        total, n = cross_entropy(logits, batch["label"])
        hits = (logits.argmax(1) == batch["label"]).float().sum()
        return {"loss": over_all(total, n), "top1": over_all(hits, n)}

    def validate(model):
        def network(_, batch):
            label = batch["label"].to(device)
            logits = model(*inputs(model, to_device(batch, device))).float()
            lost = F.cross_entropy(logits, label, reduction="none")
            rows = torch.stack([lost, (logits.argmax(1) == label).float(), label.float()], 1)
            return [rows.split(batch["count"])]
        rows, = common.predict(args, device, checked, network, "val", 16, lambda items: {
            **collate(items), "count": [len(item["label"]) for item in items]})
        loss, hit, label = np.concatenate(rows).T
        per_class = {f"val_{n}": float(hit[label == c].mean())
                     for c, n in enumerate(names) if (label == c).any()}
        return {"val_loss": float(loss.mean()), "val_top1": float(hit.mean()), **per_class}

    finish(args, train(args, device, model, dataset, collate, losses, validate))


# ---- stage classify (official files: action_classification/, transformer2x/, r21d/mainr21d.py) --

class ClipMLP(nn.Module):
    """Of features of clips, R(2+1)D-18's: two hidden layers, no pre-training (r21d/mainr21d.py).

    NOTE: the release trains it with Adam, we with AdamW as all others.
    """
    takes, crf = "length", None

    def __init__(self, dim, classes, dropout=0.1):
        super().__init__()
        p = dropout and 0.1
        self.head = nn.Sequential(nn.Linear(dim, 256), nn.ReLU(), nn.Dropout(p),
                                  nn.Linear(256, 128), nn.Dropout(p), nn.ReLU(),
                                  nn.Linear(128, classes))

    def forward(self, x, lengths=None):
        """(B, 1, D) -> (B, C)"""
        return self.head(x[:, 0].float())


def classifier(args, video):
    """The model of stage `classify`, for features like those of a Video."""
    if video.spans is not None:
        if args.level == "video" or args.loss != "ce" or args.freeze:
            raise UserError(f"{args.features}: holds features of clips: --level clip --loss ce, "
                            "without --freeze")
        return ClipMLP(video.dim, 3, args.dropout)
    regress = args.loss == "regression"
    return build(args, video.dim, 1 if regress else 3, args.level, per_clip=not regress,
                 crf=args.loss == "crf")


def annotations(args):
    """{name: Annotation} of the transition times below --data."""
    path = common.find(args.data, "transition_times.json")
    if path is None:
        raise UserError(f"{args.data}: holds no transition_times.json; it comes with the official "
                        "annotations")
    notes = read_notes(path)
    self_check(notes, {part: names_of(args, part, True) for part in ("train", "val")})
    return notes


def clip_table(args, videos):
    """(M, 3) of video, clip and label, for training at clip level, balanced unless --unbalanced."""
    step, rows, counts = round(args.step * FPS), [], np.zeros(3, int)
    single = args.level == "clip" and args.loss == "ce"
    for i, video in enumerate(videos):
        which, labels = targets(args, video, cut(video, step)[1], step)
        counts += np.bincount(labels, minlength=3)
        if len(labels):
            rng = np.random.default_rng((args.seed, i, 4))
            keep = balanced(labels, rng) if single and not args.unbalanced else slice(None)
            labels, which = labels[keep], which[keep]
            rows.append(np.stack([np.full(len(which), i), which, labels], 1))
    if not rows:
        raise UserError(f"{args.data}: no training video has a clip to show and a label for it")
    common.say(f"labels of the training clips, {args.step:g} s apart: "
               + ", ".join(f"{n} {label}" for n, label in zip(counts, LABELS)))
    return np.concatenate(rows)


def weights_of(args, counts):
    """Class weights of the cross entropy, (3,) or None: the most frequent label's count over each.
    """
    if args.class_weights == "none":
        return None
    if args.class_weights == "published":
        return torch.tensor(PUBLISHED_WEIGHTS, dtype=torch.float32)
    if not counts.all():
        raise UserError(f"--class_weights computed: a label has no training clip: {counts}")
    weights = torch.tensor(counts.max() / counts, dtype=torch.float32)
    common.say(f"class weights {[round(float(w), 4) for w in weights]}")
    return weights


def clip_losses(args, model, weights):
    """(output, batch) -> loss and accuracy of clips, by cross entropy or CRF.

    The CRF's loss is summed over a batch at video level, the mean at clip level. NOTE: the release
    sums over one process's videos, then takes the mean over processes; the sum over all of them
    does not depend on how many there are.
    """
    def losses(out, batch):
        label = batch["label"]
        if args.loss == "crf":
            out = restack(out, batch["order"]) if args.level == "clip" else out
            nll = crf_nll(out.float(), label, (label != PAD).sum(1), model.crf).sum()
            videos = torch.tensor(len(label), device=label.device)
            loss = nll * common.world_size() if args.level == "video" else over_all(nll, videos)
        logits, label = out.flatten(0, -2), label.flatten()
        if args.loss == "ce":
            loss = over_all(*cross_entropy(logits, label, weights))
        hits = ((logits.argmax(1) == label) & (label != PAD)).float().sum()
        return {"loss": loss, "top1": over_all(hits, (label != PAD).sum())}
    return losses


def time_losses(out, batch):
    """Loss of the regression variant, summed over the batch, and the share within 1.5 s."""
    t, length = batch["time"].float().unbind(1)
    near = ((out[:, 0].float().sigmoid() * length - t).abs() <= 1.5).float().sum()
    return {"loss": regression_loss(out[:, 0], t / length) * common.world_size(),
            "top1": over_all(near, torch.tensor(len(t), device=t.device))}


def clip_metrics(args, device, model, videos, step):
    """Loss, accuracy, and accuracy per class of the clips of all validation videos."""
    found = predict_clips(args, device, model, videos, step)
    label, tags, prob = stack(args, videos, found, step)
    overall, each = accuracy(label, tags)
    lost = -np.log(np.maximum(prob[np.arange(len(label)), label], 1e-12)).mean()
    return {"val_loss": float(lost), "val_top1": overall,
            **{f"val_{n}": x for n, x in zip(LABELS, each) if x == x}}


def classify(args, device, known):
    """Fine-tune on labelled videos: at clip level, at video level, with or without CRF."""
    notes, step = annotations(args), round(args.step * FPS)
    videos, val = scan(args, "train", notes), scan(args, "val", notes)
    same_kind([*videos, *val])
    table = clip_table(args, videos)
    if args.level == "clip" and args.loss == "ce":
        dataset, collate = LabelledClips(videos, table, step), torch.utils.data.default_collate
    else:
        dataset = LabelledVideos([videos[i] for i in np.unique(table[:, 0])], args, step)
        collate = collate_videos
    if args.anticipate and args.level == "video" or args.loss == "crf" and args.anticipate:
        common.say("note: a model of whole videos sees the clips that follow, what it anticipates "
                   "among them, as in the release; --level clip --loss ce does not")
    torch.manual_seed(args.seed)
    model = classifier(args, val[0]).to(device)
    if not (args.out / "last.pt").exists() and not isinstance(model, ClipMLP):
        initialise(args, model, known, val[0].dim)
    if args.freeze:
        for part in model.children():
            part.requires_grad_(not isinstance(part, Encoder))
    weights = weights_of(args, np.bincount(table[:, 2], minlength=3))
    losses = clip_losses(args, model, weights if weights is None else weights.to(device))

    def validate(model):
        if args.loss != "regression":
            return clip_metrics(args, device, model, val, step)
        found = regress_videos(args, device, model, val)
        return {"val_top1": float(np.mean([abs(t - v.note.t[1]) <= 1.5
                                           for t, v in zip(found, val)]))}

    metrics = train(args, device, model, dataset, collate,
                    time_losses if args.loss == "regression" else losses, validate)
    finish(args, {**metrics, "step_s": args.step, "val_videos": len(val),
                  "chosen_on": {"val": "the validation videos, as published",
                                "last": "nothing: the last epoch"}[args.select]})


# ---- stages localize and evaluate (official files: action_localization/main_al.py, test.py) -----

@torch.inference_mode()
def predict_clips(args, device, model, videos, step):
    """[(p(label) (N, 3), most probable labels (N,))] of each video's clips, `step` grid positions
    apart, as far as --anticipate shows them. With a CRF: posterior marginals and Viterbi's labels.

    A model of sequences reads clips as far apart as in training: nearer ones as several sequences.
    """
    alone = isinstance(model, (F2C, ClipMLP)) and model.crf is None
    phases = 1 if alone else max(1, round(args.step * FPS) // step)
    crf = copy.deepcopy(model.crf).cpu() if model.crf else None               # no loop on a GPU

    def network(_, batch):
        out = model(*inputs(model, to_device(batch, device))).float()
        if alone:
            p = out.softmax(1)
            return [[p], [p.argmax(1)]]
        order = batch["order"]
        q = (out if out.dim() == 3 else restack(out, order.to(device))).cpu()
        n, there = (order != PAD).sum(1), order != PAD        # (phases,), (phases, n)
        p, tags = q.softmax(2), q.argmax(2)
        if crf is not None:
            # NOTE: the release localizes by the softmax of the CRF's inputs.
            p = crf_marginals(q, n, crf) if args.compat == "fixed" else p
            tags = nn.utils.rnn.pad_sequence(crf_viterbi(q, n, crf), True, PAD)
        back = order[there].argsort()
        return [[p[there][back]], [tags[there][back]]]

    shown = [len(targets(args, v, cut(v, step)[1], step)[0]) > 0 for v in videos]
    dataset = LabelledVideos([v for v, s in zip(videos, shown) if s], args, step, phases)
    found = common.predict(args, device, dataset, network, "val", 1, collate_videos)
    pairs = iter([(p, tags.astype(int)) for p, tags in zip(*found)])
    return [next(pairs) if s else (np.zeros((0, 3)), np.zeros(0, int)) for s in shown]


def regress_videos(args, device, model, videos):
    """t̂ of each video: the model's share of its length."""
    dataset = LabelledVideos(videos, args, round(args.step * FPS))
    found, = common.predict(args, device, dataset, lambda _, batch: [
        model(*inputs(model, to_device(batch, device)))[:, 0].float().sigmoid()], "val", 1,
        collate_videos)
    return [float(x) * v.note.len for x, v in zip(found, videos)]


def stack(args, videos, found, step):
    """(labels, most probable labels, p (M, 3)) of all clips that count, video after video."""
    rows = [(targets(args, video, cut(video, step)[1], step)[1], tags, prob)
            for video, (prob, tags) in zip(videos, found)]
    labels, tags, prob = (np.concatenate(column) for column in zip(*rows))
    if not len(labels):
        raise UserError(f"--anticipate {args.anticipate}: no validation video is long enough")
    return labels, tags, prob


def references(args, videos, tolerances):
    """What random times, always the middle, and a fourth annotator would reach, in %."""
    path, metrics = common.find(args.data, "heldout_transition_times.json"), {}
    fourth = read_notes(path, heldout=True) if path else {}
    for k in tolerances:
        metrics[f"random_within_{k:g}s"] = 100 * float(np.mean(
            [chance(v.note.len, v.note.t[1], k) for v in videos]))
        metrics[f"middle_within_{k:g}s"] = 100 * float(np.mean(
            [distance(v.note.len / 2, v.note.t) <= k for v in videos]))
        known = [v for v in videos if v.name in fourth]
        if known:
            metrics[f"human_within_{k:g}s"] = 100 * float(np.mean(
                [fourth[v.name].t[0] >= 0 and distance(fourth[v.name].t[0], v.note.t) <= k
                 for v in known]))
    return metrics


def localize(args, videos, times):
    """Metrics of the predicted transition times; writes localization.csv."""
    errors = [distance(t, v.note.t) for t, v in zip(times, videos)]
    if common.rank() == 0:
        write_csv(args.out / "localization.csv", [
            ("filename", "predicted_s", "error_s", "annotated_s", "len"),
            *((f"{v.name}.mp4", f"{t:.4f}", f"{e:.4f}", " ".join(f"{x:g}" for x in v.note.t),
               v.note.len) for v, t, e in zip(videos, times, errors))])
    lengths = [v.note.len for v in videos]
    return {**localization(errors, lengths, args.tolerance), "videos": len(videos)}


def score_clips(args, videos, found, step, key):
    """Accuracy of clips, in %, overall and per class; writes the predictions."""
    label, tags, _ = stack(args, videos, found, step)
    overall, each = accuracy(label, tags)
    if common.rank() == 0:
        write_predictions(args, videos, found, step, f"predictions_{key}.csv")
    return {f"{key}_accuracy": 100 * overall, f"{key}_clips": len(label),
            **{f"{key}_{n}": 100 * x for n, x in zip(LABELS, each) if x == x}}


def evaluate(args, device, known):
    """A classifier on all validation videos: clips 0.25 s and 1 s apart, and times; or, if it
    anticipates, clips by both protocols.
    """
    if (args.out / "last.pt").exists():
        raise UserError(f"{args.out}: is the folder of a training run; choose another --out")
    if common.rank() == 0:                                    # of another checkpoint, perhaps
        for old in (*args.out.glob("predictions_*.csv"), args.out / "localization.csv",
                    args.out / "timeline.png"):
            old.unlink(missing_ok=True)
    videos = scan(args, "val", annotations(args))
    beside = {} if args.anticipate else references(args, videos, args.tolerance)
    if known["dim"] != videos[0].dim:
        raise UserError(f"{args.init}: is of features of {known['dim']} numbers, those of "
                        f"{args.features} have {videos[0].dim}")
    model = classifier(args, videos[0])
    common.load_weights(model, Path(args.init), layouts(args.layers))
    model, metrics, found = model.to(device).eval(), {}, {}
    steps = [4, 16] if args.stage == "evaluate" else [4]
    for step in steps if args.loss != "regression" else []:
        for protocol in ("paper", "oops") if args.anticipate else ("",):
            ahead = (args.anticipate or 0) * FPS / step
            if protocol == "oops" and ahead % 1:
                common.say(f"note: of clips {step / FPS:g} s apart none lies {args.anticipate:g} s "
                           "before another: not evaluated by the protocol of oops")
                continue
            args.anticipate_protocol = protocol
            found[step] = predict_clips(args, device, model, videos, step)
            if args.stage == "evaluate":
                key = f"{protocol}{'_' if protocol else ''}step_{step / FPS:g}s"
                metrics |= score_clips(args, videos, found[step], step, key)
    if args.loss == "regression":
        metrics |= localize(args, videos, regress_videos(args, device, model, videos)) | beside
    elif not args.anticipate:
        times = [predicted_time(p[:, 1], cut(v, 4)[1]) for (p, _), v in zip(found[4], videos)]
        metrics |= localize(args, videos, times) | beside
        if common.rank() == 0:
            draw_timeline(args, videos, found[4], times)
    finish(args, {**metrics, "checkpoint": str(args.init), "anticipate_s": args.anticipate})


def write_csv(path, rows):
    """Rows with the names quoted where they need it."""
    def content(f):
        text = io.TextIOWrapper(f, "utf-8", newline="")
        csv.writer(text).writerows(rows)
        text.detach()
    common.write(path, content)


def write_predictions(args, videos, found, step, name):
    """One row per clip: when, its label, the predicted one, probabilities."""
    rows = [("filename", "start_s", "end_s", "label", "predicted",
             *(f"p_{label}" for label in LABELS))]
    for video, (prob, tags) in zip(videos, found):
        spans = cut(video, step)[1]
        for j, label in zip(*targets(args, video, spans, step)):
            rows.append((f"{video.name}.mp4", *(f"{s:.4f}" for s in spans[j]), label, tags[j],
                         *(f"{p:.5f}" for p in prob[j])))
    write_csv(args.out / name, rows)


def draw_timeline(args, videos, found, times, count=4, wide=900, high=312, side=96):
    """timeline.png: pictures of some videos, class probabilities over time, the annotated and the
    predicted transition.
    """
    from PIL import Image, ImageDraw
    chosen = np.unique(np.linspace(0, len(videos) - 1, count).round().astype(int))
    left, right = 60, wide - 20
    image = Image.new("RGB", (wide, 30 + high * len(chosen)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((60, 8), "Probabilities of clips 0.25 s apart; transition: annotated solid red, "
              "predicted dotted black", "black", common.font(15))
    for n, i in enumerate(chosen):
        video, (prob, _), top = videos[i], found[i], 30 + high * n
        centre = cut(video, 4)[1].mean(1)
        box = (left, top + 44 + side, right, top + high - 50)

        def place(t, first=centre[0], last=centre[-1]):
            return left + (t - first) / max(1e-9, last - first) * (right - left)

        title = video.name.encode("ascii", "replace").decode()
        draw.text((left, top + 2), f"{title[:70]}   predicted {times[i]:.2f} s, annotated "
                  f"{', '.join(f'{t:.2f}' for t in video.note.t if t >= 0)} s", "#333333",
                  common.font())
        places = np.linspace(left + 55, right - 55, 7)        # pictures are 110 wide at most
        shown = np.interp(places, (left, right), (centre[0], centre[-1]))
        with contextlib.suppress(VideoError):                 # videos may be elsewhere by now
            pictures, = common.read_clip(video_file(args, "val", video.name), [shown], 256)
            scale = min(110 / pictures.shape[2], side / pictures.shape[1])
            w, h = (round(scale * n) for n in pictures.shape[2:0:-1])
            for x, picture in zip(places, pictures):
                image.paste(Image.fromarray(picture).resize((w, h)), (int(x - w / 2), top + 20))
        marks = [t for t in video.note.t if centre[0] <= t <= centre[-1]]
        common.draw_panel(draw, box, centre, dict(zip(LABELS, prob.T)), "seconds", marks,
                          (0.0, 1.0))
        common.dashed(draw, [(place(times[i]), y) for y in (box[1], box[3])], 3, 4, "black", 3)
    common.save_picture(image, args.out / "timeline.png")


def main(args):
    if not args.data.is_dir():
        raise UserError(f"{args.data}: no such folder; --data is the Oops! folder as README lays "
                        "it out (`make toy` writes a small one, data/toy/oops)")
    if args.stage == "features":
        return extract(args, common.start_run(args))
    known = prepare(args, args.init)
    stage = {"f2c": pretrain, "f2c2v": pretrain, "classify": classify}.get(args.stage, evaluate)
    stage(args, common.start_run(args), known)


if __name__ == "__main__":
    arguments = parse_args()
    common.launch(main, arguments)
