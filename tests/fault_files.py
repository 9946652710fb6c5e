"""Files that are broken, odd or hostile, and what the readers make of them.

    media        damaged and unusual videos, pictures and sound, through every public reader
    annotations  mutations of every list, CSV, JSON and cache that a script reads
    hostile      checkpoints that hold code, names that are paths

Each part is a function (folder, seed, long) that yields rows for the table of promises. A media
file is read in a process of its own, watched from outside: a hang of the decoder, or its end by a
signal, is a failure of that file.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import sys
import time
import types
import zipfile
from collections import Counter
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple

import av
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import running
import test_media
from fault_rows import Row

import common
import cpctrans
import f2c_oops
import replai
import ssdet_coarsefine as ssdet
from common import VideoError, Window

LIMIT = 30                              # seconds that anything may take


# ---- media: damaged files ----------------------------------------------------------------------

X264, Q = test_media.X264, test_media.Q
LONG = {**X264, "x264-params": "keyint=250:scenecut=0:b-adapt=0"}
SMALL = test_media.args(n=50, size=(96, 64))
BASES = {                               # name: (suffix, pictures, sound); all last two seconds
    "xvid, packed b-frames, mp3": (".avi", {"codec": "mpeg4", "options": Q, "bf": 2, "gop": 12,
                                            "edit": test_media.pack}, "libmp3lame"),
    "mpeg4, pcm": (".avi", {"codec": "mpeg4", "options": Q, "gop": 12}, "pcm_s16le"),
    "mjpeg": (".avi", {"codec": "mjpeg", "options": Q, "pix_fmt": "yuvj420p"}, None),
    "h264, one gop, aac": (".mp4", {"options": LONG, "bf": 3, "gop": 250, "mux": {
        "movflags": "faststart"}}, "aac"),
    "h264, moov last, aac": (".mp4", {"options": X264, "bf": 2}, "aac"),
    "h264, fragments": (".mp4", {"options": X264, "bf": 2, "gop": 12, "mux": {
        "movflags": "frag_keyframe+empty_moov"}}, "aac"),
    "hevc": (".mp4", {"codec": "libx265", "bf": 3, "options": {
        "preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1"}}, None),
    "h264, aac, mkv": (".mkv", {"options": X264, "bf": 2}, "aac"),
    "vp9, opus": (".webm", {"codec": "libvpx-vp9", "options": test_media.VP9}, "libopus"),
    "h264, ac3, ts": (".ts", {"options": X264, "bf": 2, "gop": 12}, "ac3"),
    "mpeg2, mp2": (".mpg", {"codec": "mpeg2video", "options": Q, "bf": 2, "gop": 12}, "mp2"),
    "h264, pcm, mov": (".mov", {"options": X264, "bf": 2}, "pcm_s16le")}


def make_base(folder, name):
    suffix, arguments, codec = BASES[name]
    sound = None
    if codec:
        rate = 48000 if codec in ("libopus", "ac3") else 44100
        sound = (codec, rate, "stereo", 0.0, test_media.tones(rate, 2, 2.0))
    return test_media.write_video(folder / f"{name}{suffix}", sound=sound, **{
        **SMALL, **arguments})


def cut_off(rng, data, other):
    return data[:int(rng.integers(1, len(data)))]


def zeroed(rng, data, other):
    x = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at, width = int(rng.integers(len(x))), int(rng.integers(1, 2000))
        x[at:at + width] = bytes(len(x[at:at + width]))
    return bytes(x)


def flipped(rng, data, other, end=None):
    x = bytearray(data)
    for at in rng.integers(0, min(len(x), end or len(x)), rng.integers(1, 40)):
        x[at] ^= 1 << rng.integers(8)
    return bytes(x)


def flipped_header(rng, data, other):
    """Where sizes, counts and codecs stand: at the beginning, or in the table at the end."""
    if rng.random() < 0.5:
        return flipped(rng, data, other, 1500)
    tail = min(len(data), 4000)
    return data[:-tail] + flipped(rng, data[-tail:], other)


def swapped(rng, data, other):
    """The head of one file and the rest of another."""
    at = int(rng.integers(16, min(len(data), len(other), 4000)))
    return other[:at] + data[at:]


def shuffled(rng, data, other):
    """A piece left out, doubled, or of another file."""
    a, b = sorted(rng.integers(0, len(data), 2).tolist())
    return (data[:a] + data[b:], data[:b] + data[a:], data[:a] + other[a:b] + data[b:]
            )[int(rng.integers(3))]


DAMAGES = (cut_off, zeroed, flipped, flipped_header, swapped, shuffled)


def damaged_files(folder, seed, copies):
    """[(path, whether its pictures must be right or missing)] of every base, damaged every way."""
    bases = {name: make_base(folder, name) for name in BASES}
    datas, found = {name: path.read_bytes() for name, path in bases.items()}, []
    for b, (name, path) in enumerate(bases.items()):
        for d, damage in enumerate(DAMAGES):
            for k in range(copies):
                rng = np.random.default_rng((seed, b, d, k))
                other = datas[list(datas)[int(rng.integers(len(datas)))]]
                target = folder / f"{name}, {damage.__name__} {k}{path.suffix}"
                target.write_bytes(damage(rng, datas[name], other))
                found.append((target, damage is cut_off))
    return bases, found


def odd_files(folder, bases):
    """Files that hold no video, though they are called so."""
    good = bases["h264, one gop, aac"].read_bytes()
    texts = {"empty": b"", "text": b"<html>not found</html>\n" * 200, "nothing": bytes(20000),
             "noise": np.random.default_rng(0).bytes(50000), "head alone": good[:40],
             "number": b"1\n", "zip": b"PK\3\4" + bytes(100),
             "playlist": b"#EXTM3U\n#EXTINF:2,\n/etc/passwd\n#EXT-X-ENDLIST\n",
             "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
             "session": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
                        b"m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"}
    found = []
    for name, data in texts.items():
        found += [folder / f"{name}{suffix}" for suffix in (".mp4", ".avi", ".mkv")]
        for path in found[-3:]:
            path.write_bytes(data)
    (folder / "folder.mp4").mkdir()
    (folder / "dangling.mp4").symlink_to(folder / "nowhere")
    (folder / "circle.mp4").symlink_to(folder / "circle.mp4")
    with av.open(str(folder / "sound alone.mp4"), "w") as c:
        sound = ("aac", 44100, "mono")
        for p in test_media.sound_packets(test_media.add_sound(c, sound), sound):
            c.mux(p)
    return [*found, *(folder / f"{n}.mp4" for n in ("folder", "dangling", "circle", "sound alone",
                                                    "missing"))]


# ---- media: what the readers say ----------------------------------------------------------------

def pictures_of(x, *shape):
    """Raise unless x is uint8 pictures of that shape, None where anything goes."""
    same = len(x.shape) == 4 and x.shape[3] == 3 and all(
        a in (None, b) for a, b in zip(shape, x.shape))
    assert x.dtype == np.uint8 and same and min(x.shape) > 0, (x.dtype, x.shape, shape)
    return x


def sound_of(found):
    x, rate = found
    assert x.dtype == np.float32 and x.ndim == 2 and len(x) and rate > 0, (x.dtype, x.shape)
    assert np.isfinite(x).all(), "sound that is not finite"
    return found


def streamed(path):
    number, last = 0, -1e9
    for times, x in common.stream(path, chunk=16):
        pictures_of(x, len(times))
        assert len(times) <= 16 and np.isfinite(times).all()
        number += len(times)
    assert number
    return number, last


def timed(path):
    times, fps = common.clock(path)
    assert times.ndim == 1 and np.isfinite(times).all() and (np.diff(times) >= 0).all()
    assert 0 < fps < float("inf")
    return len(times)


def told(path):
    m = common.probe(path)
    assert np.isfinite(m.duration) and 0 < m.fps < 1e9 and m.sample_rate >= 0, m
    return m


def copied(path):
    """As `prepare` does with every file."""
    copy = path.with_name("copy.mp4")
    copy.unlink(missing_ok=True)
    try:
        common.reencode(path, copy, 32, 30)
        pictures_of(common.read_clip(copy, [[0.0]])[0], 1)
    except VideoError:
        assert not copy.exists(), "half a file was left"
        raise
    finally:
        assert not list(path.parent.glob(".prepare-*"))


def numbered(path):
    n = common.count_frames(path)
    assert isinstance(n, int) and n >= 0
    return n


READERS = {
    "probe": told, "clock": timed, "count_frames": numbered, "stream": streamed, "prepare": copied,
    "read_frames": lambda p: pictures_of(common.read_frames(p, [0, 3], short_side=32), 2),
    "times": lambda p: pictures_of(common.read_clip(p, [[0.3, 0.9, 1.5]], 32)[0], 3),
    "window": lambda p: [pictures_of(x, 4) for x in common.read_clip(
        p, [Window(1.0, 0.5, 4), Window(0.0, 0.3, 4)])],
    "both": lambda p: sound_of(common.read_clip(p, [[0.5]], 32, sound=(0.4, 1.1))[1]),
    "read_audio": lambda p: sound_of(common.read_audio(p)),
    "a second of sound": lambda p: sound_of(common.read_audio(p, 0.5, 1.5))}


def outcome(read, path):
    """"read", "refused", or what is wrong with how a reader answered."""
    try:
        read(path)
        return "read"
    except VideoError as e:
        fair = str(e).startswith(str(path)) and "\n" not in str(e) and len(str(e)) > len(str(path))
        return "refused" if fair else f"says {e!r:.200}"
    except common.UserError as e:
        return f"UserError {e!r:.200}"
    except Exception as e:
        return f"{type(e).__name__}: {e!s:.200}"


def shown_wrongly(path):
    """Of a file that breaks off: times at which another picture is shown than the right one, one
    at most a second earlier, or none. At the break a decoder shows the picture that the lost one
    refers to, a few later; some containers do not tell how long they should last.
    """
    wrong, silent = [], path.suffix in (".ts", ".mpg") or "fragments" in path.name
    for t in (0.02, 0.5, 1.0, 1.5, 1.9):
        try:
            n = test_media.number_of(common.read_clip(path, [[t]])[0][0])
        except VideoError:
            continue
        if n != -1 and not (0 if silent else int(25 * t) - 25) <= n <= int(25 * t) + 3:
            wrong.append((t, n))
    return wrong


def examine(path, exact, alive, brief):
    """{reader: outcome} of a file, and the seconds of the slowest; `alive` is called by each.

    brief: without `prepare`, which takes as long as all others, and what the others read, too.
    """
    found, worst = {}, 0.0
    for name, read in READERS.items():
        if brief and name in ("prepare", "both", "a second of sound"):
            continue
        began = time.monotonic()
        alive(name)
        found[name] = outcome(read, path)
        worst = max(worst, time.monotonic() - began)
    alive("pictures")
    if exact and (wrong := shown_wrongly(path)):
        found["pictures"] = f"shows {wrong}"
    return found, worst


def examine_all(jobs, answers):
    """In a process of its own: lines of JSON for each file, before and after it is read."""
    av.logging.set_level(av.logging.PANIC)
    with open(answers, "a", buffering=1) as f:
        for k, path, exact in jobs:
            def alive(name, k=k):
                f.write(json.dumps([k, name]) + "\n")
            f.write(json.dumps([k, *examine(Path(path), exact, alive, k % 5)]) + "\n")


def watched(folder, jobs, work=examine_all):
    """[({reader: outcome}, seconds)] of [(path, exact)], from processes that may hang or die."""
    found, jobs = {}, [(k, str(path), exact) for k, (path, exact) in enumerate(jobs)]
    while len(found) < len(jobs):
        answers = folder / "answers.jsonl"
        answers.write_text("")
        child = running.context().Process(
            target=work, args=([j for j in jobs if j[0] not in found], str(answers)))
        child.start()
        size, since = 0, time.monotonic() + 60                # it begins with imports
        while child.is_alive():
            child.join(0.05)
            if answers.stat().st_size != size:
                size, since = answers.stat().st_size, time.monotonic()
            elif time.monotonic() - since > LIMIT:
                child.kill()
                child.join()
        rows = [json.loads(x) for x in answers.read_text().splitlines()]
        found |= {row[0]: tuple(row[1:]) for row in rows if len(row) == 3}
        begun = next(((k, name) for k, name in (row for row in rows[::-1] if len(row) == 2)
                      if k not in found), None)
        if begun:
            found[begun[0]] = {begun[1]: f"ended by signal {-child.exitcode}"}, float(
                time.monotonic() - since)
        elif child.exitcode:
            raise RuntimeError(f"the reading process ended with {child.exitcode}")
    return [found[k] for k in range(len(jobs))]


def faults_of(jobs, found):
    return [f"{Path(path).name}: {name}: {said}" for (path, _), (said_, _) in zip(jobs, found)
            for name, said in said_.items() if said not in ("read", "refused")]


# ---- media: unusual files that are sound ---------------------------------------------------------

def eight_channels(path):
    """A video with 7.1 sound: (path, what it sounds like)."""
    x = test_media.tones(48000, 8, 2.0)
    with av.open(str(path), "w") as c:
        v = c.add_stream("libx264", rate=25, options=X264)
        v.width, v.height, v.pix_fmt = 96, 64, "yuv420p"
        a = c.add_stream("aac", rate=48000, layout="7.1", options={"aac_pns": "0"})
        packets = []
        for k in range(50):
            f = av.VideoFrame.from_ndarray(test_media.paint(k, 96, 64), format="rgb24")
            f.pts, f.time_base = k, Fraction(1, 25)
            packets += v.encode(f)
        packets += v.encode(None)
        flat = np.ascontiguousarray(x.T.reshape(1, -1))
        f = av.AudioFrame.from_ndarray(flat, format="s16", layout="7.1")
        f.sample_rate, f.pts, f.time_base = 48000, 0, Fraction(1, 48000)
        packets += [*a.encode(f), *a.encode(None)]
        for p in sorted(packets, key=lambda p: p.dts * p.time_base):
            c.mux(p)
    return path, x


LAYOUTS = {"mono": 1, "stereo": 2, "2.1": 3, "quad": 4, "5.0": 5, "5.1": 6}
UNUSUAL = [name for name, (_, a) in test_media.FILES.items() if a.get("n", 100) <= 50] + [
    "mp4 vfr", "mkv vfr", "mp4 starts at 1.5 s", "mp4 edit list", "ts 29.97, open gop", "odd size",
    "odd size avi", "grey", "yuv444", "10 bit", "full range", "rotated 90", "rotated 180",
    "rotated 270", "avi packed b-frames", "avi without index", "avi dropped pictures", "mkv 29.97"]


def unusual_pictures(folder):
    """(files, faults): every picture, in order and one by one, is the one that was painted."""
    files, faults = 0, []
    for name in UNUSUAL:
        suffix, arguments = test_media.FILES[name]
        path = test_media.write_video(folder / f"{name}{suffix}", **arguments)
        if arguments.get("turn"):
            test_media.turn_in_header(path, arguments["turn"])
        if name == "avi without index":
            data = path.read_bytes()
            path.write_bytes(data[:data.rindex(b"idx1")])
        hidden = 10 if name == "mp4 edit list" else 0
        want = [k for k in range(hidden, arguments.get("n", 100))
                if k not in arguments.get("drop", ())]
        parts = list(common.stream(path))
        times = np.concatenate([t for t, _ in parts])
        found = [test_media.number_of(f) for _, x in parts for f in x]
        (clip,), size = common.read_clip(path, [times + 1e-4]), arguments.get("size", (128, 96))
        some = slice(None, None, 9)
        checks = {"stream": found[hidden if len(found) > len(want) else 0:] == want,
                  "read_clip": test_media.seen(clip)[-len(want):] == want,
                  "read_frames": test_media.seen(common.read_frames(
                      path, range(len(want))[some])) == want[some],
                  "size": clip.shape[1:3] == size[::-1],
                  "clock": np.allclose(common.clock(path)[0][-len(want):], times[-len(want):],
                                       atol=2e-3)}
        if arguments.get("times"):
            checks["times"] = np.allclose(times, arguments["times"], atol=1e-3)
        files += 1
        faults += [f"{path.name}: {what}" for what, good in checks.items() if not good]
    return files, faults


def unusual_sound(folder):
    """(files, faults): the channels in their order, from one to eight."""
    made = []
    for codec, suffix, exact in (("aac", ".mp4", False), ("pcm_s16le", ".mkv", True)):
        for layout, n in LAYOUTS.items():
            x = test_media.tones(48000, n, 2.0)
            made.append((test_media.write_video(
                folder / f"{codec} {layout}{suffix}", n=50, size=(96, 64), options=X264,
                sound=(codec, 48000, layout, 0.0, x)), x, exact))
    made.append((*eight_channels(folder / "7.1.mp4"), False))
    faults = []
    for path, x, exact in made:
        y, rate = common.read_audio(path)
        n = min(x.shape[1], y.shape[1])
        low = 3 if len(x) in (6, 8) or "2.1" in path.name and len(x) == 3 else None
        low = 2 if len(x) == 3 else low                       # the deep one keeps no high tones
        alike = [np.corrcoef(a[:n], b[:n])[0, 1] for k, (a, b) in enumerate(zip(x, y))
                 if exact or k != low]
        if (len(y), rate) != (len(x), 48000) or min(alike) < 0.95 or n < 95000:
            faults.append(f"{path.name}: {len(y)} channels, {np.round(alike, 2)}")
        probed = common.probe(path)
        if (probed.channels, probed.sample_rate) != (len(x), 48000):
            faults.append(f"{path.name}: {probed}")
    return len(made), faults


# ---- media: folders of pictures ------------------------------------------------------------------

def picture_folders(folder, seed, copies):
    """Folders of five pictures, one of which is damaged: (number of folders, faults)."""
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(test_media.paint(3, 96, 64)).save(buffer, "JPEG", quality=95)
    good, files, faults = buffer.getvalue(), 0, []
    bomb = bytearray(good)
    at = bomb.index(b"\xff\xc0")
    bomb[at + 5:at + 9] = b"\xff\xfa\xff\xfa"                # 65530 x 65530 pictures elements
    other = io.BytesIO()
    Image.new("RGB", (50, 40)).save(other, "JPEG")
    whole = {"empty": b"", "text": b"no picture", "bomb": bytes(bomb), "size": other.getvalue(),
             "script": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 64\n%%EOF\n"}
    rng = np.random.default_rng(seed)
    for k in range(copies):
        whole |= {f"{d.__name__} {k}": d(rng, good, other.getvalue()) for d in DAMAGES}
    for name, data in whole.items():
        place = folder / f"pictures {name}"
        place.mkdir()
        for n in range(5):
            (place / common.JPG.format(n + 1)).write_bytes(good if n != 2 else data)
        assert common.count_frames(place) == 5
        said = outcome(lambda p: pictures_of(common.read_frames(p, [0, 2, 4]), 3, 64, 96), place)
        files += 1
        if said not in ("read", "refused") or said == "read" and name in (
                "empty", "text", "bomb", "size", "script"):
            faults.append(f"{place.name}: {said}")
        (place / common.JPG.format(2)).unlink()
        if outcome(common.count_frames, place) != "refused":
            faults.append(f"{place.name}: counts past a picture that is missing")
    return files, faults


# ---- media: many opens ---------------------------------------------------------------------------

def state():
    """Open descriptors, threads, megabytes of this process."""
    with open("/proc/self/statm") as f:
        pages = int(f.read().split()[1])
    return (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")),
            pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20)


def open_often(paths, opens, answer):
    """In a process of its own: read files again and again, good and bad ones."""
    av.logging.set_level(av.logging.PANIC)
    paths = list(map(Path, paths))
    ways = [common.probe, lambda p: common.read_clip(p, [[0.2]], 32),
            lambda p: common.read_audio(p, 0.1, 0.2)]
    for k in range(opens + 3 * len(paths)):
        if k == 3 * len(paths):                               # each was read once in every way
            before = state()
        outcome(ways[k // len(paths) % len(ways)], paths[k % len(paths)])
    Path(answer).write_text(json.dumps([before, state()]))


def growth(folder, paths, opens):
    """(descriptors, threads, megabytes) by which a process grows that opens so many files."""
    child = running.context().Process(target=open_often, args=(
        list(map(str, paths)), opens, str(folder / "opens.json")))
    child.start()
    child.join(600)
    if child.exitcode != 0:
        child.kill()
        return None
    before, after = json.loads((folder / "opens.json").read_text())
    return [b - a for a, b in zip(before, after)]


def media(folder, seed, long):
    """Damaged and unusual files: refused by name or read, never anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    bases, jobs = damaged_files(folder, seed, 15 if long else 5)
    odd = odd_files(folder, bases)
    every = [*jobs, *((p, False) for p in odd), *((p, True) for p in bases.values())]
    found = watched(folder, every)
    said = [x for answers, _ in found for x in answers.values()]
    faults = faults_of(every, found)
    whole = found[-len(bases):]
    faults += [f"{p.name}: {name}: a sound file is refused" for p, (answers, _) in
               zip(bases.values(), whole) for name, x in answers.items() if x == "refused"
               and not (p.name.startswith(("mjpeg", "hevc")) and READERS[name] in SOUND_READERS)]
    faults += [f"{p.name}: {name}: is read" for p, (answers, _) in
               zip(odd, found[len(jobs):]) for name, x in answers.items() if x == "read"
               and not (p.name == "sound alone.mp4" and READERS[name] in SOUND_READERS)]
    yield Row("damaged media files are read or refused by name", {
        "files": len(every), "reads": len(said), "read": said.count("read"),
        "refused": said.count("refused"), "worst_s": round(max(s for _, s in found), 2)}, faults)
    pictures, faults = picture_folders(folder, seed, 15 if long else 5)
    yield Row("damaged pictures in folders are read or refused by name", {"folders": pictures},
              faults)
    n, faults = unusual_pictures(folder)
    m, more = unusual_sound(folder)
    yield Row("unusual media files are read right", {"files": n + m}, faults + more)
    some = [*bases.values(), *(p for p, _ in jobs[::5]), *odd][:100]
    opens = 5000 if long else 2000
    grown = growth(folder, some, opens)
    faults = [] if grown and grown[0] <= 0 and grown[1] <= 0 and grown[2] < 20 else [f"{grown}"]
    figures = zip(("descriptors", "threads", "megabytes"), grown or ())
    yield Row("opening files leaves nothing behind", {
        "opens": opens, **{k: round(float(v), 1) for k, v in figures}}, faults)


SOUND_READERS = [READERS[k] for k in ("both", "read_audio", "a second of sound")]


# ---- annotations: the files that scripts read ----------------------------------------------------

class Left(BaseException):
    """Where a process would end."""


class Seen(NamedTuple):
    """What a user would see of a script that reads a file: the value is None if it was refused."""
    value: Any
    status: int
    out: str
    err: str


def shown(read):
    """`read()` as `launch` runs it."""
    def leave(status):
        raise Left(status)

    found, out, err, plain = [], io.StringIO(), io.StringIO(), os._exit
    os._exit, status = leave, None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            common.launch(lambda _: found.append(read()), None)
    except Left as e:
        status = e.args[0]
    finally:
        os._exit = plain
    return Seen(found[0] if found else None, status, out.getvalue(), err.getvalue())


class Form(NamedTuple):
    """A file in one of the official forms.

    units   its rows: lines of text, rows of a CSV, or entries of a JSON list or object
    join    from units to the bytes of the file
    read    what the script reads: a list of plain rows, one for each unit and in their order if
            `rows`; otherwise anything that can be compared
    """
    name: str
    path: Path
    units: list
    join: Callable[[list], bytes]
    read: Callable[[], Any]
    kind: str
    rows: bool = True


def as_lines(units):
    return "".join(f"{x}\n" for x in units).encode()


def as_csv(columns):
    def join(units):
        text = io.StringIO(newline="")
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(columns)
        rows.writerows(units)
        return text.getvalue().encode("utf-8", "surrogatepass")
    return join


def as_object(units):
    return json.dumps(dict(units)).encode()


def as_clips(units):
    return json.dumps({"version": "v1", "clips": units}).encode()


def plain_rows(*columns):
    return [tuple(x) for x in zip(*(c.tolist() if isinstance(c, np.ndarray) else c
                                    for c in columns))]


class Free(str):
    """Text that becomes no path."""


def epic_forms(root):
    import toy

    def row(k):
        return [f"P01_0{k}_{k}", "P01", f"P01_0{k}", "00:00:01.100", f"00:00:0{k}.10",
                f"00:00:0{k + 2}.36", str(30 * k), str(90 + 30 * k), 'put, "gently", cup', "put",
                str(k), "cup", str(13 + k), "['cup', 'shelf']", "[13, 61]"]

    def reader(split):
        def read():
            a = replai.read_actions(root, split)
            return plain_rows(map(Free, a.id.tolist()), a.video, a.seconds, a.verb, a.noun)
        return read

    rows, notes = [row(k) for k in range(1, 7)], root / "annotations"
    for split, columns in (("train", toy.EPIC_COLUMNS), ("validation", toy.EPIC_COLUMNS),
                           ("test_timestamps", toy.EPIC_COLUMNS[:8])):
        yield Form(f"EPIC {split}", notes / f"EPIC_100_{split}.csv",
                   [r[:len(columns)] for r in rows], as_csv(columns),
                   reader(split.partition("_")[0]), "csv")
    for n, (name, key, values) in enumerate((
            ("tail_verbs", "verb", range(5, 12)), ("tail_nouns", "noun", range(100, 106)),
            ("unseen_participant_ids_validation", "participant_id", ["P18", "P32", "P35"]))):
        yield Form(f"EPIC {name}", notes / f"EPIC_100_{name}.csv", [[str(v)] for v in values],
                   as_csv([key]), lambda n=n: sorted(
                       (x,) for x in replai.read_subsets(root)[n]), "csv")


def ego4d_forms(root):
    import test_ego4d

    def args(stage):
        return replai.parse_args(["--stage", stage, "--data", str(root), "--tiny"])

    (root / "videos").mkdir(parents=True)
    (root / "videos" / "video-t0.mp4").touch()
    lta = [test_ego4d.lta_entry("clip-t0", k, k, k + 2, k, k + 1) for k in range(5)]
    changes = [test_ego4d.oscc_entry("video-t0", k, 2 * k, 240 + k, 50 + k if k % 2 else None)
               for k in range(5)]

    def actions(split):
        def read():
            _, a = replai.read_fho_actions(root, split, replai.read_taxonomy(root))
            return plain_rows(a.clip, a.index, a.seconds.astype(float), a.verb, a.noun)
        return read

    def states(split):
        def read():
            c = replai.read_changes(args("statechange"), split)
            return plain_rows(map(Free, c.id.tolist()), c.file, c.seconds, c.frames, c.state, c.pnr)
        return read

    notes = root / "annotations"
    yield Form("Ego4D taxonomy", notes / "fho_lta_taxonomy.json",
               [("verbs", list("abcdefghi")), ("nouns", list("abcdefghijk"))], as_object,
               lambda: replai.read_taxonomy(root), "object", rows=False)
    for split in ("train", "val", "test_unannotated"):
        if split == "test_unannotated":
            lta, changes = ([{k: v for k, v in e.items() if not re.search("state|pnr|label", k)}
                             for e in x] for x in (lta, changes))
        yield Form(f"Ego4D lta {split}", notes / f"fho_lta_{split}.json", lta, as_clips,
                   actions(split), "list")
        yield Form(f"Ego4D oscc-pnr {split}", notes / f"fho_oscc-pnr_{split}.json", changes,
                   as_clips, states(split), "list")


def moments_form(root):
    """The cache of moments of two videos with clicks."""
    x = 0.003 * np.random.default_rng(0).standard_normal((1, 5 * 16000))
    for t in (1.6, 2.4, 3.1):
        x[0, int(16000 * t):][:300] += 0.8
    x = (x.clip(-1, 1) * 32767).astype(np.int16)
    root.mkdir(parents=True)
    for name in ("a", "b"):
        test_media.write_video(root / f"{name}.mp4", n=125, size=(48, 32), options=X264,
                               sound=("aac", 16000, "mono", 0.0, x))
    args = replai.parse_args(["--data", str(root), "--moments", str(root / "cache"), "--tiny",
                              "--workers", "0"])

    def read():
        index = replai.SegmentIndex(args, replai.scan(args))
        return [index.files.tolist(), index.file.tolist(), index.start.tolist(),
                index.stop.tolist(), index.peaks.tolist(), index.offset.tolist()]

    shown(read)
    path = root / "cache" / "moments.jsonl"
    yield Form("moments", path, [json.loads(x) for x in path.read_text().splitlines()],
               lambda units: "".join(json.dumps(x) + "\n" for x in units).encode(), read, "cache",
               rows=False)


def ucf_forms(root):
    lists, names = root / "ucfTrainTestlist", ["Archery", "ApplyLipstick", "YoYo"]
    args = cpctrans.parse_args(["--dataset", "ucf101", "--data", str(root), "--tiny", "--workers",
                                "0", "--out", str(root / "runs" / "a")])
    cpctrans.fill_from(args, None)
    videos = [f"{c}/v_{c}_g0{g}_c01" for c in names for g in (1, 8)]

    def reader(part):
        def read():
            cpctrans.read_ucf101.cache_clear()
            found = cpctrans.read_list(args, part, 1)
            return list(zip(found[0], found[1]))
        return read

    def classes():
        return [(n, c) for c, n in cpctrans.read_classes(lists / "classInd.txt").items()]

    yield Form("UCF101 classes", lists / "classInd.txt",
               [f"{n} {c}" for n, c in enumerate(names, 1)], as_lines, classes, "lines")
    yield Form("UCF101 train", lists / "trainlist01.txt",
               [f"{v}.avi {names.index(v.partition('/')[0]) + 1}" for v in videos], as_lines,
               reader("train"), "lines")
    yield Form("UCF101 test", lists / "testlist01.txt", [f"{v}.avi" for v in videos], as_lines,
               reader("test"), "lines")
    for v in videos:
        path = root / "UCF-101" / f"{v}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        test_media.write_video(path, n=70 + len(v), size=(48, 32), codec="mpeg4", options=Q)

    def counts():
        cpctrans.read_ucf101.cache_clear()
        cpctrans.hold_out.cache_clear()
        cpctrans.counted.cache_clear()
        found = cpctrans.read_videos(args, "train")[0]
        names = [os.path.relpath(os.fsdecode(x), root) for x in found.name]
        return plain_rows(names, found.label, found.frames)

    for form in list(ucf_lists(lists, names, videos)):
        form[0].write_bytes(as_lines(form[1]))
    shown(counts)
    path = root / "runs" / "cpctrans_ucf101_frames.json"
    yield Form("counts", path, list(json.loads(path.read_bytes()).items()), as_object, counts,
               "cache", rows=False)


def ucf_lists(lists, names, videos):
    lists.mkdir(parents=True, exist_ok=True)
    yield lists / "classInd.txt", [f"{n} {c}" for n, c in enumerate(names, 1)]
    yield lists / "trainlist01.txt", [f"{v}.avi" for v in videos]


def hmdb_forms(root):
    lists = root / "splits"
    args = cpctrans.parse_args(["--dataset", "hmdb51", "--data", str(root), "--tiny"])
    lists.mkdir(parents=True)
    (lists / "wave_test_split1.txt").write_text("Film_wave_u_cm_np1_fr_med_0.avi 1 \n")

    def read():
        names, labels, *_ = cpctrans.read_list(args, "train", 1)
        return list(zip(names, labels))[:-1]

    yield Form("HMDB51", lists / "clap_test_split1.txt",
               [f"Film{k}_clap_u_nm_np1_fr_med_{k}.avi 1 " for k in range(5)], as_lines, read,
               "lines")
    theirs = root / "theirs"
    theirs.mkdir()
    (theirs / "classInd.txt").write_text("1 Archery\n2 YoYo\n")
    args_csv = cpctrans.parse_args(["--dataset", "ucf101", "--data", str(theirs), "--tiny"])

    def frames():
        names, labels, _, lengths = cpctrans.read_list(args_csv, "train", 1)
        return list(zip(names, labels, lengths))

    yield Form("frames of CPCTrans", theirs / "train_split01.csv",
               [f"/data/UCF101/frame/{c}/v_{c}_g0{k}_c01/,{100 + k}" for c in ("Archery", "YoYo")
                for k in range(1, 4)], as_lines, frames, "lines")


def oops_forms(root):
    names = ["34 Funny Kids Fails (1)", "Best Fails - May, 2018", "Ünlü 3", "d"]
    notes = {n: {"t": [1.0 + k, 1.5 + k, 2.0 + k], "rel_t": [x / 10 for x in (
        1.0 + k, 1.5 + k, 2.0 + k)], "len": 10.0, "n_notfound": 0} for k, n in enumerate(names)}
    folder = root / "annotations"
    for n in names:
        path = root / "features" / "train" / f"{n}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, np.random.default_rng(len(n)).random((20 + len(n), 8), np.float32))
    args = f2c_oops.parse_args(["--data", str(root), "--features", str(root / "features"),
                                "--tiny", "--workers", "0"])

    def index():
        return [(v.name, v.frames, v.dim, v.dtype, v.offset, float(f2c_oops.read_rows(
            v, [0, v.frames - 1]).sum())) for v in f2c_oops.scan(args, "train")]

    for name in ("train.txt", "val.txt"):
        yield Form(f"Oops {name}", folder / name, names, as_lines, lambda p=folder / name: [
            (x,) for x in f2c_oops.read_names(p)], "lines")
    path = folder / "splits" / "train_all_org.csv"
    yield Form("Oops train_all_org.csv", path, [[f"{n}.mp4"] for n in names], as_csv(["filename"]),
               lambda: [(x,) for x in f2c_oops.read_names(path)], "csv")
    times = folder / "transition_times.json"
    yield Form("Oops transition_times", times, list(notes.items()), as_object,
               lambda: [(n, *a) for n, a in f2c_oops.read_notes(times).items()], "object")
    held = folder / "heldout_transition_times.json"
    yield Form("Oops heldout times", held, [(n, {"t": [1.0], "stdev": 0}) for n in names],
               as_object, lambda: [(n, *a) for n, a in f2c_oops.read_notes(held, True).items()],
               "object")
    path.parent.mkdir(parents=True)
    path.write_bytes(as_csv(["filename"])([[f"{n}.mp4"] for n in names]))
    shown(index)
    cache = root / "features" / "train" / "index.json"
    yield Form("index of features", cache, list(json.loads(cache.read_bytes()).items()), as_object,
               index, "cache")


def charades_forms(root):
    import toy

    def row(k):
        return [f"AB0{k}X", "S", "Kitchen, large", "6", "7", "Yes", 'says "hello"\nand sits', "cup",
                "A person", f"c0{k}2 0.00 {3 + k}.20;c156 1.10 {2 + k}.00" if k else "",
                f"{20 + k}.25"]

    def csv_rows():
        return [(n, *v) for n, v in ssdet.charades_rows(root / "c.csv", 157).items()]

    def json_form(name, base, classes):
        path = root / name
        entries = [(f"V0{k}", {"subset": "training", "duration": 20.5 + k, "actions": [
            [base + k, 1.0, 2.5], [base + 1, 0.5, 9.0 + k]]}) for k in range(5)]
        return Form(name, path, entries, as_object, lambda: [
            (n, *v) for n, v in ssdet.json_rows(path, "train", classes, base).items()], "object")

    yield Form("Charades", root / "c.csv", [row(k) for k in range(5)],
               as_csv(toy.CHARADES_COLUMNS), csv_rows, "csv")
    yield json_form("charades.json", 0, 157)
    yield json_form("multithumos.json", 1, 65)

    def videos(dataset, data):
        return ssdet.parse_args(["--stage", "finetune", "--dataset", dataset, "--data", str(data),
                                 "--tiny", "--stream", "fine", "--init", "none"])

    yield Form("Charades classes", root / "one" / "Charades_v1_classes.txt",
               [f"c{c:03d} Doing {c}" for c in range(5)], as_lines,
               lambda: [(Free(x),) for x in ssdet.class_names(videos("charades", root / "one"))],
               "lines")
    yield Form("MultiTHUMOS classes", root / "two" / "class_list.txt",
               [f"{n} {c}" for n, c in enumerate(("Run", "Jump", "Sit", "Walk"), 1)], as_lines,
               lambda: [(x,) for x in ssdet.class_names(videos("multithumos", root / "two"))],
               "lines")
    three = root / "three"
    yield Form("MultiTHUMOS", three / "Run.txt", [
        f"video_validation_000000{k} {k}.5 {k + 2}.25" for k in range(5)], as_lines, lambda: [
            (v.name, *x) for v in ssdet.read_videos(videos("multithumos", three), "train", ["Run"])
            for x in v.actions], "lines")
    scores = root / "localization.txt"
    args = types.SimpleNamespace(submission=scores)
    tests = [ssdet.Video(n, "", 9.0, ()) for n in ("AAAAA", "BBBBB")]
    yield Form("submission", scores, [f"{v.name} {j} 0.1 0.25 {j}e-3" for v in tests
                                      for j in range(1, 26)], as_lines,
               lambda: [(v.name, j, *map(str, x))
                        for v, block in zip(tests, ssdet.read_submission(args, tests, 3))
                        for j, x in enumerate(block.tolist())], "lines")


def kinetics_forms(root):
    columns = ["label", "youtube_id", "time_start", "time_end", "split", "is_cc"]
    rows = [(["arm wrestling", "yoga"][k % 2], f"a{k}bcdefghi-", str(k), str(k + 10), "train", "0")
            for k in range(6)]
    for label, name, a, b, *_ in rows:
        path = root / "train" / label.replace(" ", "_") / f"{name}_{int(a):06d}_{int(b):06d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def reader(data):
        args = ssdet.parse_args(["--data", str(data), "--tiny"])

        def read():
            _, paths, labels, names = ssdet.read_kinetics(args, "train")
            return [(p, names[c]) for p, c in zip(paths, labels.tolist())]
        return read

    yield Form("Kinetics", root / "train.csv", [list(r) for r in rows], as_csv(columns),
               reader(root), "csv")
    other = root / "other"
    (other).mkdir()
    (other / "train").symlink_to(root / "train")
    entries = [(name, {"annotations": {"label": label, "segment": [float(a), float(b)]},
                       "subset": "train"}) for label, name, a, b, *_ in rows]
    yield Form("Kinetics json", other / "train.json", entries, as_object, reader(other), "object")
    third = root / "third"
    third.mkdir()
    (third / "train").symlink_to(root / "train")
    (third / "train.csv").write_bytes(as_csv(columns)(rows))
    yield Form("Kinetics labels", third / "kinetics_labels.txt", ["arm wrestling", "yoga"],
               as_lines, reader(third), "lines", rows=False)


def own_forms(root):
    """What the scripts themselves have written: prepare.json, about.json, log.jsonl."""
    (root / "src").mkdir(parents=True)
    dst = root / "dst"
    args = common.parse_command(["prepare", str(root / "src"), str(dst)])
    common.keep_settings(args)
    path = dst / "prepare.json"
    yield Form("prepare.json", path, list(json.loads(path.read_bytes()).items()), as_object,
               lambda: common.keep_settings(args), "cache", rows=False)
    features = root / "features"
    for level in ssdet.LEVELS:
        (features / level).mkdir(parents=True)
        (features / level / "A").touch()
    video = [ssdet.Video("A", "", 9.0, ())]

    def check():
        args = types.SimpleNamespace(features=features, stride=4, feature_cap=9)
        return [v.name for v in ssdet.check_features(args, video, ())]

    yield Form("about.json", features / "about.json", [
        ("crc32", "0a"), ("stride", 4), ("unreadable", [])], as_object, check, "cache", rows=False)
    log = root / "run" / "log.jsonl"
    rows = [{"stage": "a", "epoch": 0, "step": k, "loss": 1.5, "broken": 0} for k in range(4)]

    def go_on():
        args = types.SimpleNamespace(out=root / "run", stage="a", batch_size=2, log_every=1)
        log_ = common.Log(args, 9, 12, 3)
        common.draw_curve(root / "run", "a", ["loss"])
        return math.isfinite(log_.total("broken"))

    yield Form("log.jsonl", log, rows, lambda units: "".join(
        json.dumps(x) + "\n" for x in units).encode(), go_on, "cache", rows=False)


def all_forms(folder):
    for make in (epic_forms, ego4d_forms, moments_form, ucf_forms, hmdb_forms, oops_forms,
                 charades_forms, kinetics_forms, own_forms):
        forms = list(make(folder / make.__name__))
        for form in forms:                                    # all there, before one is spoilt
            form.path.parent.mkdir(parents=True, exist_ok=True)
            form.path.write_bytes(form.join(form.units))
        yield from forms


# ---- annotations: mutations ----------------------------------------------------------------------

class Mutation(NamedTuple):
    """touched: numbers of the units that may come out otherwise; None: all of them.

    same: reads exactly as before, if it is read. must: it is to be read. twice: a unit stands
    there twice. left, most: the least and the greatest number of units that there are now.
    """
    what: str
    data: bytes
    touched: set | None = None
    same: bool = False
    must: bool = False
    left: int = 0
    most: int = 10 ** 9


TEXTS = ["", " ", "nan", "inf", "-inf", "-1", "1e999", "9" * 30, "9" * 5000, "x", "../../x",
         "/etc/passwd", "..", "a\nb", "a/b", "\u0663", "\U0001f600" * 80, "0x10", "1_0", "True",
         "None", "[]", "-0", "1e3", "a b c", '"', "'", ",", ";", "z" * 300, "c999 1 2",
         "c001 nan 2", "00:00:61.00", "99:99:99.9", "a\\b", "%s", "$HOME", "P1_1\n", "\u202e"]
VALUES = [None, True, False, "x", "", "1", -1, 0, 1.5, 1e300, float("inf"), float("nan"),
          -float("inf"), 10 ** 30, 10 ** 4000, [], {}, [[1]], [None], {"a": 1}, "../../x",
          "/etc/passwd", "a\0b", "\ud800", "z" * 300, "\U0001f600" * 80, [1, 2, 3], [3, 2, 1],
          [float("nan")] * 3, ["a", 1, 2], [[1, 2]], "..", "a\nb"]


def whole_files(form, rng):
    """Mutations of a file as a whole."""
    good, every = form.join(form.units), len(form.units)
    text = form.kind in ("csv", "lines")
    yield Mutation("undisturbed", good, set(), True, True, every)
    yield Mutation("empty", b"")
    yield Mutation("BOM", b"\xef\xbb\xbf" + good, set(), True, True, every)
    yield Mutation("UTF-16", good.decode("utf-8", "replace").encode("utf-16"), set(), True,
                   left=every)
    yield Mutation("latin-1", good[:len(good) // 2] + b"\xe9" + good[len(good) // 2:])
    yield Mutation("zeros", bytes(len(good)))
    yield Mutation("NUL behind", good + b"\0")
    yield Mutation("binary", rng.bytes(500))
    if text:
        yield Mutation("CRLF", good.replace(b"\n", b"\r\n"), set(), True, form.name != "Charades",
                       every)
        yield Mutation("blank lines", good.replace(b"\n", b"\n\n") if form.name != "Charades" else
                       good + b"\n\n", set(), True, True, every)
        yield Mutation("no last line end", good.rstrip(b"\n"), set(), True, True, every)
        yield Mutation("header alone", good[:good.index(b"\n") + 1], left=0 if form.kind == "csv"
                       else 1)
    else:
        for what in ("null", "[]", "{}", "1", '"x"', "NaN", "[[]]", "[null]", '{"clips": 1}',
                     '{"a": null}', '{"clips": [null]}', "9" * 5000, "[" * 200000,
                     '{"a":' * 200000, "{} {}"):
            yield Mutation(f"file {what[:20]}", what.encode())
        yield Mutation("nested", b"[" + good + b"]")
        yield Mutation("indented", b"\n\n  " + good + b"\n \n", set(), True,
                       form.kind != "cache", every)
    for _ in range(4):
        at = int(rng.integers(1, len(good)))
        kept = good[:at].count(b"\n") - (form.kind == "csv")
        touched = set(range(max(0, kept), every)) if text and form.name != "Charades" else None
        yield Mutation(f"cut at {at}", good[:at], touched, left=0)


def whole_units(form, rng):
    """Mutations of the order and the number of units."""
    units, n = form.units, len(form.units)
    for k in {0, n // 2, n - 1}:
        yield Mutation(f"unit {k} lost", form.join(units[:k] + units[k + 1:]), {k}, left=n - 1)
        if form.join not in (as_object,):
            yield Mutation(f"unit {k} twice", form.join([*units[:k + 1], *units[k:]]), {k},
                           left=n, most=n + 1)
        else:                                                 # the same key twice
            one, more = (json.dumps(dict(x))[1:-1] for x in ([units[k]], units))
            yield Mutation(f"key {k} twice", f"{{{one}, {more}}}".encode(), {k}, left=n)
    if form.kind != "cache" and form.name not in ("log.jsonl",):
        yield Mutation("backwards", form.join(units[::-1]), set(), left=n)
    if form.kind in ("csv", "lines"):
        data = form.join(units).split(b"\n")
        yield Mutation("a row of another kind", b"\n".join([*data[:-1], b"what, is this?", b""]),
                       set(), left=n + 1)
    if form.kind == "csv":
        rows = list(csv.reader(io.StringIO(form.join(units).decode(), newline="")))

        def table(change):
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerows(change(list(r)) for r in rows)
            return text.getvalue().encode()

        for k in range(len(rows[0])):
            yield Mutation(f"column {rows[0][k]} lost", table(lambda r, k=k: r[:k] + r[k + 1:]),
                           set(), left=n)
            yield Mutation(f"column {rows[0][k]} twice, otherwise", table(
                lambda r, k=k: [*r, r[k] if r == rows[0] else "7"]), set(), left=n)
        yield Mutation("a column more", table(lambda r: [*r, "x"]), set(), True, True, n)
        yield Mutation("columns backwards", table(lambda r: r[::-1]), set(), True, True, n)
        for k in (1, n):
            yield Mutation(f"a field less in row {k}", table(
                lambda r, k=k: r[:-1] or ["", ""] if r == rows[k] else r), {k - 1}, left=n)


def single_values(form, rng, most):
    """Mutations of one value of one unit, at most so many."""
    made, units = [], form.units
    for k in range(len(units)):
        unit = units[k]
        if form.kind == "csv":
            made += [(k, f"{c} {v[:20]!r}", [*unit[:c], v, *unit[c + 1:]]) for c in range(len(unit))
                     for v in TEXTS]
        elif form.kind == "lines":
            parts = re.split(r"([ ,/])", unit)
            made += [(k, f"part {c} {v[:20]!r}", "".join([*parts[:c], v, *parts[c + 1:]]))
                     for c in range(len(parts)) for v in TEXTS]
            made += [(k, f"begins with {v[:20]!r}", v + unit) for v in TEXTS]
        elif isinstance(unit, tuple):
            made += [(k, f"key {v[:20]!r}", (v, unit[1])) for v in TEXTS]
            made += [(k, f"{where} {v!r:.20}", (unit[0], x)) for where, v, x in changed(unit[1])]
        else:
            made += [(k, f"{where} {v!r:.20}", x) for where, v, x in changed(unit)]
    for i in rng.permutation(len(made))[:most].tolist():
        k, what, unit = made[i]
        try:
            data = form.join([*units[:k], unit, *units[k + 1:]])
        except ValueError:                                    # integers of too many digits
            continue
        blank = unit in ("", []) or isinstance(unit, str) and not unit.strip()
        lines = sum(1 for x in data.splitlines() if x.strip())
        yield Mutation(f"unit {k}: {what}", data, {k}, left=len(units) - blank,
                       most=lines if form.kind == "lines" else len(units))


def changed(x, where=""):
    """(where, value, x with that value there) for every place in a JSON value."""
    for v in VALUES:
        yield where, v, v
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
    for key, inner in items:
        rest = {a: b for a, b in x.items() if a != key} if isinstance(x, dict) else [
            *x[:key], *x[key + 1:]]
        yield f"{where}.{key} lost", "", rest
        for place, v, y in changed(inner, f"{where}.{key}"):
            yield place, v, {**x, key: y} if isinstance(x, dict) else [*x[:key], y, *x[key + 1:]]


def scattered_bytes(form, rng, count):
    """A few bytes changed, in whichever lines they fall."""
    import test_ssdet_coarsefine
    good = form.join(form.units)
    for n, x in enumerate(test_ssdet_coarsefine.mutants(good, count, int(rng.integers(2 ** 31)))):
        yield Mutation(f"bytes {n}", x, *touched_lines(form, good, x))


def touched_lines(form, good, x):
    """(units whose lines are not all in `x` as they were, False, False, how many are sure)."""
    if form.kind != "lines":
        return None, False, False, 0
    there = Counter(x.split(b"\n"))
    touched = {k for k, unit in enumerate(form.units) if not there[unit.encode()]}
    return touched, False, False, 0


# ---- annotations: the judge ----------------------------------------------------------------------

def sane(x):
    """May such a value come out of a file? No NaN, nothing that leaves a folder as a name."""
    if isinstance(x, (list, tuple)):
        return all(map(sane, x))
    if isinstance(x, float):
        return math.isfinite(x)
    if isinstance(x, int):
        return abs(x) < 2 ** 63
    if isinstance(x, Free):
        return "\0" not in x                                  # NumPy would cut it off
    if isinstance(x, (str, bytes)):
        x = os.fsdecode(x) if isinstance(x, bytes) else x
        parts = x.split("/")
        return not (x.startswith("/") or {".", ".."} & set(parts) or "\0" in x
                    or max(map(len, parts)) > 255)
    return x is None


def judge(form, mutation, first, seen):
    """"read", "read otherwise" or "refused", and what is wrong with that, "" for nothing.

    first, seen: what a user sees of the file as it was, and of the mutated one.
    """
    if seen.status != 0:
        line = seen.err.rstrip("\n")
        text = line.removeprefix("error: ")
        fair = (seen.status == 1 and "\n" not in line and line.startswith("error: ")
                and len(line) < 2100 and (text.startswith(str(form.path)) or str(
                    form.path.parent) in text or form.path.name in text))
        wrong = "" if fair else f"status {seen.status}: {line[-300:]!r}"
        return "refused", wrong or ("should be read" if mutation.must else "")
    if seen.err:
        return "read", f"writes {seen.err[-200:]!r}"
    was, now = first.value, seen.value
    if now == was:
        told = seen.out != first.out
        fewer = form.rows and form.kind != "cache" and len(now) < mutation.left
        return "read", "" if told or not fewer or mutation.same else "a unit is lost without a word"
    if mutation.same:
        return "read otherwise", f"{now!r:.150} instead of {was!r:.150}"
    if not form.rows:
        return "read otherwise", "" if sane_or_cache(form, now) else f"{now!r:.200}"
    if mutation.touched is not None:
        kept = Counter(map(repr, (r for k, r in enumerate(was) if k not in mutation.touched)))
        lost = kept - Counter(map(repr, now))
        more = len(now) - kept.total()
        if lost and "stand there twice" not in seen.out.removeprefix(first.out):
            return "read otherwise", f"other rows change: {list(lost)[:2]}"
        if more > mutation.most - kept.total():
            return "read otherwise", f"{more} new rows"
    if not sane(now):
        return "read otherwise", f"{[r for r in now if not sane(r)][:2]}"
    if len(now) < mutation.left and seen.out == first.out:
        return "read otherwise", f"{mutation.left} units, {len(now)} rows, and not a word"
    often, once = Counter(map(repr, now)), Counter(set(map(repr, now)))
    if seen.out == first.out and often - (Counter(map(repr, was)) | once):
        return "read otherwise", "a row counts twice without a word"
    return "read otherwise", ""


def sane_or_cache(form, value):
    return sane(value)


def annotations(folder, seed, long):
    """Mutations of every list, table and cache, read or refused in one line."""
    folder.mkdir(parents=True, exist_ok=True)
    said, faults, worst, forms = Counter(), [], 0.0, 0
    for n, form in enumerate(all_forms(folder)):
        forms += 1
        good, rng = form.path.read_bytes(), np.random.default_rng((seed, n))
        first = shown(form.read)
        if first.status != 0:
            faults.append(f"{form.name}: is refused as it is: {first.err[-300:]}")
            continue
        mutations = itertools.chain(
            whole_files(form, rng), whole_units(form, rng),
            single_values(form, rng, 500 if long else 40),
            scattered_bytes(form, rng, 200 if long else 20))
        for mutation in mutations:
            form.path.write_bytes(mutation.data)
            os.utime(form.path, ns=(n, time.time_ns()))
            began = time.monotonic()
            seen = shown(form.read)
            worst = max(worst, time.monotonic() - began)
            verdict, wrong = judge(form, mutation, first, seen)
            said[verdict] += 1
            if wrong:
                faults.append(f"{form.name}: {mutation.what}: {wrong}")
        form.path.write_bytes(good)
    yield Row("mutated annotations are read right or refused in one line", {
        "forms": forms, "mutations": said.total(), "read": said["read"],
        "read_otherwise": said["read otherwise"], "refused": said["refused"],
        "worst_s": round(worst, 2)}, faults)


# ---- hostile: files that would run code ----------------------------------------------------------

class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path, call=os.mkdir):
        self.path, self.call = str(path), call

    def __reduce__(self):
        return self.call, (self.path,)


class State:
    """The same, by way of `__setstate__`'s replacement: a call inside of a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({str(self.path)!r})",)


def traps(trapped):
    """{name: bytes} of files that make a folder of that name if their code is run."""
    zipped, older, arrays, pieces, scalar = (io.BytesIO() for _ in range(5))
    tensors = {"model": {"conv1.weight": torch.zeros(2, 3)}, "step": 1, "args": {}}
    torch.save({**tensors, "more": Trap(trapped)}, zipped)
    torch.save({**tensors, "more": Trap(trapped)}, older, _use_new_zipfile_serialization=False)
    np.savez(arrays, arr_0=np.array([Trap(trapped)] * 4, object), times=np.arange(4.0))
    np.save(pieces, np.array([[Trap(trapped)] * 2] * 2, object))
    inner = pickle.dumps(Trap(trapped))
    torch.save({"model": Scalar(inner)}, scalar)
    files = {"pickle": pickle.dumps({**tensors, "more": Trap(trapped)}),
             "pickle of text": pickle.dumps(Trap(trapped), 0), "eval": pickle.dumps(State(trapped)),
             "os.system": pickle.dumps(Trap(f"mkdir '{trapped}'", os.system)),
             "import": b"cbuiltins\nexec\n(S'import os; os.mkdir(\"" + str(trapped).encode() +
                       b"\")'\ntR.", "zip": zipped.getvalue(), "older": older.getvalue(),
             "object arrays": arrays.getvalue(), "object array": pieces.getvalue(),
             "number of objects": scalar.getvalue(), "nested": pickle.dumps({"model": {"a": [
                 {"b": Trap(trapped)}]}})}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("archive/data.pkl", files["import"])
        z.writestr("archive/version", "3\n")
        z.writestr("archive/byteorder", "little")
        z.writestr("archive/constants.pkl", files["import"])
        z.writestr("archive/code/__torch__.py", "import os\n")
    return {**files, "script": archive.getvalue()}


class Scalar:
    """A number of NumPy whose bytes are another pickle."""

    def __init__(self, inner):
        self.inner = inner

    def __reduce__(self):
        return np.float64(0).__reduce__()[0], (np.dtype("O"), self.inner)


def loaders(folder):
    """{name: function of a path} of every way by which a script reads weights or features."""
    def features_of(path):
        (folder / "features").mkdir(exist_ok=True)
        for level in ssdet.LEVELS:
            (folder / "features" / level).mkdir(exist_ok=True)
            shutil.copy(path, folder / "features" / level / "A")
        try:
            ssdet.read_features(types.SimpleNamespace(
                features=folder / "features", feature_cap=9), "A")
        except VideoError as e:
            raise common.UserError(f"{path}: {e}") from e

    def vectors_of(path):
        note = f2c_oops.Annotation((1.0, 1.0, 1.0), 9.0, (.1, .1, .1))
        for n in (None, note):
            f2c_oops.read_rows(f2c_oops.look(path, path, "a", n), [0])

    def module():
        return torch.nn.Linear(2, 2)

    def ssdet_args():
        return ssdet.parse_args(["--stage", "evaluate", "--init", "x", "--data", "x", "--tiny"])

    def converted(path):
        args = replai.parse_args(["--stage", "convert", "--init", str(path), "--out",
                                  str(folder / "converted")])
        replai.convert(args, torch.device("cpu"))

    return {"load_file": common.load_file, "find_weights": common.find_weights,
            "load_weights": lambda p: common.load_weights(module(), p, [{"": ""}]),
            "resume": lambda p: common.resume(p, types.SimpleNamespace(seed=0), model=module()),
            "cpctrans": cpctrans.describe, "f2c_oops": f2c_oops.describe,
            "ssdet_coarsefine": lambda p: ssdet.known_kind(ssdet_args(), p),
            "replai convert": converted, "features of videos": features_of,
            "features of frames": vectors_of}


def code_in_files(folder):
    """(files, reads, faults): none of them is read, and nothing of them is run."""
    folder.mkdir(parents=True, exist_ok=True)
    trapped, reads, faults = folder / "trapped", 0, []
    files, ways = traps(trapped), loaders(folder)
    pickle.loads(files["pickle"])                             # a trap that works
    trapped.rmdir()
    for name, data in files.items():
        for suffix in (".pt", ".npz"):
            path = folder / f"{name}{suffix}"
            path.write_bytes(data)
            for way, load in ways.items():
                seen = shown(partial(load, path))
                reads += 1
                if trapped.exists():
                    faults.append(f"{name}: {way}: RUNS THE CODE")
                    trapped.rmdir()
                line = seen.err.rstrip("\n")
                numbers = name == "number of objects" and seen.status == 0
                if not numbers and (seen.status != 1 or not line.startswith(f"error: {path}")
                                    or "\n" in line):
                    faults.append(f"{name}: {way}: status {seen.status}: {line[-200:]!r}")
    return len(files), reads, faults


def strange_checkpoints(folder, seed, most):
    """(files, faults): checkpoints of plain values of the wrong kinds."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"step": 2, "model": {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)},
             "args": {"seed": 0, "stream": "fine", "layers": 1, "version": "tiny"},
             "history": [{"stage": "pretrain", "list": 1, "dataset": "ucf101"}],
             "versions": {"python": "3"}, "samples": 3, "classes": ["a", "b"],
             "samples_list": "12", "best": 0.5}
    tensors = [torch.zeros(0), torch.zeros(2, 2, 2), torch.tensor(float("nan")),
               torch.zeros(3, 3).to_sparse()]
    plain = [v for v in VALUES if not (isinstance(v, int) and abs(v) > 10 ** 100)]
    made = [{**whole, k: v} for k in whole for v in [*plain, *tensors]]
    made += [{**whole, "args": {**whole["args"], k: v}} for k in whole["args"] for v in plain]
    made += [{**whole, "model": {**whole["model"], "weight": v}} for v in [*plain, *tensors]]
    made += [{**whole, "history": [{**whole["history"][0], "list": v}]} for v in plain]
    made += [{a: b for a, b in whole.items() if a != k} for k in whole]
    made += [*plain, *tensors, {1: 2}, {None: whole}, {"model": whole}]
    rng, faults, path = np.random.default_rng(seed), [], folder / "strange.pt"
    ways = {k: v for k, v in loaders(folder).items() if not k.startswith("features of f")}
    chosen = rng.permutation(len(made))[:most].tolist()
    for i in chosen:
        torch.save(made[i], path)
        for way, load in ways.items():
            seen = shown(partial(load, path))
            line = seen.err.rstrip("\n")
            fair = seen.status == 1 and line.startswith(f"error: {path}") and "\n" not in line
            if seen.status and not fair:
                faults.append(f"{way}: {made[i]!r:.200}: {line[-300:]!r}")
    return len(chosen), faults


# ---- hostile: names ------------------------------------------------------------------------------

NAMES = ["../../x", "../x", "..", ".", "", "/etc/passwd", "/x", "//x", "a/../../x", "x/", "./x",
         "a\0b", "\0", "x" * 300, "x" * 5000, "\U0001f600", "\U0001f600" * 70, "x ", " x", "x\n",
         "x\r", "CON", "NUL.mp4", "a:b", "C:\\x", "a\\b", "..\\..\\x", "~root", "~", "$HOME",
         "`id`", "%s", "%00", "*", "?", "[a]", "-rf", "--help", "|id", "a;b", "a,b", '"', "'",
         "\u202ex", "\u2028", "\u0085", "\ufeffx", "e\u0301", "P01_01/../x", "<x>&", "{0}",
         "\x1b[2J", "segments", "features", "last.pt", ".hidden", "x.avi", "x.mp4"]


def with_name(form, k, name):
    """Versions of a form's unit k with that name in each place of it."""
    unit = form.units[k]
    if form.kind == "csv":
        return [[*unit[:c], name, *unit[c + 1:]] for c in range(min(4, len(unit)))]
    if form.kind == "lines":
        group, _, video = unit.rpartition("/")
        return [name, f"{name} 1", f"{name}.avi 1", f"{name} 1 2", f"{name}/{video}",
                f"{group}/{name}.avi 1", f"{group}/{name}/,7"]
    if isinstance(unit, tuple):
        return [(name, unit[1])]
    return [{**unit, key: name} for key in unit if isinstance(unit[key], str)]


WATCHED = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.link",
           "os.symlink", "os.truncate", "os.rmdir", "os.chmod", "os.utime", "shutil.rmtree")


def try_names(folder, seed, most, answer):
    """In a process of its own: every name in every place of every form, read by its script, while
    each file that Python touches is looked at. Writes [names tried, read, faults].
    """
    folder, touched, inside = Path(folder), set(), [""]
    (folder / "x").write_text("bait")
    (folder / "x.mp4").write_text("bait")

    def look(event, args):
        if inside[0] and event in WATCHED and isinstance(args[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(args[0]))
            if path.startswith((str(folder), "/etc/passwd", "/x")) and not path.startswith(
                    inside[0]):
                touched.add((event, path))

    sys.addaudithook(look)
    tried, read, faults = 0, 0, []
    for form in all_forms(folder / "data"):
        good = form.path.read_bytes()
        root = next(p for p in form.path.parents if p.parent == folder / "data")
        rng = np.random.default_rng((seed, len(form.name)))
        for name in [NAMES[k] for k in rng.permutation(len(NAMES))[:most]]:
            for unit in with_name(form, 0, name):
                try:
                    form.path.write_bytes(form.join([unit, *form.units[1:]]))
                except (ValueError, UnicodeEncodeError):
                    continue
                inside[0] = str(root)
                seen = shown(form.read)
                inside[0] = ""
                tried, read = tried + 1, read + (seen.status == 0)
                if touched:
                    faults.append(f"{form.name}: {name!r:.40}: touches {sorted(touched)[:2]}")
                    touched.clear()
                if seen.status and (seen.status != 1 or "\n" in seen.err.rstrip("\n")):
                    faults.append(f"{form.name}: {name!r:.40}: {seen.err[-300:]!r}")
                if seen.status == 0 and form.rows and not sane(seen.value):
                    faults.append(f"{form.name}: {name!r:.40}: is read as {seen.value!r:.200}")
        form.path.write_bytes(good)
    Path(answer).write_text(json.dumps([tried, read, faults]))


def hostile_names(folder, seed, most):
    """(tried, read, faults), and no file appears outside of the data."""
    folder.mkdir(parents=True, exist_ok=True)
    child = running.context().Process(target=try_names, args=(
        str(folder / "deep" / "deeper"), seed, most, str(folder / "names.json")))
    (folder / "deep" / "deeper").mkdir(parents=True)
    child.start()
    child.join(600)
    if child.exitcode != 0:
        child.kill()
        return 0, 0, [f"the process ended with {child.exitcode}"]
    tried, read, faults = json.loads((folder / "names.json").read_text())
    there = {str(p.relative_to(folder)) for p in folder.glob("*")}
    there |= {str(p.relative_to(folder)) for p in (folder / "deep").glob("*")}
    there |= {str(p.relative_to(folder)) for p in (folder / "deep" / "deeper").glob("*")}
    here = "deep/deeper"
    strange = there - {"deep", "names.json", here, f"{here}/x", f"{here}/x.mp4", f"{here}/data"}
    return tried, read, faults + [f"appeared: {x!r}" for x in sorted(strange)]


def legal_names_are_written(folder):
    """(files, faults): what scripts write stays JSON, CSV and zip, whatever a name holds."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [n for n in NAMES if n and "\0" not in n] + ["\ud800", "a\ttab"]
    n, faults, one = len(names), [], np.zeros((len(NAMES) + 2, 2))

    def compare(what, found, want):
        if found != want:
            faults.append(f"{what}: {[x for x in zip(found, want) if x[0] != x[1]][:2]}")

    replai.write_submission(folder / "s.zip", np.array(names), one[:n], one[:n])
    with zipfile.ZipFile(folder / "s.zip") as z:
        compare("zip", z.namelist(), ["test.json"])
        compare("EPIC", list(json.loads(z.read("test.json"))["results"]), names)
    changes = types.SimpleNamespace(id=np.array(names), frames=np.tile([0, 9], (n, 1)))
    found = replai.statechange_submission(types.SimpleNamespace(pnr_frame="absolute"),
                                          types.SimpleNamespace(changes=changes), one[:n], one[:n])
    common.write_json(folder / "oscc.json", found)
    compare("Ego4D", [x["unique_id"] for x in json.loads((folder / "oscc.json").read_bytes())[
        "oscc"]], names)
    args = types.SimpleNamespace(out=folder, split=1)
    files = [n for n in names if "/" not in n and "\ud800" not in n]
    videos = cpctrans.Videos(np.array([os.fsencode(f"d/C/{x}") for x in files]),
                             np.zeros(len(files), int), np.ones(len(files), int))
    cpctrans.write_predictions(args, videos, names, one[:len(files)], np.zeros((2, 2), int))
    rows = json.loads((folder / "predictions_split1.json").read_bytes())
    compare("CPCTrans", [x["video"] for x in rows], [
        "C/" + re.sub(r"[.](avi|mp4)$", "", x) for x in files])
    compare("CPCTrans classes", json.loads((folder / "confusion_split1.json").read_bytes())[
        "classes"], names)
    written = [n for n in names if "\ud800" not in n]
    f2c_oops.write_csv(folder / "l.csv", [("filename", "t"), *((x, "1") for x in written)])
    with open(folder / "l.csv", newline="", encoding="utf-8") as f:
        compare("Oops", [r[0] for r in csv.reader(f)][1:], written)
    lines = [n for n in written if n.splitlines() == [n]]     # they come from lists of lines
    ssdet.write_classes(args, [ssdet.Video("a", "", 1.0, ())], lines, {"AP": one[:n, 0]})
    with open(folder / "per_class.csv", newline="", encoding="utf-8") as f:
        compare("SSDet", [r[1] for r in csv.reader(f)][1:], lines)
    return 6, faults


def hostile(folder, seed, long):
    """Files that would run code, and names that would leave their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files, reads, faults = code_in_files(folder / "code")
    yield Row("code in checkpoints and features is never run", {"files": files, "reads": reads},
              faults)
    n, faults = strange_checkpoints(folder / "strange", seed, 1000 if long else 40)
    yield Row("checkpoints of strange values are refused in one line", {"files": n}, faults)
    tried, read, faults = hostile_names(folder / "names", seed, None if long else 12)
    yield Row("names never leave the folder of the data", {"names": tried, "read": read,
                                                           "refused": tried - read}, faults)
    written, faults = legal_names_are_written(folder / "written")
    yield Row("files that are written hold any legal name", {"files": written}, faults)


PARTS = {"media": media, "annotations": annotations, "hostile": hostile}
