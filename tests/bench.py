"""`make bench`: medians of CPU seconds, on CUDA of seconds; ours and the reference take turns.

    python tests/bench.py [--only decode sample step]          (a minute on one core)

decode  a clip of 16 frames at 128 pixels, from files like those of the datasets. Reference: PyAV
        alone, from the key frame before the clip to its last frame, nothing converted
sample  what a worker makes ready for a batch. Reference: PyAV from the start of the file to the end
        of the sample, every frame converted to RGB
step    a training step of each script's default stage; on CUDA in bf16, with the memory it takes.
        Reference: the same step in plain PyTorch, see `plain`
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import av  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import toy  # noqa: E402
from scipy.ndimage import zoom  # noqa: E402
from torch import nn  # noqa: E402

import common  # noqa: E402
import cpctrans  # noqa: E402
import f2c_oops  # noqa: E402
import replai  # noqa: E402
import ssdet_coarsefine as ssdet  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
H264, XVID = {"preset": "veryfast", "crf": "23", "bf": "3"}, {"qmin": "4", "qmax": "6"}
FILES = {  # name: (width, height), fps, seconds, codec, options, frames from key to key
    "UCF101.avi": ((320, 240), 25, 7, "mpeg4", XVID, 12),
    "Kinetics.mp4": ((340, 256), 30, 10, "libx264", H264, 250),
    "Charades.mp4": ((640, 480), 24, 20, "libx264", H264, 250),
    "Ego4D.mp4": ((1280, 720), 30, 10, "libx264", H264, 250),
    "EPIC.mp4": ((1920, 1080), 50, 8, "libx264", H264, 250)}


def seconds(*jobs, repeats=5):
    """[median of how long each job takes]; the jobs take turns."""
    clock = time.perf_counter if CUDA else time.process_time

    def measure(job):
        began = clock()
        job()
        if CUDA:
            torch.cuda.synchronize()
        return clock() - began

    table = [[measure(job) for job in jobs] for _ in range(repeats + 1)][1:]   # the first: warm-up
    return [statistics.median(column) for column in zip(*table)]


# ---- decode ------------------------------------------------------------------------------------

def write_film(folder, name):
    """The file of that name: a panning texture with grain, and two clicks a second."""
    (w, h), fps, length, codec, options, gop = FILES[name]
    rng, path = np.random.default_rng(0), folder / name
    if path.exists():
        return path
    texture = zoom(rng.uniform(30, 225, (h // 16 + 2, w // 16 + 32, 3)), (16, 16, 1), order=1)
    grain = rng.normal(0, 4, (h, w, 1))
    click = np.concatenate([rng.uniform(-.5, .5, 400), 0.002 * rng.normal(size=21650)])
    sound = np.tile(click, 2 * length)[None].astype(np.float32)
    frames = ((texture[:h, x:x + w] + np.roll(grain, 97 * x, 1)).clip(0, 255).astype(np.uint8)
              for x in (k * 40 // fps % 500 for k in range(fps * length)))
    toy.write_video(path, frames, fps, None if codec == "mpeg4" else sound, codec=codec,
                    options=options, gop=gop)
    return path


def decode(path, start, stop, convert=False):
    """From the key frame before `start` to `stop`, by PyAV alone."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
        container.seek(int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if convert:
                frame.to_ndarray(format="rgb24")
            if frame.time >= stop:
                break


def decode_rows(folder):
    for name in FILES:
        path, times = write_film(folder, name), FILES[name][2] * 0.6 + np.arange(16) / 16
        ours, limit = seconds(partial(common.read_clip, path, [times], 128),
                              partial(decode, path, times[0], times[-1]))
        yield name, ours, limit, f"{1 / ours:.1f} clips/s"


# ---- samples -----------------------------------------------------------------------------------

def samples(script, folder):
    """(dataset of a script's default stage, its file, seconds of the file up to a sample's end)"""
    if script is replai:
        path = write_film(folder, "Ego4D.mp4")
        args = replai.parse_args(["--data", str(folder)])
        segment = replai.Segment(path, 0.0, 10.0, np.array([6.0]))
        return common.Samples(args, [segment], replai.make_moment), path, 6.6
    if script is cpctrans:
        path = write_film(folder, "UCF101.avi")
        args = cpctrans.parse_args(["--data", str(folder)])
        video = cpctrans.Video("Archery/UCF101", 0, 175, path)
        return common.Samples(args, [video], cpctrans.make_pretrain_clip), path, 3.5
    path = write_film(folder, "Kinetics.mp4")
    args = ssdet.parse_args(["--data", str(folder)])
    return common.Samples(args, [(path, 0)], lambda *a: ssdet.make_kinetics_clip(
        *a, args.num_frames, args.crop)), path, 6.0


def sample_rows(folder):
    for script in (replai, cpctrans, ssdet):
        dataset, path, stop = samples(script, folder)
        ours, naive = seconds(partial(dataset.__getitem__, (0, 0)),
                              partial(decode, path, 0, stop, convert=True))
        yield script.__name__, ours, naive, f"{1 / ours:.1f} samples/s per core"


# ---- steps -------------------------------------------------------------------------------------

def case(script, tiny, B):
    """(network, inputs, loss) of a script's default stage."""
    args, g = script.parse_args(["--tiny"] * tiny), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if script is replai:
        clips = [torch.randn(B, 3, args.num_frames, args.crop, args.crop) for _ in range(2)]
        return replai.RepLAI(args.width, args.depth), (*clips, torch.randn(B, 1, 125, 80)), (
            lambda out: replai.avc_loss(out["z"], out["y"], args.tau)
            + replai.astc_loss(out["g_fwd"], out["g_bwd"], out["q"], replai.KAPPA))
    if script is cpctrans:
        x = torch.randn(B, args.num_frames, 3, args.img_dim, args.img_dim)
        return cpctrans.CPC(args).to(memory_format=torch.channels_last), (x,), (
            lambda out: cpctrans.info_nce(*out)["loss"])
    if script is f2c_oops:
        D, label = 128 if tiny else 768, torch.arange(6 * B).to(DEVICE) % 8
        return f2c_oops.make_model(args, D, 8), (torch.randn(6 * B, 20, D),), (
            lambda out: f2c_oops.loss_of(args, None, out, label)["loss"])
    T, S = (args.num_frames, args.crop) if CUDA or tiny else (8, 112)
    choices = {name: ssdet.draw_choices(np.random.default_rng(0), name, T, B)
               for name in args.augment}
    label = torch.randint(1, 401, (1, B, 1), generator=g).transpose(0, 1).expand(-1, 1, T)
    mix = ssdet.augment(ssdet.unmixed(torch.randn(B, 3, T, S, S), label[:, 0]), choices)
    rest = [x.to(DEVICE) for x in mix[1:]]
    return ssdet.make_model(args, 401), (mix.x,), (
        lambda z: ssdet.pretraining_loss(z.float(), ssdet.Mixture(mix.x, *rest))[0])


def plain(script, model):
    """The same network without what the script does for speed."""
    model = copy.deepcopy(model)
    if script is replai:                                      # the clips one after the other
        video, both = model.backbone["video"], model.backbone["video"].forward
        video.forward = lambda x: torch.cat([both(half) for half in x.chunk(2)])
    if script is f2c_oops:                                    # padded to 64 tokens, as released
        unpadded = model.forward
        model.forward = lambda x: unpadded(F.pad(x, (0, 0, 0, 63 - x.shape[1])), torch.full(
            (len(x),), x.shape[1], device=x.device))
    if script is ssdet:
        for module in model.modules():                        # no memory order of its own
            if isinstance(module, (common.PointwiseConv, common.DepthwiseConv)):
                module.__class__ = nn.Conv3d
        stem, model.stem = model.stem, lambda x: stem(x).contiguous()
    return model.to(memory_format=torch.contiguous_format)


def training_step(model, inputs, loss):
    model, inputs = model.to(DEVICE).train(), [x.to(DEVICE) for x in inputs]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with common.autocast(DEVICE, "bf16" if CUDA else "fp32"):
            out = model(*inputs)
        loss(out).backward()
        optimizer.step()
    return step


def step_rows(folder):
    batches = {replai: (2, 64, 8), cpctrans: (1, 16, 8), f2c_oops: (2, 128, 16), ssdet: (2, 16, 8)}
    for script, (cpu, cuda, small) in batches.items():
        for tiny in (False, True):
            B = small if tiny else cuda if CUDA else cpu
            model, inputs, loss = case(script, tiny, B)
            reference = training_step(plain(script, model), inputs, loss)
            ours, plainly = seconds(training_step(model, inputs, loss), reference)
            memory = f", {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GB" if CUDA else ""
            yield (script.__name__ + " --tiny" * tiny, ours, plainly,
                   f"{B / ours:.1f} samples/s, batch {B}{memory}")


PARTS = {"decode": decode_rows, "sample": sample_rows, "step": step_rows}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    common.init_distributed()
    print(torch.cuda.get_device_name() if CUDA else "CPU", "| PyTorch", torch.__version__)
    print("| part | what | ours | reference | ours ÷ reference | |\n" + "| --- " * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            for name, ours, reference, rate in PARTS[part](Path(folder)):
                print(f"| {part} | {name} | {1000 * ours:.0f} ms | {1000 * reference:.0f} ms | "
                      f"{ours / reference:.2f} | {rate} |", flush=True)


if __name__ == "__main__":
    main()
