"""The files, readers and augmentations of `make bench`: one row per kind of file and per reader.

Pictures are a panning texture with sprites and sensor noise, made in the sizes, rates and codecs of
the datasets; each carries its number as a bar code, so a reader that is fast but wrong is seen.
"""

import contextlib
import importlib
import itertools
import os
import shutil
import subprocess
import sys
import time
import zlib
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from measure import Row, compare, cpu_paired, left_open, resident
from PIL import Image
from torchvision.transforms import functional as tf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import cpctrans
import replai
import ssdet_coarsefine
from common import VideoError, read_audio, read_clip

BITS = 12
CLIP, SIDE, FPS = 16, 128, 16                                 # of the clips that are compared


# ---- files -------------------------------------------------------------------------------------

class Kind(NamedTuple):
    """A kind of file: what it stands for, and how it is made."""
    name: str
    size: tuple[int, int]
    fps: int
    seconds: int
    options: dict
    codec: str = "libx264"
    bframes: int = 3
    times: int = 1                                            # how often the packets are repeated
    sound: bool = False
    most: float = 0.95                                        # of the limit, for a clip

    @property
    def file(self):
        return f"{self.name.split(',')[0].replace(' ', '_')}_{digest(self)}." + (
            "avi" if self.codec == "mpeg4" else "mp4")

    @property
    def length(self):
        return self.seconds * self.times


def digest(x):
    """A few letters that change with what something is, for names of files."""
    return f"{zlib.crc32(repr(x).encode()):08x}"


H264 = {"preset": "veryfast", "crf": "23", "x264-params": "keyint=250:scenecut=0"}
UCF = Kind("UCF101, avi 320x240", (320, 240), 25, 7, {"qmin": "4", "qmax": "6"}, "mpeg4", 0,
           most=1.3)
OOPS = Kind("Oops and Kinetics, mp4 340x256", (340, 256), 30, 10, H264 | {"preset": "medium"})
CHARADES = Kind("Charades, mp4 640x480", (640, 480), 24, 30, H264)
HD = Kind("720p, mp4 1280x720", (1280, 720), 30, 10, H264, sound=True)
EPIC = Kind("EPIC, mp4 1920x1080 at 50 fps", (1920, 1080), 50, 5, H264 | {"crf": "18"}, times=2)
EPIC_SMALL = Kind("EPIC small, mp4 456x256 at 60 fps", (456, 256), 60, 30, H264, sound=True)
EGO4D = Kind("Ego4D, mp4 1920x1080 of two minutes", (1920, 1080), 30, 10, H264, times=12,
             sound=True)
KINDS = (UCF, OOPS, CHARADES, HD, EPIC, EPIC_SMALL, EGO4D)


def picture(kind, k, texture, grain):
    """(H, W, 3) uint8: number k as a bar code in the upper eighth of a panning, noisy scene."""
    (w, h), x = kind.size, k * 120 // kind.fps
    image = texture[:h, x % 600:x % 600 + w].astype(np.int16) + np.roll(grain, 7919 * k)
    for j in range(3):                                        # sprites on their orbits
        side, turn = h // 6, k / kind.fps * (1 + j)
        top = int(h * (0.5 + 0.25 * np.sin(turn)))
        left = int((w - side) * (0.5 + 0.4 * np.cos(turn + j)))
        image[top:top + side, left:left + side, j] += 70
    code = [1] + [k >> b & 1 for b in range(BITS)] + [0]
    image[:h // 8] = (40 + 175 * np.repeat(code, -(-w // len(code)))[:w])[None, :, None]
    return image.clip(0, 255).astype(np.uint8)


def number_of(image, kind):
    """The number that a picture of a kind's file carries, in whatever size it came."""
    (h, w), wide = image.shape[:2], kind.size[0]
    bar = -(-wide // (BITS + 2)) * w / wide                   # of the last one a part is missing
    at = ((np.arange(BITS + 2) + 0.4) * bar).astype(int)
    bits = image[h // 24:h // 12, at].mean((0, 2)) > 127
    return int(bits[1:-1] @ 2 ** np.arange(BITS)) if bits[0] and not bits[-1] else -1


def count_wrong(kind, times, images):
    """How many of the pictures that a reader found are not those of these times."""
    images = np.asarray(images)
    images = images.transpose(0, 2, 3, 1) if images.shape[1] == 3 else images
    shown = np.floor(times * kind.fps + 1e-6).astype(int) % (kind.seconds * kind.fps)
    found = [number_of(image, kind) for image in images]
    return len(times) - sum(map(int.__eq__, found, shown.tolist()))


def scene(kind):
    """A texture wider than the picture, of several octaves, and grain."""
    rng, (w, h) = np.random.default_rng(len(kind.name)), kind.size
    texture = np.zeros((h, w + 600, 3), np.float32)
    for size in (8, 40, 200):
        noise = torch.from_numpy(rng.standard_normal((1, 3, size, 2 * size), np.float32))
        texture += 22 * F.interpolate(
            noise, texture.shape[:2], mode="bicubic")[0].permute(1, 2, 0).numpy()
    grain = rng.normal(0, 4, (h, w, 1)).astype(np.int8)
    return (128 + texture).clip(20, 235).astype(np.uint8), grain


def make_file(kind, folder):
    """Write a kind's file, if it is not there; returns its path."""
    path = folder / kind.file
    if path.exists():
        return path
    rate, tick, drawn = 44100, Fraction(1, kind.fps), scene(kind)
    with av.open(f"{path}.part", "w", format=path.suffix[1:]) as c:
        v = c.add_stream(kind.codec, rate=kind.fps, options=kind.options)
        (v.width, v.height), v.pix_fmt = kind.size, "yuv420p"
        v.codec_context.gop_size, v.codec_context.max_b_frames = 250, kind.bframes
        a = c.add_stream("aac", rate=rate, layout="stereo") if kind.sound else None
        packets, n = [], kind.seconds * kind.fps
        for k in range(n):
            frame = av.VideoFrame.from_ndarray(picture(kind, k, *drawn), format="rgb24")
            frame.pts, frame.time_base = k, tick
            packets += v.encode(frame)
        packets = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in packets + v.encode(None)]
        sound = iter(sound_packets(a, rate, kind.length) if a else ())
        heard = next(sound, None)
        for again, (data, pts, dts, key) in itertools.product(range(kind.times), packets):
            p = av.Packet(data)
            p.stream, p.time_base, p.is_keyframe = v, tick, key
            p.pts, p.dts = pts + again * n, dts + again * n
            while heard and heard.dts * heard.time_base <= p.dts * tick:
                c.mux(heard)
                heard = next(sound, None)
            c.mux(p)
        c.mux([heard, *sound] if heard else [])
    os.replace(f"{path}.part", path)
    return path


def sound_packets(a, rate, seconds):
    """A hum with a click in every second."""
    for second in range(seconds + 1):
        x = 0.1 * np.sin(2 * np.pi * 220 * np.arange(rate) / rate)
        x[rate // 3:rate // 3 + 200] += 0.7
        frame = av.AudioFrame.from_ndarray(np.tile(x, (2, 1)).astype(np.float32), "fltp", "stereo")
        frame.pts, frame.sample_rate, frame.time_base = second * rate, rate, Fraction(1, rate)
        yield from a.encode(frame if second < seconds else None)


# ---- readers -----------------------------------------------------------------------------------

def limit(path, times):
    """Open, seek, decode every picture from the key frame to the last that is wanted; convert none.
    """
    with av.open(str(path)) as c:
        v = c.streams.video[0]
        v.codec_context.thread_type, v.codec_context.thread_count = "NONE", 1
        c.seek(int(times[0] / v.time_base), stream=v)
        for f in c.decode(v):
            if f.time > times[-1] - 1e-6:
                break


def decode_all(path, most=10):
    """Decode all pictures, at most of ten seconds, to RGB of full size."""
    with av.open(str(path)) as c:
        v = c.streams.video[0]
        v.codec_context.thread_type, v.codec_context.thread_count = "NONE", 1
        for f in c.decode(v):
            f.to_ndarray(format="rgb24")
            if f.time >= most:
                break


def ours(path, times):
    return read_clip(path, [list(times)], SIDE)[0]


def smaller(pictures, size):
    """(T, H, W, 3) uint8 in memory -> (T, 3, h, w), by the fastest way: PyTorch's, as they lie."""
    return F.interpolate(pictures.permute(0, 3, 1, 2), size[::-1], mode="bilinear", antialias=True)


def with_torchcodec(module, path, times, **flags):
    """Pictures in full size, then PyTorch's scaling of uint8; or as flags have it."""
    decoder = module.decoders.VideoDecoder(str(path), seek_mode="approximate", num_ffmpeg_threads=1,
                                           dimension_order="NHWC", **flags)
    pictures = decoder.get_frames_played_at(list(times)).data
    return pictures if flags else smaller(pictures, shrunk(path))


def with_its_resize(module, path, times):
    """torchcodec's own scaling, which newer versions have."""
    resize = importlib.import_module("torchcodec.transforms").Resize
    return with_torchcodec(module, path, times, transforms=[resize(shrunk(path)[::-1])])


def with_decord(module, path, times):
    w, h = shrunk(path)
    reader = module.VideoReader(str(path), num_threads=1, width=w, height=h)
    return reader.get_batch([int(t * reader.get_avg_fps() + 1e-6) for t in times]).asnumpy()


def with_opencv(module, path, times):
    module.setNumThreads(1)
    reader = module.VideoCapture(str(path), module.CAP_FFMPEG, [module.CAP_PROP_N_THREADS, 1])
    rate, size = reader.get(module.CAP_PROP_FPS), shrunk(path)
    wanted, pictures = [int(t * rate + 1e-6) for t in times], []
    reader.set(module.CAP_PROP_POS_FRAMES, wanted[0])
    for n in range(wanted[0], wanted[-1] + 1):
        reader.grab()
        if n in wanted:
            picture = reader.retrieve()[1]
            if picture.shape[:2] == (2 * size[1], 2 * size[0]):               # else PyTorch's
                picture = module.resize(picture, size, interpolation=module.INTER_AREA)
            else:                                             # scaling is the faster one
                picture = smaller(torch.from_numpy(picture)[None], size)[0].permute(1, 2, 0).numpy()
            pictures.append(module.cvtColor(picture, module.COLOR_BGR2RGB))
    return np.stack(pictures)


def shrunk(path):
    with av.open(str(path)) as c:
        v = c.streams.video[0]
        return round(v.width * SIDE / min(v.width, v.height)), \
            round(v.height * SIDE / min(v.width, v.height))


def alternatives():
    """{name: reader} of those that are installed."""
    found = {}
    for name, module, reader in (("torchcodec", "torchcodec.decoders", with_torchcodec),
                                 ("torchcodec's resize", "torchcodec.transforms", with_its_resize),
                                 ("decord", "decord", with_decord), ("OpenCV", "cv2", with_opencv)):
        with contextlib.suppress(Exception):                  # of any kind: it may lack libraries
            importlib.import_module("torchcodec.decoders" if "torchcodec" in module else module)
            importlib.import_module(module)
            found[name] = partial(reader, sys.modules[module.partition(".")[0]])
    return found


# ---- decode ------------------------------------------------------------------------------------

def starts(kind, n, span=1.0):
    """n starts of clips, spread over a file."""
    rng = np.random.default_rng(n)
    return (np.arange(n) + rng.random(n)) / n * (kind.length - span - 0.1)


def clips_of(kind, repeats):
    """How many clips of such a file are read; those of a large one differ little."""
    return repeats if kind.size[0] == 1920 else 2 * repeats


class Turns:
    """What readers took for the same clips of a file, by turns.

    own, others  {name: path} of ours, {name: reader}
    table  seconds, one row per clip, three of short ones
    wrong  {name: pictures that are not the wanted ones}
    fails  {name: exception of another reader}; its seconds mean nothing
    """

    def __init__(self, kind, n, own, others):
        self.kind, self.names = kind, [*own, *others]
        self.table, self.wrong, self.fails = [], dict.fromkeys(self.names, 0), {}
        path = next(iter(own.values()))
        jobs = [partial(self.note, name, partial(ours, p)) for name, p in own.items()]
        jobs += [partial(self.attempt, name, partial(r, path)) for name, r in others.items()]
        for r, t in enumerate(starts(kind, n)):
            times, self.found = t + np.arange(CLIP) / FPS, {}
            again = 3 if r and self.table[0][0] < 0.05 else 1             # a few ms are uncertain
            self.table += cpu_paired(*(partial(job, times) for job in jobs), repeats=again,
                                     least=0, warm=int(r == 0), first=r)
            for name, pictures in self.found.items():
                self.wrong[name] += count_wrong(kind, times, pictures)

    def note(self, name, read, times):
        pictures = read(times)
        if pictures is not None:
            self.found[name] = pictures

    def attempt(self, name, read, times):
        """As `note`; what fails once is not tried again."""
        try:
            if name not in self.fails:
                self.note(name, read, times)
        except Exception as e:
            if name == "limit":
                raise
            self.fails[name] = e

    def row(self, what, name, target=None, note=""):
        """Ours against one of the others."""
        k, ours = self.names.index(name), self.names[0]
        if name in self.fails:
            word = " ".join(str(self.fails[name]).split())[:80]
            return Row("decode", what, name, 1e3 * median(row[0] for row in self.table), None, "ms",
                       note=f"cannot read it: {word}")
        if self.wrong[name] and name != ours:
            note = f"{note}; " * bool(note) + f"{self.wrong[name]} of its pictures are wrong"
        return compare("decode", what, self.table, name, k, target, note)


def decode_rows(folder, repeats):
    """A clip of 16 pictures, 16 per second, short side 128, from every kind of file."""
    seen, wrong, others = 0, 0, {"limit": limit, **alternatives()}
    for kind in KINDS:
        path, clips = make_file(kind, folder), clips_of(kind, repeats)
        turns = Turns(kind, clips, {"ours": path}, others)
        seen, wrong = seen + clips * CLIP, wrong + turns.wrong["ours"]
        for name in others:
            target = {"limit": kind.most, "torchcodec": 0.9 if kind != UCF else None}
            row = turns.row(kind.name, name, target.get(name))
            yield conversion(row, path) if (kind, name) == (UCF, "limit") else row
        if kind.size[0] == 1920:                              # a minute of decoding, no news
            continue
        whole = cpu_paired(partial(ours, path, starts(kind, 1)[0] + np.arange(CLIP) / FPS),
                           partial(decode_all, path), repeats=repeats, least=0, warm=0)
        yield compare("decode", kind.name, whole, "all pictures of 10 s, to RGB",
                      target=0.25 if kind == OOPS else None)
    yield Row("decode", f"wrong pictures of {seen}", "their bar codes", wrong, None, "", target=0,
              note="all containers: tests/test_media.py")
    for kind in (OOPS, EPIC):
        yield two_windows(kind, make_file(kind, folder), clips_of(kind, repeats))
    yield one_picture(make_file(OOPS, folder), repeats)


def two_windows(kind, path, clips):
    """The second before and the second after a moment, in one pass."""
    table = []
    for r, t in enumerate(starts(kind, clips, 2.0)):
        first, second = (list(t + d + np.arange(CLIP) / FPS) for d in (0, 1))
        table += cpu_paired(partial(read_clip, path, [first, second], SIDE),
                            partial(read_clip, path, [second], SIDE), repeats=1, least=0,
                            warm=int(r == 0), first=r)
    return compare("decode", f"{kind.name}: two clips in one pass", table, "the later one",
                   target=1.25)


def one_picture(path, repeats):
    """Decoded pictures to small RGB; every one is new, as PyAV's keep what scaled them."""
    with av.open(str(path)) as c:
        frames, (w, h) = list(itertools.islice(c.decode(video=0), 20 * repeats + 20)), shrunk(path)
    mine, theirs = itertools.cycle(frames), itertools.cycle(frames)
    table = cpu_paired(
        lambda: [common._to_rgb(next(mine), w, h).copy() for _ in range(20)],
        lambda: [next(theirs).to_ndarray(width=w, height=h, format="rgb24") for _ in range(20)],
        repeats=repeats, least=0)
    table = [[t / 20 for t in row] for row in table]
    return compare("decode", "a picture of 340x256 to RGB of 170x128", table, "PyAV's to_ndarray",
                   1, 0.4)


# ---- prepared files ----------------------------------------------------------------------------

def prepared(kinds, folder):
    """{kind: path} of the files as `python common.py prepare` re-encodes them."""
    source, made = folder / "source", folder / f"prepared_{digest(common.X264)}"
    shutil.rmtree(source, ignore_errors=True)                 # links of another version's kinds
    source.mkdir()
    for kind in kinds:
        (source / kind.file).symlink_to(make_file(kind, folder))
    subprocess.run([sys.executable, common.__file__, "prepare", source, made, "--short_side",
                    "256"], check=True, stdout=subprocess.DEVNULL)
    return {kind.name: made / kind.file for kind in kinds}


def prepare_rows(folder, repeats):
    """The same clips from re-encoded files."""
    seen, wrong, sources = 0, 0, (UCF, OOPS, HD, EPIC)
    others = {"limit": limit, **{k: r for k, r in alternatives().items() if "torchcodec" in k}}
    made = prepared(sources, folder)
    for kind in sources:
        path, source, clips = made[kind.name], make_file(kind, folder), clips_of(kind, repeats)
        turns = Turns(kind, clips, {"ours": path, "the source": source}, others)
        seen, wrong = seen + clips * CLIP, wrong + turns.wrong["ours"]
        name = f"{kind.name}, prepared"
        yield turns.row(name, "the source", {HD.name: 0.1, EPIC.name: 0.06}.get(kind.name),
                        f"{path.stat().st_size / source.stat().st_size:.2f} of the bytes")
        for reader in others:
            row = turns.row(name, reader, {"limit": 1.2, "torchcodec": 1.0}.get(reader))
            yield conversion(row, path) if reader == "limit" else row
    yield Row("decode", f"prepared: wrong pictures of {seen}", "their bar codes", wrong, None, "",
              target=0)


def conversion(row, path):
    """A row against the limit, which converts no picture: it says what converting a clip's takes.

    Small pictures of few references decode so quickly that it is a good part of the whole, and so
    is choosing packets, in Python. Without the first it must be a tenth of the limit less.
    """
    with av.open(str(path)) as c:
        frames, size = list(itertools.islice(c.decode(video=0), 10 * CLIP)), shrunk(path)
    began = time.process_time()
    for f in frames:
        common._to_rgb(f, *size).copy()
    share = 1e3 * (time.process_time() - began) / len(frames) * CLIP / row.reference
    excuse = "small pictures decode fast, converting and choosing them is what remains"
    held = row.ratio - share <= row.target - 0.1
    return row._replace(note=f"scaling and colours of its {CLIP} pictures, which the limit lacks: "
                             f"{share:.2f}", excuse=excuse if held else "")


# ---- sound -------------------------------------------------------------------------------------

def audio_rows(folder, repeats):
    """Two seconds of sound from a track of 30 s."""
    kind, table, wrong = EPIC_SMALL, [], 0
    path = make_file(kind, folder)
    whole, rate = read_audio(path)
    for r, t in enumerate(starts(kind, 2 * repeats, 2.0)):
        table += cpu_paired(partial(read_audio, path, t, t + 2), partial(read_audio, path),
                            repeats=1, least=0, warm=int(r == 0), first=r)
        x, (first, last) = read_audio(path, t, t + 2)[0], common.audio_window(t, t + 2, rate)
        wrong += int((x != whole[:, first:last]).sum())
    yield compare("audio", "2 s of sound from a track of 30 s", table, "the whole track", 1, 0.3)
    yield Row("audio", "samples that differ", "the whole track, decoded in order", wrong, None, "",
              target=0)


# ---- augmentation ------------------------------------------------------------------------------

def pillow(frames, side, crop, rng):
    """As the originals: picture by picture in Pillow, all colour operations included."""
    size = tuple(round(s * side / min(frames.shape[1:3])) for s in frames.shape[2:0:-1])
    x, y = rng.integers(size[0] - crop + 1), rng.integers(size[1] - crop + 1)
    for f in frames:
        f = Image.fromarray(f).resize(size, Image.Resampling.BILINEAR)
        f = tf.hflip(f.crop((x, y, x + crop, y + crop)))
        f = tf.adjust_saturation(tf.adjust_contrast(tf.adjust_brightness(f, 1.2), 0.8), 1.3)
        f = tf.gaussian_blur(tf.to_grayscale(tf.adjust_hue(f, 0.1), 3), [9, 9])
        tf.normalize(tf.to_tensor(f), replai.MEAN, replai.STD)


def augment_rows(folder, repeats):
    """What a worker does to a clip: cut, scale, mirror. Colours change on the device, batched."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (16, 256, 340, 3), np.uint8)
    args = cpctrans.parse_args(["--img_dim", "128", "--crop", "224"])
    jobs = {"replai.py: 8 pictures to 112": (
                lambda: replai.augment(frames[:8], rng, 112, False), 8, 128, 112),
            "cpctrans.py: 5 pictures to 128": (
                lambda: cpctrans.distort_pretrain(frames[:5, :240, :320], rng, args), 5, 140, 128)}
    for crop in (112, 224):
        jobs[f"ssdet_coarsefine.py: 16 pictures to {crop}"] = (
            lambda crop=crop: ssdet_coarsefine.cut(
                frames, ssdet_coarsefine.crop_box(340, 256, 0.9, 0.5, 0.5), crop, True),
            16, crop * 8 // 7, crop)
    for what, (job, n, side, crop) in jobs.items():
        table = cpu_paired(job, partial(pillow, frames[:n], side, crop, rng), repeats=repeats)
        yield compare("augment", what, table, "Pillow, with all colour operations", 1, 0.1)


# ---- opens -------------------------------------------------------------------------------------

def open_rows(folder, repeats, opens=2000):
    """What 2,000 opens of good and of broken files leave behind."""
    good = [make_file(kind, folder) for kind in (UCF, OOPS, EPIC_SMALL)]
    data = good[1].read_bytes()
    bad = {"cut.mp4": data[:len(data) // 2], "empty.mp4": b"", "text.mp4": b"no video\n" * 99,
           "damaged.mp4": data[:99999] + bytes(20000) + data[119999:]}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    paths = good + [folder / name for name in bad] + [folder / "absent.mp4"]
    av.logging.set_level(av.logging.PANIC)                    # they are broken on purpose

    def some(n):
        for k in range(n):
            path = paths[k % len(paths)]
            with contextlib.suppress(VideoError):
                sound = (1.0, 1.2) if path == good[2] else None
                read_clip(path, [[0.5 if k % 3 else 0.1]], SIDE, sound)
    some(200)
    memory, before = resident(), left_open()
    some(opens)
    left = [b - a for a, b in zip(before, left_open())]
    yield Row("memory", f"{opens} opens of good and broken files", "", resident() - memory, None,
              "MB", target=20)
    yield Row("memory", "files and threads left open by them", "", sum(map(abs, left)), None, "",
              target=0)
