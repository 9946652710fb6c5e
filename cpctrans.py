"""CPCTrans: Contrastive Predictive Coding with Transformer for Video Representation Learning (Liu
et al.), Neurocomputing 482 (2022).   Official code: QiyueShang666/SSL-for-Video, commit ce2d518,
a fork of yliu1229/CPCTR, commit 66fcd33.

A network sees a few pictures of an unlabelled video and predicts, in feature space, every cell of
the next ones. It must tell the true cell from all other cells of all predicted pictures of all
videos in the batch, so it has to know what moves where. Then it is fine-tuned to name actions.

    F = f(x_1 ... x_N)                      2-D ResNet-18, cells of 32 x 32 pixels, M per picture
    Z = Enc(F_11 ... F_NM)                  2 layers, attention over all N·M cells, no positions
    h = GRU(relu Z_1 ... relu Z_{N-P})      context; each cell is a GRU of its own
    ẑ_1 = φ(h),  h <- GRU(relu ẑ_p, h),  ẑ_{p+1} = φ(h)              predictions, p = 1 ... P
    L = -1/BPM Σ_{b,p,s} log [ exp(ẑ_bps·z_bps) / Σ_{b'p's'} exp(ẑ_bps·z_b'p's') ],  z_p = Z_{N-P+p}

    class = Linear(BN(mean over cells of GRU(relu Enc(relu F))))      fine-tuning, all N pictures

Pre-train    torchrun --nproc_per_node 8 cpctrans.py --dataset ucf101 --data data/ucf101
Fine-tune    python cpctrans.py --stage finetune --dataset hmdb51 --init FILE
Probe        python cpctrans.py --stage finetune --train_what last --init FILE
Test         python cpctrans.py --test FILE [FILE FILE]       one per split
Try it       python cpctrans.py --data data/toy/ucf101 --tiny      (CPU, minutes; `make toy` first)

DPC (--method dpc) is arXiv:1909.04656, commit 1592e5f of TengdaHan/DPC; MemDPC arXiv:2008.01065.
The paper's text was not at hand, only its abstract: files named here are those of the official
code, `ours` is from neither. Where the sources and this file differ, grep NOTE in this file.
"""

import argparse
import itertools
import json
import math
import os
import re
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset

import common
from common import UserError, VideoError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = (0.5, 0.5, 0.5, 0.25)       # reach of brightness, contrast, saturation factors, of hue
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
HELD_OUT = (24, 25)                  # groups of UCF101 that are training videos in every split
POSITIVE, EASY, TEMPORAL, SPATIAL = 1, 0, -1, -3               # categories of pairs
CHUNK = 8                            # clips of a video that go through the network at once
SHAPE = {"method": "cpctrans", "net": "resnet18", "width": 64, "layers": 2, "heads": 4,
         "attn": "full", "pos": "none"}        # the network, which a checkpoint fixes
# How clips are cut: may change from pre-training to fine-tuning, not from there to the test.
VIEW = {"img_dim": 224, "crop": 224, "resize": "nearest", "ds": 3, "seq_len": 1}
DPC_VIEW = {"img_dim": 128, "seq_len": 5}
common.FREE_FLAGS |= {"frames", "lists", "force"}


# ---- arguments ---------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.Parser(__doc__, ["pretrain", "finetune", "test"], ["ucf101", "hmdb51"])
    p.set_defaults(stage=None)                # --pretrain and --test imply one
    p.data.add_argument("--split", type=int, choices=[1, 2, 3],
                        help="official split, the same in all stages (default: that of --init or "
                             "--test, else 1, test.py)")
    p.data.add_argument("--frames", type=Path, metavar="DIR",
                        help="read DIR/<Class>/<video>/image_00001.jpg ... instead of videos")
    p.data.add_argument("--lists", type=Path, metavar="DIR",
                        help="folder of the split lists, official ones or the author's "
                             "train_split01.csv (default: searched for below --data)")
    p.data.add_argument("--force", action="store_true",
                        help="go on where the checkpoint's split, dataset or clip differs")

    g = p.add_argument_group("clips")
    g.add_argument("--num_seq", type=int, metavar="N",
                   help="frames per clip, the predicted ones included (default: 5 to pre-train, 7 "
                        "to fine-tune, official README; dpc 8; test: the checkpoint's)")
    g.add_argument("--pred_step", type=int, default=3, metavar="P",
                   help="the last P of them are predicted; no meaning after pre-training (default: "
                        "%(default)s, official README)")
    g.add_argument("--seq_len", type=int, metavar="N",
                   help="frames per block, with --method dpc (default: 1 or the checkpoint's, as "
                        "released; dpc 5)")
    g.add_argument("--ds", type=int, metavar="N",
                   help="frames from one sampled frame to the next (default: 3 or the "
                        "checkpoint's, main.py)")
    g.add_argument("--img_dim", type=int, metavar="N",
                   help="height and width in pixels; 128, 196 and 224 in the official table "
                        "(default: 224 or the checkpoint's, official README; dpc 128)")
    g.add_argument("--crop", type=int, metavar="N",
                   help="pixels cut from frames 15/14 as high, and scaled to --img_dim (default: "
                        "224 or the checkpoint's, main.py)")
    g.add_argument("--resize", choices=["nearest", "bilinear"],
                   help="how they are scaled (default: nearest or the checkpoint's, as released)")
    g.add_argument("--short", choices=["pad", "drop"], default="pad",
                   help="videos too short for a clip: repeat the last frame, or leave them out, of "
                        "the test, too, as dataset_3d_lc.py (default: %(default)s, ours)")

    g = p.add_argument_group("method")
    g.add_argument("--init", metavar="FILE",
                   help="weights to start from: none, or a file: ours, the release's, CPCTR's or "
                        "DPC's (default: none)")
    g.add_argument("--pretrain", metavar="FILE",
                   help="the same as --stage finetune --init FILE; random: none")
    g.add_argument("--method", choices=["cpctrans", "dpc"],
                   help="dpc: blocks of 5 frames, 3-D kernels, no transformer (default: cpctrans "
                        "or the checkpoint's)")
    g.add_argument("--net", choices=["resnet10", "resnet18", "resnet34"],
                   help="backbone (default: resnet18 or the checkpoint's, main.py)")
    g.add_argument("--width", type=int, metavar="N",
                   help="channels of the backbone's first stage (default: 64 or the checkpoint's, "
                        "resnet.py)")
    g.add_argument("--layers", type=int, metavar="N",
                   help="layers of the transformer (default: 2 or the checkpoint's, "
                        "transformer_encoder.py; 1 in CPCTR)")
    g.add_argument("--heads", type=int, metavar="N",
                   help="heads of its attention (default: 4 or the checkpoint's, "
                        "transformer_encoder.py; 2 in CPCTR)")
    g.add_argument("--attn", choices=["full", "causal", "frame"],
                   help="which cells a cell attends to. full: of all frames, the predicted ones, "
                        "too; causal: of no later frame; frame: of its own (default: full or the "
                        "checkpoint's, as released)")
    g.add_argument("--pos", choices=["none", "sin"],
                   help="positional encoding; the release computes one and leaves it out (default: "
                        "none or the checkpoint's, as released)")
    g.add_argument("--dropout", type=float, default=0.5, metavar="X",
                   help="share dropped before the classifier (default: %(default)s, test.py)")
    g.add_argument("--negatives", choices=["all", "local"], default="all",
                   help="of the whole batch, or of each process's share of it, as DPC's (default: "
                        "%(default)s, ours; the release has one GPU)")

    g = p.add_argument_group("optimization", "Adam")
    scripts = "main.py and test.py"
    g.add_argument("--train_what", choices=["ft", "last", "all"], default="ft",
                   help="fine-tuning. ft: backbone and transformer at a tenth of --lr; last: "
                        "linear probe, all but the classifier is frozen; all: everything at --lr "
                        "(default: %(default)s, test.py)")
    g.add_argument("--epochs", type=int, metavar="N",
                   help=f"passes over the training videos (default: %(default)s, {scripts}; "
                        "--train_what last: as MemDPC)")
    g.add_argument("--batch_size", type=int, metavar="N",
                   help=f"videos per step over all GPUs (default: %(default)s, {scripts}; dpc: "
                        "DPC's README)")
    g.add_argument("--lr", type=float, metavar="X",
                   help="learning rate, first value; halved (fine-tuning: x0.1) every 100 epochs; "
                        "--train_what last: x0.1 after 60 and 80, as MemDPC (default: "
                        f"%(default)s, {scripts})")
    g.add_argument("--weight_decay", "--wd", type=float, metavar="X",
                   help="on all parameters, norms and biases, too; added to the gradient "
                        f"(default: %(default)s, {scripts})")

    g = p.add_argument_group("evaluation")
    g.add_argument("--test", type=Path, nargs="+", metavar="FILE",
                   help="the same as --stage test, of fine-tuned files, one per split; of a "
                        "pre-trained one: retrieval alone")
    g.add_argument("--crops", type=int, choices=[1, 5, 10], default=1,
                   help="of a test clip: the centre; and the corners; and mirrored (default: "
                        "%(default)s, test.py)")

    g = p.add_argument_group("faults of the release")
    g.add_argument("--compat", choices=["fixed", "released"], default="fixed",
                   help="released: pre-train on train list 3, choose the checkpoint on test "
                        "videos, drop short videos, --train_what last means all (default: "
                        "%(default)s, ours)")
    g.add_argument("--gpu", metavar="IDS", help="ignored: torchrun deals out the GPUs")
    args = common.parse(p, recipe, argv)
    if args.gpu is not None:
        common.say(f"note: --gpu {args.gpu} is ignored; CUDA_VISIBLE_DEVICES chooses GPUs")
    args.gpu = args.pretrain = None
    if args.compat == "released":
        args.short = "drop"
        args.train_what = "all" if args.train_what == "last" else args.train_what
    if args.stage == "test" and len(args.test) > 3:
        p.error("--test: one file per split, three at most")
    return args


PUBLISHED = {
    method: {"pretrain": {"epochs": 300, "batch_size": batch, "weight_decay": 1e-5},
             "finetune": {"epochs": 300, "batch_size": batch, "weight_decay": 1e-3}}
    for method, batch in (("cpctrans", 16), ("dpc", 128))}
TINY = {"pretrain": {"epochs": 60},
        "finetune": {"epochs": 30, "lr": 5e-3, "weight_decay": 1e-5, "dropout": 0.0}}


def recipe(chosen):
    """Defaults of the published run that the flags name; smaller ones for --tiny."""
    stage = chosen.stage or (
        "test" if chosen.test else "finetune" if chosen.pretrain else "pretrain")
    init = chosen.init or {"random": "none"}.get(chosen.pretrain, chosen.pretrain)
    r = {"stage": stage, "data": Path("data") / chosen.dataset, "lr": 1e-3, "init": init,
         **PUBLISHED[chosen.method or "cpctrans"].get(stage, {})}
    if stage == "finetune" and not init:
        r["init"] = "none" if chosen.tiny else "runs/cpctrans_ucf101_pretrain/best.pt"
    if stage == "finetune" and chosen.train_what == "last":
        r["epochs"] = 100
    if stage == "test":
        r["test"] = [Path(f"runs/cpctrans_{chosen.dataset}_finetune/best.pt")]
    if chosen.tiny:
        r |= {"workers": 2, "log_every": 5, "save_every": 50, **TINY.get(stage, {})}
        if stage != "test" and (r["init"] or "none") == "none":
            r |= {"net": "resnet10", "width": 16, "img_dim": 48, "crop": chosen.img_dim or 64}
    return r


# ---- data: lists of videos (official files: dataset_3d.py, dataset_3d_lc.py, write_csv.py) ------

class Videos(NamedTuple):
    """The videos of a list, in its order. `name` is <Class>/<video> as bytes, `label` from 0,
    `frames` the number of pictures, 0 where the file cannot be read.
    """
    name: np.ndarray
    label: np.ndarray
    frames: np.ndarray

    def pick(self, which):
        return Videos(*(column[which] for column in self))


GAP = r"[^\S\n]"                          # a space within a line, whatever its kind
NAME = r"(?!\.{1,2}(?:\.avi|[/\\]|$))[^/\\\x00-\x1f]{1,200}"       # of a file, and nothing else


def read_rows(path, pattern, form):
    """A tuple per group of the pattern, with an item for each line of a text file, "" for an empty
    line. UserError names the line that is not of the form.

    All lines are searched in one go, they may be a million: the pattern must not match a line end.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it comes with the official split lists") from None
    except UnicodeDecodeError as e:
        line = data[:e.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: is not in UTF-8 ({e.reason})") from e
    text = "\n".join(map(str.strip, text.splitlines()))
    *columns, strange = zip(*re.findall(rf"^(?:{pattern}|(\S.*))?$", text, re.MULTILINE))
    if any(strange):
        line = next(n for n, x in enumerate(strange, 1) if x)
        raise UserError(f"{path}:{line}: {strange[line - 1]!r:.80} is not `{form}`")
    return columns


def read_classes(path):
    """{class in lower case: label} of classInd.txt, whose rows are `<number from 1> <Class>`."""
    classes = {}
    columns = read_rows(path, rf"([1-9]\d{{0,3}})[ ,]{GAP}*({NAME})", "<number> <Class>")
    for line, (number, name) in enumerate(zip(*columns), 1):
        if not number:
            continue
        name, label = name.lower(), int(number) - 1
        if name in classes or label in classes.values():
            raise UserError(f"{path}:{line}: {f'{number} {name}'!r:.80} stands there twice")
        classes[name] = label
    return classes


@lru_cache(1)                            # training and validation videos are of one list
@common.no_collector()
def read_ucf101(folder, part, split):
    """([<Class>/<video>], [label], {class: label}) of trainlist0K.txt or testlist0K.txt.

    Names are compared in lower case: HandstandPushups holds v_HandStandPushups_g01_c01.avi.
    Test lists carry no number; that of a training list must agree with classInd.txt.
    """
    classes, labels = read_classes(folder / "classInd.txt"), {}
    path = folder / f"{part}list{split:02d}.txt"
    names, groups, numbers = read_rows(
        path, rf"(({NAME})/{NAME})\.avi(?:{GAP}+(\d{{1,4}}))?", "<Class>/<video>.avi")
    for group, number in filter(any, dict.fromkeys(zip(groups, numbers))):
        label = labels[group, number] = classes.get(group.lower())
        if label is None or number and int(number) != label + 1:
            line = list(zip(groups, numbers)).index((group, number)) + 1
            raise UserError(f"{path}:{line}: {group!r:.80} {number} disagrees with classInd.txt")
    return (tuple(filter(None, names)), [labels[key] for key in zip(groups, numbers) if key[0]],
            classes)


def read_hmdb51_file(path):
    """[(line, video, code)] of <class>_test_splitK.txt; codes 1: train, 2: test, 0: neither."""
    columns = read_rows(path, rf"({NAME})\.avi{GAP}+([012])", "<video>.avi <0, 1 or 2>")
    found = [(line, video, int(code)) for line, (video, code) in enumerate(zip(*columns), 1)
             if video]
    if not found:
        raise UserError(f"{path}: is empty")
    return found


def read_hmdb51(folder, part, split):
    """As `read_ucf101`, of the files <class>_test_splitK.txt; labels in the order of the names.

    NOTE: the release reads a classInd.txt of its author's that nobody else has.
    """
    ending = f"_test_split{split}.txt"
    files = {f.name.removesuffix(ending): f for f in folder.glob(f"*{ending}")}
    classes, names, labels = {c: n for n, c in enumerate(sorted(files))}, [], []
    for c, label in classes.items():
        for _, video, code in read_hmdb51_file(files[c]):
            if code == {"train": 1, "test": 2}[part]:
                names.append(f"{c}/{video}")
                labels.append(label)
    return names, labels, classes


def read_frame_csv(path):
    """[(line, class, video, frames)] of the author's rows `<root>/<Class>/<video>/,<frames>`."""
    columns = read_rows(path, rf'"?.*[/\\]({NAME})[/\\]({NAME})[/\\]?"?{GAP}*,{GAP}*(\d{{1,9}})',
                        "<folder of pictures>,<number>")
    return [(line, group, video, int(frames))
            for line, (group, video, frames) in enumerate(zip(*columns), 1) if group]


def read_csv_list(folder, part, split):
    """As `read_ucf101`, of the author's train_split0K.csv, and the numbers of frames.

    Without a classInd.txt beside it, classes are numbered as UCF101's are: ignoring case.
    """
    path = folder / f"{part}_split{split:02d}.csv"
    rows = read_frame_csv(path)
    known = common.find(folder, "classInd.txt")
    classes = read_classes(known) if known else {
        c: n for n, c in enumerate(sorted({c.lower() for _, c, _, _ in rows}))}
    strange = next((row for row in rows if row[1].lower() not in classes), None)
    if strange:
        raise UserError(f"{path}:{strange[0]}: class {strange[1]!r:.80} is not in {known}")
    return ([f"{c}/{v}" for _, c, v, _ in rows], [classes[c.lower()] for _, c, _, _ in rows],
            classes, [n for *_, n in rows])


def read_list(args, part, split):
    """(names, labels, classes, frames or None) of a list, wherever it lies and whatever its form.

    classes: names in lower case, by label.
    """
    root = args.lists or args.data
    official = {"ucf101": "trainlist01.txt", "hmdb51": "*_test_split1.txt"}[args.dataset]
    theirs, own, frames = common.find(root, official), None, None
    if theirs:
        reader = read_ucf101 if args.dataset == "ucf101" else read_hmdb51
        names, labels, classes = reader(theirs.parent, part, split)
    else:
        own = common.find(root, f"{part}_split{split:02d}.csv")
        if not own:
            raise UserError(f"{root}: holds no split lists ({official} or {part}_split"
                            f"{split:02d}.csv); see README for the layout")
        names, labels, classes, frames = read_csv_list(own.parent, part, split)
    path = own if not theirs else theirs.parent / (
        f"{part}list{split:02d}.txt" if args.dataset == "ucf101" else f"*_test_split{split}.txt")
    if not names:
        raise UserError(f"{path}: the {part} list of split {split} is empty")
    if len(set(names)) < len(names):
        twice = next(n for n, k in Counter(names).items() if k > 1)
        raise UserError(f"{path}: {twice} stands twice in the {part} list of split {split}")
    by_label = {n: c for c, n in classes.items()}
    classes = [by_label.get(n, "") for n in range(max(by_label) + 1)]
    return tuple(names), labels, classes, frames


@lru_cache(1)
@common.no_collector()
def hold_out(dataset, names):
    """Mask of the training videos that choose the checkpoint: no source video is on both sides.

    UCF101: groups 24 and 25 of every class, a group being the cuts of one video. HMDB51: sources,
    the names before _<class>_, in an arbitrary fixed order until a tenth of the videos is held out.
    """
    if dataset == "ucf101":
        ends = [n.rpartition("_g")[2] for n in names]         # 24_c01 of v_Archery_g24_c01
        groups = {end: re.fullmatch(r"(\d+)_c\d+", end) for end in set(ends)}
        held = {end: bool(g) and int(g[1]) in HELD_OUT for end, g in groups.items()}
        return np.array([held[end] for end in ends])
    sources = [v.split(f"_{c}_")[0] for c, v in (n.split("/") for n in names)]
    count, held, n = Counter(sources), set(), 0
    for source in sorted(count, key=lambda s: (crc32(s.encode()), s)):
        if n * 10 < len(names):
            held.add(source)
            n += count[source]
    return np.array([s in held for s in sources])


def locate(args, names):
    """(folder, ending) of the videos: NAME.avi, NAME.mp4 or a folder NAME of pictures."""
    root = args.frames or args.data
    folders = [root, *sorted(f for f in root.glob("*") if f.is_dir())]
    for ending in ("",) if args.frames else (".avi", ".mp4", ""):
        for folder in folders:
            if any((folder / (n + ending)).exists() for n in names[::max(1, len(names) // 20)]):
                return folder, ending
    raise UserError(f"{root}: none of the listed videos is there, such as {names[0]}.avi; see "
                    "README for the layout")


def choose(args, names, part, tested):
    """Indices of the videos of a list that belong to a part, at most --limit, evenly spread."""
    which = np.arange(len(names))
    if not tested and args.stage != "test":
        which = np.flatnonzero(hold_out(args.dataset, names) == (part == "val"))
    if tested and part == "val":          # NOTE: the release chooses on a sample of test videos
        share = 0.4 if args.dataset == "hmdb51" and args.stage == "finetune" else 0.3
        shuffled = np.random.default_rng(args.seed).permutation(which)
        which = np.sort(shuffled[:max(1, round(share * len(which)))])
    if not len(which):
        raise UserError(f"{args.data}: no video of the list is left for the {part} part")
    n = min(args.limit or len(which), len(which))
    return which[np.linspace(0, len(which) - 1, n).round().astype(int)]


class Stamps(Dataset):
    """"bytes time" of each file or folder of a folder, "" where there is none, in blocks."""

    def __init__(self, folder, names, block=50_000):
        self.folder = folder
        self.blocks = [names[k:k + block] for k in range(0, len(names), block)]

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, k):
        stamps, where = [], os.open(self.folder, os.O_RDONLY)                 # a shorter way
        try:
            for name in self.blocks[k]:
                try:
                    found = os.stat(name, dir_fd=where)
                    stamps.append(f"{found.st_size} {found.st_mtime_ns}")
                except OSError:
                    stamps.append("")
        finally:
            os.close(where)
        return stamps


def read_videos(args, part):
    """(videos, classes, number of their list) of "train", "val" or "test".

    Absent or unreadable files are counted in training, and an error in evaluation.
    """
    released = args.compat == "released"
    number = 3 if released and args.stage == "pretrain" else args.split
    tested = part == "test" or (part == "val" and released)
    names, labels, classes, frames = read_list(args, "test" if tested else "train", number)
    which = choose(args, names, part, tested)
    folder, ending = locate(args, names)
    lengths_known = bool(frames) and not ending               # the author's list of folders
    with common.no_collector():
        files = [names[i] + ending for i in which.tolist()]
        looks = iter(DataLoader(Stamps(folder, files), batch_size=None, generator=torch.Generator(),
                                num_workers=args.workers if len(files) > 100_000 else 0))
        if common.rank() == 0 and not lengths_known:
            kept(args)                                        # is read while others look
        stamps = list(itertools.chain.from_iterable(looks))
    here = np.array(list(map(bool, stamps)))
    if not here.all():
        if part != "train":
            raise UserError(f"{folder}/{files[np.argmin(here)]}: no such file; of {len(which)} "
                            f"videos to evaluate {(~here).sum()} are absent")
        which, files = which[here], list(itertools.compress(files, here))
    lengths = (np.array(frames, np.int32)[which] if lengths_known
               else measure(args, folder, files, list(filter(None, stamps)), part))
    paths = os.fsencode(f"{folder}/" + f"\0{folder}/".join(files)).split(b"\0")
    videos = Videos(np.array(paths), np.array(labels)[which], lengths)
    broken, short = lengths == 0, (lengths > 0) & (lengths <= clip_span(args))
    keep = ~broken & ~short if args.short == "drop" else ~broken
    common.say(f"{part}: {keep.sum()} videos of list {number}; {(~here).sum()} absent, "
               f"{broken.sum()} unreadable, {short.sum()} too short "
               f"({'left out' if args.short == 'drop' else 'their last picture repeated'})")
    if not keep.any():
        raise UserError(f"{folder}: no usable {part} video")
    return videos.pick(keep), classes, number


class Lengths(Dataset):
    """Numbers of pictures, by decoding: headers are wrong now and then."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            frames = common.count_frames(Path(self.paths[i]))
            return frames, "" if frames else f"{self.paths[i]}: no picture can be decoded"
        except VideoError as e:
            return 0, str(e)


@lru_cache(1)
def counted(cache, _):
    """{folder: {(name, stamp): pictures}} that `measure` has kept, as of a time: of training and
    of validation videos alike. The file has a column for each, as there may be a million.
    """
    try:
        found = {folder: (t["files"], t["stamps"], t["frames"])
                 for folder, t in json.loads(cache.read_bytes()).items()}
        for files, stamps, frames in found.values():
            if not (set(map(type, files)) | set(map(type, stamps)) <= {str}
                    and set(map(type, frames)) <= {int}
                    and len(files) == len(stamps) == len(frames)
                    and 0 < min(frames, default=1) <= max(frames, default=1) < 2 ** 31):
                raise ValueError
        return {folder: dict(zip(zip(files, stamps), frames))
                for folder, (files, stamps, frames) in found.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{cache}: holds other than numbers of pictures; delete it, and they are "
                        "counted anew") from None


def kept(args):
    """(file of the numbers of pictures, what it holds): beside the run folders, for all of them."""
    cache = args.out.parent / f"cpctrans_{args.dataset}_frames.json"
    return cache, counted(cache, cache.stat().st_mtime_ns) if cache.exists() else {}


def measure(args, folder, names, stamps, part):
    """Numbers of pictures of videos, each counted once and kept in a file beside the run folders.

    Shared among the processes; killed at any time, a new start goes on with the rest.
    """
    root, (cache, found) = os.path.abspath(folder), kept(args)
    if common.rank() == 0:
        common.remove_stale(cache.parent, cache.name, age=3600)
    with common.no_collector():
        known = dict(found.get(root, {}))
        plan = [list(map(known.get, zip(names, stamps)))]
    if common.world_size() > 1:           # one plan for all: other jobs may be filling the file
        dist.broadcast_object_list(plan)
    lengths = plan[0]
    missing = [i for i, n in enumerate(lengths) if n is None]
    began, faults = time.perf_counter(), []
    written = began
    for first in range(0, len(missing), 1024):
        block = missing[first:first + 1024]
        mine = range(common.rank(), len(block), common.world_size())
        loader = DataLoader(Lengths([f"{folder}/{names[block[k]]}" for k in mine]), batch_size=None,
                            num_workers=args.workers, generator=torch.Generator())
        rows = common.gather(dict(zip(mine, loader)), expect=len(block))
        for k, (n, fault) in rows.items():
            lengths[block[k]] = n
            faults += [fault] if fault else []
        known |= {(names[i], stamps[i]): lengths[i] for i in block if lengths[i]}
        if common.rank() == 0 and (time.perf_counter() - written > 60 or block[-1] == missing[-1]):
            common.write_json(cache, {
                folder: {"files": [name for name, _ in rows], "stamps": [s for _, s in rows],
                         "frames": list(rows.values())}
                for folder, rows in {**found, root: known}.items()})
            written = time.perf_counter()
        left = (time.perf_counter() - began) / (first + len(block)) * (
            len(missing) - first - len(block))
        if len(missing) > len(block):
            common.say(f"counting pictures of {part}: {first + len(block)}/{len(missing)} videos, "
                       f"ETA {left:.0f} s")
    if faults and part != "train":
        raise UserError(faults[0])
    for fault in faults[:3]:
        common.say(f"warning: {fault}; left out")
    return np.array(lengths, np.int32)


# ---- data: which frames (official files: dataset_3d.py, dataset_3d_lc.py) -----------------------

def clip_span(args):
    """Frames from a clip's start to where the next one would start; a video must have more."""
    return args.num_seq * args.seq_len * args.ds


def last_start(length, span):
    """The last frame that a training clip may start at; negative where the video is too short."""
    return length - span - 1


def test_clips(length, num_seq, ds, seq_len=1, hop=None):
    """Frame numbers of consecutive clips, (clips, num_seq·seq_len): every ds-th frame, in blocks.

    hop: blocks from one clip to the next, num_seq if None. What does not fill a clip is left out.
    """
    frames = np.arange(0, length, ds)
    blocks = frames[:len(frames) // seq_len * seq_len].reshape(-1, seq_len)
    starts = range(0, len(blocks) - num_seq + 1, hop or num_seq)
    return np.array([blocks[s:s + num_seq].ravel() for s in starts], int).reshape(
        -1, num_seq * seq_len)


def hop_of(args):
    """NOTE: DPC's test clips overlap: by half on UCF101, by a quarter on HMDB51; CPCTrans's not."""
    if args.method == "cpctrans":
        return None
    return max(1, args.num_seq // 2 if args.dataset == "ucf101" else 3 * args.num_seq // 4)


def pictures(path, numbers, length, crop):
    """uint8 (T, h, w, 3): frames of a video, the last one for those past its end, h = 15/14 crop.

    (240 pixels for the published crop of 224.)
    """
    numbers, back = np.unique(np.minimum(numbers, length - 1), return_inverse=True)
    frames = common.read_frames(Path(os.fsdecode(path)), numbers)
    return short_side_to(frames, crop * 15 // 14)[back]


def short_side_size(h, w, side):
    """(h, w) of pictures scaled so that the short side is `side`; the long one is rounded down."""
    return (side, int(side * w / h)) if h <= w else (int(side * h / w), side)


def short_side_to(frames, side):
    """Scale so that the short side is `side`, bilinear without antialiasing: extract_frame.py.

    (T, H, W, 3) uint8 -> the same. OpenCV's integers lose an eighth of a grey level on average.
    """
    h, w = frames.shape[1:3]
    if min(h, w) == side:
        return frames
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, short_side_size(h, w, side), mode="bilinear", align_corners=False)
    return (x - 1 / 8).round().byte().permute(0, 2, 3, 1).numpy()


def channels_first(clip):
    """(..., H, W, 3) array -> (..., 3, H, W) tensor"""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(clip, -1, -3)))


class TrainClips(Dataset):
    """One clip per video and epoch, from a random start, with the parameters of its colours.

    All that is random follows from (seed, epoch, index). `distort` is how: of pre-training or of
    fine-tuning.
    """

    def __init__(self, args, videos, distort):
        self.args, self.videos, self.distort = args, videos, distort

    def __len__(self):
        return len(self.videos.name)

    def __getitem__(self, key):
        a, (epoch, i) = self.args, key
        rng = np.random.default_rng((a.seed, epoch, i))
        path, label, length = (column[i] for column in self.videos)
        start = rng.integers(max(0, last_start(length, clip_span(a))) + 1)
        numbers = start + a.ds * np.arange(a.num_seq * a.seq_len)
        clip, colour = self.distort(pictures(path, numbers, length, a.crop), rng, a)
        return {"clip": channels_first(clip), **colour, "label": int(label)}


class TestClips(Dataset):
    """All clips of a video, (clips·crops, N, 3, S, S) uint8, or its `middle` one, (N, 3, S, S)."""

    def __init__(self, args, videos, middle=False):
        self.args, self.videos, self.middle = args, videos, middle

    def __len__(self):
        return len(self.videos.name)

    def __getitem__(self, i):
        a = self.args
        path, _, length = (column[i] for column in self.videos)
        numbers = test_clips(max(length, clip_span(a) + 1), a.num_seq, a.ds, a.seq_len, hop_of(a))
        if self.middle:
            numbers = numbers[len(numbers) // 2][None]
        frames = pictures(path, numbers.ravel(), length, a.crop)              # (clips·N, h, w, 3)
        crops = 1 if self.middle else a.crops
        cut = [crop_resize(frames, x, y, a.crop, a.img_dim, a.resize, mirror)
               for mirror in (False, True)[:1 + (crops == 10)]
               for x, y in crop_places(frames, a.crop, crops)]
        x = channels_first(np.stack(cut)).unflatten(1, numbers.shape).flatten(0, 1)
        return x[0] if self.middle else x                     # (crops·clips, N, 3, S, S)


# ---- data: what a clip looks like (official file: Utils/augmentation.py) ------------------------

@lru_cache
def nearest_index(size, wanted):
    """Which of `size` pixels Pillow's NEAREST takes, for each of the `wanted` ones.

    Asked of Pillow itself: from 224 to 196, every seventh is a tie that rounding decides.
    """
    from PIL import Image
    ramp = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    return np.asarray(ramp.resize((wanted, 1), Image.Resampling.NEAREST))[0]


def crop_resize(frames, x, y, crop, size, how="nearest", mirror=False):
    """The square at (x, y), of the pictures mirrored if so, scaled to `size`.

    (T, H, W, 3) uint8 -> (T, size, size, 3). NOTE: nearest as released, by a default.
    """
    pick = nearest_index(crop, size) if how == "nearest" else np.arange(crop)
    columns = frames.shape[2] - 1 - (x + pick) if mirror else x + pick
    cut = frames[:, y + pick].take(columns, axis=2)
    return cut if how == "nearest" else bilinear(cut, size, size)


def bilinear(frames, height, width):
    """Pillow's antialiased bilinear resize.    (T, H, W, 3) uint8 -> (T, height, width, 3)"""
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    x = F.interpolate(x, (height, width), mode="bilinear", antialias=True)
    return x.permute(0, 2, 3, 1).numpy()


def centre(frames, crop):
    """(x, y) of the centre crop, in Python's rounding: to even."""
    h, w = frames.shape[1:3]
    return round((w - crop) / 2), round((h - crop) / 2)


def crop_places(frames, crop, number):
    """(x, y) of the centre crop, or of it and the four corners."""
    h, w = frames.shape[1:3]
    corners = [(0, 0), (w - crop, 0), (0, h - crop), (w - crop, h - crop)]
    return [centre(frames, crop)] + (corners if number > 1 else [])


def sized_crop_box(rng, width, height):
    """(x, y, w, h) of a crop of half to all of the area, or None if ten tries find none."""
    for _ in range(10):
        area, aspect = rng.uniform(0.5, 1) * width * height, rng.uniform(3 / 4, 4 / 3)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rng.random() < 0.5:
            w, h = h, w
        if w <= width and h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    return None


def sized_crop(frames, box, crop):
    """A box scaled to a square of `crop`; without one, the centre of the pictures scaled to it."""
    if box:
        x, y, w, h = box
        return bilinear(frames[:, y:y + h, x:x + w], crop, crop)
    frames = bilinear(frames, *short_side_size(*frames.shape[1:3], crop))
    x, y = centre(frames, crop)
    return frames[:, y:y + crop, x:x + crop]


def draw_jitter(rng, n):
    """Factors (n, 4) of brightness, contrast, saturation and shift of hue, and their order."""
    reach = np.array(JITTER)
    factors = rng.uniform(-reach, reach, (n, 4)) + (1, 1, 1, 0)
    return factors.astype(np.float32), np.stack([rng.permutation(4) for _ in range(n)])


def distort_pretrain(frames, rng, args):
    """Mirrored half the time, cut anywhere; grey and colours drawn for every picture (main.py)."""
    n, h, w = frames.shape[:3]
    mirror = rng.random() < 0.5
    x, y = rng.integers(w - args.crop + 1), rng.integers(h - args.crop + 1)
    clip = crop_resize(frames, x, y, args.crop, args.img_dim, args.resize, mirror)
    grey = np.where(rng.random(n) < 0.5, rng.integers(3, size=n), -1)
    factors, order = draw_jitter(rng, n)
    return clip, {"grey": grey, "factors": factors, "order": order}


def distort_finetune(frames, rng, args):
    """A crop of random size, mirrored half the time; colours change in 3 clips of 10 (test.py)."""
    n, h, w = frames.shape[:3]
    clip = sized_crop(frames, sized_crop_box(rng, w, h), args.crop)
    clip = crop_resize(clip, 0, 0, args.crop, args.img_dim, args.resize)
    clip = clip[:, :, ::-1] if rng.random() < 0.5 else clip
    factors, order = draw_jitter(rng, 1)
    order = order if rng.random() < 0.3 else -np.ones_like(order)             # -1: leave it
    return clip, {"grey": np.full(n, -1), "factors": factors.repeat(n, 0),
                  "order": order.repeat(n, 0)}


def luminance(x):
    """(n, 3, H, W) -> (n, 1, H, W)"""
    return (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def shift_hue(x, shift):
    """Turn the hue by `shift` of a full circle.    x: (n, 3, H, W) in [0, 1], shift: (n, 1, 1)"""
    high, low = x.amax(1), x.amin(1)
    span, (r, g, b) = (high - low).clamp(min=1e-8), x.unbind(1)
    h = torch.where(r == high, (g - b) / span,
                    torch.where(g == high, 2 + (b - r) / span, 4 + (r - g) / span)) / 6
    h = (h + shift) % 1
    k = [(n + 6 * h) % 6 for n in (5, 3, 1)]                  # HSV to RGB, one channel each
    return torch.stack([high - (high - low) * torch.minimum(i, 4 - i).clamp(0, 1) for i in k], 1)


def jitter(x, factors, order):
    """Change each picture's colours by its own factors, in its own order.

    x: (n, 3, H, W) in [0, 1]; factors: (n, 4); order: (n, 4) of 0 .. 3, -1: nothing. As Pillow
    but for its rounding.
    """
    for turn, what in itertools.product(range(4), range(4)):
        rows = (order[:, turn] == what).nonzero()[:, 0]
        if len(rows):
            f = factors[rows, what].to(x.device)
            rows = rows.to(x.device)
            x[rows] = change_colour(x[rows], what, f)
    return x


def change_colour(x, what, f):
    """One of the four changes.    x: (n, 3, H, W) in [0, 1], f: (n,) -> (n, 3, H, W)"""
    if what == HUE:
        return shift_hue(x, f[:, None, None])
    f, grey = f[:, None, None, None], luminance(x)
    other = {BRIGHTNESS: 0.0, CONTRAST: grey.mean((1, 2, 3), keepdim=True), SATURATION: grey}[what]
    return (f * x + (1 - f) * other).clamp(0, 1)


def channel_grey(x, channel):
    """One channel in place of all three, where it is not -1.    x: (n, 3, H, W), channel: (n,)"""
    index = channel.clamp(min=0)[:, None, None, None].expand(-1, 1, *x.shape[2:])
    return torch.where((channel >= 0)[:, None, None, None], x.gather(1, index), x)


def normalize(x):
    """Pictures in [0, 1] to the network's input, (..., 3, H, W)."""
    mean, std = (x.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    return (x - mean) / std


def paint(batch, device):
    """A batch on the device, its colours changed: (B, N, 3, S, S) float32."""
    clip = batch["clip"].to(device, non_blocking=True)
    x = clip.flatten(0, 1) / 255                              # (B·N, 3, S, S)
    x = channel_grey(x, batch["grey"].flatten().to(device))
    x = jitter(x, batch["factors"].flatten(0, 1), batch["order"].flatten(0, 1))
    return normalize(x).unflatten(0, clip.shape[:2])


# ---- model (official files: Backbone/transformer_encoder.py, convrnn.py, model_3d.py) -----------

class LayerNorm(nn.Module):
    """NOTE: not PyTorch's: a (x - mean) / (std + ε) + b, std with n - 1, ε outside of the root."""

    def __init__(self, features, eps=1e-6):
        super().__init__()
        self.a_2, self.b_2 = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.eps = eps

    def forward(self, x):
        x = x.float()
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.a_2 * (x - mean) / (std + self.eps) + self.b_2


class Attention(nn.Module):
    """Multi-head self-attention; `linears` are query, key, value and output."""

    def __init__(self, d, heads, dropout=0.1):
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(d, d) for _ in range(4)])
        self.heads, self.dropout = heads, nn.Dropout(dropout)

    def weights(self, x, mask=None):
        """softmax(q·k / √(D/heads)): (B, T, D) -> (B, heads, T, T)"""
        q, k = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in self.linears[:2])
        score = q @ k.mT / math.sqrt(q.shape[-1])
        return (score if mask is None else score.masked_fill(~mask, -math.inf)).softmax(-1)

    def forward(self, x, mask=None):
        v = self.linears[2](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = self.dropout(self.weights(x, mask)) @ v                           # (B, heads, T, ·)
        return self.linears[3](y.transpose(1, 2).flatten(2))                  # (B, T, D)


class FeedForward(nn.Module):
    def __init__(self, d, hidden, dropout=0.1):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.w_2(self.dropout(F.relu(self.w_1(x))))


class Residual(nn.Module):
    """x + dropout(f(LN(x)))"""

    def __init__(self, d, dropout=0.1):
        super().__init__()
        self.norm, self.dropout = LayerNorm(d), nn.Dropout(dropout)

    def forward(self, x, f):
        return x + self.dropout(f(self.norm(x)))


class EncoderLayer(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.self_attn, self.feed_forward = Attention(d, heads), FeedForward(d, 8 * d)
        self.sublayer = nn.ModuleList([Residual(d), Residual(d)])

    def forward(self, x, mask=None):
        x = self.sublayer[0](x, lambda y: self.self_attn(y, mask))
        return self.sublayer[1](x, self.feed_forward)


def sinusoids(d, length=500):
    """The usual table of sines and cosines, (length, d)."""
    angle = torch.arange(length)[:, None] * torch.exp(
        torch.arange(0, d, 2) * -(math.log(10000) / d))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class Encoder(nn.Module):
    """Pre-norm transformer over all cells of all pictures.    (B, N, D, S, S) -> the same

    NOTE: the release computes a positional encoding and does not add it: the order of the pictures
    reaches the network by the GRU alone. NOTE: attention is full, so in pre-training the context
    has seen the pictures that it is to predict, and what it saw of all of them tells the clip from
    others whatever is in it; `causal` hides later pictures from each, `frame` all other pictures.
    """

    def __init__(self, d, heads, layers, attn="full", pos="none"):
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(d, heads) for _ in range(layers)])
        self.norm, self.attn, self.pos = LayerNorm(d), attn, pos
        orthogonal(self)

    def forward(self, f):
        x = f.permute(0, 1, 3, 4, 2).flatten(1, 3)            # (B, N·M, D), pictures outermost
        if self.pos == "sin":
            x = x + sinusoids(x.shape[-1], max(500, x.shape[1]))[:x.shape[1]].to(x)
        picture, mask = torch.arange(f.shape[1], device=f.device), None
        if self.attn != "full":
            picture = picture.repeat_interleave(x.shape[1] // f.shape[1])
            mask = picture[:, None] >= picture                # (N·M, N·M): no later picture
            mask = mask if self.attn == "causal" else mask & mask.T           # nor an earlier one
        z = self.tokens(x, mask).unflatten(1, (f.shape[1], *f.shape[3:]))
        return z.permute(0, 1, 4, 2, 3).contiguous()          # (B, N, D, S, S)

    def tokens(self, x, mask=None):
        """(B, T, D) -> (B, T, D)"""
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class ConvGRU(nn.Module):
    """A GRU of its own for every cell.    x, h: (B, D, S, S) -> (B, D, S, S); h None: zero

    u = σ(W_u [x, h]),  r = σ(W_r [x, h]),  h' = (1 - u) h + u tanh(W_o [x, r h]); dropout on h'.
    """

    def __init__(self, d, dropout=0.1):
        super().__init__()
        self.reset_gate = nn.Conv2d(2 * d, d, 1)
        self.update_gate, self.out_gate = nn.Conv2d(2 * d, d, 1), nn.Conv2d(2 * d, d, 1)
        self.dropout = nn.Dropout(dropout)
        orthogonal(self)

    def forward(self, x, h=None):
        h = torch.zeros_like(x) if h is None else h
        both = torch.cat([x, h], 1)
        u, r = torch.sigmoid(self.update_gate(both)), torch.sigmoid(self.reset_gate(both))
        new = torch.tanh(self.out_gate(torch.cat([x, r * h], 1)))
        return self.dropout((1 - u) * h + u * new)

    def over(self, xs, h=None):
        """All states, (B, N, D, S, S), of a sequence of that shape."""
        states = []
        for x in xs.unbind(1):
            h = self(x, h)
            states.append(h)
        return torch.stack(states, 1)


def orthogonal(module):
    """The release's initial values: orthogonal matrices, biases of zero."""
    for name, p in module.named_parameters():
        if name.endswith("weight"):
            nn.init.orthogonal_(p)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


class Trunk(nn.Module):
    """What pre-training leaves to the classifier: backbone f, transformer Enc, and GRU.

    DPC has no transformer, and blocks of `seq_len` pictures instead of single ones.
    """

    def __init__(self, args, track=True):
        super().__init__()
        dpc = args.method == "dpc"
        self.seq_len = args.seq_len
        self.backbone = common.PredictiveResNet(args.net, args.width, dpc, track)
        d = self.backbone.out_dim
        self.encoder = None if dpc else Encoder(d, args.heads, args.layers, args.attn, args.pos)
        self.agg = ConvGRU(d)

    def cells(self, clip, classify=False):
        """(B, N·seq_len, 3, H, W) -> Z (B, N, D, S, S), S = ⌈H/32⌉.

        NOTE: the classifier has a ReLU between f and Enc, pre-training has none.
        """
        if self.encoder is None:
            x = clip.unflatten(1, (-1, self.seq_len)).transpose(2, 3)         # (B, N, 3, L, H, W)
            f = self.backbone(x.flatten(0, 1))                                # (B·N, D, L/4, S, S)
            return (F.relu(f) if classify else f).mean(2).unflatten(0, x.shape[:2])
        f = self.backbone(clip.flatten(0, 1))                                 # (B·N, D, S, S)
        f = (F.relu(f) if classify else f).unflatten(0, clip.shape[:2])
        return self.encoder(f)                                                # (B, N, D, S, S)

    def embed(self, clip):
        """The last state of the GRU over all pictures, (B, D, S, S)."""
        return self.agg.over(F.relu(self.cells(clip, classify=True)))[:, -1]


class CPC(Trunk):
    """Predictions ẑ and what they should be, z: each (B, P, M, D)."""

    def __init__(self, args):
        super().__init__(args, track=not (args.method == "dpc" and args.compat == "released"))
        d, self.pred_step = self.backbone.out_dim, args.pred_step
        self.network_pred = nn.Sequential(nn.Conv2d(d, d, 1), nn.ReLU(), nn.Conv2d(d, d, 1))
        orthogonal(self.network_pred)

    def ahead(self, h):
        """P predictions from a context, and the state of the last: (B, P, D, S, S), (B, D, S, S)"""
        z_hat = []
        for p in range(self.pred_step):
            h = self.agg(F.relu(z_hat[-1]), h) if p else h
            z_hat.append(self.network_pred(h))                                # ẑ = φ(h)
        return torch.stack(z_hat, 1), h

    def forward(self, clip):
        z = self.cells(clip)                                                  # (B, N, D, S, S)
        seen = F.relu(z[:, :-self.pred_step])
        z_hat, _ = self.ahead(self.agg.over(seen)[:, -1])                     # (B, P, D, S, S)
        return tuple(x.flatten(3).mT for x in (z_hat, z[:, -self.pred_step:]))


class Classifier(Trunk):
    """Logits (B, K) from all N pictures: BN and a linear layer on the mean over the cells."""

    def __init__(self, args, classes):
        super().__init__(args)
        d = self.backbone.out_dim
        self.final_bn = nn.BatchNorm1d(d)
        self.final_fc = nn.Sequential(nn.Dropout(args.dropout), nn.Linear(d, classes))
        orthogonal(self.final_fc)

    def pooled(self, clip):
        """The video's feature, (B, D)."""
        return self.embed(clip).mean((2, 3)).float()

    def classify(self, x):
        """(B, D) -> (B, K). A batch of one has no statistics: the running ones normalise it."""
        bn = self.final_bn
        x = bn(x) if len(x) > 1 or not self.training else F.batch_norm(
            x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
        return self.final_fc(x)

    def forward(self, clip):
        return self.classify(self.pooled(clip))


# ---- weights (released files: README) -----------------------------------------------------------

SAME = {k: k for k in ("backbone.", "network_pred.", "final_bn.", "final_fc.")}
LAYOUTS = [{"": ""},                                          # ours
           {**SAME, "transEnc.transEncoder.": "encoder.", "agg.cell_list.0.": "agg."},
           {**SAME, "transEnc.transEncoder.": "encoder.", "agg.ConvGRUCell_00.": "agg."}]
SPARE = ("network_pred.", "final_bn.", "final_fc.",           # of the other stage
         "agg.ConvGRUCell_00.", "agg.cell_list.0.",           # one of two spellings
         "transEnc.attn.", "transEnc.ff.", "transEnc.position.", "backbone.fc.")       # never used


def initialise(model, path, everything=False, statistics=False):
    """Fill the trunk, or the whole classifier, from a checkpoint of ours or a released one.

    Files of DPC's pre-training lack batch-norm statistics: these stay fresh, unless they are
    asked for.
    """
    needed = [k for k in model.state_dict() if everything or k.startswith(
        ("backbone.", "encoder.", "agg."))]
    if isinstance(model.backbone.bn1, nn.BatchNorm3d) and not everything and not statistics:
        needed = [k for k in needed if "running_" not in k and "num_batches" not in k]
    common.load_weights(model, Path(path), LAYOUTS, tuple(needed), SPARE)


def describe(path):
    """What is known of a checkpoint: flags, `history` and `classes` of ours; of others what their
    tensors tell. NOTE: these do not tell the heads, so --heads may: else 4 as in the release, or 2
    as in CPCTR, whose layer is a single one.
    """
    found = common.load_file(Path(path))
    if isinstance(found, dict) and "history" in found:
        forms = {"args": dict, "history": list}
        if not all(isinstance(found.get(k), form) for k, form in forms.items()) or not all(
                isinstance(stage, dict) for stage in found["history"]):
            raise UserError(f"{path}: its args or its history are not of our form")
        return {**found["args"], "history": found["history"], "classes": found.get("classes")}
    tensors = common.find_weights(Path(path))
    stem = tensors.get("backbone.conv1.weight")
    if stem is None or stem.dim() not in (4, 5):
        raise UserError(f"{path}: no checkpoint of this method: it has no backbone.conv1.weight")
    layers = [int(m[1]) + 1 for k in tensors
              if (m := re.match(r"(?:transEnc\.transEncoder|encoder)\.layers\.(\d+)\.", k))]
    depth = sum(f"backbone.layer1.{n}.conv1.weight" in tensors for n in range(3))
    known = {"method": "dpc" if stem.dim() == 5 else "cpctrans", "width": len(stem),
             "net": ["resnet10", "resnet10", "resnet18", "resnet34"][depth],
             "history": [{"stage": "", "file": Path(path).name}], "classes": None}
    if layers:
        known |= {"layers": max(layers), "likely": {"heads": 2 if max(layers) == 1 else 4}}
    return known


def fill_from(args, path):
    """Take from a checkpoint (None: from none) what the flags leave open, its history as well.

    What the network is made of must agree with explicit flags; how a clip is cut may change from
    pre-training to fine-tuning, but not from there to the test; nor may the split change.
    """
    made = describe(path) if path else {"history": [], "classes": None}
    tested = args.stage == "test"
    for key, default in (SHAPE | made.get("likely", {})).items():
        args_take(args, made, key, default, path, True)
    if 4 * args.width % args.heads:
        raise UserError(f"--heads {args.heads} do not divide the {4 * args.width} channels")
    view = {**VIEW, **DPC_VIEW} if args.method == "dpc" else VIEW
    for key, default in view.items():
        args_take(args, made, key, default, path, tested and not args.force)
    used = {"pretrain": 5, "finetune": 7, "test": 8 if args.compat == "released" else 7}[args.stage]
    args_take(args, made if tested else {}, "num_seq", 8 if args.method == "dpc" else used, path,
              tested and not args.force)
    last = made["history"][-1] if made["history"] else {}
    if tested and last.get("dataset", args.dataset) != args.dataset and not args.force:
        raise UserError(f"{path}: was trained on {last['dataset']}; --dataset {last['dataset']}, "
                        "or --force to go on")
    if args.split is None:
        args.split = last["split"] if last.get("dataset") == args.dataset else 1
    lists = {h["list"] for h in made["history"] if h.get("dataset") == args.dataset}
    if lists - {args.split} and args.compat == "fixed" and not args.force:
        raise UserError(f"{path}: was trained on list {max(lists - {args.split})} of "
                        f"{args.dataset}, which holds test videos of split {args.split}; use the "
                        "same --split, or --force to go on")
    return made["history"], made["classes"]


def args_take(args, made, key, default, path, strict):
    """One flag from a checkpoint where it was not given, else from the defaults."""
    given, known = getattr(args, key), made.get(key)
    if given is None:
        setattr(args, key, default if known is None else known)
    elif known is not None and given != known:
        if strict:
            raise UserError(f"{path}: was made with --{key} {known}, now it is {given}"
                            + "; --force to go on" * (key not in SHAPE))
        common.say(f"note: {path} was made with --{key} {known}, now it is {given}")


def protocol(history, tested=None):
    """In words: what was trained on what, and how the checkpoint was chosen."""
    words = {"pretrain": "pre-trained", "finetune": "fine-tuned"}
    parts = [] if any(h["stage"] != "finetune" for h in history) else ["not pre-trained"]
    for h in history:
        parts.append(f"trained by others on unknown videos ({h['file']})" if "file" in h else
                     f"{words[h['stage']]} on train list {h['list']} of {h['dataset']}, epoch "
                     f"chosen on {h['chosen']}")
    return "; ".join(parts + [tested] * bool(tested))


def this_stage(args, number):
    """What a checkpoint says of the stage that made it."""
    chosen = {"ucf101": "groups 24 and 25 of it", "hmdb51": "held-out sources of it"}[args.dataset]
    return {"stage": args.stage, "dataset": args.dataset, "split": args.split, "list": number,
            "chosen": chosen if args.compat == "fixed" else "TEST videos, as released"}


# ---- loss (official files: CPCTrans/model_3d.py, main.py) ---------------------------------------

class Gather(torch.autograd.Function):
    """All processes' rows, one behind the other, with gradient."""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(common.world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad := grad.contiguous().clone())
        n = len(grad) // common.world_size()
        return grad[common.rank() * n:][:n]


def scores(z_hat, z):
    """Every prediction with every cell, <ẑ_bps, z_b'p's'>: (B, P, M, D) each -> (B·P·M, B'·P·M)

    Neither temperature nor normalisation.
    """
    return z_hat.float().flatten(0, 2) @ z.float().flatten(0, 2).T


def info_nce(score, target):
    """-log softmax over all columns, at the correct one: (rows, columns), (rows,) -> (rows,)

        L_i = -log [ exp(score_i,target_i) / Σ_j exp(score_ij) ],      L is their mean
    """
    return F.cross_entropy(score, target, reduction="none")


def in_top(score, target, k):
    """Is the correct column among the k largest of its row?    -> (rows,) float"""
    best = score.topk(min(k, score.shape[1])).indices
    return (best == target[:, None]).any(1).float()


def pair_categories(B, P, M):
    """What each pair of a score is: (B, P, M, B, P, M) int8.

    POSITIVE; TEMPORAL: the same cell at another time; SPATIAL: another cell of the same video;
    EASY: another video. Nothing is left out of the softmax: it tells where predictions go wrong.
    """
    b, p, s = (torch.arange(n) for n in (B, P, M))
    video = b[:, None, None, None, None, None] == b[:, None, None]
    time = p[:, None, None, None, None] == p[:, None]
    cell = s[:, None, None, None] == s
    kind = torch.where(cell, torch.where(time, POSITIVE, TEMPORAL), SPATIAL)
    return torch.where(video, kind, EASY).expand(B, P, M, B, P, M).to(torch.int8)


def contrast(args, z_hat, z):
    """Loss and accuracy of the pretext task on this process's rows; the correct cell of row i is
    column i. --negatives all: the columns are those of every process.
    """
    apart = args.negatives == "local" or common.world_size() == 1
    score = scores(z_hat, z if apart else Gather.apply(z.float()))            # (BPM, BPM·processes)
    first = 0 if apart else common.rank() * len(score)
    target = torch.arange(len(score), device=score.device) + first
    return {"loss": info_nce(score, target).mean(),
            **{f"top{k}": in_top(score, target, k).mean() for k in (1, 3, 5)}}


# ---- training ----------------------------------------------------------------------------------

def step_lr(lr, epoch, every, gamma):
    """x gamma after every `every` epochs."""
    return lr * gamma ** (epoch // every)


def restart_multiplier(epoch, gamma, steps, repeat=1):
    """DPC's factor on the learning rate: x gamma at each of `steps`, anew after the last, `repeat`
    times. NOTE: from the last step on it falls back to gamma^(len(steps) - 1).
    """
    lap, now = divmod(epoch, max(steps))
    power = sum(now >= s for s in steps) if lap < repeat else len(steps) - 1
    return gamma ** power


def learning_rate(args, epoch):
    """Of an epoch, from 0: main.py, test.py; the linear probe as MemDPC's (arXiv:2008.01065)."""
    if args.stage == "finetune" and args.train_what == "last":
        return args.lr * 0.1 ** sum(epoch >= m for m in (60, 80))
    if args.method == "dpc":
        steps = {"hmdb51": (150, 250, 300)}.get(
            args.dataset, (60, 80, 100) if args.img_dim <= 128 else (300, 400, 500))
        return args.lr * (restart_multiplier(epoch, 0.1, steps) if args.stage == "finetune" else 1)
    return step_lr(args.lr, epoch, 100, 0.5 if args.stage == "pretrain" else 0.1)


def parameter_groups(model, train_what):
    """[(parameters, factor on the learning rate)]: with ft a tenth for backbone and transformer.

    NOTE: DPC's own filter looks for names that do not occur, so nothing of it is slow.
    """
    named = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    slow = ("backbone.", "encoder.") if train_what == "ft" and model.encoder is not None else ()
    groups = [([p for k, p in named if not k.startswith(slow)], 1.0),
              ([p for k, p in named if k.startswith(slow)], 0.1)]
    return [(parameters, factor) for parameters, factor in groups if parameters]


def freeze_trunk(model):
    """For the linear probe: no gradient, batch norm with its running statistics, no dropout."""
    for part in (model.backbone, model.encoder, model.agg):
        if part is not None:
            part.requires_grad_(False).eval()


def selection(values, counts, released):
    """The number that chooses the checkpoint: mean over all videos. NOTE: the release takes the
    mean of the last five batches in pre-training.
    """
    if released:
        return sum(values[-5:]) / len(values[-5:])
    return sum(v * n for v, n in zip(values, counts)) / sum(counts)


def optimizer_of(args, model, train_what):
    groups = [{"params": p, "factor": f} for p, f in parameter_groups(model, train_what)]
    return torch.optim.Adam(groups, lr=args.lr, weight_decay=args.weight_decay)


def train(args, device, model, data, losses, validate, history, classes):
    """The loop of pre-training and of fine-tuning: best.pt is the epoch with the best held-out
    top 1. data: (training videos, how to distort them).
    """
    probe = args.stage == "finetune" and args.train_what == "last"
    train_what = args.train_what if args.stage == "finetune" else "all"
    dataset = common.SkipBroken(TrainClips(args, *data), args.seed)
    if device.type == "cuda" and common.world_size() > 1:     # NOTE: as on the release's one GPU
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if probe:
        freeze_trunk(model)
    if args.method == "cpctrans":
        model.to(memory_format=torch.channels_last)           # 0.8 to 0.9 of the time on a CPU
    if args.compile:
        model.compile()
    ddp = DDP(model, gradient_as_bucket_view=True)
    optimizer = optimizer_of(args, model, train_what)
    clip = (args.num_seq * args.seq_len, 3, args.img_dim, args.img_dim)
    common.settle(ddp, torch.zeros(2, *clip, device=device))
    saved = common.resume(args.out / "last.pt", args, model=model, optimizer=optimizer)
    start, best = saved["step"], saved.get("best", -1.0)
    common.same_samples(saved, len(dataset), args.out)

    per_epoch = len(dataset) // args.batch_size
    steps = args.epochs * per_epoch
    sampler = common.StepSampler(len(dataset), args.batch_size, args.seed, start, steps)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=args.workers,
                        pin_memory=device.type == "cuda", generator=torch.Generator())
    log = common.Log(args, start, steps, per_epoch)
    made = {"history": history, "classes": classes}
    ddp.train()
    for step, batch in log.steps(loader):
        if probe:
            freeze_trunk(model)                               # batch norm and dropout, too
        lr = learning_rate(args, step // per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        common.seed_step(args.seed, step, common.rank())      # dropout repeats after a restart
        with common.autocast(device, args.precision):
            out = ddp(paint(batch, device))
        terms = losses(out, batch["label"].to(device))
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        log.guard(step, optimizer, loss=terms["loss"])
        optimizer.step()

        ended, measured = (step + 1) % per_epoch == 0, {}
        saving = ended or (step + 1) % args.save_every == 0 or log.stopping
        if ended:
            began = time.perf_counter()
            common.share_buffers(model)
            measured = validate(model.eval())
            if measured["val_top1"] > best:
                best = measured["val_top1"]
                common.save(args.out / "best.pt", step + 1, args, model=model, **made)
            ddp.train()
            log.since += time.perf_counter() - began          # not part of the training speed
        log(step, saving, **terms, lr=lr, **measured)
        if saving:
            common.save(args.out / "last.pt", step + 1, args, model=model, optimizer=optimizer,
                        best=best, samples=len(dataset), **made)
    common.barrier()
    if common.rank() == 0:
        common.draw_curve(args.out, f"{args.stage}: {args.method} on {args.dataset}",
                          ["loss", "top1", "val_loss", "val_top1", "lr"])
    model.load_state_dict(common.load_file(args.out / "best.pt")["model"])
    return {**validate(model.eval()), "training_samples_broken": log.total("broken")}


def finish(args, metrics, words):
    """metrics.json and a line of the console, with the protocol beside the numbers."""
    if common.rank() == 0:
        common.write_json(args.out / "metrics.json", {**metrics, "protocol": words})
    common.say("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()
                         if isinstance(v, (int, float))) + f"\nprotocol: {words}")


def pretrain(args, device, history):
    """Self-supervised training on the videos of a train list, without their labels."""
    videos, _, number = read_videos(args, "train")
    val, _, _ = read_videos(args, "val")
    torch.manual_seed(args.seed)                              # the same weights on every process
    model = CPC(args).to(device)
    if args.init not in (None, "none") and not (args.out / "last.pt").exists():
        initialise(model, args.init)
    # NOTE: the release draws its validation clips and their colours at random, as in training.
    clips = TestClips(args, val, middle=True)

    def validate(model):
        def network(items, x):
            z_hat, z = model(normalize(x / 255))
            score = scores(z_hat, z)
            target = torch.arange(len(score), device=device)
            kinds = pair_categories(*z.shape[:3]).flatten(3).flatten(0, 2).to(device)
            kind = kinds.gather(1, score.argmax(1, keepdim=True))[:, 0]
            rows = [info_nce(score, target), *(in_top(score, target, k) for k in (1, 3, 5)),
                    *((kind == c).float() for c in (TEMPORAL, SPATIAL, EASY))]
            return [x.view(len(z), -1).mean(1) for x in rows]
        rows = common.predict(args, device, clips, network, "val", group=16)
        counts = [min(16, len(val.name) - i) for i in range(0, len(val.name), 16)]
        names = ("loss", "top1", "top3", "top5", "wrong_time", "wrong_cell", "wrong_video")
        return {f"val_{name}": float(selection(
            [r[i:i + 16].mean() for i in range(0, len(r), 16)], counts,
            args.compat == "released" and name == "top1")) for name, r in zip(names, rows)}

    history = [*history, this_stage(args, number)]
    metrics = train(args, device, model, (videos, distort_pretrain),
                    lambda out, _: contrast(args, *out), validate, history, None)
    finish(args, metrics, protocol(history))


def finetune(args, device, history):
    """Train the classifier on a train list; the test list is not touched."""
    videos, classes, number = read_videos(args, "train")
    val, _, _ = read_videos(args, "val")
    torch.manual_seed(args.seed)
    model = Classifier(args, len(classes)).to(device)
    if args.init == "none":
        if args.train_what == "last":
            common.say("warning: the frozen network stays random: --init a trained one")
    elif not (args.out / "last.pt").exists():
        initialise(model, args.init)
    clips = TestClips(args, val, middle=True)

    def losses(logits, label):
        return {"loss": F.cross_entropy(logits.float(), label),
                "top1": in_top(logits, label, 1).mean()}

    def validate(model):
        logits, = common.predict(args, device, clips,
                                 lambda _, x: [model(normalize(x / 255))], "val", group=16)
        found = losses(torch.from_numpy(logits), torch.from_numpy(val.label))
        return {f"val_{k}": float(v) for k, v in found.items()}

    history = [*history, this_stage(args, number)]
    metrics = train(args, device, model, (videos, distort_finetune), losses, validate, history,
                    classes)
    finish(args, metrics, protocol(history))


# ---- test (official file: Evaluate/test.py) -----------------------------------------------------

def aggregate(logits):
    """A video's mean probabilities and mean logits over its clips.    (clips, K) -> (K,), (K,)"""
    return logits.softmax(-1).mean(0), logits.mean(0)


def video_metrics(prob, logits, label):
    """top1 and top5 of mean probabilities in %, loss of mean logits; confusion[predicted][true].

    prob, logits: (V, K); label: (V,). NOTE: the confusion matrix, too, is of the mean logits, whose
    largest may be another.
    """
    metrics = {f"top{k}": 100 * float(in_top(prob, label, k).mean()) for k in (1, 5)}
    confusion = torch.zeros(prob.shape[1], prob.shape[1], dtype=torch.int64)
    confusion.index_put_((logits.argmax(1), label), torch.tensor(1), accumulate=True)
    return {**metrics, "loss": float(F.cross_entropy(logits, label))}, confusion


def nearest(query, gallery, k):
    """Indices of the k nearest by cosine.    (Q, D), (G, D) -> (Q, k)"""
    q, g = (F.normalize(torch.from_numpy(x), dim=1) for x in (query, gallery))
    return (q @ g.T).topk(min(k, len(g))).indices.numpy()


def test(args, device, path, history, known):
    """Accuracy on the test list of a split, and retrieval of training videos by test videos.

    Returns metrics and, in words, whether the test videos had been seen.
    """
    videos, classes, number = read_videos(args, "test")
    gallery, _, _ = read_videos(args, "train")
    if known and known != classes:
        raise UserError(f"{path}: its classes are not those of {args.data}")
    weight = common.find_weights(path).get("final_fc.1.weight")
    if weight is not None and len(weight) != len(classes):
        raise UserError(f"{path}: tells {len(weight)} classes apart, {args.data} has "
                        f"{len(classes)}")
    if weight is not None and not known:
        common.say(f"warning: {path} does not say how its classes are ordered: taken as here")
    model = Classifier(args, len(classes)).to(device).eval()
    # NOTE: a merely pre-trained network is used as fine-tuning begins, with the ReLU before Enc.
    initialise(model, path, everything=weight is not None, statistics=True)

    def network(_, clips):                                    # one video: (1, clips, N, 3, S, S)
        chunks = clips[0].split(CHUNK)
        logits = torch.cat([model(normalize(x / 255)).float() for x in chunks])
        return [x[None] for x in aggregate(logits)]

    metrics = {}
    if weight is not None:
        prob, logits = (torch.from_numpy(x) for x in common.predict(
            args, device, TestClips(args, videos), network, "test", group=1))
        metrics, confusion = video_metrics(prob, logits, torch.from_numpy(videos.label))
        if common.rank() == 0:
            write_predictions(args, videos, classes, prob, confusion)
    query, stock = (common.predict(
        args, device, TestClips(args, v, middle=True),
        lambda _, x: [model.pooled(normalize(x / 255))], what, group=16)[0]
        for v, what in ((videos, "queries"), (gallery, "gallery")))
    found = nearest(query, stock, 20)
    hits = gallery.label[found] == videos.label[:, None]
    metrics |= {f"retrieval_top{k}": 100 * float(hits[:, :k].any(1).mean()) for k in (1, 5, 20)}
    if common.rank() == 0:
        draw_retrieval(args, videos, gallery, found, classes)
    return ({**metrics, "videos": len(videos.name)},
            f"tested on test list {number} of {args.dataset}, {count_seen(args, videos, history)}")


def test_all(runs, device):
    """`test` of each file on the split that it was trained on, and the mean over the splits."""
    splits, words = {}, []
    for args, path, history, known in runs:
        metrics, tested = test(args, device, path, history, known)
        splits[str(args.split)] = metrics
        words.append(protocol(history, tested))
        common.say(f"split {args.split}: " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
    means = {k: sum(m[k] for m in splits.values()) / len(splits) for k in metrics}
    finish(args, {**means, "splits": splits}, " | ".join(dict.fromkeys(words)))


def short_name(path):
    """<Class>/<video> of a file's or folder's path in bytes."""
    folder, video = os.fsdecode(path).split("/")[-2:]
    return f"{folder}/{re.sub(r'[.](avi|mp4)$', '', video)}"


def count_seen(args, videos, history):
    """In words: how many of the test videos stand in lists that were trained on."""
    tested, trained = {short_name(n) for n in videos.name}, set()
    for stage in history:
        if stage.get("dataset") == args.dataset:
            trained |= set(read_list(args, "train", stage["list"])[0])
    if any("file" in stage for stage in history):
        return ("seen in training or not: unknown (the released recipe pre-trains on list 3, which "
                "holds all test videos of split 1)")
    n = len(tested & trained)
    return f"{n} of {len(tested)} TEST VIDEOS WERE SEEN in pre-training or training" if n else (
        f"of which none of {len(tested)} was seen in training")


def write_predictions(args, videos, classes, prob, confusion):
    """predictions_splitK.json and confusion_splitK.json."""
    rows = [{"video": short_name(n), "class": classes[y], "predicted": classes[p.argmax()],
             "probability": round(float(p.max()), 6)}
            for n, y, p in zip(videos.name, videos.label, prob)]
    common.write_json(args.out / f"predictions_split{args.split}.json", rows)
    common.write_json(args.out / f"confusion_split{args.split}.json", {
        "classes": classes, "rows": "predicted", "columns": "true", "counts": confusion.tolist()})


def draw_retrieval(args, videos, gallery, found, classes, rows=6, neighbours=3, side=72):
    """retrieval.png: test videos and the training videos nearest to them, 3 pictures of each."""
    from PIL import Image, ImageDraw
    wide, high, top = 3 * side + 14, side + 30, 52
    rows = min(rows, len(videos.name))
    neighbours = min(neighbours, found.shape[1])
    image = Image.new("RGB", (16 + wide * (1 + neighbours), top + high * rows), "white")
    draw = ImageDraw.Draw(image)
    draw.text((12, 8), f"Nearest neighbours, cosine of pooled GRU features, split {args.split} of "
              f"{args.dataset}", "black", common.font(15))
    for n in range(1 + neighbours):
        draw.text((12 + wide * n, 32), f"training video {n}" if n else "test video", "#333333",
                  common.font())
    for r, i in enumerate(np.linspace(0, len(videos.name) - 1, rows).round().astype(int)):
        for n, (stock, j) in enumerate([(videos, i), *((gallery, g) for g in found[i])][
                :1 + neighbours]):
            clip = TestClips(args, stock, middle=True)[j].permute(0, 2, 3, 1).numpy()
            x, y = 12 + wide * n, top + high * r
            for k, t in enumerate((0, len(clip) // 2, len(clip) - 1)):
                image.paste(Image.fromarray(clip[t]).resize((side, side)), (x + side * k, y))
            same = stock.label[j] == videos.label[i]
            mark = "" if n == 0 else "same: " if same else "other: "
            draw.text((x, y + side + 3), (mark + classes[stock.label[j]])[:34],
                      "#1f4e9c" if same else "#c65a11", common.font())
    common.save_picture(image, args.out / "retrieval.png")


def main(args):
    if not args.data.is_dir():
        raise UserError(f"{args.data}: no such folder; --data is the {args.dataset} folder as "
                        "README lays it out (`make toy` writes a small one, data/toy)")
    if args.stage == "test":
        runs = [(one := argparse.Namespace(**vars(args)), path, *fill_from(one, path))
                for path in args.test]
        if len({one.split for one, *_ in runs}) < len(runs):
            raise UserError(f"{args.test[-1]}: another file is of the same split")
        test_all(runs, common.start_run(args))
        return
    past, _ = fill_from(args, None if args.init in (None, "none") else args.init)
    if args.num_seq <= args.pred_step and args.stage == "pretrain":
        raise UserError(f"--pred_step {args.pred_step} of --num_seq {args.num_seq} pictures leaves "
                        "none to predict from")
    device = common.start_run(args)
    {"pretrain": pretrain, "finetune": finetune}[args.stage](args, device, past)


if __name__ == "__main__":
    arguments = parse_args()
    common.launch(main, arguments)
