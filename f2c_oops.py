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
Localize     python f2c_oops.py --stage localize --init runs/f2c_oops_oops_classify_video/best.pt
Anticipate   torchrun --nproc_per_node 8 f2c_oops.py --stage classify --anticipate 1.5
Evaluate     python f2c_oops.py --stage evaluate --init CHECKPOINT
Try it       python f2c_oops.py --stage features --data data/toy/oops --tiny, then
             python f2c_oops.py --data data/toy/oops --tiny      (CPU, minutes; `make toy` first)

The paper's text was not at hand, only its abstract: files named here are those of the official
code. Where the sources and this file differ, grep NOTE in this file.
"""

import argparse
import contextlib
import csv
import itertools
import json
import math
import os
import re
import statistics
import struct
import time
import zipfile
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
HALF = ((0.5,) * 3, (0.5 + 1e-8,) * 3)                        # mean and std of timm's ViT
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
KINETICS = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
DENSE = 400                          # tokens up to which one masked attention beats blocks
PAD = -1


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
    x = np.arange(T // size * size)
    made = []
    if long_enough(T, size):
        half = len(x) // size // 2 * size
        made = [("speed", split_clips(x[::FASTER], size))] if c["speed"] else []
        made += [("normal", split_clips(x, size)),
                 ("point", np.concatenate([split_clips(x[:half], size),
                                           split_clips(x[half::FASTER], size)]))]
    else:
        made = [("normal", split_clips(x, size))]
    made += [("flip", split_clips(np.concatenate([x[:c["flip"]], x[c["flip"]:][::-1]]), size)),
             ("shuffle", split_clips(x, size)[c["order"]]),
             ("warp", split_clips(np.concatenate([x[c["warp"]:], x[:c["warp"]]]), size))]
    return [(name, clips) for name, clips in made if name in names]


def label_of(name, names, released=False):
    """Number of a transformation. NOTE: F2C2V as released gives the random point the label of the
    double flip, 3, and 2 to nobody.
    """
    if released and "speed" in names and name == "point":
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
    first = int((labels == 1).argmax())
    last = first + int((labels[first:] == 2).argmax()) if (labels[first:] == 2).any() else None
    out = np.zeros_like(labels)
    out[first:last] = 1
    if last is not None:
        out[last:] = 2
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
    middle, relative = sorted(note["t"])[1], statistics.median(note["rel_t"])
    return middle >= 0 and 0.01 <= relative <= 0.99 and shortest <= note["len"] <= longest


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
        there[:, 1, 0] = False
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

    def __init__(self, dim, layers=3, heads=16, window=32, ff=3072, positions=7200, dropout=0.1):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Embedding(positions, dim, padding_idx=positions - 1)
        self.kind = nn.Embedding(2, dim)                      # 1: the class token, 0: the others
        self.norm, self.drop = nn.LayerNorm(dim, eps=1e-12), nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(dim, heads, window, ff, dropout) for _ in range(layers))
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)
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


def head(dim, mlp, classes):
    """Classifier of an embedding; places in it are those of the release."""
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, mlp), nn.GELU(), nn.Dropout(0.2),
                         nn.Linear(mlp, classes))


def restack(rows, order):
    """Rows (U, ...) in the order of each video's clips, zeros where that is PAD: (B, N, ...)."""
    stacked = rows[order.clamp(min=0)]
    return stacked * (order != PAD).view(*order.shape, *[1] * (rows.dim() - 1)).to(rows.dtype)


class F2C(nn.Module):
    """Frames to clip: Enc_frame and a head.

    NOTE: `released` counts the class token among the L frames that may be seen, so that the last
    frame is never seen; but with a CRF, by another fault of it, all are.
    """

    def __init__(self, dim, classes, mlp=1024, released=False, crf=False, **shape):
        super().__init__()
        self.released = released
        self.frames, self.head = Encoder(dim, **shape), head(dim, mlp, classes)
        self.crf = CRF(classes) if crf else None
        for part in (self.frames.layers[-1].query, self.frames.layers[-1].key,
                     self.frames.layers[-1].value):
            part.requires_grad_(False)                        # only the class token's row is read

    def embed(self, x, lengths=None):
        """Clip embeddings z.    x: (B, L, D), lengths: (B,) -> (B, D)"""
        if self.released and (self.crf is None or hasattr(self, "clips")):
            full = torch.full((len(x),), x.shape[1], device=x.device)
            lengths = (full if lengths is None else lengths) - 1
        return self.frames(x.float(), lengths)

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

    def __init__(self, dim, classes, mlp=1024, released=False, crf=False, per_clip=False,
                 tune=False, **shape):
        super().__init__()
        self.released, self.per_clip, self.tune = released, per_clip, tune
        self.frames, self.clips = Encoder(dim, **shape), Encoder(dim, **shape)
        self.head = head(dim, mlp, classes)
        self.crf = CRF(classes) if crf else None
        self.frames.requires_grad_(tune)
        for part in [self.frames.layers[-1]] + [self.clips.layers[-1]] * (not per_clip):
            for p in (part.query, part.key, part.value):
                p.requires_grad_(False)                       # only the class token's row is read

    embed = F2C.embed

    def train(self, mode=True):
        super().train(mode)
        if not self.tune and not self.released:
            self.frames.eval()
        return self

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
    keep = labels != PAD
    logits, labels = logits[keep].float(), labels[keep]
    total = F.cross_entropy(logits, labels, weights, reduction="sum")
    return total, torch.ones_like(logits[:, 0]).sum() if weights is None else weights[labels].sum()


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

SHAPE = {"layers": 3, "heads": 16, "window": 32, "ff": 3072, "mlp": 1024, "positions": 7200}


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
        known = {**found["args"], "stage": found["args"].get("stage")}
        dim = tensors.get("frames.cls_token")
    else:
        t = "local_model." if video else ""
        depth = [int(m[1]) + 1 for k in tensors if (
            m := re.match(rf"{t}temporal_encoder\.encoder\.layer\.(\d+)\.", k))]
        rows = {"ff": f"{t}temporal_encoder.encoder.layer.0.intermediate.dense.weight",
                "mlp": f"{t}mlp_head.1.weight",
                "positions": f"{t}temporal_encoder.embeddings.position_embeddings.weight"}
        dim = tensors.get(f"{t}cls_token")
        known = {"layers": max(depth, default=None), "stage": None,
                 **{k: len(tensors[name]) for k, name in rows.items() if name in tensors}}
        known["loss"] = "crf" if "crf.transitions" in tensors else "ce"
    if dim is None:
        raise UserError(f"{path}: no checkpoint of this method: it has no class token")
    return {**known, "dim": dim.shape[-1], "level": "video" if video else "clip"}
