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
Evaluate     python ssdet_coarsefine.py --stage evaluate --init CHECKPOINT [CHECKPOINT ...]
Try it       python ssdet_coarsefine.py --data data/toy/kinetics400 --tiny, then
             python ssdet_coarsefine.py --stage finetune --stream fine --data data/toy/charades
             --tiny      (CPU, minutes; `make toy` first)

The papers' texts were not at hand, only abstracts, figures and READMEs: files named here are those
of the official code. Where the sources and this file differ, grep NOTE in this file.
"""

import csv
import io
import itertools
import json
import math
import os
import re
import time
import zlib
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
OFFICIAL = {"charades": (157, {"train": (7985, 49809), "test": (1863, 16691)}),
            "multithumos": (65, {"train": (200, 18482), "test": (213, 20208)})}
RATE = {"charades": 24.0, "multithumos": None}                # frames per second; None: the file's
PICTURES = {"kinetics400": "frame_{:05d}.jpg", "charades": "{id}-{:06d}.jpg",
            "multithumos": "{id}-{:06d}.jpg"}                 # of folders of frames, from 1
KINETICS = ((0.43387, 0.40456, 0.37761), (0.15199, 0.14856, 0.15698))
NORMS = {"kinetics": tuple(tuple(v / 255 for v in row) for row in (
             (110.63666788, 103.16065604, 96.29023126), (38.7568578, 37.88248729, 40.02898126))),
         "charades": ((0.413, 0.368, 0.338), (0.131, 0.125, 0.132)),
         "fair": ((0.45,) * 3, (0.225,) * 3)}                 # what the FAIR weights were trained with
SCALES = {"kinetics400": (224 / 256,), "x3d": (224 / 256,)}   # of the random crops, see `recipe`
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
common.FREE_FLAGS |= {"features", "annotations", "chunk"}


# ---- volume augmentations (Sec. 3 of SSDet, unverified; official file: x3d.py) ------------------

class Mixture(NamedTuple):
    """Clips, and what their frames show: M labels with weights γ, where they are present at all.

    x: (B, 3, T, H, W); label: (M, B, T) long; weight γ: (M, B, T); present k: (M, B, T) of 0, 1.
    """
    x: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor
    present: torch.Tensor

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
    which one lies inside the other, the outer one falls to 0 and comes back. whole: the sum of
    both weights there. NOTE: that course is
    half a frame off the middle, as released; the figure in the official README has (2k-1)/(2n+1).
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


def volume_mixup(mix, start, length, partner):
    """Each clip cross-fades with its partner.      start, length: (2, B); partner: (B,)"""
    device, partner = mix.x.device, partner.to(mix.x.device)
    span = intervals(mix.x.shape[2], start.to(device), length.to(device))
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
    ramp = (column - (W - others) + 1) / (mine + others - W + 1)          # of the partner
    own = torch.where(left & right, 1 - ramp, left.float())
    other = torch.where(left & right, ramp, right.float())
    x = (mix.x * own[:, None, :, None] + mix.x[partner] * other[:, None, :, None]).to(mix.x.dtype)
    weights = torch.stack([own.mean(-1), other.mean(-1)])     # (2, B, T)
    return mix.mixed(x, partner, weights, torch.stack([left.any(-1), right.any(-1)]).float())


def draw_volume_choices(rng, T, parts, names, prob=0.5, cutmix="growing"):
    """Random choices of one step for a whole batch, as {name: {choice: tensor}} of those applied.

    Each augmentation is applied to the whole batch with probability `prob` (once per step, as
    released). parts: the samples of each part of the batch; a partner is of the same part.
    """
    B, chosen = sum(len(p) for p in parts), {}
    switches = rng.random(3)
    for name, u in zip(("freeze", "mixup", "cutmix"), switches):
        if name not in names or u > prob:
            continue
        partner = np.empty(B, int)
        for part in parts:
            partner[part] = rng.permutation(part)             # of itself, now and then
        length = rng.integers(T // 2, T + 1, (2, B))
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
            "mixup": {"start": start, "length": half, "partner": (i + B // 2 + 1) % B},
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
    return 0, (max(stride, n - span) - 1 if released else n - span)


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


def short_state(step, state, released=False):
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
    saving = steps[-1] / iterations                           # of iterations
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
    """(kind of batch norm, splits or processes) by samples per GPU: 8 share their statistics."""
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
    y = torch.einsum("bcnp,bln->bclp", x.reshape(*x.shape[:3], -1), weight.to(x.dtype))
    return y.reshape(*y.shape[:3], *x.shape[3:])


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
    G = torch.exp(-(tau - mu[:, None]) ** 2 / (2 * (valid[:, None] / 8) ** 2))    # (B, T', L)
    return G / G.amax(1, keepdim=True).clamp(min=torch.finfo(G.dtype).tiny)


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
    return F.adaptive_max_pool3d(x, (x.shape[2], size, size))


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
            self.rw6 = FusionFilter(last, classes, pool=True, alone=fusion == "own",
                                    dropout=dropout)
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
        valid (B, T'), the clip's start behind theirs in steps (B,) -> logits (B, K, ~T)
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
            scale = scale if self.fusion == "own" else scale.sigmoid()
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

def over_all(total, count):
    """total / count over the batch of all processes, with this process's share of the gradient."""
    count = count.detach().double().clone()
    dist.all_reduce(count)
    return (total / count.to(total.dtype)).sum() * common.world_size()


def pretraining_loss(logits, mix):
    """Σ_m [Σ_bt γ_m CE(z, y_m)] / Σ_bt k_m, a sum over mixtures; and the soft accuracy,
    Σ_m Σ_bt γ_m [argmax z = y_m] / (B·T).      (B, C, T) -> two scalars
    """
    logits = logits.float()
    ce = torch.stack([F.cross_entropy(logits, y, reduction="none") for y in mix.label])
    loss = over_all((mix.weight * ce).sum((1, 2)), mix.present.sum((1, 2)))
    hits = (mix.weight * (logits.argmax(1) == mix.label)).sum()
    return loss, over_all(hits, torch.tensor(mix.label[0].numel(), device=logits.device))


def to_labels(logits, length, align_corners):
    """Logits at label rate, linearly: align_corners in the fine stream, not in the others.

    (B, K, T) -> (B, K, length)
    """
    return F.interpolate(logits.float(), length, mode="linear", align_corners=align_corners)


def detection_loss(logits, label, mask=None):
    """(cls + loc) / 2, cls, loc: cross entropy of a class's maximum over time, and of all frames.

    logits, label: (B, K, N); mask: (B, N) of valid frames. Without a mask padding counts as
    negative, as in the SSDet repository.
    """
    logits, B, K = logits.float(), *label.shape[:2]
    bce, clips = F.binary_cross_entropy, torch.tensor(B * K, device=label.device)
    if mask is None:
        bce = F.binary_cross_entropy_with_logits
        top, frames = logits, torch.tensor(label.numel(), device=label.device)
    else:
        top = logits = logits.sigmoid() * mask[:, None]
        frames = mask.sum() * K
    cls = over_all(bce(top.amax(2), label.amax(2), reduction="sum"), clips)
    loc = over_all(bce(logits, label, reduction="sum"), frames)
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


def load(model, path, whole=False):
    """Fill a network from a checkpoint of ours, of the release, of SlowFast's zoo or pytorchvideo's.

    The backbone must be in it, entirely; classifiers of other classes, and what Coarse-Fine adds
    to X3D, may be missing, unless `whole`.
    """
    two = isinstance(model, TwoStream)
    prefixes = ("coarse.", "fine.") if two else ("",)
    may_lack = tuple(p + h for p in prefixes for h in (*HEADS, *GROWN)) + ("fine.fc1.",)
    needed = tuple(k for k in model.state_dict() if whole or not k.startswith(may_lack))
    common.load_weights(model, path, [{"": ""}], needed, adapt=two_names if two else stream_names)


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
    if any(".pathway1_" in k or "multipathway" in k for k in tensors):
        head = next((v for k, v in tensors.items() if re.search(r"proj\w*\.bias$", k)), None)
        stem = next((v for k, v in tensors.items() if re.search(
            r"pathway0_stem\.conv|blocks\.0\.multipathway_blocks\.0\.conv", k)), None)
        if head is None or stem is None:
            raise UserError(f"{path}: holds no SlowFast network")
        return Kind("slowfast", "M" if len(stem) == 64 else "tiny", len(head), "", "none")
    two = {k for k in tensors if k.startswith(("coarse.", "model_l_state_dict."))}
    names = {re.sub(r"^(coarse|model_l_state_dict)\.", "", k): v for k, v in tensors.items()
             if not two or k in two}
    names = common.x3d_tensors(names, {})
    blocks = tuple(len({k.split(".")[1] for k in names if k.startswith(f"layer{n}.")})
                   for n in range(1, 5))
    stem = len(names["conv1_s.weight"]) if "conv1_s.weight" in names else 0
    fits = [v for v in ("M", "L", "XL", "tiny") if blocks == common.X3D.BLOCKS.get(v, (3, 5, 11, 7))
            and stem == common.X3D.WIDTHS.get(v, (24,))[0]]
    if not fits or "fc2.bias" not in names:
        raise UserError(f"{path}: holds no X3D or SlowFast network")
    grown = any(k.startswith(GROWN) for k in names)
    fusion = "mixed" if "mix2.conv_at.bias" in names else "own" if "rw2.at1.bias" in names else "none"
    stream = "two" if two else "coarse" if grown else "x3d"
    return Kind(stream, fits[0], len(names["fc2.bias"]),
                "grid" if "pool_1.conv1.bias" in names else "", fusion)
