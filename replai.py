"""RepLAI: Learning State-Aware Visual Representations from Audible Interactions (Mittal, Morgado,
Jain, Gupta), NeurIPS 2022, arXiv:2209.13583.   Official code: HimangiM/RepLAI, commit 9561802.

First-person video is long and mostly uneventful. When hands touch objects, we can hear it. RepLAI
finds these moments of interaction (MoI) in the sound, and takes a short clip before and a short
clip after each moment. A video and an audio network are trained on them with two losses.
Audio-visual correspondence (AVC): each clip must match its own sound. Audible state change (AStC):
the change from before to after must match the sound, and the reversed change must not.

    c_j        = mean_ω [(L_ωj - mean_j L_ωj) / std_j L_ωj]                                    (1)
                 L: log spectrogram, frequencies ω and times j; a moment t is a peak of c
    v_l, v_r   = clips [t-d-0.5, t-d] and [t+d, t+d+0.5] s;   a = sound [t-1, t+1] s           (2)
    z, s; y, q = h_z(f_V(v)), h_s(f_V(v)); h_y(f_A(a)), h_q(f_A(a))       n(x) = x / |x|       (3)
    L_AVC      = ½ mean -log softmax_m(n(z_i)·n(y_m) / τ)_i   clip i against all sounds m
               + ½ mean -log softmax_m(n(y_i)·n(z_m) / τ)_i   sound i against all clips m      (4)
    p_fwd      = n(g(s_r - s_l))·n(q) / κ,     p_bwd = n(g(s_l - s_r))·n(q) / κ                (5)
    L_AStC     = ½ mean [-log σ(p_fwd) - log(1 - σ(p_bwd))]                                    (6)
    L          = ½ L_AVC + ½ L_AStC                                                            (7)

The line that computes a formula ends in its number. h_z, h_y, h_s, h_q and g are heads of two
layers: video_clr, audio_clr, video_aot, audio_aot and aot_diff in the code.

Pre-train    torchrun --nproc_per_node 8 replai.py --dataset ego4d --data data/ego4d
             torchrun --nproc_per_node 4 replai.py --dataset epic --data data/epic
EPIC         torchrun --nproc_per_node 4 replai.py --stage linear --dataset epic
Ego4D        torchrun --nproc_per_node 8 replai.py --stage recognition
             the same with --stage anticipation and --stage statechange
Moments      python replai.py --stage moments --dataset ego4d      only find them, and draw some
Convert      python replai.py --stage convert --init FILE          f_V for the Ego4D tools
Try it       python replai.py --data data/toy/ego4d --tiny         (CPU, minutes; `make toy` first)

The method comes first, up to its training loop; then each evaluation has its own section. We had
only the abstract of the paper. Files named here belong to the official code. NOTE marks where we
differ from them; "ours" is a choice that is in neither.
"""

import collections
import functools
import io
import itertools
import json
import math
import re
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import common
from common import UserError, VideoError

CLIP_SECONDS = 0.5              # length of the clip before and of the clip after a moment
SOUND_SECONDS = 2.0             # length of the sound around a moment
SOUND_RATE = 16000              # samples per second that f_A's input is made from
SEGMENT_SECONDS = 10.0          # videos are cut into segments; a sample is a moment of a segment
KAPPA = 0.2                     # temperature of L_AStC, fixed in the official criterion
SHORT_SIDES = 128 / 112, 180 / 112      # short side / crop: the range in training
DECODED = 256 / 112             # short side / crop: larger files are scaled down to it when read
AVID = ("https://dl.fbaipublicfiles.com/avid-cma/checkpoints/"
        "AVID_Audioset_Cross-N1024_checkpoint.pth.tar")

RECIPE = "epochs", "batch_size", "lr", "weight_decay", "num_frames", "crop"
PUBLISHED = {      # commands/*.sh. NOTE: statechange has the benchmark's, RepLAI's is not released
    ("pretrain", "ego4d"):     (100, 512, 0.05, 1e-4, 8, 112),
    ("pretrain", "epic"):      (100, 128, 0.005, 1e-4, 8, 112),
    ("linear", "epic"):        (30, 128, 0.005, 0.0, 8, 112),
    ("recognition", "ego4d"):  (30, 32, 0.01, 1e-4, 32, 224),
    ("anticipation", "ego4d"): (50, 32, 0.01, 1e-4, 32, 224),
    ("statechange", "ego4d"):  (100, 256, 1e-4, 1e-4, 16, 225)}
TINY = {"pretrain": {"epochs": 60, "lr": 0.01}, "linear": {"epochs": 20, "lr": 0.05},
        "recognition": {"epochs": 10, "lr": 0.02, "num_frames": 16},
        "anticipation": {"epochs": 60, "lr": 3e-3, "num_frames": 8, "features": 64, "layers": 1},
        "statechange": {"epochs": 20, "lr": 0.01}}


# ---- 1. moments of interaction (official file: data/video_audiopeak_dataset.py) ------------------

def find_moments(x, sample_rate, prominence, distance=10):
    """(times (J,) in s, the curve c (J,), indices of its peaks) of a sound.    x: (channels, n)

    Times are 224 samples apart, 5 ms at 44.1 kHz, so peaks are at least 50 ms apart. The floor of
    1e-5 makes the result depend on loudness: x must stay in [-1, 1], as decoded.
    """
    from scipy import signal  # imported here: it takes a second

    if x.shape[1] < 256:                                      # shorter than one window
        return np.zeros(0), np.zeros(0), np.zeros(0, int)
    _, times, power = signal.spectrogram(x.mean(0), sample_rate)                      # (129, J)
    level = np.log10(power + 1e-5)
    z = (level - level.mean(1, keepdims=True)) / (level.std(1, keepdims=True) + 1e-5)
    curve = z.mean(0)                                                                 # (J,)  (1)
    return times, curve, signal.find_peaks(curve, distance=distance, prominence=prominence)[0]


def admissible(times, duration, delta, clip_seconds=CLIP_SECONDS):
    """True for the times whose two clips both lie within a segment.    (M,) -> (M,) bool"""
    margin = delta + clip_seconds
    return (margin <= times) & (times <= duration - margin)


# A function (args, items, i, rng) makes item i for `common.Samples` and `common.compute`.

def detect_moments(args, files, i, rng):
    """[[start, stop, [t, ...]], ...] of the segments of file i; t counts from the segment's start.
    [] without sound, None if the file cannot be read.
    """
    try:
        media, found = common.probe(files[i]), []
        if not media.sound:
            return []
        if not media.seconds:
            raise VideoError(f"{files[i]}: has no duration")
        starts = np.arange(0, media.seconds, SEGMENT_SECONDS).tolist()
        segments = [(a, min(a + SEGMENT_SECONDS, media.seconds)) for a in starts]
        for segment, (x, sample_rate) in zip(segments, read_sounds(files[i], segments)):
            times, _, peaks = find_moments(x, sample_rate, args.prominence)
            found.append([*segment, times[peaks].round(6).tolist()])
        return found
    except VideoError as e:
        print(f"warning: {e}; not used", flush=True)
        return None


def read_moments(args, files):
    """{file: what `detect_moments` returns}; the files are shared among all processes.

    They are kept in runs/replai_moments.json under a file's path, its size and --prominence, and
    written after every 256 files per process.
    """
    cache = Path("runs/replai_moments.json")
    keys = {f: f"{f.absolute()} {f.stat().st_size} {args.prominence:g}" for f in files}

    def cached():
        return common.read_json(cache) if cache.exists() else {}

    moments = common.gather({0: cached()} if common.rank() == 0 else {}, 1)[0]   # the same on all
    new, step = [f for f in files if keys[f] not in moments], 256 * common.world_size()
    for k in range(0, len(new), step):
        part = new[k:k + step]
        results = common.compute(args, part, detect_moments, f"moments, {len(new) - k} files left:")
        found = {keys[f]: x for f, x in zip(part, results) if x is not None}
        moments |= found
        if common.rank() == 0:
            common.write_json(cache, cached() | found)        # another run may have written, too
    return {f: moments.get(keys[f]) for f in files}


class Segment(NamedTuple):
    """At most ten seconds of a file. All times are seconds from the start of the file."""
    path: Path
    start: float
    stop: float
    moments: np.ndarray         # (M,) times whose clips lie within the segment, maybe none


def training_files(args):
    """The files to pre-train on: 10 s pieces in segments/ if there are any, else whole videos."""
    root, videos = args.data, common.find_videos(args.data / "segments", "")
    if args.dataset == "ego4d":
        videos = videos or common.find_videos(root, "") or common.find_videos(root, "clips")
    else:                                                     # EPIC: its training videos only
        videos = videos or epic_videos(root)
        video_id = {name: "_".join(name.split("_")[:2]) for name in videos}   # P01_01_000010_000020
        listed = set(common.read_table(root / "annotations" / "EPIC_100_train.csv",
                                       lambda row: row["video_id"]))
        videos = {name: path for name, path in videos.items() if video_id[name] in listed}
        common.say(f"{len({*video_id.values()} & listed)} of {len(listed)} training videos found")
    if not videos:
        raise UserError(f"{root}: no training videos (*.mp4) here; see README for the layout")
    return [videos[name] for name in sorted(videos)]


def find_segments(args):
    """The segments to train on."""
    files = common.spread(training_files(args), args.limit)   # N segments need at most N files
    moments, segments = read_moments(args, files), []
    rng = np.random.default_rng(args.seed)
    for path in files:
        for start, stop, times in moments[path] or ():
            duration = stop - start
            times = np.array(times if args.moi == "peaks" else rng.uniform(0, duration, 100))
            times = times[admissible(times, duration, args.delta_non_overlap)]
            if duration >= 2 * (args.delta_non_overlap + CLIP_SECONDS):       # both clips fit in
                segments.append(Segment(path, start, stop, start + times))
    segments = common.spread(segments, args.limit)
    silent, broken = [*moments.values()].count([]), [*moments.values()].count(None)
    empty = sum(not len(s.moments) for s in segments)
    common.say(f"{len(segments)} segments of {len(files)} files; {silent} files have no sound, "
               f"{broken} cannot be read; {empty} segments have no moment")
    if empty == len(segments):
        raise UserError(f"{args.data}: no moment of interaction found; lower --prominence")
    return segments


# ---- 2. sound around a moment (official file: data/audio_transforms.py) --------------------------

def log_mel(x, sample_rate, num_frames=125, mean=-7.03, std=4.66, floor=1e-10):
    """The input of f_A from a waveform: (channels, n) float32 -> (1, num_frames, 80).

    NOTE: the configuration says 128 frames, the training script 2 s / 16 ms = 125. Two seconds give
    124, a sound cut at the segment's border fewer; as released, frames are repeated to make 125.
    """
    x = resample(torch.as_tensor(x).mean(0), sample_rate, SOUND_RATE)     # (n,)
    level = mel_power(x).clamp(min=floor).log()                           # (80, frames)
    level = level.T[None, subsample(level.shape[1], num_frames)]          # (1, num_frames, 80)
    return (level - mean) / std


def subsample(have, want):
    """`want` indices evenly spread over 0 .. have-1, rounded down; they repeat if have < want."""
    return torch.linspace(0, have - 1, want).clamp(0, have - 1).long().numpy()


# ---- 3. clips before and after a moment (official file: data/video_transforms.py) ----------------

RESIZE = {"bilinear": {"mode": "bilinear", "antialias": True},            # as Pillow's BILINEAR
          "nearest": {"mode": "nearest-exact"},           # as Pillow's NEAREST, but for ties
          "tensor": {"mode": "bilinear", "antialias": False}}             # as torch and OpenCV


def frame_times(starts, seconds, num_frames):
    """A function from the frame rate to the times of `num_frames` frames of each clip, evenly
    spread over those that begin within [start, start + seconds).
    """
    def times(fps):
        picked = subsample(max(1, int(seconds * fps + 1e-6)), num_frames)
        first = [math.ceil(start * fps - 1e-3) for start in starts]
        return [(k + picked + 0.5) / fps for k in first]      # the middle of each frame
    return times


def resize_crop_flip(frames, size, x, y, crop, flip, how="bilinear"):
    """Resize to `size` (w, h), crop at x, y, mirror.    (T, H, W, 3) -> (3, T, crop, crop)"""
    v = torch.from_numpy(frames).permute(0, 3, 1, 2)                      # (T, 3, H, W), a view
    if (v.shape[3], v.shape[2]) != tuple(size):
        v = F.interpolate(v, size=(size[1], size[0]), **RESIZE[how])
    v = v[..., y:y + crop, x:x + crop]
    return (v.flip(-1) if flip else v).transpose(0, 1).contiguous()       # (3, T, crop, crop)


def short_side_to(width, height, side, as_released=False):
    """The new (width, height) whose short side is `side`, a real number. NOTE: in training the
    release exchanges width and height, 426x240 becomes 150x266; --as_released does, too.
    """
    short = min(width, height)
    w, h = int(width / short * side), int(height / short * side)
    return (h, w) if as_released else (w, h)


def augment(frames, rng, crop, side, as_released=False, how="bilinear"):
    """Training: short side to `side`, one random crop and flip for all frames of a clip."""
    size = short_side_to(frames.shape[2], frames.shape[1], side, as_released)
    x, y = (int(rng.integers(0, s - crop + 1)) for s in size)
    return resize_crop_flip(frames, size, x, y, crop, rng.random() < 0.5, how)


def center_crop(frames, crop, how="nearest"):
    """Evaluation: short side to 128 for a crop of 112, 256 for 224, then the crop in the middle."""
    size = short_side_to(frames.shape[2], frames.shape[1], int(SHORT_SIDES[0] * crop + 1e-6))
    x, y = (round((s - crop) / 2) for s in size)
    return resize_crop_flip(frames, size, x, y, crop, False, how)


def make_moment(args, segments, i, rng):
    """A training sample: clips before and after a random moment of segment i, and the sound.

    before, after: (3, T, crop, crop) uint8; sound: (1, 125, 80). As released, a segment without a
    moment is replaced by another one.
    """
    s, d = segments[i], args.delta_non_overlap
    while not len(s.moments):
        s = segments[rng.integers(len(segments))]
    t = rng.choice(s.moments)
    clips = frame_times([t - d - CLIP_SECONDS, t + d], CLIP_SECONDS, args.num_frames)      # (2)
    before, after = (
        augment(v, rng, args.crop, rng.uniform(*SHORT_SIDES) * args.crop, args.as_released)
        for v in common.read_clip(s.path, clips, math.ceil(DECODED * args.crop)))
    x, sample_rate = read_audio(s.path, max(s.start, t - SOUND_SECONDS / 2),
                                min(s.stop, t + SOUND_SECONDS / 2))                        # (2)
    return {"before": before, "after": after, "sound": log_mel(x, sample_rate)}


# ---- 4. networks (official files: models/, criterions/ssrl_audiopeak_aotv2.py) -------------------

def head(d_in, d_hidden, d_out):
    """Linear - ReLU - Linear, xavier-uniform weights."""
    layers = nn.Sequential(nn.Linear(d_in, d_hidden), nn.ReLU(), nn.Linear(d_hidden, d_out))
    for layer in (layers[0], layers[2]):
        nn.init.xavier_uniform_(layer.weight)
    return layers


class RepLAI(nn.Module):
    """The video network f_V, the audio network f_A and the five heads; names as released.

    NOTE: AVID trained its f_A on 200x257 spectrograms in dB; here it sees 125x80 log-mel frames.
    """

    def __init__(self, width=64, depth=18, out_dim=128):
        super().__init__()
        self.backbone = nn.ModuleDict({"video": common.R2Plus1D(width, depth),        # f_V
                                       "audio": common.SpectrogramCNN(width)})        # f_A
        d = self.backbone["video"].out_dim                                            # 512
        self.mlp = nn.ModuleDict({
            "video_clr": head(d, d, out_dim), "audio_clr": head(d, d, out_dim),       # h_z, h_y
            "video_aot": head(d, d, out_dim), "audio_aot": head(d, d, out_dim),       # h_s, h_q
            "aot_diff": head(out_dim, d, out_dim)})                                   # g

    def change(self, s_l, s_r):
        """g of the change of state and of the reversed change. g is not odd, so it runs twice."""
        return self.mlp["aot_diff"](s_r - s_l), self.mlp["aot_diff"](s_l - s_r)

    def forward(self, v_l, v_r, a):
        """Clips (B, 3, T, H, W) each and sound (B, 1, 125, 80) -> the vectors that the losses take:
        z (2, B, 128) of both clips, and y, g_fwd, g_bwd, q (B, 128) each. None is normalised yet.
        Both clips go through f_V in one pass, so batch norm sees them together.
        """
        v = self.backbone["video"](torch.cat([v_l, v_r])).amax((2, 3, 4))             # (2B, 512)
        a = self.backbone["audio"](a).amax((2, 3))                                    # (B, 512)
        z, s = self.mlp["video_clr"](v), self.mlp["video_aot"](v)                         # (3)
        y, q = self.mlp["audio_clr"](a), self.mlp["audio_aot"](a)                         # (3)
        g_fwd, g_bwd = self.change(*s.chunk(2))
        return {"z": z.unflatten(0, (2, -1)), "y": y, "g_fwd": g_fwd, "g_bwd": g_bwd, "q": q}


# Layouts of checkpoints, [(pattern in the file's names, replacement), ...]: RepLAI's, and AVID's.
PRETRAIN_LAYOUTS = [(), ((r"^video_model\.", "backbone.video."),
                         (r"^audio_model\.", "backbone.audio."))]


def video_layouts(prefix):
    """Layouts of every file that holds f_V, bare ones last; prefix: where our network keeps it."""
    return [(), ((r"^model\.", ""),), *(((old, prefix),) for old in (
        r"^backbone\.video\.", r"^video_model\.", r"^(model\.)?backbone\.", "^"))]


def load_init(args, model, layouts, required):
    """Load --init, unless the run continues. required: beginning of names that must be there."""
    path = common.init_path(args, args.init, {"avid": AVID})
    if path:
        common.load_weights(model, path, layouts, (required,))


# ---- 5. losses (official file: criterions/ssrl_audiopeak_aotv2.py) -------------------------------

def gather_constant(x):
    """x of all processes, without gradient: (..., B, D) -> (..., N, D), N = B · processes.

    NOTE: as released, this process's own x gets no gradient either, unless it is the only process.
    """
    return common.gather_rows(x.detach(), -2) if common.world_size() > 1 else x


def avc_loss(z, y, tau):
    """Audio-visual correspondence.      z: (2, B, D) clips before and after, y: (B, D) sounds

    A clip is compared with all sounds. A sound is compared with the `before` clips of all samples,
    then with the `after` clips of all samples. "All": of all processes. In float32.
    """
    z, y = F.normalize(z.float(), dim=-1), F.normalize(y.float(), dim=-1)
    clip_logits = (z @ gather_constant(y).T / tau).flatten(0, 1)                      # (2B, N)
    sound_logits = (y @ gather_constant(z).mT / tau).flatten(0, 1)                    # (2B, N)
    target = common.rank() * len(y) + torch.arange(len(y), device=y.device).repeat(2)
    return (F.cross_entropy(clip_logits, target) + F.cross_entropy(sound_logits, target)) / 2  # (4)


def astc_loss(g_fwd, g_bwd, q, kappa):
    """Audible state change.      g_fwd, g_bwd: (B, D) change and reversed change, q: (B, D) sound

    In float32. NOTE: the paper adds the two log terms; the code and we take half of it.
    """
    g_fwd, g_bwd, q = (F.normalize(x.float(), dim=-1) for x in (g_fwd, g_bwd, q))
    p_fwd, p_bwd = (g_fwd * q).sum(-1) / kappa, (g_bwd * q).sum(-1) / kappa           # (B,)  (5)
    # softplus(-p) = -log σ(p) and softplus(p) = -log(1 - σ(p))
    return (F.softplus(-p_fwd).mean() + F.softplus(p_bwd).mean()) / 2                      # (6)


# ---- 6. pre-training (official files: main.py, train_algo/ssrl.py) -------------------------------

def one_cycle(max_lr, epochs):
    """(learning rate, momentum) of each epoch: OneCycleLR takes one step before every epoch.

    NOTE: as released, momentum cycles between 0.95 and 0.85, 0.9 is not used, and the last epoch is
    one step past the cycle's end. With one epoch the rate is almost 0; ten epochs reach max_lr.
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
    """Self-supervised training of both networks."""
    segments = find_segments(args)
    dataset = common.Samples(args, segments, make_moment)
    torch.manual_seed(args.seed)                              # the same weights on every rank
    model = RepLAI(args.width, args.depth).to(device)
    load_init(args, model, PRETRAIN_LAYOUTS, "backbone.")
    if args.compile:
        model.compile()
    ddp = DDP(model)                                          # NOTE: batch norm is per process
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9,
                                weight_decay=args.weight_decay)               # also of norms
    saved = common.resume(args.out / "last.pt", args, len(dataset), model=model,
                          optimizer=optimizer)
    start = saved["step"]

    per_epoch = len(dataset) // args.batch_size
    steps, schedule = args.epochs * per_epoch, one_cycle(args.lr, args.epochs)
    log = common.Log(args, start, steps)
    ddp.train()
    for step, batch in log.steps(common.batches(args, dataset, device, start, steps)):
        lr, momentum = schedule[step // per_epoch]
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = lr, momentum
        batch = common.to_device(batch, device)
        v_l, v_r = (common.normalize(batch[k], *common.IMAGENET) for k in ("before", "after"))
        with common.autocast(device, args.precision):
            out = ddp(v_l, v_r, batch["sound"])
        avc = avc_loss(out["z"], out["y"], args.tau)
        astc = astc_loss(out["g_fwd"], out["g_bwd"], out["q"], KAPPA)
        loss = args.clr_coeff * avc + args.aot_coeff * astc                                # (7)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        ended = (step + 1) % per_epoch == 0
        saving = ended or (step + 1) % args.save_every == 0
        if saving or log.due(step):
            common.check_finite(step, model, loss)            # NaN stops the run before the update
        optimizer.step()
        log(step, saving, loss=loss, avc=avc, astc=astc, lr=lr)
        if saving:
            common.save(args.out / "last.pt", step + 1, args, samples=len(dataset), model=model,
                        optimizer=optimizer)
    common.draw_curve(args, ["loss", "avc", "astc", "lr"])
    common.finish(args, {"broken_training_samples": log.total("broken")})
    draw_moments(args, segments)


# ---- 7. fine-tuning and evaluation: what the four tasks share ------------------------------------
#
# A task (sections 8 to 11) is a network around f_V. Beside `forward` its class has
#     files, splits      names of the annotation files, and of the three splits in them
#     prefix, pixels     beginning of the names of f_V's weights; mean and deviation of frames
#     make, make_test    one sample for training, one for evaluation
#     goal, sign         metric that chooses the epoch (None: the last), -1 if less is better
#     read, losses       samples of an annotation file; {part: loss}, to be added
#     predict            {name: (B, ...)}, which `metrics` and `submission` take

FPS = 30                        # of Ego4D's videos: its annotations count frames at this rate
ACTION_SECONDS = 32 * 2 / FPS   # length of a clip in recognition and anticipation


class Action(NamedTuple):
    """An action; in anticipation, four observed actions and the labels of the next twenty."""
    id: str                     # narration_id, or <clip_uid>_<action_idx> of the last one observed
    path: Path | None           # None: the video is missing
    spans: list                 # [(start, stop), ...] of the actions, seconds in the file
    verb: int | list            # class, or twenty classes
    noun: int | list


def read_action(args, action, fractions):
    """Frames (N·T, H, W, 3) of a clip in each of several actions, or of N clips in one action.
    fractions (N,): 0 for a clip at the start of its action, 1 for one at the end.
    """
    ego4d, clips = args.dataset == "ego4d", []
    seconds, side = (ACTION_SECONDS, 320 / 224) if ego4d else (CLIP_SECONDS, DECODED)
    spans = action.spans if len(action.spans) > 1 else action.spans * len(fractions)
    for fraction, (start, stop) in zip(fractions, spans):
        start += fraction * max(0.0, stop - start - seconds)
        clips += common.read_clip(action.path, frame_times([start], seconds, args.num_frames),
                                  math.ceil(side * args.crop))
    return np.concatenate(clips)


def make_action(args, actions, i, rng):
    """A training sample: clips at random places, with one scale, crop and flip for all of them.

    clip: ([actions,] 3, T, crop, crop) uint8. NOTE: Ego4D's tools normalise before they resize.
    """
    action, crop = actions[i], args.crop
    frames = read_action(args, action, rng.random(len(action.spans)))
    if args.dataset == "ego4d":
        clip = augment(frames, rng, crop, rng.integers(256, 321) / 224 * crop, how="tensor")
    else:
        clip = augment(frames, rng, crop, rng.uniform(*SHORT_SIDES) * crop, args.as_released)
    clip = clip.unflatten(1, (len(action.spans), -1)).transpose(0, 1)     # (actions, 3, T, H, W)
    return {"clip": clip.squeeze(0), "verb": np.array(action.verb), "noun": np.array(action.noun)}


def make_test_action(args, actions, i, rng):
    """A sample for evaluation: --clips of a single action, or the centre of each of several.

    clip: (N, 3, T, crop, crop). NOTE: the release takes one random clip of each (--as_released);
    its benchmark changed to the centre later.
    """
    n = len(actions[i].spans)
    fractions = (np.arange(args.clips) + 0.5) / args.clips if n == 1 else np.full(n, 0.5)
    if args.as_released:
        fractions = rng.random(n)
    how = "tensor" if args.dataset == "ego4d" else "nearest"
    clip = center_crop(read_action(args, actions[i], fractions), args.crop, how)
    return {"clip": clip.unflatten(1, (len(fractions), -1)).transpose(0, 1), "index": i}


def video_end(args, paths, i, rng):
    """Duration of a video, infinite if it is not known; a broken video is reported when read."""
    try:
        return common.probe(paths[i]).seconds or math.inf
    except VideoError:
        return math.inf


def read_split(args, task, split):
    """(samples, ids of those left out: no video here, or they begin after its end)."""
    path, testing = args.data / "annotations" / task.files.format(split), "test" in split
    if testing and (args.stage == "recognition" or not path.exists()):    # nothing to submit
        return [], []
    samples = [*{s.id: s for s in task.read(args, path, testing)}.values()]
    missing, present = [s for s in samples if not s.path], [s for s in samples if s.path]
    paths = sorted({s.path for s in present if s.spans[-1][0] > 0})       # cut files begin at 0
    ends = common.compute(args, paths, video_end, "videos")
    end = collections.defaultdict(lambda: math.inf, zip(paths, ends))
    late = [s for s in present if not s.spans[-1][0] < end[s.path]]       # or NaN
    used = [s._replace(spans=[(start, min(stop, end[s.path])) for start, stop in s.spans])
            for s in present if s.spans[-1][0] < end[s.path]]
    common.say(f"{path.name}: {len(used)} of {len(samples)} samples")
    for why, left_out in (("have no video here", missing),
                          ("begin after the end of their video", late)):
        if left_out:
            common.say(f"    {len(left_out)} {why} and are not used, the first is {left_out[0].id}")
    if not used and not testing:
        raise UserError(f"{path}: none of its samples has a video here; see README for the layout")
    return common.spread(used, args.limit), [s.id for s in missing + late]


def make_optimizer(args, model):
    """No weight decay on parameters with `bn` in their name. NOTE: as released, the batch norm of
    the stem, `conv1.1`, does decay.
    """
    named = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for k, p in named if "bn" not in k], "weight_decay": args.weight_decay},
              {"params": [p for k, p in named if "bn" in k], "weight_decay": 0.0}]
    if args.stage == "anticipation":
        return torch.optim.Adam(groups, lr=args.lr)
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=args.stage != "linear")


def learning_rate(args, step, per_epoch, milestones=(0.6, 0.8), warmup=1000, most=0.1):
    """linear: x0.1 at `milestones`, shares of the epochs. Ego4D's tasks: half a cosine after a
    linear warm-up of `warmup` steps, but at most the share `most` of the run; none in statechange.
    """
    epoch, steps = step // per_epoch, args.epochs * per_epoch
    if args.stage == "linear":
        return args.lr * 0.1 ** sum(epoch >= int(m * args.epochs) for m in milestones)
    warmup = 0 if args.stage == "statechange" else min(warmup, int(most * steps))
    if step < warmup:
        return args.lr * step / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def finetune(args, device):
    """Train a task's network from --init, then evaluate it. NOTE: as released, the best epoch
    is chosen on the validation set that is also reported; linear uses its last one.
    """
    torch.manual_seed(args.seed)                              # the same weights on every rank
    model = make_task(args).to(device)
    (train, _), val, test = (read_split(args, model, split) for split in model.splits)
    dataset = common.Samples(args, train, model.make)
    load_init(args, model, video_layouts(model.prefix), f"{model.prefix}conv")
    if args.compile:
        model.compile()
    ddp = DDP(model)                                          # NOTE: batch norm is per process
    optimizer = make_optimizer(args, model)
    saved = common.resume(args.out / "last.pt", args, len(dataset), free=("clips", "futures"),
                          model=model, optimizer=optimizer)
    start, best = saved["step"], saved.get("best", -math.inf)

    per_epoch = len(dataset) // args.batch_size
    steps = args.epochs * per_epoch
    log = common.Log(args, start, steps)
    ddp.train()
    for step, batch in log.steps(common.batches(args, dataset, device, start, steps)):
        lr = learning_rate(args, step, per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        common.seed_step(args.seed, step)                     # dropout repeats after a restart
        batch = common.to_device(batch, device)
        with common.autocast(device, args.precision):
            out = ddp(common.normalize(batch["clip"], *model.pixels))
        terms = model.losses(out, batch)
        loss = sum(terms.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        ended = (step + 1) % per_epoch == 0
        saving = ended or (step + 1) % args.save_every == 0
        if saving or log.due(step):
            common.check_finite(step, model, loss)            # NaN stops the run before the update
        optimizer.step()

        metrics = {}
        if ended and model.goal:
            if args.stage == "recognition":
                average_norms(args, model, device, dataset, step + 1 - per_epoch)
            value = evaluate(args, model, device, *val, "val")[model.goal]
            metrics = {f"val_{model.goal}": value}
            if not model.sign * value <= best:                # true for NaN, too
                best = model.sign * value
                common.save(args.out / "best.pt", step + 1, args, model=model)
            ddp.train()
        log(step, saving, loss=loss, **terms, lr=lr, **metrics)
        if saving:
            common.save(args.out / "last.pt", step + 1, args, samples=len(dataset), model=model,
                        optimizer=optimizer, best=best)
    common.barrier()                                          # rank 0 has written
    if model.goal:
        model.load_state_dict(common.load_checkpoint(args.out / "best.pt")["model"])
    metrics = evaluate(args, model, device, *val, "val", submit=True)
    common.draw_curve(args, ["loss", f"val_{model.goal}", "lr"])
    common.finish(args, {**metrics, "broken_training_samples": log.total("broken")})
    evaluate(args, model, device, *test, "test", submit=True)


@torch.no_grad()
def average_norms(args, model, device, dataset, step, batches=200):
    """As released, set batch norm to its means over 200 batches; evaluation uses rank 0's."""
    loader = common.batches(args, dataset, device, step, step + (4 if args.tiny else batches))
    clips = (common.normalize(batch["clip"].to(device), *model.pixels) for batch in loader)
    with common.autocast(device, args.precision):
        torch.optim.swa_utils.update_bn(clips, model)


def evaluate(args, model, device, samples, missing, split, submit=False):
    """Metrics of the validation set, {} of the test set; submit: also write <split>_<file>."""
    if not samples:                                           # of the test set
        return {}
    common.share_buffers(model)
    model.eval()
    dataset = common.Samples(args, samples, model.make_test)
    out = common.predict(args, device, dataset, lambda batch: model.predict(args, batch), split)
    if submit and common.rank() == 0:
        for name, content in model.submission(samples, missing, **out).items():
            common.write(args.out / f"{split}_{name}", content)
    if split == "test":
        return {}
    return {**model.metrics(args, samples, **out), "samples": len(samples)}


class VerbNounTask:
    """What the tasks about verbs and nouns share."""
    make, make_test = staticmethod(make_action), staticmethod(make_test_action)
    weight = 1.0                                              # of the losses

    def losses(self, out, batch):
        """Cross-entropies of logits (..., verbs), (..., nouns): means over all labels, x weight."""
        return {k: self.weight * F.cross_entropy(x.float().flatten(0, -2), batch[k].flatten())
                for k, x in zip(("verb", "noun"), out)}

    def mean_scores(self, batch, activation):
        """Scores (B, C) of verbs and of nouns: the means over an action's clips."""
        clips = common.normalize(batch["clip"], *self.pixels)             # (B, N, 3, T, H, W)
        return {k: activation(x.float()).unflatten(0, clips.shape[:2]).mean(1)
                for k, x in zip(("verb", "noun"), self(clips.flatten(0, 1)))}

    def submission(self, *_, **__):
        return {}                                             # there may be no official form


def classifier(d_in, d_out):
    """A linear layer in float32, weights N(0, 0.01), zero bias."""
    layer = common.LinearFP32(d_in, d_out)
    nn.init.normal_(layer.weight, 0, 0.01)
    nn.init.zeros_(layer.bias)
    return layer


def hits(scores, labels, k):
    """True where the label is among the k highest scores.    (R, C), (R,) -> (R,) bool"""
    best = torch.as_tensor(scores).topk(min(k, scores.shape[1]), 1).indices
    return (best == torch.as_tensor(labels)[:, None]).any(1).numpy()


def action_hits(verb, noun, verb_class, noun_class, k):
    """True where the pair (verb, noun) is among the k best by softmax(verb)·softmax(noun), (R,)
    bool. The k best pairs consist of the k best verbs and the k best nouns.
    """
    v, v_class = torch.as_tensor(verb).double().log_softmax(1).topk(min(k, verb.shape[1]), 1)
    n, n_class = torch.as_tensor(noun).double().log_softmax(1).topk(min(k, noun.shape[1]), 1)
    pair = (v[:, :, None] + n[:, None]).flatten(1)                        # (R, k·k)
    best = pair.topk(min(k, pair.shape[1]), 1).indices
    right = ((v_class.gather(1, best // n.shape[1]) == torch.as_tensor(verb_class)[:, None])
             & (n_class.gather(1, best % n.shape[1]) == torch.as_tensor(noun_class)[:, None]))
    return right.any(1).numpy()


def percent(right, rows=slice(None)):
    """Percentage of True in these rows, NaN without rows."""
    return 100.0 * float(right[rows].mean()) if len(right[rows]) else math.nan


# ---- 8. EPIC-KITCHENS-100: linear classifiers (official file: train_algo/linear_cls_mtl.py) ------

VERBS, NOUNS = 97, 300


def epic_videos(root):
    """{video id: path}, in any of the folder trees that downloads come in."""
    return common.find_videos(root, "videos", "videos/*", "P*/videos", "P*")


class LinearProbe(VerbNounTask, nn.Module):
    """Verb and noun classifiers on the frozen f_V; names as in the released checkpoints.

    NOTE: the release leaves the frozen batch norm in training mode; we do so with --as_released.
    """
    files, splits = "EPIC_100_{}.csv", ("train", "validation", "test_timestamps")
    prefix, pixels, goal, sign, weight = "backbone.", common.IMAGENET, None, 1, 0.5

    def __init__(self, width=64, depth=18, as_released=False, verbs=VERBS, nouns=NOUNS):
        super().__init__()
        self.backbone = common.R2Plus1D(width, depth).requires_grad_(False)
        self.as_released, d = as_released, self.backbone.out_dim
        self.fc = nn.ModuleDict({"verb_class": classifier(d, verbs),
                                 "noun_class": classifier(d, nouns)})

    def train(self, mode=True):
        nn.Module.train(self, mode)
        self.backbone.train(mode and self.as_released)
        return self

    def forward(self, clip):
        """(B, 3, T, H, W) -> logits (B, 97), (B, 300)"""
        x = self.backbone(clip).amax((2, 3, 4))                                       # (B, 512)
        return tuple(layer(x) for layer in self.fc.values())

    def read(self, args, path, testing):
        """`Action`s in files of action_segments/, which hold one each, or in whole videos."""
        cut, whole = common.find_videos(args.data / "action_segments", ""), epic_videos(args.data)

        def parse(row):
            stamps = row["start_timestamp"], row["stop_timestamp"]        # HH:MM:SS.ss
            start, stop = (sum(float(x) * 60 ** k for k, x in enumerate(s.split(":")[::-1]))
                           for s in stamps)
            name = "_".join([row["video_id"], *(re.sub("[:.]", "", s) for s in stamps)])
            verb, noun = (0, 0) if testing else (int(row["verb_class"]), int(row["noun_class"]))
            if not (start < stop and 0 <= verb < VERBS and 0 <= noun < NOUNS):
                raise ValueError(f"times {stamps} or classes {verb}, {noun} are not possible")
            span = (0.0, stop - start) if name in cut else (start, stop)
            return Action(row["narration_id"], cut.get(name) or whole.get(row["video_id"]),
                          [span], verb, noun)
        return common.read_table(path, parse)

    def predict(self, args, batch):
        """Logarithm of the mean softmax over an action's clips.    -> (B, 97), (B, 300)"""
        scores = self.mean_scores(batch, lambda x: x.softmax(-1))
        return {k: x.clamp_min(1e-30).log() for k, x in scores.items()}

    def metrics(self, args, actions, verb, noun):
        def column(name, key, kind=int):
            path = args.data / "annotations" / f"EPIC_100_{name}.csv"
            return common.read_table(path, lambda row: kind(row[key]))
        return epic_metrics(
            verb, noun, [a.verb for a in actions], [a.noun for a in actions],
            [a.id.split("_")[0] for a in actions], column("tail_verbs", "verb"),
            column("tail_nouns", "noun"),
            column("unseen_participant_ids_validation", "participant_id", str))

    def submission(self, actions, missing, verb, noun):
        """The challenge's zip; sls_*, the levels of supervision, are our choice."""
        results = {a.id: {kind: {str(c): round(x, 4) for c, x in enumerate(scores.tolist())}
                          for kind, scores in (("verb", v), ("noun", n))}
                   for a, v, n in zip(actions, verb, noun)}
        content = json.dumps({"version": "0.2", "challenge": "action_recognition", "sls_pt": 4,
                              "sls_tl": 3, "sls_td": 3, "results": results})
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as z:                 # ZipInfo: without the time of writing
            z.writestr(zipfile.ZipInfo("test.json"), content, zipfile.ZIP_DEFLATED)
        return {"submission.zip": file.getvalue()}


def epic_metrics(verb, noun, verb_class, noun_class, participant, tail_verbs, tail_nouns, unseen):
    """Accuracies in percent: the benchmark's (all_verb_accuracy_at_1), the paper's (verb@1).

    verb (R, 97) and noun (R, 300): scores. `tail_verb_...`: rows with a tail verb; `tail verb@k`:
    rows with a tail verb or a tail noun. NOTE: the release's `head` overlaps its tail, and its
    `unseen` keeps all rows; here head is what is not tail, unseen are unseen participants.
    """
    tail = {"verb": np.isin(verb_class, list(tail_verbs)),
            "noun": np.isin(noun_class, list(tail_nouns))}
    tail["action"], new = tail["verb"] | tail["noun"], np.isin(participant, list(unseen))
    metrics = {}
    for k in (1, 5):
        right = {"verb": hits(verb, verb_class, k), "noun": hits(noun, noun_class, k),
                 "action": action_hits(verb, noun, verb_class, noun_class, k)}
        for kind, hit in right.items():
            metrics[f"{kind}@{k}"] = metrics[f"all_{kind}_accuracy_at_{k}"] = percent(hit)
            metrics[f"tail_{kind}_accuracy_at_{k}"] = percent(hit, tail[kind])
            metrics[f"unseen_{kind}_accuracy_at_{k}"] = percent(hit, new)
            metrics[f"head {kind}@{k}"] = percent(hit, ~tail["action"])
            metrics[f"tail {kind}@{k}"] = percent(hit, tail["action"])
            metrics[f"unseen {kind}@{k}"] = percent(hit, new)
    return metrics


# ---- 9. Ego4D: action recognition (official files: ego4d-forecasting/) ---------------------------

EGO4D_SPLITS = ("train", "val", "test_unannotated")
FORECASTING = (0.45,) * 3, (0.225,) * 3        # mean and standard deviation in Ego4D's tools


def read_taxonomy(root):
    """(number of verbs, number of nouns): 115 and 478 in Ego4D v1, 117 and 521 in v2."""
    path = root / "annotations" / "fho_lta_taxonomy.json"
    return tuple(len(common.read_json(path, key=key)) for key in ("verbs", "nouns"))


def read_clips(args, path, testing):
    """[[Action, ...], ...]: the actions of each clip, ordered by action_idx."""
    videos, (verbs, nouns) = common.find_videos(args.data, "clips", ""), read_taxonomy(args.data)

    def parse(_, entry):
        verb, noun = (0, 0) if testing else (entry["verb_label"], entry["noun_label"])
        if not (0 <= verb < verbs and 0 <= noun < nouns):
            raise ValueError(f"verb {verb} or noun {noun} is not in the taxonomy")
        span = float(entry["action_clip_start_sec"]), float(entry["action_clip_end_sec"])
        uid, index = entry["clip_uid"], int(entry["action_idx"])
        return uid, index, Action(f"{uid}_{index}", videos.get(uid), [span], verb, noun)

    clips = {}
    for uid, index, action in common.read_json(path, parse, "clips"):
        clips.setdefault(uid, {})[index] = action
    return [[actions[index] for index in sorted(actions)] for actions in clips.values()]


class Recognition(VerbNounTask, common.R2Plus1D):
    """Verb and noun of a clip; names as in the forecasting tools (ego4d/models).

    NOTE: as released, mean pooling; pre-training and the linear evaluation take the maximum.
    """
    files, splits = "fho_lta_{}.json", EGO4D_SPLITS
    prefix, pixels, goal, sign = "", FORECASTING, "noun@1", 1

    def __init__(self, width=64, depth=18, num_classes=(115, 478)):
        super().__init__(width, depth)
        self.head = nn.Module()
        self.head.projections = nn.ModuleList(classifier(self.out_dim, n) for n in num_classes)

    def forward(self, clip):
        """(B, 3, T, H, W) -> logits (B, verbs), (B, nouns)"""
        x = super().forward(clip).mean((2, 3, 4))                                     # (B, 512)
        x = F.dropout(x, 0.5, self.training)
        return tuple(project(x) for project in self.head.projections)

    def read(self, args, path, testing):
        return [action for clip in read_clips(args, path, testing) for action in clip]

    def predict(self, args, batch):
        """Mean logits over an action's clips; the release adds them up.    -> (B, C) each"""
        return self.mean_scores(batch, lambda x: x)

    def metrics(self, args, actions, verb, noun):
        verbs, nouns = [a.verb for a in actions], [a.noun for a in actions]
        return {"verb@1": percent(hits(verb, verbs, 1)), "noun@1": percent(hits(noun, nouns, 1)),
                "verb@5": percent(hits(verb, verbs, 5)), "noun@5": percent(hits(noun, nouns, 5)),
                "action@1": percent(action_hits(verb, noun, verbs, nouns, 1))}


# ---- 10. Ego4D: long-term anticipation (official files: ego4d-forecasting/) ----------------------

INPUTS, FUTURE = 4, 20          # observed actions; Z, future actions to predict


def action_windows(actions, inputs, future):
    """[(observed, future actions)] of the windows that slide over a clip's actions. NOTE: as in the
    challenge, n - inputs - future windows, although one more would fit.
    """
    return [(actions[i:i + inputs], actions[i + inputs:i + inputs + future])
            for i in range(len(actions) - inputs - future)]


class Aggregator(nn.Module):
    """Features of the observed clips into one vector: (B, inputs, D) -> (B, out_dim)."""

    def __init__(self, kind, features, inputs, layers, heads=8):
        super().__init__()
        self.kind, self.out_dim = kind, features * (inputs if kind == "concat" else 1)
        if kind == "transformer":
            layer = nn.TransformerEncoderLayer(features, heads, 2048, 0.1)            # post-norm
            self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(features),
                                                 enable_nested_tensor=False)

    def forward(self, x):
        if self.kind == "concat":
            return x.flatten(1)
        if self.kind == "mean":
            return x.mean(1)
        x, d = x.transpose(0, 1), x.shape[2]                              # (inputs, B, D)
        angle = torch.arange(len(x), device=x.device)[:, None] * torch.exp(   # t / 10000^(2i/D)
            torch.arange(0, d, 2, device=x.device) * (-math.log(10000.0) / d))
        position = torch.stack([angle.sin(), angle.cos()], 2).view(-1, 1, d).to(x)
        return self.encoder(F.dropout(x + position, 0.2, self.training))[-1]   # of the last clip


class Anticipation(VerbNounTask, nn.Module):
    """The next Z actions after 4 observed ones; names as in the forecasting tools (lta_models.py).
    f_V is frozen as in `LinearProbe`, the linear layer on its pooled features is not.
    """
    files, splits = "fho_lta_{}.json", EGO4D_SPLITS
    prefix, pixels, goal, sign = "backbone.", FORECASTING, f"verb ED@{FUTURE}", -1

    def __init__(self, width=64, depth=18, num_classes=(115, 478), aggregator="transformer",
                 features=2048, layers=6, heads=8, inputs=INPUTS, future=FUTURE, as_released=False):
        super().__init__()
        self.num_classes, self.as_released = list(num_classes), as_released
        self.weight = future                                  # as released, a sum over the Z steps
        self.backbone = common.R2Plus1D(width, depth).requires_grad_(False)
        self.backbone.head, self.decoder = nn.Module(), nn.Module()
        self.backbone.head.projection = classifier(self.backbone.out_dim, features)
        self.clip_aggregator = Aggregator(aggregator, features, inputs, layers, heads)
        self.decoder.head = nn.Module()
        self.decoder.head.projections = nn.ModuleList(
            classifier(self.clip_aggregator.out_dim, sum(num_classes)) for _ in range(future))

    train = LinearProbe.train                                 # f_V is frozen here, too

    def encode(self, clips):
        """(B, inputs, 3, T, H, W) -> (B, inputs, D)"""
        x = self.backbone(clips.flatten(0, 1)).mean((2, 3, 4))
        x = self.backbone.head.projection(F.dropout(x, 0.5, self.training))
        return x.unflatten(0, clips.shape[:2])

    def forward(self, clips):
        """(B, inputs, 3, T, H, W) -> logits (B, Z, verbs), (B, Z, nouns)"""
        x = F.dropout(self.clip_aggregator(self.encode(clips)), 0.5, self.training)
        logits = torch.stack([p(x) for p in self.decoder.head.projections], 1)
        return logits.split(self.num_classes, 2)

    def read(self, args, path, testing):
        return [Action(observed[-1].id, observed[-1].path, [a.spans[0] for a in observed],
                       [a.verb for a in future], [a.noun for a in future])
                for actions in read_clips(args, path, testing)
                for observed, future in action_windows(actions, INPUTS, FUTURE)]

    def predict(self, args, batch):
        """K futures of verbs and of nouns, drawn independently.    -> (B, Z, K) each"""
        logits = self(common.normalize(batch["clip"], *self.pixels))
        return {kind: draw_futures(x.float(), args.futures, (args.seed, k), batch["index"])
                for k, (kind, x) in enumerate(zip(("verb", "noun"), logits))}

    def metrics(self, args, actions, verb, noun):
        """ED@Z and AUED of verbs, of nouns, and of actions: both must be right."""
        verbs, nouns = (torch.tensor([getattr(a, k) for a in actions]) for k in ("verb", "noun"))
        metrics = {}
        for kind, predicted, label in (("verb", verb, verbs), ("noun", noun, nouns), (
                "action", 10000 * verb + noun, 10000 * verbs + nouns)):
            ed, metrics[f"{kind} AUED"] = edit_metrics(predicted.numpy(), label.numpy())
            metrics[f"{kind} ED@{FUTURE}"] = float(ed[-1])
        return metrics

    def submission(self, actions, missing, verb, noun):
        """K lists of Z verbs and of nouns for each window. The challenge wants all windows: those
        left out get the first sample's prediction.
        """
        verb, noun = (x.int().mT.tolist() for x in (verb, noun))
        futures = {a.id: {"verb": v, "noun": n} for a, v, n in zip(actions, verb, noun)}
        return {"outputs.json": json.dumps(
            {**dict.fromkeys(missing, futures[actions[0].id]), **futures})}


def draw_futures(logits, num_futures, seed, items):
    """K futures (B, Z, K) from logits (B, Z, C): each step by itself, fixed by (seed, item)."""
    if num_futures == 1:
        return logits.argmax(-1, keepdim=True)                # the most likely one
    futures = []
    for p, item in zip(logits.softmax(-1).cpu(), items.tolist()):
        number = int(np.random.default_rng((*seed, item)).integers(2 ** 63))
        rng = torch.Generator().manual_seed(number)
        futures.append(torch.multinomial(p, num_futures, replacement=True, generator=rng))
    return torch.stack(futures)


def edit_distances(predicted, label):
    """Levenshtein distances of the first z actions, z = 1 .. Z.  (N, Z, K), (N, Z) -> (N, Z, K)
    NOTE: a comment of the benchmark names Damerau's distance, but in its code a swap costs 2.
    """
    n, length, k = predicted.shape
    d = np.zeros((length + 1, length + 1, n, k), np.int16)    # of the first i and the first j
    d[:, 0] = d[0] = np.arange(length + 1)[:, None, None]
    for i, j in itertools.product(range(1, length + 1), repeat=2):
        differ = predicted[:, i - 1] != label[:, j - 1, None]
        d[i, j] = np.minimum(np.minimum(d[i - 1, j], d[i, j - 1]) + 1, d[i - 1, j - 1] + differ)
    return np.stack([d[z, z] for z in range(1, length + 1)], 1)


def edit_metrics(predicted, label):
    """ED@z = mean_n min_k distance / z as (Z,), and AUED, the area under it by trapezoids / (Z-1).
    NOTE: a mean over samples; the release averages the means of batches.
    """
    z = np.arange(1, label.shape[1] + 1)
    ed = (edit_distances(predicted, label).min(2) / z).mean(0)
    return ed, float((ed[:-1] + ed[1:]).sum() / 2 / max(1, len(ed) - 1))


# ---- 11. Ego4D: state change and its key frame (official files: hands-and-objects/) --------------

class Change(NamedTuple):
    """A clip of about 8 s in which an object may change its state. Frames are counted at 30 fps."""
    id: str                     # unique_id
    path: Path | None           # of the whole video; None: it is missing
    spans: list                 # [(start, stop)], seconds in the video
    seconds: float              # length of the clip as annotated
    frames: tuple               # first and last frame in the video
    state: int                  # 1: change
    pnr: int                    # frame of the point of no return, -1 if there is none in the clip


def sample_frames(start, stop, num_frames):
    """The first `num_frames` multiples of ceil(n / num_frames) in start .. stop-1; if these are too
    few, of floor(n / num_frames).
    """
    n = stop - start
    for step in (-(-n // num_frames), max(1, n // num_frames)):
        frames = np.arange(-(-start // step) * step, stop, step)
        if len(frames) >= num_frames:
            return frames[:num_frames]
    return frames[np.arange(num_frames) % len(frames)]        # too few: they begin anew


def random_part(change, rng, min_frames):
    """(first, last) frame of a random part of 5 to 8 s, grown to keep the key frame.

    NOTE: the benchmark's np.random.uniform(8 - length) draws the start from [8 - length, 1] s. We
    draw from [0, 8 - length], which was probably meant.
    """
    (first, last), pnr, length = change.frames, change.pnr, rng.uniform(5, 8)
    begin = change.spans[0][0] + rng.uniform(0, 8 - length)
    start, stop = math.floor(FPS * begin), min(math.floor(FPS * (begin + length)), last)
    if stop - start < min_frames:                             # in a clip much shorter than 8 s
        return first, last
    return (first if 0 <= pnr < start else start), (last if pnr > stop else stop)


def read_state(args, change, frames):
    """The frames of these numbers, (3, T, crop, crop) uint8. NOTE: as released, resized to a square
    whatever the aspect ratio, from a short side of 384.
    """
    times = (frames + 0.5) / FPS                              # the middle of each frame
    (clip,) = common.read_clip(change.path, [times], math.ceil(384 / 225 * args.crop))
    return resize_crop_flip(clip, (args.crop, args.crop), 0, 0, args.crop, False, "tensor")


def make_state(args, changes, i, rng):
    """A training sample: 16 frames of 5 to 8 s, whether the state changes, and in which frame."""
    change, n = changes[i], args.num_frames
    frames = sample_frames(*random_part(change, rng, n), n)
    return {"clip": read_state(args, change, frames), "state": change.state,
            "keyframe": np.abs(frames - change.pnr).argmin(), "has_keyframe": change.pnr >= 0}


def make_test_state(args, changes, i, rng):
    """A sample for evaluation: 16 frames of the whole clip, (3, T, H, W)."""
    frames = sample_frames(*changes[i].frames, args.num_frames)
    return {"clip": read_state(args, changes[i], frames)}


class StateChange(nn.Module):
    """f_V without strides in time, so 16 frames stay 16, a key-frame head and a state head. Both
    see the last map average-pooled to 2 x 2 places. NOTE: names and heads are the benchmark's,
    whose network is an I3D-ResNet-50; how RepLAI's R(2+1)D kept 16 time steps is not known.
    """
    files, splits = "fho_oscc-pnr_{}.json", EGO4D_SPLITS
    prefix, goal, sign = "backbone.", "StCC acc", 1
    make, make_test = staticmethod(make_state), staticmethod(make_test_state)

    def __init__(self, width=64, depth=18, crop=225, as_released=False):
        super().__init__()
        self.backbone = common.R2Plus1D(width, depth, temporal_stride=1)
        side = -(-crop // 32)                                 # of the last map: 8 for 225
        self.pool = max(1, side - 1)
        d = 8 * width * (side - self.pool + 1) ** 2
        self.Keyframe_localisation_head, self.State_detection_head = nn.Module(), nn.Module()
        self.Keyframe_localisation_head.projection = classifier(d, 1)
        self.State_detection_head.projection = classifier(d, 2)
        self.pixels = ((0.0,) * 3, (1 / 255,) * 3) if as_released else common.IMAGENET   # 0 .. 255

    def forward(self, clip):
        """(B, 3, T, H, W) -> logits (B, T) of the key frame, (B, 2) of no change, change"""
        x = F.avg_pool3d(self.backbone(clip), (1, self.pool, self.pool), 1)   # (B, C, T, 2, 2)

        def drop_and_flatten(x):                                          # (B, T, 2·2·C)
            return F.dropout(x, 0.5, self.training).permute(0, 2, 3, 4, 1).flatten(2)
        keyframe = self.Keyframe_localisation_head.projection(drop_and_flatten(x))    # (B, T, 1)
        state = self.State_detection_head.projection(drop_and_flatten(x.mean(2, keepdim=True)))
        return keyframe.squeeze(2), state.squeeze(1)

    def read(self, args, path, testing):
        """[Change, ...]. NOTE: the release takes null for a change; --as_released."""
        videos = common.find_videos(args.data, "videos", "full_scale")

        def parse(_, entry):
            changed = None if testing else entry["state_change"]
            state = int(changed is not False if args.as_released else bool(changed))
            start, stop = float(entry["parent_start_sec"]), float(entry["parent_end_sec"])
            first, last = int(entry["parent_start_frame"]), int(entry["parent_end_frame"])
            if last - first < 2:
                raise ValueError(f"parent frames {first} to {last} leave no frames")
            pnr = entry.get("parent_pnr_frame") if state else None
            pnr = int(pnr) if pnr is not None and first <= pnr <= last else -1
            return Change(entry["unique_id"], videos.get(entry["video_uid"]), [(start, stop)],
                          stop - start, (first, last), state, pnr)
        return common.read_json(path, parse, "clips")

    def losses(self, out, batch):
        """keyframe = mean_b state_b · CE(logits_b, nearest frame to the point of no return)

        The mean is over all clips; those without a change or a known key frame count as zero.
        """
        keyframe, state = (x.float() for x in out)
        each = F.cross_entropy(keyframe, batch["keyframe"], reduction="none")
        return {"keyframe": (batch["state"] * batch["has_keyframe"] * each).mean(),
                "state": F.cross_entropy(state, batch["state"])}

    def predict(self, args, batch):
        """Probabilities (B, T) of the key frame, (B, 2) of no change and change."""
        out = self(common.normalize(batch["clip"], *self.pixels))
        return {k: x.float().softmax(1) for k, x in zip(("keyframe", "state"), out)}

    def metrics(self, args, changes, keyframe, state):
        """Accuracy in percent; seconds from the predicted to the annotated key frame."""
        label, pnr = np.array([c.state for c in changes]), np.array([c.pnr for c in changes])
        start, stop = np.array([c.frames for c in changes]).T
        fps = (stop - start + 1) / np.array([c.seconds for c in changes])
        error = np.abs(self.frame(changes, keyframe) - pnr) / fps
        error = error[(label == 1) & (pnr >= 0)]
        return {"StCC acc": percent(state.argmax(1).numpy() == label),
                "PNR err (s)": float(error.mean()) if len(error) else math.nan}

    def submission(self, changes, missing, keyframe, state):
        """Both files. NOTE: key frames count from the video's start; this could not be verified."""
        return {"oscc.json": json.dumps([{"unique_id": c.id, "state_change": bool(x)}
                                         for c, x in zip(changes, state.argmax(1))]),
                "pnr.json": json.dumps([{"unique_id": c.id, "pnr_frame": float(x)}
                                        for c, x in zip(changes, self.frame(changes, keyframe))])}

    @staticmethod
    def frame(changes, keyframe):
        """The most likely key frame. NOTE: as in the benchmark, frame k of T is at k/T of it."""
        start, stop = np.array([c.frames for c in changes]).T
        return start + keyframe.argmax(1).numpy() * (stop - start) / keyframe.shape[1]


def make_task(args):
    """The network of a stage, with random weights."""
    size, released = (args.width, args.depth), args.as_released
    if args.stage == "linear":
        return LinearProbe(*size, released)
    if args.stage == "statechange":
        return StateChange(*size, args.crop, released)
    if args.stage == "recognition":
        return Recognition(*size, read_taxonomy(args.data))
    return Anticipation(*size, read_taxonomy(args.data), args.aggregator, args.features,
                        args.layers, as_released=released)


# ---- 12. sound: reading, resampling, mel bands ---------------------------------------------------

# These decoders return the same samples with and without a seek to RUN_UP seconds earlier (except
# AAC's artificial noise, which is random by design). Other files are decoded from their start.
SEEKABLE, RUN_UP = ("aac", "mp3", "opus", "flac", "alac", "pcm"), 1


def audio_window(start, stop, sample_rate, total=None):
    """(first, end) samples between two times: floor(start·rate) .. floor(stop·rate) - 1."""
    first, end = max(0, math.floor(start * sample_rate)), math.floor(stop * sample_rate)
    return first, max(first, end if total is None else min(end, total))


def read_audio(path, start=0.0, stop=1e6):
    """((channels, n) float32 in [-1, 1], sample rate) of the sound between two times in seconds."""
    return next(read_sounds(path, [(start, stop)]))


def read_sounds(path, windows):
    """Yield what `read_audio` returns for each of several windows, ascending (start, stop).

    Times count from the first frame. A window equals its part of the whole sound, decoded in one
    go; it is shorter at the end of the file, and silent in gaps.
    """
    with common.opened(path) as (c, v):
        if not c.streams.audio:
            raise VideoError(f"{path}: has no sound")
        a = c.streams.audio[0]
        windows = [audio_window(*window, a.rate) for window in windows]
        frames = decode_sound(c, a, (v.start_time or 0) * v.time_base, windows[0][0])
        kept, reached = [], 0                                 # [(first sample, (channels, n)), ...]
        for first, end in windows:
            while reached < end and (frame := next(frames, None)):
                kept.append(frame)
                reached = frame[0] + frame[1].shape[1]
            kept = [(at, x) for at, x in kept if at + x.shape[1] > first]
            sound = np.zeros((a.channels, max(0, min(end, reached) - first)), np.float32)
            for at, x in kept:
                low, high = max(at, first), min(at + x.shape[1], first + sound.shape[1])
                if low < high:
                    sound[:, low - first:high - first] = x[:, low - at:high - at]
            if not np.isfinite(sound).all():
                raise VideoError(f"{path}: its sound holds NaN or Inf")
            yield sound, a.rate


def decode_sound(c, a, origin, first):
    """(place, (channels, n) float32) of the frames of sound from before sample `first` on.

    If time stamps are exact to a sample, they give each frame's place. If not, as in mkv and webm,
    the file is decoded from its start, and frames follow each other without gaps below 30 ms.
    """
    exact = a.time_base * a.rate <= 1
    if exact and a.codec_context.name.startswith(SEEKABLE) and first > 2 * RUN_UP * a.rate:
        c.seek(int((origin + Fraction(first, a.rate) - RUN_UP) / a.time_base), stream=a)
    floats, at, slack = av.AudioResampler("fltp"), None, (1 if exact else 0.03 * a.rate)
    for packet in c.demux(a):
        try:
            decoded = packet.decode()
        except av.InvalidDataError:                           # its time stays silent
            continue
        for frame in decoded:
            if frame.pts is not None:
                stamp = round((frame.pts * frame.time_base - origin) * a.rate)
                at = stamp if at is None or abs(stamp - at) > slack else at
            for x in floats.resample(frame):                  # same rate and channels
                yield at or 0, x.to_ndarray()
                at = (at or 0) + x.samples


@functools.lru_cache
def sinc_kernel(o, n, width=6, rolloff=0.99):
    """Windowed-sinc filters from rate o to rate n (coprime), one per output phase: (n, 1, taps).

    k[j, i] = sinc(u) cos²(πu / (2·width)) base / o,   u = clamp((i/o - j/n)·base, -width, width)
    width: half the filter's length in zero crossings.
    """
    base = rolloff * min(o, n)
    w = math.ceil(width * o / base)
    i = torch.arange(-w, w + o, dtype=torch.float64) / o
    j = torch.arange(n, dtype=torch.float64)[:, None] / n
    u = ((i - j) * base).clamp(-width, width)                             # (n, taps)
    k = torch.sinc(u) * torch.cos(math.pi * u / (2 * width)) ** 2 * base / o
    return k.float()[:, None], w


def resample(x, old, new):
    """Change the sample rate by a Hann-windowed sinc.    (n,) float32 -> (ceil(n·new/old),)"""
    if old == new or not len(x):
        return x
    o, n = old // math.gcd(old, new), new // math.gcd(old, new)
    kernel, w = sinc_kernel(o, n)
    y = F.conv1d(F.pad(x, (w, w + o))[None, None], kernel, stride=o)      # (1, n, frames)
    return y[0].T.flatten()[:math.ceil(n * len(x) / o)]                   # interleave the n phases


@functools.lru_cache
def mel_filterbank(bins, n_mels, low, high):
    """(bins, n_mels) triangles of height 1 on the HTK scale m = 2595 log10(1 + f/700)."""
    def mel(f):
        return 2595 * math.log10(1 + f / 700)

    f = torch.linspace(0, high, bins, dtype=torch.float64)[:, None]       # (bins, 1)
    m = torch.linspace(mel(low), mel(high), n_mels + 2, dtype=torch.float64)
    hz = 700 * (10 ** (m / 2595) - 1)
    left, mid, right = hz[:-2], hz[1:-1], hz[2:]
    up, down = (f - left) / (mid - left), (right - f) / (right - mid)
    return torch.minimum(up, down).clamp(min=0).float()


def mel_power(x, n_fft=512, hop=256, n_mels=80, sample_rate=SOUND_RATE):
    """Mel power spectrogram without centring.    (n,) -> (n_mels, 1 + (n - n_fft) // hop)"""
    x = F.pad(x, (0, max(0, n_fft - len(x))))
    spectrum = torch.stft(x, n_fft, hop, window=torch.hann_window(n_fft), center=False,
                          return_complex=True)                            # (n_fft/2 + 1, frames)
    fbank = mel_filterbank(n_fft // 2 + 1, n_mels, 0.0, sample_rate / 2)
    return fbank.T @ spectrum.abs().square()


# ---- 13. figure, and f_V for other tools ---------------------------------------------------------

def draw_moments(args, segments):
    """`moments.png`: the curve and the moments of a segment, frames around one of its moments."""
    if common.rank() > 0:
        return
    s = min((s for s in segments if len(s.moments)),          # a whole one with about 4 moments
            key=lambda s: (s.start - s.stop, abs(len(s.moments) - 4)))
    times, curve, _ = find_moments(*read_audio(s.path, s.start, s.stop), args.prominence)
    t, d = s.moments[len(s.moments) // 2], args.delta_non_overlap
    clips = frame_times([t - d - CLIP_SECONDS, t + d], CLIP_SECONDS, 4)
    try:
        strip = Image.fromarray(np.hstack(np.concatenate(common.read_clip(s.path, clips, 96))))
    except VideoError as e:
        return common.say(f"no moments.png: {e}")
    image = Image.new("RGB", (90 + strip.width, 250 + strip.height), "white")
    image.paste(strip, (70, 240))
    draw = ImageDraw.Draw(image)
    draw.text((70, 8), f"{s.path.name} from {s.start:.0f} s: curve c and its moments; four frames "
              f"before and four after {t:.2f} s", "black")
    box = (70, 45, 70 + strip.width, 200)
    common.plot(draw, box, times, {"c, over seconds": curve}, s.moments - s.start)
    common.write(args.out / "moments.png", lambda f: image.save(f, "PNG"))
    common.say(f"{args.out}/moments.png: moments of {s.path.name}")


def convert(args, device):
    """Write f_V of --init as checkpoint_latest-ego.pth, which the Ego4D tools read."""
    path = common.fetch(AVID, "--init FILE") if args.init == "avid" else Path(args.init)
    common.adopt(args, path, ("width", "depth"))
    model = common.R2Plus1D(args.width, args.depth)
    common.load_weights(model, path, video_layouts(""))
    if common.rank() == 0:
        common.write(args.out / "checkpoint_latest-ego.pth",
                     lambda f: torch.save({"state_dict": model.state_dict()}, f))
    common.say(f"done: {args.out}/checkpoint_latest-ego.pth")


# ---- 14. arguments -------------------------------------------------------------------------------

STAGES = {"pretrain": pretrain, "linear": finetune, "recognition": finetune,
          "anticipation": finetune, "statechange": finetune, "convert": convert,
          "moments": lambda args, device: draw_moments(args, find_segments(args))}


def recipe(chosen):
    """Defaults of the published run of a stage and dataset; smaller ones for --tiny."""
    stage, dataset = chosen.stage, chosen.dataset
    values = {"width": 64, "depth": 18, "features": 2048, "layers": 6,
              **dict(zip(RECIPE, PUBLISHED.get((stage, dataset), ())))}
    if stage == "anticipation":
        values["save_every"] = 5000                           # each has 2 GB
    if chosen.tiny:
        values |= {"crop": 56, "width": 16, "depth": 10, "batch_size": 16, "workers": 2,
                   "log_every": 5, "save_every": 20, "init": "none", **TINY.get(stage, {})}
    elif stage in TINY and stage != "pretrain":
        values["init"] = f"runs/replai_{dataset}_pretrain/last.pt"
    if stage in ("moments", "convert"):
        values["batch_size"] = None                           # nothing is trained
    return values


def parse_args(argv=None):
    p = common.Parser(__doc__, [*STAGES], ["ego4d", "epic"])
    p.group("clips")
    p.flag("num_frames", 8, "frames per clip, T (configs/data_augm; Ego4D's tasks: benchmark)")
    p.flag("crop", 112, "height and width of a clip in pixels (the same files)")
    p.group("method")
    p.flag("init", "avid", "weights to start from: avid (AudioSet, fetched once; the paper's), "
           "none (row `scratch`; default of --tiny), or a file: ours, RepLAI's, AVID's, a "
           "linear probe's, or bare weights of f_V")
    p.flag("moi", "peaks", "moments of interaction: peaks in the sound, or random times, the row "
           "w/o MoI (inferred)", ["peaks", "random"])
    p.flag("prominence", 1.0, "least height of a peak above its surroundings, in z-scores "
           "(official audio_event_prominence)")
    p.flag("delta_non_overlap", 0.1, "seconds from the moment to each clip, d (commands/*.sh)")
    p.flag("clr_coeff", 0.5, "weight of L_AVC; 0: the row w/o AVC (commands/*.sh)")
    p.flag("aot_coeff", 0.5, "weight of L_AStC; 0: the row w/o AStC (commands/*.sh)")
    p.flag("tau", 0.07, "temperature of L_AVC, τ (ssrl_audiopeak_aotv2.py)", least=1e-3)
    p.flag("as_released", False, "with the faults of the authors' code: width and height exchanged "
           "in training (pretrain, linear), frozen batch norm in training mode (linear, "
           "anticipation), one random clip per action in evaluation (all but statechange), pixels "
           "of 0 to 255, and null as a change (statechange)")
    p.group("optimization", "SGD with momentum; Adam for anticipation")
    p.flag("epochs", int, "passes over the training samples; OneCycle needs ten (commands/*.sh)")
    p.flag("batch_size", int, "samples per step over all processes; batch norm sees those of one "
           "(commands/*.sh)")
    p.flag("lr", float, "learning rate: peak of OneCycle (pretrain); x0.1 at 3/5 and 4/5 of the "
           "epochs (linear); half a cosine after a warm-up (Ego4D's tasks) (commands/*.sh)")
    p.flag("weight_decay", float, "weight decay; in fine-tuning not of `bn` layers (configs/optim)")
    p.group("evaluation")
    p.flag("clips", 1, "test clips per action in linear and recognition; 1: the centre (ours)")
    p.flag("aggregator", "transformer", "how anticipation joins its 4 clips (lta_models.py)",
           ["transformer", "concat", "mean"])
    p.flag("futures", 5, "futures drawn by anticipation, K; the best counts; 1: argmax (benchmark)")
    args = common.parse(p, recipe, argv)
    fitting = [dataset for stage, dataset in PUBLISHED if stage == args.stage]
    if fitting and args.dataset not in fitting:
        p.error(f"--stage {args.stage} needs --dataset {fitting[0]}")
    return args


def main(args):
    device = common.start_run(args, needs_data=args.stage != "convert")
    STAGES[args.stage](args, device)


if __name__ == "__main__":
    common.launch(main, parse_args())
