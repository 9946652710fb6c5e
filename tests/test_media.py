"""The reader of pictures and sound in `common.py` against sequential decodes of files made here.

Every picture carries its number as a bar code that survives scaling and lossy compression, so a
test reads off which picture came back. What a request must return is computed from one plain
decode of the whole file, never from a seek.
"""

import functools
import math
import os
import shutil
import struct
import sys
import threading
import time
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import VideoError, Window, probe, read_audio, read_clip, subsample

av.logging.set_level(av.logging.PANIC)
BITS = 11                                                     # 1, eight of the number, parity, 0


# ---- files: pictures -------------------------------------------------------------------------

def paint(number, w, h, shade=0):
    """(h, w, 3) uint8: bar code above, moving colours below; `shade` replaces the colours."""
    code = [1] + [number >> k & 1 for k in range(8)] + [number.bit_count() & 1, 0]
    x, y = np.arange(w), np.arange(h)[:, None]
    wave_ = np.sin((x + 3 * number) / 7) * np.cos((y + 2 * number) / 9)
    image = np.stack([128 + 60 * wave_, 128 + 40 * np.roll(wave_, 5, 1), 128 - 50 * wave_], -1)
    if shade:
        image[:] = shade
    image[:h // 2] = (30 + 195 * np.array(code)[x * BITS // w])[None, :, None]
    return image.astype(np.uint8)


def number_of(image):
    """The number painted into a picture (H, W, 3), -1 where its bar code cannot be read."""
    h, w = image.shape[:2]
    rows = image[h // 8:3 * h // 8].astype(float).mean((0, 2))
    at = ((np.arange(BITS) + 0.5) * w / BITS).astype(int)
    levels = np.array([rows[max(0, k - 1):k + 2].mean() for k in at])
    code = (levels > 128).astype(int)
    if abs(levels - 128).min() < 25 or code[0] != 1 or code[-1] != 0:
        return -1
    return int(code[1:9] @ 2 ** np.arange(8)) if code[1:9].sum() % 2 == code[9] else -1


def write_video(path, codec="libx264", n=100, fps=25, size=(128, 96), pix_fmt="yuv420p", gop=25,
                bf=0, options=None, mux=None, times=None, offset=0.0, turn=0, sound=None, edit=None,
                image=paint, first=0, colours=None, drop=()):
    """Encode n painted pictures and, if asked, sound = (codec, rate, layout, samples, delay).

    times   seconds of each picture (ms ticks) instead of n / fps
    offset  seconds added to all time stamps
    turn    degrees by which the coded pictures are turned against what is to be seen
    edit    function from the list of packets to those that are muxed
    first   number of the first picture
    drop    pictures left out, as capture programs do that are too slow
    """
    tick = Fraction(1, 1000) if times else 1 / Fraction(fps)
    w, h = size[::-1] if turn % 180 else size
    with av.open(f"file:{path}", "w", format=None, container_options=mux or {}) as c:
        v = c.add_stream(codec, rate=1000 if times else Fraction(fps), options=options or {})
        v.width, v.height, v.pix_fmt = w, h, pix_fmt
        v.codec_context.gop_size, v.codec_context.max_b_frames = gop, bf
        if times:
            v.codec_context.time_base = tick
        for key, value in (colours or {}).items():
            setattr(v.codec_context, key, value)
        a = add_sound(c, sound) if sound else None
        packets = []
        for k in sorted({*range(n)} - {*drop}):
            picture = np.ascontiguousarray(np.rot90(image(k + first, *size), turn // 90))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if colours:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=colours["colorspace"],
                                       dst_color_range=colours["color_range"])
                frame.colorspace, frame.color_range = colours["colorspace"], colours["color_range"]
            frame.pts, frame.time_base = round(times[k] * 1000) if times else k, tick
            packets += v.encode(frame)
        packets += v.encode(None)
        packets = edit(packets) if edit else packets
        if a:
            packets += sound_packets(a, sound)
        for p in packets:
            shift = round(offset / p.time_base)
            p.pts, p.dts = p.pts + shift, p.dts + shift
        for p in sorted(packets, key=lambda p: p.dts * p.time_base):
            c.mux(p)
    return path


def args(**arguments):
    return arguments


X264 = {"preset": "veryfast", "crf": "20"}
OPEN = {**X264, "x264-params": "open-gop=1:keyint=25:min-keyint=25:scenecut=0:bframes=3"}
PYRAMID = {**X264, "x264-params": "b-pyramid=normal:bframes=7:keyint=50:b-adapt=0:ref=4"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "0"}
Q = {"qmin": "2", "qmax": "4"}


def uneven(n):
    """Seconds of n pictures, 20 to 200 ms apart."""
    steps = np.random.default_rng(5).integers(20, 200, n - 1) / 1000
    return [0.0, *np.round(np.cumsum(steps), 3)]


def hidden(packets):
    """An edit list that hides the first 10 pictures: they get negative time stamps."""
    for p in packets:
        shift = round(10 / 25 / p.time_base)
        p.pts, p.dts = p.pts - shift, p.dts - shift
    return packets


def cut(packets):
    """What `-c copy` leaves of a stream that is cut in the middle of a group of pictures."""
    return packets[10:]


def pack(packets):
    """Packed B-frames, as old DivX writes them: each anchor in one packet with its first B."""
    def kind(data):
        at = bytes(data).index(b"\0\0\1\xb6") + 4
        return "IPBS"[bytes(data)[at] >> 6]

    out, data, held = [], [], None
    for p in packets:
        x = bytes(p)
        if kind(x) == "I":
            at = min(k for k in (x.find(b"\0\0\1\xb3"), x.find(b"\0\0\1\xb6")) if k >= 0)
            x = x[:at] + b"\0\0\1\xb2DivX503b1393p" + x[at:]
        data.append((kind(x), x, p.is_keyframe))
    while data:
        what, x, key = data.pop(0)
        if what == "B":
            if held is not None:                              # the second B of a pair stands alone
                held, x = x, held
            out.append((x, key))
            continue
        if held is not None:
            out.append((b"\0\0\1\xb6\x50\x10\x80", False))    # "not coded": stands for the held B
            held = None
        if data and data[0][0] == "B":
            x += data.pop(0)[1]
            out.append((x, key))
            run = []
            while data and data[0][0] == "B":
                run.append(data.pop(0))
            out += [(y, k) for _, y, k in run]
            out.append((b"\0\0\1\xb6\x50\x10\x80", False))
        else:
            out.append((x, key))
    result = []
    for k, (x, key) in enumerate(out):
        p = av.Packet(x)
        p.stream, p.time_base, p.is_keyframe = packets[0].stream, packets[0].time_base, key
        p.pts = p.dts = packets[0].dts + k
        result.append(p)
    return result


FILES = {          # name: (suffix, arguments of write_video)
    "mp4 closed gop": (".mp4", args(options={**X264, "x264-params": "open-gop=0"}, bf=2)),
    "mp4 open gop": (".mp4", args(options=OPEN, bf=3)),
    "mp4 no b": (".mp4", args(options=X264, gop=100)),
    "mp4 b-frames, one gop": (".mp4", args(options=X264, bf=3, gop=250)),
    "mp4 b-pyramid": (".mp4", args(options=PYRAMID, bf=7)),
    "mp4 edit list": (".mp4", args(options=X264, bf=2, edit=hidden,
                                   mux={"avoid_negative_ts": "disabled"})),
    "mp4 starts at 1.5 s": (".mp4", args(options=X264, bf=2, offset=1.5)),
    "mp4 cut in a gop": (".mp4", args(options=X264, bf=2, edit=cut)),
    "mp4 fragmented": (".mp4", args(options=X264, bf=2,
                                    mux={"movflags": "frag_keyframe+empty_moov"})),
    "mp4 faststart": (".mp4", args(options=X264, bf=2, mux={"movflags": "faststart"})),
    "mp4 29.97": (".mp4", args(options=X264, bf=2, fps=Fraction(30000, 1001))),
    "mp4 30": (".mp4", args(options=X264, bf=2, fps=30)),
    "mp4 50": (".mp4", args(options=X264, bf=2, fps=50, n=150)),
    "mp4 59.94": (".mp4", args(options=X264, bf=2, fps=Fraction(60000, 1001), n=150)),
    "mp4 vfr": (".mp4", args(options=X264, bf=2, times=uneven(100))),
    "mp4 hevc": (".mp4", args(codec="libx265", n=60, bf=3, options={
        "preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1:keyint=25"})),
    "mkv": (".mkv", args(options=X264, bf=2)),
    "mkv 29.97": (".mkv", args(options=X264, bf=2, fps=Fraction(30000, 1001))),
    "mkv vfr": (".mkv", args(options=X264, bf=2, times=uneven(100))),
    "webm vp9": (".webm", args(codec="libvpx-vp9", options=VP9)),
    "ts": (".ts", args(options=X264, bf=2)),
    "ts 29.97, open gop": (".ts", args(options=OPEN, bf=3, fps=Fraction(30000, 1001))),
    "ts cut in a gop": (".ts", args(options=X264, bf=2, edit=cut)),
    "mpg mpeg2": (".mpg", args(codec="mpeg2video", options=Q, bf=2, gop=12)),
    "mpg mpeg1": (".mpg", args(codec="mpeg1video", options=Q, bf=2, gop=12)),
    "avi mpeg4": (".avi", args(codec="mpeg4", options=Q, gop=12)),
    "avi mpeg4 b-frames": (".avi", args(codec="mpeg4", options=Q, gop=12, bf=2)),
    "avi packed b-frames": (".avi", args(codec="mpeg4", options=Q, gop=12, bf=2, edit=pack)),
    "avi packed, one b": (".avi", args(codec="mpeg4", options=Q, gop=12, bf=1, edit=pack)),
    "avi 29.97": (".avi", args(codec="mpeg4", options=Q, fps=Fraction(30000, 1001))),
    "avi h264 b-frames": (".avi", args(options=X264, bf=2)),
    "avi dropped pictures": (".avi", args(codec="mpeg4", options=Q, gop=12, drop=range(7, 99, 10))),
    "avi mjpeg": (".avi", args(codec="mjpeg", options=Q, pix_fmt="yuvj420p", n=50)),
    "odd size": (".mp4", args(options=X264, bf=2, size=(127, 95), pix_fmt="yuv444p")),
    "odd size avi": (".avi", args(codec="mpeg4", options=Q, size=(127, 95))),
    "grey": (".mp4", args(options=X264, pix_fmt="gray")),
    "yuv444": (".mp4", args(options=X264, pix_fmt="yuv444p", bf=2)),
    "10 bit": (".mp4", args(options=X264, pix_fmt="yuv420p10le", bf=2)),
    "full range": (".mp4", args(options=X264, pix_fmt="yuvj420p", bf=2)),
    "rgb": (".mkv", args(codec="ffv1", pix_fmt="bgr0", n=40)),
    "rotated 90": (".mp4", args(options=X264, bf=2, turn=90, size=(160, 96))),
    "rotated 180": (".mp4", args(options=X264, bf=2, turn=180, size=(160, 96))),
    "rotated 270": (".mp4", args(options=X264, bf=2, turn=270, size=(160, 96))),
    "one picture": (".mp4", args(options=X264, n=1)),
    "one picture avi": (".avi", args(codec="mpeg4", n=1)),
    "one picture mkv": (".mkv", args(options=X264, n=1)),
    "seven pictures": (".mp4", args(options=X264, n=7, bf=2)),
    "seven pictures ts": (".ts", args(options=X264, n=7, bf=2)),
    "avi without index": (".avi", args(codec="mpeg4", options=Q, gop=12, bf=2)),
}


def turn_in_header(path, degrees):
    """Write a rotation into the display matrix of an mp4's track header."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40                         # version 0
    a, b = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = [a, b, 0, -b, a, 0, 0, 0, 0x4000]                # clockwise, as players turn it
    data[at:at + 36] = struct.pack(">9i", *(x << 16 for x in matrix))
    path.write_bytes(data)


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """From a name in FILES to its file, written at the first use."""
    folder = tmp_path_factory.mktemp("media")

    @functools.cache
    def get(name):
        suffix, arguments = FILES[name]
        path = write_video(folder / f"{name}{suffix}", **arguments)
        if arguments.get("turn"):
            turn_in_header(path, arguments["turn"])
        if name == "avi without index":
            data = path.read_bytes()
            path.write_bytes(data[:data.rindex(b"idx1")])
        return path
    return get


@functools.cache
def truth(path):
    """Sequential decode of a file: (seconds since the first picture, numbers, frames per second).

    In avi the n-th picture to come out is on show at the n-th packet's time: its own time stamps
    mean nothing where B-frames are packed.
    """
    with av.open(f"file:{path}") as c:
        v, out, packets = c.streams.video[0], [], []
        avi, origin = c.format.name == "avi", v.start_time or 0
        for p in c.demux(v):
            packets += [p] if p.size and not p.is_discard else []
            try:
                out += [(f.pts, number_of(upright(f))) for f in p.decode()]
            except (av.InvalidDataError, av.EOFError):
                continue
        ticks = sorted(p.dts if avi else p.pts for p in packets)
        known = dict(zip(ticks, (k for _, k in out))) if avi else dict(out)
        assert avi or [t for t, _ in out] == [t for t in ticks if t in known]
        numbers = [known.get(t, out[0][1]) for t in ticks]    # what a cut lost shows the first
        starts = np.array([float((t - origin) * v.time_base) for t in ticks])
        return starts, np.array(numbers), v.average_rate, float(v.time_base * (v.time_base < 0.002))


def upright(frame):
    """A frame in full size RGB, as players show it."""
    return np.rot90(frame.reformat(format="rgb24").to_ndarray(), frame.rotation // 90 % 4)


def on_show(starts, times):
    """Indices of the last pictures that start at or before each time."""
    return [max(0, np.searchsorted(starts, t + 1e-7, "right") - 1) for t in times]


def in_window(starts, rate, window, tick=0.0):
    """Indices of the pictures that a Window asks for, from its definition."""
    count, begin = max(1, int(window.span * rate + 1e-6)), max(0.0, window.start)
    first = int((starts < begin - 1e-6 - tick).sum())
    stop = int((starts < begin + window.span + 0.5 / float(rate)).sum())
    if stop == len(starts):                                   # overruns the end: moved back
        first = min(first, max(0, len(starts) - count))
    inside = range(first, max(stop, first + 1))
    shown = [inside[k % len(inside)] for k in range(count)]
    return [shown[k] for k in subsample(count, window.num_frames)]


def seen(clip):
    return [number_of(image) for image in clip]


@pytest.mark.parametrize("name", FILES)
def test_pictures_on_show_at_any_times_are_those_of_a_sequential_decode(media, name):
    path = media(name)
    starts, numbers, _, _ = truth(path)
    arguments, first = FILES[name][1], {"mp4 edit list": 10}.get(name, 0)
    made = [k for k in range(arguments.get("n", 100)) if k not in arguments.get("drop", ())]
    assert list(numbers) == ([25] * 15 + made[25:] if "cut" in name else made[first:])
    rng, end = np.random.default_rng(0), starts[-1]
    requests = [[t] for t in rng.uniform(0, end + 0.01, 12)]
    requests += [sorted(rng.uniform(-0.2, end + 0.3, 6)) for _ in range(4)]
    requests += [list(a + np.arange(8) / 16) for a in rng.uniform(0, end + 0.01, 4)]
    requests += [list(starts[::7]), [0.0], [float(end)], [end + 5], [-3.0], list(starts)]
    for times in requests:
        clip, = read_clip(path, [times])
        assert seen(clip) == list(numbers[on_show(starts, times)]), times


@pytest.mark.parametrize("name", FILES)
def test_windows_hold_the_pictures_that_subsample_spreads_over_them(media, name):
    path = media(name)
    starts, numbers, rate, tick = truth(path)
    rng, end = np.random.default_rng(1), starts[-1] + 1 / float(rate)
    windows = [Window(rng.uniform(0, end), rng.choice([0.1, 0.5, 1.0, 0.7, 1.3]),
                      rng.integers(1, 20)) for _ in range(12)]
    windows += [Window(starts[k], 0.5, 8) for k in range(0, len(starts), 19)]
    windows += [Window(-1.0, 0.5, 4), Window(0, 0.5, 8), Window(0, 100.0, 16), Window(end, 1, 4),
                Window(end - 0.5, 1, 8), Window(end + 3, 0.5, 8), Window(0, 0.001, 1)]
    for w in windows:
        clip, = read_clip(path, [w])
        assert seen(clip) == list(numbers[in_window(starts, rate, w, tick)]), w


@pytest.mark.parametrize("name", FILES)
def test_several_windows_in_one_call_equal_one_call_each(media, name):
    path = media(name)
    starts, numbers, rate, tick = truth(path)
    rng, end = np.random.default_rng(2), starts[-1]
    for _ in range(2):
        near, far = rng.uniform(0, end, 2)
        windows = [[far], Window(near, 0.4, 4), [near + 0.1, near + 0.1, near + 0.3], [far],
                   Window(near + 0.2, 0.4, 4), Window(far, 0.2, 3), [0.0], [end], [near]]
        windows = [windows[k] for k in rng.permutation(len(windows))]
        clips = read_clip(path, windows)
        for w, clip in zip(windows, clips):
            window = isinstance(w, Window)
            right = in_window(starts, rate, w, tick) if window else on_show(starts, w)
            assert seen(clip) == list(numbers[right]), (w, windows)


# ---- colours ---------------------------------------------------------------------------------

def smooth(number, w, h):
    """Large soft patches of strong colour: what scaling and subsampling leave alone."""
    x, y = np.arange(w) / w, np.arange(h)[:, None] / h
    parts = [np.sin(7 * x + number) * np.cos(5 * y), np.cos(6 * x * y + 3), np.sin(9 * y - 4 * x)]
    return (128 + 110 * np.stack(np.broadcast_arrays(*parts), -1)).astype(np.uint8)


@pytest.mark.parametrize("space, full, pix_fmt", [
    (5, 1, "yuv420p"), (1, 1, "yuv420p"), (1, 2, "yuv420p"), (5, 2, "yuv420p"),
    (1, 1, "yuv444p"), (1, 1, "yuv420p10le")], ids=str)
def test_scaled_colours_are_those_of_an_antialiased_float_resize(tmp_path, space, full, pix_fmt):
    path = write_video(tmp_path / "a.mp4", n=3, size=(320, 240), options={**X264, "crf": "10"},
                       image=smooth, pix_fmt=pix_fmt,
                       colours={"colorspace": space, "color_range": full})
    with av.open(str(path)) as c:
        big = upright(next(c.decode(video=0))).copy()
    assert abs(big.astype(float) - smooth(0, 320, 240)).mean() < 3      # matrix and range are right
    (small,), = read_clip(path, [[0.0]], 100)
    assert small.shape == (100, 133, 3) and small.dtype == np.uint8
    right = F.interpolate(torch.from_numpy(big).permute(2, 0, 1)[None].float(), (100, 133),
                          mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    assert abs(small - right).mean() < 2.5
    (same,), = read_clip(path, [[0.0]])
    assert abs(same.astype(float) - big).max() <= 2


def test_pictures_are_never_enlarged_and_keep_their_shape(media):
    for name in "mp4 faststart", "odd size", "rotated 90", "rotated 180", "avi mpeg4":
        whole = read_clip(media(name), [[0.5]])[0][0].shape
        assert read_clip(media(name), [[0.5]], 4000)[0][0].shape == whole
        h, w, _ = read_clip(media(name), [[0.5]], 48)[0][0].shape
        assert min(h, w) == 48 and abs(w / h - whole[1] / whole[0]) < 0.02
        small, large = (read_clip(media(name), [[0.5]], side)[0] for side in (48, None))
        assert seen(small) == seen(large)


# ---- sound -----------------------------------------------------------------------------------

def tones(rate, channels, seconds):
    """(channels, samples) int16: a sweep with noise, different in every channel."""
    t = np.arange(round(rate * seconds)) / rate
    noise = np.random.default_rng(3).normal(0, 0.02, (channels, len(t)))
    x = [0.5 * np.sin(2 * np.pi * (200 + 90 * k + 300 * t) * t) for k in range(channels)]
    return ((np.stack(x) + noise).clip(-1, 1) * 32767).astype(np.int16)


def add_sound(c, sound):
    codec, rate, layout = sound[:3]
    a = c.add_stream(codec, rate=rate, layout=layout, options={
        "strict": "experimental", **({"aac_pns": "0"} if codec == "aac" else {})})
    a.codec_context.open()
    return a


def sound_packets(a, sound):
    """Packets of `tones`, or of sound[4] (channels, samples) int16, begun sound[3] seconds late."""
    _, rate, layout, delay, x = (*sound, *(0.0, None)[len(sound) - 3:])
    channels = a.codec_context.layout.nb_channels
    x = tones(rate, channels, 4.0) if x is None else x
    shape = av.AudioResampler(format=a.codec_context.format, layout=layout, rate=rate,
                              frame_size=a.codec_context.frame_size or 1024)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x), format="s16p", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    packets = []
    for f in [*shape.resample(frame), *shape.resample(None), None]:
        packets += a.encode(f)
    for p in packets:
        p.pts, p.dts = (t + round(delay / p.time_base) for t in (p.pts, p.dts))
    return packets


def whole_sound(path):
    """Sequential decode: ([(samples since the first picture, (channels, n) float32)], rate)."""
    with av.open(str(path)) as c:
        v, a, out = c.streams.video[0], c.streams.audio[0], []
        origin = (v.start_time or 0) * v.time_base
        for f in c.decode(a):
            x = f.to_ndarray()
            x = x if f.format.is_planar else x.reshape(-1, f.layout.nb_channels).T
            x = x.astype(np.float32) - 128 * (x.dtype == np.uint8)
            x /= {"u8": 128, "s16": 32768, "s32": 2 ** 31}.get(f.format.name.rstrip("p"), 1)
            out.append((float(f.pts * f.time_base - origin) * a.rate, x))
        return out, a.rate


def placed(pieces, keep_flow):
    """The pieces in one array that begins at sample 0; without time stamps after the first if the
    container's are coarse."""
    at, flow = round(pieces[0][0]), []
    for b, x in pieces:
        at = at if keep_flow else round(b)
        flow.append((at, x))
        at += x.shape[1]
    out = np.zeros((flow[0][1].shape[0], max(b + x.shape[1] for b, x in flow)), np.float32)
    for b, x in flow:
        x = x[:, max(0, -b):]
        out[:, max(b, 0):max(b, 0) + x.shape[1]] = x
    return out


SOUNDS = {         # name: (suffix, sound, exact)
    "aac mono 16000": (".mp4", ("aac", 16000, "mono"), True),
    "aac stereo 44100": (".mp4", ("aac", 44100, "stereo"), True),
    "aac stereo 22050": (".mp4", ("aac", 22050, "stereo"), True),
    "aac 5.1 48000": (".mp4", ("aac", 48000, "5.1"), True),
    "aac mkv": (".mkv", ("aac", 44100, "stereo"), True),
    "aac ts": (".ts", ("aac", 48000, "stereo"), True),
    "mp3 mp4": (".mp4", ("libmp3lame", 44100, "stereo"), True),
    "mp3 avi": (".avi", ("libmp3lame", 44100, "stereo"), True),
    "mp3 avi 16000": (".avi", ("libmp3lame", 16000, "mono"), True),
    "pcm avi": (".avi", ("pcm_s16le", 44100, "stereo"), True),
    "pcm u8 avi": (".avi", ("pcm_u8", 22050, "mono"), True),
    "pcm mkv": (".mkv", ("pcm_s16le", 16000, "mono"), True),
    "pcm mkv 44100": (".mkv", ("pcm_s16le", 44100, "stereo"), True),
    "pcm mov": (".mov", ("pcm_s16le", 48000, "stereo"), True),
    "ac3 ts": (".ts", ("ac3", 48000, "stereo"), False),
    "mp2 mpg": (".mpg", ("mp2", 44100, "stereo"), True),
    "opus webm": (".webm", ("libopus", 48000, "stereo"), False),
    "opus mkv": (".mkv", ("libopus", 48000, "mono"), False),
    "vorbis mkv": (".mkv", ("vorbis", 44100, "stereo"), False),
    "aac late": (".mp4", ("aac", 44100, "mono", 1.0), True),
    "aac late mkv": (".mkv", ("aac", 44100, "mono", 1.0), True),
    "aac late ts": (".ts", ("aac", 44100, "mono", 1.0), True),
    "both at 1.4 s": (".ts", ("aac", 48000, "stereo"), True),
}
VIDEO = {".avi": args(codec="mpeg4", options=Q), ".webm": args(codec="libvpx-vp9", options=VP9),
         ".mpg": args(codec="mpeg2video", options=Q)}


@pytest.fixture(scope="session")
def sounding(tmp_path_factory):
    """From a name in SOUNDS to its file."""
    folder = tmp_path_factory.mktemp("sound")

    @functools.cache
    def get(name):
        suffix, sound, _ = SOUNDS[name]
        return write_video(folder / f"{name}{suffix}", sound=sound, size=(64, 48),
                           offset=1.4 if "1.4" in name else 0.0,
                           **VIDEO.get(suffix, args(options=X264, bf=2)))
    return get


@pytest.mark.parametrize("name", SOUNDS)
def test_any_window_of_sound_equals_the_sequential_decode(sounding, name):
    path, exact = sounding(name), SOUNDS[name][2]
    dither = 4e-5 if "mp2" in name else 0                     # the last bit of 16
    pieces, rate = whole_sound(path)
    right = placed(pieces, keep_flow=path.suffix in (".mkv", ".webm", ".ts", ".mpg", ".avi"))
    assert abs(right).max() > 0.3
    whole, r = read_audio(path)
    assert r == rate and whole.dtype == np.float32 and abs(whole).max() <= 1
    if exact:
        assert np.array_equal(whole, right)
    rng, end = np.random.default_rng(4), right.shape[1] / rate
    wanted = [(s, s + d) for s, d in zip(rng.uniform(0, end, 15), rng.uniform(0.01, 1.5, 15))]
    wanted += [(0.0, 0.5), (end - 0.3, end + 2), (end + 1, end + 2), (-1.0, 0.4), (-2.0, -1.0)]
    for start, stop in wanted:
        x, _ = read_audio(path, start, stop)
        low, high = max(0, math.floor(start * rate)), max(0, math.floor(stop * rate))
        y = right[:, low:high]
        if exact:
            assert x.shape == y.shape and np.allclose(x, y, rtol=0, atol=dither), (start, stop)
        else:                             # time stamps of a millisecond, in AC3 random dither
            assert abs(x.shape[1] - y.shape[1]) <= rate // 500
            n, play = min(x.shape[1], y.shape[1]), rate // 1000 + 1
            if n > 4 * play:
                fits = [abs(x[:, play:n - play] - y[:, play + k:n - play + k]).mean()
                        for k in range(-play, play + 1)]
                assert min(fits) < 0.02, (start, stop, min(fits))


def test_late_sound_begins_with_silence(sounding):
    for name in "aac late", "aac late mkv", "aac late ts":
        x, rate = read_audio(sounding(name), 0.0, 2.0)
        assert x.shape[1] == 2 * rate
        assert abs(x[:, :int(0.9 * rate)]).max() == 0 and abs(x[:, int(1.1 * rate):]).max() > 0.3
        y, _ = read_audio(sounding(name), 0.2, 0.5)
        assert not y.any() and y.shape[1] == math.floor(0.5 * rate) - math.floor(0.2 * rate)


def test_a_gap_in_the_sound_is_silent_and_keeps_what_follows_in_place(tmp_path):
    def gap(packets):
        return [p for p in packets if p.stream.type == "video" or not 1 < p.pts * p.time_base < 2]

    for suffix in ".mkv", ".mp4", ".ts":
        path = tmp_path / f"gap{suffix}"
        with av.open(str(path), "w") as c:
            a = add_sound(c, ("aac", 48000, "mono"))
            v = c.add_stream("libx264", rate=25, options=X264)
            v.width, v.height, v.pix_fmt = 64, 48, "yuv420p"
            packets = sound_packets(a, ("aac", 48000, "mono"))
            for k in range(100):
                f = av.VideoFrame.from_ndarray(paint(k, 64, 48), format="rgb24")
                f.pts, f.time_base = k, Fraction(1, 25)
                packets += v.encode(f)
            for p in sorted(gap(packets + v.encode(None)), key=lambda p: p.dts * p.time_base):
                c.mux(p)
        whole, rate = read_audio(path)
        assert not whole[:, int(1.1 * rate):int(1.9 * rate)].any(), suffix
        x, _ = read_audio(path, 2.5, 3.0)
        y = tones(48000, 1, 4.0)[0] / 32768                   # in mkv to a millisecond
        assert max(np.corrcoef(x[0], y[120000 + k:144000 + k])[0, 1]
                   for k in range(-49, 50)) > 0.95, suffix
        assert np.array_equal(x, whole[:, 120000:144000]), suffix


def test_pictures_and_sound_in_one_call_equal_two_calls(sounding):
    for name in SOUNDS:
        path = sounding(name)
        windows = [Window(1.0, 0.5, 4), [0.2, 0.3], Window(3.2, 0.5, 3)]
        clips, (x, rate) = read_clip(path, windows, 32, sound=(1.1, 2.3))
        y, rate_ = read_audio(path, 1.1, 2.3)
        assert rate == rate_ and x.shape == y.shape
        assert not SOUNDS[name][2] or np.allclose(x, y, rtol=0, atol=4e-5), name
        for clip, w in zip(clips, windows):
            assert np.array_equal(clip, read_clip(path, [w], 32)[0])


def test_a_file_without_sound_says_so(media):
    with pytest.raises(VideoError, match="has no sound") as e:
        read_audio(media("mkv"))
    assert str(e.value).startswith(str(media("mkv")))
    with pytest.raises(VideoError, match="has no sound"):
        read_clip(media("mkv"), [[0.0]], sound=(0, 1))
    assert probe(media("mkv"))[4:] == (0, 0)


@pytest.mark.parametrize("suffix, codec, offset", [
    (".mp4", "aac", 0), (".mkv", "aac", 1.5), (".mp4", "libmp3lame", 0), (".mkv", "aac", 0),
    (".mkv", "libopus", 0), (".ts", "aac", 0), (".ts", "ac3", 1.4), (".avi", "libmp3lame", 0),
    (".avi", "pcm_s16le", 0), (".mpg", "mp2", 0)])
def test_a_flash_and_a_click_are_found_at_the_same_time(tmp_path, suffix, codec, offset):
    x = np.zeros((1, 4 * 48000), np.int16)
    x[:, 100560:101040] = 20000 * np.sign(np.sin(np.arange(480) / 5))   # 2.095 .. 2.105 s
    video = VIDEO.get(suffix, args(options=X264, bf=2))
    path = write_video(tmp_path / f"a{suffix}", size=(64, 48), offset=offset, **video,
                       image=lambda k, w, h: paint(k, w, h, 255 if k in (52, 53) else 40),
                       sound=(codec, 48000, "mono", 0.0, x))
    (clip,), (sound, rate) = read_clip(path, [list(1.7 + np.arange(100) / 125)], sound=(1.7, 2.5))
    lit = 1.7 + np.flatnonzero(clip[:, 30:44].mean((1, 2, 3)) > 150).mean() / 125
    heard = 1.7 + np.average(np.arange(sound.shape[1]), weights=sound[0] ** 2) / rate
    assert abs(lit - 2.12) < 0.05 and abs(heard - 2.10) < 0.05 and abs(lit - heard) < 0.042


# ---- faults ----------------------------------------------------------------------------------

def attempt(path, *windows, sound=None):
    """Clips, or the text of a VideoError that begins with the path; nothing else may be raised."""
    try:
        return read_clip(path, list(windows), sound=sound)
    except VideoError as e:
        assert str(e).startswith(str(path))
        return str(e)


def test_files_that_are_no_videos_are_refused_with_their_path(tmp_path, media):
    good = media("mp4 no b").read_bytes()
    bad = {"empty": b"", "text": b"<html>not found</html>\n" * 200,
           "moov lost": good[:len(good) // 2], "random": np.random.default_rng(0).bytes(50000)}
    for name, data in bad.items():
        (tmp_path / f"{name}.mp4").write_bytes(data)
    (tmp_path / "folder.mp4").mkdir()
    with wave.open(str(tmp_path / "sound only.wav"), "wb") as f:
        f.setparams((1, 2, 8000, 0, "NONE", ""))
        f.writeframes(bytes(16000))
    for path in [*sorted(tmp_path.iterdir()), tmp_path / "missing.mp4"]:
        for reader in (lambda p: read_clip(p, [[0.0]]), probe, read_audio):
            if reader is read_audio and path.suffix == ".wav":
                continue
            with pytest.raises(VideoError) as e:
                reader(path)
            assert str(e.value).startswith(str(path))
    assert read_audio(tmp_path / "sound only.wav")[0].shape == (1, 8000)


TRUNCATED = ["mp4 faststart", "mp4 fragmented", "mp4 b-frames, one gop", "mkv", "webm vp9", "ts",
             "mpg mpeg2", "avi mpeg4", "avi packed b-frames", "avi without index"]


@pytest.mark.parametrize("name", TRUNCATED)
def test_a_truncated_file_gives_the_right_pictures_or_an_error(tmp_path, media, name):
    data = media(name).read_bytes()
    starts, numbers, rate, _ = truth(media(name))
    for percent in (10, 50, 90):
        path = tmp_path / f"{percent}{media(name).suffix}"
        path.write_bytes(data[:len(data) * percent // 100])
        outcomes, held = [], 0
        for t in np.arange(0.02, 4, 0.12):
            result = attempt(path, [t])
            if isinstance(result, str):
                outcomes.append(result)
                continue
            number, right = number_of(result[0][0]), numbers[on_show(starts, [t])[0]]
            known = path.suffix in (".mp4", ".mkv", ".webm", ".avi") and "frag" not in name
            if number != right and number != -1:              # the last that there is
                held = held or number
                assert number < right and abs(number - held) <= 25
                assert not known or (right - number) / rate <= 1.01, (percent, t)
        if percent == 50 and name in ("mp4 faststart", "mkv", "avi mpeg4"):
            assert outcomes
            with pytest.raises(VideoError):
                read_clip(path, [Window(3.0, 0.5, 4)])


def test_mkv_whose_sound_lasts_longer_is_not_taken_for_a_truncated_one(tmp_path):
    x = tones(48000, 1, 4.0)
    path = write_video(tmp_path / "a.mkv", n=50, options=X264, sound=("aac", 48000, "mono", 0.0, x))
    (clip,) = read_clip(path, [[1.9, 3.0, 3.9]])
    assert seen(clip) == [47, 49, 49]


@pytest.mark.parametrize("name", ["mp4 faststart", "mkv", "ts", "avi mpeg4 b-frames", "mpg mpeg2",
                                  "webm vp9"])
def test_flipped_bits_raise_nothing_but_video_errors(tmp_path, media, sounding, name):
    rng = np.random.default_rng(7)
    loud = sounding({".mp4": "aac stereo 44100", ".mkv": "aac mkv", ".ts": "ac3 ts",
                     ".avi": "mp3 avi", ".mpg": "mp2 mpg", ".webm": "opus webm"}
                    [media(name).suffix]).read_bytes()
    for trial in range(16):
        data = bytearray(loud if trial % 2 else media(name).read_bytes())
        end = len(data) if trial % 4 < 2 else min(len(data), 3000)
        for at in rng.integers(0, end, rng.integers(1, 30)):
            data[at] ^= 1 << rng.integers(8)
        path = tmp_path / f"{trial}{media(name).suffix}"
        path.write_bytes(data)
        begin = time.monotonic()
        attempt(path, [0.3, 0.9], Window(2.0, 0.5, 4), [3.9], sound=(1.0, 1.5))
        attempt(path, Window(1.0, 0.5, 4))
        for reader in (probe, read_audio):
            try:
                reader(path)
            except VideoError as e:
                assert str(e).startswith(str(path))
        assert time.monotonic() - begin < 10


def test_a_damaged_picture_in_an_avi_does_not_shift_the_ones_behind_it(tmp_path, media):
    for name in "avi mpeg4", "avi mpeg4 b-frames":
        data = bytearray(media(name).read_bytes())
        with av.open(str(media(name))) as c:
            spoiled = [p.pos for k, p in enumerate(c.demux(video=0)) if p.size and k % 12 in (5, 7)]
        for at in spoiled[:8]:
            data[at + 8:at + 16] = bytes(8)                   # the start code goes
        path = tmp_path / f"{name}.avi"
        path.write_bytes(data)
        starts, numbers, _, _ = truth(media(name))
        for t in np.arange(2.6, 3.9, 0.1):
            clip, = read_clip(path, [[t]])
            assert seen(clip) == list(numbers[on_show(starts, [t])]), (name, t)


def test_names_and_tags_of_any_kind_are_read(tmp_path, media):
    good = media("mp4 no b")
    for name in ("a:b.mp4", "http:x.mp4", "it's \"q\".mp4", "two  spaces.mp4", "\U0001f600 é.mp4",
                 "-y.mp4", "%d.mp4", "%03d.mp4", "new\nline.mp4", "a#b?c&d.mp4", "[x]*{y}.mp4"):
        shutil.copy(good, tmp_path / name)
        assert seen(read_clip(tmp_path / name, [[1.0]])[0]) == [25], name
    old = os.getcwd()
    os.chdir(tmp_path)
    try:
        for name in "-y.mp4", "a:b.mp4", "%d.mp4":
            assert seen(read_clip(Path(name), [[1.0]])[0]) == [25], name
    finally:
        os.chdir(old)
    with av.open(str(tmp_path / "t.mkv"), "w") as c, av.open(str(good)) as source:
        c.metadata["title"] = "Zz\u00e9\u00e9zZ"
        out = c.add_stream_from_template(source.streams.video[0])
        for p in source.demux(video=0):
            if p.dts is not None:
                p.stream = out
                c.mux(p)
    data = (tmp_path / "t.mkv").read_bytes()
    assert b"Zz\xc3\xa9\xc3\xa9zZ" in data
    (tmp_path / "t.mkv").write_bytes(data.replace(b"Zz\xc3\xa9\xc3\xa9zZ", b"Zz\xe9\xe9\xff\xfezZ"))
    assert seen(read_clip(tmp_path / "t.mkv", [[1.0]])[0]) == [25]


# ---- leaks and speed -------------------------------------------------------------------------

def test_six_hundred_opens_leave_nothing_behind(tmp_path, media, sounding):
    (tmp_path / "bad.mp4").write_bytes(media("mp4 no b").read_bytes()[:3000])
    data = media("mp4 faststart").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[:len(data) // 2])
    paths = [media("mp4 faststart"), tmp_path / "bad.mp4", tmp_path / "none.mp4",
             media("avi mpeg4"), tmp_path / "cut.mp4", sounding("aac mkv")]

    def state():
        with open("/proc/self/statm") as f:
            pages = int(f.read().split()[1])
        return len(os.listdir("/proc/self/fd")), threading.active_count(), \
            len(os.listdir("/proc/self/task")), pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20

    for k in range(660):
        if k == 60:
            before = state()
        attempt(paths[k % 6], [3.0 if k % 6 == 4 else 0.2],
                sound=(0.1, 0.2) if k % 6 == 5 else None)
    after = state()
    assert after[:3] == before[:3] and after[3] - before[3] < 20, (before, after)


def cost(*jobs):
    """Least CPU seconds of each of several jobs, run in turns: what others do only adds to them."""
    spent = [[] for _ in jobs]
    for _ in range(7):
        for k, job in enumerate(jobs):
            begin = time.process_time()
            job()
            spent[k].append(time.process_time() - begin)
    return [min(x) for x in spent]


def decode_limit(path, start, stop):
    """Open, seek, decode every picture from the key frame to `stop`; nothing is converted."""
    with av.open(str(path)) as c:
        v = c.streams.video[0]
        v.codec_context.thread_type, v.codec_context.thread_count = "NONE", 1
        c.seek(int(start / v.time_base), stream=v)
        for f in c.decode(v):
            if f.time >= stop:
                break


def decode_all(path):
    """Open and decode the whole file to full-size RGB."""
    with av.open(str(path)) as c:
        v = c.streams.video[0]
        v.codec_context.thread_type, v.codec_context.thread_count = "NONE", 1
        for f in c.decode(v):
            f.to_ndarray(format="rgb24")


@functools.cache
def texture(w, h):
    """(h, w, 3) float32, smooth noise."""
    noise = torch.randn(1, 3, 40, 60, generator=torch.Generator().manual_seed(11))
    return F.interpolate(noise, (h, w), mode="bicubic")[0].permute(1, 2, 0).numpy()


def busy(k, w, h):
    """A panning texture with grain."""
    field = texture(w + 300, h)[:, k:k + w]
    grain = np.random.default_rng(k).normal(0, 4, (h, w, 1))
    return (128 + 45 * field + grain).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("suffix, most, arguments", [
    (".mp4", 1.15, args(n=250, size=(340, 256), gop=250, bf=3, options={
        "preset": "veryfast", "x264-params": "keyint=250:min-keyint=250:scenecut=0"})),
    (".avi", 2.5, args(codec="mpeg4", n=175, size=(320, 240), gop=12, options=Q))])
def test_a_clip_costs_about_as_much_as_its_decoding(tmp_path, suffix, most, arguments):
    """With room for a busy machine; `make bench` has the targets."""
    path = write_video(tmp_path / f"a{suffix}", image=busy, **arguments)
    starts = [2.9, 4.1, 5.0] if suffix == ".avi" else [4.1, 5.9, 7.7]

    def clips(*shifts):
        return [read_clip(path, [list(s + d + np.arange(16) / 16) for d in shifts], 128)
                for s in starts]

    clip, limit, whole, two = cost(
        lambda: clips(0), lambda: [decode_limit(path, s, s + 15 / 16) for s in starts],
        lambda: decode_all(path), lambda: clips(0, 1.0))
    print(f"\n{suffix} clip / limit {clip / limit:.3f}  clip / all {clip / 3 / whole:.3f}  "
          f"two / one {two / clip:.3f}  limit {limit / 3 * 1000:.1f} ms")
    assert clip <= most * limit and clip / 3 <= 0.4 * whole
    assert suffix != ".mp4" or two <= 1.35 * clip
