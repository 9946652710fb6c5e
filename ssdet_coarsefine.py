"""SSDet: Weakly-guided Self-supervised Pretraining for Temporal Activity Detection, AAAI 2023,
arXiv:2111.13675, and Coarse-Fine Networks for Temporal Activity Detection in Videos, CVPR 2021,
arXiv:2103.01302. Official code: kkahatapitiya/SSDet, commit 5f3f3e3; Coarse-Fine-Networks, 37a612e,
and its branch weak, f858742; X3D-Multigrid, d63d8fe.

Task: for each frame of a long video, predict which of K activities happen. Few videos have frame
labels. SSDet turns Kinetics' clip labels into a detection task. The label is copied to every frame.
Then three augmentations make actions begin, end and overlap: Freeze repeats one frame (label 0,
background), MixUp cross-fades two clips, CutMix shows two clips side by side.
Coarse-Fine has two streams. The fine stream sees T' = 128 sampled frames. The coarse stream sees
T = 64 and keeps a quarter of them, chosen by Grid Pool. Fine features are filtered by attention,
aligned in time, and then scale and shift the coarse features.

    x'(t) = x(s), y'(t) = 0 for s ≤ t < s+n;  x'(t) = x(t-n+1) after that       Freeze     (1)
    x'(t) = Σ_m γ_m(t) x_m(t)      M clips; clip m is visible where k_m(t) = 1  MixUp      (2)
    γ_m(t) = visible area of clip m                                             CutMix     (3)
    L = Σ_m [Σ_bt γ_m CE(z, y_m)] / Σ_bt k_m       z: logits of a frame         SSDet loss (4)
    p = sigmoid(conv(X)/2),  q = (1-p) / Σ(1-p),  c_i = Σ_{j≤i} q_j
    X_i = X((T-1) c_i)                                                          Grid Pool  (5)
    z'_j = z at the index i where c_i = j / (L-1)                               Unpool     (6)
    G_i(τ) = exp(-(τ-μ_i)² / 2σ²) / max_τ,  μ_i = s + c_i T,  σ = N/8           alignment  (7)
    A_i = Σ_τ v a G_i F_τ / Σ_τ v a G_i       attention a = a(F), mask v        filter     (8)
    X ← X · sigmoid(W_s [scale(A)_1..4]) + W_b [bias(A)_1..4]                   fusion     (9)
    L = ½ BCE(max_t P, max_t Y) + ½ BCE(P, Y)        P = sigmoid(z)        detection loss (10)

x: clip, y: labels; X, F: coarse and fine features; c: times of Grid Pool; in (7) s: start of the
coarse clip, N: valid fine steps. Names as released: W_b = conv_at, W_s = conv_at2; a = at2(at1(F));
bias = fc2(fc1(A)), scale = fc4(fc3(A)); rw2..rw5 with mix2..mix5 act after Grid Pool and the stages
2 to 4, rw6 on the logits.

Pre-train    torchrun --nproc_per_node 4 ssdet_coarsefine.py
Fine         python ssdet_coarsefine.py --stage finetune --stream fine
Features     torchrun --nproc_per_node 2 ssdet_coarsefine.py --stage extract
Coarse-Fine  torchrun --nproc_per_node 2 ssdet_coarsefine.py --stage finetune --stream coarse
End to end   torchrun --nproc_per_node 4 ssdet_coarsefine.py --stage finetune --stream two
Evaluate     python ssdet_coarsefine.py --stage evaluate --init FILE [FILE ...]
Try it       make toy, then python ssdet_coarsefine.py --data data/toy/kinetics400 --tiny

Published for Charades, mAP of 25 frames per video: Coarse-Fine 25.10 after classification, 26.29
after SSDet, 26.95 for three networks averaged. We had abstracts, figures, READMEs and code, not the
full papers; files named below are the official code's. NOTE marks differences.
"""

import copy
import functools
import itertools
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import common
from common import UserError

BACKGROUND = 0                       # label of frozen frames; Kinetics' classes become 1..400
LEVELS = ("layer1", "layer2", "layer3", "layer4", "conv5")    # feature maps of the fine stream
GRID = 7                             # height and width to which these maps are pooled
PUBLISHED = {                        # milestones: shares of training at which lr falls to a tenth
    # SSDet, train_x3d_kinetics_multigrid.py; iters guessed from its files' names, unverified
    "detect": {"num_frames": 16, "stride": 5, "batch_size": 64, "lr": 0.05, "backbone_lr": 0.1,
               "weight_decay": 5e-5, "warmup": 8000, "iters": 100_000},
    # X3D-Multigrid, train_x3d_kinetics_multigrid.py: 120 epochs
    "classify": {"num_frames": 8, "batch_size": 128, "bn_splits": 4, "lr": 0.2, "augment": [],
                 "weight_decay": 5e-5, "warmup": 8000, "iters": 206_160, "multigrid": "x3d",
                 "milestones": [0.4, 0.65, 0.925], "val_every": 23},
    # SSDet, train_x3d_charades_loc.py
    "x3d": {"num_frames": 16, "batch_size": 16, "bn_splits": 2, "lr": 0.02, "epochs": 100,
            "schedule": "plateau"},
    # Coarse-Fine, train_fine.py; there is no official script for SlowFast
    **dict.fromkeys(("fine", "slowfast"), {"batch_size": 8, "lr": 0.01, "val_every": 4,
                                           "milestones": [0.3, 0.4, 0.5]}),
    # Coarse-Fine, train_coarse_fineFEAT.py; for two the distributed script of its branch weak
    "coarse": {"batch_size": 6, "lr": 0.02, "milestones": [0.15, 0.25, 0.35]},
    "two": {"batch_size": 16, "lr": 0.02, "milestones": [0.3, 0.45, 0.55]}}


# ---- 1. SSDet: volume augmentations (official file: x3d.py) --------------------------------------

class Mixture(NamedTuple):
    """A batch of mixed clips. Each frame has M labels with weights γ and presence masks k."""
    x: torch.Tensor                                           # (B, 3, T, H, W)
    label: torch.Tensor                                       # (M, B, T) long
    weight: torch.Tensor                                      # γ, (M, B, T)
    present: torch.Tensor                                     # k, (M, B, T): 1 where visible


def volume_freeze(mix, start, length):
    """Repeat frame `start` for `length` frames, with label 0; delay the rest.      (B,), (B,)"""
    start, length = start[:, None], length[:, None]
    t = torch.arange(mix.x.shape[2], device=mix.x.device)
    source = torch.where(t < start, t, (t - length + 1).maximum(start))   # (B, T)  (1)
    frozen = (t >= start) & (t < start + length)
    x = torch.stack([clip[:, s] for clip, s in zip(mix.x, source)])
    label = mix.label.gather(2, source.expand_as(mix.label)).masked_fill(frozen, BACKGROUND)
    return mix._replace(x=x, label=label)


def unmixed(x, label):
    """Clips as a Mixture with M = 1.      x: (B, 3, T, H, W), label: (B, T)"""
    ones = torch.ones(1, *label.shape, device=x.device)
    return Mixture(x, label[None], ones, ones)


def with_partner(mix, x, partner, weights, present):
    """The frames `x` with the labels of mix and of the partners: M -> 2M."""
    return Mixture(
        x, label=torch.cat([mix.label, mix.label[:, partner]]),
        weight=torch.cat([mix.weight * weights[0], mix.weight[:, partner] * weights[1]]),
        present=torch.cat([mix.present * present[0], mix.present[:, partner] * present[1]]))


def clip_intervals(T, start, length, extend=True):
    """(start, end) of the own clip and of its partner, (2, B) each. extend: the earlier start moves
    to 0, and then the later end to T, so that every frame shows a clip.
    """
    if not extend:
        return start, start + length
    own_first = start[0] <= start[1]
    start = torch.stack([start[0].masked_fill(own_first, 0), start[1].masked_fill(~own_first, 0)])
    end = start + length
    own_last = end[0] >= end[1]
    end = torch.stack([end[0].masked_fill(own_last, T), end[1].masked_fill(~own_last, T)])
    return start, end


def cross_fade(T, start, end, total=1):
    """Weights of two clips that sum to `total`, and where they are present, (2, B, T) each.

    Frames k = 1..n show both clips. There the weight of the own clip is, if it
        starts and ends later         k / (n+1)
        starts and ends earlier       1 - k / (n+1)
        starts earlier, ends later    |t + 1 - middle| 2 / (n+1)
        is inside its partner         1 - |t + 1 - middle| 2 / (n+1)
    NOTE: as in the code; the minimum is half a frame off. The README's figure has (2k-1)/(2n+1).
    """
    t = torch.arange(T, device=start.device)
    present = (t >= start[..., None]) & (t < end[..., None])
    overlap_start, overlap_end = start.amax(0)[:, None], end.amin(0)[:, None]             # (B, 1)
    n = (overlap_end - overlap_start).clamp(min=0)
    rise = (t + 1 - overlap_start) * (1 / (n + 1)) * total    # (B, T)
    outer = (t + 1 - (overlap_start + overlap_end) / 2).abs() * 2 / (n + 1) * total
    later, ends_later = (start[0] >= start[1])[:, None], (end[0] >= end[1])[:, None]
    own = torch.where(later == ends_later, torch.where(later, rise, total - rise),
                      torch.where(ends_later, outer, total - outer))
    both = present[0] & present[1]
    weights = [torch.where(both, w, p * float(total)) for w, p in zip((own, total - own), present)]
    return torch.stack(weights), present.float()


def volume_mixup(mix, start, length, partner, extend=True):
    """Cross-fade each clip with its partner.      start, length: (2, B); partner: (B,) indices"""
    T = mix.x.shape[2]
    start, end = clip_intervals(T, start, length, extend)
    weights, present = cross_fade(T, start, end)              # (2, B, T)
    own, other = weights[:, :, None, :, None, None].to(mix.x.dtype)       # (B, 1, T, 1, 1)
    x = mix.x * own + mix.x[partner] * other                  # (2)
    return with_partner(mix, x, partner, weights, present)


def volume_cutmix_growing(mix, start, length, partner, extend=True):
    """In shared frames the later clip's window grows from one side over the other's. NOTE: in the
    release this code is commented out; there, frames of neither clip are black (extend=False).
    """
    T, W = mix.x.shape[2], mix.x.shape[4]
    start, end = clip_intervals(T, start, length, extend)
    width, present = cross_fade(T, start, end, total=W)       # in columns
    width = (width + W // 16 * present[0] * present[1]).clamp(0, W)       # overlap, to be blended
    width, column = width[..., None], torch.arange(W, device=mix.x.device)
    left, right = column < width[0], column >= W - width[1]   # own and partner's window, (B, T, W)
    shared = (left & right).sum(-1, keepdim=True)
    ramp = (column - (W - width[1]) + 1) / (shared + 1)       # weight of the partner there
    own = torch.where(left & right, 1 - ramp, left.float())
    other = torch.where(left & right, ramp, right.float())
    x = (mix.x * own[:, None, :, None] + mix.x[partner] * other[:, None, :, None]).to(mix.x.dtype)
    weights = torch.stack([own.mean(-1), other.mean(-1)])     # (2, B, T)  (3)
    present = torch.stack([left.any(-1), right.any(-1)]).float()
    return with_partner(mix, x, partner, weights, present)


def volume_cutmix_sliding(mix, partner):
    """Two fixed windows side by side, in which the clips slide; both labels have weight 1/2. NOTE:
    the released code runs this one; its README and figure describe `volume_cutmix_growing`.
    """
    T, W = mix.x.shape[2], mix.x.shape[4]
    window, column = 9 * W // 16, torch.arange(W, device=mix.x.device)
    other = ((column - (W - window) + 1) / (2 * window - W + 1)).clamp(0, 1)              # (W,)
    shift = torch.arange(T, device=mix.x.device)[:, None] * (7 * W // 16) // T            # (T, 1)

    def slide(x, shift):
        return x.gather(4, ((column + shift) % W)[:, None].expand_as(x))

    x = slide(mix.x, shift) * (1 - other) + slide(mix.x[partner], -shift) * other
    weights = torch.stack([1 - other.mean(), other.mean()]).to(mix.weight.dtype)
    return with_partner(mix, x, partner, weights, torch.ones_like(weights))


AUGMENTATIONS = {"freeze": volume_freeze, "mixup": volume_mixup, "cutmix": volume_cutmix_growing,
                 "sliding": volume_cutmix_sliding}            # applied in this order


def augment(mix, choices):
    """Apply the augmentations named in choices, {name: keyword arguments}."""
    for name, change in AUGMENTATIONS.items():
        if name in choices:
            mix = change(mix, **choices[name])
    return mix


def draw_choices(rng, name, T, B, device=None):
    """Draw the keyword arguments of one augmentation for B clips of T frames."""
    choices = {}
    if name == "freeze":
        choices["length"] = rng.integers(1, max(2, T // 2), B)
    else:
        choices["partner"] = rng.permutation(B)               # a clip may be its own partner
    if name in ("mixup", "cutmix"):                           # two clips always cover T frames
        choices["length"] = rng.integers((T + 1) // 2, T + 1, (2, B))
    if "length" in choices:
        choices["start"] = rng.integers(0, T - choices["length"] + 1)
    return {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in choices.items()}


def draw_augmentations(args, step, T, B, device):
    """{name: choices} of a step, on or off for the whole batch of all processes, as released."""
    on = np.random.default_rng((args.seed, step)).random(len(AUGMENTATIONS)) < args.aug_prob
    rng = np.random.default_rng((args.seed, step, 1 + common.rank()))     # NumPy drops a last 0
    return {name: draw_choices(rng, name, T, B, device) for name, draw in zip(AUGMENTATIONS, on)
            if draw and name in args.augment}


# ---- 2. SSDet: pre-training (official file: train_x3d_kinetics_multigrid.py) ---------------------

def pretraining_loss(logits, mix):
    """Loss (4) and the soft accuracy.      (B, C, T) -> two scalars. NOTE: Σ k_m is over the clips
    of a process, in the release over those of all GPUs.
    """
    ce = torch.stack([F.cross_entropy(logits, y, reduction="none") for y in mix.label])
    present = mix.present.sum((1, 2)).clamp(min=1)            # Σ_bt k_m, (M,)
    loss = ((mix.weight * ce).sum((1, 2)) / present).sum()    # (4)
    return loss, (mix.weight * (logits.argmax(1) == mix.label)).sum() / mix.label[0].numel()


def pretrain(args, device):
    """SSDet. --task classify is the same with one label per clip and without augmentations."""
    clips, names = read_kinetics(args, "train")
    val_clips, _ = read_kinetics(args, "val", names)
    background = int(args.task == "detect")   # class 0, of frozen frames. NOTE: not in the release
    dataset = common.Samples(args, clips, make_kinetics_clip)
    torch.manual_seed(args.seed)                              # the same weights on every process
    model = make_model(args, len(names) + background).to(device)
    load_init(args, model)
    if args.compile:
        model.compile()
    ddp = DDP(model)                                          # batch norm sees a process's clips
    optimizer = make_optimizer(args, model)
    saved = common.resume(args.out / "last.pt", args, len(dataset), model=model,
                          optimizer=optimizer)

    plan = step_shapes(args, len(dataset))                    # the shape of every step's batch
    start, steps = saved["step"], len(plan)
    rounds = np.cumsum([0, *(s.batch for s in plan)]) // len(dataset) // args.val_every
    log, metrics = common.Log(args, start, steps), {}
    ddp.train()
    for step, batch in log.steps(common.batches(args, dataset, device, start, steps,
                                                plan=[shape[:3] for shape in plan])):
        common.set_splits(model, plan[step].splits)
        lr = learning_rate(args, step, steps) * plan[step].lr
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        common.seed_step(args.seed, step)                     # dropout repeats after a restart
        batch = common.to_device(batch, device)
        x, label = normalize_clips(args, batch["clip"]), batch["label"][:, None] + background
        B, _, T = x.shape[:3]
        mix = augment(unmixed(x, label.expand(-1, T if background else 1)),
                      draw_augmentations(args, step, T, B, device))       # (1) (2) (3)
        with common.autocast(device, args.precision):
            z = ddp(mix.x)                                    # (B, K+1, T), or (B, K, 1)
        loss, accuracy = pretraining_loss(z.float(), mix)     # (4)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        ended = step + 1 == steps or rounds[step + 1] > rounds[step]      # every val_every epochs
        saving = ended or (step + 1) % args.save_every == 0
        if saving or log.due(step):
            common.check_finite(step, model, loss)            # NaN stops the run before the update
        optimizer.step()

        metrics = {}
        if saving:
            common.merge_splits(model)                        # statistics for evaluation
        if ended:
            metrics = evaluate_kinetics(args, device, model.eval(), val_clips)
            ddp.train()
        log(step, saving, loss=loss, accuracy=100 * accuracy, lr=lr, **metrics)
        if saving:
            common.save(args.out / "last.pt", step + 1, args, samples=len(dataset), model=model,
                        optimizer=optimizer)
    metrics = metrics or evaluate_kinetics(args, device, model.eval(), val_clips)
    common.draw_curve(args, ["loss", "accuracy", "val_top1", "lr"])
    common.finish(args, {**metrics, "broken_training_samples": log.total("broken")})


def evaluate_kinetics(args, device, model, clips):
    """{"val_top1", "val_frames"} in percent, of three clips per video and of single frames."""
    def network(batch):
        clip, label = batch["clip"], batch["label"]           # (B, 3 clips, 3, T, S, S), (B,)
        z = model(normalize_clips(args, clip.flatten(0, 1)))
        z = z[:, int(args.task == "detect"):].unflatten(0, clip.shape[:2])    # (B, 3, K, T)
        correct = z.softmax(2).mean((1, 3)).argmax(1) == label      # never background
        frames = (z.argmax(2) == label[:, None, None]).float().mean((1, 2))
        return {"val_top1": 100 * correct.float(), "val_frames": 100 * frames}

    dataset = common.Samples(args, clips, make_kinetics_crops)
    found = common.predict(args, device, dataset, network, "validate", batch_size=4)
    return {name: float(x.mean()) for name, x in found.items()}


def warmup_and_steps(step, lr, milestones, warmup):
    """Linear warm-up, then lr x 0.1 from each milestone on. NOTE: the release has the full rate in
    the first two steps, and warms up all groups to the same rate: the backbone's 0.1 is lost.
    """
    return lr * 0.1 ** sum(step >= m for m in milestones) * min(1, (step + 1) / max(1, warmup))


def learning_rate(args, step, steps, val_losses=()):
    """Base learning rate of a step; multigrid and the groups have factors of their own. NOTE: after
    its warm-up SSDet's is constant: the release resumes at step 500,000, after all milestones.
    """
    milestones = [] if args.multigrid == "fair" else [m * steps for m in args.milestones]
    lr = warmup_and_steps(step, args.lr, milestones, args.warmup)
    if args.schedule == "cosine":
        lr *= 0.5 * (1 + math.cos(math.pi * step / steps))
    if args.schedule == "plateau":
        lr *= 0.1 ** plateau_drops(val_losses)
    return lr


def plateau_drops(val_losses, patience=10, threshold=1e-4):
    """How often torch's ReduceLROnPlateau (with its defaults) would have lowered the rate."""
    best, num_bad, drops = math.inf, 0, 0
    for loss in val_losses:
        best, num_bad = (loss, 0) if loss < best * (1 - threshold) else (best, num_bad + 1)
        if num_bad > patience:
            num_bad, drops = 0, drops + 1
    return drops


def make_optimizer(args, model):
    """SGD on two groups: new layers, which are rw and mix at 10 lr for --stream coarse, and fc1 and
    fc2 at lr for others; the rest at lr x `backbone_lr`. NOTE: weight decay acts on all parameters.
    """
    new, scale = (("rw", "mix"), 10.0) if args.stream == "coarse" else (("fc1.", "fc2."), 1.0)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [([p for name, p in named if not name.startswith(new)], args.backbone_lr),
              ([p for name, p in named if name.startswith(new)], scale)]
    return torch.optim.SGD([{"params": ps, "scale": factor} for ps, factor in groups if ps],
                           lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)


# ---- 3. Coarse-Fine: networks (official file: x3d_coarse.py) -------------------------------------

class GridPool(nn.Module):
    """Grid Pool (5): keep a quarter of the time steps, more where the confidence p is high.

    (B, C, T, H, W) -> (B, C, L, H, W), times c (B, L) in 0..1. NOTE: L = T/4 + 1; paper: T/4.
    """

    def __init__(self, channels, norm):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(channels, channels, 3, 2, 1), norm(channels)
        self.conv2, self.bn2 = nn.Conv3d(channels, channels, 3, 2, 1), norm(channels)
        self.conv3 = nn.Conv3d(channels, 1, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        common.init_kaiming(self)

    def forward(self, x):
        z = F.relu(self.bn1(self.conv1(x)))                   # (B, C, T/2, H/2, W/2)
        z = F.relu(self.bn2(self.conv2(z)))                   # (B, C, T/4, H/4, W/4)
        z = self.conv3(z).mean((1, 3, 4)).float()             # (B, T/4)
        p = torch.sigmoid(0.5 * z)                            # high p: small step, dense sampling
        q = (1 - p) / (1 - p).sum(1, keepdim=True)
        c = F.pad(q.cumsum(1).clamp(max=1), (1, 0))           # (B, L), L = T/4 + 1
        return sample(x, c * (x.shape[2] - 1)), c             # (5)


def grid_unpool(logits, c):
    """Grid Unpool (6), back to the times before Grid Pool: (B, K, L), (B, L) -> (B, K, 4 (L-1))"""
    return F.interpolate(to_uniform_times(logits, c), 4 * (logits.shape[2] - 1), mode="linear",
                         align_corners=True)


def to_uniform_times(x, c):
    """x at L uniform times instead of the learned times c.      (B, K, L), (B, L) -> (B, K, L)"""
    L = x.shape[2]
    u = torch.linspace(0, 1, L, device=c.device)[None]        # index at which c equals u_j:
    return sample(x, interpolate(c, u.expand_as(c), u) * (L - 1))         # (6)


def interpolate(x, y, query):
    """Piecewise-linear function through (x, y), x increasing; beyond the ends its end segments.
    (R, N), (R, N), (R or 1, Q) -> (R, Q)
    """
    query = query.expand(len(x), -1).contiguous()
    i = (torch.searchsorted(x.detach().contiguous(), query.detach()) - 1).clamp(0, x.shape[1] - 2)
    slope = (y[:, 1:] - y[:, :-1]) / (torch.finfo(x.dtype).eps + (x[:, 1:] - x[:, :-1]))
    return y.gather(1, i) + slope.gather(1, i) * (query - x.gather(1, i))


def sample(x, times):
    """x at fractional time steps, linear, zero outside. A matrix product: L is small, C·H·W large.
    (B, C, N, ...), (B, L) -> (B, C, L, ...)
    """
    step, lower = torch.arange(x.shape[2], device=x.device), times.detach().floor()[..., None]
    fraction = times[..., None] - lower                       # (B, L, 1)
    weight = torch.where(step == lower, 1 - fraction,
                         torch.where(step == lower + 1, fraction, 0.0))   # (B, L, N)
    with common.no_autocast(x):                               # bf16 would blur the times
        y = torch.einsum("bcnp,bln->bclp", x.to(weight.dtype).reshape(*x.shape[:3], -1), weight)
    return y.to(x.dtype).reshape(*y.shape[:3], *x.shape[3:])


def gaussian(start, num_valid, fine_steps, c=None, T=None, L=None, coarse_stride=4):
    """Weights G (7) of T' fine steps for L coarse times: (B, T', L).

    start: s, first coarse frame in fine steps (B,); num_valid: N (B,); fine_steps: T'. Without Grid
    Pool μ_i = s + coarse_stride·i: coarse steps are 4 fine steps apart. NOTE: s + i in the release.
    """
    start, num_valid = start.float()[:, None], num_valid.float()[:, None]
    mu = start + (coarse_stride * torch.arange(L, device=start.device) if c is None else c * T)
    tau = torch.arange(fine_steps, device=start.device)[None, :, None]
    e = -(tau - mu[:, None]) ** 2 / (2 * (num_valid[:, None] / 8) ** 2)   # (B, T', L)
    return (e - e.amax(1, keepdim=True)).exp()                # (7), without 0/0 for a far centre


class FusionFilter(nn.Module):
    """Filter (8) of one level of fine features; predicts a bias and a scale for the coarse ones.

    x: F, (B, C, T', h, w); G: (B, T', L); valid: v, (B, T'), 1 for fine steps, 0 for padding -> two
    of (B, C', L, h, w), or with spatial_mean (B, C', L, 1, 1). sigmoid_scale: if no Mixing follows.
    """

    def __init__(self, channels, out, spatial_mean=False, sigmoid_scale=False, dropout=0.5):
        super().__init__()
        self.spatial_mean, self.sigmoid_scale, self.dropout = spatial_mean, sigmoid_scale, dropout
        self.at1, self.at2 = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, 1, 1)
        self.fc1, self.fc2 = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, out, 1)
        self.fc3, self.fc4 = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, out, 1)

    def forward(self, x, G, valid):
        B, _, fine_steps, h, w = x.shape
        a = self.at2(F.relu(self.at1(x.flatten(2)))).sigmoid().view(B, 1, fine_steps, h * w)
        weight = (G * valid[..., None]).to(x.dtype)           # v_τ G_i(τ), (B, T', L)
        A = torch.einsum("bctn,btl->bcln", x.flatten(3) * a, weight)      # no tensor of T'·L·h·w
        A = A / (torch.einsum("bctn,btl->bcln", a, weight) + 1e-6)        # (B, C, L, h·w)      (8)
        if self.spatial_mean:
            A, h, w = A.mean(3, keepdim=True), 1, 1

        def head(first, second):
            y = F.relu(first(A.flatten(2)))
            y = F.dropout(y, self.dropout, self.training and self.spatial_mean)
            return second(y).unflatten(2, (-1, h, w))

        bias, scale = head(self.fc1, self.fc2), head(self.fc3, self.fc4)
        return bias, (scale.sigmoid() if self.sigmoid_scale else scale)


def resize_maps(x, size):
    """Adaptive max pooling, as released: (B, C, L, h, w) -> (B, C, L, size, size)"""
    planes = x.flatten(1, 2)                                  # (B, C·L, h, w); repeating is faster
    repeat = size % x.shape[-1] == 0 and x.shape[-1] == x.shape[-2]
    y = F.interpolate(planes, size) if repeat else F.adaptive_max_pool2d(planes, size)
    return y.unflatten(1, (-1, x.shape[2]))


class Mixing(nn.Module):
    """W_b and W_s of (9): lists of (B, C_l, L, h, w) -> two of (B, C, L, size, size).

    The convolutions are pointwise, so repeating values after them gives the same and needs 1/64 of
    the memory. If `size` is no multiple of h (never at 224 pixels), maps are resized first.
    """

    def __init__(self, channels, out):
        super().__init__()
        self.conv_at, self.conv_at2 = nn.Conv1d(channels, out, 1), nn.Conv1d(channels, out, 1)

    def forward(self, biases, scales, size):
        resize_last = size % biases[0].shape[-1] == 0

        def mix(maps, conv):
            x = torch.cat(maps if resize_last else [resize_maps(m, size) for m in maps], 1)
            return resize_maps(conv(x.flatten(2)).unflatten(2, x.shape[2:]), size)

        return mix(biases, self.conv_at), mix(scales, self.conv_at2).sigmoid()


class Coarse(common.X3D):
    """Coarse stream: X3D with temporal pooling by 4 after stage 1 and fusion of fine features."""

    def __init__(self, version="M", classes=157, pool="grid", fusion="mixed",
                 norm=common.SplitBatchNorm, dropout=0.5, coarse_stride=4):
        super().__init__(version, classes, True, norm, dropout)
        self.pool, self.fusion, self.coarse_stride = pool, fusion, coarse_stride
        self.grid_times = None                                # of the last forward pass
        *widths, last = self.widths
        if pool == "grid":
            self.pool_1 = GridPool(widths[0], norm)
        for n, width in enumerate(widths if fusion != "none" else [], 2):
            setattr(self, f"rw{n}", FusionFilter(width, width, sigmoid_scale=fusion == "own"))
            if fusion == "mixed":
                setattr(self, f"mix{n}", Mixing(sum(widths), width))
        if fusion != "none":
            self.rw6 = FusionFilter(last, classes, spatial_mean=True, sigmoid_scale=True,
                                    dropout=dropout)

    def forward(self, x, features=None, valid=None, start=None):
        """(B, 3, T, H, W) -> logits (B, K, 4 (L-1)) with Grid Pool, else (B, K, L).

        features: {level: (B, C, T', 7, 7)}; valid: (B, T'), 1 for fine steps and 0 for padding;
        start: (B,), offset of the clip from the first fine step.
        """
        x = self.layer1(self.stem(x))
        T = x.shape[2]
        x, c = self.pool_time(x)
        self.grid_times, G, filtered = c, None, None
        if self.fusion != "none":
            G = gaussian(start, valid.sum(1), valid.shape[1], c, T, x.shape[2], self.coarse_stride)
            filtered = [getattr(self, f"rw{n}")(features[level].to(x.dtype), G, valid)
                        for n, level in enumerate(LEVELS[:4], 2)]         # [(bias, scale)]
        x = self.fuse(2, x, filtered)
        for n, layer in enumerate((self.layer2, self.layer3, self.layer4), 3):
            x = self.fuse(n, layer(x), filtered)
        z = self.head(self.last(x))                           # (B, K, L)
        if self.fusion != "none":
            bias, scale = self.rw6(features["conv5"].to(x.dtype), G, valid)
            z = z * scale.float().flatten(2) + bias.float().flatten(2)    # fusion of logits
        return z if c is None else grid_unpool(z, c)

    def pool_time(self, x):
        """(B, C, T, H, W) -> (B, C, L, H, W), and the times of Grid Pool or None."""
        if self.pool == "grid":
            return self.pool_1(x)
        if self.pool == "stride":
            return x[:, :, ::4], None
        pool = F.avg_pool3d if self.pool == "avg" else F.max_pool3d
        return pool(x, (4, 1, 1), ceil_mode=x.shape[2] < 4), None

    def fuse(self, n, x, filtered):
        """Multi-stage Fusion (9) with the layers of number n."""
        if self.fusion == "none":
            return x
        if self.fusion == "mixed":
            biases, scales = zip(*filtered)
            bias, scale = getattr(self, f"mix{n}")(biases, scales, x.shape[-1])
        else:
            bias, scale = (resize_maps(m, x.shape[-1]) for m in filtered[n - 2])
        return x * scale + bias                               # (9)


def fine_features(fine, x):
    """Five feature maps of the fine stream, pooled to 7x7: {level: (B, C, T', 7, 7)}"""
    return {level: F.adaptive_avg_pool3d(m, (m.shape[2], GRID, GRID))
            for level, m in fine.maps(x).items()}


class TwoStream(nn.Module):
    """Both streams, trained together (in the official code: branch weak)."""

    def __init__(self, coarse, fine):
        super().__init__()
        self.coarse, self.fine = coarse, fine
        for p in (*fine.fc1.parameters(), *fine.fc2.parameters()):
            p.requires_grad_(False)       # NOTE: not used; the distributed script trains it, too

    def forward(self, x, fine_x, valid, start):
        return self.coarse(x, fine_features(self.fine, fine_x), valid, start)


# ---- 4. Coarse-Fine: training (official files: train_fine.py, train_coarse_fineFEAT.py) ----------

def resize_logits(logits, length, align_corners):
    """(B, K, N) -> (B, K, length). NOTE: only the fine stream aligns corners, as released."""
    return F.interpolate(logits, length, mode="linear", align_corners=align_corners)


def detection_loss(logits, label, mask):
    """(loss (10), cls, loc) of a process.    logits, label: (B, K, N); mask: (B, N), 0 for padding

    NOTE: SSDet's repository has no mask: padded frames count as negative there.
    """
    bce, valid = F.binary_cross_entropy_with_logits, mask[:, None]
    cls = bce(logits.masked_fill(valid == 0, -math.inf).amax(2), label.amax(2))
    loc = (bce(logits, label, reduction="none") * valid).sum() / (mask.sum() * label.shape[1])
    return (cls + loc) / 2, cls, loc                          # (10)


def finetune(args, device):
    """Train the detector of --stream on untrimmed videos; reports its last epoch, not best.pt."""
    names = read_class_names(args)
    videos, tests = (read_videos(args, split, names) for split in ("train", "test"))
    check_features(args)
    dataset = common.Samples(args, videos, functools.partial(make_clip, classes=len(names)))
    torch.manual_seed(args.seed)                              # the same weights on every process
    model = make_model(args, len(names)).to(device)
    load_init(args, model)
    if args.compile:
        model.compile()
    ddp = DDP(model)                                          # batch norm sees a process's clips
    optimizer = make_optimizer(args, model)
    saved = common.resume(args.out / "last.pt", args, len(dataset), free=("features",), model=model,
                          optimizer=optimizer)
    start, best = saved["step"], saved.get("best", -math.inf)
    val_losses = saved.get("val_losses", [])                  # for --schedule plateau

    per_epoch = len(dataset) // args.batch_size
    steps = args.iters or args.epochs * per_epoch
    log, metrics = common.Log(args, start, steps), {}
    ddp.train()
    for step, batch in log.steps(common.batches(args, dataset, device, start, steps, collate)):
        lr = learning_rate(args, step, steps, val_losses)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        common.seed_step(args.seed, step)                     # dropout repeats after a restart
        batch = common.to_device(batch, device)
        label = batch["label"].float()                        # (B, K, N)
        with common.autocast(device, args.precision):
            z = ddp(*model_inputs(args, batch))               # (B, K, T)
        z = resize_logits(z.float(), label.shape[2], args.stream == "fine")
        loss, cls, loc = detection_loss(z, label, batch["label_mask"])    # (10)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        ended = step + 1 == steps or (step + 1) % (args.val_every * per_epoch) == 0
        saving = ended or (step + 1) % args.save_every == 0
        if saving or log.due(step):
            common.check_finite(step, model, loss)            # NaN stops the run before the update
        optimizer.step()

        metrics = {}
        if saving:
            common.merge_splits(model)                        # statistics for evaluation
        if ended:
            metrics = validate(args, device, model.eval(), tests, names)
            val_losses.append(metrics["val_loss"])
            if not metrics["val_mAP"] <= best:
                best = metrics["val_mAP"]
                common.save(args.out / "best.pt", step + 1, args, model=model)
            ddp.train()
        log(step, saving, loss=loss, cls=cls, loc=loc, lr=lr, **metrics)
        if saving:
            common.save(args.out / "last.pt", step + 1, args, samples=len(dataset), model=model,
                        optimizer=optimizer, best=best, val_losses=val_losses)
    metrics = metrics or validate(args, device, model.eval(), tests, names)
    common.draw_curve(args, ["loss", "val_loss", "val_mAP", "lr"])
    common.finish(args, {**metrics, "best_val_mAP": best,
                         "broken_training_samples": log.total("broken")})


def validate(args, device, model, videos, names):
    """Metrics of the test split, which chooses best.pt, as in the papers' code."""
    metrics, *_ = evaluate_detector(args, device, [model], videos, names, "validate")
    return {f"val_{name}": x for name, x in metrics.items()}


def model_inputs(args, batch):
    """Arguments of the forward pass: clips, and what the batch holds of the fine stream."""
    inputs = [normalize_clips(args, batch["clip"], batch["clip_mask"])]
    if "fine" in batch:
        valid = batch["fine_mask"]
        inputs += [normalize_clips(args, batch["fine"], valid), valid, batch["start"]]
    elif "conv5" in batch:
        features = {level: batch[level] for level in LEVELS}
        inputs += [features, batch["conv5_mask"], batch["start"]]
    return inputs


# ---- 5. evaluation (apmeter.py, Charades_v1_localize.m, eval_coarse_fineFEAT_ensemble.py) --------

def average_precision(scores, targets, weights=None):
    """AP of one class: the mean of the precision at the rank of each positive. Ties keep order.
    weights, of frames, change the precision but not the final mean, as in the official APMeter.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    y = targets[order].double()
    w = torch.ones_like(y) if weights is None else weights[order].double()
    precision = (w * y).cumsum(0) / w.cumsum(0)
    return float((precision * y).sum() / y.sum().clamp(min=1))


def localization_times(seconds, count=25):
    """The 25 times at which Charades is evaluated; the end of the video is not included."""
    return np.arange(count) / count * seconds


def localization_labels(actions, seconds, classes=157, count=25):
    """(count, classes) of 0 and 1: is start <= t_j <= end, both included?"""
    labels, t = np.zeros((count, classes), np.uint8), localization_times(seconds, count)
    for c, start, end in actions:
        labels[(t >= start) & (t <= end), c] = 1
    return labels


def charades_localize(labels, scores):
    """(AP by class, mean, mean weighted by positives) of lists of (25, K); ties keep their order.
    NOTE: classes without positives are NaN and left out; in Charades_v1_localize.m they are not.
    """
    labels, scores = (torch.from_numpy(np.concatenate(x)) for x in (labels, scores))
    positives = labels.sum(0, dtype=torch.float64).numpy()
    ap = np.array([average_precision(s, y) if n else math.nan
                   for s, y, n in zip(scores.T, labels.T, positives)])
    weighted = np.nansum(ap * positives) / max(1, positives.sum())
    return ap, (float(np.nanmean(ap)) if positives.any() else math.nan), float(weighted)


def charades_frames(length, seconds, fps, as_released=False):
    """Label frames nearest to the 25 times. NOTE: the release's, 1 + i·⌊length/25⌋, drift."""
    if as_released:
        return np.minimum(1 + np.arange(25) * (length // 25), length - 1)
    return np.round(localization_times(seconds) * fps).astype(int).clip(0, length - 1)


def chunks(T, limit=1000):
    """[(first, end)] of `limit` steps each; up to limit + 4 steps are one, as released. NOTE: at
    multiples of `limit` the release has an empty last chunk and stops.
    """
    return [(0, T)] if T < limit + 5 else [(a, min(a + limit, T)) for a in range(0, T, limit)]


def detect(args, device, models, videos, names, what):
    """{name: one entry per video}: logits (K, T), the mean of an ensemble; loss; grid_times, in
    sampled frames; numbers of video_frames and label_frames; seconds.
    """
    def network(batch):
        T, logits, times = batch["clip"].shape[2], [], []
        for a, b in chunks(T):
            inputs = model_inputs(args, {**batch, "clip": batch["clip"][:, :, a:b],
                                         "clip_mask": batch["clip_mask"][:, a:b],
                                         "start": batch["start"] + a})
            z = torch.stack([model(*inputs) for model in models]).mean(0)
            logits.append(z if b - a == T else resize_logits(z, b - a, False))
            coarse = getattr(models[0], "coarse", models[0])
            if getattr(coarse, "grid_times", None) is not None:
                times.append(a + coarse.grid_times * (b - a - 1))
        z, label = torch.cat(logits, 2), batch["label"].float()
        frames = resize_logits(z, label.shape[2], args.stream == "fine")
        return {"logits": z, "loss": detection_loss(frames, label, batch["label_mask"])[0][None],
                "grid_times": torch.cat(times, 1) if times else z[:, 0, :0],
                **{k: batch[k] for k in ("video_frames", "label_frames", "seconds")}}

    make = functools.partial(make_clip, classes=len(names), whole=True)
    return common.predict(args, device, common.Samples(args, videos, make), network, what,
                          batch_size=1, collate=collate)


def evaluate_detector(args, device, models, videos, names, what):
    """(metrics in percent and loss, AP by class, [(K, frames) logits], [(25, K) scores], `detect`).

    mAP: over every frame (NOTE: which ones of MultiTHUMOS the papers use is unverified); classes
    without positives count as 0, as in apmeter.py. mAP_25, wAP_25: Charades' official protocol.
    """
    found, classes = detect(args, device, models, videos, names, what), len(names)
    logits, labels, scores_25, labels_25 = [], [], [], []
    for k, video in enumerate(videos):
        total, end = int(found["video_frames"][k]), int(found["label_frames"][k])
        seconds = video.seconds or float(found["seconds"][k])
        z = resize_logits(found["logits"][k][None], end, args.stream == "fine")[0]
        y = frame_labels(video.actions, total, seconds, classes)[:, :end]
        frames_25 = charades_frames(end, seconds, total / seconds, args.as_released)
        logits.append(z)
        labels.append(torch.from_numpy(y).bool())
        scores_25.append(z[:, frames_25].T.sigmoid().numpy())
        labels_25.append(localization_labels(video.actions, seconds, classes))
    z, y = torch.cat(logits, 1), torch.cat(labels, 1)
    mine = range(classes)[common.rank()::common.world_size()]
    ap = common.gather({c: 100 * average_precision(z[c], y[c]) for c in mine}, expect=classes)
    metrics = {"mAP": float(np.mean([*ap.values()])), "loss": float(found["loss"].mean())}
    if args.dataset == "charades":
        _, mean, weighted = charades_localize(labels_25, scores_25)
        metrics |= {"mAP_25": 100 * mean, "wAP_25": 100 * weighted}
    return metrics, ap, logits, scores_25, found


def evaluate(args, device):
    """Evaluate a checkpoint, an ensemble (mean logits), or a submission file."""
    names = read_class_names(args)
    videos = read_videos(args, "test", names, need_files=not args.submission)
    if args.submission:
        scores = read_submission(args.submission, videos, len(names))
        labels = [localization_labels(v.actions, v.seconds, len(names)) for v in videos]
        _, mean, weighted = charades_localize(labels, scores)
        return common.finish(args, {"mAP_25": 100 * mean, "wAP_25": 100 * weighted})
    runs, models = [with_flags_of(args, Path(path)) for path in args.init], []
    for path, run in zip(args.init, runs):
        if any(getattr(run, name) != getattr(runs[0], name) for name in NETWORK_FLAGS):
            raise UserError(f"{path}: has other flags than {args.init[0]}; they are no ensemble")
        models.append(make_model(run, len(names)).to(device).eval())
        load_network(models[-1], Path(path), strict=True)
    args = runs[0]
    check_features(args)
    metrics, ap, logits, scores, found = evaluate_detector(args, device, models, videos, names,
                                                           "evaluate")
    if common.rank() == 0:
        draw_timeline(args, videos, logits, found, names)
        if args.dataset == "charades":                        # official form: id, frame, scores
            common.write(args.out / "localization.txt", "".join(
                f"{video.name} {j} " + " ".join(f"{p:.9g}" for p in row) + "\n"
                for video, rows in zip(videos, scores) for j, row in enumerate(rows, 1)))
    common.finish(args, {**metrics, "test_videos": len(videos), "networks": len(models),
                         "AP": {name: ap[c] for c, name in enumerate(names)}})


def read_submission(path, videos, classes):
    """[(25, K)] scores of a file in the official form. Missing rows are -inf, the last row of a
    frame wins, frame numbers start at 0 or 1.
    """
    def row(line):
        name, frame, *values = line.split()
        return name, int(frame), np.array(values, float).reshape(classes)

    rows = common.read_lines(path, row)
    first = 0 if any(frame == 0 for _, frame, _ in rows) else 1
    scores = {video.name: np.full((25, classes), -math.inf) for video in videos}
    for name, frame, values in rows:
        if name in scores and 0 <= frame - first < 25:
            scores[name][frame - first] = values
    missing = sum(int(np.isinf(x).all(1).sum()) for x in scores.values())
    common.say(f"{path}: {missing} of {25 * len(videos)} frames are missing and are ranked last")
    return [*scores.values()]


def draw_timeline(args, videos, logits, found, names, most=6):
    """timeline.png: annotated classes of the video with most actions, and Grid Pool's times."""
    k = max(range(len(videos)), key=lambda k: len(videos[k].actions))
    total, seconds = int(found["video_frames"][k]), float(found["seconds"][k])
    labels = frame_labels(videos[k].actions, total, seconds, len(names))
    probability, shown = logits[k].sigmoid().numpy(), sorted({c for c, *_ in videos[k].actions})
    x = np.arange(probability.shape[1]) * seconds / total
    marks = found["grid_times"][k].numpy() * args.stride * seconds / total
    image = Image.new("RGB", (900, 30 + 150 * max(1, len(shown[:most]))), "white")
    draw = ImageDraw.Draw(image)
    draw.text((60, 8), f"{videos[k].name}, seconds", "black")
    for n, c in enumerate(shown[:most]):
        common.plot(draw, (60, 50 + 150 * n, 880, 140 + 150 * n), x, {
            "annotated": labels[c, :len(x)], names[c]: probability[c]}, marks, (0, 1))
    common.write(args.out / "timeline.png", lambda f: image.save(f, "PNG"))


# ---- 6. features of the fine stream (official file: extract_fineFEAT.py) -------------------------

def extract(args, device):
    """Store five maps of every video as DIR/LEVEL/NAME, (1, C, T, 7, 7) in float16. Existing files
    are skipped. NOTE: the release extracts only the test split, in float32.
    """
    path, names = Path(args.init[0]), read_class_names(args)
    args = with_flags_of(args, path)
    if args.stream not in ("fine", "x3d"):
        raise UserError(f"{path}: is no fine stream; train one with --stage finetune --stream fine")
    args.stream = "fine"
    model = make_model(args, len(names)).to(device).eval()
    load_network(model, path, strict=True)
    weights = sum(p.detach().double().abs().sum().item() for p in model.parameters())
    common.claim(args.features, {"stride": args.stride, "version": args.version, "crop": args.crop,
                                 "sum_of_weights": f"{weights:.8g}"})
    videos = [v for split in ("train", "test") for v in read_videos(args, split, names)]
    todo = [v for v in videos if not all(
        (args.features / level / v.name).is_file() for level in LEVELS)]
    common.barrier()                                          # before the first of them is written

    mine = todo[common.rank()::common.world_size()]
    make = functools.partial(make_clip, classes=len(names), whole=True)
    dataset = common.Samples(args, mine, make)
    for video, item in zip(mine, common.read_items(args, dataset, "extract")):
        with torch.inference_mode(), common.autocast(device, args.precision):
            clip = item["clip"][None].to(device)
            maps = [fine_features(model, normalize_clips(args, clip[:, :, a:b]))
                    for a, b in chunks(clip.shape[2])]
        for level in LEVELS:
            x = torch.cat([m[level] for m in maps], 2).half().cpu()
            if not x.isfinite().all():
                raise UserError(f"{video.path}: its features are not finite; nothing was written")
            common.write(args.features / level / video.name, functools.partial(torch.save, x))
    common.barrier()
    common.finish(args, {"videos": len(videos), "new": len(todo)})


def read_features(args, name):
    """{level: (C, T', 7, 7)} of a video: its first `feature_cap` steps."""
    maps = {}
    for level in LEVELS:
        with common.reading(args.features / level / name):
            x, = common.load_checkpoint(args.features / level / name)     # ValueError if not one
            maps[level] = x[:, :args.feature_cap, :, :].float()           # IndexError if not 4-D
    return maps


def check_features(args):
    """UserError if features are of another network. Their crop may differ: maps are pooled."""
    path, fused = args.features / "about.json", args.stream == "coarse" and args.fusion != "none"
    saved = common.read_json(path) if fused and path.exists() else {}
    for flag in ("stride", "version"):
        if saved.get(flag, getattr(args, flag)) != getattr(args, flag):
            raise UserError(f"{path}: these features are of --{flag} {saved[flag]}")


# ---- 7. multigrid (arXiv 1912.00998; cycle_batch_sampler.py, SlowFast's utils/multigrid.py) ------

class StepShape(NamedTuple):
    """Batch shape of one training step."""
    batch: int                                                # clips of all processes
    frames: int
    crop: int
    lr: float                                                 # factor of the learning rate
    splits: int                                               # parts in batch norm, per process


def step_shapes(args, n):
    """[StepShape] of all training steps on n samples: the whole plan of --multigrid."""
    base = StepShape(args.batch_size, args.num_frames, args.crop, 1.0, args.bn_splits)
    steps = args.iters or args.epochs * (n // args.batch_size)
    if args.multigrid == "off":
        return [base] * steps
    if args.multigrid == "fair":
        return fair_shapes(args, base, n, max(1, round(steps * args.batch_size / n)))
    bounds, plan = [round(steps * share) for share in (0, 0.4, 0.65, 0.85, 1)], []
    for step in range(steps):
        state = long_state(step, bounds)
        span, crop, factor = clip_shape(state, short_state(step, state),
                                        args.num_frames * args.stride, args.crop)
        scale = LONG_BATCH[state]
        plan.append(StepShape(base.batch * scale * factor, max(1, span // args.stride), crop,
                              scale, base.splits * scale))
    return plan


LONG_BATCH = (8, 4, 2, 1)            # batch size factor in the states 0..3 of a long cycle
LONG_FRAMES = (0.25, 0.5, 0.5, 1)    # factor of the frames that a clip spans


def long_state(step, bounds):
    """State 0..3 of the long cycle at a step: four equal parts between two bounds; -1 (full shape)
    after the last but one. NOTE: in the release a cycle ends one step later.
    """
    for a, b in itertools.pairwise(bounds[:-1]):
        if a <= step < b:
            return min(3, int(4 * (step - a) / (b - a)))
    return -1


def short_state(step, state):
    """Index in the short cycle: of length 2 in the long states 0 and 1, of length 3 in others."""
    return step % (2 if state in (0, 1) else 3)


def clip_shape(state, short, span, crop):
    """(frames spanned, crop, batch factor) in a long and a short state. In a short cycle the crop
    grows by √2 and the batch is halved from step to step.
    """
    half = int(crop / 2 ** 0.5)
    crops = (int(half / 2 ** 0.5), half) if state in (0, 1) else (crop // 2, half, crop)
    return int(span * LONG_FRAMES[state]), crops[short], 2 ** (len(crops) - 1 - short)


def fair_shapes(args, base, n, epochs):
    """[StepShape] of SlowFast's schedule, short cycles of three steps included."""
    drops = sorted({round(m * epochs) for m in args.milestones} - {0, epochs})
    schedule, plan = fair_schedule([0, *drops], epochs, base.frames, base.crop), []
    changes, rates = fair_rates(schedule)
    for epoch in range(schedule[-1][-1]):
        _, scale, frames, crop, _ = next(row for row in schedule if epoch < row[-1])
        lr = rates[int(np.searchsorted(changes, epoch, "right")) - 1]
        crops = int(base.crop * 0.5), int(base.crop * 0.5 ** 0.5), crop
        batches = [base.batch * scale * round((crop / side) ** 2) for side in crops]
        for k in range(max(1, round(3 * n / sum(batches)))):
            plan.append(StepShape(batches[k % 3], frames, crops[k % 3], lr, base.splits * scale))
    return plan


def fair_schedule(steps, epochs, frames, crop, short_cycle=True, epoch_factor=1.5):
    """Rows (drops of lr so far, batch factor, frames, crop, end epoch), epoch_factor·epochs in all.

    steps: epochs at which lr drops, starting with 0. Between two drops the clips go through four
    shapes, each for epochs in proportion to its average batch; after the last they are full.
    [0, 4, 8] of 10 epochs, 8 frames, 224 pixels: (0, 8, 2, 158, 3), ... (2, 1, 8, 224, 15).
    """
    shapes, average = [], []
    for t, s in ((0.25, 0.5 ** 0.5), (0.5, 0.5 ** 0.5), (0.5, 1), (1, 1)):    # the long cycle
        T, S = round(frames * t), round(crop * s)
        sides = [*[crop * 0.5, crop * 0.5 ** 0.5] * short_cycle, S]
        batches = [round(frames * crop ** 2 / (T * side * side)) for side in sides]
        shapes.append((batches[-1], T, S))
        average.append(sum(batches) / len(batches))
    plan = [(drops, *shape, (b - a) * mean / sum(average))
            for drops, (a, b) in enumerate(itertools.pairwise(steps))
            for shape, mean in zip(shapes, average)]
    # The same order of operations as the original, so that rounding agrees.
    iterations = sum((b - a) / sum(average) for a, b in itertools.pairwise(steps) for _ in shapes)
    speedup = steps[-1] / iterations if iterations else 1
    plan.append((len(steps) - 1, *shapes[-1], (epochs - steps[-1]) / speedup * average[-1]))
    stretch = epochs * epoch_factor / sum(row[-1] for row in plan)
    ends = np.cumsum([row[-1] * stretch for row in plan])
    return [(*row[:-1], round(end)) for row, end in zip(plan, ends)]


def fair_rates(schedule, gamma=0.1):
    """(epochs at which the rate changes, its factors) of a `fair_schedule`. The last phase
    keeps the rate of the phase before it for its first half.
    """
    changes = [0, *(end for *_, end in schedule)]
    changes[-1] = (changes[-2] + changes[-1]) // 2
    rates = [gamma ** drops * batch for drops, batch, *_ in schedule]
    before = rates[:-1] or rates                              # a single phase has no drop before it
    return changes, before + rates[-2:]


# ---- 8. clips (charades_fine.py, charades.py, temporal_transforms.py, spatial_transforms.py) -----

FRAMES = {"kinetics400": "frame_{:05d}.jpg", "charades": "{id}-{:06d}.jpg",
          "multithumos": "{id}-{:06d}.jpg"}                   # names in folders of frames, from 1
# Random crop sizes as a fraction of the short side. Kinetics and --stream x3d use only the first.
SCALES = {160: (160 / 180, 160 / 225), 224: (224 / 256, 224 / 320), 312: (312 / 360, 312 / 450)}
# Mean and standard deviation of colours. NOTE: FAIR's weights were trained with 0.45 and 0.225; the
# release ignores it. For MultiTHUMOS we take those of Charades.
KINETICS_NORM = ((110.63666788 / 255, 103.16065604 / 255, 96.29023126 / 255),
                 (38.7568578 / 255, 37.88248729 / 255, 40.02898126 / 255))
CHARADES_NORM = ((0.413, 0.368, 0.338), (0.131, 0.125, 0.132))


class Film:
    """A video file or a folder of frames, read by frame numbers. fps: the rate at which numbers
    count in a file, whatever its own rate is; None: its own.
    """

    def __init__(self, path, pattern, fps=None):
        self.path, self.fps, self.pattern = path, fps, pattern.replace("{id}", path.name)
        if path.is_dir():
            self.length = common.count_frames(path, self.pattern)
        else:
            media = common.probe(path)
            self.fps = fps or media.fps
            self.length = max(1, round(media.seconds * self.fps))

    def read(self, numbers, short_side=None):
        """(T, H, W, 3) uint8; of a file what is on show half a frame later, as ffmpeg extracts."""
        if self.path.is_dir():
            return common.read_frames(self.path, numbers, self.pattern, short_side)
        numbers, inverse = np.unique(numbers, return_inverse=True)
        return common.read_clip(self.path, [(numbers + 0.5) / self.fps], short_side)[0][inverse]


def crop_box(width, height, scale, u, v):
    """(left, top, side) of the square at u, v in [0, 1) with `scale` of the short side."""
    side = max(1, int(min(width, height) * scale))
    return int(u * (width - side)), int(v * (height - side)), side


def center_box(width, height):
    """(left, top, side) of the largest square in the centre."""
    side = min(width, height)
    return round((width - side) / 2), round((height - side) / 2), side


def cut(x, box, size, flip=False):
    """Crop and resize, bilinear with antialiasing.      uint8 (T, H, W, 3) -> (3, T, size, size)"""
    left, top, side = box
    x = torch.from_numpy(x[:, top:top + side, left:left + side].copy()).permute(0, 3, 1, 2)
    if side != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return (x.flip(3) if flip else x).transpose(0, 1).contiguous()


def read_square(film, numbers, crop, scale=None, u=0.5, v=0.5, flip=False):
    """(3, T, crop, crop) uint8: the square of `scale` at u, v; without scale the centre square."""
    x = film.read(numbers, math.ceil(crop / (scale or 1)))    # larger frames are read smaller
    height, width = x.shape[1:3]
    box = crop_box(width, height, scale, u, v) if scale else center_box(width, height)
    return cut(x, box, crop, flip)


def draw_crop(args, rng):
    """(scale, u, v, flip) of a training clip, the same for all of its frames."""
    scales = SCALES.get(args.crop, SCALES[224])
    if args.dataset == "kinetics400" or args.stream == "x3d":
        scales = scales[:1]
    return scales[rng.integers(len(scales))], *rng.random(2), rng.random() < 0.5


def normalize_clips(args, x, mask=None):
    """uint8 (B, 3, T, S, S) to float, 0 where mask (B, T), 1 for frames, is 0 for padding."""
    x = common.normalize(x, *(KINETICS_NORM if args.dataset == "kinetics400" else CHARADES_NORM))
    return x if mask is None else x * mask[:, None, :, None, None]


def kinetics_frames(length, start, span, stride, speed=1, kept_span=None):
    """Frames of a training clip: every (speed·stride)-th of [start, start + span), the first
    kept_span // stride of them, from the start again if there are fewer.
    """
    numbers = np.arange(start, min(start + span, length), speed * stride)
    return np.resize(numbers, (kept_span or span) // stride)


def kinetics_crops(length, span, stride, crops=3):
    """Frames of the clips for validation, evenly spaced: (crops, span // stride)"""
    numbers, T = np.arange(0, length, stride), span // stride
    step = max(0, int((len(numbers) - 1 - T) // 2))
    return np.stack([np.resize(numbers[c * step:c * step + T], T) for c in range(crops)])


def clip_frames(length, start, span, stride):
    """Frames of a clip of `span` frames from `start`; those past the end are left out."""
    return np.arange(start, min(start + span, length), stride)


def max_start(length, span, stride):
    """Largest start of a clip. NOTE: as released, up to stride - 1 also if the video is shorter."""
    return min(max(stride, length - min(length, span)), length) - 1


def video_frames(length, stride, whole=False):
    """(frames of a whole video, number of labels that they cover). Without `whole`, an incomplete
    last stride is dropped, as in Coarse-Fine's scripts.
    """
    end = length if whole else min(length, max(1, length // stride) * stride)
    return np.arange(0, end, stride), end


def fine_frames(length, start, span, stride, fine_start=None):
    """(frames of the fine clip of --stream two, offset of the coarse clip from it in steps)"""
    if fine_start is None:                                    # at test, in the middle of the video
        fine_start, span = max(0, (length - min(length, 2 * span)) // 2 - 1), 2 * span
    return clip_frames(length, fine_start, span, stride), (start - fine_start) // stride


def frame_labels(actions, length, seconds, classes):
    """(classes, length): is class c active at frame f, start < f · seconds / length < end?"""
    labels, times = np.zeros((classes, length), np.float32), np.arange(length) / (length / seconds)
    for c, start, end in actions:
        labels[c, (times > start) & (times < end)] = 1
    return labels


def make_kinetics_clip(args, clips, i, rng, frames, crop):
    """A random clip, of a step's shape. NOTE: the release leaves out videos of up to 81 frames."""
    path, label = clips[i]
    film, span = Film(path, FRAMES["kinetics400"]), args.num_frames * args.stride
    start = rng.integers(0, max_start(film.length, span, 1) + 1)
    speed = rng.integers(1, args.num_frames // frames + 1)
    numbers = kinetics_frames(film.length, start, span, args.stride, speed, frames * args.stride)
    return {"clip": read_square(film, numbers, crop, *draw_crop(args, rng)), "label": label}


def make_kinetics_crops(args, clips, i, rng):
    """Validation sample: (3 clips, 3, T, S, S). NOTE: the release augments them, too."""
    path, label = clips[i]
    film = Film(path, FRAMES["kinetics400"])
    numbers = kinetics_crops(film.length, args.num_frames * args.stride, args.stride)
    x = read_square(film, numbers.flatten(), args.crop)
    return {"clip": x.unflatten(1, numbers.shape).transpose(0, 1), "label": label}


def make_clip(args, videos, i, rng, classes, whole=False):
    """Sample of an untrimmed video: a random clip for training, at test the whole video."""
    video, span, stride = videos[i], args.num_frames * args.stride, args.stride
    film = Film(video.path, FRAMES[args.dataset], 24.0 if args.dataset == "charades" else None)
    if not (video.seconds or film.fps):
        raise UserError(f"{video.path}: frames without a rate; multithumos.json has the duration")
    seconds = video.seconds or film.length / film.fps
    if whole:
        start, fine_start = 0, None
        numbers, end = video_frames(film.length, stride, args.stream in ("x3d", "two"))
        crop = ()                                             # the centre square
    else:
        size = (span + 1, 1) if args.stream == "x3d" else (span, stride)      # as their releases
        start = int(rng.integers(0, max_start(film.length, *size) + 1))
        fine_start = int(rng.integers(0, start + 1))
        numbers, end = clip_frames(film.length, start, span, stride), start + span
        crop = draw_crop(args, rng)                           # the same for both streams
    label = torch.from_numpy(frame_labels(video.actions, film.length, seconds, classes))
    label = label[:, start:end].to(torch.uint8)               # (K, N)
    sample = {"clip": read_square(film, numbers, args.crop, *crop), "start": start // stride,
              "label": label, "video_frames": film.length, "label_frames": label.shape[1],
              "seconds": seconds}
    if args.stream == "two":
        fine, sample["start"] = fine_frames(film.length, start, span, stride, fine_start)
        sample["fine"] = read_square(film, fine, args.crop, *crop)
    if args.stream == "coarse" and args.fusion != "none":
        sample |= read_features(args, video.name)
    return sample


def collate(samples):
    """A batch of untrimmed videos. Tensors are padded with zeros along time, their axis 1;
    NAME_mask, (B, length), is 1 on the steps of NAME and 0 on padding.
    """
    batch = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if torch.is_tensor(values[0]):
            lengths = torch.tensor([x.shape[1] for x in values])
            longest = int(lengths.max())
            batch[f"{key}_mask"] = (torch.arange(longest) < lengths[:, None]).float()
            batch[key] = torch.stack([
                F.pad(x, [0, 0] * (x.dim() - 2) + [0, longest - x.shape[1]]) for x in values])
        else:
            batch[key] = values if key == "broken" else torch.tensor(values)
    return batch


# ---- 9. annotations ------------------------------------------------------------------------------

CLASSES = {"charades": 157, "multithumos": 65}                # if there is no list of classes


class Video(NamedTuple):
    """An untrimmed video."""
    name: str
    path: Path | None                                         # file or folder of frames
    seconds: float                                            # by the annotation; 0: unknown
    actions: list                                             # [(class, start, end)], in seconds


def read_class_names(args):
    """Class names, from Charades_v1_classes.txt ("c000 NAME") or class_list.txt ("1 NAME")."""
    name = "Charades_v1_classes.txt" if args.dataset == "charades" else "class_list.txt"
    path = common.find(args.data, name, required=False)
    names = common.read_lines(path, lambda line: line.split(maxsplit=1)[1]) if path else []
    return names or [str(c) for c in range(CLASSES[args.dataset])]


def read_actions(args, split, names):
    """(file, [(video, seconds, [(class, start, end)])]) of a split: from Charades' CSV, the JSON of
    the official repositories, or MultiTHUMOS' files of classes.
    """
    subset = "training" if split == "train" else "testing"
    first = int(args.dataset == "multithumos")                # its JSON numbers classes from 1

    def from_table(row):                                      # "c059 11.90 21.20;c008 0.00 12.60"
        actions = [action.split() for action in row["actions"].split(";") if action]
        return row["id"], float(row["length"]), [(int(c[1:]), float(start), float(end))
                                                 for c, start, end in actions]

    def from_json(name, value):
        fits = isinstance(name, str) and isinstance(value, dict)          # a list has no names
        if not (fits and value.get("subset") in ("training", "testing")):
            raise ValueError('expected is {"VIDEO": {"subset": "training" or "testing", "duration":'
                             ' SECONDS, "actions": [[CLASS, START, END], ...]}, ...}')
        return value["subset"], (name, float(value["duration"]), [
            (int(c) - first, float(start), float(end)) for c, start, end in value["actions"]])

    forms = {"charades": (f"Charades_v1_{split}.csv", "charades.json"),
             "multithumos": ("multithumos.json", f"{names[0]}.txt")}     # any of the class files
    path = common.find(args.data, *forms[args.dataset])
    if path.suffix == ".csv":
        return path, common.read_table(path, from_table)
    if path.suffix == ".json":
        return path, [video for part, video in common.read_json(path, from_json) if part == subset]
    return path.parent, read_class_files(path.parent, split, names)


def read_class_files(folder, split, names):
    """[(video, 0.0, actions)] from MultiTHUMOS' CLASS.txt, lines "VIDEO START END"; 0: unknown."""
    prefix, videos = ("video_validation" if split == "train" else "video_test"), {}

    def from_line(line):
        video, start, end = line.split()
        return video, float(start), float(end)

    for c, name in enumerate(names):
        for video, start, end in common.read_lines(folder / f"{name}.txt", from_line):
            if video.startswith(prefix):
                videos.setdefault(video, []).append((c, start, end))
    return [(video, 0.0, actions) for video, actions in sorted(videos.items())]


def read_videos(args, split, names, need_files=True):
    """[Video] of a split in the order of the annotations. In training, videos without a file are
    left out; in evaluation one is an error. NOTE: the release leaves out those under 162 frames.
    """
    path, rows = read_actions(args, split, names)
    for name, seconds, actions in rows:
        if not (0 <= seconds < math.inf and all(0 <= c < len(names) for c, *_ in actions)):
            raise UserError(f"{path}: {name}: no duration, or a class is none of the {len(names)}")
    paths = common.find_videos(args.data, "*v1_rgb*", "*", "", frames=True)
    videos = common.spread([*{name: Video(name, paths.get(name), seconds, actions)
                              for name, seconds, actions in rows}.values()], args.limit)
    missing = [video.name for video in videos if need_files and video.path is None]
    note = f"{len(missing)} of them are missing, such as {missing[0]}" if missing else ""
    if missing and (split == "test" or len(missing) == len(videos)):
        raise UserError(f"{args.data}: {len(videos)} videos of the {split} split, {note}: neither "
                        "a file nor a folder of frames")
    common.say(f"{split}: {len(rows)} videos, {sum(len(actions) for *_, actions in rows)} actions "
               f"of {len(names)} classes in {path}" + (f"; {note}" if note else ""))
    return [video for video in videos if video.path or not need_files]


def read_kinetics(args, split, names=None):
    """([(path, class)], class names) of the clips of a split; those without a file are left out."""
    def first(*patterns):
        return next((path for p in patterns for path in sorted(args.data.glob(p))), None)

    words = {"train": ["train"], "val": ["val", "validate", "validation"]}[split]
    root, path = first(*words), first(*(f"*{w}.{end}" for w in words for end in ("csv", "json")))
    if root is None or path is None:
        raise UserError(f"{args.data}: there must be a folder {words[0]} of CLASS/CLIP, and a list "
                        f"{words[0]}.csv or {words[0]}.json")
    rows, listing = read_kinetics_rows(path), first("*labels.txt")
    if names is None:
        names = common.read_lines(listing) if listing else sorted({label for label, *_ in rows})
    classes, files, clips = {name: c for c, name in enumerate(names)}, {}, []
    folders = {path.name.replace("_", " "): path for path in sorted(root.iterdir())}
    for label, name, start, end in rows:
        if label not in classes:
            raise UserError(f"{path}: {name}: {label!r} is none of the {len(names)} classes")
        if label not in files:                                # {name: path} of its folder
            folder = folders.get(label.replace("_", " "))
            files[label] = common.find_videos(folder, "", frames=True) if folder else {}
        file = files[label].get(f"{name}_{start:06d}_{end:06d}") or files[label].get(name)
        if file:
            clips.append((file, classes[label]))
    common.say(f"{split}: {len(clips)} of {len(rows)} clips of {path} are in {root}, "
               f"{len(names)} classes")
    if not clips:
        raise UserError(f"{root}: none of the clips of {path} is there; expected are videos or "
                        "folders of frames CLASS/ID_START_END or CLASS/ID, START in six digits")
    return common.spread(clips, args.limit), names


def read_kinetics_rows(path):
    """[(label, id, start, end)] of Kinetics' CSV or JSON, times in whole seconds."""
    def from_table(row):
        times = (int(float(row[key])) for key in ("time_start", "time_end"))
        return row["label"], row["youtube_id"], *times

    def from_json(name, value):
        start, end = value["annotations"]["segment"]
        return value["annotations"]["label"], name, int(start), int(end)

    return (common.read_table(path, from_table) if path.suffix == ".csv"
            else common.read_json(path, from_json))


# ---- 10. networks and weights (train_fine.py, train_coarse_fineFEAT.py) --------------------------

HEADS = ("fc2.", "rw6.", "head.projection.")                  # classifiers
FUSION = ("pool_1.", "rw", "mix")                             # layers that Coarse-Fine adds to X3D
PREFIXES = ("fine.", "model_g_state_dict."), ("coarse.", "model_l_state_dict.")   # of both streams
NETWORK_FLAGS = ("stream", "version", "pool", "fusion", "num_frames", "stride", "crop",
                 "feature_cap", "bn_splits")                  # that a checkpoint brings along


def make_model(args, classes):
    """The network of --stage and --stream."""
    norm = functools.partial(common.SplitBatchNorm, splits=args.bn_splits)
    if not args.bn_splits:
        norm = nn.SyncBatchNorm if torch.cuda.is_available() else nn.BatchNorm3d
    x3d = functools.partial(common.X3D, args.version, classes, norm=norm)
    if args.stage == "pretrain":
        return x3d(per_frame=args.task == "detect", dropout=args.dropout)
    if args.stream == "slowfast":
        small = {"width": 16, "depth": (1, 1, 1, 1)} if args.version == "tiny" else {}
        return common.SlowFast(classes, norm=norm, dropout=args.dropout, **small)
    if args.stream not in ("coarse", "two"):
        return x3d(dropout=args.dropout)
    coarse = Coarse(args.version, classes, args.pool, args.fusion, norm, args.dropout)
    return TwoStream(coarse, x3d(dropout=0.0)) if args.stream == "two" else coarse


def convert_names(tensors, own):
    """A checkpoint's tensors under our names; classifiers of other classes are removed."""
    ours = common.zoo_tensors(tensors, own)
    other = {name.split(".")[0] for name, x in ours.items()
             if name.startswith(HEADS) and name in own and own[name].shape != x.shape}
    return {name: x for name, x in ours.items() if name.split(".")[0] not in other}


def load_network(model, path, strict=False, heads=True):
    """Load a checkpoint of ours, the release, SlowFast's zoo or pytorchvideo; of a file with both
    streams each network takes its own. The backbone must be complete; classifiers and Coarse-Fine's
    layers may be missing unless strict. heads=False: do not load classifiers.
    """
    if isinstance(model, TwoStream):
        load_network(model.coarse, path, strict, heads)
        return load_network(model.fine, path, strict, heads)

    def adapt(tensors, own):
        mine = {name.removeprefix(prefix): x for prefix in PREFIXES[isinstance(model, Coarse)]
                for name, x in tensors.items() if name.startswith(prefix)}
        return convert_names(mine or tensors, own)

    required = [k for k in model.state_dict() if strict or not k.startswith((*HEADS, *FUSION))]
    common.load_weights(model, path, required=required, skip=() if heads else HEADS, adapt=adapt)


def load_init(args, model):
    """Load --init. Classifiers stay random, except with --stream two."""
    zoo = "https://dl.fbaipublicfiles.com"
    published = {"fair": f"{zoo}/pyslowfast/x3d_models/x3d_{args.version.lower()}.pyth",
                 "pytorchvideo": f"{zoo}/pytorchvideo/model_zoo/kinetics/SLOWFAST_8x8_R50.pyth"}
    paths = [common.init_path(args, init, published) for init in args.init]
    parts = [model] if len(paths) == 1 else [model.coarse, model.fine]
    for part, path in zip(parts, paths):
        if path:                                              # else random, or the run continues
            load_network(part, path, heads=args.stream == "two")


def with_flags_of(args, path):
    """A copy of args with the network's flags from the checkpoint, if it is one of ours."""
    own = copy.copy(args)
    saved = common.adopt(own, path, NETWORK_FLAGS)
    if saved and saved.get("stage") != "finetune":
        raise UserError(f"{path}: was trained by --stage {saved.get('stage')} and is no detector")
    if saved and args.stream and saved["stream"] != args.stream:
        raise UserError(f"{path}: was trained with --stream {saved['stream']}, not {args.stream}")
    if own.stream is None:
        raise UserError(f"{path}: is no checkpoint of ours; --stream must name its network")
    return own


# ---- 11. arguments -------------------------------------------------------------------------------

BASE = {"num_frames": 64, "stride": 10, "bn_splits": 1, "backbone_lr": 1.0, "weight_decay": 1e-5,
        "warmup": 0, "schedule": "steps", "milestones": [], "multigrid": "off", "iters": None,
        "epochs": 200, "val_every": 2, "dropout": 0.5, "feature_cap": 128,
        "augment": ["freeze", "mixup", "cutmix"]}
TINY = {"version": "tiny", "crop": 48, "num_frames": 24, "feature_cap": 80, "batch_size": 8,
        "bn_splits": 1, "lr": 0.1, "backbone_lr": 1.0, "epochs": 40, "warmup": 0, "dropout": 0.0,
        "schedule": "cosine", "milestones": [], "multigrid": "off", "val_every": 10,
        "save_every": 100, "workers": 2}
TINY_PRETRAIN = {"num_frames": 16, "stride": 5, "batch_size": 16, "warmup": 20, "iters": 600}
TINY_RUNS = {"detect": TINY_PRETRAIN, "classify": TINY_PRETRAIN, "x3d": {"num_frames": 16},
             "coarse": {"lr": 0.05}, "two": {"lr": 0.02, "epochs": 10},
             "slowfast": {"lr": 0.05, "epochs": 20}}
CROPS = {"XS": 160, "S": 160, "L": 312, "XL": 312}            # else 224. S was published with
# --num_frames 13 --stride 6, XS with 4 and 12; FAIR has no weights for XL.


def recipe(chosen):
    """Defaults of the published run that the flags name, or with --tiny of a small one."""
    stage, dataset, stream = chosen.stage, chosen.dataset, chosen.stream
    if stage == "pretrain":
        run, stream = chosen.task, None
    else:
        dataset = "charades" if dataset == "kinetics400" else dataset
        if stream is None and not (stage == "evaluate" and chosen.init):  # then the checkpoint says
            stream = "coarse" if stage == "evaluate" else "fine"
        run = stream or "coarse"
    data = chosen.data or Path("data") / dataset
    r = {**BASE, **PUBLISHED[run], "dataset": dataset, "stream": stream, "data": data,
         "features": data / "features", "crop": CROPS.get(chosen.version, 224)}
    if dataset == "multithumos":
        r["feature_cap"] = 1024          # derived from the paper's GFLOPs, unverified
    if chosen.tiny:
        r |= {**TINY, **TINY_RUNS.get(run, {})}
    if chosen.epochs or r["iters"]:      # one of them is set, the other None
        r["iters" if chosen.epochs else "epochs"] = None
    runs = f"runs/ssdet_coarsefine_{dataset}"
    best = {s: f"{runs}_finetune_{s}/best.pt" for s in ("fine", "coarse", run)}
    r["init"] = {"detect": ["none" if chosen.tiny else "fair"], "classify": ["none"],
                 "slowfast": ["none" if chosen.tiny else "pytorchvideo"],
                 "two": [best["coarse"], best["fine"]]}.get(
                     run, ["runs/ssdet_coarsefine_kinetics400_pretrain/last.pt"])
    if stage in ("extract", "evaluate"):
        r |= dict.fromkeys(("batch_size", "epochs", "iters", "lr", "weight_decay"))
        r["init"] = [best["fine" if stage == "extract" else run]]
    named = run == "classify" or stage == "finetune" or (stage == "evaluate" and stream)
    r["out"] = Path(f"{runs}_{stage}_{run}" if named else f"{runs}_{stage}")
    return r


def parse_args(argv=None):
    p = common.Parser(__doc__, [*STAGES], ["kinetics400", "charades", "multithumos"])
    p.group("clips")
    p.flag("num_frames", int, "frames per clip, T (official scripts)")
    p.flag("stride", int, "frames from one frame of a clip to the next (official scripts)")
    p.flag("crop", int, "height and width of a training clip in pixels (official scripts)")
    p.group("method")
    p.flag("task", "detect", "pretrain: detect (SSDet) or classify", ["detect", "classify"])
    p.flag("version", "M", "size of X3D", ["XS", "S", "M", "L", "XL", "tiny"])
    p.flag("augment", str, "volume augmentations; each published model has one; sliding is CutMix "
           "as released (x3d.py)", [*AUGMENTATIONS], nargs="*")
    p.flag("aug_prob", 0.5, "probability of each augmentation, drawn per batch (x3d.py)")
    p.flag("stream", str, "network to train: fine; coarse, on stored fine features; two, both end "
           "to end; x3d and slowfast are baselines", ["fine", "coarse", "two", "x3d", "slowfast"])
    p.flag("pool", "grid", "pooling in time of the coarse stream", ["grid", "avg", "max", "stride"])
    p.flag("fusion", "mixed", "how the coarse stream uses the fine one: all levels at every stage, "
           "each level at its own stage, or not (x3d_coarse.py)", ["mixed", "own", "none"])
    p.flag("features", Path, "folder of stored features of the fine stream")
    p.group("optimization", "SGD, momentum 0.9; defaults are the official scripts', see PUBLISHED")
    p.flag("init", str, "weights to start from: a checkpoint of ours, the release's, none, fair "
           "(X3D) or pytorchvideo (SlowFast). --stream two: a coarse and a fine one; --stage "
           "evaluate: several are an ensemble", nargs="+", metavar="FILE")
    p.flag("epochs", int, "passes over the training samples")
    p.flag("iters", int, "training steps; wins over --epochs")
    p.flag("batch_size", int, "samples per step over all processes; batch norm sees a process's "
           "samples, in --bn_splits parts")
    p.flag("bn_splits", int, "parts of a process's batch with statistics of their own; 0: plain "
           "batch norm, on CUDA over all processes", least=0)
    p.flag("lr", float, "peak learning rate; the schedule is the recipe's")
    p.flag("weight_decay", float, "weight decay, of all parameters")
    p.flag("multigrid", str, "pretrain: vary the shape of clips in cycles, as X3D-Multigrid or as "
           "SlowFast's authors do; too many shapes for --compile", ["off", "x3d", "fair"])
    p.group("evaluation")
    p.flag("submission", Path, "score this file in Charades' official form instead of a network")
    p.flag("as_released", False, "with the fault of the release: Charades' 25 frames drift")
    args = common.parse(p, recipe, argv)
    check(p, args)
    return args


def check(p, args):
    """Stop at flags that contradict each other."""
    parts = int(os.environ.get("WORLD_SIZE", 1)) * max(1, args.bn_splits)
    if (args.stage == "pretrain") != (args.dataset == "kinetics400"):
        p.error("--stage pretrain goes with --dataset kinetics400, the other stages do not")
    if args.stage == "pretrain" and (args.stream or args.task == "classify" and args.augment):
        p.error("--stage pretrain takes no --stream, and --task classify no --augment")
    if args.stage != "pretrain" and (args.task, args.multigrid) != ("detect", "off"):
        p.error("--task and --multigrid are for --stage pretrain")
    if args.stream in ("fine", "x3d", "slowfast") and (args.pool, args.fusion) != ("grid", "mixed"):
        p.error("--pool and --fusion only have an effect on --stream coarse and two")
    if args.stream == "two" and args.fusion == "none":
        p.error("--stream two needs --fusion: else the fine stream is not trained")
    if args.submission and (args.stage, args.dataset) != ("evaluate", "charades"):
        p.error("--submission goes with --stage evaluate --dataset charades")
    if args.stage != "evaluate" and len(args.init) > 1 + (args.stream == "two"):
        p.error("--init has more files than this stage and stream read")
    if args.stage in ("pretrain", "finetune") and args.batch_size % parts:
        p.error(f"--batch_size must be a multiple of {parts}, processes x --bn_splits")


STAGES = {"pretrain": pretrain, "finetune": finetune, "extract": extract, "evaluate": evaluate}


def main(args):
    device = common.start_run(args)
    STAGES[args.stage](args, device)


if __name__ == "__main__":
    common.launch(main, parse_args())
