"""CPCTrans: Contrastive Predictive Coding with Transformer for Video Representation Learning (Liu
et al.), Neurocomputing 482 (2022).   Official code: QiyueShang666/SSL-for-Video, commit ce2d518,
a fork of yliu1229/CPCTR, commit 66fcd33.   After CPC, arXiv 1807.03748, and DPC, 1909.04656.

The network sees a few frames of an unlabelled video and predicts the features of every spatial cell
of the next frames. For each prediction it must find the true cell among all cells of all predicted
frames in the batch. To do so it must model motion. Then it is fine-tuned to recognise actions.

    f_n = ResNet(x_n)                   frame n = 1 ... N; M = S·S cells of 32 x 32 pixels    (1)
    z_1 ... z_N = Enc(f_1 ... f_N)      attention among all N·M cells, no positional encoding (2)
    h = GRU(relu z_1 ... relu z_{N-P})  context; one GRU, applied to each cell on its own     (3)
    ẑ_1 = φ(h),  h <- GRU(relu ẑ_p, h),  ẑ_{p+1} = φ(h)     ẑ_p predicts z_{N-P+p}, p = 1 ... P (4)
    L = -1/BPM Σ_i log [ exp(ẑ_i·z_i) / Σ_j exp(ẑ_i·z_j) ]  i, j: cells of the whole batch      (5)
    logits = W dropout(BN(mean over cells of GRU(relu Enc(relu f_1 ... f_N))))  in fine-tuning  (6)

"5pred3" means N = 5 frames in all, of which P = 3 are predicted. As released, B = 16 videos of 224
pixels have M = 49 cells of 256 channels, and chance level is L = ln BPM = ln 2352 = 7.76.

Pre-train    torchrun --nproc_per_node 8 cpctrans.py --dataset ucf101 --data data/ucf101
Fine-tune    python cpctrans.py --dataset hmdb51 --pretrain FILE
Probe        python cpctrans.py --train_what last --pretrain FILE --out runs/probe
Test         python cpctrans.py --test FILE
Try it       python cpctrans.py --data data/toy/ucf101 --tiny      (CPU, minutes; `make toy` first)

The authors pre-train on train list 3, which holds all test videos of split 1, and choose their
checkpoints on test videos. Here all stages use the lists of one --split, and the validation set is
part of the train list. A checkpoint carries the history of its training; metrics.json repeats it.
We had only the abstract of the paper; files named here are those of the official code. NOTE marks
what differs from it, and what may surprise.
"""

import argparse
import contextlib
import itertools
import math
import re
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import default_collate
from torchvision.transforms.v2 import functional as TF

import common
from common import UserError, VideoError

# Defaults of main.py and test.py; num_frames: the README's. NOTE: main.py stops after 299 epochs.
PUBLISHED = {
    "pretrain": dict(num_frames=5, epochs=300, batch_size=16, lr=1e-3, weight_decay=1e-5),
    "finetune": dict(num_frames=7, epochs=300, batch_size=16, lr=1e-3, weight_decay=1e-3),
    "test": dict(num_frames=7)}           # NOTE: 8 in the original command, by test.py's default
# If --init is a checkpoint, the values that it was trained with replace these defaults.
NETWORK = {"net": "resnet18", "width": 64, "layers": 2, "heads": 4, "attn": "full", "pos": "none",
           "stride": 3, "crop": 224, "img_dim": 224, "split": 1}
TINY = {"pretrain": {"epochs": 60}, "test": {},
        "finetune": {"epochs": 30, "lr": 5e-3, "weight_decay": 1e-5, "dropout": 0.0}}


# ---- 1. network (official files: Backbone/transformer_encoder.py, convrnn.py, model_3d.py) -------
# Names are those of the released checkpoints, sizes and dropout (0.1) those of the release.

class LayerNorm(nn.Module):
    """a (x - mean) / (std + ε) + b. NOTE: nn.LayerNorm has the biased std, and ε in the root."""

    def __init__(self, d, eps=1e-6):
        super().__init__()
        self.a_2, self.b_2 = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.eps = eps

    def forward(self, x):
        std, mean = torch.std_mean(x.float(), -1, keepdim=True)
        return self.a_2 * (x - mean) / (std + self.eps) + self.b_2


class Attention(nn.Module):
    """Multi-head self-attention.    (B, T, D) -> (B, T, D)

    `linears` are query, key, value and output. mask (T, T): True where a row may see a column.
    """

    def __init__(self, d, heads, dropout=0.1):
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(d, d) for _ in range(4)])
        self.heads, self.dropout = heads, nn.Dropout(dropout)

    def forward(self, x, mask=None):
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for linear in self.linears[:3])                            # (B, heads, T, ·)
        logits = q @ k.mT / math.sqrt(q.shape[-1])                            # (B, heads, T, T)
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf)
        y = self.dropout(logits.softmax(-1)) @ v                              # (B, heads, T, ·)
        return self.linears[3](y.transpose(1, 2).flatten(2))                  # (B, T, D)


class EncoderLayer(nn.Module):
    """x <- x + Attention(LN x), then x <- x + w_2 relu(w_1 LN x); dropout on both branches."""

    def __init__(self, d, heads, dropout=0.1):
        super().__init__()
        self.self_attn, self.dropout = Attention(d, heads, dropout), nn.Dropout(dropout)
        self.feed_forward = nn.Sequential(OrderedDict(
            w_1=nn.Linear(d, 8 * d), relu=nn.ReLU(), dropout=nn.Dropout(dropout),
            w_2=nn.Linear(8 * d, d)))
        self.sublayer = nn.ModuleList([
            nn.Sequential(OrderedDict(norm=LayerNorm(d))) for _ in range(2)])

    def forward(self, x, mask=None):
        x = x + self.dropout(self.self_attn(self.sublayer[0](x), mask))
        return x + self.dropout(self.feed_forward(self.sublayer[1](x)))


def init_orthogonal(module):
    """Initialise as the release: orthogonal weights, biases of zero."""
    for name, p in module.named_parameters():
        if name.endswith("weight"):
            nn.init.orthogonal_(p)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


def sinusoids(d, length):
    """Sinusoidal positional encoding (arXiv 1706.03762).    -> (length, d)"""
    angle = torch.arange(length)[:, None] * torch.exp(
        torch.arange(0, d, 2) * -(math.log(10000) / d))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class Encoder(nn.Module):
    """Enc: a pre-norm transformer over all cells of all frames.    (B, N, D, S, S) -> the same

    NOTE: the release computes a positional encoding but never adds it (--pos sin does). Only the
    GRU sees the order of the frames.
    NOTE: the release has --attn full: the context has already seen the frames to be predicted. With
    `causal` a frame attends to itself and to earlier frames, with `frame` only to itself.
    """

    def __init__(self, d, heads, layers, attn="full", pos="none"):
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(d, heads) for _ in range(layers)])
        self.norm, self.attn, self.pos = LayerNorm(d), attn, pos
        init_orthogonal(self)

    def forward(self, f):
        N, D, H, W = f.shape[1:]
        x = f.permute(0, 1, 3, 4, 2).flatten(1, 3)            # (B, N·M, D)
        if self.pos == "sin":
            x = x + sinusoids(D, N * H * W).to(x)
        frame = torch.arange(N, device=x.device).repeat_interleave(H * W)     # of each cell
        mask = {"full": None, "causal": frame[:, None] >= frame,
                "frame": frame[:, None] == frame}[self.attn]  # (N·M, N·M)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x).unflatten(1, (N, H, W)).permute(0, 1, 4, 2, 3).contiguous()


class ConvGRU(nn.Module):
    """A GRU for each cell on its own, all with the same weights.    x, h: (B, D, S, S) -> new h

    u = σ(W_u [x, h]),  r = σ(W_r [x, h]),  h' = (1 - u) h + u tanh(W_o [x, r h]); dropout on h'.
    """

    def __init__(self, d, dropout=0.1):
        super().__init__()
        self.reset_gate = nn.Conv2d(2 * d, d, 1)
        self.update_gate, self.out_gate = nn.Conv2d(2 * d, d, 1), nn.Conv2d(2 * d, d, 1)
        self.dropout = nn.Dropout(dropout)
        init_orthogonal(self)

    def forward(self, x, h):
        xh = torch.cat([x, h], 1)
        u, r = torch.sigmoid(self.update_gate(xh)), torch.sigmoid(self.reset_gate(xh))
        new = torch.tanh(self.out_gate(torch.cat([x, r * h], 1)))
        return self.dropout((1 - u) * h + u * new)

    def last_state(self, xs):
        """The state after a sequence that starts from zero.    (B, N, D, S, S) -> (B, D, S, S)"""
        h = torch.zeros_like(xs[:, 0])
        for x in xs.unbind(1):
            h = self(x, h)
        return h


class Pretrained(nn.Module):
    """What pre-training leaves to the classifier: ResNet, Enc and GRU."""

    def __init__(self, args):
        super().__init__()
        self.backbone = common.PredictiveResNet(args.net, args.width)
        d = self.backbone.out_dim
        self.encoder = Encoder(d, args.heads, args.layers, args.attn, args.pos)
        self.agg = ConvGRU(d)

    def encode(self, clip, relu):
        """z of all cells: (B, N, 3, H, W) -> (B, N, D, S, S), S = ⌈H/32⌉"""
        f = self.backbone(clip.flatten(0, 1))                 # (B·N, D, S, S)               # (1)
        f = F.relu(f) if relu else f
        return self.encoder(f.unflatten(0, clip.shape[:2]))                                  # (2)


class CPC(Pretrained):
    """The pre-training network.    (B, N, 3, H, W) -> ẑ, z: (B, P, M, D) each"""

    def __init__(self, args):
        super().__init__(args)
        d, self.pred_step = self.backbone.out_dim, args.pred_step
        self.network_pred = nn.Sequential(nn.Conv2d(d, d, 1), nn.ReLU(), nn.Conv2d(d, d, 1))  # φ
        init_orthogonal(self.network_pred)

    def predict(self, h):
        """P predictions from a context.    (B, D, S, S) -> (B, P, D, S, S)"""
        z_hat = [self.network_pred(h)]                        # ẑ_1 = φ(h)                   # (4)
        while len(z_hat) < self.pred_step:
            h = self.agg(F.relu(z_hat[-1]), h)
            z_hat.append(self.network_pred(h))
        return torch.stack(z_hat, 1)

    def forward(self, clip):
        z = self.encode(clip, relu=False)                     # (B, N, D, S, S)
        seen, target = z[:, :-self.pred_step], z[:, -self.pred_step:]
        h = self.agg.last_state(F.relu(seen))                 # (B, D, S, S)                 # (3)
        z_hat = self.predict(h)                               # (B, P, D, S, S)
        return z_hat.flatten(3).mT, target.flatten(3).mT      # NOTE: gradients reach z, too


# ---- 2. loss (official files: CPCTrans/model_3d.py, main.py) -------------------------------------

def similarity(z_hat, z):
    """ẑ_i·z_j of all predictions and cells, no temperature.    (B, P, M, D) each -> (BPM, B'PM)"""
    with common.no_autocast(z):
        return z_hat.float().flatten(0, 2) @ z.float().flatten(0, 2).T


def info_nce(z_hat, z):
    """{"loss": L, "top1", "top3", "top5": accuracy in %}.    z_hat, z: (B, P, M, D)

    NOTE: the negatives are the cells of all processes: the release has its batch on one GPU.
    """
    logits = similarity(z_hat, common.gather_rows(z.float()))                 # (BPM, world·BPM)
    target = common.rank() * len(logits) + torch.arange(len(logits), device=logits.device)
    return {k: x.mean() for k, x in loss_and_topk(logits, target).items()}    # (5)


def loss_and_topk(logits, target):
    """{"loss": -log softmax at the target, "top1", "top3", "top5"} of each row, (rows,)."""
    return {"loss": F.cross_entropy(logits, target, reduction="none"), **topk(logits, target)}


def topk(logits, target):
    """{"top1", "top3", "top5"}: 100 for a row whose target is among its k largest, else 0."""
    hit = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
    return {f"top{k}": 100 * hit[:, :k].any(1).float() for k in (1, 3, 5)}


def wrong_kinds(chosen, true, shape):
    """Where a prediction went wrong: {"wrong_video", "wrong_cell", "wrong_time": bool}.

    chosen, true: flat indices into (B, P, M). wrong_cell: right video, other place, any frame.
    wrong_time: right video and place, other frame.
    """
    video, time, cell = (a != b for a, b in zip(torch.unravel_index(chosen, shape),
                                                torch.unravel_index(true, shape)))
    return {"wrong_video": video, "wrong_cell": ~video & cell, "wrong_time": ~video & ~cell & time}


def metrics_per_video(z_hat, z):
    """Loss, accuracy and kinds of errors for each video of a batch, {name: (B,)}."""
    logits = similarity(z_hat, z)
    true = torch.arange(len(logits), device=logits.device)
    rows = loss_and_topk(logits, true) | {
        k: 100 * x.float() for k, x in wrong_kinds(logits.argmax(1), true, z.shape[:3]).items()}
    return {k: x.view(len(z), -1).mean(1) for k, x in rows.items()}


# ---- 3. classifier (official file: Evaluate/model_3d_lc.py) --------------------------------------

class Classifier(Pretrained):
    """Class logits of clips.    (B, N, 3, H, W) -> (B, K)

    NOTE: it has a ReLU between ResNet and Enc, which the pre-training network has not.
    """

    def __init__(self, args, classes):
        super().__init__(args)
        d = self.backbone.out_dim
        self.final_bn = nn.BatchNorm1d(d)
        self.final_fc = nn.Sequential(nn.Dropout(args.dropout), common.LinearFP32(d, classes))
        init_orthogonal(self.final_fc)
        self.frozen = [self.backbone, self.encoder, self.agg] if args.train_what == "last" else []
        for part in self.frozen:
            part.requires_grad_(False)

    def train(self, mode=True):
        """In a linear probe, batch norm and dropout of the frozen parts stay as in evaluation."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def features(self, clip):
        """The last state of the GRU, averaged over the cells.    -> (B, D)"""
        return self.agg.last_state(F.relu(self.encode(clip, relu=True))).mean((2, 3)).float()

    def forward(self, clip):
        return self.final_fc(self.final_bn(self.features(clip)))              # (6)


# ---- 4. clips: which frames (official files: dataset_3d.py, dataset_3d_lc.py) --------------------

class Video(NamedTuple):
    name: str                             # <Class>/<video>
    label: int
    length: int = 0                       # number of frames, 0: unknown
    path: Path | None = None              # a file, or a folder of frames


def frames_needed(args):
    """N·stride. A video must have more frames than this."""
    return args.num_frames * args.stride


def consecutive_clips(args, length):
    """Frame numbers of clips that follow one another, (clips, N); an incomplete one is dropped."""
    numbers = np.arange(0, length, args.stride)
    clips = len(numbers) // args.num_frames
    return numbers[:clips * args.num_frames].reshape(clips, args.num_frames)


def read_frames(video, numbers, crop):
    """Frames with a short side of 15/14·crop (240 for 224).    -> (T, 3, h, w) uint8

    A number past the end of the video gives its last frame.
    NOTE: as in extract_frame.py, scaling does not antialias; the noise of its jpg files is missing.
    OpenCV's result is 1/8 of a grey level darker on average, so 1/8 is subtracted.
    """
    frames = common.read_frames(video.path, np.minimum(numbers, video.length - 1))
    x, side = torch.from_numpy(frames).permute(0, 3, 1, 2), crop * 15 // 14
    if min(x.shape[2:]) != side:
        x = (TF.resize(x.float(), [side], antialias=False) - 1 / 8).round().byte()
    return x


def read_random_clip(args, video, rng):
    """N frames from a random start, `stride` apart.    -> (N, 3, h, w) uint8"""
    start = rng.integers(max(1, video.length - frames_needed(args)))
    return read_frames(video, start + args.stride * np.arange(args.num_frames), args.crop)


def make_test_clips(args, videos, i, rng=None, middle=False):
    """The centre of all clips of a video, {"clips": (clips, N, 3, S, S) uint8}.

    A short video is extended to one clip by its last frame.
    """
    numbers = consecutive_clips(args, max(videos[i].length, frames_needed(args) + 1))
    numbers = numbers[len(numbers) // 2][None] if middle else numbers
    x = TF.center_crop(read_frames(videos[i], numbers.ravel(), args.crop), [args.crop])
    return {"clips": resize_nearest(x, args.img_dim).unflatten(0, numbers.shape)}


def make_middle_clip(args, videos, i, rng=None):
    """The centre of a video's middle clip, {"clip": (N, 3, S, S) uint8, "label"}."""
    clip = make_test_clips(args, videos, i, middle=True)["clips"][0]
    return {"clip": clip, "label": videos[i].label}


# ---- 5. clips: what they look like (official file: Utils/augmentation.py) ------------------------

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
JITTER = np.array([0.5, 0.5, 0.5, 0.25])  # half ranges: three factors 1 ± 0.5, hue shift ± 0.25


def resize_nearest(x, size):
    """Square frames resized to the nearest pixel.    (T, 3, crop, crop) -> (T, 3, size, size)

    NOTE: the default of the release's transform. Pillow chooses the pixels: from 224 to 196 every
    seventh is a tie, which only Pillow rounds as the release does.
    """
    ramp = Image.fromarray(np.arange(x.shape[-1], dtype=np.int32)[None])
    pixels = np.asarray(ramp.resize((size, 1), Image.Resampling.NEAREST))[0]
    frames = x.permute(0, 2, 3, 1).numpy()                    # (T, H, W, 3), the order in memory
    return torch.from_numpy(frames[:, pixels].take(pixels, 2)).permute(0, 3, 1, 2)


def random_sized_crop(x, rng, crop):
    """A random 50 to 100 % of the area, resized to crop x crop; the centre if ten tries fail."""
    height, width = x.shape[2:]
    for _ in range(10):
        area, aspect = rng.uniform(0.5, 1) * width * height, rng.uniform(3 / 4, 4 / 3)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        w, h = (h, w) if rng.random() < 0.5 else (w, h)
        if w <= width and h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return TF.resized_crop(x, top, left, h, w, [crop, crop])
    return TF.center_crop(TF.resize(x, [crop]), [crop])


def draw_jitter(rng, n):
    """For each of n frames: three factors and a hue shift (n, 4), and their order (n, 4)."""
    factors = rng.uniform(-JITTER, JITTER, (n, 4)) + (1, 1, 1, 0)
    return factors.astype(np.float32), np.stack([rng.permutation(4) for _ in range(n)])


def make_pretrain_clip(args, videos, i, rng):
    """One flip and crop per clip; grey and colour jitter per frame (main.py).

    "clip": (N, 3, S, S) uint8; "factors", "order": (N, 4), of the jitter on the device. Half of the
    frames become grey: one of their channels replaces all three.
    """
    x = read_random_clip(args, videos[i], rng)
    N, _, height, width = x.shape
    x = x.flip(-1) if rng.random() < 0.5 else x
    left, top = rng.integers(width - args.crop + 1), rng.integers(height - args.crop + 1)
    x = resize_nearest(x[..., top:top + args.crop, left:left + args.crop], args.img_dim)
    grey, channel = rng.random(N) < 0.5, rng.integers(3, size=N)
    channels = np.where(grey[:, None], channel[:, None], np.arange(3))        # (N, 3)
    factors, order = draw_jitter(rng, N)
    return {"clip": x.numpy()[np.arange(N)[:, None], channels], "factors": factors, "order": order}


def make_finetune_clip(args, videos, i, rng):
    """One flip, sized crop and, with probability 0.3, colour jitter per clip (test.py)."""
    x = random_sized_crop(read_random_clip(args, videos[i], rng), rng, args.crop)
    x = resize_nearest(x, args.img_dim)
    x = x.flip(-1) if rng.random() < 0.5 else x
    factors, order = draw_jitter(rng, 1)
    order = order if rng.random() < 0.3 else np.full_like(order, -1)          # -1: no operation
    return {"clip": x, "factors": factors.repeat(len(x), 0), "order": order.repeat(len(x), 0),
            "label": videos[i].label}


def jitter(x, factors, order):
    """Change the colours of each frame by its own factors, in its own order. Writes into x.

    x: (n, 3, H, W) in [0, 1]; factors: (n, 4); order: (n, 4) on the CPU, so that nothing waits for
    a GPU. Like Pillow's ImageEnhance, but batched, without rounding, and on any device.
    """
    for slot, operation in itertools.product(order.T, range(4)):              # first slot to last
        rows = torch.from_numpy(np.flatnonzero(slot == operation)).to(x.device, non_blocking=True)
        f, y = factors[rows, operation, None, None, None], x[rows]
        if operation == HUE:
            x[rows] = shift_hue(y, f[:, 0])
            continue
        grey = sum(k * c for k, c in zip((0.299, 0.587, 0.114), y.unbind(1)))[:, None]
        other = {BRIGHTNESS: 0, CONTRAST: grey.mean((1, 2, 3), keepdim=True), SATURATION: grey}
        x[rows] = (f * y + (1 - f) * other[operation]).clamp(0, 1)
    return x


def shift_hue(x, shift):
    """Rotate the hue by `shift` turns.    x: (n, 3, H, W) in [0, 1], shift: (n, 1, 1)"""
    high, low = x.amax(1), x.amin(1)
    span, (r, g, b) = (high - low).clamp(min=1e-8), x.unbind(1)
    h = torch.where(r == high, (g - b) / span,
                    torch.where(g == high, 2 + (b - r) / span, 4 + (r - g) / span)) / 6
    h = (h + shift) % 1
    k = [(n + 6 * h) % 6 for n in (5, 3, 1)]                  # HSV to RGB, one channel each
    return torch.stack([high - (high - low) * torch.minimum(i, 4 - i).clamp(0, 1) for i in k], 1)


def normalize(clips):
    """(..., 3, S, S) uint8 -> the network's input"""
    return TF.normalize(clips / 255, *common.IMAGENET)


def jitter_batch(batch, device):
    """The clips of a training batch on the device, jittered and normalised: (B, N, 3, S, S)."""
    clip, factors = (batch[k].to(device, non_blocking=True) for k in ("clip", "factors"))
    order = batch["order"].numpy().reshape(-1, 4)
    x = jitter(clip.flatten(0, 1) / 255, factors.flatten(0, 1), order)
    norm = torch.tensor(common.IMAGENET).to(device, non_blocking=True)
    return TF.normalize(x, *norm).view(clip.shape)


# ---- 6. lists of videos (official files: dataset_3d.py, dataset_3d_lc.py, write_csv.py) ----------

NAME = r"([^/\\]*\w[^/\\]*)"               # of a class or a video


def fields(pattern, form):
    """A function from a line to the groups of the pattern; a line of another form is an error."""
    def parse(line):
        match = re.fullmatch(pattern, line)
        if not match:
            raise ValueError(f"{line!r:.80} is not `{form}`")
        return match.groups()
    return parse


def read_ucf101(folder, split, fold):
    """([(class, video), ...], [class, ...]) of trainlist0K.txt or testlist0K.txt.

    The classes are in the order of their numbers in classInd.txt, which begin at 1.
    """
    numbers = common.read_lines(folder / "classInd.txt",
                                fields(rf"(\d{{1,4}})[ ,]+{NAME}", "<number> <Class>"))
    classes = {int(n): c for n, c in numbers}
    rows = common.read_lines(
        folder / f"{split}list{fold:02d}.txt",
        fields(rf"{NAME}/{NAME}\.avi(?:\s+\d+)?", "<Class>/<video>.avi [<number>]"))
    return rows, [classes.get(n + 1, "") for n in range(max(classes, default=0))]


def read_hmdb51(folder, split, fold):
    """([(class, video), ...], [class, ...]) of all <class>_test_splitK.txt.

    NOTE: the authors' file with the numbers of the classes was not published. Here the classes are
    in the order of their names.
    """
    ending, mark = f"_test_split{fold}.txt", {"train": "1", "test": "2"}[split]
    classes = sorted(f.name.removesuffix(ending) for f in folder.glob(f"*{ending}"))
    parse = fields(rf"{NAME}\.avi\s+([012])", "<video>.avi <0, 1 or 2>")     # 0: unused
    return [(c, video) for c in classes for video, found in common.read_lines(
        folder / f"{c}{ending}", parse) if found == mark], classes


def read_csv(folder, split, fold):
    """([(class, video, frames), ...], [class, ...]) of the authors' train_split0K.csv.

    Folders before <Class>/<video> are ignored. The classes are those of both lists of the split.
    """
    parse = fields(rf"(?:.*[/\\])?{NAME}[/\\]{NAME}[/\\]?,\s*(\d+)", "<root>/<Class>/<video>/,<N>")
    lists = {f: common.read_lines(f, parse) for f in folder.glob(f"*_split{fold:02d}.csv")}
    classes = sorted({c for rows in lists.values() for c, *_ in rows}, key=str.lower)
    return lists[folder / f"{split}_split{fold:02d}.csv"], classes


def read_list(args, split, fold):
    """([Video], [class]) of a list below --data: split "train" or "test", fold 1, 2 or 3.

    Classes are compared without case: HandstandPushups has v_HandStandPushups_g01_c01.avi.
    """
    official, reader = {"ucf101": (f"{split}list{fold:02d}.txt", read_ucf101),
                        "hmdb51": (f"*_test_split{fold}.txt", read_hmdb51)}[args.dataset]
    path = common.find(args.data, official, f"{split}_split{fold:02d}.csv")
    rows, classes = (read_csv if path.suffix == ".csv" else reader)(path.parent, split, fold)
    label = {c.lower(): n for n, c in enumerate(classes)}
    unknown = {c for c, *_ in rows if c.lower() not in label}
    if unknown or not rows:
        raise UserError(f"{path}: " + (f"class {min(unknown)} is not in classInd.txt" if unknown
                                       else f"lists no {split} videos"))
    return [Video(f"{c}/{video}", label[c.lower()], int(length[0]) if length else 0)
            for c, video, *length in dict.fromkeys(rows)], classes


def is_validation(dataset, names):
    """[bool] of training videos: those of the validation set. Each source is on one side only.

    UCF101: groups 24 and 25, which are training videos in all three splits. The clips of a group
    come from one source. HMDB51: every tenth source, which is the name up to _<class>_.
    """
    if dataset == "ucf101":
        return [bool(re.search(r"_g2[45]_c\d+$", name)) for name in names]
    sources = [video.split(f"_{c}_")[0] for c, video in (name.split("/") for name in names)]
    chosen = set(sorted(set(sources))[::10])
    return [source in chosen for source in sources]


def choose_videos(args, split):
    """([Video], [class]) of a list, for "train", "val" or "test".

    NOTE: the release chooses its checkpoint on a random part of the test list. --as_released does
    so on the whole test list, and trains on the whole train list.
    """
    tested = split == "test" or (split == "val" and args.as_released)
    videos, classes = read_list(args, "test" if tested else "train", args.split)
    if not tested and not args.as_released and args.stage != "test":
        heldout = is_validation(args.dataset, [v.name for v in videos])
        videos = [v for v, x in zip(videos, heldout) if x == (split == "val")]
    return videos, classes


def count_frames(args, videos, i, rng):
    """(number of frames, "") of a video, or (0, error). Of a folder, the csv gives the number."""
    path, listed = videos[i].path, videos[i].length
    try:
        return (listed if listed and path.is_dir() else common.count_frames(path)), ""
    except VideoError as e:
        return 0, str(e)


def read_videos(args, split):
    """([Video], [class]): the videos of a list that are there, at most --limit.

    Missing videos are counted. A broken one is an error in evaluation; in training its length is 0,
    and `common.Samples` replaces it.
    """
    listed, classes = choose_videos(args, split)
    paths = common.find_videos(args.data, "*", "*/*", frames=True)
    videos = [v._replace(path=paths[name]) for v in listed
              if (name := v.name.split("/")[1]) in paths]
    if len({v.path for v in videos}) < len(videos):
        raise UserError(f"{args.data}: videos of different classes have the same file name")
    missing, videos = len(listed) - len(videos), common.spread(videos, args.limit)
    counts = common.compute(args, videos, count_frames, f"counting frames, {split}")
    broken = [error for _, error in counts if error]
    if broken and (split != "train" or args.stage == "test"):
        raise UserError(broken[0])
    videos = [v._replace(length=n) for v, (n, _) in zip(videos, counts)]
    short = sum(0 < v.length <= frames_needed(args) for v in videos)
    if args.as_released:
        videos = [v for v in videos if v.length > frames_needed(args)]
    common.say(f"{split}: {len(videos)} of {len(listed)} videos; {missing} missing, {len(broken)} "
               f"broken, {short} too short ("
               f"{'left out' if args.as_released else 'their last frame is repeated'})")
    if not videos:
        raise UserError(f"{args.data}: none of the {len(listed)} {split} videos can be used, such "
                        f"as {listed[0].name if listed else '?'}.avi; README shows the folders")
    return videos, classes


# ---- 7. training (official files: CPCTrans/main.py, Evaluate/test.py) ----------------------------

SCHEDULE = {"pretrain": (100, 0.5), "finetune": (100, 0.1)}   # every n epochs: lr *= factor


def learning_rate(args, step, per_epoch):
    """Learning rate of a step; epochs count from 0."""
    epoch = step // per_epoch
    if args.train_what == "last":                             # linear probe, as MemDPC
        return args.lr * 0.1 ** sum(epoch >= e for e in (60, 80))
    every, gamma = SCHEDULE[args.stage]
    return args.lr * gamma ** (epoch // every)


def make_optimizer(args, model):
    """Adam. With --train_what ft, ResNet and Enc learn at a tenth of the rate."""
    groups = {1.0: [], 0.1: []}
    for name, p in model.named_parameters():
        slow = args.train_what == "ft" and name.startswith(("backbone.", "encoder."))
        groups[0.1 if slow else 1.0] += [p] if p.requires_grad else []
    return torch.optim.Adam([{"params": p, "scale": scale} for scale, p in groups.items() if p],
                            args.lr, weight_decay=args.weight_decay)


def make_parallel(args, device, model):
    """The network for all processes. NOTE: on GPUs, batch norm sees the whole batch, as on the one
    GPU of the release. On CPUs, it sees the share of a process.
    """
    if device.type == "cuda" and common.world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(memory_format=torch.channels_last)               # a step takes 0.8 of the time
    if args.compile:
        model.compile()
    return DDP(model)


def train(args, device):
    """Pre-train the network by (5), or fine-tune the classifier by cross-entropy."""
    history, _ = read_history(args)
    (videos, classes), (val, _) = read_videos(args, "train"), read_videos(args, "val")
    pretraining = args.stage == "pretrain"                    # which does not use the labels
    make = make_pretrain_clip if pretraining else make_finetune_clip
    dataset = common.Samples(args, videos, make)
    least = 2 if device.type == "cuda" else 2 * common.world_size()
    if not pretraining and args.batch_size < least:
        raise UserError("--batch_size: batch norm needs two videos, on CPUs two per process")
    torch.manual_seed(args.seed)                              # the same weights on every process
    model = (CPC(args) if pretraining else Classifier(args, len(classes))).to(device)
    load_init(args, model)
    ddp = make_parallel(args, device, model)
    optimizer = make_optimizer(args, model)
    saved = common.resume(args.out / "last.pt", args, len(dataset), model=model,
                          optimizer=optimizer)
    start, best = saved["step"], saved.get("best", {"val_top1": -math.inf})
    info = {"history": [*history, describe_run(args)], "classes": None if pretraining else classes}

    per_epoch = len(dataset) // args.batch_size
    steps = args.epochs * per_epoch
    log = common.Log(args, start, steps)
    ddp.train()
    for step, batch in log.steps(common.batches(args, dataset, device, start, steps)):
        lr = learning_rate(args, step, per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        common.seed_step(args.seed, step)                     # dropout repeats after a restart
        clip = jitter_batch(batch, device)                    # (B, N, 3, S, S)
        with common.autocast(device, args.precision):
            out = ddp(clip)                                   # ẑ and z, or class logits
        if pretraining:
            terms = info_nce(*out)
        else:
            rows = loss_and_topk(out, batch["label"].to(device, non_blocking=True))
            terms = {k: x.mean() for k, x in rows.items()}
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        ended = (step + 1) % per_epoch == 0
        saving = ended or (step + 1) % args.save_every == 0
        if saving or log.due(step):
            common.check_finite(step, model, terms["loss"])   # NaN stops the run before the update
        optimizer.step()

        metrics = {}
        if ended:
            common.share_buffers(model)
            metrics = validate(args, device, model.eval(), val)
            if not metrics["val_top1"] <= best["val_top1"]:
                best = metrics
                common.save(args.out / "best.pt", step + 1, args, model=model, **info)
            ddp.train()
        log(step, saving, **terms, lr=lr, **metrics)
        if saving:
            common.save(args.out / "last.pt", step + 1, args, samples=len(dataset), model=model,
                        optimizer=optimizer, best=best, **info)
    finish(args, {**best, "broken_training_samples": log.total("broken")}, info["history"])


def validate(args, device, model, videos):
    """{"val_loss", "val_top1", ...} of the middle clips of the validation set.

    Batches are the same on any number of processes. NOTE: the release augments validation clips.
    """
    def network(batch):
        out = model(normalize(batch["clip"][0]))
        rows = (metrics_per_video(*out) if args.stage == "pretrain"
                else loss_and_topk(out, batch["label"][0]))
        return {k: x[None] for k, x in rows.items()}

    n = math.ceil(len(videos) / args.batch_size)
    batches = common.Samples(args, [videos[k::n] for k in range(n)], make_validation_batch)
    rows = common.predict(args, device, batches, network, "val", batch_size=1)
    as_released = args.as_released and args.stage == "pretrain"
    return {f"val_{k}": mean_of_videos([*x], as_released) for k, x in rows.items()}


def make_validation_batch(args, batches, i, rng):
    """The middle clips of a batch of videos, {"clip": (B, N, 3, S, S), "label": (B,)}."""
    return default_collate([make_middle_clip(args, [video], 0) for video in batches[i]])


def mean_of_videos(batches, as_released):
    """Mean over all videos. NOTE: in pre-training, the release averages its last five batches."""
    batches = batches[-5:] if as_released else [torch.cat(batches)]
    return float(torch.stack([x.mean() for x in batches]).mean())


# ---- 8. test (official file: Evaluate/test.py) ---------------------------------------------------

def aggregate(logits):
    """A video's mean probabilities and mean logits over its clips.    (clips, K) -> (K,), (K,)"""
    return logits.softmax(-1).mean(0), logits.mean(0)


def video_metrics(prob, logits, label):
    """({"top1", "top5": %, "loss"}, confusion (K, K): [predicted][true]).    prob, logits: (V, K)

    NOTE: as released, top1 and top5 use the mean probabilities, loss and confusion the mean logits.
    """
    confusion = torch.zeros(prob.shape[1], prob.shape[1], dtype=torch.int64)
    confusion.index_put_((logits.argmax(1), label), torch.tensor(1), accumulate=True)
    top = {k: float(x.double().mean()) for k, x in topk(prob, label).items() if k != "top3"}
    return {**top, "loss": float(F.cross_entropy(logits, label))}, confusion


def evaluate(args, device):
    """Accuracy on a test list, and retrieval of training videos by test videos.

    NOTE: a checkpoint of pre-training has no classifier and gives retrieval alone. Its features,
    too, are those of a `Classifier`, with the ReLU before Enc.
    """
    history, trained = read_history(args)
    (videos, classes), (gallery, _) = read_videos(args, "test"), read_videos(args, "train")
    if trained and trained != classes:
        raise UserError(f"{args.init}: its classes ({trained[0]}, ...) are not those of "
                        f"{args.data} ({classes[0]}, ...)")
    model = Classifier(args, len(classes)).to(device).eval()
    tuned = "final_fc.1.weight" in common.read_weights(Path(args.init))
    common.load_weights(model, Path(args.init), LAYOUTS, [""] if tuned else PRETRAINED)

    metrics = evaluate_accuracy(args, device, model, videos, classes) if tuned else {}
    metrics |= evaluate_retrieval(args, device, model, videos, gallery, classes)
    listed, _ = read_list(args, "test", args.split)
    finish(args, {**metrics, "videos": len(videos)}, [
        *history, f"tested on {len(videos)} of the {len(listed)} videos of test list {args.split} "
        f"of {args.dataset}"])


def evaluate_accuracy(args, device, model, videos, classes):
    """Metrics of the mean probabilities over all clips; predictions.json and confusion.json."""
    def network(batch):                                       # (1, clips, N, 3, S, S), one video
        logits = torch.cat([model(normalize(x)) for x in batch["clips"][0].split(8)])
        prob, logits = aggregate(logits)
        return {"prob": prob[None], "logits": logits[None]}

    out = common.predict(args, device, common.Samples(args, videos, make_test_clips), network,
                         "test", batch_size=1)
    label = torch.tensor([v.label for v in videos])
    metrics, confusion = video_metrics(out["prob"], out["logits"], label)
    if common.rank() == 0:
        common.write_json(args.out / "predictions.json", [
            {"video": v.name, "class": classes[v.label], "predicted": classes[p.argmax()],
             "probability": round(float(p.max()), 6)} for v, p in zip(videos, out["prob"])])
        common.write_json(args.out / "confusion.json", {
            "classes": classes, "counts[predicted][true]": confusion.tolist()})
    return metrics


def evaluate_retrieval(args, device, model, videos, gallery, classes):
    """How often one of the nearest training videos has the class of the test video, in %."""
    def features(videos, what):
        rows = common.predict(args, device, common.Samples(args, videos, make_middle_clip),
                              lambda batch: {"features": model.features(normalize(batch["clip"]))},
                              what)
        return F.normalize(rows["features"], dim=1)           # (V, D)

    cosine = features(videos, "test videos") @ features(gallery, "training videos").T
    nearest = cosine.topk(min(20, len(gallery))).indices      # (V, 20)
    label = torch.tensor([v.label for v in videos])
    hit = torch.tensor([v.label for v in gallery])[nearest] == label[:, None]
    if common.rank() == 0:
        draw_retrieval(args, videos, gallery, nearest, classes)
    return {f"retrieval_top{k}": 100 * float(hit[:, :k].any(1).double().mean()) for k in (1, 5, 20)}


def draw_retrieval(args, videos, gallery, nearest, classes, rows=6, side=72):
    """retrieval.png: test videos on the left, the three nearest training videos beside each."""
    width, height = 3 * side + 12, side + 28
    image = Image.new("RGB", (4 * width, rows * height), "white")
    draw = ImageDraw.Draw(image)
    for row, i in enumerate(np.linspace(0, len(videos) - 1, rows).astype(int)):
        for column, video in enumerate([videos[i], *(gallery[k] for k in nearest[i, :3])]):
            clip, x, y = make_middle_clip(args, [video], 0)["clip"], column * width, row * height
            strip = torch.cat([clip[0], clip[len(clip) // 2], clip[-1]], 2).permute(1, 2, 0)
            image.paste(Image.fromarray(strip.numpy()).resize((3 * side, side)), (x, y))
            mark = "right: " if video.label == videos[i].label else "wrong: "
            draw.text((x, y + side + 4), (mark if column else "") + classes[video.label], "black")
    common.write(args.out / "retrieval.png", lambda f: image.save(f, "PNG"))


# ---- 9. checkpoints ------------------------------------------------------------------------------

PRETRAINED = ("backbone.", "encoder.", "agg.")                # what every checkpoint must have
LAYOUTS = [(), *(((r"^transEnc\.transEncoder\.", "encoder."), (rf"^agg\.{gru}\.", "agg."))
                 for gru in (r"cell_list\.0", "ConvGRUCell_00"))]         # the GRU has two names


def load_init(args, model):
    """Fill the network from --init. The last layers of a classifier stay random."""
    path = common.init_path(args, args.init)
    if path:
        common.load_weights(model, path, LAYOUTS, PRETRAINED, skip=("final_bn.", "final_fc."))


def read_settings(path):
    """{flag: value} that a checkpoint was made with, its "history" and its "classes".

    For other checkpoints the tensors show the network, except its heads: the release has 4. CPCTR
    has 2, and a transformer of one layer.
    """
    tensors, saved = common.read_weights(path), common.load_checkpoint(path)
    if {"args", "history", "classes"} <= saved.keys():
        return {**saved["args"], "history": saved["history"], "classes": saved["classes"]}
    layers = {m[1] for name in tensors if (m := re.search(r"ncoder\.layers\.(\d+)\.", name))}
    blocks = sum(f"backbone.layer1.{n}.conv1.weight" in tensors for n in range(3))
    if "backbone.conv1.weight" not in tensors or not blocks:
        raise UserError(f"{path}: is no checkpoint of CPCTrans, it has no backbone.conv1.weight")
    return {"net": ("resnet10", "resnet18", "resnet34")[blocks - 1], "layers": len(layers) or 2,
            "width": len(tensors["backbone.conv1.weight"]), "heads": 2 if len(layers) == 1 else 4,
            "history": [f"trained by others on unknown videos ({path.name})"], "classes": None}


def read_history(args):
    """([sentence, ...], [class, ...] or None): what the checkpoint of --init was trained on.

    It is an error if that was another split: its train list holds test videos of this one.
    """
    if args.init == "none":
        return (["not pre-trained"] if args.stage == "finetune" else []), None
    settings = read_settings(Path(args.init))
    for sentence in settings["history"]:
        other = re.search(rf"train list (?!{args.split} )(\d) of {args.dataset}", sentence)
        if other and not args.as_released:
            raise UserError(f"{args.init}: {sentence}; that list holds test videos of split "
                            f"{args.split}: use --split {other[1]}, or --as_released to accept it")
    return settings["history"], settings["classes"]


def describe_run(args):
    """The sentence on this run in its checkpoint's history."""
    done = {"pretrain": "pre-trained", "finetune": "fine-tuned"}[args.stage]
    heldout = {"ucf101": "groups 24 and 25", "hmdb51": "every tenth source"}[args.dataset]
    chosen = "TEST videos, as released" if args.as_released else f"{heldout} of it"
    return f"{done} on train list {args.split} of {args.dataset}, epoch chosen on {chosen}"


def finish(args, metrics, history):
    """metrics.json and a line of numbers, with the history beside them; the curve of a training."""
    common.finish(args, {**metrics, "protocol": "; ".join(history)})
    common.say("protocol:", "; ".join(history))
    if args.stage != "test":
        common.draw_curve(args, ["loss", "top1", "val_loss", "val_top1", "lr"])


# ---- 10. arguments -------------------------------------------------------------------------------

STAGES = {"pretrain": train, "finetune": train, "test": evaluate}


def recipe(chosen):
    """Defaults of the run that the flags name: as published, --tiny, or of the checkpoint."""
    stage = chosen.stage or ("test" if chosen.test else "finetune" if chosen.pretrain
                             else "pretrain")
    init = chosen.test or chosen.pretrain or chosen.init or {
        "pretrain": "none", "finetune": "runs/cpctrans_ucf101_pretrain/best.pt",
        "test": f"runs/cpctrans_{chosen.dataset}_finetune/best.pt"}[stage]
    values = {"stage": stage, "init": init, **PUBLISHED[stage], **NETWORK}
    if chosen.train_what == "last":
        values["epochs"] = 100
    if chosen.tiny:
        values |= {"net": "resnet10", "width": 16, "img_dim": 48, "crop": chosen.img_dim or 64,
                   "workers": 2, "log_every": 5, "save_every": 50, **TINY[stage]}
    if chosen.as_released and stage == "pretrain":
        values["split"] = 3                                   # NOTE: whatever split they test
    with contextlib.suppress(UserError):                      # `read_history` reports the error
        saved = {} if init == "none" else read_settings(Path(init))
        names = {*NETWORK} | ({"num_frames"} if stage == "test" else set())
        if saved.get("dataset") != chosen.dataset or (         # or as released: it is always 3
                chosen.as_released and saved["stage"] == "pretrain"):
            names.remove("split")
        values |= {name: saved[name] for name in names & saved.keys()}
    return values


def weights(name):
    """The value of --init and --pretrain."""
    return "none" if name == "random" else name


def parse_args(argv=None):
    p = common.Parser(__doc__, [*STAGES], ["ucf101", "hmdb51"])
    p.set_defaults(stage=None)                                # --pretrain and --test name one
    p.flag("split", int, "official split, the same in all stages (test.py)", [1, 2, 3])
    p.group("clips", "defaults: from --init, if it is ours; --num_frames: only in test")
    p.flag("num_frames", int, "frames per clip, N, predicted ones included (README)",
           also=["num_seq"])
    p.flag("stride", int, "frames from one frame of a clip to the next (main.py)", also=["ds"])
    p.flag("crop", int, "height and width of the crop in pixels; frames are first scaled to a "
           "short side of 15/14 of it (main.py)")
    p.flag("img_dim", int, "size the crop is scaled to; 128, 196 and 224 are published (README)")
    p.group("method", "defaults of --net to --pos: from --init, if it is a checkpoint")
    p.flag("init", str, "weights to start from: a checkpoint of ours, the release's or CPCTR's, or "
           "none", type=weights, metavar="FILE")
    p.flag("pretrain", str, "the same as --stage finetune --init FILE; none or random: from "
           "scratch (test.py)", type=weights, metavar="FILE")
    p.flag("net", str, "backbone (main.py)", ["resnet10", "resnet18", "resnet34"])
    p.flag("layers", int, "layers of the transformer; CPCTR has 1 (transformer_encoder.py)")
    p.flag("heads", int, "heads of its attention; CPCTR has 2 (transformer_encoder.py)")
    p.flag("attn", str, "a cell attends to: full: all frames; causal: its own and earlier ones; "
           "frame: its own (transformer_encoder.py)", ["full", "causal", "frame"])
    p.flag("pos", str, "positional encoding (transformer_encoder.py)", ["none", "sin"])
    p.flag("pred_step", 3, "number of predicted frames, P (README)")
    p.flag("dropout", 0.5, "dropout before the classifier (test.py)")
    p.flag("as_released", False, "with the authors' faults: pre-train on list 3, use whole train "
           "lists, choose the checkpoint on test videos (first by five batches), no short videos")
    p.flag("gpu", str, argparse.SUPPRESS)                     # of the original commands, ignored
    p.group("optimization", "Adam")
    p.flag("train_what", "ft", "only fine-tuning. ft: backbone and transformer at a tenth of --lr; "
           "last: linear probe; all: all at --lr (test.py)", ["ft", "last", "all"])
    p.flag("epochs", int, "passes over the training samples (main.py, test.py)")
    p.flag("batch_size", int, "samples per step over all processes; batch norm sees all of them, "
           "on CPUs those of its process (main.py, test.py)")
    p.flag("lr", float, "learning rate: x0.5 every 100 epochs, in fine-tuning x0.1, in a linear "
           "probe x0.1 at 60 and 80 (main.py, test.py)")
    p.flag("weight_decay", float, "weight decay, added to the gradient (main.py, test.py)",
           also=["wd"])
    p.group("evaluation")
    p.flag("test", str, "the same as --stage test --init FILE: accuracy and retrieval; only "
           "retrieval if FILE is from pre-training (test.py)", metavar="FILE")
    args = common.parse(p, recipe, argv)

    if args.test and args.stage != "test" or args.pretrain and args.stage != "finetune":
        p.error("--test is for --stage test, --pretrain for --stage finetune")
    if args.stage == "pretrain" and args.num_frames <= args.pred_step:
        p.error(f"--pred_step {args.pred_step}: must be less than --num_frames {args.num_frames}")
    if args.stage == "pretrain" and args.train_what == "last":
        p.error("--train_what is for --stage finetune")
    if 4 * args.width % args.heads:
        p.error(f"--heads {args.heads}: does not divide the {4 * args.width} channels")
    args.init = args.test or args.pretrain or args.init
    args.test = args.pretrain = args.gpu = None
    if args.stage == "pretrain":
        args.train_what = "all"
    return args


def main(args):
    device = common.start_run(args)
    STAGES[args.stage](args, device)


if __name__ == "__main__":
    common.launch(main, parse_args())
