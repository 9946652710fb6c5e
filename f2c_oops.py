"""F2C and F2C2V: Leveraging Self-Supervised Training for Unintentional Action Recognition (Duka,
Kukleva, Schiele), ECCV 2022 workshops, arXiv:2209.11870.   Official code:
dukaenea/unintentional_actions, commit fdde674.   Data and benchmark: Oops! (arXiv:1911.11206),
cvlab-columbia/oops, commit ef2d93f.

Each video shows an accident: first intentional action, then a transition, then unintentional
action. Pre-training needs no labels. A transformer on frozen frame features predicts which temporal
transformation was applied to a clip (speed, shuffle, flip, warp), so it learns what normal motion
looks like. A second transformer on clip embeddings does the same for whole videos. Both are then
fine-tuned to classify clips, to localize the transition and to anticipate the label.

    f_t = φ(I_t)                                 (1)  features of frame t, (D,); φ is frozen
    z   = Enc_frame([c, f_1 ... f_L])_0          (2)  F2C: embedding of a clip, row of class token c
    L   = mean_i CE(Head(z_i), y_i)              (3)  y: which of 8 transformations of the clip
    v   = Enc_clip([c', z_1 ... z_N])_0          (4)  F2C2V: embedding of a video; Enc_frame frozen
    L   = mean_i CE(Head(v_i), y_i)              (5)  y: which of 6 transformations of the video

    q_j = Head_3(z_j)  or  Head_3(Enc_clip(...)_j)        (6)  logits of clip j; clip or video level
    L   = Σ_j w_yj CE(q_j, y_j) / Σ_j w_yj                (7)  w_c = max_k n_k / n_c, n: clips
    s(q, y) = a_y1 + b_yN + Σ_j q_j[y_j] + Σ_j A[y_j-1, y_j]           (8)  score of labels, a CRF
    L   = log Σ_y' exp s(q, y') - s(q, y)                              (9)
    t̂   = middle of the clip with the largest p(y_j = 1)              (10)  p: of softmax or CRF

Loss at clip level: (7) with w = 1; at video level: (9), or (7) with --loss ce. Clips of F2C have 20
frames, all others 16. A labelled clip is one second at 16 frames per second: 0 intentional;
1 transition: it contains the annotated time t; 2 unintentional: it starts after t. Published sizes:
D = 768 (ViT-B/16), 3 layers, 16 heads, an attention window of 32.

Features     torchrun --nproc_per_node 8 f2c_oops.py --stage features --data data/oops
F2C          torchrun --nproc_per_node 8 f2c_oops.py
F2C2V        torchrun --nproc_per_node 8 f2c_oops.py --stage f2c2v
Classify     torchrun --nproc_per_node 8 f2c_oops.py --stage classify --level video
Anticipate   torchrun --nproc_per_node 8 f2c_oops.py --stage classify --anticipate 1 --out DIR
Localize     python f2c_oops.py --stage localize --init FILE     (and --stage evaluate, the same)
Try it       python f2c_oops.py --stage features --data data/toy/oops --tiny, then
             python f2c_oops.py --data data/toy/oops --tiny      (CPU, minutes; `make toy` first)

We had only the abstract of the paper; file names in this script are those of the official code.
Where paper, official code and this file differ: grep NOTE in this file.
"""

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils.rnn import pad_sequence

import common
from common import UserError, VideoError

LABELS = ("intentional", "transition", "unintentional")
SPEEDS = ("normal", "x2", "x4", "x8")        # NOTE: the configs say x2, x3, x4; the code 2, 4, 8
CLIP_TRANSFORMS = (*SPEEDS, "shuffle", "flip", "point", "warp")
VIDEO_TRANSFORMS = ("speed", "normal", "point", "flip", "shuffle", "warp")
VIDEO_SPEED = 3                      # speed-up factor in F2C2V
FPS = 16                             # of labelled clips; pre-training uses the video's own rate
GRID = 0.25                          # seconds between labelled clips, at the least
PAD = -1

# Epochs and batch size of pre-training, and of classification at each level (configs/).
PUBLISHED = {"f2c": (100, 128), "f2c2v": (100, 16), "clip": (50, 256), "video": (50, 8)}
TINY = {"f2c": (60, 16), "f2c2v": (30, 8), "clip": (10, 256), "video": (15, 8)}


# ---- 1. transformations of a clip (official file: dataloaders/oops_ttibua_loader.py) ------------

def crop_frames(rng, n, size):
    """`size` consecutive frames of n. NOTE: as in the release, the start is drawn from the first
    half of the possible starts, so a crop rarely reaches the end of a video.
    """
    return rng.integers((n - size) // 2 + 1) + np.arange(size)


def max_speed(T, size):
    """Largest M <= 3 such that a clip of `size` frames with stride 2^M fits into T frames."""
    return int(min(math.log2(T / size), 3))


def speed_up(rng, T, k, size):
    """A crop of every 2^k-th frame: (size,)."""
    frames = np.arange(0, T, 2 ** k)
    return frames[crop_frames(rng, len(frames), size)] if len(frames) > size else frames


def shuffle(rng, T, size, as_released=False):
    """A crop in random order. NOTE: the release permutes only 19 of the 20 frames, so the length
    of the clip gives its label away.
    """
    return crop_frames(rng, T, size)[rng.permutation(size - 1 if as_released else size)]


def double_flip(rng, T, size):
    """A crop x forward, then backward: `size` frames of x_1 ... x_L x_L ... x_1."""
    x, offset = crop_frames(rng, T, size), rng.integers(2, size)
    return np.concatenate([x, x[::-1]])[offset:offset + size]


def random_speed_point(rng, normal, fast):
    """The end of `normal`, then the start of `fast`; as released, that may have normal speed."""
    offset = rng.integers(5, len(normal) - 4)
    return np.concatenate([normal, fast])[offset:offset + len(normal)]


def warp(rng, T, size, as_released=False):
    """`size` frames in order. M >= 2: from one to the next a random step of 1 to 2^M. M <= 1: a
    random subset of up to 40 consecutive frames.

    NOTE: the release crops 19·2^M frames. (a) The steps can leave this crop: the release crashes,
    we clamp with `as_released`. (b) For M = 0 all 19 frames of the crop are used: no warp, and the
    length gives the label away.
    """
    M = max_speed(T, size)
    extent = (size - as_released) * 2 ** M if as_released or M > 1 else min(T, 2 * size)
    start = crop_frames(rng, T, extent)[0]
    if M <= 1:
        return start + np.sort(rng.permutation(extent)[:size])
    steps = np.cumsum(rng.integers(1, 2 ** M + 1, size))
    return np.minimum(start + steps, T - 1) if as_released else start + steps - 1


def transform_clips(rng, T, names, size=20, as_released=False):
    """[(name, frames (size,))]: one clip per transformation in `names`; none of a video that is
    too short. One of the speeds is drawn, so "normal" can occur twice.
    """
    if T <= size:
        return []
    M = max_speed(T, size)
    speeds = [k for k in range(M + 1) if SPEEDS[k] in names] or range(M + 1)
    k = speeds[rng.integers(len(speeds))]
    fast = speed_up(rng, T, k, size)
    normal = crop_frames(rng, T, size)
    clips = [(SPEEDS[k], fast), ("normal", normal),
             ("shuffle", shuffle(rng, T, size, as_released)),
             ("flip", double_flip(rng, T, size)),
             ("point", random_speed_point(rng, normal, fast)),
             ("warp", warp(rng, T, size, as_released))]
    return [(name, frames) for name, frames in clips if name in names]


# ---- 2. transformations of a video (the same official file) -------------------------------------

def split_clips(frames, size):
    """Consecutive clips; the remainder is dropped.    (n,) -> (n // size, size)"""
    return frames[:len(frames) // size * size].reshape(-1, size)


def transform_video(rng, T, names, size=16, as_released=False):
    """[(name, frames (N, size))]: one version of the video per transformation in `names`; none of
    a video that is too short.
    """
    if T < size:
        return []
    x = np.arange(T // size * size)
    starts = range(int(0.25 * len(x)), int(0.75 * len(x)), size)
    flip_at, roll_at = int(rng.choice(starts)), int(rng.choice(starts))
    middle = len(x) // size // 2 * size
    long_enough = T > 4 * VIDEO_SPEED * size                  # the fast version has four clips
    versions = {}
    # NOTE: the release includes the fast version with probability 2/7 only; we always do.
    if long_enough and not (as_released and rng.integers(7) >= 2):
        versions["speed"] = x[::VIDEO_SPEED]
    versions["normal"] = x
    if long_enough:
        versions["point"] = np.concatenate([x[:middle], x[middle::VIDEO_SPEED]])
    versions["flip"] = np.concatenate([x[:flip_at], x[flip_at:][::-1]])
    versions["shuffle"] = split_clips(x, size)[rng.permutation(len(x) // size)].ravel()
    versions["warp"] = np.roll(x, -roll_at)
    # NOTE: in the release the random point has label 3, the double flip's; label 2 is never used.
    labels = {"point": "flip"} if as_released and len(names) == len(VIDEO_TRANSFORMS) else {}
    return [(labels.get(name, name), split_clips(frames, size))
            for name, frames in versions.items() if name in names]


# ---- 3. encoder (official file: models/pm_vtn.py) -----------------------------------------------

def local_attention(q, k, v, valid, half_window, dropout=0.0, chunk=256):
    """softmax(q_i·k_j/√d) v_j over the valid tokens j with |i - j| <= half_window, and j = 0.

    q, k, v: (B, H, n, d); valid: (B, n) bool, or None if all are. Queries are processed in chunks,
    and each needs only the keys near it: time and memory are linear in n.
    """
    i, rows = torch.arange(q.shape[2], device=q.device), []
    for first in range(0, len(i), chunk):
        query = slice(first, first + chunk)
        j = torch.cat([i[:1], i[max(1, first - half_window):first + chunk + half_window]])
        mask = ((i[query, None] - j).abs() <= half_window) | (j == 0)         # (chunk, keys)
        if valid is not None:
            mask = (mask & valid[:, None, j])[:, None]                        # (B, 1, chunk, keys)
        near = (k, v) if len(j) == len(i) else (k[:, :, j], v[:, :, j])
        rows.append(F.scaled_dot_product_attention(q[:, :, query], *near, mask, dropout))
    return torch.cat(rows, 2)


class Layer(nn.Module):
    """One layer of the Longformer (arXiv:2004.05150), norms after the sums. Frames attend to their
    neighbours and the class token, which attends to all tokens, with projections of its own.
    """

    def __init__(self, dim, heads, window, ff, dropout):
        super().__init__()
        self.heads, self.half_window = heads, window // 2     # half of the window on each side
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.query_global, self.key_global, self.value_global = (
            nn.Linear(dim, dim) for _ in range(3))
        self.out, self.norm1 = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=1e-12)
        self.fc1, self.fc2 = nn.Linear(dim, ff), nn.Linear(ff, dim)
        self.norm2, self.drop = nn.LayerNorm(dim, eps=1e-12), nn.Dropout(dropout)

    def attend_local(self, h, valid):
        """Local attention of all tokens; row 0 is replaced by `attend_global`.    -> (B, n, E)"""
        q, k, v = (p(h).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for p in (self.query, self.key, self.value))               # (B, H, n, d)
        dropout = self.drop.p if self.training else 0.0
        rows = local_attention(q, k, v, valid, self.half_window, dropout)
        return rows.transpose(1, 2).flatten(2)

    def attend_global(self, h, valid):
        """softmax(q·k/√d) v with the class token as the only query.    -> (B, 1, E)

        k_j = W h_j + b and v_j = V h_j + c are not computed, which saves a fifth of the products:
        q·k_j = (Wᵀq)·h_j + q·b, and Σ_j a_j v_j = V Σ_j a_j h_j + c Σ_j a_j.
        """
        q = self.query_global(h[:, 0]).unflatten(1, (self.heads, -1))         # (B, H, d)
        (W, b), (V, c) = ((p.weight.unflatten(0, q.shape[1:]), p.bias.unflatten(0, q.shape[1:]))
                          for p in (self.key_global, self.value_global))      # (H, d, E), (H, d)
        score = torch.einsum("bhd,hde->bhe", q, W) @ h.mT + (q * b).sum(2, keepdim=True)
        if valid is not None:
            score = score.masked_fill(~valid[:, None], -math.inf)             # (B, H, n)
        a = self.drop((score / q.shape[2] ** 0.5).softmax(2))
        row = torch.einsum("bhe,hde->bhd", a @ h, V) + c * a.sum(2, keepdim=True)
        return row.flatten(1)[:, None]

    def forward(self, h, valid=None, only_class=False):
        """(B, n, E) -> (B, n, E), or with `only_class` the class token's row, (B, 1, E)."""
        rows = self.attend_global(h, valid)
        if only_class:
            h = h[:, :1]
        else:
            rows = torch.cat([rows, self.attend_local(h, valid)[:, 1:]], 1)
        h = self.norm1(self.drop(self.out(rows)) + h)
        return self.norm2(self.drop(self.fc2(F.gelu(self.fc1(h)))) + h)


class Encoder(nn.Module):
    """Transformer over a class token and n frame features or clip embeddings ("VTN").

    all_rows: return every row, not only the class token's.
    NOTE: in the release the class token counts as one of the n valid tokens, so the last frame is
    always masked.
    """

    def __init__(self, dim, layers=3, heads=16, window=32, ff=3072, positions=7200, dropout=0.1,
                 init_std=0.02, all_rows=False, as_released=False):
        super().__init__()
        self.all_rows, self.as_released = all_rows, as_released
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Embedding(positions, dim, padding_idx=positions - 1)
        self.token_type = nn.Embedding(2, dim)                # 1: class token, 0: the others
        self.norm, self.drop = nn.LayerNorm(dim, eps=1e-12), nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(dim, heads, window, ff, dropout) for _ in range(layers))
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=init_std)
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)
        nn.init.zeros_(self.position.weight[-1:].detach())
        # Without all_rows the last layer's local attention is not used and gets no gradient, which
        # DDP must know. NOTE: so F2C2V does not train that of Enc_clip, and fine-tuning at video
        # level starts from random weights there.
        last = self.layers[-1]
        for part in () if all_rows else (last.query, last.key, last.value):
            part.requires_grad_(False)

    def train(self, mode=True):
        """A frozen encoder stays in evaluation mode, without dropout. NOTE: not in the release."""
        return super().train(mode and (self.cls_token.requires_grad or self.as_released))

    def forward(self, x, lengths=None):
        """x: (B, n, E); lengths: (B,), the valid rows of each x, or None if all are.

        Returns the class token's row (B, E), or with all_rows (B, 1 + n, E), where rows past the
        length have no meaning.
        """
        B, n, _ = x.shape
        last = self.position.num_embeddings - 2               # position of the class token
        position = torch.arange(n, device=x.device) % last
        position = F.pad(position, (1, 0), value=last)
        h = torch.cat([self.cls_token.expand(B, -1, -1), x], 1)               # (B, 1 + n, E)
        h = h + self.position(position) + self.token_type((position == last).long())
        h = self.drop(self.norm(h))
        valid = None
        if lengths is not None or self.as_released:
            lengths = torch.full((B,), n, device=x.device) if lengths is None else lengths
            tokens = lengths if self.as_released else lengths + 1             # with the class token
            valid = torch.arange(1 + n, device=x.device) < tokens[:, None]    # (B, 1 + n)
        for layer in self.layers[:-1]:
            h = layer(h, valid)
        h = self.layers[-1](h, valid, only_class=not self.all_rows)
        return h if self.all_rows else h[:, 0]                # (2) (4)


# ---- 4. networks (official file: transformer2x/vtn.py) ------------------------------------------

class F2C(nn.Module):
    """Frames to clip: Enc_frame and a head, a Sequential with the indices of the release."""

    def __init__(self, dim, classes, mlp=1024, dropout=0.1, **sizes):
        super().__init__()
        self.frame_encoder = Encoder(dim, dropout=dropout, **sizes)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, mlp), nn.GELU(),
                                  nn.Dropout(0.2 if dropout else 0.0), nn.Linear(mlp, classes))

    def forward(self, clips, lengths=None):
        """Logits.    clips: (B, L, D), lengths: (B,) or None -> (B, C)"""
        return self.head(self.frame_encoder(clips, lengths))  # (6)


class F2C2V(F2C):
    """Clips to video: also Enc_clip. Enc_frame is frozen unless `finetune_frames`.

    per_clip: one prediction per clip (fine-tuning), else one per video (pre-training). NOTE: the
    release reads clip j from the row of clip j - 1, and clip 1 from the class token's row.
    """

    def __init__(self, dim, classes, mlp=1024, dropout=0.1, per_clip=False, crf=False,
                 finetune_frames=False, **sizes):
        super().__init__(dim, classes, mlp, dropout, **sizes)
        if not finetune_frames:
            self.frame_encoder.requires_grad_(False)
        self.clip_encoder = Encoder(dim, dropout=dropout, all_rows=per_clip, **sizes)
        self.crf = CRF(classes) if crf else None

    def forward(self, clips, clip_index):
        """clips: (U, 16, D); clip_index: (B, N), which of them are the clips of each video, padded
        with PAD. Returns logits (B, C), or per clip (B, N, C).
        """
        z = gather_clips(self.frame_encoder(clips), clip_index)               # (B, N, D)
        v = self.clip_encoder(z, (clip_index != PAD).sum(1))
        if self.clip_encoder.all_rows:
            v = v[:, :-1] if self.clip_encoder.as_released else v[:, 1:]      # (B, N, D)
        return self.head(v)                                   # (6)


def gather_clips(z, clip_index):
    """Embeddings of each video's clips, 0 at padding.    (U, D), (B, N) -> (B, N, D)"""
    return z[clip_index.clamp(min=0)] * (clip_index != PAD)[..., None]


class CRF(nn.Module):
    """Conditional random field over the labels y of a video's clips, with their logits q.

    q: (B, N, K) float32; n: (B,), the number of valid clips of each video, at least 1.
    """

    def __init__(self, labels):
        super().__init__()
        self.start_transitions = nn.Parameter(torch.empty(labels).uniform_(-0.1, 0.1))        # a
        self.end_transitions = nn.Parameter(torch.empty(labels).uniform_(-0.1, 0.1))          # b
        self.transitions = nn.Parameter(torch.empty(labels, labels).uniform_(-0.1, 0.1))      # A

    def score(self, q, y, n):
        """s(q, y): (B,)    y: (B, N)"""
        valid = torch.arange(q.shape[1], device=q.device) < n[:, None]        # (B, N)
        y = y.masked_fill(~valid, 0)
        unary = q.gather(2, y[..., None])[..., 0] * valid                     # q_j[y_j]
        pairwise = self.transitions[y[:, :-1], y[:, 1:]] * valid[:, 1:]       # A[y_j-1, y_j]
        first, last = y[:, 0], y.gather(1, n[:, None] - 1)[:, 0]
        return (self.start_transitions[first] + self.end_transitions[last] + unary.sum(1)
                + pairwise.sum(1))                            # (8)

    def log_partition(self, q, n, reduce=torch.logsumexp):
        """log Σ_y exp s(q, y) over all y, by the forward recursion: (B,)"""
        alpha = self.start_transitions + q[:, 0]                              # (B, K)
        for j in range(1, q.shape[1]):
            alpha_next = reduce(alpha[:, :, None] + self.transitions, 1) + q[:, j]
            alpha = torch.where((j < n)[:, None], alpha_next, alpha)
        return reduce(alpha + self.end_transitions, 1)

    def nll(self, q, y, n):
        """-log p(y | q): (B,)"""
        return self.log_partition(q, n) - self.score(q, y, n) # (9)

    def marginals(self, q, n, reduce=torch.logsumexp):
        """p(y_j = k | q), (B, N, K): ∂ log_partition / ∂ q_j[k], by autograd."""
        with torch.inference_mode(False), torch.enable_grad():
            q = q.detach().clone().requires_grad_()
            return torch.autograd.grad(self.log_partition(q, n, reduce).sum(), q)[0]

    def viterbi(self, q, n):
        """The most probable labels, (B, N): with max, `marginals` are 1 on the best path."""
        return self.marginals(q, n, lambda x, dim: x.max(dim).values).argmax(2)


# ---- 5. losses (official files: rep_learning/train.py, transformer2x/train.py) ------------------

def cross_entropy(logits, label, class_weights=None):
    """(Σ_i w_yi CE_i, Σ_i w_yi); divide them for the mean. Labels PAD are ignored.
    logits: (..., C), label: (...), class_weights: (C,)
    """
    logits, label = logits.float().flatten(0, -2), label.flatten()
    weights = torch.ones_like(logits[0]) if class_weights is None else class_weights
    total = F.cross_entropy(logits, label, weights, ignore_index=PAD, reduction="sum")
    return total, (weights[label.clamp(min=0)] * (label != PAD)).sum()


def global_mean(total, count):
    """This process's share of Σ total / Σ count over all processes, times their number, because
    DDP averages gradients. A mean per process would depend on how the clips are distributed.
    """
    return total * common.world_size() / common.sum_processes(count.float())


def loss_of(args, model, out, label, class_weights=None):
    """{"loss", "top1"} of a batch over all processes.
    out: (B, C) or (B, N, C) logits; label: (B,) or (B, N), padded with PAD
    """
    if args.loss == "regression":
        return regression_terms(out, label)
    valid = label != PAD
    if args.loss == "crf":
        loss = model.crf.nll(out.float(), label, valid.sum(1)).sum() * common.world_size()    # (9)
    else:
        loss = global_mean(*cross_entropy(out, label, class_weights))         # (3) (5) (7)
    correct = (out.argmax(-1) == label) & valid
    return {"loss": loss, "top1": 100 * global_mean(correct.sum(), valid.sum())}


# ---- 6. training (official file: rep_learning/train.py) -----------------------------------------

def learning_rate(lr, epoch, epochs, end=1e-6):
    """Half a cosine from lr to `end`, constant within an epoch (utils/util_functions.py)."""
    return end + (lr - end) * (math.cos(math.pi * epoch / epochs) + 1) / 2


def train(args, device, model, dataset, val, class_weights=None):
    """The training loop of f2c, f2c2v and classify; then best.pt on the validation set `val`."""
    if args.compile:
        model.compile()
    ddp = DDP(model)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=args.lr, weight_decay=1e-4)     # also of norms
    saved = common.resume(args.out / "last.pt", args, len(dataset), ["features"], model=model,
                          optimizer=optimizer)
    start, best = saved["step"], saved.get("best", -math.inf)

    per_epoch = len(dataset) // args.batch_size
    steps = args.epochs * per_epoch
    log = common.Log(args, start, steps)
    ddp.train()
    for step, batch in log.steps(common.batches(args, dataset, device, start, steps, collate)):
        lr = learning_rate(args.lr, step // per_epoch, args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        common.seed_step(args.seed, step)                     # dropout repeats after a restart
        batch = common.to_device(batch, device)
        with common.autocast(device, args.precision):
            out = ddp(*inputs_of(batch))                      # (2) (4) (6)
        terms = loss_of(args, model, out, batch["label"], class_weights)      # (3) (5) (7) (9)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        gradient = nn.utils.clip_grad_norm_(learned, 1.0)     # configs/
        ended = (step + 1) % per_epoch == 0
        saving = ended or (step + 1) % args.save_every == 0
        if saving or log.due(step):
            common.check_finite(step, model, terms["loss"])   # NaN stops the run before the update
        optimizer.step()

        metrics = {}
        if ended:
            metrics = validate(args, device, model.eval(), val)
            if not metrics["val_top1"] <= best:
                best = metrics["val_top1"]
                common.save(args.out / "best.pt", step + 1, args, model=model)
            ddp.train()
        log(step, saving, **terms, gradient=gradient, lr=lr, **metrics)
        if saving:
            common.save(args.out / "last.pt", step + 1, args, samples=len(dataset), model=model,
                        optimizer=optimizer, best=best)
    common.barrier()                                          # rank 0 has written
    model.load_state_dict(common.load_checkpoint(args.out / "best.pt")["model"])
    metrics = validate(args, device, model.eval(), val)
    common.draw_curve(args, ["loss", "top1", "val_loss", "val_top1", "lr"])
    common.finish(args, {**metrics, "broken_training_samples": log.total("broken")})


def inputs_of(batch):
    """Arguments of a network's `forward`."""
    return [batch[k] for k in ("clips", "lengths", "clip_index") if k in batch]


def validate(args, device, model, val):
    """{"val_loss", "val_top1", "val_<class>"} on the validation set."""
    if args.stage == "classify":
        scores = predict_clips(args, device, model, val)
        if args.loss == "regression":
            errors = predicted_times(args, val, scores) - np.array([v.annotation.t[1] for v in val])
            return {"val_top1": 100 * float((np.abs(errors) <= 1.5).mean())}
        return classification_metrics([video.labels for video in val], scores, LABELS, "val_")

    def network(batch):
        p, count = model(*inputs_of(batch)).float().softmax(1), batch["count"].tolist()
        scores = torch.cat([p, p.argmax(1, keepdim=True)], 1)
        return {"label": batch["label"].split(count), "scores": scores.split(count)}      # by video

    dataset = common.Samples(args, val, make_pretext)
    rows = common.predict(args, device, dataset, network, "validation", 16, collate)
    return classification_metrics(rows["label"], rows["scores"], args.transforms, "val_")


def make_pretext(args, videos, i, rng):
    """Sample of f2c: up to six transformed clips of a video. Of f2c2v: up to six versions of it,
    which share most clips, so each distinct clip is read and encoded once.
    """
    transform = transform_video if args.stage == "f2c2v" else transform_clips
    made = transform(rng, videos[i].length, args.transforms, as_released=args.as_released)
    label = torch.tensor([args.transforms.index(name) for name, _ in made])
    frames = [frames for _, frames in made]
    if args.stage == "f2c2v":
        clips, clip_index = read_distinct_clips(videos[i].features, frames)
        return {"clips": clips, "clip_index": clip_index, "label": label}
    x = read_features(videos[i].features, np.concatenate(frames))
    return {"clips": x.split([len(clip) for clip in frames]), "label": label}


def collate(samples):
    """The clips of all samples: clips (U, L, D), padded, and lengths (U,) if they differ. If the
    samples are sequences of clips: clip_index (S, N), which clips are in each, padded with PAD.
    label: (U,) or (S,), or (S, N) for the clips of a sequence; count: (B,) labels per sample.
    """
    clips = [clip for sample in samples for clip in sample["clips"]]
    lengths = torch.tensor([len(clip) for clip in clips])
    label = [label for sample in samples for label in sample["label"]]
    batch = {"clips": pad_sequence(clips, True, PAD),
             "label": pad_sequence(label, True, PAD) if label[0].dim() else torch.stack(label),
             "count": torch.tensor([len(sample["label"]) for sample in samples]),
             "broken": [sample.get("broken", "") for sample in samples]}
    if "clip_index" in samples[0]:
        first = itertools.accumulate((len(sample["clips"]) for sample in samples), initial=0)
        batch["clip_index"] = pad_sequence([k + index for k, sample in zip(first, samples)
                                            for index in sample["clip_index"]], True, PAD)
    elif lengths.min() < lengths.max():
        batch["lengths"] = lengths
    return batch


def pretrain(args, device):
    """F2C or F2C2V: predict which transformation was applied, on all videos, without labels."""
    transform = transform_video if args.stage == "f2c2v" else transform_clips
    shortest = next(T for T in itertools.count(1)             # frames that give a sample
                    if transform(np.random.default_rng(0), T, args.transforms))
    train_videos, val_videos = (read_videos(args, split, shortest) for split in ("train", "val"))
    model = make_model(args, val_videos[0].dim, len(args.transforms)).to(device)
    load_init(args, model)
    train(args, device, model, common.Samples(args, train_videos, make_pretext), val_videos)


TINY_SIZES = {"heads": 4, "ff": 256, "mlp": 128, "positions": 1000, "dropout": 0.0,
              "init_std": 0.08}      # with 0.02 a narrow network learns too slowly

RELEASED = (                         # regular expressions: names of official checkpoints -> ours
    (r"^local_model\.mlp_head", "unused"), (r"^(global_model\.)?mlp_head", "head"),
    (r"^(local_model\.)?(?=cls_token|temporal_encoder)", "frame_encoder."),
    (r"^global_model\.", "clip_encoder."), (r"temporal_encoder\.", ""),
    (r"encoder\.layer\.", "layers."), (r"embeddings\.position_embeddings", "position"),
    (r"embeddings\.LayerNorm", "norm"), (r"embeddings\.token_type_embeddings", "token_type"),
    (r"attention\.self\.", ""), (r"attention\.output\.dense", "out"),
    (r"attention\.output\.LayerNorm", "norm1"), (r"intermediate\.dense", "fc1"),
    (r"output\.dense", "fc2"), (r"output\.LayerNorm", "norm2"))


def make_model(args, dim, classes):
    """The network of a stage, with random weights."""
    torch.manual_seed(args.seed)                              # the same on every process
    sizes = {**(TINY_SIZES if args.tiny else {}), "layers": args.layers, "window": args.window,
             "as_released": args.as_released}                 # and the defaults, as in configs/
    if args.backbone in CLIP_NETS:    # NOTE: r21d/mainr21d.py has Adam, weight decay 1e-8
        return nn.Sequential(
            nn.Flatten(), nn.Linear(dim, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 128),
            nn.Dropout(0.1), nn.ReLU(), nn.Linear(128, classes))
    if args.level == "clip":
        return F2C(dim, classes, **sizes)
    per_clip = args.stage != "f2c2v" and args.loss != "regression"
    return F2C2V(dim, classes, per_clip=per_clip, crf=args.loss == "crf",
                 finetune_frames=args.finetune_frames, **sizes)


def load_init(args, model):
    """Load the encoders of --init: one from F2C, two from F2C2V. Heads and CRF stay random."""
    path = common.init_path(args, args.init)
    if path:
        common.load_weights(model, path, [(), RELEASED], ["frame_encoder."], ["head.", "crf."])
    if args.freeze:
        for part in model.children():
            part.requires_grad_(not isinstance(part, Encoder))


# ---- 7. features (official files: feat_exteact/, r21d/extr_r21d_feats.py) -----------------------

CLIP_NETS = ("r2plus1d_18", "r3d_18", "r2plus1d_152")         # 3-D networks: features of clips
# Mean and standard deviation of the frames. HALF: of timm's ViT, ε as in the release.
HALF = (0.5,) * 3, (0.5 + 1e-8,) * 3
KINETICS = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
TIMM = ("https://huggingface.co/timm/vit_base_patch16_224.augreg_in21k_ft_in1k/resolve/main/"
        "pytorch_model.bin")
TIMM_NAMES = (                       # regular expressions: timm's names -> torchvision's
    ("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding"), ("^norm", "encoder.ln"),
    (r"patch_embed\.proj", "conv_proj"), ("norm1", "ln_1"), ("norm2", "ln_2"),
    (r"mlp\.fc1", "mlp.0"), (r"mlp\.fc2", "mlp.3"), (r"attn\.proj", "self_attention.out_proj"),
    (r"blocks\.", "encoder.layers.encoder_layer_"), (r"attn\.qkv\.", "self_attention.in_proj_"))


def bottleneck_r2plus1d(layers):
    """R(2+1)D of bottleneck blocks (IG-65M, arXiv:1905.00561); [3, 8, 36, 3] has 152 layers. Unlike
    in torchvision, a factored convolution computes its inner width from its own channels.
    """
    from torchvision.models.video import resnet

    class Factored(resnet.Conv2Plus1D):
        def __init__(self, cin, cout, between, stride=1, padding=1):
            super().__init__(cin, cout, 27 * cin * cout // (9 * cin + 3 * cout), stride, padding)

    def stem():
        return nn.Sequential(*resnet.R2Plus1dStem(), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)))

    net = resnet.VideoResNet(resnet.Bottleneck, [Factored] * 4, layers, stem, 359)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm3d):
            m.eps = 1e-3
    return net


def make_feature_network(name):
    """φ with random weights. Of frames (B, 3, H, W): vit_b16 (D = 768), resnet18 (512), resnet50
    (2048). Of clips (B, 3, 16, H, W): r2plus1d_18, r3d_18 (512), r2plus1d_152 (2048).
    """
    from torchvision.models import get_model
    net = (bottleneck_r2plus1d([3, 8, 36, 3]) if name == "r2plus1d_152" else
           get_model(name.replace("vit_b16", "vit_b_16")))
    setattr(net, "heads" if name == "vit_b16" else "fc", nn.Identity())   # no classifier
    return net.eval()


def load_feature_network(args):
    """(φ with its weights, mean and standard deviation of its frames). With --tiny φ is a small
    random network, see `calibrate`.
    """
    name, weights, clips = args.backbone, args.weights, args.backbone in CLIP_NETS
    torch.manual_seed(args.seed)
    if args.tiny:
        net = common.R2Plus1D(16, 10) if clips else common.PredictiveResNet("resnet10", 32)
        return nn.Sequential(net, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
                             nn.BatchNorm1d(128, eps=1e-12, momentum=1.0)), HALF
    net = make_feature_network(name)
    if weights == "none":
        return net, (KINETICS if clips else HALF)
    if weights == "timm" and name == "vit_b16":
        weights = common.fetch(TIMM, "--weights torchvision, FILE or none")
    elif weights == "torchvision" and name != "r2plus1d_152":
        from torchvision.models import get_model_weights
        published = next(iter(get_model_weights(name.replace("vit_b16", "vit_b_16"))))
        weights = common.fetch(published.url, "--weights FILE or none")
    elif weights in ("timm", "torchvision"):
        raise UserError(f"--weights {weights} has none of {name}: give a FILE")
    timm = "pos_embed" in common.read_weights(Path(weights))
    common.load_weights(net, Path(weights), [TIMM_NAMES if timm else ()])
    return net, (KINETICS if clips else HALF if timm else common.IMAGENET)


def normalize(frames, mean, std):
    """uint8 (n, H, W, 3) -> (n, 3, H, W) float"""
    return common.normalize(frames.permute(3, 0, 1, 2), mean, std).transpose(0, 1)


def resize_clip(frames, size=(128, 171), crop=112):
    """Input of a 3-D network: normalized, resized without antialiasing, cropped at the centre.
    uint8 (T, H, W, 3) -> (T, 3, crop, crop) float
    """
    x = F.interpolate(normalize(frames, *KINETICS), size, mode="bilinear", align_corners=False)
    top, left = (round((s - crop) / 2) for s in size)
    return x[..., top:top + crop, left:left + crop]


def crop_square(frame, side):
    """The centre of a frame; one below `side` is enlarged.    (H, W, 3) -> (side, side, 3)
    NOTE: the release crops up to 56 pixels off the centre.
    """
    short = min(frame.shape[:2])
    if short < side:
        size = [x * side // short for x in frame.shape[:2]]
        frame = F.interpolate(frame.permute(2, 0, 1)[None], size, mode="bilinear")[0]
        frame = frame.permute(1, 2, 0)
    top, left = ((x - side) // 2 for x in frame.shape[:2])
    return frame[top:top + side, left:left + side]


def make_frames(args, paths, i, rng):
    """All frames of a video as `crop_square` or `resize_clip` return them, (T, ...), and their
    times; or what is wrong with the file.
    """
    clips, side = args.backbone in CLIP_NETS, (32 if args.tiny else 224)
    times, frames = [], []
    try:
        for second, frame in common.stream_frames(paths[i], None if clips else side):
            frame = torch.from_numpy(np.ascontiguousarray(frame))
            times.append(second)
            frames.append(resize_clip(frame[None])[0] if clips else crop_square(frame, side))
        return {"times": np.array(times), "fps": common.probe(paths[i]).fps,
                "frames": torch.stack(frames)}
    except VideoError as e:
        return {"error": str(e)}


def network_inputs(args, device, video, norm):
    """(batches of frames (64, 3, H, W) or clips (8, 3, 16, H, W) of a video, their times)"""
    x, times = video["frames"].to(device), video["times"]
    if args.backbone not in CLIP_NETS:
        return (normalize(frames, *norm) for frames in x.split(64)), times
    rows, times = cut_clips(len(x), video["fps"], times, GRID)
    return (x[row].transpose(1, 2) for row in torch.from_numpy(rows).split(8)), times


@torch.no_grad()
def calibrate(args, device, net, norm, paths):
    """Set the batch norm at the end of the tiny φ by some frames of some videos: features of random
    weights hardly change from one frame to the next.
    """
    videos = [make_frames(args, paths, i, None) for i in range(len(paths))]
    batches = [next(network_inputs(args, device, video, norm)[0]) for video in videos
               if "error" not in video]
    nn.init.constant_(net[-1].weight, 0.1)                    # the scale of position embeddings
    net[-1].train()
    net(torch.cat(batches))
    net[-1].eval()


def extract(args, device):
    """Features of every video in oops_video/train and val as NAME.npz: arr_0 (T, D), times and fps.
    Existing files are skipped, so a killed run goes on.
    """
    common.claim(args.features, {k: getattr(args, k) for k in ("backbone", "weights", "tiny")})
    videos = [path for split in ("train", "val") for path in common.spread(
        sorted((args.data / "oops_video" / split).glob("*.mp4")), args.limit)]
    if not videos:
        raise UserError(f"{args.data / 'oops_video'}: holds no .mp4 videos in train/ and val/")
    files = {path: args.features / path.parent.name / f"{path.stem}.npz" for path in videos}
    todo = [path for path in videos if not files[path].exists()]
    common.barrier()                                          # before a process writes a file
    net, norm = load_feature_network(args)
    net = net.to(device).eval()
    if args.tiny:
        calibrate(args, device, net, norm, videos[:16])
    if args.compile:
        net.compile()

    todo = todo[common.rank()::common.world_size()]
    items = common.read_items(args, common.Samples(args, todo, make_frames), "videos")
    for path, video in zip(todo, items):
        if "error" in video:
            print(f"warning: {video['error']}; skipped", flush=True)
            continue
        batches, times = network_inputs(args, device, video, norm)
        with torch.inference_mode(), common.autocast(device, args.precision):
            z = [net(batch).float().cpu().numpy() for batch in batches]                   # (1)
        arrays = {"arr_0": np.concatenate(z), "times": np.asarray(times), "fps": video["fps"]}
        common.write(files[path], lambda f, arrays=arrays: np.savez(f, **arrays))
    common.barrier()
    common.finish(args, {"videos": len(videos), "made": sum(f.exists() for f in files.values())})


# ---- 8. clips and labels of Oops! (official files: transformer2x/my_oops_loader.py, dataloader.py)

class Annotation(NamedTuple):
    """The transition as three annotators saw it."""
    t: tuple                                   # times in seconds, sorted; -1: none found
    length: float                              # of the video, seconds
    rel_t: tuple                               # t / length, sorted


def has_labels(annotation, split, level):
    """True if the middle annotation lies inside the video and its length is allowed."""
    shortest, longest = (3.0, math.inf) if (split, level) == ("train", "video") else (3.2, 30.0)
    inside = annotation.t[1] >= 0 and 0.01 <= annotation.rel_t[1] <= 0.99
    return inside and shortest <= annotation.length <= longest


def cut_clips(T, fps, times, spacing):
    """Clips of 16 frames at 16 fps, `spacing` seconds apart: frames (N, 16), start and end (N, 2).

    Position k of the grid at 16 fps is frame ⌊k·fps/16⌋. A video of T frames has ⌊16·T/fps⌋ of
    them, or ⌈16·T/fps⌉ if fps is a multiple of 16. A remainder shorter than a clip is dropped.
    NOTE: the release converts frames to times and back, which is sometimes one frame too early.
    """
    frames_per_position = float(fps) / FPS
    if frames_per_position.is_integer():
        grid = np.arange(0, T, int(frames_per_position))
    else:
        k = np.arange(math.floor(T * float(FPS) / float(fps)), dtype=np.float32)
        grid = np.floor(k * np.float32(frames_per_position)).astype(np.int64)
    first = np.arange(0, len(grid) - FPS + 1, round(spacing * FPS))
    frames = grid[first[:, None] + np.arange(FPS)].reshape(-1, FPS)           # (N, 16)
    return frames, np.asarray(times)[frames[:, [0, -1]]].reshape(-1, 2)


def clip_labels(spans, t):
    """Label of each clip by itself: 1 if it contains t, 2 if it starts after t, else 0."""
    start, end = spans.T
    return np.where((start <= t) & (t <= end), 1, np.where(start > t, 2, 0))


def video_labels(spans, t, as_released=False):
    """Labels 0 ... 0 1 ... 1 2 ... 2 of a video's clips, from its transition time t: (N,).

    NOTE: if t falls between two clips, the release labels the whole video 0 (4 % of the videos,
    clips 1 s apart). We label the nearest clip 1. After the last clip, all labels are 0 in both.
    """
    labels = clip_labels(spans, t)
    if 1 not in labels:
        if as_released or 2 not in labels:
            return np.zeros_like(labels)
        labels[np.abs(spans - t).min(1).argmin()] = 1
    return labels


def labels_of(args, spans, t, spacing, protocol="paper"):
    """(clips that the model sees, their labels). In anticipation, `args.anticipate` = a seconds:

    paper: every clip, with the label that it would have a seconds later, by `clip_labels`.
    oops, the benchmark's: clip i - a / spacing, with the label of clip i, by `video_labels`.
    """
    clips = np.arange(len(spans))
    if args.anticipate and protocol == "paper":
        return clips, clip_labels(spans + args.anticipate, t)
    shift = round((args.anticipate or 0) / spacing)
    return clips[:max(0, len(clips) - shift)], video_labels(spans, t, args.as_released)[shift:]


def balance_labels(labels, rng):
    """Indices of the training clips of one video: all, then copies of those with rarer labels.

    Label c gets m·r_c clips, m: clips of the most frequent label, r = 1, 0.93, 1 / 0.93. Copies
    go through the clips of a label in a random order.
    """
    counts = np.bincount(labels, minlength=3)
    indices = [np.arange(len(labels))]
    for c, ratio in enumerate((1, 0.93, 1 / 0.93)):
        if counts[c] and c != counts.argmax():
            n = int(counts[c])
            copies = max(0, round(n * (int(counts.max()) * ratio / n - 1)))   # rounded as released
            indices.append(np.resize(rng.permutation(np.flatnonzero(labels == c)), copies))
    return np.concatenate(indices)


class Video(NamedTuple):
    """A video and its file of features. Fields from `annotation` on: labelled videos only."""
    path: Path
    features: Path
    length: int                                # rows of the file
    dim: int                                   # their width
    annotation: Annotation | None = None
    times: np.ndarray | None = None            # of each row, seconds: (T,); 3-D net: spans (T, 2)
    fps: float = 0.0
    rows: np.ndarray | None = None             # of each labelled clip: (N, 16); 3-D net: (N, 1)
    spans: np.ndarray | None = None            # start and end of each, seconds: (N, 2)
    labels: np.ndarray | None = None           # (N,)
    sequences: int = 1                         # interleaved sequences in which the model sees them


def read_names(path):
    """Names of videos without .mp4: lines of a .txt file, column `filename` of a .csv file."""
    names = (common.read_table(path, lambda row: row["filename"]) if path.suffix == ".csv"
             else common.read_lines(path))
    return list(dict.fromkeys(name.removesuffix(".mp4") for name in names))


def read_annotations(data):
    """{name: Annotation} from transition_times.json below --data."""
    def parse(name, entry):
        t, rel_t = (tuple(sorted(map(float, entry[key]))) for key in ("t", "rel_t"))
        if not len(t) == len(rel_t) == 3 or not 0 < entry["len"] < math.inf:
            raise ValueError("needs three times t, three rel_t and a length len")
        return name.removesuffix(".mp4"), Annotation(t, float(entry["len"]), rel_t)

    return dict(common.read_json(common.find(data, "transition_times.json"), parse))


def map_features(path):
    """arr_0 of an .npz file, (T, D), memory-mapped: a clip is read 20 times faster. The release's
    files are compressed and are read as a whole.
    """
    with common.reading(path, error=VideoError), open(path, "rb") as f:
        header = np.frombuffer(f.read(30), "<u2")             # of the archive's first file
        if header[4]:                                         # compressed
            x = np.load(path)["arr_0"]
        else:
            f.seek(int(header[13]) + int(header[14]), 1)      # past its name
            np.lib.format.read_magic(f)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
            x = np.memmap(f, dtype, "r", f.tell(), shape, "F" if fortran else "C")
        if x.ndim != 2 or x.dtype.kind != "f":
            raise ValueError(f"arr_0 is {x.dtype} {x.shape}, not (frames, width) numbers")
        return x


def read_features(path, rows):
    """Rows of a feature file, float32.    (n,) -> (n, D)"""
    with common.reading(path, error=VideoError):
        x = np.asarray(map_features(path)[rows], np.float32)
        if not np.isfinite(x).all():                          # 20 times faster than in torch
            raise ValueError("holds NaN or Inf")
        return torch.from_numpy(x)


def read_distinct_clips(path, sequences):
    """Each distinct clip of some sequences of clips, read once: features (U, 16, D), and the index
    of each sequence's clips among them.    sequences: [rows (N, 16)]
    """
    clips, index = np.unique(np.concatenate(sequences), axis=0, return_inverse=True)
    x = read_features(path, clips.ravel()).view(*clips.shape, -1)
    return x, torch.from_numpy(index.ravel()).split([len(rows) for rows in sequences])


def read_video(path, features, annotation=None):
    """The Video of a feature file. Without `times`, as in the release, the video gives them."""
    length, dim = map_features(features).shape
    if annotation is None:
        return Video(path, features, length, dim)
    with common.reading(features, error=VideoError), np.load(features) as z:
        times, fps = (z["times"], float(z["fps"])) if "times" in z else common.clock(path)
        if abs(len(times) - length) > 2 or not 0 < fps < math.inf:
            raise ValueError(f"has {length} rows, but the video {len(times)} frames, {fps:g} fps")
    length = min(length, len(times))
    return Video(path, features, length, dim, annotation, times[:length], fps)


def read_videos(args, split, shortest, annotations=None):
    """The Videos of a split with `shortest` features or more; with annotations those with labels.
    In training a video with a broken file of features is left out, in validation it is an error.
    """
    labelled = annotations is not None
    official = [f"{split}.txt"] if labelled else [f"{split}_all_org.csv", f"{split}.txt"]
    names = read_names(common.find(args.data, *official))
    if labelled:
        names = [name for name in names if name in annotations
                 and has_labels(annotations[name], split, args.level)]
    files = {path.name.removesuffix(".npz").removesuffix(".mp4"): path
             for path in (args.features / split).glob("*.npz")}               # or NAME.mp4.npz
    present, videos = [name for name in names if name in files], []
    for name in common.spread(present, args.limit):
        try:
            path = args.data / "oops_video" / split / f"{name}.mp4"
            videos.append(read_video(path, files[name], annotations[name] if labelled else None))
        except VideoError as e:
            if split == "val":
                raise
            common.say(f"warning: {e}; left out")
    if odd := [video.features for video in videos if video.dim != videos[0].dim]:
        raise UserError(f"{odd[0]}: not {videos[0].dim} wide, as is {videos[0].features.name}")
    videos = [video for video in videos if video.length >= shortest]
    common.say(f"{split}: {len(videos)} of {len(names)} videos, {len(names) - len(present)} "
               "are without features")
    if not videos:
        raise UserError(f"{args.features / split}: no features of these videos with {shortest} "
                        "frames or more; --stage features makes them")
    return videos


def label_videos(args, videos, spacing, sequences=1):
    """The Videos that are not shorter than a clip, with their clips `spacing` seconds apart."""
    labelled = []
    for video in videos:
        if video.times.ndim == 2:                             # clips GRID apart
            stride = round(spacing / GRID)
            rows, spans = np.arange(video.length)[::stride, None], video.times[::stride]
        else:
            rows, spans = cut_clips(video.length, video.fps, video.times, spacing)
        if len(rows):
            _, labels = labels_of(args, spans, video.annotation.t[1], spacing)
            labelled.append(video._replace(rows=rows, spans=spans, labels=labels,
                                           sequences=min(sequences, len(rows))))
        else:
            common.say(f"warning: {video.path}: is shorter than a clip; left out")
    return labelled


# ---- 9. classify (official files: action_classification/, transformer2x/, r21d/mainr21d.py) -----

def regression_terms(out, label):
    """Regression of the transition time relative to the length (action_localization/
    train_regression.py).    out: (B, 1), label: (B, 2), time and length in seconds
    """
    relative, (t, length) = out[:, 0].float().sigmoid(), label.float().unbind(1)
    loss = F.smooth_l1_loss(relative, t / length, reduction="sum", beta=0.01)
    correct = (relative * length - t).abs() <= 1.5
    # NOTE: the release sums over the videos of a process, then averages over processes. The sum
    # over all videos does not depend on the number of processes; the same for the CRF.
    return {"loss": loss * common.world_size(),
            "top1": 100 * global_mean(correct.sum(), torch.ones_like(t).sum())}


def make_labelled_clip(args, clips, i, rng):
    """Sample at clip level: one clip."""
    path, rows, label = clips[i]
    return {"clips": [read_features(path, rows)], "label": torch.tensor([label])}


def make_labelled_video(args, videos, i, rng):
    """Sample at video level: all clips of a video, as one sequence or several interleaved ones."""
    video = videos[i]
    clips, clip_index = read_distinct_clips(video.features, [
        video.rows[first::video.sequences] for first in range(video.sequences)])
    label = torch.from_numpy(video.labels)[None]
    if args.loss == "regression":
        label = torch.tensor([[video.annotation.t[1], video.annotation.length]])
    return {"clips": clips, "clip_index": clip_index, "label": label}


def classify(args, device):
    """Fine-tune on labelled videos, at clip level or at video level."""
    annotations = read_annotations(args.data)
    train_videos, val_videos = (label_videos(args, read_videos(args, split, 1, annotations),
                                             args.spacing) for split in ("train", "val"))
    counts = np.bincount(np.concatenate([v.labels for v in train_videos]), minlength=3)
    common.say(f"training clips {args.spacing:g} s apart: "
               + ", ".join(f"{n} {label}" for n, label in zip(counts, LABELS)))
    if args.level == "video":
        dataset = common.Samples(args, train_videos, make_labelled_video)
        class_weights = torch.tensor(counts.max() / counts.clip(1)).float().to(device)
    else:
        clips = [(v.features, v.rows[j], v.labels[j]) for i, v in enumerate(train_videos)
                 for j in balance_labels(v.labels, np.random.default_rng((args.seed, i)))]
        dataset, class_weights = common.Samples(args, clips, make_labelled_clip), None
    model = make_model(args, train_videos[0].dim, 1 if args.loss == "regression" else 3)
    load_init(args, model)
    train(args, device, model.to(device), dataset, val_videos, class_weights)


def predict_clips(args, device, model, videos):
    """[scores (N, 4)] of each video's clips in time order: probabilities of the labels, and the
    predicted label. By a CRF: marginals, and Viterbi's label. By regression: [t̂ / length (1,)].
    """
    def network(batch):
        clips, clip_index = batch["clips"], batch["clip_index"]               # of one video
        q = model(clips, clip_index) if args.level == "video" else model(clips)[clip_index]
        q = q.float()
        if args.loss == "regression":
            return {"scores": q.sigmoid()}
        p, predicted, valid = q.softmax(2), q.argmax(2), clip_index != PAD
        if args.loss == "crf":
            predicted = model.crf.viterbi(q, valid.sum(1))
            # NOTE: the release localizes by the softmax of the CRF's inputs.
            p = p if args.as_released else model.crf.marginals(q, valid.sum(1))
        rows = torch.cat([p, predicted[..., None]], 2)        # (sequences, N, 4)
        scores = rows.new_empty(int(valid.sum()), 4)
        for first, (row, mask) in enumerate(zip(rows, valid)):
            scores[first::len(rows)] = row[mask]              # interleaved: first, first + S, ...
        return {"scores": [scores]}

    dataset = common.Samples(args, videos, make_labelled_video)
    return common.predict(args, device, dataset, network, "validation", 1, collate)["scores"]


def classification_metrics(labels, scores, names, prefix=""):
    """loss: mean -log p(true label), whatever the training loss; top1, and accuracy of each true
    class, in percent. For each video labels (N,), and scores (N, C + 1): probabilities, and the
    predicted class. names: of the C classes
    """
    labels, scores = (np.concatenate([np.asarray(x) for x in xs]) for xs in (labels, scores))
    labels = labels.astype(int)
    correct, likelihood = labels == scores[:, -1], scores[np.arange(len(labels)), labels]
    metrics = {"loss": -np.log(np.maximum(likelihood, 1e-12)).mean(), "top1": 100 * correct.mean()}
    metrics |= {name: 100 * correct[labels == c].mean() for c, name in enumerate(names)
                if (labels == c).any()}
    return {prefix + k: float(x) for k, x in metrics.items()}


# ---- 10. localize and evaluate (official files: action_localization/test.py, Oops eval_results.py)

def predicted_time(p, spans):
    """t̂: middle of the clip with the largest p(label 1); the first if tied, 0 if all p are 0."""
    j = int(p.argmax())
    return float(spans[j].mean()) if p[j] > 0 else 0.0        # (10)


def predicted_times(args, videos, scores):
    """t̂ of each video in seconds."""
    return [float(x) * v.annotation.length if args.loss == "regression" else
            predicted_time(x[:, 1].numpy(), v.spans) for v, x in zip(videos, scores, strict=True)]


def time_error(t_hat, t):
    """Seconds to the nearest annotated time. NOTE: as in the benchmark an annotation of -1 stays in
    the list. No time above 0 is within 1 s of it, but it can lower the mean error.
    """
    return min(abs(t_hat - x) for x in t)


def localization_metrics(errors, tolerances=(0.25, 1.0)):
    """Percent of the videos within each tolerance; mean, median, deviation of errors in seconds."""
    e = np.asarray(errors)
    return {**{f"within_{k:g}s": 100 * float((e <= k).mean()) for k in tolerances},
            "mean_error_s": float(e.mean()), "median_error_s": float(np.median(e)),
            "std_error_s": float(e.std(ddof=1)) if len(e) > 1 else 0.0}


def localize(args, videos, times):
    """Localization metrics of the predicted times, of chance (a uniformly random time), of half the
    length (middle) and of a fourth annotator (human). Writes localization.csv.
    """
    given = {v.path.stem: v.annotation for v in videos}
    errors = [time_error(t, a.t) for t, a in zip(times, given.values(), strict=True)]
    if common.rank() == 0:
        common.write_csv(args.out / "localization.csv", [
            ("filename", "predicted_s", "error_s", "annotated_s", "length_s"),
            *((v.path.name, f"{t:.4f}", f"{e:.4f}", " ".join(f"{x:g}" for x in a.t), a.length)
              for v, t, e, a in zip(videos, times, errors, given.values()))])
    path = common.find(args.data, "heldout_transition_times.json", required=False)
    rows = common.read_json(path, lambda name, x: (name, float(x["t"][0]))) if path else []
    human = [(t, given[k].t) for name, t in rows if (k := name.removesuffix(".mp4")) in given]
    relative = [e / a.length for e, a in zip(errors, given.values())]
    metrics = localization_metrics(errors) | {"mean_relative_error": 100 * float(np.mean(relative))}
    for k in (0.25, 1.0):
        shares = {"chance": [(min(a.length, a.t[1] + k) - max(0.0, a.t[1] - k)) / a.length
                             for a in given.values()],
                  "middle": [time_error(a.length / 2, a.t) <= k for a in given.values()],
                  "human": [t >= 0 and time_error(t, others) <= k for t, others in human]}
        metrics |= {f"{baseline}_within_{k:g}s": 100 * float(np.mean(x)) if x else math.nan
                    for baseline, x in shares.items()}
    return metrics


def classification(args, videos, scores):
    """Metrics of clips 0.25 s and 1 s apart, of anticipation in both protocols, from all clips."""
    metrics = {}
    for spacing in (GRID, 1.0):
        for protocol in ("paper", "oops") if args.anticipate else ("paper",):
            if protocol == "oops" and args.anticipate % spacing:
                continue                                      # not a multiple of the spacing
            stride, labels, rows = round(spacing / GRID), [], []
            for v, x in zip(videos, scores, strict=True):
                clips, y = labels_of(args, v.spans[::stride], v.annotation.t[1], spacing, protocol)
                labels.append(y)
                rows.append(x[::stride][clips])
            name = f"{protocol}_{spacing:g}s" if args.anticipate else f"{spacing:g}s"
            metrics |= {f"{k}_{name}": x for k, x in classification_metrics(
                labels, rows, LABELS).items()}
            metrics[f"clips_{name}"] = sum(map(len, rows))
    return metrics


def evaluate(args, device):
    """Stages localize and evaluate, which are the same: metrics of clips and of localization on the
    validation videos (anticipation: only of clips). Writes predictions.csv, clips 0.25 s apart.
    """
    annotations = read_annotations(args.data)
    regression = args.loss == "regression"
    # At video level, clips 0.25 s apart are split into sequences --spacing apart, as in training.
    spacing = args.spacing if regression else GRID
    sequences = round(args.spacing / spacing) if args.level == "video" else 1
    videos = label_videos(args, read_videos(args, "val", 1, annotations), spacing, sequences)
    model = make_model(args, videos[0].dim, 1 if regression else 3)
    common.load_weights(model, Path(args.init), [(), RELEASED])
    scores = predict_clips(args, device, model.to(device).eval(), videos)
    metrics = {} if regression else classification(args, videos, scores)
    if common.rank() == 0 and not regression:
        common.write_csv(args.out / "predictions.csv", [
            ("filename", "start_s", "end_s", "label", "predicted", *LABELS), *(
                (v.path.name, f"{start:.4f}", f"{end:.4f}", label, int(predicted),
                 *(f"{x:.5f}" for x in p)) for v, rows in zip(videos, scores)
                for (start, end), label, (*p, predicted) in zip(
                    v.spans, v.labels, rows.tolist(), strict=True))])
    if not args.anticipate:
        times = predicted_times(args, videos, scores)
        metrics |= localize(args, videos, times)
    common.finish(args, {**metrics, "videos": len(videos), "checkpoint": str(args.init)})
    if common.rank() == 0 and not regression and not args.anticipate:
        draw_timeline(args, videos, scores, times)


# ---- 11. figure ---------------------------------------------------------------------------------

def draw_timeline(args, videos, scores, times, count=4, height=270):
    """timeline.png: for some videos seven frames, and the probabilities of the labels over time;
    annotated transitions are red, the predicted one black.
    """
    chosen = common.spread(range(len(videos)), count)
    image = Image.new("RGB", (980, height * len(chosen)), "white")
    draw = ImageDraw.Draw(image)
    for i, top in zip(chosen, range(0, image.height, height)):
        path, annotation, middle = videos[i].path, videos[i].annotation, videos[i].spans.mean(1)
        first, last, left, right = middle[0], middle[-1], 50, 960
        title = f"{path.stem[:60]}   predicted {times[i]:.2f} s, annotated {annotation.t} s"
        draw.text((left, top + 5), title.encode("ascii", "replace").decode(), "black")
        if path.exists():                                     # the features suffice for the rest
            frames, = common.read_clip(path, [np.linspace(first, last, 7)], 112)
            for k, x in enumerate(frames):
                image.paste(Image.fromarray(x).resize((128, 96)), (left + 130 * k, top + 22))
        marks = np.clip([*(t for t in annotation.t if t >= 0), times[i]], first, last)
        curves = dict(zip(LABELS, scores[i][:, :3].T.numpy()))
        common.plot(draw, (left, top + 142, right, top + 240), middle, curves, marks[:-1], (0, 1))
        x = left + (right - left) * (marks[-1] - first) / max(last - first, 1e-9)
        draw.line([(x, top + 142), (x, top + 240)], "black", 3)
    common.write(args.out / "timeline.png", lambda f: image.save(f, "PNG"))


# ---- 12. arguments ------------------------------------------------------------------------------

STAGES = {"f2c": pretrain, "f2c2v": pretrain, "features": extract, "classify": classify,
          "localize": evaluate, "evaluate": evaluate}


def recipe(chosen):
    """Defaults of the published run that the flags name; smaller ones for --tiny."""
    stage, tiny, backbone = chosen.stage, chosen.tiny, chosen.backbone
    level = chosen.level or ("video" if chosen.loss in ("crf", "regression") else "clip")
    level = {"f2c": "clip", "f2c2v": "video"}.get(stage, level)
    usual_loss = "crf" if level == "video" and stage != "f2c2v" else "ce"
    epochs, batch_size = (TINY if tiny else PUBLISHED).get(
        level if stage == "classify" else stage, (None, None))
    encoder = None if backbone in CLIP_NETS else "f2c2v" if level == "video" else "f2c"
    before = {"f2c2v": "f2c", "classify": encoder, "localize": "classify",
              "evaluate": "classify"}.get(stage)
    small = {"layers": 2, "workers": 2, "save_every": 100} if tiny else {}
    return {"features": (chosen.data or Path("data/oops")) / "features" / backbone,
            "weights": "timm" if backbone == "vit_b16" else "torchvision",
            "transforms": ",".join(VIDEO_TRANSFORMS if stage == "f2c2v" else CLIP_TRANSFORMS),
            "init": f"runs/f2c_oops_oops_{before}/best.pt" if before else "none",
            "level": level, "loss": chosen.loss or usual_loss,
            "spacing": 1.0 if level == "video" else GRID,
            "epochs": epochs, "batch_size": batch_size, "lr": 1e-3 if tiny else 1e-4, **small}


def parse_args(argv=None):
    p = common.Parser(__doc__, list(STAGES), ["oops"])
    p.group("method", "--layers, --window and --as_released are taken from --init, if it is ours")
    p.flag("transforms", str, "transformations to tell apart; fewer for the ablations (configs/)")
    p.flag("layers", 3, "layers of each transformer (configs/)")
    p.flag("window", 32, "tokens that an attention window covers, half on each side (configs/)")
    p.flag("finetune_frames", False, "f2c2v and video level: also train the frame encoder")
    p.flag("as_released", False, "with the authors' faults: shuffles and warps of 19 frames, few "
           "fast videos, random points called flips, last token masked, clip j read as j - 1, 0 "
           "between clips, dropout in the frozen encoder, softmax instead of CRF marginals")
    p.group("features")
    p.flag("features", Path, "folder of stored features, with train/ and val/")
    p.flag("backbone", "vit_b16", "φ, frozen network for the features, of frames or (r...d_...) "
           "of clips (models/vit.py)", ["vit_b16", "resnet50", "resnet18", *CLIP_NETS])
    p.flag("weights", str, "weights of φ: FILE, none, torchvision or timm (vit_b16: ImageNet-21k, "
           "then 1k, as models/vit.py; the official README says 21k)")
    p.group("classification", "localize and evaluate take these flags from --init if it is ours")
    p.flag("level", str, "clip: each clip alone; video: all of a video (ours)", ["clip", "video"])
    p.flag("loss", str, "ce: cross entropy; video level also crf (transformer2x/main.py) and "
           "regression of the transition time", ["ce", "crf", "regression"])
    p.flag("spacing", float, "seconds from one clip to the next (configs/)", also=["step"])
    p.flag("anticipate", float, "predict the label so many SECONDS later: 0.5, 1, 1.5 or 2 in the "
           "official code, 1.5 in the benchmark; at video level the model sees later clips, too")
    p.flag("freeze", False, "train only the head and CRF")
    p.group("optimization", "AdamW, weight decay 1e-4, gradient norm clipped to 1 (configs/)")
    p.flag("init", str, "weights to start from: a checkpoint of ours or the release's, or none")
    p.flag("epochs", int, "passes over the training samples (configs/)")
    p.flag("batch_size", int, "videos (clip level: clips) per step over all processes (configs/)")
    p.flag("lr", float, "learning rate: half a cosine to 1e-6, by epoch (configs/)")
    args = common.parse(p, recipe, argv)

    known = VIDEO_TRANSFORMS if args.stage == "f2c2v" else CLIP_TRANSFORMS
    names = args.transforms.split(",")
    args.transforms = [name for name in known if name in names]
    published = {"f2c": ("clip", "ce", False), "f2c2v": ("video", "ce", False)}.get(args.stage)
    if len({*names}) < max(2, len(names)) or not {*names} <= {*known}:
        p.error(f"--transforms needs two or more different names out of {','.join(known)}")
    if published not in (None, (args.level, args.loss, args.freeze)):
        p.error("--level, --loss and --freeze are flags of --stage classify")
    if args.level == "clip" and args.loss != "ce":            # NOTE: the release has a CRF there
        p.error(f"--loss {args.loss} needs --level video")
    if args.loss == "regression" and args.anticipate:
        p.error("--loss regression has no labels to anticipate")
    if args.backbone in CLIP_NETS and (published or args.level == "video"):
        p.error(f"--backbone {args.backbone} needs --stage classify and --level clip")
    if args.spacing <= 0 or args.spacing % GRID:
        p.error("--spacing must be a multiple of 0.25 s")
    return args


def main(args):
    if args.init != "none" and args.stage != "features":      # what belongs to the weights
        names = ["tiny", "layers", "window", "as_released"]
        if args.stage in ("localize", "evaluate"):
            names += ["level", "loss", "spacing", "anticipate"]
        saved = common.adopt(args, Path(args.init), names)
        if "level" in names and saved.get("stage", "classify") != "classify":
            raise UserError(f"{args.init}: was trained by --stage {saved['stage']}, not classify")
    device = common.start_run(args)
    STAGES[args.stage](args, device)


if __name__ == "__main__":
    common.launch(main, parse_args())
