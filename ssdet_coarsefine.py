"""SSDet: Weakly-guided Self-supervised Pretraining for Temporal Activity Detection, AAAI 2023,
arXiv:2111.13675, and Coarse-Fine Networks for Temporal Activity Detection in Videos, CVPR 2021,
arXiv:2103.01302.   Official code: kkahatapitiya/SSDet, commit 5f3f3e3; Coarse-Fine-Networks,
commit 37a612e, and its branch `weak`, f858742; X3D-Multigrid, d63d8fe.

Which of K activities happen in each frame of a long video? Detectors are scarce of frame labels,
so SSDet makes a detection task of Kinetics' clip labels: the label is repeated on every frame,
then frames are frozen (nothing happens: background, label 0), and clips are cross-faded (MixUp)
or share the picture (CutMix) with others for part of the time, so that actions begin, end and
overlap. Coarse-Fine then reads a video twice: finely, at every sampled frame, and coarsely, at a
quarter of them, which Grid Pool chooses; filtered, aligned fine features scale and shift the
coarse ones.

    x'  = Σ_m γ_m(t) x_m                             M clips, present where k_m(t) = 1, weights γ_m
    L   = Σ_m [Σ_bt γ_m CE(z_t, y_m)] / Σ_bt k_m     per-frame logits z: B, K+1, T
    p   = σ(conv(X) / 2),  q = (1 - p) / Σ(1 - p),  c_i = Σ_{j≤i} q_j      Grid Pool: X at c_i·(T-1)
    A_i = Σ_τ v a G_i F_τ / Σ_τ v a G_i              fine features F, valid v, attention a(F),
    G_i = exp(-(τ - μ_i)² / 2σ²) / max,  μ_i = s + c_i T,  σ = N/8         near the coarse time
    X  <- X · σ(W_s [scale(A)_1..4]) + W_b [bias(A)_1..4]                  Multi-stage Fusion
    L   = ½ BCE(max_t P, max_t Y) + ½ BCE(P, Y)      P = σ(logits), Grid Unpool'ed to the frames

Pre-train    torchrun --nproc_per_node 4 ssdet_coarsefine.py
Fine         torchrun --nproc_per_node 2 ssdet_coarsefine.py --stage finetune --stream fine
Features     torchrun --nproc_per_node 2 ssdet_coarsefine.py --stage extract
Coarse-Fine  torchrun --nproc_per_node 2 ssdet_coarsefine.py --stage finetune --stream coarse
End to end   torchrun --nproc_per_node 4 ssdet_coarsefine.py --stage finetune --stream two
Evaluate     python ssdet_coarsefine.py --stage evaluate --init FILE [FILE ...]
Try it       python ssdet_coarsefine.py --data data/toy/kinetics400 --tiny, then
             python ssdet_coarsefine.py --stage finetune --stream fine --data data/toy/charades
             --tiny      (CPU, minutes; `make toy` first)

Official scripts are, for pretrain, train_x3d_kinetics_multigrid.py of SSDet and (--task classify)
of X3D-Multigrid; for x3d train_x3d_charades_loc.py; for fine train_fine.py; for coarse
train_coarse_fineFEAT.py; for two the distributed one of branch `weak`. There is none for slowfast
and multithumos: these are ours, after fine and charades.

The papers' texts were not at hand, only abstracts, figures and READMEs: files named here are those
of the official code, `ours` is from neither. Where the sources and this file differ, grep NOTE in
this file.
"""

import contextlib
import copy
import csv
import io
import itertools
import math
import os
import re
import sys
import time
import warnings
import zlib
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset, Sampler

import common
from common import UserError, VideoError

BACKGROUND = 0                       # label of frozen frames; Kinetics' classes begin at 1
LEVELS = ("layer1", "layer2", "layer3", "layer4", "conv5")    # maps of the fine stream
GRID = 7                             # height and width of stored features
# Squares cut for training, of the short side; SSDet's single stream has the first alone.
SCALES = {"XS": (160 / 180, 160 / 225), "S": (160 / 180, 160 / 225), "L": (312 / 360, 312 / 450),
          "XL": (312 / 360, 312 / 450)}
OTHERS = (224 / 256, 224 / 320)
OFFICIAL = {"charades": (157, {"train": (7985, 49809), "test": (1863, 16691)}),
            "multithumos": (65, {"train": (200, 18482), "test": (213, 20208)})}
RATE = {"charades": 24.0, "multithumos": None}                # frames per second; None: the file's
PICTURES = {"kinetics400": "frame_{:05d}.jpg", "charades": "{id}-{:06d}.jpg",
            "multithumos": "{id}-{:06d}.jpg"}                 # of folders of frames, from 1
NORMS = {"kinetics": ((110.63666788 / 255, 103.16065604 / 255, 96.29023126 / 255),
                      (38.7568578 / 255, 37.88248729 / 255, 40.02898126 / 255)),
         "charades": ((0.413, 0.368, 0.338), (0.131, 0.125, 0.132)),
         "fair": ((0.45,) * 3, (0.225,) * 3)}                 # of the FAIR weights' training
THUMOS = ("BaseballPitch BasketballDunk Billiards CleanAndJerk CliffDiving CricketBowling "
          "CricketShot Diving FrisbeeCatch GolfSwing HammerThrow HighJump JavelinThrow LongJump "
          "PoleVault Shotput SoccerPenalty TennisSwing ThrowDiscus VolleyballSpiking Walk Sit "
          "StandUp Stand Run Jump Fall PickUp Hug PatPerson HighFive FistPump ClapHands "
          "OneRaisedArmCelebrate TwoRaisedArmCelebrate Throw Drop OneHandedCatch TwoHandedCatch "
          "BodyRoll BodyTurn BodyBend BodyContract Squat BasketballDribble BasketballPass "
          "BasketballBlock BasketballShot BasketballGuard VolleyballSet VolleyballBump "
          "VolleyballBlock VolleyballServe WeightliftingClean WeightliftingJerk HammerThrowWindUp "
          "HammerThrowSpin HammerThrowRelease PoleVaultPlantPole ShotPutBend DiscusWindUp "
          "DiscusRelease TalkToCamera CloseUpTalkToCamera NoHuman").split()
FAIR = "https://dl.fbaipublicfiles.com/pyslowfast/x3d_models/x3d_{}.pyth"
SLOWFAST = ("https://dl.fbaipublicfiles.com/pytorchvideo/model_zoo/kinetics/"
            "SLOWFAST_8x8_R50.pyth")
common.FREE_FLAGS |= {"features", "annotations", "chunk", "given"}


# ---- arguments ---------------------------------------------------------------------------------

STAGES = ["pretrain", "finetune", "extract", "evaluate"]
DATASETS = ["kinetics400", "charades", "multithumos"]
STREAMS = ["fine", "coarse", "two", "x3d", "slowfast"]
CROPS = {"XS": 160, "S": 160, "L": 312, "XL": 312}            # of X3D's versions; else 224
COMMON = {"weight_decay": 1e-5, "num_frames": 64, "stride": 10, "epochs": 200, "warmup": 0,
          "dropout": 0.5, "schedule": "steps", "val_every": 2, "groups": 2, "feature_cap": 128}
RECIPES = {                          # what differs: the official scripts' constants
    "detect": {"num_frames": 16, "stride": 5, "batch_size": 64, "groups": 4, "lr": 0.05,
               "backbone_lr": 0.1, "warmup": 8000, "iters": 100_000, "weight_decay": 5e-5,
               "schedule": "constant", "milestones": [], "multigrid": "off"},
    "classify": {"num_frames": 8, "batch_size": 128, "groups": 16, "lr": 0.2, "backbone_lr": 1.0,
                 "warmup": 8000, "iters": 206_160, "weight_decay": 5e-5,
                 "multigrid": "x3d"},                         # milestones: see `recipe`
    "x3d": {"num_frames": 16, "batch_size": 16, "lr": 0.02, "epochs": 100, "schedule": "plateau",
            "milestones": []},
    "fine": {"batch_size": 8, "lr": 0.01, "milestones": [60, 80, 100], "val_every": 4},
    "slowfast": {"batch_size": 8, "lr": 0.01, "milestones": [60, 80, 100], "val_every": 4},
    "coarse": {"batch_size": 6, "lr": 0.02, "milestones": [30, 50, 70]},
    "two": {"batch_size": 16, "groups": 4, "lr": 0.02, "milestones": [60, 90, 110]}}
TINY = {"version": "tiny", "crop": 48, "feature_cap": 80, "dropout": 0.0, "workers": 2,
        "save_every": 100, "groups": 2, "warmup": 0, "schedule": "cosine", "milestones": [],
        "multigrid": "off"}
TINY_RECIPES = {
    "detect": {"iters": 600, "batch_size": 16, "lr": 0.1, "backbone_lr": 1.0, "warmup": 20,
               "val_every": 10},
    "classify": {"iters": 600, "batch_size": 16, "lr": 0.1, "num_frames": 16, "stride": 5,
                 "warmup": 20, "val_every": 10},
    "x3d": {"epochs": 40, "batch_size": 8, "lr": 0.1, "val_every": 10},
    "fine": {"epochs": 40, "batch_size": 8, "lr": 0.1, "num_frames": 24, "val_every": 10},
    "slowfast": {"epochs": 20, "batch_size": 8, "lr": 0.05, "num_frames": 24, "val_every": 10},
    "coarse": {"epochs": 40, "batch_size": 8, "lr": 0.05, "num_frames": 24, "val_every": 10},
    "two": {"epochs": 10, "batch_size": 8, "lr": 0.02, "num_frames": 24, "val_every": 10}}


def parse_args(argv=None):
    p = common.Parser(__doc__, STAGES, DATASETS)
    p.data.add_argument("--annotations", type=Path, metavar="FILE",
                        help="JSON or CSV of the dataset, or the folder of its annotation files "
                             "(default: searched for below --data)")
    scripts = "(default: %(default)s, official scripts)"

    g = p.add_argument_group("clips")
    g.add_argument("--num_frames", type=int, metavar="T",
                   help=f"frames per training clip; 64 of Coarse-Fine also in its Fig. 1 {scripts}")
    g.add_argument("--stride", type=int, metavar="N",
                   help=f"frames from one sampled frame to the next {scripts}")
    g.add_argument("--crop", type=int, metavar="N",
                   help="height and width in pixels; S 160; L, XL 312 (default: %(default)s, "
                        "official code; XS, L: SlowFast's zoo)")
    g.add_argument("--norm_values", choices=list(NORMS),
                   help="whose mean and deviation of colours; fair: of the FAIR checkpoints, which "
                        "the release ignores (default: %(default)s, as released)")

    g = p.add_argument_group("method")
    g.add_argument("--init", nargs="+", metavar="FILE",
                   help="weights to start from: none, fair (X3D, fetched once; as released), "
                        "pytorchvideo (SlowFast, fetched once), or a file: ours or a released one; "
                        "evaluate: several are an ensemble")
    g.add_argument("--init_fine", metavar="FILE",
                   help="the same for the fine stream of --stream two")
    g.add_argument("--task", choices=["detect", "classify"], default="detect",
                   help="pre-training. detect: SSDet; classify: the clips' classes (default: "
                        "%(default)s, SSDet)")
    g.add_argument("--augment", default="freeze,mixup,cutmix", metavar="LIST",
                   help="volume augmentations of SSDet, or none; its published models have one "
                        f"each {scripts}")
    g.add_argument("--aug_prob", type=float, default=0.5, metavar="X",
                   help=f"probability with which each is applied to a batch {scripts}")
    g.add_argument("--cutmix", choices=["growing", "sliding"], default="growing",
                   help="growing: windows change, as SSDet's README; sliding: contents slide, as "
                        "its active code")
    g.add_argument("--stream", choices=STREAMS,
                   help="detector: fine, coarse on stored features, two: both end to end, or the "
                        "baselines x3d and slowfast")
    g.add_argument("--version", choices=["XS", "S", "M", "L", "XL", "tiny"], default="M",
                   help=f"size of X3D {scripts}")
    g.add_argument("--pool", choices=["grid", "avg", "max", "stride"], default="grid",
                   help="pooling in time of the coarse stream (default: %(default)s, Coarse-Fine)")
    g.add_argument("--fusion", choices=["mixed", "own", "none"], default="mixed",
                   help="fine features in the coarse stream: all levels at each stage, each at its "
                        "own, or none (default: %(default)s, Coarse-Fine)")
    g.add_argument("--dropout", type=float, metavar="X",
                   help=f"share dropped before the classifiers {scripts}")

    g = p.add_argument_group("features")
    g.add_argument("--features", type=Path, metavar="DIR",
                   help="features of the fine stream: written by --stage extract, read by --stream "
                        "coarse")
    g.add_argument("--feature_cap", type=int, metavar="T'",
                   help="fine steps that are read, from a video's first on (default: %(default)s, "
                        "Coarse-Fine, Fig. 1; multithumos: ours, unverified)")
    g.add_argument("--float16", action="store_true", help="half precision, half the size on disk")

    g = p.add_argument_group("optimization", "SGD, momentum 0.9; no official script has slowfast "
                             "or multithumos: ours, after fine and charades")
    g.add_argument("--iters", type=int, metavar="N",
                   help="steps of the pre-training (default: %(default)s, detect: from the names "
                        "of the released files, unverified; classify: X3D-Multigrid)")
    g.add_argument("--epochs", type=int, metavar="N",
                   help="passes over the training videos; in the pre-training instead of --iters "
                        f"{scripts}")
    g.add_argument("--batch_size", type=int, metavar="N",
                   help=f"clips per step over all GPUs {scripts}")
    g.add_argument("--groups", type=int, metavar="N",
                   help="parts of a batch that batch norm sees apart, and in which MixUp and "
                        "CutMix find partners; at least the number of processes (default: "
                        "%(default)s, the release's GPUs times splits)")
    g.add_argument("--batch_norm", choices=["split", "sync"], default="split",
                   help="by parts of the batch, or over all of it, on CUDA also across processes "
                        "(default: %(default)s, as released)")
    g.add_argument("--lr", type=float, metavar="X", help=f"learning rate, its peak {scripts}")
    g.add_argument("--backbone_lr", type=float, default=1.0, metavar="FACTOR",
                   help=f"of the backbone's learning rate in the pre-training {scripts}")
    g.add_argument("--weight_decay", type=float, metavar="X",
                   help=f"on all parameters, norms and biases, too {scripts}")
    g.add_argument("--warmup", type=int, metavar="STEPS",
                   help=f"steps in which the learning rate rises linearly {scripts}")
    g.add_argument("--schedule", choices=["constant", "cosine", "steps", "plateau"],
                   help="course of the learning rate; plateau: x0.1 after 10 validations without "
                        "progress (default: %(default)s, official scripts; detect: ours, after the "
                        "released run)")
    g.add_argument("--milestones", type=int, nargs="*", metavar="N",
                   help="of --schedule steps: x0.1 from these epochs on, steps in the pre-training "
                        f"{scripts}")
    g.add_argument("--multigrid", choices=["off", "x3d", "fair"],
                   help="x3d: long and short cycles of the clips' shapes, as X3D-Multigrid; fair: "
                        f"the schedule of SlowFast's authors {scripts}")
    g.add_argument("--val_every", type=int, metavar="EPOCHS",
                   help="epochs from one validation to the next (default: %(default)s, official "
                        "Charades scripts)")
    g.add_argument("--select", choices=["val", "last"], default="val",
                   help="best.pt is of the best validation, or of the last (default: %(default)s, "
                        "as published)")

    g = p.add_argument_group("evaluation")
    g.add_argument("--chunk", type=int, default=1000, metavar="STEPS",
                   help="longer videos are read in pieces of so many sampled frames (default: "
                        "%(default)s, as released)")
    g.add_argument("--frames25", choices=["official", "legacy"], default="official",
                   help="frames for Charades' 25 times. official: the nearest, as "
                        "Charades_v1_localize.m; legacy: the release's")
    g.add_argument("--eval_fps", type=float, default=10.0, metavar="FPS",
                   help="labels per second in the dense mAP of MultiTHUMOS (default: %(default)s, "
                        "ours; the papers' is unverified)")
    g.add_argument("--submission", type=Path, metavar="FILE",
                   help="score this file of Charades' official form, without a network")

    g = p.add_argument_group("faults of the release")
    g.add_argument("--compat", choices=["fixed", "released"], default="fixed",
                   help="released: with the faults of the release (README) (default: %(default)s, "
                        "ours)")
    args = common.parse(p, recipe, argv)
    words = sys.argv[1:] if argv is None else map(str, argv)
    args.given = " ".join(sorted({w[2:].split("=")[0] for w in words if w.startswith("--")}))
    check(p, args)
    return args


def recipe(chosen):
    """Defaults of the published run that the flags name; smaller ones for --tiny."""
    r, stage, stream = dict(COMMON), chosen.stage, chosen.stream or "fine"
    dataset = chosen.dataset
    if stage != "pretrain" and dataset == DATASETS[0]:
        dataset = "charades"
    which = chosen.task if stage == "pretrain" else stream
    data = chosen.data or Path("data") / dataset
    r |= {"dataset": dataset, "data": data, "features": data / "features", "stream": stream}
    r |= {**RECIPES[which], **({"epochs": None} if stage == "pretrain" else {})}
    r |= {"crop": CROPS.get(chosen.version, 224)}
    r["norm_values"] = "kinetics" if stage == "pretrain" else "charades"
    if dataset == "multithumos":
        r["feature_cap"] = 1024
    if which == "classify":
        r["milestones"] = [round((chosen.iters or r["iters"]) * x) for x in (0.4, 0.65, 0.925)]
    if chosen.tiny:
        r |= {**TINY, **TINY_RECIPES[which]}
    if chosen.compat == "released":
        r |= {"cutmix": "sliding", "frames25": "legacy"}
    if chosen.schedule not in (None, "steps"):
        r["milestones"] = []
    if stage in ("extract", "evaluate"):
        r["batch_size"] = None
    runs = Path("runs") / f"ssdet_coarsefine_{dataset}"
    before = Path("runs") / "ssdet_coarsefine_kinetics400_pretrain" / "last.pt"
    init = {"pretrain": "fair" if chosen.task == "detect" and not chosen.tiny else "none",
            "finetune": str(before)}.get(stage)
    if stream == "slowfast" and stage == "finetune":
        init = "none" if chosen.tiny else "pytorchvideo"
    if stage == "extract":
        init = f"{runs}_finetune_fine/best.pt"
    elif stage == "evaluate":
        init = f"{runs}_finetune_{chosen.stream or 'coarse'}/best.pt"
    elif stage == "finetune" and stream == "two":
        init, r["init_fine"] = f"{runs}_finetune_coarse/best.pt", f"{runs}_finetune_fine/best.pt"
    r["init"] = [init]
    kind = {"pretrain": "_classify" * (chosen.task == "classify"), "finetune": f"_{stream}",
            "extract": "", "evaluate": f"_{chosen.stream}" if chosen.stream else
            "_submission" if chosen.submission else "" if chosen.init else "_coarse"}[stage]
    return {**r, "out": Path(f"{runs}_{stage}{kind}")}


def check(p, args):
    """Flags that do not go together."""
    names = [] if args.augment == "none" else args.augment.split(",")
    pretrain, training = args.stage == "pretrain", args.stage in ("pretrain", "finetune")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if training and args.groups % world and args.groups < world:
        args.groups = world                                   # each GPU on its own, as released
    of = {"pretrain": "task augment aug_prob cutmix multigrid backbone_lr iters",
          "finetune": "init_fine val_every", "extract": "float16",
          "evaluate": "submission frames25 eval_fps"}
    idle = [(f, stage) for stage, flags in of.items() for f in flags.split()
            if f in args.given.split() and stage != args.stage
            and not (f in ("frames25", "eval_fps", "val_every") and training)]
    faults = {
        "".join(f"--{f} goes with --stage {stage}" for f, stage in idle[:1]): bool(idle),
        "--pool and --fusion go with --stream coarse and two": args.stage == "finetune"
            and args.stream not in ("coarse", "two") and (args.pool, args.fusion) not in (
                ("grid", "mixed"), ("grid", "none")),
        "--augment: none, or of freeze,mixup,cutmix, none twice":
            len(set(names)) < len(names) or not set(names) <= {"freeze", "mixup", "cutmix"},
        f"--aug_prob {args.aug_prob}: must be at most 1": not args.aug_prob <= 1,
        f"--dropout {args.dropout}: must be below 1": not args.dropout < 1,
        "--stage pretrain goes with --dataset kinetics400, the others do not":
            pretrain != (args.dataset == "kinetics400"),
        "--schedule plateau goes with --stage finetune": args.schedule == "plateau" and pretrain,
        "--milestones go with --schedule steps": bool(args.milestones)
            and args.schedule != "steps",
        f"--crop {args.crop}: must be at least 32": args.crop < 32,
        "--epochs and --iters exclude each other": {"epochs", "iters"} <= set(args.given.split()),
        f"--multigrid: --num_frames {args.num_frames} must be at least 4":
            pretrain and args.multigrid in ("x3d", "fair") and args.num_frames < 4,
        f"--feature_cap {args.feature_cap}: must be at most 100000": args.feature_cap > 100_000,
        f"--init {args.init[0]}: only trainings start from published networks": not training
            and bool({"fair", "pytorchvideo"} & set(args.init)),
        f"--milestones {args.milestones}: must be at least 1":
            any(m < 1 for m in args.milestones or []),
        f"--chunk {args.chunk}: must be at least 8": args.chunk < 8,
        f"--eval_fps {args.eval_fps}: must be from 0.1 to 1000": not 0.1 <= args.eval_fps <= 1000,
        "--init: one file, except with --stage evaluate": len(args.init) != 1
            and args.stage != "evaluate",
        f"--stage {args.stage} needs a trained network, not --init none": "none" in args.init
            and not training,
        f"--groups {args.groups}: must be a multiple of the {world} processes and divide "
        f"--batch_size {args.batch_size}": training
            and bool(args.groups % world or args.batch_size % args.groups),
        "--stream two goes with --fusion mixed or own": (args.stream, args.fusion)
            == ("two", "none") and args.stage == "finetune",
        "--submission goes with --dataset charades": args.submission is not None
            and args.dataset != "charades"}
    for fault, there in faults.items():
        if there:
            p.error(fault)
    args.augment = ",".join(names) or "none"
    args.multigrid = args.multigrid or "off"


# ---- annotations -------------------------------------------------------------------------------

class Video(NamedTuple):
    """An untrimmed video: its name, its file or folder of frames, seconds by the annotation (0:
    unknown), and (class, start, end) of its actions.
    """
    name: str
    path: str
    duration: float
    actions: tuple


def read_lines(path):
    """Lines of a text file with their numbers, empty ones left out."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it comes with the official annotations") from None
    except UnicodeDecodeError as e:
        line = data[:e.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: is not in UTF-8 (byte {e.start})") from e
    if "\0" in text:
        line = text[:text.index("\0")].count("\n") + 1
        raise UserError(f"{path}:{line}: holds a NUL byte")
    return [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]


def seconds(where, text):
    """A finite time from a field of text."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < 1e9:
        raise UserError(f"{where}: {text!r:.60} is no time in seconds")
    return value


def class_of(where, value, classes, base=0):
    """A class counted from `base`, as one counted from 0."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value - base < classes:
        raise UserError(f"{where}: {value!r:.60} is no class from {base} to {base + classes - 1}")
    return value - base


@common.no_collector()
def charades_rows(path, classes):
    """{id: (duration, actions)} of an official Charades CSV."""
    found = {}
    for row in common.read_table(path, ["id", "actions", "length"]):
        where = f"{path}:{row['_line']}"
        name, actions, here = common.Fields(where, row).name("id"), [], f"{where}: actions"
        for action in filter(None, row["actions"].split(";")):
            parts = re.fullmatch(r"c(\d{3}) (\S+) (\S+)", action.strip())
            if not parts:
                raise UserError(f"{where}: actions: {action!r:.60} is not of the form cNNN start "
                                "end")
            actions.append((class_of(here, int(parts[1]), classes), seconds(here, parts[2]),
                            seconds(here, parts[3])))
        length = seconds(f"{where}: length", row["length"])
        if length <= 0:
            raise UserError(f"{where}: length: {length} is no duration")
        if name in found:
            raise UserError(f"{where}: id: {name} stands there twice")
        found[name] = (length, tuple(actions))
    return found


def json_rows(path, split, classes, base):
    """{id: (duration, actions)} of a split in the repositories' JSON; base: number of class 0."""
    table = common.read_json(path)
    if not isinstance(table, dict):
        raise UserError(f"{path}: holds no object of videos")
    subset, found = {"train": "training", "test": "testing"}, {}
    for name, entry in table.items():
        where = f"{path}: {name!r:.60}"
        if not isinstance(entry, dict) or entry.get("subset") not in subset.values():
            raise UserError(f"{where}.subset: is neither training nor testing")
        if entry["subset"] != subset[split]:
            continue
        common.Fields(where, {"name": name}).name("name")
        length, rows = common.Fields(where, entry).number("duration"), entry.get("actions")
        if length <= 0:
            raise UserError(f"{where}.duration: {length} is no duration")
        if not isinstance(rows, list):
            raise UserError(f"{where}.actions: is no list")
        actions = []
        for k, row in enumerate(rows):
            if not isinstance(row, list) or len(row) != 3:
                raise UserError(f"{where}.actions: {row!r:.60} is not [class, start, end]")
            fields = common.Fields(f"{where}.actions[{k}]", dict(enumerate(row)))
            actions.append((class_of(f"{where}.actions[{k}]", row[0], classes, base),
                            float(fields.number(1)), float(fields.number(2))))
        found[name] = (float(length), tuple(actions))
    return found


def thumos_rows(folder, split, names):
    """{id: (0, actions)} of the official text files of MultiTHUMOS, one per class."""
    start, found = {"train": "video_validation_", "test": "video_test_"}[split], {}
    for c, name in enumerate(names):
        for n, line in read_lines(folder / f"{name}.txt"):
            where = f"{folder / name}.txt:{n}"
            parts = line.split()
            if len(parts) != 3 or not re.fullmatch(r"video_(validation|test)_\d{7}", parts[0]):
                raise UserError(f"{where}: {line!r:.60} is not of the form video start end")
            if parts[0].startswith(start):
                times = (seconds(where, parts[1]), seconds(where, parts[2]))
                found.setdefault(parts[0], []).append((c, *times))
    return {k: (0.0, tuple(sorted(v, key=lambda a: a[1:]))) for k, v in sorted(found.items())}


def class_names(args):
    """Names of the dataset's classes, from its list, else as published."""
    root = args.annotations if args.annotations and args.annotations.is_dir() else args.data
    if args.dataset == "charades":
        path = common.find(root, "Charades_v1_classes.txt")
        rows = read_lines(path) if path else [(0, f"c{c:03d} class {c}") for c in range(157)]
        for c, (n, row) in enumerate(rows):
            if row.split()[0] != f"c{c:03d}":
                raise UserError(f"{path}:{n}: {row!r:.60} does not begin with c{c:03d}")
        return [row.partition(" ")[2] for _, row in rows]
    path = next(filter(None, (common.find(d, "class_list.txt")
                              for d in (root, root.parent, args.data) if d.is_dir())), None)
    rows = read_lines(path) if path else [(0, name) for name in THUMOS]
    names = [row.split()[-1] for _, row in rows]
    for k, (n, row) in enumerate(rows):
        common.Fields(f"{path}:{n}", {"class": names[k]}).name("class")
        if names[k] in names[:k] or row.split()[:-1] not in ([], [str(k + 1)]):
            raise UserError(f"{path}:{n}: {row!r:.60} is not class {k + 1}, or stands there twice")
    if not names:
        raise UserError(f"{path}: holds no class")
    return names


def read_videos(args, split, names):
    """The annotated videos of a split, as [Video], in the order of the annotations."""
    given = args.annotations
    root = given if given and given.is_dir() else args.data
    K, base, folder = len(names), int(args.dataset == "multithumos"), None
    if given and not given.is_dir():
        path = given
        if path.suffix == ".csv" and args.stage != "evaluate":
            raise UserError(f"{path}: --annotations: a CSV is of one split; name its folder")
    elif args.dataset == "charades":
        path = (common.find(root, f"Charades_v1_{split}.csv") or common.find(root, "charades.json"))
    else:
        path = common.find(root, "multithumos.json")
        folder = common.find(root, f"{names[0]}.txt")
    if path is not None and path.suffix == ".csv":
        rows = charades_rows(path, K)
    elif path is not None:
        rows = json_rows(path, split, K, base)
    elif folder is not None:
        rows = thumos_rows(folder.parent, split, names)
    else:
        name = {"charades": f"Charades_v1_{split}.csv"}.get(args.dataset, f"{names[0]}.txt")
        raise UserError(f"{root}: holds no annotations of --dataset {args.dataset} ({name} or "
                        f"{args.dataset}.json); --annotations names them")
    if not rows:
        raise UserError(f"{path or folder.parent}: holds no {split} video")
    report(args, split, K, rows, path or folder.parent)
    places = locate(args.data, rows)
    return [Video(name, places.get(name, ""), *rest) for name, rest in rows.items()][:args.limit]


def report(args, split, K, rows, path):
    """Say how much was read, and whether it is as much as the official files hold."""
    count = sum(len(actions) for _, actions in rows.values())
    classes, splits = OFFICIAL[args.dataset]
    same = (len(rows), count) == splits[split] and K == classes
    common.say(f"{split}: {len(rows)} videos, {count} intervals of {K} classes in {path}"
               + " (the official numbers)" * same)
    empty = sum(end <= start for _, actions in rows.values() for _, start, end in actions)
    late = sum(start >= length > 0 for length, actions in rows.values() for _, start, _ in actions)
    if empty + late:
        common.say(f"note: {empty} intervals end before they start, {late} start after their "
                   "video: they count in no frame")


def locate(root, names):
    """{name: path} of videos or folders of frames with these names in a folder, or two below.

    Where some are found lie others' frames, millions of them: nobody looks further down there.
    """
    found, folders = {}, [root] * root.is_dir()
    for _ in range(3):
        below = []
        for folder in folders:
            before, inside = len(found), []
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name.partition(".")[0]
                    if entry.is_dir():
                        if name in names:
                            found[name] = entry.path          # frames are better than a file
                        elif entry.name != "features":
                            inside.append(entry.path)
                    elif name in names and re.search(r"\.(mp4|avi|mkv|webm)$", entry.name):
                        found.setdefault(name, entry.path)
            below += inside if len(found) == before else []
        folders = below
    return found


def with_files(args, videos, split):
    """Those that have a file: training goes on without the others, evaluation does not."""
    here = [v for v in videos if v.path]
    lost = next((v for v in videos if not v.path), None)
    if lost and (split == "test" or not here):
        raise UserError(f"{args.data}: has no video {lost.name} of the {split} split, neither a "
                        f"file nor a folder of frames ({len(videos) - len(here)} of {len(videos)} "
                        "are missing)")
    if lost:
        common.say(f"note: {len(videos) - len(here)} of {len(videos)} training videos have no "
                   f"file, the first is {lost.name}")
    return here


@common.no_collector()
def kinetics_rows(path):
    """[(label, youtube id, "_START_END" as in the names of files)] of Kinetics' CSV or JSON."""
    if path.suffix == ".csv":
        rows = common.table_rows(path, ["label", "youtube_id", "time_start", "time_end"])
    else:
        table, rows = common.read_json(path), []
        for name, entry in table.items() if isinstance(table, dict) else [("", None)]:
            where = f"{path}: {name!r:.60}"
            notes = entry.get("annotations") if isinstance(entry, dict) else None
            segment = notes.get("segment") if isinstance(notes, dict) else None
            if not isinstance(segment, list) or len(segment) != 2:
                raise UserError(f"{where}.annotations.segment: is not [start, end]")
            rows.append((where, kinetics_label(where, notes.get("label")), name,
                         *map(str, segment)))
    found, labels, spans = [], set(), {}                      # many rows share a label, or a span
    for where, label, name, *times in rows:
        span = spans.get(" ".join(times))
        if not span or label not in labels or not common.IDENTIFIER(name):
            where = f"{path}:{where}" if isinstance(where, int) else where
            labels.add(kinetics_label(where, label))
            common.Fields(where, {"youtube_id": name}).name("youtube_id")
            first, last = (int(seconds(where, t)) for t in times)
            span = spans[" ".join(times)] = f"_{first:06d}_{last:06d}"
        found.append((label, name, span))
    return found


def kinetics_label(where, label):
    """A label that can be the name of a folder."""
    if not isinstance(label, str) or not re.fullmatch(r"(?!\.)[^/\\\x00-\x1f]{1,100}", label):
        raise UserError(f"{where}: label: {label!r:.60} is no label")
    return label


def files_of(tree, label):
    """{name without what follows its first dot: FOLDER/FILE} of a class of Kinetics."""
    folder = next((f for f in (label.replace(" ", "_"), label) if (tree / f).is_dir()), None)
    return {f.partition(".")[0]: f"{folder}/{f}" for f in os.listdir(tree / folder)} if (
        folder) else {}


@common.no_collector()
def read_kinetics(args, split):
    """(paths, labels from 0, names of the classes) of the clips of a split that have a file."""
    wanted = {"train": ["train"], "val": ["val", "validate", "validation"]}[split]
    root = args.annotations if args.annotations and args.annotations.is_dir() else args.data
    if args.annotations and not args.annotations.is_dir():
        raise UserError(f"{args.annotations}: --annotations: the folder of {wanted[0]}.csv and the "
                        "like")
    near = [root, root / "annotations"]                       # not among the clips
    path = next((f for w in wanted for end in ("csv", "json") for pattern in ("", "*_")
                 for d in near for f in sorted(d.glob(f"{pattern}{w}.{end}"))), None)
    listing = next((f for d in near for f in sorted(d.glob("*labels.txt"))), None)
    tree = next((d for d in (args.data / w for w in wanted) if d.is_dir()), None)
    if tree is None or path is None:
        raise UserError(f"{args.data}: holds no folder {wanted[0]} of clips, or no {wanted[0]}.csv "
                        "or .json beside it")
    rows = kinetics_rows(path)
    names = ([row for _, row in read_lines(listing)] if listing
             else sorted({label for label, *_ in rows}))
    if len(set(names)) < len(names):
        twice, count = Counter(names).most_common(1)[0]
        raise UserError(f"{listing}: {twice!r:.60} stands there {count} times")
    index, listed = {n: c for c, n in enumerate(names)}, {label for label, *_ in rows}
    if strange := listed - index.keys():
        raise UserError(f"{path}: label {min(strange)!r:.60} is not in {listing}")
    files = {label: files_of(tree, label) for label in sorted(listed)}
    found = [files[label].get(name + span) or files[label].get(name) for label, name, span in rows]
    labels = [index[row[0]] for row in itertools.compress(rows, found)]
    paths = list(filter(None, found))
    common.say(f"{split}: {len(paths)} of {len(rows)} clips of {path} have a file below {tree}, "
               f"{len(names)} classes")
    if len(set(paths)) < len(paths):
        twice, count = Counter(paths).most_common(1)[0]
        raise UserError(f"{path}: {twice!r:.80} stands there {count} times")
    if not paths:
        raise UserError(f"{tree}: holds none of the clips of {path} (LABEL/ID_START_END.mp4, or "
                        "such folders of frames)")
    few = np.linspace(0, len(paths) - 1, min(args.limit or len(paths), len(paths))).astype(int)
    return tree, [paths[i] for i in few.tolist()], np.array(labels)[few], names   # of all classes


class Film:
    """A video file, or a folder of frames, as frames by number from 0.

    rate: frames per second as which a file counts; None: its own.
    """

    def __init__(self, path, pattern, rate=None):
        self.path, self.rate, self.times, self.fps = Path(path), rate, None, None
        self.pattern = pattern.replace("{id}", self.path.name)
        if self.path.is_dir():
            self.n = common.count_frames(self.path, self.pattern)
        elif rate:
            self.n = max(1, round(common.probe(self.path).duration * rate))
        else:
            self.times, self.fps = common.clock(self.path)
            self.n = len(self.times)
        if not self.n:
            raise VideoError(f"{path}: holds no pictures")

    def read(self, numbers, short_side):
        """uint8 (T, H, W, 3) of ascending numbers; files are scaled down to `short_side`."""
        unique, back = np.unique(numbers, return_inverse=True)
        if self.path.is_dir():
            x = common.read_frames(self.path, unique, self.pattern, short_side)
        else:
            times = self.times[unique] if self.times is not None else unique / self.rate
            x, = common.read_clip(self.path, [times], short_side)
        return x if len(unique) == len(numbers) else x[back]


# ---- volume augmentations (Sec. 3 of SSDet, unverified; official file: x3d.py) ------------------

class Mixture(NamedTuple):
    """Clips, and what their frames show: M labels with weights γ, where they are present at all.

    x: (B, 3, T, H, W); label: (M, B, T) long; weight γ: (M, B, T); present k: (M, B, T) of 0, 1.
    """
    x: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor
    present: torch.Tensor

    def chunk(self, n):
        """n Mixtures of equal size, of successive clips."""
        pieces = (self.x.chunk(n), *(v.chunk(n, 1) for v in self[1:]))
        return [Mixture(*piece) for piece in zip(*pieces)]

    def mixed(self, x, partner, weights, present):
        """`x` instead, and the partners' labels beside the own ones: twice the mixtures."""
        return Mixture(x, torch.cat([self.label, self.label[:, partner]]),
                       torch.cat([self.weight * weights[0],
                                  self.weight[:, partner] * weights[1]]),
                       torch.cat([self.present * present[0],
                                  self.present[:, partner] * present[1]]))


def single(x, label):
    """A Mixture of clips as they are.      (B, 3, T, H, W), (B, T) -> M = 1"""
    ones = torch.ones(1, *label.shape, device=x.device)
    return Mixture(x, label[None], ones, ones)


def volume_freeze(mix, start, length):
    """Frame `start` stands still for `length` frames, without an action (label 0); the frames that
    followed come later, and the clip's tail falls off.      start, length: (B,)
    """
    T, device = mix.x.shape[2], mix.x.device
    t = torch.arange(T, device=device)
    start, length = (v.to(device)[:, None] for v in (start, length))
    source = torch.where(t < start, t, (t - length + 1).maximum(start))   # (B, T)
    frozen = (t >= start) & (t < start + length)
    x = torch.stack([clip[:, s] for clip, s in zip(mix.x, source)])
    label = mix.label.gather(2, source.expand_as(mix.label)).masked_fill(frozen, BACKGROUND)
    return mix._replace(x=x, label=label)


def intervals(T, start, length, extend=True):
    """When two clips are seen: (start, end), each (2, B). extend: together they cover the clip;
    the earlier one begins with it, and then the later one ends with it.
    """
    start, end = start.clone(), start + length
    if extend:
        first = (start[1] < start[0]).long()[None]            # ties: the own clip
        length = end - start
        start.scatter_(0, first, 0)
        end = start + length
        last = (end[1] > end[0]).long()[None]
        end.scatter_(0, last, T)
    return start, end


def cross_fade(T, start, end, whole=1):
    """Weights of two clips that are seen from `start` to `end`: (2, B, T), and masks of presence.

    Over the n frames that both share, the later clip's weight grows by 1/(n+1) a frame; of two of
    which one lies inside the other, the outer one's falls to 0 and comes back, half a frame off the
    middle as released. whole: the sum of both weights.
    NOTE: the figure in the official README has (2k-1)/(2n+1) at the k-th shared frame, the code
    k/(n+1).
    """
    t = torch.arange(T, device=start.device)
    present = (t >= start[..., None]) & (t < end[..., None])  # (2, B, T)
    S, E = start.amax(0)[:, None], end.amin(0)[:, None]
    n = (E - S).clamp(min=0)
    rising = (t + 1 - S) * (1 / (n + 1)) * whole              # of the later one, (B, T)
    outer = (t + 1 - (S + E) / 2).abs() * 2 / (n + 1) * whole
    starts_later, ends_later = ((x[0] >= x[1])[:, None] for x in (start, end))
    changing = torch.where(starts_later == ends_later, rising, outer)
    changes = torch.where(starts_later == ends_later, starts_later, ~starts_later)
    own = torch.where(changes, changing, whole - changing)
    other = torch.where(changes, whole - changing, changing)
    both = present[0] & present[1]
    weights = [torch.where(both, w, p * float(whole)) for w, p in zip((own, other), present)]
    return torch.stack(weights), present.float()


def volume_mixup(mix, start, length, partner, extend=True):
    """Each clip cross-fades with its partner.      start, length: (2, B); partner: (B,)"""
    device, partner = mix.x.device, partner.to(mix.x.device)
    span = intervals(mix.x.shape[2], start.to(device), length.to(device), extend)
    weights, present = cross_fade(mix.x.shape[2], *span)      # (2, B, T)
    own, other = weights[:, :, None, :, None, None].to(mix.x.dtype)
    return mix.mixed(mix.x * own + mix.x[partner] * other, partner, weights, present)


def volume_cutmix_sliding(mix, partner):
    """Both clips side by side in windows that stand still, under which their pictures slide.

    The released variant: all the time, labels of one half each. NOTE: the text and the figure of
    the official README describe the growing one.
    """
    T, W, device = mix.x.shape[2], mix.x.shape[4], mix.x.device
    partner = partner.to(device)
    window, column = 9 * W // 16, torch.arange(W, device=device)
    overlap = 2 * window - W
    share = ((column - (W - window) + 1) / (overlap + 1)).clamp(0, 1)     # of the partner, (W,)
    shift = torch.arange(T, device=device) * (7 * W // 16) // T           # (T,)
    own = (column + shift[:, None]) % W                                   # (T, W)
    other = (column - shift[:, None]) % W

    def slid(x, columns):
        return x.gather(4, columns[:, None].expand_as(x))

    x = slid(mix.x, own) * (1 - share) + slid(mix.x[partner], other) * share
    weights = torch.stack([1 - share.mean(), share.mean()]).view(2, 1, 1).to(mix.weight.dtype)
    return mix.mixed(x, partner, weights, torch.ones_like(weights))


def volume_cutmix_growing(mix, start, length, partner, extend=True):
    """The later clip's window grows from one side over the earlier one's, while both are there.

    Weight of a label: its share of the picture. NOTE: in the commented-out code that this follows
    frames which neither clip covers are black (extend=False); here the clips cover all of them.
    """
    T, W, device = mix.x.shape[2], mix.x.shape[4], mix.x.device
    partner = partner.to(device)
    start, end = intervals(T, start.to(device), length.to(device), extend)
    width, present = cross_fade(T, start, end, W)             # (2, B, T) columns
    width = (width + W // 16 * present[0] * present[1]).clamp(0, W)       # the margin of a blend
    column, (mine, others) = torch.arange(W, device=device), width[..., None]
    left, right = column < mine, column >= W - others         # (B, T, W)
    shared = (left & right).sum(-1, keepdim=True)
    ramp = (column - (W - others) + 1) / (shared + 1)         # of the partner
    own = torch.where(left & right, 1 - ramp, left.float())
    other = torch.where(left & right, ramp, right.float())
    x = (mix.x * own[:, None, :, None] + mix.x[partner] * other[:, None, :, None]).to(mix.x.dtype)
    weights = torch.stack([own.mean(-1), other.mean(-1)])     # (2, B, T)
    return mix.mixed(x, partner, weights, torch.stack([left.any(-1), right.any(-1)]).float())


def draw_volume_choices(rng, T, parts, names, prob=0.5, cutmix="growing"):
    """Random choices of one step for a whole batch, as {name: {choice: tensor}} of those applied.

    Each augmentation is applied to the whole batch with probability `prob` (once per step, as
    released). parts: the samples of each part of the batch, (G, B/G); a partner is of the same
    part.
    """
    B, chosen = np.size(parts), {}
    switches = rng.random(3)
    for name, u in zip(("freeze", "mixup", "cutmix"), switches):
        if name not in names or u > prob:
            continue
        partner = np.empty(B, int)
        for part in parts:
            partner[part] = rng.permutation(part)             # of itself, now and then
        length = rng.integers((T + 1) // 2, T + 1, (2, B))    # of an odd T, too, all is covered
        c = {"start": rng.integers(0, T - length + 1), "length": length, "partner": partner}
        if name == "freeze":
            length = rng.integers(1, max(2, T // 2), B)
            c = {"start": rng.integers(0, T - length + 1), "length": length}
        if name == "cutmix" and cutmix == "sliding":
            c = {"partner": partner}
        chosen[name] = {k: torch.from_numpy(v) for k, v in c.items()}
    return chosen


def validation_choices(T, B):
    """The fixed choices with which the release augments its validation, as {name: {choice}}."""
    i, half = torch.arange(B), torch.full((2, B), 3 * T // 4)
    start = torch.stack([torch.zeros_like(i), torch.full_like(i, T // 4)])
    return {"freeze": {"start": torch.where(i % 2 == 0, T // 8, 5 * T // 8),
                       "length": torch.full((B,), T // 4)},
            "mixup": {"start": start, "length": half, "partner": (i + B // 2 + 1) % B,
                      "extend": False},
            "cutmix": {"partner": (i + B // 2 + 2) % B}}


def augment(mix, choices, extend=True):
    """Freeze, MixUp, CutMix, in this order, with the choices of those that are to be applied."""
    for name in ("freeze", "mixup", "cutmix"):
        if name in choices:
            c = choices[name]
            if name == "freeze":
                mix = volume_freeze(mix, **c)
            elif name == "mixup":
                mix = volume_mixup(mix, **c)
            elif "start" in c:
                mix = volume_cutmix_growing(mix, **c, extend=extend)
            else:
                mix = volume_cutmix_sliding(mix, **c)
    return mix


# ---- which frames (official files: charades_fine.py, charades.py, temporal_transforms.py) -------

def kinetics_numbers(n, begin, size, stride, faster=1, span=None):
    """Frames of a training clip, from 0: of the `size` from `begin` on every stride-th, `faster`
    times as far apart; the first span // stride, begun anew where there are fewer.
    """
    numbers = np.arange(begin, min(begin + size, n), faster * stride)
    return np.resize(numbers, (span or size) // stride)


def last_begin(n, size):
    """Training clips begin at 0 .. this."""
    return max(0, n - size - 1)


def kinetics_crops(n, size, stride, crops=3):
    """Frames of the clips that validation looks at, from 0: (crops, size // stride)."""
    numbers, T = np.arange(0, n, stride), size // stride
    step = max(0, int((len(numbers) - 1 - T) // 2))
    return np.stack([np.resize(numbers[c * step:c * step + T], T) for c in range(crops)])


def clip_numbers(n, start, span, stride):
    """Frames of a clip of `span` frames from `start` (all from 0), those past the end left out."""
    return np.arange(start, min(start + span, n), stride)


def start_range(n, span, stride, released=False):
    """First and last possible start of a training clip, from 0, both included.

    NOTE: in the release clips of `min(n, span)` frames begin anywhere in the first ten frames if
    they fill the video, and miss their end; ours end with it.
    """
    span = min(n, span)
    return 0, (min(max(stride, n - span), n) - 1 if released else n - span)


def test_numbers(n, stride, whole=False):
    """Frames of a whole video, and how many of its labels they stand for.

    floor(n / stride) of the Coarse-Fine scripts, which leave out a begun stride; `whole`: all.
    """
    if whole:
        return np.arange(0, n, stride), n
    T = max(1, n // stride)
    return np.arange(T) * stride, min(n, T * stride)


def two_stream_clips(n, start, fine_start, span, fine_span, stride, training):
    """Coarse and fine frames of a video, from 0, and the meta row of both (Sec. 3 of Coarse-Fine).

    meta: the coarse clip's start behind the fine one's, its length, the video's, all in steps.
    """
    if not training:
        start, fine_span = 0, 2 * fine_span
        fine_start = max(0, (n - min(n, fine_span)) // 2 - 1)
        coarse = np.arange(0, n, stride)
        span = n
    else:
        coarse = clip_numbers(n, start, min(n, span), stride)
    fine = clip_numbers(n, fine_start, min(n, fine_span), stride)
    return coarse, fine, ((start - fine_start) // stride, min(n, span) // stride, n // stride, 1)


def frame_labels(actions, n, duration, classes):
    """(classes, n) of 0 and 1: class c at frame f where start < f / fps < end, fps = n / duration.

    actions: (class, start, end) in seconds.
    """
    labels, times = np.zeros((classes, n), np.float32), np.arange(n) / (n / duration)
    for c, start, end in actions:
        labels[c, (times > start) & (times < end)] = 1
    return labels


# ---- how they are cut and coloured (official file: transforms/spatial_transforms.py) ------------

def crop_box(width, height, scale, u, v):
    """(left, top, side) of the square of `scale` of the short side, placed by u, v in [0, 1)."""
    side = max(1, int(min(width, height) * scale))
    return int(u * (width - side)), int(v * (height - side)), side


def centre_box(width, height):
    """(left, top, side) of the largest square in the middle."""
    side = min(width, height)
    return round((width - side) / 2), round((height - side) / 2), side


def cut(x, box, size, flip=False):
    """uint8 (T, H, W, 3) -> (3, T, size, size): cut, scaled bilinearly with antialiasing, mirrored
    """
    left, top, side = box
    x = torch.from_numpy(x[:, top:top + side, left:left + side].copy()).permute(0, 3, 1, 2)
    if side != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return (x.flip(3) if flip else x).transpose(0, 1).contiguous()


def normalise(x, norm):
    """uint8 (B, 3, T, H, W) -> float, by one of NORMS."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1, 1) for v in NORMS[norm])
    return (x / 255 - mean) / std


# ---- multigrid (arXiv 1912.00998; official files: cycle_batch_sampler.py, kinetics_multigrid.py)

LONG_SCALE = (8, 4, 2, 1)            # of the batch, in the four states of a long cycle
LONG_SPAN = (0.25, 0.5, 0.5, 1)      # of the frames that a clip spans


def long_state(step, bounds, released=False):
    """State 0 .. 3 of the long cycle at a step, -1 after the last: three cycles between the first
    four bounds, each in four equal parts, then only the last state.

    NOTE: in the release a cycle ends one step late, as a counter must exceed the bound.
    """
    late = int(released)
    for a, b in itertools.pairwise(bounds[:-1]):
        if a + late * (a > bounds[0]) <= step < b + late:
            return min(3, int(4 * (step - a) / (b - a)))
    return -1


def short_state(step, state):
    """Place in the short cycle: of two batches in the states 0 and 1, of three in the others."""
    return step % (2 if state in (0, 1) else 3)


def clip_shape(state, place, span, crop):
    """(frames spanned, crop, batch factor) in a state of the long and of the short cycle.

    In a short cycle the crop grows by 2^(1/2) and the batch shrinks by 2 from place to place.
    """
    half = int(crop / 2 ** 0.5)
    crops = (int(half / 2 ** 0.5), half) if state in (0, 1) else (crop // 2, half, crop)
    return int(span * LONG_SPAN[state]), crops[place], 2 ** (len(crops) - 1 - place)


def multigrid_lr(step, lr, bounds, milestones, warmup, released=False):
    """lr x 8, 4, 2, 1 in the states of the long cycle, x 0.1 from each milestone on; warmed up
    linearly. NOTE: in the release steps 0 and 1 are not warmed up.
    """
    rise = (step + 1) / warmup if step < warmup and not (released and step < 2) else 1
    scale = LONG_SCALE[long_state(step, bounds, released)]
    return lr * scale * 0.1 ** sum(step >= m for m in milestones) * rise


def ssdet_lr(step, lr, milestones, warmup, backbone=0.1, released=False):
    """(head's, backbone's) learning rate of the pre-training: steps of 0.1, linear warm-up.

    NOTE: the release's warm-up writes one rate into both groups, which both keep from then on.
    """
    rise = (step + 1) / warmup if step < warmup and not (released and step < 2) else 1
    head = lr * 0.1 ** sum(step >= m for m in milestones) * rise
    return head, head * (1 if released and step >= 2 else backbone)


class LongCycle(NamedTuple):
    """A stretch of one shape, up to an epoch: falls of the rate before, batch relative to the base.
    """
    step: int
    batch: int
    frames: int
    crop: int
    end: int


def fair_schedule(steps, epochs, frames, crop, short_cycle=True, epoch_factor=1.5,
                  long=((0.25, 0.5 ** 0.5), (0.5, 0.5 ** 0.5), (0.5, 1), (1, 1)),
                  short=(0.5, 0.5 ** 0.5)):
    """The multigrid authors' own schedule: [LongCycle], of a recipe of `epochs` whose learning
    rate falls at the epochs `steps`, the first 0 (SlowFast, utils/multigrid.py).

    Every stretch between two falls goes through all shapes, epochs in proportion to their average
    batch; the last one stays in the full shape. All in all epoch_factor x epochs.
    """
    whole, shapes = frames * crop ** 2, []
    for t, s in long:
        T, S = round(frames * t), round(crop * s)
        sides = [crop * k for k in short] * short_cycle + [S]
        shapes.append((T, S, [round(whole / (T * side * side)) for side in sides]))
    average = [sum(batches) / len(batches) for *_, batches in shapes]
    plan, iterations = [], 0.0
    for k, (a, b) in enumerate(itertools.pairwise(steps)):
        for (T, S, batches), mean in zip(shapes, average):
            plan.append([k, batches[-1], T, S, (b - a) * mean / sum(average)])
            iterations += (b - a) / sum(average)
    saving = steps[-1] / iterations if iterations else 1      # of iterations
    T, S, batches = shapes[-1]
    plan.append([len(steps) - 1, batches[-1], T, S, (epochs - steps[-1]) / saving * average[-1]])
    stretch = epochs * epoch_factor / sum(row[-1] for row in plan)
    ends = np.cumsum([row[-1] * stretch for row in plan])
    return [LongCycle(*row[:-1], round(end)) for row, end in zip(plan, ends)]


def fair_rates(schedule, gamma=0.1):
    """(epochs at which the rate changes, rates relative to the base) of a `fair_schedule`, whose
    last stretch runs its first half at the rate of the one before.
    """
    steps = [0] + [c.end for c in schedule]
    steps[-1] = (steps[-2] + steps[-1]) // 2
    rates = [gamma ** c.step * c.batch for c in schedule]
    return steps, rates[:-1] + [rates[-2], rates[-1]]


def fair_norm(batch, gpus, base=8):
    """(kind of batch norm, splits or processes) by samples per GPU: 8 share their statistics.

    Of the authors' schedule; our runs take their parts from --groups.
    """
    parts = batch / gpus / base
    if parts > 1:
        return "sub_batchnorm", int(parts)
    return ("sync_batchnorm", int(1 / parts)) if parts < 1 else ("batchnorm", 1)


# ---- Coarse-Fine (Sec. 3, unverified; official file: x3d_coarse.py) -----------------------------

def interpolate(x, y, at):
    """Piecewise-linear function through (x, y) at other places, beyond the ends as in the end
    pieces; x ascends.      (R, N), (R, N), (R or 1, Q) -> (R, Q)
    """
    at = at.expand(len(x), -1).contiguous()
    i = (torch.searchsorted(x.detach().contiguous(), at.detach()) - 1).clamp(0, x.shape[1] - 2)
    slope = (y[:, 1:] - y[:, :-1]) / (torch.finfo(x.dtype).eps + (x[:, 1:] - x[:, :-1]))
    return y.gather(1, i) + slope.gather(1, i) * (at - x.gather(1, i))


def sample(x, at):
    """x at fractional steps `at`, linearly between neighbours, zeros beyond the ends; as a matrix
    product, since a few steps are taken of many places.

    (B, C, N, ...), (B, L) -> (B, C, L, ...)
    """
    step = torch.arange(x.shape[2], device=x.device)
    before = at.detach().floor()[..., None]
    part = at[..., None] - before                             # of the step after, (B, L, 1)
    weight = torch.where(step == before, 1 - part, torch.where(step == before + 1, part, 0.0))
    with common.exact(x):                                     # neighbours differ by little
        y = torch.einsum("bcnp,bln->bclp", x.to(weight).reshape(*x.shape[:3], -1), weight)
    return y.to(x.dtype).reshape(*y.shape[:3], *x.shape[3:])


class GridPool(nn.Module):
    """Keep about a quarter of the steps, at learned times: more where the action is.

    (B, C, T, H, W) -> (B, C, L, H, W) and their times c in [0, 1], (B, L), c_0 = 0, c_L-1 = 1.
    NOTE: L = T/4 + 1; the paper says T/4.
    """

    def __init__(self, channels, norm):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, 2, 1)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, 2, 1)
        self.bn2 = norm(channels)
        self.conv3 = nn.Conv3d(channels, 1, (1, 3, 3), (1, 2, 2), (0, 1, 1))

    def forward(self, x):
        z = F.relu(self.bn1(self.conv1(x)))                   # (B, C, T/2, H/2, W/2)
        z = F.relu(self.bn2(self.conv2(z)))                   # (B, C, T/4, H/4, W/4)
        z = self.conv3(z).mean((1, 3, 4)).float()             # (B, T/4)
        p = torch.sigmoid(0.5 * z)                            # confidence: large, small step
        q = (1 - p) / (1 - p).sum(1, keepdim=True)
        c = F.pad(q.cumsum(1), (1, 0))                        # (B, L)
        return sample(x, c * (x.shape[2] - 1)), c


def undo_times(x, c):
    """x, seen at the times c, at as many uniform times.      (B, K, L), (B, L) -> (B, K, L)"""
    L = x.shape[2]
    u = torch.linspace(0, 1, L, device=c.device)[None]
    g = interpolate(c, u.expand_as(c), u)                     # where c reaches u_j, in 0 .. 1
    return sample(x, g * (L - 1))


def grid_unpool(logits, c):
    """Back to the steps before Grid Pool: (B, K, L), (B, L) -> (B, K, 4 (L-1))"""
    return F.interpolate(undo_times(logits, c), 4 * (logits.shape[2] - 1), mode="linear",
                         align_corners=True)


def gaussian(start, valid, steps, c=None, T=None, L=None, apart=4):
    """Weights of fine steps for coarse times: exp(-(τ - μ_i)² / 2σ²), the largest of each 1.

    start: of the coarse clip, in fine steps (B,); valid: number of fine steps, σ = valid / 8 (B,);
    steps: T'; μ_i = start + c_i·T, or without Grid Pool start + apart·i, i < L. -> (B, T', L)
    NOTE: without Grid Pool the release has μ_i = start + i, though the steps are 4 apart.
    """
    start, valid = (v.to(torch.float32)[:, None] for v in (start, valid))
    mu = start + (c * T if c is not None else apart * torch.arange(L, device=start.device))
    tau = torch.arange(steps, device=start.device)[None, :, None]
    e = -(tau - mu[:, None]) ** 2 / (2 * (valid[:, None] / 8) ** 2)       # (B, T', L)
    return (e - e.amax(1, keepdim=True)).exp()                # never 0 / 0, however far it is


class FusionFilter(nn.Module):
    """Fine features, filtered by self-attention and aligned, as a bias and a scale for the coarse.

    F: (B, C, T', h, w), G: (B, T', L), valid: (B, T') of 0, 1 -> two of (B, C', L, h, w), or with
    `pool` (B, C', L, 1, 1). Nothing of the size C·T'·L is ever made: the aligned mean is a matrix
    product over τ at each place. `alone`: the scale goes through a sigmoid here, not in Mixing.
    """

    def __init__(self, channels, out, pool=False, alone=False, dropout=0.5):
        super().__init__()
        self.pool, self.alone, self.dropout = pool, alone, dropout
        self.at1, self.at2 = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, 1, 1)
        self.fc1, self.fc2 = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, out, 1)
        self.fc3, self.fc4 = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, out, 1)

    def forward(self, x, G, valid):
        B, C, T, h, w = x.shape
        a = self.at2(F.relu(self.at1(x.flatten(2)))).sigmoid().view(B, 1, T, h * w)
        weight = G * valid[..., None]                         # v_τ G(τ, i): (B, T', L)
        A = torch.einsum("bctn,btl->bcln", x.flatten(3) * a, weight.to(x.dtype))
        total = torch.einsum("bctn,btl->bcln", a, weight.to(x.dtype))
        A = A / (total + 1e-6)                                # (B, C, L, h·w)
        L, A = A.shape[2], A.mean(3, keepdim=True) if self.pool else A

        def head(first, second):
            y = F.relu(first(A.flatten(2)))
            y = F.dropout(y, self.dropout, self.training and self.pool)
            return second(y).unflatten(2, (L, 1, 1) if self.pool else (L, h, w))

        bias, scale = head(self.fc1, self.fc2), head(self.fc3, self.fc4)
        return bias, scale.sigmoid() if self.alone else scale


def enlarge(x, size):
    """(B, C, L, h, w) -> (B, C, L, size, size): repeats, or the largest that a place covers."""
    if x.shape[-2:] == (size, size):
        return x
    L, planes = x.shape[2], x.flatten(1, 2)                   # (B, C·L, h, w)
    if size % x.shape[-1] == 0 and x.shape[-1] == x.shape[-2]:
        planes = F.interpolate(planes, size)                  # the same, and much faster
    else:
        planes = F.adaptive_max_pool2d(planes, size)
    return planes.unflatten(1, (-1, L))


class Mixing(nn.Module):
    """Biases and scales of all levels for one stage of the coarse stream: x <- x·scale + bias.

    Lists of (B, C_l, L, h, w), and the stage's height -> two of (B, C, L, size, size). All is
    pointwise and enlarging only repeats, so it is done last: the same at 1/64 of the memory. Where
    the size is no multiple of theirs, the maps are pooled first, as in the release.
    """

    def __init__(self, channels, out):
        super().__init__()
        self.conv_at = nn.Conv1d(channels, out, 1)
        self.conv_at2 = nn.Conv1d(channels, out, 1)

    def forward(self, biases, scales, size):
        repeats = all(size % x.shape[-1] == 0 and x.shape == (*x.shape[:3], *biases[0].shape[3:])
                      for x in (*biases, *scales))

        def mix(maps, conv):
            x = torch.cat(maps if repeats else [enlarge(m, size) for m in maps], 1)
            return enlarge(conv(x.flatten(2)).unflatten(2, x.shape[2:]), size)

        return mix(biases, self.conv_at), mix(scales, self.conv_at2).sigmoid()


class Coarse(common.X3D):
    """The coarse stream: X3D that keeps every fourth step after its first stage, and reads the
    fine stream's features.

    pool: grid, or avg, max, stride; fusion: mixed (all levels at every stage), own (each level at
    its stage) or none. Names as released: pool_1, rw2 .. rw6, mix2 .. mix5.
    """

    def __init__(self, version="M", classes=157, pool="grid", fusion="mixed", released=False,
                 norm=common.SplitBatchNorm, dropout=0.5):
        super().__init__(version, classes, True, norm, dropout)
        self.pool, self.fusion, self.released = pool, fusion, released
        self.sampled = None                                   # times of Grid Pool, of the last call
        *widths, last = self.widths
        if pool == "grid":
            self.pool_1 = GridPool(widths[0], norm)
        for n, width in enumerate(widths if fusion != "none" else [], 2):
            setattr(self, f"rw{n}", FusionFilter(width, width, alone=fusion == "own"))
            if fusion == "mixed":
                setattr(self, f"mix{n}", Mixing(sum(widths), width))
        if fusion != "none":
            self.rw6 = FusionFilter(last, classes, pool=True, alone=True, dropout=dropout)
        for m in self.modules():
            if isinstance(m, GridPool):
                for conv in (m.conv1, m.conv2, m.conv3):
                    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def shorten(self, x):
        """Every fourth step, and their times with Grid Pool: (B, C, T, H, W) -> (B, C, L, H, W)"""
        if self.pool == "grid":
            return self.pool_1(x)
        pools = {"avg": F.avg_pool3d, "max": F.max_pool3d}
        if self.pool == "stride":
            return x[:, :, ::4], None
        return pools[self.pool](x, (4, 1, 1), ceil_mode=x.shape[2] < 4), None

    def forward(self, x, features=None, valid=None, start=None):
        """Clips (B, 3, T, H, W), features {level: (B, C, T', 7, 7)}, which of their steps are
        valid (B, T'), the clip's start behind theirs in steps (B,) -> logits (B, K, 4(L-1)) with
        Grid Pool, else (B, K, L)
        """
        x = self.layer1(self.stem(x))
        T = x.shape[2]
        x, c = self.shorten(x)
        self.sampled, L = c, x.shape[2]
        fused = []
        if self.fusion != "none":
            G = gaussian(start, valid.sum(1), valid.shape[1], c, T, L, 1 if self.released else 4)
            for n, level in enumerate(LEVELS[:4], 2):
                fused.append(getattr(self, f"rw{n}")(features[level].to(x.dtype), G, valid))
        for n in range(2, 6):
            x = getattr(self, f"layer{n - 1}")(x) if n > 2 else x
            if self.fusion == "mixed":
                bias, scale = getattr(self, f"mix{n}")(*zip(*fused), x.shape[-1])
                x = x * scale + bias
            elif self.fusion == "own":
                bias, scale = (enlarge(m, x.shape[-1]) for m in fused[n - 2])
                x = x * scale + bias
        logits = self.head(self.last(x)).float()              # (B, K, L)
        if self.fusion != "none":
            bias, scale = self.rw6(features["conv5"].to(x.dtype), G, valid)
            logits = logits * scale.float().flatten(2) + bias.float().flatten(2)
        return logits if c is None else grid_unpool(logits, c)


def fine_features(fine, x):
    """What the coarse stream reads of the fine one: {level: (B, C, T, 7, 7)}."""
    return {level: F.adaptive_avg_pool3d(m, (m.shape[2], GRID, GRID))
            for level, m in fine.maps(x).items()}


class TwoStream(nn.Module):
    """Both streams, trained together."""

    def __init__(self, coarse, fine):
        super().__init__()
        self.coarse, self.fine = coarse, fine
        for p in (*fine.fc1.parameters(), *fine.fc2.parameters()):
            p.requires_grad_(False)                           # nobody reads the fine logits

    def forward(self, x, fine_x, valid, start):
        return self.coarse(x, fine_features(self.fine, fine_x), valid, start)


# ---- losses (official files: train_fine.py, train_coarse_fineFEAT.py, train_x3d_charades_loc.py)

def totals(*counts):
    """Counts of one process, each a number or a tensor, summed over all of them."""
    device = "cuda" if dist.get_backend() == "nccl" else None
    counts = [torch.as_tensor(c, dtype=torch.float64, device=device) for c in counts]
    flat = torch.cat([c.flatten() for c in counts])
    dist.all_reduce(flat)
    parts = flat.split([c.numel() for c in counts])
    return [p.view(c.shape) for p, c in zip(parts, counts)]


def as_share(total, count):
    """total / count, where the count is of all processes and of all parts of a batch: such shares
    are summed over the parts, and over the processes, whose gradients DDP averages.
    """
    return (total / count.to(total)).sum() * common.world_size()


def pretraining_counts(mix):
    """Of a batch: Σ_bt k_m, and the number of frames."""
    return totals(mix.present.sum((1, 2)), mix.label[0].numel())


def pretraining_loss(logits, mix, counts):
    """Σ_m [Σ_bt γ_m CE(z, y_m)] / Σ_bt k_m, a sum over mixtures; and the soft accuracy,
    Σ_m Σ_bt γ_m [argmax z = y_m] / (B·T).      (B, C, T) -> two scalars, see `as_share`
    """
    logits = logits.float()
    ce = torch.stack([F.cross_entropy(logits, y, reduction="none") for y in mix.label])
    hits = (mix.weight * (logits.argmax(1) == mix.label)).sum()
    return as_share((mix.weight * ce).sum((1, 2)), counts[0]), as_share(hits, counts[1])


def to_labels(logits, length, align_corners):
    """Logits at label rate, linearly: align_corners in the fine stream, not in the others.

    (B, K, T) -> (B, K, length)
    """
    return F.interpolate(logits.float(), length, mode="linear", align_corners=align_corners)


def detection_counts(label, mask):
    """Of a batch: clips x classes, and valid frames x classes."""
    return totals(label[..., 0].numel(), mask.sum() * label.shape[1])


def detection_loss(logits, label, mask, counts):
    """(cls + loc) / 2, cls, loc: cross entropy of a class's maximum over time, and of all frames.

    logits, label: (B, K, N); mask: (B, N) of the frames that count, padding does not; each a
    scalar, see `as_share`. With a mask of ones padding is negative, as in the SSDet repository.
    """
    bce = partial(F.binary_cross_entropy_with_logits, reduction="none")
    logits, valid = logits.float(), mask[:, None]
    top = logits.masked_fill(valid == 0, -math.inf).amax(2)
    cls = as_share(bce(top, label.amax(2)).sum(), counts[0])
    loc = as_share((bce(logits, label) * valid).sum(), counts[1])
    return (cls + loc) / 2, cls, loc


# ---- metrics (official files: apmeter.py, Charades_v1_localize.m) -------------------------------

def average_precision(scores, targets, weights=None):
    """Of one class: mean over the positives of the precision at their rank; 0 without positives.

    scores, targets: (N,); ties keep their order. weights: of the frames, in the precision; the
    mean is over the number of positives all the same, as in the official APMeter.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    y = targets[order].double()
    w = torch.ones_like(y) if weights is None else weights[order].double()
    precision = (w * y).cumsum(0) / w.cumsum(0)
    return float((precision * y).sum() / y.sum().clamp(min=1))


def localization_times(length, count=25):
    """Seconds at which Charades asks, length in seconds: the end is never among them."""
    return np.arange(count) / count * length


def localization_truth(actions, length, classes=157, count=25):
    """(count, classes) of 0 and 1: start <= t_j <= end, both included."""
    truth = np.zeros((count, classes), np.uint8)
    for c, start, end in actions:
        t = localization_times(length, count)
        truth[(t >= start) & (t <= end), c] = 1
    return truth


def charades_localize(truth, scores):
    """(AP of each class, NaN without positives; mAP over the others; AP weighted by positives).

    truth: [(25, K)] by video, in the order of the annotations; scores: the same, -inf where a
    submission has no row. Ties keep that order (Charades_v1_localize.m).
    NOTE: there a class without positives makes the mean NaN; each of the 157 has some.
    """
    truth, scores = (torch.from_numpy(np.concatenate(x)) for x in (truth, scores))
    positives = truth.sum(0, dtype=torch.float64).numpy()
    ap = np.array([average_precision(s, y) if n else math.nan
                   for s, y, n in zip(scores.T, truth.T, positives)])
    there = positives > 0
    if not there.any():
        return ap, math.nan, math.nan
    return ap, float(ap[there].mean()), float((ap * positives)[there].sum() / positives.sum())


def frames_of_25(n, length, fps, legacy=False):
    """Label frames that stand for the 25 times of a video with n frames.

    NOTE: the release takes 1 + i·floor(n/25), which falls behind the times that are asked for.
    """
    if legacy:
        return np.minimum(1 + np.arange(25) * (n // 25), n - 1)
    return np.round(localization_times(length) * fps).astype(int).clip(0, n - 1)


def chunks(T, limit=1000):
    """[(first, end)] of the pieces in which a long video is read, `limit` steps each.

    As released, where the limit applies from limit + 5 steps on; without its empty last piece.
    """
    if T < limit + 5:
        return [(0, T)]
    return [(a, min(a + limit, T)) for a in range(0, T, limit)]


# ---- weights (official files: train_fine.py, train_coarse_fineFEAT.py) --------------------------

HEADS = ("fc2.", "rw6.", "head.projection.")                  # of another number of classes: new
GROWN = ("pool_1.", *(f"{kind}{n}." for kind in ("rw", "mix") for n in range(2, 7)))


def stream_names(tensors, own):
    """A checkpoint's tensors under the names and in the shapes of one stream's network; of heads
    for another number of classes nothing remains.
    """
    slow = any(".pathway1_" in k for k in own)
    ours = (common.slowfast_tensors if slow else common.x3d_tensors)(tensors, own)
    for head in HEADS:
        if any(k in own and own[k].shape != v.shape for k, v in ours.items() if k.startswith(head)):
            ours = {k: v for k, v in ours.items() if not k.startswith(head)}
    return ours


def two_names(tensors, own):
    """`stream_names` of both streams; in the release's files they are model_l and model_g."""
    ours = {}
    for part, theirs in (("coarse.", "model_l_state_dict."), ("fine.", "model_g_state_dict.")):
        found = {k.removeprefix(start): v for start in (part, theirs) for k, v in tensors.items()
                 if k.startswith(start)}
        mine = {k.removeprefix(part): v for k, v in own.items() if k.startswith(part)}
        ours |= {part + k: v for k, v in stream_names(found, mine).items()}
    return ours


def load(model, path, whole=False, heads=True):
    """Fill a network from a checkpoint of ours, the release, SlowFast's zoo or pytorchvideo.

    The backbone must be in it, entirely; classifiers of other classes, and what Coarse-Fine adds
    to X3D, may be missing, unless `whole`. Without `heads` no classifier is taken.
    """
    two = isinstance(model, TwoStream)
    prefixes = ("coarse.", "fine.") if two else ("",)
    may_lack = tuple(p + h for p in prefixes for h in (*HEADS, *GROWN)) + ("fine.fc1.",)
    needed = tuple(k for k in model.state_dict() if whole or not k.startswith(may_lack))
    names = two_names if two else stream_names

    def adapt(tensors, own):
        return {k: v for k, v in names(tensors, own).items() if heads or not k.startswith(HEADS)}

    common.load_weights(model, path, [{"": ""}], needed, adapt=adapt)


class Kind(NamedTuple):
    """What a checkpoint's tensors tell of its network."""
    stream: str
    version: str
    classes: int
    pool: str
    fusion: str


def kind_of(path):
    """The Kind of a checkpoint: stream x3d, slowfast, coarse or two."""
    tensors = common.find_weights(path)
    tensors = {k: v for k, v in tensors.items() if v.dim()}
    if any(".pathway1_" in k or "multipathway" in k for k in tensors):
        head = next((v for k, v in tensors.items() if re.search(r"proj\w*\.bias$", k)), None)
        stem = next((v for k, v in tensors.items() if re.search(
            r"pathway0_stem\.conv|blocks\.0\.multipathway_blocks\.0\.conv", k)), None)
        if head is None or stem is None:
            raise UserError(f"{path}: holds no SlowFast network")
        return Kind("slowfast", "M" if len(stem) == 64 else "tiny", len(head), "", "none")
    two = {k for k in tensors if k.startswith(("coarse.", "model_l_state_dict."))}
    names = {re.sub(r"^(coarse|model_l_state_dict)\.", "", k): v for k, v in tensors.items()
             if (not two or k in two) and v.dim()}
    names = common.x3d_tensors(names, {})
    blocks = tuple(len({k.split(".")[1] for k in names if k.startswith(f"layer{n}.")})
                   for n in range(1, 5))
    stem = len(names["conv1_s.weight"]) if "conv1_s.weight" in names else 0
    fits = [v for v in ("M", "L", "XL", "tiny") if blocks == common.X3D.BLOCKS.get(v, (3, 5, 11, 7))
            and stem == common.X3D.WIDTHS.get(v, (24,))[0]]
    if not fits or "fc2.bias" not in names:
        raise UserError(f"{path}: holds no X3D or SlowFast network")
    grown = any(k.startswith(GROWN) for k in names)
    fusion = ("mixed" if "mix2.conv_at.bias" in names else
              "own" if "rw2.at1.bias" in names else "none")
    stream = "two" if two else "coarse" if grown else "x3d"
    return Kind(stream, fits[0], len(names["fc2.bias"]),
                "grid" if "pool_1.conv1.bias" in names else "", fusion)


# ---- samples -----------------------------------------------------------------------------------

class KineticsClips(Dataset):
    """One random clip of each file: T frames, a square, mirrored half of the time.

    key: (epoch, frames, crop, index); the shape is the sampler's, see `shape_at`.
    """

    def __init__(self, args, tree, files, labels):
        self.args, self.tree, self.labels = args, tree, labels
        self.files = np.array(os.fsencode("\0".join(files)).split(b"\0"))

    def __len__(self):
        return len(self.files)

    def names(self):
        return b"\n".join(self.files.tolist())

    def film(self, i):
        return Film(self.tree / os.fsdecode(self.files[i]), PICTURES["kinetics400"])

    def __getitem__(self, key):
        epoch, T, crop, i = key
        rng = np.random.default_rng((self.args.seed, epoch, i))
        film = self.film(i)
        size, stride = self.args.num_frames * self.args.stride, self.args.stride
        begin = int(rng.integers(0, last_begin(film.n, size) + 1))
        faster = int(rng.integers(1, self.args.num_frames // T + 1))
        numbers = kinetics_numbers(film.n, begin, size, stride, faster, T * stride)
        square = draw_square(rng, scales_of(self.args)[:1])
        return {"clip": training_cut(film, numbers, crop, *square), "label": int(self.labels[i]),
                "index": i}


def scales_of(args):
    return SCALES.get(args.version, OTHERS)


def draw_square(rng, scales):
    """(share of the short side, place, place, mirrored?): of all frames of a clip."""
    return scales[rng.integers(len(scales))], *rng.random(2), rng.random() < 0.5


def training_cut(film, numbers, crop, scale, u, v, mirror):
    """(3, T, crop, crop) uint8 of a film's frames, by `draw_square`."""
    x = film.read(numbers, math.ceil(crop / scale))
    return cut(x, crop_box(x.shape[2], x.shape[1], scale, u, v), crop, mirror)


class KineticsCrops(KineticsClips):
    """Three clips of each file, one behind the other, from the middle of the picture."""

    def __getitem__(self, i):
        film, args = self.film(i), self.args
        numbers = kinetics_crops(film.n, args.num_frames * args.stride, args.stride)
        x = film.read(np.sort(numbers.flatten()), args.crop)
        x = x[np.searchsorted(np.sort(numbers.flatten()), numbers.flatten())]
        x = cut(x, centre_box(x.shape[2], x.shape[1]), args.crop)
        return x.unflatten(1, numbers.shape).transpose(0, 1)  # (3 clips, 3, T, S, S)


def read_features(args, name):
    """{level: (C, T', 7, 7)} of a video, its first --feature_cap steps; only these are read."""
    found = {}
    for level in LEVELS:
        path = args.features / level / name
        if not path.is_file():
            raise VideoError(f"{path}: no such file; --stage extract makes it")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")               # of other files of PyTorch's
                x = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            if x.dim() != 5 or x.shape[0] != 1 or x.shape[3:] != (GRID, GRID) or not len(x[0, 0]):
                raise ValueError(f"is {tuple(x.shape)}, not 1, C, T, 7, 7")
            found[level] = x[0, :, :args.feature_cap].float()
        except Exception as e:                                # pickle, zip and torch errors alike
            raise VideoError(f"{path}: no features ({str(e).splitlines()[0]:.80})") from e
        if not torch.isfinite(found[level]).all():
            raise VideoError(f"{path}: holds NaN or Inf")
    if len({x.shape[1] for x in found.values()}) > 1:
        raise VideoError(f"{args.features}: the levels of {name} have different lengths")
    return found


def check_features(args, videos, widths):
    """Refuse to begin where features are missing, or are not those that the network expects.

    widths: channels of each level. Returns the videos that have features: all but those of which
    extract says that they cannot be read.
    """
    folder, there = args.features, {}
    for level in LEVELS:
        there[level] = set(os.listdir(folder / level)) if (folder / level).is_dir() else set()
    about = common.read_json(folder / "about.json") if (folder / "about.json").exists() else {}
    about = about if isinstance(about, dict) else {}
    unreadable = about.get("unreadable") or []
    if not isinstance(unreadable, list):
        raise UserError(f"{folder / 'about.json'}: unreadable: is no list")
    lost = [f"{level}/{v.name}" for level in LEVELS for v in videos
            if v.name not in there[level] and v.name not in unreadable]
    if lost:
        raise UserError(f"{folder / lost[0]}: no such file; --stage extract makes it "
                        f"({len(lost)} of {len(LEVELS) * len(videos)} are missing)")
    if about.get("stride", args.stride) != args.stride:
        raise UserError(f"{folder}: its features are {about['stride']} frames apart, not "
                        f"--stride {args.stride}")
    before, now = getattr(args, "features_of", None), about.get("crc32")
    if before and now and before != now:
        raise UserError(f"{folder}: its features are of the fine network {now}, this one was "
                        f"trained on those of {before}; --features names them")
    args.features_of = before or now
    kept = [v for v in videos if v.name not in unreadable]
    first = {}
    with contextlib.suppress(VideoError):                     # a broken one is found when read
        first = read_features(args, kept[0].name) if kept else {}
    for (level, x), width in zip(first.items(), widths):
        if len(x) != width:
            raise UserError(f"{folder / level}: has {len(x)} channels, the network needs {width}; "
                            "is it of another --version, or of --tiny?")
    return kept


class Untrimmed(Dataset):
    """Videos with labels of every frame; what clips of them, or all of them, look like."""

    def __init__(self, args, videos, classes):
        self.args, self.videos, self.classes = args, common.Packed(videos), classes
        self.pattern, self.rate = PICTURES[args.dataset], RATE[args.dataset]

    def __len__(self):
        return len(self.videos)

    def names(self):
        return "\n".join(v.name for v in self.videos).encode()

    def open(self, i):
        """(Video, Film, labels of all frames (K, n) uint8, seconds)"""
        video = self.videos[i]
        film = Film(video.path, self.pattern, self.rate)
        if not (video.duration or film.rate or film.fps):
            raise UserError(f"{film.path}: frames without a rate; the JSON tells the duration")
        length = video.duration or film.n / (film.rate or film.fps)
        y = torch.from_numpy(frame_labels(video.actions, film.n, length, self.classes))
        return video, film, y.to(torch.uint8), length


class TrainingClips(Untrimmed):
    """A random clip of each video with its labels, and what --stream needs of the fine stream."""

    def __getitem__(self, key):
        epoch, T, crop, i = key
        args, stride, released = self.args, self.args.stride, self.args.compat == "released"
        rng = np.random.default_rng((args.seed, epoch, i))
        video, film, y, _ = self.open(i)
        span = T * stride
        first, last = start_range(film.n, span, stride, released)
        if args.stream == "x3d" and released:
            last = max(0, film.n - span - 2)
        start = int(rng.integers(first, last + 1))
        scales = scales_of(args)
        square = draw_square(rng, scales[:1] if args.stream == "x3d" else scales)
        item = {"start": 0}
        if args.stream == "two":                              # the same square in both streams
            latest = min(start, start_range(film.n, span, stride, released)[1])
            fine_start = int(rng.integers(0, latest + 1))
            _, fine, meta = two_stream_clips(film.n, start, fine_start, span, span, stride, True)
            item |= {"fine": training_cut(film, fine, crop, *square), "start": meta[0]}
        elif args.stream == "coarse" and args.fusion != "none":
            item |= {"features": read_features(args, video.name),
                     "start": (start + released) // stride}   # NOTE: the release counts from 1
        numbers = clip_numbers(film.n, start, span, stride)
        return {**item, "clip": training_cut(film, numbers, crop, *square),
                "label": y[:, start:start + span], "index": i}


class WholeVideos(Untrimmed):
    """Each video from its first frame to its last, from the middle of the picture."""

    def __getitem__(self, i):
        args, item = self.args, {"start": 0}
        video, film, y, seconds = self.open(i)
        whole = args.stream in ("x3d", "two")
        numbers, length = test_numbers(film.n, args.stride, whole)
        if args.stream == "two":
            span = args.num_frames * args.stride
            numbers, fine, meta = two_stream_clips(film.n, 0, 0, span, span, args.stride, False)
            item |= {"fine": self.middle(film, fine), "start": meta[0]}
        elif args.stream == "coarse" and args.fusion != "none" and args.stage != "extract":
            item["features"] = read_features(args, video.name)
        return {**item, "clip": self.middle(film, numbers), "label": y[:, :length], "index": i,
                "about": (length, film.n, seconds)}

    def middle(self, film, numbers):
        x = film.read(numbers, self.args.crop)
        return cut(x, centre_box(x.shape[2], x.shape[1]), self.args.crop)


def padded(tensors, dim, least=0):
    """Stack tensors of different lengths along `dim`, filled with zeros; and where they are filled,
    (B, length) of 0 and 1.
    """
    lengths = [x.shape[dim] for x in tensors]
    longest = max(*lengths, least)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).float()
    out = []
    for x, n in zip(tensors, lengths):
        pad = [0, 0] * (x.dim() - 1 - dim) + [0, longest - n]
        out.append(F.pad(x, pad) if longest > n else x)
    return torch.stack(out), mask


def collate(items, steps=0, frames=0, feature_steps=0):
    """Items of Untrimmed as a batch: filled with zeros to the longest, or as far as is said.

    NOTE: training fills to the full clip and to --feature_cap, not to the longest of a batch, as
    the release does: so the numbers do not depend on which process has which video.
    """
    batch = {"start": torch.tensor([item["start"] for item in items])}
    batch["clip"], batch["seen"] = padded([item["clip"] for item in items], 1, steps)
    batch["label"], batch["mask"] = padded([item["label"] for item in items], 1, frames)
    if "fine" in items[0]:
        batch["fine"], batch["valid"] = padded([item["fine"] for item in items], 1, steps)
    if "features" in items[0]:
        for level in LEVELS:
            batch[level], batch["valid"] = padded([item["features"][level] for item in items], 1,
                                                  feature_steps)
    if "broken" in items[0]:
        batch["broken"] = [item["broken"] for item in items]
    if "about" in items[0]:
        batch["about"] = torch.tensor([item["about"] for item in items], dtype=torch.float64)
    return batch


# ---- training ----------------------------------------------------------------------------------

class Shape(NamedTuple):
    """Of a step: clips of all processes, T, crop, learning rate over the base, parts of the batch.
    """
    batch: int
    frames: int
    crop: int
    lr: float
    groups: int


def shapes(args, n):
    """(number of steps, function from a step to its Shape) of a run over n samples."""
    base = Shape(args.batch_size, args.num_frames, args.crop, 1.0, args.groups)
    if args.stage != "pretrain":
        return args.epochs * (n // args.batch_size), lambda step: base
    if args.multigrid == "off":
        return args.iters, lambda step: base
    if args.multigrid == "x3d":
        bounds = cycle_bounds(args.iters)

        def shape(step):
            state = long_state(step, bounds, args.compat == "released")
            span, crop, factor = clip_shape(state, short_state(step, state),
                                            args.num_frames * args.stride, args.crop)
            scale = LONG_SCALE[state]
            return base._replace(batch=base.batch * scale * factor, frames=span // args.stride,
                                 crop=crop, lr=scale, groups=base.groups * scale)
        return args.iters, shape

    epochs = max(1, round(args.iters * args.batch_size / n))
    falls = sorted({round(epochs * m / args.iters) for m in args.milestones} - {epochs})
    ends, cycles = [0], fair_schedule([0, *falls], epochs, args.num_frames, args.crop)
    for before, c in zip([0, *(c.end for c in cycles)], cycles):
        factors = [round((c.crop / (args.crop * s)) ** 2) for s in (0.5, 0.5 ** 0.5)] + [1]
        per_step = base.batch * c.batch * sum(factors) / 3
        ends.append(ends[-1] + max(3, round((c.end - before) * n / per_step)))

    def shape_fair(step):
        k = min(int(np.searchsorted(ends, step, "right")) - 1, len(cycles) - 1)
        c = cycles[k]
        crop = (int(args.crop * 0.5), int(args.crop * 0.5 ** 0.5), c.crop)[step % 3]
        factor = round((c.crop / crop) ** 2)
        late = 0 < k == len(cycles) - 1 and step < (ends[-2] + ends[-1]) // 2     # as `fair_rates`
        return Shape(base.batch * c.batch * factor, c.frames, crop,
                     c.batch * 0.1 ** (c.step - late), base.groups * c.batch)
    return ends[-1], shape_fair


def cycle_bounds(iters):
    """Where the long cycles begin and end: three, then the full shape (X3D-Multigrid)."""
    return [round(iters * share) for share in (0, 0.4, 0.65, 0.85, 1)]


class CycleSampler(Sampler):
    """Batches of (epoch, T, crop, index) for the steps start .. steps-1 of this process.

    Each epoch is a permutation fixed by (seed, epoch); one follows the other without a gap, since
    batches differ in size. The processes take equal slices of a batch.
    """

    def __init__(self, n, shape, seed, start, steps):
        largest = max(shape(k).batch for k in range(min(max(1, steps), 1000)))
        if n < largest:
            raise UserError(f"{n} training samples do not fill one batch of {largest}: lower "
                            "--batch_size")
        self.n, self.shape, self.seed, self.start, self.steps = n, shape, seed, start, steps

    def __len__(self):
        return max(0, self.steps - self.start)

    def __iter__(self):
        order = lru_cache(2)(lambda epoch: np.random.default_rng((self.seed, epoch)).permutation(
            self.n))
        at = sum(self.shape(k).batch for k in range(self.start))
        for step in range(self.start, self.steps):
            shape = self.shape(step)
            share = shape.batch // common.world_size()
            first = at + common.rank() * share
            places = (divmod(k, self.n) for k in range(first, first + share))
            yield [(epoch, shape.frames, shape.crop, int(order(epoch)[k])) for epoch, k in places]
            at += shape.batch


def plateau_falls(losses, patience=10, least=1e-4):
    """How often the plateau rule has lowered the rate: each time after more than `patience`
    validations without a loss lower than the best so far.
    """
    best, bad, count = math.inf, 0, 0
    for loss in losses:
        best, bad = (loss, 0) if loss < best * (1 - least) else (best, bad + 1)
        if bad > patience:
            bad, count = 0, count + 1
    return count


def learning_rates(args, step, steps, shape, per_epoch, losses):
    """(of new layers, of the backbone) at a step; with --stream coarse the first is 10 x as large.
    """
    released, milestones = args.compat == "released", args.milestones or []
    if args.stage == "pretrain":
        if args.multigrid == "x3d":
            head = multigrid_lr(step, args.lr, cycle_bounds(args.iters), milestones, args.warmup,
                                released)
            pair = head, head * args.backbone_lr
        else:
            at = milestones if args.multigrid == "off" else []
            pair = ssdet_lr(step, args.lr * shape.lr, at, args.warmup, args.backbone_lr, released)
    else:
        count = (plateau_falls(losses) if args.schedule == "plateau" else
                 sum(step >= m * per_epoch for m in milestones))
        rise = min(1, (step + 1) / max(1, args.warmup))
        lr = args.lr * 0.1 ** count * rise
        pair = lr * (10 if args.stream == "coarse" else 1), lr
    if args.schedule == "cosine":
        pair = [lr * 0.5 * (1 + math.cos(math.pi * step / steps)) for lr in pair]
    return pair


def parameter_groups(args, model):
    """[new layers, backbone]: of the pre-training fc1 and fc2, of Coarse-Fine what fuses."""
    new = r"^(fc[12]|head)\." if args.stage == "pretrain" else r"^(coarse\.)?(rw|mix)\d\."
    named = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    groups = [[p for k, p in named if bool(re.search(new, k)) == first] for first in (True, False)]
    return [{"params": g, "which": n} for n, g in enumerate(groups) if g]


def train(args, device, model, dataset, pack, forward, validate):
    """The loop of both training stages.

    A batch is computed in `groups` parts, one after the other, each with a batch norm of its own;
    a process with several of them adds up their gradients. So results do not depend on how the
    parts are dealt out. pack: items -> batch, or None; forward: (model, batch, step, shape, number
    of parts) -> terms of the loss, part by part; validate: model -> metrics, of which `val_mAP` or
    `val_top1` chooses the checkpoint.
    """
    samples = f"{len(dataset)} (list {zlib.crc32(dataset.names()):08x})"
    dataset = common.SkipBroken(dataset, args.seed)
    if args.batch_norm == "sync" and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.compile:
        model.compile()
    warnings.filterwarnings("ignore", "Grad strides do not match")        # of 1x1x1 kernels
    ddp = DDP(model, gradient_as_bucket_view=True, **common.OWN_BUFFERS)
    optimizer = torch.optim.SGD(parameter_groups(args, model), lr=args.lr, momentum=0.9,
                                weight_decay=args.weight_decay)
    steps, shape_at = shapes(args, len(dataset))
    if common.world_size() > 2:
        settle(args, device, ddp, dataset, pack, shape_at(0))
    saved = common.resume(args.out / "last.pt", args, model=model, optimizer=optimizer)
    start, best = saved["step"], saved.get("best", -math.inf)
    losses = saved.get("val_losses", [])
    common.same_samples(saved, samples, args.out)

    sampler = CycleSampler(len(dataset), shape_at, args.seed, start, steps)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=args.workers,
                        pin_memory=device.type == "cuda", collate_fn=pack,
                        generator=torch.Generator())
    per_epoch = max(1, len(dataset) // args.batch_size)
    log = common.Log(args, start, steps, per_epoch)
    ddp.train()
    for step, batch in log.steps(loader):
        shape = shape_at(step)
        rates = learning_rates(args, step, steps, shape, per_epoch, losses)
        for group in optimizer.param_groups:
            group["lr"] = rates[group["which"]]
        common.set_splits(model, shape.groups)
        optimizer.zero_grad(set_to_none=True)
        parts, total = shape.groups // common.world_size(), {}
        parts = parts if args.batch_norm == "split" else 1
        with contextlib.ExitStack() as stack:
            stack.enter_context(ddp.no_sync())                # until the last part
            each = forward(ddp, to_device(batch, device), step, shape, parts)
            for k in range(parts):
                if k == parts - 1:
                    stack.close()
                common.set_turn(model, k)
                common.seed_step(args.seed, step, common.rank() * parts + k)      # of dropout
                terms = next(each)
                terms["loss"].backward()
                total = {key: total.get(key, 0) + v.detach() for key, v in terms.items()}
        log.guard(step, optimizer, loss=total["loss"])
        optimizer.step()

        validating = (step + 1) % (args.val_every * per_epoch) == 0 or step + 1 == steps
        saving, measured = validating or (step + 1) % args.save_every == 0 or log.stopping, {}
        if saving:
            common.merge_splits(model)
        if validating:
            began = time.perf_counter()
            measured = validate(model.eval())
            losses.append(measured["val_loss"])
            score = measured.get("val_mAP", measured.get("val_top1"))
            if args.select == "last" or score > best:
                best = score
                common.save(args.out / "best.pt", step + 1, args, model=model)
            ddp.train()
            log.since += time.perf_counter() - began          # not part of the training speed
        log(step, saving, **total, lr=rates[-1], **measured)
        if saving:
            common.save(args.out / "last.pt", step + 1, args, model=model, optimizer=optimizer,
                        best=best, samples=samples, val_losses=losses)
    common.barrier()
    if common.rank() == 0:
        common.draw_curve(args.out, f"{args.stage} on {args.dataset}",
                          ["loss", "top1", "soft", "val_loss", "val_mAP", "val_top1", "lr"])
    model.load_state_dict(common.load_file(args.out / "best.pt")["model"])
    return {**validate(model.eval()), "training_samples_broken": log.total("broken")}


def settle(args, device, ddp, dataset, pack, shape):
    """`common.settle` with a batch of the first sample."""
    items = [dataset[0, shape.frames, shape.crop, 0]]
    batch = pack(items) if pack else torch.utils.data.default_collate(items)
    common.set_turn(ddp.module, 0)
    common.settle(ddp, *network_inputs(args, to_device(batch, device)))


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}


def pictures(args, x, seen=None):
    """Normalised clips, zeros where there is no frame.      uint8 (B, 3, T, S, S), (B, T)"""
    x = quick(normalise(x, args.norm_values))
    return x if seen is None else x * seen[:, None, :, None, None]


def quick(x):
    """A clip in the order of memory that halves the time of a training step on the CPU."""
    return x if x.is_cuda else x.contiguous(memory_format=torch.channels_last_3d)


def parts_of(batch, n):
    """n batches of equal size, of successive clips."""
    pieces = {k: v.chunk(n) for k, v in batch.items()}
    return [{k: v[i] for k, v in pieces.items()} for i in range(n)]


def network_inputs(args, batch):
    """What the network of --stream takes of a batch."""
    x = pictures(args, batch["clip"], batch.get("seen"))
    if args.stage == "pretrain" or args.stream not in ("coarse", "two"):
        return [x]
    if args.stream == "two":
        return [x, pictures(args, batch["fine"], batch["valid"]), batch["valid"], batch["start"]]
    if args.fusion == "none":
        return [x]
    return [x, {level: batch[level] for level in LEVELS}, batch["valid"], batch["start"]]


def finish(args, metrics):
    """metrics.json and a line of the console; what is not defined (no positives) is null."""
    metrics = {k: None if v != v else v for k, v in metrics.items()}
    if common.rank() == 0:
        common.write_json(args.out / "metrics.json", metrics)
    common.say("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()
                         if isinstance(v, (int, float))))


def norm_of(args, device):
    """What makes the batch norms of a network: of C channels."""
    if args.batch_norm == "split":
        return partial(common.SplitBatchNorm, splits=args.groups or 1)
    if common.world_size() > 1 and device.type == "cpu":
        raise UserError("--batch_norm sync needs CUDA, or a single process: PyTorch's synchronised "
                        "batch norm does not run on the CPU")
    return nn.BatchNorm3d


def build(args, device, kind):
    """The network of a Kind, its first weights fixed by --seed."""
    torch.manual_seed(args.seed)                              # the same weights on every process
    norm, dropout, per_frame = norm_of(args, device), args.dropout, kind.stream != "clips"
    if kind.stream == "slowfast":
        small = {"width": 16, "depth": (1, 1, 1, 1)} if kind.version == "tiny" else {}
        return common.SlowFast(kind.classes, norm=norm, dropout=dropout, **small).to(device)
    if kind.stream not in ("coarse", "two"):
        return common.X3D(kind.version, kind.classes, per_frame, norm, dropout).to(device)
    coarse = Coarse(kind.version, kind.classes, kind.pool or "grid", kind.fusion,
                    args.compat == "released", norm, dropout)
    if kind.stream == "coarse":
        return coarse.to(device)
    fine = common.X3D(kind.version, kind.classes, True, norm, 0.0)
    return TwoStream(coarse, fine).to(device)


def fetched(args, name):
    """The file of a published network: `fair` (X3D), `pytorchvideo` (SlowFast), or a path."""
    instead = "use --init none"
    if name == "fair":
        return common.fetch(FAIR.format(args.version.lower()), instead)
    return common.fetch(SLOWFAST, instead) if name == "pytorchvideo" else Path(name)


def start_from(args, model):
    """Fill a new network from --init, and --init_fine; its classifiers are new, but those of both
    streams that go on together are kept.
    """
    if (args.out / "last.pt").exists():
        return                                                # this run's own checkpoint follows
    if not isinstance(model, TwoStream):
        if args.init[0] != "none":
            load(model, fetched(args, args.init[0]), heads=False)
        return
    both = args.init[0] not in ("none", "fair") and kind_of(Path(args.init[0])).stream == "two"
    if both:
        load(model, Path(args.init[0]))
    for part, name in ((model.coarse, args.init[0]), (model.fine, args.init_fine)):
        if not both and name not in (None, "none"):
            path = fetched(args, name)
            if part is model.fine and kind_of(path).stream != "x3d":
                raise UserError(f"{path}: --init_fine: is no network of the fine stream")
            load(part, path)


# ---- stage pretrain (official files: train_x3d_kinetics_multigrid.py, kinetics_multigrid.py) ----

def pretrain(args, device):
    """SSDet: detection from clip labels; or classification of the clips."""
    tree, files, labels, names = read_kinetics(args, "train")
    if args.epochs:
        before, args.iters = args.iters, max(1, args.epochs * len(files) // args.batch_size)
        if "milestones" not in args.given.split():
            args.milestones = [round(m * args.iters / before) for m in args.milestones]
    val_tree, val_files, val_labels, val_names = read_kinetics(args, "val")
    if val_names != names:
        raise UserError(f"{args.data}: training and validation have different classes; labels.txt "
                        "lists those of both")
    frames, released = args.task == "detect", args.compat == "released"
    shift = int(frames and not released)                      # NOTE: the release has no background
    kind = Kind("x3d" if frames else "clips", args.version, len(names) + shift, "", "none")
    model = build(args, device, kind)
    start_from(args, model)
    dataset = KineticsClips(args, tree, files, labels)
    checked = KineticsCrops(args, val_tree, val_files, val_labels)
    mine = common.rank(), common.world_size()

    def forward(ddp, batch, step, shape, parts):
        if not frames:
            count, = totals(len(batch["label"]))
            for part in parts_of(batch, parts):
                with common.autocast(device, args.precision):
                    logits = ddp(pictures(args, part["clip"]))[..., 0]
                ce = F.cross_entropy(logits.float(), part["label"], reduction="sum")
                hits = (logits.argmax(1) == part["label"]).sum()
                yield {"loss": as_share(ce, count), "top1": as_share(hits.float(), count)}
            return
        rng, T = np.random.default_rng((args.seed, step, 7)), batch["clip"].shape[2]
        order = np.arange(shape.batch).reshape(shape.groups, -1)
        choices = draw_volume_choices(rng, T, order, args.augment.split(","), args.aug_prob,
                                      args.cutmix)
        label = (batch["label"] + shift)[:, None].repeat(1, T)
        mix = augment(single(pictures(args, batch["clip"]), label), share_of(choices, *mine),
                      extend=not released)
        counts = pretraining_counts(mix)
        for part in mix.chunk(parts):
            with common.autocast(device, args.precision):
                logits = ddp(quick(part.x))                   # (B, K+1, T)
            loss, hits = pretraining_loss(logits, part, counts)
            yield {"loss": loss, "soft": hits}                # accuracy by soft labels

    def validate(model):
        def network(items, batch):
            logits = model(pictures(args, batch.flatten(0, 1))).float()   # (B·3, K, T)
            prob = logits.softmax(1)[:, shift:].mean(2).unflatten(0, batch.shape[:2]).mean(1)
            label = torch.from_numpy(val_labels[items]).to(device)
            loss = F.cross_entropy(logits.mean(2), (label + shift).repeat_interleave(3),
                                   reduction="none").unflatten(0, batch.shape[:2]).mean(1)
            told = logits[:, shift:].argmax(1).unflatten(0, batch.shape[:2])
            right = (told == label[:, None, None]).float().mean((1, 2))
            return [loss, (prob.argmax(1) == label).float(), right]
        loss, top1, right = common.predict(args, device, checked, network, "val", 4)
        measured = {"val_loss": float(loss.mean()), "val_top1": float(top1.mean())}
        return {**measured, "val_frames": float(right.mean())} if frames else measured

    def validate_released(model):
        """As `validate`, and the soft accuracy of clips that are augmented, now and then."""
        def network(items, batch):
            x = pictures(args, batch.flatten(0, 1))
            label = torch.from_numpy(val_labels[items]).to(device).repeat_interleave(3)
            on = np.random.default_rng((args.seed, items[0], 8)).random(3) <= args.aug_prob
            fixed = validation_choices(x.shape[2], len(x))
            mix = augment(single(x, label[:, None].repeat(1, x.shape[2])), {
                name: c for (name, c), u in zip(fixed.items(), on) if u and name in args.augment})
            told = model(mix.x).argmax(1) == mix.label        # (M, B·3, T)
            return [(mix.weight * told).sum(0).mean(1).view(len(items), 3).mean(1)]
        soft, = common.predict(args, device, checked, network, "val", 4)
        return {**validate(model), "val_soft": float(soft.mean())}

    finish(args, train(args, device, model, dataset, None, forward,
                       validate_released if frames and released else validate))


def share_of(choices, rank, world):
    """This process's share of the choices for a whole batch, partners counted within it."""
    def own(k, v):
        n = v.shape[-1] // world
        mine = v[..., rank * n:(rank + 1) * n]
        return mine - rank * n if k == "partner" else mine
    return {name: {k: own(k, v) for k, v in c.items()} for name, c in choices.items()}


# ---- stage finetune (official files: train_fine.py, train_coarse_fineFEAT.py, branch weak) ------

def finetune(args, device):
    """A detector on untrimmed videos."""
    names = class_names(args)
    videos = with_files(args, read_videos(args, "train", names), "train")
    tests = with_files(args, read_videos(args, "test", names), "test")
    kind = Kind(args.stream, args.version, len(names), args.pool, args.fusion)
    model = build(args, device, kind)
    if args.stream == "coarse" and args.fusion != "none":
        videos = check_features(args, videos, model.widths)
        check_features(args, tests, model.widths)
    start_from(args, model)
    masked = args.stream != "x3d" or args.compat == "fixed"
    pack = partial(collate, steps=args.num_frames, frames=args.num_frames * args.stride,
                   feature_steps=args.feature_cap)

    def forward(ddp, batch, step, shape, parts):
        batch["counted"] = batch["mask"] if masked else torch.ones_like(batch["mask"])
        counts = detection_counts(batch["label"], batch["counted"])
        for part in parts_of(batch, parts):
            with common.autocast(device, args.precision):
                logits = ddp(*network_inputs(args, part))
            label = part["label"].float()
            logits = to_labels(logits, label.shape[2], args.stream == "fine")
            loss, cls, loc = detection_loss(logits, label, part["counted"], counts)
            yield {"loss": loss, "cls": cls, "loc": loc}

    def validate(model):
        found = detect(args, device, model, WholeVideos(args, tests, len(names)), "val")
        measured = dense_map(args, tests, [found], len(names))
        if args.dataset == "charades":
            measured |= official_map(args, tests, [found], len(names))[0]
        return {f"val_{k}": v for k, v in measured.items() if k != "ap"}

    metrics = train(args, device, model, TrainingClips(args, videos, len(names)), pack, forward,
                    validate)
    finish(args, {**metrics, "test_videos": len(tests), "chosen_on": {
        "val": "the test videos, as published", "last": "nothing: the last step"}[args.select]})


class Found(NamedTuple):
    """What a network says of a video: logits (K, T') of its first `length` of n frames, which last
    so many seconds; whether T' reaches from end to end; times of Grid Pool in 0 .. 1.
    """
    logits: np.ndarray
    length: int
    n: int
    seconds: float
    align: bool
    sampled: np.ndarray


@torch.inference_mode()
def detect(args, device, model, dataset, what):
    """[Found] of whole videos, each read once, in pieces of --chunk steps."""
    def network(_, batch):
        pieces, times, moved = [], [], to_device(batch, device)
        T = moved["clip"].shape[2]
        for a, b in chunks(T, args.chunk):
            piece = {**moved, "clip": moved["clip"][:, :, a:b], "seen": None,
                     "start": moved["start"] + a}
            logits = model(*network_inputs(args, piece)).float()
            if b - a < T and args.compat == "fixed":          # Grid Pool's are of another length
                logits = to_labels(logits, b - a, False)
            pieces.append(logits)
            coarse = getattr(model, "coarse", model)
            if getattr(coarse, "sampled", None) is not None:
                times.append((a + coarse.sampled[0] * (b - a - 1)) / max(1, T - 1))
        return [torch.cat(pieces, 2), batch["about"],
                torch.cat(times)[None] if times else torch.zeros(1, 0)]
    columns = common.predict(args, device, dataset, network, what, 1, collate)
    return [Found(logits, int(length), int(n), float(seconds), args.stream == "fine", times)
            for logits, (length, n, seconds), times in zip(*columns)]


def label_logits(found, rows):
    """Logits of some classes at label rate, the mean over several networks' Founds of a video:
    (classes, frames), of the frames that all of them saw.
    """
    every = [to_labels(torch.from_numpy(f.logits[None, rows]), f.length, f.align)[0]
             for f in found]
    return torch.stack([x[:, :min(f.length for f in found)] for x in every]).mean(0)


def label_frames(args, found, length):
    """Which of a video's labels are compared: all, of MultiTHUMOS --eval_fps of a second."""
    if args.dataset == "charades":
        return np.arange(length)
    fps = found.n / found.seconds
    return (np.arange(0, length / fps - 1e-9, 1 / args.eval_fps) * fps + 1e-9).astype(int)


def dense_map(args, videos, models, classes, block=8):
    """{mAP over every valid frame, loss, ap: of each class}, in %; models: [[Found of a video]].

    By blocks of classes, dealt out among the processes: all frames of all classes would not fit.
    """
    rows, losses = {}, {}
    for start in range(common.rank() * block, classes, common.world_size() * block):
        chosen = range(start, min(start + block, classes))
        scores, truth = [], []
        for i, video in enumerate(videos):
            found = [m[i] for m in models]
            logits = label_logits(found, slice(chosen.start, chosen.stop))
            actions = [(c - start, s, e) for c, s, e in video.actions if c in chosen]
            first = min(found, key=lambda f: f.length)
            length = video.duration or first.seconds          # of the annotation: exact
            y = torch.from_numpy(frame_labels(actions, first.n, length, len(chosen)))
            y = y[:, :logits.shape[1]]
            loc = F.binary_cross_entropy_with_logits(logits, y, reduction="sum")
            cls = F.binary_cross_entropy_with_logits(logits.amax(1), y.amax(1), reduction="sum")
            losses[start, i] = float(loc / y[0].numel() + cls) / 2 / classes
            keep = label_frames(args, first, logits.shape[1])
            scores.append(logits[:, keep])
            truth.append(y[:, keep])
        scores, truth = torch.cat(scores, 1), torch.cat(truth, 1)
        rows |= {c: average_precision(s, y) for c, s, y in zip(chosen, scores, truth)}
    ap = np.array(list(common.gather(rows, expect=classes).values()))
    parts = [None] * common.world_size()
    dist.all_gather_object(parts, losses)
    every = {k: v for part in parts for k, v in part.items()}
    return {"mAP": 100 * float(ap.mean()), "ap": (100 * ap).tolist(),
            "loss": sum(every[k] for k in sorted(every)) / len(videos)}


def official_map(args, videos, models, classes):
    """({mAP_25, wAP_25} in %, [(25, K) scores of each video], AP of each class) of Charades'
    official protocol.
    """
    scores, truth = [], []
    for i, video in enumerate(videos):
        found, legacy = [m[i] for m in models], args.frames25 == "legacy"
        prob = label_logits(found, slice(None)).sigmoid()     # (K, frames)
        at = frames_of_25(prob.shape[1], video.duration, found[0].n / video.duration, legacy)
        scores.append(prob[:, at].T.numpy())
        truth.append(localization_truth(video.actions, video.duration, classes))
    ap, mean, weighted = charades_localize(truth, scores)
    return {"mAP_25": 100 * mean, "wAP_25": 100 * weighted}, scores, ap


# ---- stage extract (official file: extract_fineFEAT.py) -----------------------------------------

def known_kind(args, path):
    """The Kind of a trained network; `args` becomes as it was trained, but for flags given."""
    kind, asked = kind_of(Path(path)), args.stream
    args.version, args.fusion = kind.version, kind.fusion
    if kind.stream != "x3d":
        args.stream = kind.stream
        if kind.stream in ("coarse", "two"):
            args.pool = kind.pool or (args.pool if args.pool != "grid" else "stride")
    elif args.stream not in ("fine", "x3d"):
        args.stream = "fine"
    saved = common.load_file(Path(path))
    flags = saved.get("args", {}) if isinstance(saved, dict) else {}
    if isinstance(flags, dict) and flags.get("stream") in STREAMS:
        if "stream" in args.given.split() and flags["stream"] != asked and len(args.init) == 1:
            raise UserError(f"{path}: was trained with --stream {flags['stream']}")
        args.stream, args.features_of = flags["stream"], flags.get("features_of")
        for name in ("stride", "num_frames", "crop", "norm_values", "pool",
                     "feature_cap", "compat"):                # as it was trained
            value = flags.get(name)
            if name not in args.given.split() and value and isinstance(value, (int, str)):
                setattr(args, name, value)
    return kind._replace(stream=args.stream, pool=args.pool)


def extract(args, device):
    """Five maps of every video of both splits, pooled to 7x7: DIR/LEVEL/NAME, (1, C, T, 7, 7).

    NOTE: the release extracts only the test split. What is there is not made again.
    """
    path = Path(args.init[0])
    kind, names = known_kind(args, path), class_names(args)
    if args.stream not in ("fine", "x3d"):
        raise UserError(f"{path}: is a network of --stream {args.stream}; features are of the fine "
                        "one")
    args.stream = "fine"
    model = build(args, device, kind).eval()
    load(model, path, whole=True)
    if common.rank() == 0:
        for part in args.features.glob("*/*.tmp*"):           # of a process that was killed
            if re.fullmatch(r"[\w-]+\.tmp\d+", part.name):
                part.unlink()
    common.claim(args.features, model, {
        "stride": args.stride, "crop": args.crop, "norm_values": args.norm_values,
        "chunk": args.chunk, "float16": args.float16}, "layer1/*")
    videos = [v for split in ("train", "test") for v in
              with_files(args, read_videos(args, split, names), split)]
    todo = [v for v in videos[common.rank()::common.world_size()]
            if not all((args.features / level / v.name).is_file() for level in LEVELS)]
    loader = DataLoader(Tolerant(WholeVideos(args, todo, len(names))), batch_size=None,
                        num_workers=args.workers, generator=torch.Generator())
    began, lost = time.perf_counter(), []
    shown, tests = began, {v.name for v in read_videos(args, "test", names)}
    for k, (video, item) in enumerate(zip(todo, loader), 1):
        if isinstance(item, str):
            if video.name in tests:
                raise VideoError(item)
            print(f"warning: {item}; it gets no features", file=sys.stderr, flush=True)
            lost.append(video.name)
            continue
        maps = extract_video(args, device, model, item["clip"][None])
        for level in LEVELS:
            common.write(args.features / level / video.name, partial(torch.save, maps[level]))
        if time.perf_counter() - shown > 10 or k == len(todo):
            shown = time.perf_counter()
            common.say(f"extract {k}/{len(todo)} videos of this process, ETA "
                       f"{(shown - began) / k * (len(todo) - k):.0f} s")
    new, every = totals(len(todo) - len(lost)), [None] * common.world_size()
    dist.all_gather_object(every, lost)
    lost = sorted(itertools.chain.from_iterable(every))
    if common.rank() == 0:
        about = common.read_json(args.features / "about.json")
        common.write_json(args.features / "about.json", {**about, "unreadable": lost})
    finish(args, {"videos": len(videos), "new": int(new[0]), "unreadable": len(lost)})


class Tolerant(Dataset):
    """A dataset whose unreadable items are the text of their fault."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        try:
            return self.dataset[i]
        except VideoError as e:
            return str(e)


@torch.inference_mode()
def extract_video(args, device, model, clip):
    """{level: (1, C, T, 7, 7)} on the CPU, in pieces of --chunk steps."""
    found = {level: [] for level in LEVELS}
    for a, b in chunks(clip.shape[2], args.chunk):
        with common.autocast(device, args.precision):
            maps = fine_features(model, pictures(args, clip[:, :, a:b].to(device)))
        for level, x in maps.items():
            found[level].append(x.to(torch.float16 if args.float16 else torch.float32).cpu())
    maps = {level: torch.cat(x, 2) for level, x in found.items()}
    if not all(torch.isfinite(x).all() for x in maps.values()):
        raise UserError("a network's features are not finite; nothing was written")
    return maps


# ---- stage evaluate (official files: Charades_v1_localize.m, eval_coarse_fineFEAT_ensemble.py) --

def evaluate(args, device):
    """Both mAPs of one network or of several, whose logits are averaged; or of a submission."""
    names = class_names(args)
    tests = read_videos(args, "test", names)
    if args.submission:
        truth = [localization_truth(v.actions, v.duration, len(names)) for v in tests]
        ap, mean, weighted = charades_localize(truth, read_submission(args, tests, len(names)))
        if common.rank() == 0:
            write_classes(args, tests, names, {"AP_25": 100 * ap})
        return finish(args, {"mAP_25": 100 * mean, "wAP_25": 100 * weighted})
    tests, models = with_files(args, tests, "test"), []
    for path in map(Path, args.init):
        own = copy.copy(args)                                 # flags of one are not the next one's
        kind = known_kind(own, path)
        if kind.classes != len(names):
            raise UserError(f"{path}: tells {kind.classes} classes apart, {args.dataset} has "
                            f"{len(names)}")
        model = build(own, device, kind).eval()
        load(model, path, whole=True)
        if own.stream == "coarse" and own.fusion != "none":
            check_features(own, tests, model.widths)
        models.append(detect(own, device, model, WholeVideos(own, tests, len(names)), "evaluate"))
    metrics = dense_map(args, tests, models, len(names))
    columns = {"AP": np.array(metrics.pop("ap"))}
    if args.dataset == "charades":
        official, scores, ap = official_map(args, tests, models, len(names))
        metrics, columns = {**official, **metrics}, {**columns, "AP_25": 100 * ap}
    if common.rank() == 0:
        write_classes(args, tests, names, columns)
        if args.dataset == "charades":
            write_submission(args, tests, scores)
        draw_timeline(args, tests, models, names)
    if args.dataset == "charades":
        metrics["frames25"] = args.frames25
    rate = {"charades": "every frame", "multithumos": f"{args.eval_fps:g} per second"}
    finish(args, {**metrics, "test_videos": len(tests), "networks": len(models),
                  "dense_labels": rate[args.dataset]})
    return None


def write_classes(args, videos, names, columns):
    """per_class.csv: intervals in the test videos and average precision of each class, in %."""
    counts = np.bincount([c for v in videos for c, *_ in v.actions], minlength=len(names))
    with io.StringIO(newline="") as f:
        rows = csv.writer(f, lineterminator="\n")
        rows.writerow(["class", "name", "intervals", *columns])
        for c, name in enumerate(names):
            rows.writerow([c, name, counts[c], *(f"{ap[c]:.4f}" for ap in columns.values())])
        common.write(args.out / "per_class.csv", f.getvalue())


def write_submission(args, videos, scores):
    """localization.txt of Charades' official form: `id frame score_0 ...`, frames 1 .. 25."""
    lines = [f"{v.name} {j + 1} " + " ".join(f"{p:.9g}" for p in row)
             for v, block in zip(videos, scores) for j, row in enumerate(block)]
    common.write(args.out / "localization.txt", "\n".join(lines) + "\n")


def read_submission(args, videos, classes):
    """[(25, K)] scores of a file of the official form, -inf where it has no row; a later row of
    the same frame counts, and frames may begin at 0.
    """
    place, rows = {v.name: i for i, v in enumerate(videos)}, []
    for n, line in read_lines(args.submission):
        where, parts = f"{args.submission}:{n}", line.split()
        if len(parts) != classes + 2 or not re.fullmatch(r"[0-9]{1,9}", parts[1]):
            raise UserError(f"{where}: is not an id, a frame and {classes} scores")
        try:
            row = [float(x) for x in parts[2:]]
        except ValueError:
            row = [math.nan]
        if any(x != x for x in row):
            raise UserError(f"{where}: a score is no number")
        rows.append((parts[0], int(parts[1]), row, where))
    strange = sum(name not in place for name, *_ in rows)
    if len(rows) == strange:
        raise UserError(f"{args.submission}: holds no row of a test video")
    given = {(name, frame) for name, frame, *_ in rows if name in place}
    for count, what in ((25 * len(videos) - len(given), f"of {25 * len(videos)} frames are missing "
                         "and count as last"), (strange, "rows are of no test video"),
                        (len(rows) - strange - len(given), "frames stand there twice, the later "
                         "row counts")):
        if count:
            common.say(f"warning: {args.submission}: {count} {what}")
    scores = np.full((len(videos), 25, classes), -math.inf)
    first = min((frame for _, frame, *_ in rows), default=1) and 1        # or 0, where one is
    for name, frame, row, where in rows:
        if not 0 <= frame - first < 25:
            raise UserError(f"{where}: frame {frame} is none of 25")
        if name in place:
            scores[place[name], frame - first] = row
    return list(scores)


def draw_timeline(args, videos, models, names, count=3, most=8, wide=900):
    """timeline.png: of some videos, classes x time: bars are the truth, grey the probability, and
    below them the times at which Grid Pool looked.
    """
    from PIL import Image, ImageDraw
    busy = sorted(range(len(videos)), key=lambda i: -len(videos[i].actions))[:count]
    left, right, row, font = 230, wide - 20, 22, common.font()
    image = Image.new("RGB", (wide, 40 + len(busy) * (most * row + 90)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((10, 8), "Shade: predicted probability. Bar below it: annotated. Lowest ticks: "
              "times at which Grid Pool looked", "black", common.font(15))
    for n, i in enumerate(busy):
        video, found = videos[i], [m[i] for m in models]
        prob = label_logits(found, slice(None)).sigmoid().numpy()
        length = found[0].seconds
        true = sorted({c for c, *_ in video.actions}, key=lambda c: -prob[c].max())
        others = [c for c in np.argsort(-prob.max(1)) if c not in true]
        chosen, top = [*true[:most], *others][:most], 40 + n * (most * row + 90)
        draw.text((10, top), f"{video.name}   {length:.1f} s", "black", font)
        for k, c in enumerate(chosen):
            y = top + 20 + k * row
            name = names[c] if len(names[c]) <= 32 else f"{names[c][:30]}..."
            draw.text((left - 8, y + row // 2), name, "black" if c in true else "#888888", font,
                      anchor="rm")
            at = (np.arange(right - left) / (right - left) * found[0].n).astype(int)
            shade = prob[c][at.clip(0, prob.shape[1] - 1)]
            strip = np.repeat((255 - 220 * shade).astype(np.uint8)[None], row - 8, 0)
            image.paste(Image.fromarray(strip), (left, y + 2))
            draw.rectangle((left, y + 1, right, y + row - 6), outline="#cccccc")
            for cc, s, e in video.actions:
                if cc == c:
                    x = [left + (right - left) * min(max(t, 0), length) / length for t in (s, e)]
                    draw.line([(x[0], y + row - 4), (x[1], y + row - 4)], fill="#1f4e9c", width=4)
        bottom = top + 20 + len(chosen) * row
        for t in found[0].sampled:
            x = left + (right - left) * float(t) * found[0].length / found[0].n
            draw.line([(x, bottom), (x, bottom + 8)], fill="#c65a11", width=2)
        for t in common.round_numbers(0, length, 9):
            x = left + (right - left) * t / length
            draw.text((x, bottom + 10), f"{t:g}", "#333333", font, anchor="ma")
        draw.text(((left + right) / 2, bottom + 26), "seconds", "#333333", font, anchor="ma")
    common.save_picture(image, args.out / "timeline.png")


def main(args):
    if not args.data.is_dir() and not args.submission:
        raise UserError(f"{args.data}: no such folder; --data is the folder of {args.dataset} as "
                        f"README lays it out (`make toy` writes a small one, data/toy/"
                        f"{args.dataset})")
    begun = args.stage in ("pretrain", "finetune") and (args.out / "last.pt").exists()
    for path in [] if begun or args.submission else [*args.init, args.init_fine or "none"]:
        if path not in ("none", "fair", "pytorchvideo") and not Path(path).is_file():
            raise UserError(f"{path}: no such file; --init names weights to start from"
                            + ", or none" * (args.stage in ("pretrain", "finetune")))
    stage = {"pretrain": pretrain, "finetune": finetune, "extract": extract,
             "evaluate": evaluate}[args.stage]
    stage(args, common.start_run(args))


if __name__ == "__main__":
    arguments = parse_args()
    common.launch(main, arguments)
